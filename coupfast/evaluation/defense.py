"""A classifier under evaluation: its noise can be set, its work is counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from coupfast.models.checkpoints import state_dict_sha256
from coupfast.purify import PurifiedClassifier, Purifier

NO_DEFENSE = "none"


def settings(purifier: Purifier) -> dict[str, Any]:
    """What decides a purifier's output beside its networks and the noise, as JSON has it."""
    return {
        "method": purifier.method,
        "t": purifier.t,
        "num_steps": purifier.num_steps,
        "guidance_scale": purifier.guidance_scale,
        "solver": purifier.solver,
        "clamp": purifier.clamp,
        "beta_min": purifier.sde.beta_min,
        "beta_max": purifier.sde.beta_max,
        "engine": purifier.engine,
        "precision": purifier.precision,
    }


class Defense(nn.Module):
    """Images in [0, 1] → logits, through a `PurifiedClassifier` or any other classifier.

    Attributes:
        forward_images: Images that went through without a gradient being recorded, since `reset`.
        gradient_images: Images that went through with one.
        passed: Told of each call's images when they are through; None if nobody asks.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forward_images = self.gradient_images = 0
        self.passed: Callable[[int], object] | None = None
        self.eval()

    @property
    def purified(self) -> PurifiedClassifier | None:
        return self.model if isinstance(self.model, PurifiedClassifier) else None

    def reseed(self, seed: int) -> None:
        """From here on all noise follows from `seed`, in [0, 2**63)."""
        if self.purified is not None:
            self.purified.seed, self.purified.next_draw = seed, 0
        torch.manual_seed(seed)  # a classifier with noise of its own takes it from there

    def reset(self) -> None:
        self.forward_images = self.gradient_images = 0

    def describe(self) -> dict[str, Any]:
        """Settings, the engine that runs and SHA-256 of the weights, as JSON has them."""
        if self.purified is None:
            return {"method": NO_DEFENSE, "classifier_sha256": state_dict_sha256(self.model)}
        purifier = self.purified.purifier
        guidance = purifier.classifier
        return {
            **settings(purifier),
            "gradient": purifier.gradient,
            "guidance_gradient": purifier.guidance_gradient,
            "memory_budget": purifier.memory_budget,
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
        """Logits; `ids` and `draw` name the noise, as in `PurifiedClassifier`, and mean nothing to other classifiers.

        Raises:
            FloatingPointError: if a logit is NaN.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            self.gradient_images += len(x)
        else:
            self.forward_images += len(x)
        logits = self.model(x) if self.purified is None else self.model(x, ids=ids, draw=draw)
        if bool(torch.isnan(logits).any()):  # whose largest is class 0
            wrong = int(torch.isnan(logits).any(dim=1).sum())
            raise FloatingPointError(f"of {len(x)} images {wrong} have a logit that is no number (NaN)")
        if self.passed is not None:
            self.passed(len(x))
        return logits
