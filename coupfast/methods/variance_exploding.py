"""Networks of the VP-SDE asked about x_0 + σ ε, as methods of the variance-exploding kind are written.

    sqrt ᾱ (x_0 + σ ε) is the state at the time t where σ(t)/sqrt ᾱ(t) = σ, so that with ᾱ = 1/(1 + σ²)

    ε̂(y; σ) = ε̂(y / sqrt(1 + σ²), 999 t),      D(y; σ) = y − σ ε̂(y; σ),      ∇ log p_σ(y) = −ε̂(y; σ) / σ

Karras et al. 2022, arXiv:2206.00364, section 5 and table 1.
"""

from __future__ import annotations

from typing import Any

import torch

from coupfast.methods.base import Networks
from coupfast.options import check_number
from coupfast.sde import NUM_LABELS, VPSDE, check_sde


def eps_hat_of_noised(networks: Networks, sde: VPSDE, y: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """ε̂(y; σ): the noise that the network sees in y = x_0 + σ ε; differentiable in both.

    Args:
        sde: The schedule of the network.
        y: Shape (batch, channels, height, width), the [-1, 1] scale plus noise.
        sigma: Standard deviations on that scale, positive, shape (batch, 1, 1, 1), of the dtype of `y`.
    """
    exact = sigma.double()  # labels are near 100 and rounded once
    exponent = torch.log1p(exact * exact)
    spread = sde.beta_max - sde.beta_min
    t = 2.0 * exponent / (sde.beta_min + torch.sqrt(sde.beta_min**2 + 2.0 * spread * exponent))
    labels = (NUM_LABELS * t).to(y.dtype).flatten()
    return networks.score(y / torch.sqrt(1.0 + sigma * sigma), labels)


def check_continuous(sde: Any) -> None:
    """TypeError if `sde` is no VP-SDE, ValueError if it is one whose times the formula above does not give."""
    check_sde(sde)
    if type(sde) is not VPSDE:
        raise ValueError(
            f"`sde` is a coupfast.VPSDE in continuous time for a method that is told noise levels, got {type(sde).__name__}"
        )


def check_noise_level(name: str, value: Any, sde: VPSDE, *, scale: float = 1.0) -> float:
    """`value` as a float, or ValueError if it is no noise level that the schedule reaches.

    Args:
        scale: What makes a standard deviation on the [-1, 1] scale of it: 2 for one of images in [0, 1].
    """
    found = check_number(name, value, zero=False)
    if (t := sde.time_of(scale * found)) > 1.0:
        raise ValueError(f"`{name}` is {found:g}, and the schedule is so noisy at t = {t:.3g} only, which is above 1")
    return found
