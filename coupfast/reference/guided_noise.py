"""What a definition asks the networks: the predicted noise of the guided score."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import nn

from coupfast.reference.confidence import confidence_gradient
from coupfast.sde import NUM_LABELS, VPSDE


@dataclasses.dataclass(frozen=True)
class GuidedNoise:
    """ε̂ − λ(t) σ(t) ∇ log p(ŷ | x), ε̂ first brought to what belongs to clip(x̂0, ±1) where that is asked for.

    Attributes:
        score: (x, labels) → ε̂.
        classifier: None for no guidance.
        sde: Whose ᾱ(t) = α², σ(t).
        guidance_scale: λ(t).
        clip: Whether x̂0 = (x − σ ε̂)/α is clipped.
        detached: Take the guidance as a constant in gradients.
    """

    score: nn.Module
    classifier: nn.Module | None
    sde: VPSDE
    guidance_scale: Callable[[float], float] = lambda t: 0.0
    clip: bool = False
    detached: bool = False

    def __call__(self, x: torch.Tensor, t: float) -> torch.Tensor:
        """At a state of time t, shape (batch, channels, height, width)."""
        alpha, sigma = self.rates(t)
        eps = self.score(x, torch.full((len(x),), NUM_LABELS * t, dtype=x.dtype, device=x.device))
        if self.clip:
            image = torch.clamp((x - sigma * eps) / alpha, -1.0, 1.0)
            eps = (x - alpha * image) / sigma
        if self.classifier is not None:
            gradient = confidence_gradient(self.classifier, x, detached=self.detached)
            eps = eps - self.guidance_scale(t) * sigma * gradient
        return eps

    def rates(self, t: float) -> tuple[float, float]:
        """α(t) and σ(t)."""
        return float(self.sde.alpha_bar(t)) ** 0.5, float(self.sde.sigma(t))

    def beta(self, s: float, t: float) -> float:
        """1 − α(s)²/α(t)²: the variance that the chain adds from t up to s."""
        return -math.expm1(float(self.sde.log_alpha_bar(s) - self.sde.log_alpha_bar(t)))
