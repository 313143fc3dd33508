"""A defense under evaluation: its noise can be set, its work is counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from coupfast.evaluation.purification import describe
from coupfast.models.checkpoints import state_dict_sha256
from coupfast.naming import reference_to
from coupfast.purify import PurifiedClassifier


class Metered(nn.Module):
    """Images in [0, 1] → logits, through a `PurifiedClassifier` or any other module.

    Attributes:
        forward_images: Images that went through without a gradient being recorded, since `reset`.
        gradient_images: Images that went through with one.
        passed: Told of each call's images when they are through; None if nobody asks.

    Raises:
        TypeError: if the model is no module.
        ValueError: if it, or a batch norm in it, is in training mode.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"a defense is an nn.Module from images in [0, 1] to logits, got {type(model).__name__}")
        learning = [m for m in model.modules() if m.training and isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if model.training or learning:
            where = "" if model.training else f" (its {type(learning[0]).__name__})"
            raise ValueError(f"the defense is in training mode{where}; call .eval() first")
        self.model = model
        self.forward_images = self.gradient_images = 0
        self.passed: Callable[[int], object] | None = None
        self.training = False  # what is inside stays as it is: a defense may have dropout on purpose
        self._inner = [module for module in model.modules() if isinstance(module, PurifiedClassifier)]

    @property
    def purified(self) -> PurifiedClassifier | None:
        return self.model if isinstance(self.model, PurifiedClassifier) else None

    def reseed(self, seed: int, draw: int = 0) -> None:
        """From here on all noise follows from `seed`, in [0, 2**63), and from the draw to begin with."""
        for purified in self._inner:  # the model itself, or parts of it
            purified.seed, purified.next_draw = seed, draw
        torch.manual_seed(seed)  # a classifier with noise of its own takes it from there

    def reset(self) -> None:
        self.forward_images = self.gradient_images = 0

    def noise(self) -> list[tuple[int, int]]:
        """Seeds and counters of all purifications inside, for `set_noise`."""
        return [(purified.seed, purified.next_draw) for purified in self._inner]

    def set_noise(self, noise: Sequence[tuple[int, int]]) -> None:
        for purified, (seed, draw) in zip(self._inner, noise, strict=True):
            purified.seed, purified.next_draw = seed, draw

    def describe(self) -> dict[str, Any]:
        """What it is, the engine that runs and SHA-256 of the weights, as JSON has them."""
        if self.purified is None:
            return {"class": reference_to(type(self.model)), "classifier_sha256": state_dict_sha256(self.model)}
        purifier = self.purified.purifier
        guidance = purifier.classifier
        return {
            **describe(purifier),
            "score_sha256": state_dict_sha256(purifier.score),
            "guidance_sha256": None if guidance is None else state_dict_sha256(guidance),
            "classifier_sha256": state_dict_sha256(self.purified.classifier),
        }

    def forward(
        self,
        x: torch.Tensor,
        *,
        ids: Sequence[int] | torch.Tensor | None = None,
        draw: int | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits; `ids` and `draw` name the noise, as in `PurifiedClassifier`, and mean nothing to other modules.

        Raises:
            FloatingPointError: if a logit is NaN.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            self.gradient_images += len(x)
        else:
            self.forward_images += len(x)
        logits: torch.Tensor = self.model(x) if self.purified is None else self.model(x, ids=ids, draw=draw)
        if bool(torch.isnan(logits).any()):  # whose largest is class 0
            wrong = int(torch.isnan(logits).any(dim=1).sum())
            raise FloatingPointError(f"of {len(x)} images {wrong} have a logit that is no number (NaN)")
        if self.passed is not None:
            self.passed(len(x))
        return logits
