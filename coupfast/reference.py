"""The definition: purification as a stochastic differential equation solved by torchsde, slow and obvious.

Everything fast is checked against this module. It shares the SDE's β, ᾱ and σ with the rest and nothing else: no table of
coefficients, no guidance code, no kernels; its noise is an argument. Two readings of the same SDE stand here:

* `purify_ref`: time is the step index, so that one torchsde step is one step of the given grid, and the increments are
  replayed. In float64 it agrees with the fast loop to rounding. (`rows_ref` is the same for methods that are no SDE but rows
  of coefficients: the formula, step by step.)
* `purify_published`: what DiffPure's and COUP's code asks of torchsde: `sdeint_adjoint` on s = 1 − t in float32, in torchsde's
  default steps of 1e-3, forwards from t and backwards from t = 1e-5, increments from a Brownian interval, parameters not
  frozen, COUP's guidance by `.backward(retain_graph=True)` on a detached copy.

States are in the [-1, 1] scale here; neither function clips.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
import torchsde
from torch import nn
from torchsde import BaseBrownian

from coupfast.sde import NUM_LABELS, T_END, VPSDE

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


def confidence_gradient(classifier: nn.Module, x: torch.Tensor, *, detached: bool) -> torch.Tensor:
    """∇ log max_y p(y | x) with respect to x in [-1, 1], differentiable again unless `detached`."""
    create_graph = torch.is_grad_enabled() and x.requires_grad and not detached
    with torch.enable_grad():
        point = x if create_graph else x.detach().requires_grad_()
        log_p = torch.log_softmax(classifier((point + 1) / 2), dim=1)
        confidence = log_p.max(dim=1).values.sum()
        return torch.autograd.grad(confidence, point, create_graph=create_graph)[0]


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


def rows_ref(
    state: tuple[torch.Tensor, ...],
    score: nn.Module,
    classifier: nn.Module | None,
    rows: Sequence[Sequence[float]],
    labels: Sequence[float],
    noise: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    *,
    detached: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Steps that are given as rows of coefficients, one after the other, as the formula is written.

        x_{k+1} = a x_k + b ε̂(x_k) + c g(x_k) + d z + e x_in + f z′ + p x_{k−1} + q ε̂(x_{k−1})

    Args:
        state: (x_k,), (x_k, x_in) or (x_k, x_in, x_{k−1}, ε̂(x_{k−1})), each of shape (batch, channels, height, width).
        rows: (a, b, c, d) or (a, b, c, d, e, f, p, q), one a step.
        labels: Of the score network, one a step.
        noise: (z, z′) of each step.
        detached: Take the guidance as a constant in gradients.

    Returns:
        (x_{k+1}, x_in, x_k, ε̂(x_k)) after the last step. Back-propagation goes through all of them.
    """
    x, x_in, x_before, eps_before = (*state, *[state[0]] * 3)[:4]  # what a first step does not read may be anything
    for row, label, (z, z2) in zip(rows, labels, noise, strict=True):
        a, b, c, d, e, f, p, q = (*row, 0.0, 0.0, 0.0, 0.0)[:8]
        eps_hat = score(x, torch.full((len(x),), label, dtype=x.dtype, device=x.device))
        following = a * x + b * eps_hat + d * z
        if c != 0.0:
            assert classifier is not None
            following = following + c * confidence_gradient(classifier, x, detached=detached)
        if e != 0.0:
            following = following + e * x_in
        if f != 0.0:
            assert z2 is not None
            following = following + f * z2
        if p != 0.0:
            following = following + p * x_before
        if q != 0.0:
            following = following + q * eps_before
        x, x_before, eps_before = following, x, eps_hat
    return x, x_in, x_before, eps_before


