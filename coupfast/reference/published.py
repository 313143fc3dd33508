"""What DiffPure's and COUP's code asks of torchsde, published cost included: a benchmark's opponent.

`sdeint_adjoint` on s = 1 − t in float32, in torchsde's default steps of 1e-3, forwards from t and backwards from t = 1e-5,
increments from a Brownian interval, parameters not frozen, COUP's guidance by `.backward(retain_graph=True)` on a copy.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import torchsde
from torch import nn

from coupfast.sde import NUM_LABELS, T_END, VPSDE


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
