"""Likelihood maximisation, with and without guidance, as its equations are written: a loss, its gradient, Adam."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from coupfast.reference.confidence import confidence_gradient
from coupfast.sde import NUM_LABELS, VPSDE


def lm_ref(
    state: tuple[torch.Tensor, ...],
    score: nn.Module,
    classifier: nn.Module | None,
    noise: Sequence[torch.Tensor],
    sigmas: Sequence[torch.Tensor],
    *,
    first: int = 0,
    learning_rate: float = 0.1,
    guidance_scale: float = 0.0,
    sde: VPSDE | None = None,
    detached: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Adam on ‖D(x + σ z; σ) − x‖² − λ log max_y p(y | x), D(y; σ) = y − σ ε̂(ᾱ^½ y, 999 t) with ᾱ(t) = 1/(1 + σ²).

    Chen et al. 2023, arXiv:2305.15241; Kingma and Ba 2015, arXiv:1412.6980, algorithm 1.

    Args:
        state: (x, m, v): the image and Adam's two averages, zero at first; (batch, channels, height, width) each.
        noise: z of each step.
        sigmas: σ of each step, shape (batch,).
        first: The number of the first of these steps, which the averages' bias depends on.

    Returns:
        The state after the last of the steps. Back-propagation goes through all of them.
    """
    sde = sde or VPSDE()
    x, m, v = state
    for number, (z, sigma) in enumerate(zip(noise, sigmas, strict=True), start=first + 1):
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            noised = x + sigma[:, None, None, None] * z
            alpha_bar = 1 / (1 + sigma**2)
            # ½ (β_max − β_min) t² + β_min t + log ᾱ = 0
            a, b, c = (sde.beta_max - sde.beta_min) / 2, sde.beta_min, torch.log(alpha_bar)
            t = (torch.sqrt(b**2 - 4 * a * c) - b) / (2 * a) if a else -c / b
            eps_hat = score(torch.sqrt(alpha_bar)[:, None, None, None] * noised, NUM_LABELS * t)
            denoised = noised - sigma[:, None, None, None] * eps_hat
            distance = ((denoised - x) ** 2).sum()
            gradient = torch.autograd.grad(distance, x, create_graph=True)[0]
        if guidance_scale:
            assert classifier is not None
            gradient = gradient - guidance_scale * confidence_gradient(classifier, x, detached=detached)
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient**2
        m_hat, v_hat = m / (1 - 0.9**number), v / (1 - 0.999**number)
        x = x - learning_rate * m_hat / (torch.sqrt(v_hat) + 1e-8)
        if not torch.is_grad_enabled():
            x, m, v = x.detach(), m.detach(), v.detach()
    return x, m, v