class _PublishedSDE(nn.Module):
    """Drift and diffusion as the published code evaluates them: s = 1 − t in float32, nothing frozen."""

    noise_type = "diagonal"
    sde_type = "ito"

    def __init__(
        self, score: nn.Module, classifier: nn.Module | None, shape: torch.Size, guidance_scale: float, sde: VPSDE
    ) -> None:
        super().__init__()
        self.score, self.classifier, self.image_shape = score, classifier, shape
        self.guidance_scale, self.sde = guidance_scale, sde

    def _beta(self, s: torch.Tensor) -> torch.Tensor:
        return self.sde.beta_min + (1 - s) * (self.sde.beta_max - self.sde.beta_min)

    def f(self, s: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = y.view(-1, *self.image_shape[1:])
        t = 1 - s
        log_alpha_bar = -0.5 * t**2 * (self.sde.beta_max - self.sde.beta_min) - t * self.sde.beta_min
        sigma = torch.sqrt(1 - torch.exp(log_alpha_bar))
        score = -self.score(x, (NUM_LABELS * t).expand(len(x)).to(x.dtype)) / sigma
        if self.classifier is not None:
            with torch.enable_grad():
                copy = x.detach().clone().requires_grad_()
                log_p = torch.log_softmax(self.classifier((copy + 1) / 2), dim=1).max(dim=1).values
                # Fills the .grad of every classifier weight, too: that is part of what the published code costs.
                log_p.backward(torch.ones_like(log_p), retain_graph=True)
            assert copy.grad is not None
            score = score + self.guidance_scale * copy.grad
        beta = self._beta(s)
        return (0.5 * beta * x + beta * score).flatten(1)

    def g(self, s: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(self._beta(s)).expand_as(y)


def purify_published(
    x_0: torch.Tensor,
    score: nn.Module,
    classifier: nn.Module | None,
    *,
    t: float,
    t_end: float = T_END,
    forward_noising: bool = False,
    guidance_scale: float = 1.0,
    sde: VPSDE | None = None,
    adjoint_params: Literal["all", "none"] = "all",
    entropy: int | None = None,
) -> torch.Tensor:
    """What COUP's (with a classifier), COUP-without-guidance's and DiffPure's code runs: a benchmark's opponent.

    Networks are used as they are given: pass them with parameters that require gradients to reproduce the published
    cost. Uses torch's global generator for the forward noising and torchsde's Brownian interval for the path.

    Args:
        x_0: State in the [-1, 1] scale, float32 as published; in float64 time is float64, too, which tells what
            the published rounding of t and σ(t) does.
        t: Purification time; `t_end` is where it stops (a larger `t_end` shortens the run, for timing). Steps are torchsde's
            default of 1e-3, the last one cut at `t_end`.
        adjoint_params: `"all"` integrates every parameter's adjoint, as published; `"none"` passes `adjoint_params=()`.
        entropy: Seed of the Brownian interval; None as published.

    Returns:
        x at `t_end`, the same shape; back-propagation solves torchsde's stochastic adjoint in steps of 1e-3 from `t_end` on,
        the last one cut at `t`: where t − t_end is not a whole number of steps, they lie beside those of the forward run.
    """
    sde = sde or VPSDE()
    x = x_0
    if forward_noising:
        alpha_bar = sde.discrete_alpha_bar(t)
        x = float(np.sqrt(alpha_bar)) * x + float(np.sqrt(1 - alpha_bar)) * torch.randn_like(x)
    system = _PublishedSDE(score, classifier, x.shape, guidance_scale, sde)
    time = torch.float64 if x.dtype == torch.float64 else torch.float32
    s = torch.tensor([1 - t, 1 - t_end], dtype=time, device=x.device)
    path = torchsde.BrownianInterval(
        s[0], s[-1], size=x.flatten(1).shape, dtype=x.dtype, device=x.device, entropy=entropy
    )
    options: dict[str, Any] = {} if adjoint_params == "all" else {"adjoint_params": ()}
    states = torchsde.sdeint_adjoint(system, x.flatten(1), s, bm=path, method="euler", **options)
    return states[-1].view(x.shape)
