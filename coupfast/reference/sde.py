"""The guided reverse SDE through torchsde: time is the step index, so that one torchsde step is one step of the given grid, and
the increments are replayed. In float64 it agrees with the fast loop to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch
import torchsde
from torch import nn
from torchsde import BaseBrownian

from coupfast.reference.confidence import confidence_gradient
from coupfast.sde import NUM_LABELS, VPSDE

Dynamics = Literal["euler-maruyama", "probability-flow"]


class _ReplayedIncrements(BaseBrownian):
    """Brownian increments of unit steps, W(k + 1) − W(k) = noise[k], as torchsde asks for them."""

    def __init__(self, noise: torch.Tensor) -> None:
        self.noise = noise.flatten(2)  # [steps, batch, elements]

    def __call__(self, ta: Any, tb: Any = None, return_U: bool = False, return_A: bool = False) -> torch.Tensor:
        return self.noise[round(float(ta))]

    def __repr__(self) -> str:
        return f"_ReplayedIncrements({tuple(self.noise.shape)})"

    @property
    def dtype(self) -> torch.dtype:
        return self.noise.dtype

    @property
    def device(self) -> torch.device:
        return self.noise.device

    @property
    def shape(self) -> torch.Size:
        return self.noise.shape[1:]

    @property
    def levy_area_approximation(self) -> str:
        return "none"


class _StepIndexedSDE(nn.Module):
    """The reverse SDE in units of steps: drift and diffusion of step k already carry h_k and sqrt(h_k)."""

    noise_type = "diagonal"
    sde_type = "ito"

    def __init__(
        self,
        score: nn.Module,
        classifier: nn.Module | None,
        *,
        shape: torch.Size,
        grid: np.ndarray,
        dynamics: str,
        guidance_scale: Callable[[float], float],
        sde: VPSDE,
        detached: bool,
        continuous_adjoint: bool,
    ) -> None:
        super().__init__()
        self.score, self.classifier = score, classifier
        self.image_shape, self.grid, self.sde = shape, grid, sde
        self.stochastic = dynamics == "euler-maruyama"
        self.guidance_scale, self.detached, self.continuous_adjoint = guidance_scale, detached, continuous_adjoint

    def _time_and_step(self, index: Any) -> tuple[float, float]:
        """t at this index, and h of the step that is being taken from it."""
        k = round(float(index))
        # torchsde's adjoint walks the steps backwards, starting each at its end, and is the only caller that evaluates
        # with gradients on.
        first = max(k - 1, 0) if self.continuous_adjoint and torch.is_grad_enabled() else k
        return float(self.grid[k]), float(self.grid[first] - self.grid[first + 1])

    def f(self, index: Any, y: torch.Tensor) -> torch.Tensor:
        t, h = self._time_and_step(index)
        x = y.view(-1, *self.image_shape[1:])
        beta, sigma = float(self.sde.beta(t)), float(self.sde.sigma(t))
        labels = torch.full((len(x),), NUM_LABELS * t, dtype=x.dtype, device=x.device)
        score = -self.score(x, labels) / sigma
        if self.classifier is not None:
            score = score + self.guidance_scale(t) * confidence_gradient(self.classifier, x, detached=self.detached)
        weight = 1.0 if self.stochastic else 0.5
        return (h * (0.5 * beta * x + weight * beta * score)).flatten(1)

    def g(self, index: Any, y: torch.Tensor) -> torch.Tensor:
        t, h = self._time_and_step(index)
        return torch.full_like(y, float(np.sqrt(self.sde.beta(t) * h)) if self.stochastic else 0.0)


def purify_ref(
    x_0: torch.Tensor,
    score: nn.Module,
    classifier: nn.Module | None,
    noise: torch.Tensor,
    *,
    grid: np.ndarray,
    forward_noising: bool = False,
    dynamics: str = "euler-maruyama",
    guidance_scale: float | Callable[[float], float] = 1.0,
    sde: VPSDE | None = None,
    detached: bool = False,
    adjoint: Literal["none", "frozen", "parameters"] = "none",
) -> torch.Tensor:
    """The guided reverse SDE from x_0 to t = 1e-5 through torchsde's Euler method, one torchsde step per grid step.

    Args:
        x_0: State in the [-1, 1] scale, shape (batch, channels, height, width), float32 or float64.
        classifier: None integrates without guidance.
        noise: Standard normal, shape (steps, *x_0.shape), plus one last row if `forward_noising`.
        grid: Times t_0 > … > t_K, float64, shape (K + 1,).
        forward_noising: First move x_0 to t_0 with the discrete chain's ᾱ (DiffPure).
        dynamics: `"euler-maruyama"` on the reverse SDE or `"probability-flow"`, Euler on the ODE.
        guidance_scale: λ, a number or a function of t.
        detached: Take the guidance as a constant in gradients, as COUP's code does.
        adjoint: `"none"`: back-propagation goes through every step and gives the exact discrete gradient. `"frozen"`,
            `"parameters"`: torchsde's stochastic adjoint (Li et al. 2020) on the same noise, without and with the
            integrals of all parameter gradients. It solves state and gradient backwards from the last state in one step
            for each of `grid`, over the same times, starting at grid[-1]. Its error depends on these steps, most of all on
            the first, where h β/σ² is about 100 for steps of 1e-3 that end at t = 1e-5 (`bench/adjoint_error.py`). Not
            what published code does to the last digits: that starts its steps of 1e-3 at t = 1e-5, beside those of the
            forward run (`purify_published`), and takes no other steps than those.

    Returns:
        x_K, the same shape.
    """
    if dynamics not in get_args(Dynamics):
        raise ValueError(f"`dynamics` is one of {get_args(Dynamics)}, got {dynamics!r}")
    sde = sde or VPSDE()
    steps = len(grid) - 1
    x = x_0
    if forward_noising:
        alpha_bar = sde.discrete_alpha_bar(float(grid[0]))
        x = float(np.sqrt(alpha_bar)) * x + float(np.sqrt(1 - alpha_bar)) * noise[-1]
    system = _StepIndexedSDE(
        score,
        classifier,
        shape=x.shape,
        grid=grid,
        dynamics=dynamics,
        guidance_scale=guidance_scale if callable(guidance_scale) else lambda t: guidance_scale,
        sde=sde,
        detached=detached,
        continuous_adjoint=adjoint != "none",
    )
    times = torch.tensor([0.0, float(steps)], dtype=torch.float64, device=x.device)
    options: dict[str, Any] = {"bm": _ReplayedIncrements(noise[:steps]), "method": "euler", "dt": 1.0}
    if adjoint == "none":
        states = torchsde.sdeint(system, x.flatten(1), times, **options)
    else:
        if adjoint == "frozen":
            options["adjoint_params"] = ()
        states = torchsde.sdeint_adjoint(system, x.flatten(1), times, **options)
    return states[-1].view(x.shape)
