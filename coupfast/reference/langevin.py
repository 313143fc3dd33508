"""DiffPure's Langevin variant. Nie et al. 2022, arXiv:2205.07460."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from coupfast.sde import NUM_LABELS, VPSDE


def langevin_ref(
    x: torch.Tensor,
    x_in: torch.Tensor,
    score: nn.Module,
    z: Callable[[int], torch.Tensor],
    steps: range,
    *,
    t: float,
    step_size: float,
    score_time: float,
    pull_variance: float,
    rate: float,
    noise_scale: float,
    sde: VPSDE,
) -> torch.Tensor:
    """Some of Euler-Maruyama's steps on dx = ½ λ [s(x) − (x − x_in)/σ²] dt + η sqrt(λ) dw; `z(k)` is step k's noise."""
    sigma = float(sde.sigma(score_time))
    for k in steps:
        h = min(step_size, t - k * step_size)
        labels = torch.full((len(x),), NUM_LABELS * score_time, dtype=x.dtype, device=x.device)
        drift = 0.5 * rate * (-score(x, labels) / sigma - (x - x_in) / pull_variance)
        x = x + h * drift + noise_scale * math.sqrt(rate * h) * z(k)
    return x
