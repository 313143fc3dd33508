"""GDMP guided by structural similarity, as its equations are written: rounds of noising and guided ancestral steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from coupfast.sde import NUM_LABELS, VPSDE


def ssim_ref(x: torch.Tensor, y: torch.Tensor, window: int = 11) -> torch.Tensor:
    """Wang et al. 2004, eq. 13, of images in [0, 1], window by window; shape (batch,)."""
    centre = (window - 1) / 2
    weights = torch.tensor(
        [
            [math.exp(-((i - centre) ** 2 + (j - centre) ** 2) / (2 * 1.5**2)) for j in range(window)]
            for i in range(window)
        ],
        dtype=x.dtype,
        device=x.device,
    )
    weights = weights / weights.sum()
    values = []
    for i in range(x.shape[2] - window + 1):
        for j in range(x.shape[3] - window + 1):
            a, b = (image[:, :, i : i + window, j : j + window] for image in (x, y))
            mean_a, mean_b = ((weights * part).sum(dim=(2, 3)) for part in (a, b))
            da, db = a - mean_a[:, :, None, None], b - mean_b[:, :, None, None]
            var_a, var_b, covariance = ((weights * product).sum(dim=(2, 3)) for product in (da**2, db**2, da * db))
            luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
            values.append(luminance * (2 * covariance + 0.03**2) / (var_a + var_b + 0.03**2))
    return torch.stack(values).mean(dim=(0, 2))


def gdmp_ssim_ref(
    x: torch.Tensor,
    x_in: torch.Tensor,
    score: nn.Module,
    noise: Sequence[torch.Tensor],
    *,
    steps: range,
    noise_steps: int = 37,
    guide_scale: float = 70000.0,
    guide_batch: int = 100,
    window: int = 11,
    sde: VPSDE | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Wang et al. 2022, arXiv:2205.14969, with the ancestral step of Ho et al. 2020, eqs. 6, 7 and 11, and σ_i² = β_i.

    Args:
        x: Where the first of the steps begins, in the [-1, 1] scale; a round's noising is part of its first step.
        x_in: The image.
        noise: All of the run's: of each round its noising's, z′ of every step, z of every step but the last.
        steps: Which denoising steps, counted over all rounds.

    Returns:
        (x, x_in) after the last of the steps. Back-propagation goes through all of them.
    """
    sde = sde or VPSDE()
    beta = np.linspace(sde.beta_min / 1000, sde.beta_max / 1000, 1000)
    alpha_bar = np.cumprod(1 - beta)
    for k in steps:
        round_, j = divmod(k, noise_steps - 1)
        of_round = noise[2 * (noise_steps - 1) * round_ :]
        if j == 0:
            top = alpha_bar[noise_steps - 1]
            x = math.sqrt(top) * x + math.sqrt(1 - top) * of_round[0]
        i = noise_steps - 2 - j
        before = alpha_bar[i - 1] if i > 0 else 1.0
        eps_hat = score(x, torch.full((len(x),), NUM_LABELS * (i + 1) / 1000, dtype=x.dtype, device=x.device))
        image = torch.clamp((x - math.sqrt(1 - alpha_bar[i]) * eps_hat) / math.sqrt(alpha_bar[i]), -1, 1)
        mean = math.sqrt(before) * beta[i] / (1 - alpha_bar[i]) * image
        mean = mean + math.sqrt(1 - beta[i]) * (1 - before) / (1 - alpha_bar[i]) * x
        variance = beta[i] if i > 0 else beta[1] * (1 - alpha_bar[0]) / (1 - alpha_bar[1])
        noised = math.sqrt(alpha_bar[i]) * x_in + math.sqrt(1 - alpha_bar[i]) * of_round[1 + j]
        with torch.enable_grad():
            point = x if x.requires_grad else x.detach().requires_grad_()
            similarity = ssim_ref((point + 1) / 2, (noised + 1) / 2, window).sum() / guide_batch
            pull = torch.autograd.grad(similarity, point, create_graph=torch.is_grad_enabled())[0]
        s = math.sqrt(1 - alpha_bar[i]) / math.sqrt(alpha_bar[i]) * 3 * guide_scale / (2 * 8 / 255)
        following = mean + variance * s * pull
        if i > 0:
            following = following + math.sqrt(variance) * of_round[noise_steps + j]
        x = following if torch.is_grad_enabled() else following.detach()
    return x, x_in
