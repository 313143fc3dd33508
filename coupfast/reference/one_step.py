"""Denoising in one shot, and consistency functions: noise, ask, and again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from coupfast.sde import NUM_LABELS, VPSDE


def one_step_ref(
    x: torch.Tensor,
    score: nn.Module,
    z: Callable[[int], torch.Tensor],
    steps: range,
    *,
    times: Sequence[float],
    factors: Callable[[float], tuple[float, float]] | None,
    clip: bool,
    sde: VPSDE,
) -> torch.Tensor:
    """Some of the steps, of which even ones noise and odd ones ask; `factors(t)` are c_skip and c_out, None predicts noise."""
    for k in steps:
        t = times[k // 2]
        alpha_bar = math.exp(float(sde.log_alpha_bar(t)))
        if k % 2 == 0:
            x = math.sqrt(alpha_bar) * x + math.sqrt(1.0 - alpha_bar) * z(k)
            continue
        output = score(x, torch.full((len(x),), NUM_LABELS * t, dtype=x.dtype, device=x.device))
        if factors is None:
            x = (x - math.sqrt(1.0 - alpha_bar) * output) / math.sqrt(alpha_bar)
        else:
            skip, out = factors(t)
            x = skip * x + out * output
        if clip:
            x = torch.clamp(x, -1.0, 1.0)
    return x
