"""Denoised smoothing as its algorithm is written."""

from __future__ import annotations

import math

import torch
from torch import nn

from coupfast.sde import NUM_LABELS, VPSDE


def smoothing_ref(
    x: torch.Tensor,
    score: nn.Module,
    z: torch.Tensor | None,
    steps: range,
    *,
    sigma: float,
    clip: bool = False,
    sde: VPSDE | None = None,
) -> torch.Tensor:
    """Carlini et al. 2022, arXiv:2206.10550, algorithm 1: noise, scale, and denoise in one shot.

    Args:
        x: In the [-1, 1] scale; after step 0 it carries noise and is scaled.
        z: Noise of step 0.
        steps: 0 adds noise, 1 denoises.
        sigma: Standard deviation on images in [0, 1].
        clip: The denoised image to [-1, 1].
    """
    sde = sde or VPSDE()
    alpha_bar = 1 / (1 + (2 * sigma) ** 2)
    for k in steps:
        if k == 0:
            assert z is not None
            x = math.sqrt(alpha_bar) * (x + 2 * sigma * z)
            continue
        a, b, c = (sde.beta_max - sde.beta_min) / 2, sde.beta_min, math.log(alpha_bar)
        t = (math.sqrt(b**2 - 4 * a * c) - b) / (2 * a) if a else -c / b
        eps_hat = score(x, torch.full((len(x),), NUM_LABELS * t, dtype=x.dtype, device=x.device))
        x = (x - math.sqrt(1 - alpha_bar) * eps_hat) / math.sqrt(alpha_bar)
        if clip:
            x = torch.clamp(x, -1, 1)
    return x
