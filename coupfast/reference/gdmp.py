"""GDMP with the guide of the mean squared error, as its sampler is written. Wang et al. 2022, arXiv:2205.14969."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from coupfast.sde import NUM_LABELS


def gdmp_ref(
    x: torch.Tensor,
    x_in: torch.Tensor,
    score: nn.Module,
    z: Callable[[int], torch.Tensor],
    z2: Callable[[int], torch.Tensor],
    steps: range,
    *,
    noise_steps: int,
    guide_scale: float,
    guide_radius: float,
    elements: int,
) -> torch.Tensor:
    """Some of the steps of all rounds; a round has one of noising and noise_steps − 1 of denoising.

    Args:
        x, x_in: State and input of the purification, in the [-1, 1] scale.
        z, z2: The noise of a step, and that of its guide.
        elements: Of all that the mean of the squared error goes over.
    """
    betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    logs = [0.0]  # log ᾱ of index i in place i + 1: 1 − ᾱ of the first ones is small
    for beta in betas:
        logs.append(logs[-1] + math.log1p(-beta))
    alpha_bars, rests = [math.exp(log) for log in logs], [-math.expm1(log) for log in logs]
    for k in steps:
        place = k % noise_steps
        if place == 0:
            x = math.sqrt(alpha_bars[noise_steps]) * x + math.sqrt(rests[noise_steps]) * z(k)
            continue
        i = noise_steps - 1 - place
        beta, alpha_bar, alpha_bar_before = betas[i], alpha_bars[i + 1], alpha_bars[i]
        rest, rest_before = rests[i + 1], rests[i]
        labels = torch.full((len(x),), NUM_LABELS * (i + 1) / 1000, dtype=x.dtype, device=x.device)
        eps = score(x, labels)
        image = torch.clamp((x - math.sqrt(rest) * eps) / math.sqrt(alpha_bar), -1.0, 1.0)
        mean = beta * math.sqrt(alpha_bar_before) / rest * image
        mean = mean + rest_before * math.sqrt(1.0 - beta) / rest * x
        variance = beta if i > 0 else betas[1] * rests[1] / rests[2]
        if guide_scale > 0.0:
            noised = math.sqrt(alpha_bar) * x_in + math.sqrt(rest) * z2(k)
            gradient = -2.0 * (x - noised) / elements  # of −MSE
            m = 2.0 * guide_radius / (3.0 * guide_scale)
            mean = mean + variance * math.sqrt(rest) / (m * math.sqrt(alpha_bar)) * gradient
        x = mean + math.sqrt(variance) * z(k) if i > 0 else mean
    return x
