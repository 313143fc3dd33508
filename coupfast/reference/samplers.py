"""Samplers of one step at a time, each a plain loop over the equation of its paper."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from coupfast.reference.guided_noise import GuidedNoise

#: z(k): the noise of step k.
StepNoise = Callable[[int], torch.Tensor]


def ddim_ref(
    x: torch.Tensor, predicted: GuidedNoise, z: StepNoise, grid: np.ndarray, steps: range, *, eta: float
) -> torch.Tensor:
    """Song et al. 2021, arXiv:2010.02502, eq. 12 with σ of eq. 16: the predicted image, the direction to x, the noise."""
    for k in steps:
        alpha_s, sigma_s = predicted.rates(float(grid[k]))
        alpha_t, sigma_t = predicted.rates(float(grid[k + 1]))
        eps = predicted(x, float(grid[k]))
        noise = eta * (sigma_t / sigma_s) * math.sqrt(predicted.beta(float(grid[k]), float(grid[k + 1])))
        image = (x - sigma_s * eps) / alpha_s
        x = alpha_t * image + math.sqrt(sigma_t**2 - noise**2) * eps + noise * z(k)
    return x


def ancestral_ref(
    x: torch.Tensor, predicted: GuidedNoise, z: StepNoise, grid: np.ndarray, steps: range, *, variance: str
) -> torch.Tensor:
    """Ho et al. 2020, arXiv:2006.11239: the posterior's mean, eq. 7, of the predicted image, and either variance."""
    for k in steps:
        alpha_s, sigma_s = predicted.rates(float(grid[k]))
        alpha_t, sigma_t = predicted.rates(float(grid[k + 1]))
        beta = predicted.beta(float(grid[k]), float(grid[k + 1]))
        image = (x - sigma_s * predicted(x, float(grid[k]))) / alpha_s
        mean = alpha_t * beta / sigma_s**2 * image + math.sqrt(1.0 - beta) * sigma_t**2 / sigma_s**2 * x
        posterior = beta * sigma_t**2 / sigma_s**2
        last = k == len(grid) - 2
        x = mean + math.sqrt(beta if variance == "large" and not last else posterior) * z(k)
    return x


def sde_dpm_solver_1_ref(
    x: torch.Tensor, predicted: GuidedNoise, z: StepNoise, grid: np.ndarray, steps: range
) -> torch.Tensor:
    """Lu et al. 2022, arXiv:2211.01095: SDE-DPM-Solver-1."""
    for k in steps:
        alpha_s, sigma_s = predicted.rates(float(grid[k]))
        alpha_t, sigma_t = predicted.rates(float(grid[k + 1]))
        h = math.log(alpha_t / sigma_t) - math.log(alpha_s / sigma_s)
        eps = predicted(x, float(grid[k]))
        x = alpha_t / alpha_s * x - 2.0 * sigma_t * math.expm1(h) * eps + sigma_t * math.sqrt(math.expm1(2.0 * h)) * z(k)
    return x


def exponential_ref(
    x: torch.Tensor, predicted: GuidedNoise, z: StepNoise, grid: np.ndarray, steps: range
) -> torch.Tensor:
    """De Bortoli 2022, arXiv:2208.05314: dx = (½ β x + β s) dt + sqrt β dw solved with the score s held."""
    for k in steps:
        _, sigma = predicted.rates(float(grid[k]))
        score = -predicted(x, float(grid[k])) / sigma
        low, high = float(grid[k + 1]), float(grid[k])
        passed = float(predicted.sde.log_alpha_bar(low) - predicted.sde.log_alpha_bar(high))  # ∫ β
        x = math.exp(0.5 * passed) * x + 2.0 * math.expm1(0.5 * passed) * score + math.sqrt(math.expm1(passed)) * z(k)
    return x


def reverse_diffusion_ref(
    x: torch.Tensor, predicted: GuidedNoise, z: StepNoise, grid: np.ndarray, steps: range
) -> torch.Tensor:
    """Song et al. 2021, arXiv:2011.13456, eq. 46, without noise in the last step."""
    for k in steps:
        t = float(grid[k])
        beta = float(predicted.sde.beta(t)) * (t - float(grid[k + 1]))
        score = -predicted(x, t) / predicted.rates(t)[1]
        x = (2.0 - math.sqrt(1.0 - beta)) * x + beta * score
        if k < len(grid) - 2:
            x = x + math.sqrt(beta) * z(k)
    return x


def dpm_solver_pp_2m_ref(
    state: tuple[torch.Tensor, ...],
    predicted: GuidedNoise,
    z: StepNoise,
    grid: np.ndarray,
    steps: range,
    *,
    stochastic: bool,
    lower_order_final: bool,
) -> tuple[torch.Tensor, ...]:
    """Lu et al. 2022, arXiv:2211.01095, algorithm 2, or its SDE if stochastic.

    Args:
        state: (x,) before step 0, else (x, the predicted image of the step before).

    Returns:
        (x, the predicted image of the last step).
    """
    x, before = (*state, *state)[:2]  # before step 0 nobody reads the second
    for k in steps:
        alpha_s, sigma_s = predicted.rates(float(grid[k]))
        alpha_t, sigma_t = predicted.rates(float(grid[k + 1]))
        h = math.log(alpha_t / sigma_t) - math.log(alpha_s / sigma_s)
        image = (x - sigma_s * predicted(x, float(grid[k]))) / alpha_s
        used = image
        if k > 0 and not (lower_order_final and k == len(grid) - 2):
            alpha_r, sigma_r = predicted.rates(float(grid[k - 1]))
            r = (math.log(alpha_s / sigma_s) - math.log(alpha_r / sigma_r)) / h
            used = image + (image - before) / (2.0 * r)
        if stochastic:
            x = sigma_t / sigma_s * math.exp(-h) * x - alpha_t * math.expm1(-2.0 * h) * used
            x = x + sigma_t * math.sqrt(-math.expm1(-2.0 * h)) * z(k)
        else:
            x = sigma_t / sigma_s * x - alpha_t * math.expm1(-h) * used
        before = image
    return x, before
