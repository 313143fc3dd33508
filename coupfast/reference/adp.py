"""Adaptive denoising purification as its algorithm is written, image by image."""

from __future__ import annotations

import math

import torch
from torch import nn

from coupfast.sde import NUM_LABELS, VPSDE


def adp_ref(
    state: tuple[torch.Tensor, ...],
    score: nn.Module,
    noise: torch.Tensor | None,
    num_steps: int,
    *,
    noise_sigma: float = 0.25,
    score_sigma: float = 0.25,
    step_share: float = 0.05,
    probe: float = 1e-3,
    step_sizes: tuple[float, float] = (1e-5, 0.1),
    stop_below: float = 1e-3,
    sde: VPSDE | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Yoon et al. 2021, arXiv:2106.06041, algorithm 1, from the image or from where a number of its steps ended.

    Args:
        state: (x,) before any noise, or (x, whether it still goes (1 or 0, (batch, 1, 1, 1))); x in the [-1, 1] scale.
        noise: z, for (x,).
        num_steps: How many steps to take.
        step_sizes: The least and the largest α.

    Returns:
        The state after the last of the steps. Back-propagation goes through all of them.
    """
    sde = sde or VPSDE()
    ratio = 2 * score_sigma  # σ(t)/sqrt ᾱ(t) in the [-1, 1] scale
    alpha_bar = 1 / (1 + ratio**2)
    a, b, c = (sde.beta_max - sde.beta_min) / 2, sde.beta_min, math.log(alpha_bar)
    t = (math.sqrt(b**2 - 4 * a * c) - b) / (2 * a) if a else -c / b

    def s(u: torch.Tensor) -> torch.Tensor:
        labels = torch.full((1,), NUM_LABELS * t, dtype=u.dtype, device=u.device)
        return -score(math.sqrt(alpha_bar) * (2 * u - 1), labels) / score_sigma

    ends, goings = [], []
    for i in range(len(state[0])):
        u = (state[0][i : i + 1] + 1) / 2
        going = True
        if noise is not None:
            u = torch.clamp(u + noise_sigma * noise[i : i + 1], 0, 1)
        else:
            going = bool(state[1][i])
        for _ in range(num_steps):
            if not going:
                break
            g = s(u)
            if not bool(g.any()):
                going = False
                break
            rho = (g * s(u + probe * g)).sum() / (g * g).sum()
            alpha = torch.clamp(step_share * probe / (1 - rho), *step_sizes)
            if alpha <= stop_below:
                going = False
            else:
                u = torch.clamp(u + alpha * g, 0, 1)
        ends.append(2 * u - 1)
        goings.append(torch.full_like(u[:, :1, :1, :1], float(going)))
    return torch.cat(ends), torch.cat(goings)
