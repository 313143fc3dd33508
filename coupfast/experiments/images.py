"""Attacked images of a run, and what purifications make of them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from coupfast.evaluation import Evaluation, Spec
from coupfast.experiments.scale import Scale
from coupfast.purify import PurifiedClassifier


def of_run(folder: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clean images, attacked ones and labels of a finished run."""
    with contextlib.closing(Evaluation(folder)) as found:
        spec = found.ledger.configuration["spec"]
        x_adv = found.x_adv
        labels = torch.from_numpy(found.verdicts["clean"].labels)
    x, _ = Spec(images=spec["images"], limit=spec["limit"]).load()
    return x, x_adv, labels


def defended(scale: Scale, keywords: Mapping[str, Any]) -> PurifiedClassifier:
    """The classifier behind a purification that no gradient is asked of."""
    model = scale.spec({**keywords, "attack": "none", "gradient": "none"}).networks()(scale.device)
    assert isinstance(model, PurifiedClassifier)
    return model


def purified(model: PurifiedClassifier, x: torch.Tensor, seed: int, batch: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Images after purification and the classifier's confidences on them, (n, classes)."""
    pures, confidences = [], []
    with torch.no_grad():
        for ids in torch.arange(len(x)).split(batch):
            pures.append(model.purifier(x[ids], seed=seed, ids=ids, draw=0))
            confidences.append(model.classifier(pures[-1]).softmax(dim=1))
    return torch.cat(pures), torch.cat(confidences)


def quiet(model: PurifiedClassifier, x: torch.Tensor, batch: int = 16) -> torch.Tensor:
    """Confidences along a purification whose noise is left out, (steps + 1, n, classes), as the paper's Fig. 2a has it."""
    found = []
    with torch.no_grad():
        for part in x.split(batch):
            silence = part.new_zeros(model.purifier.settings.method.num_noises, *part.shape)
            _, states = model.purifier(part, noise=silence, return_trajectory=True)
            found.append(torch.stack([model.classifier(((x_k + 1) / 2).clamp(0, 1)).softmax(dim=1) for x_k in states]))
    return torch.cat(found, dim=1)


def opposite(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the images on which the second of two defenses is right and the first is not, and of the opposite kind."""
    return np.flatnonzero(~first & second), np.flatnonzero(first & ~second)
