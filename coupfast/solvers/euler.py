"""Euler's steps on the reverse SDE and on its probability-flow ODE."""

from __future__ import annotations

import numpy as np

from coupfast.sde import VPSDE
from coupfast.solvers.table import CoefficientTable


def euler_maruyama(sde: VPSDE, t: np.ndarray, guidance_scale: np.ndarray | float) -> CoefficientTable:
    """Euler-Maruyama on the reverse SDE of COUP with coefficients at the start of each step. Zhang et al. 2024,
    arXiv:2408.05900, eq. 5.

    Args:
        sde: Its β and σ.
        t: Falling times, float64, shape (num_steps + 1,).
        guidance_scale: λ, one number or one for each step.

    Returns:
        A row of coefficients for each step, float64.

    Example:
        >>> import numpy as np, coupfast
        >>> from coupfast.solvers import euler_maruyama
        >>> table = euler_maruyama(coupfast.VPSDE(), np.linspace(0.1, 1e-3, 11), 1.0)
        >>> table.num_steps, bool((table.d > 0).all())
        (10, True)
    """
    h, beta, sigma = t[:-1] - t[1:], sde.beta(t[:-1]), sde.sigma(t[:-1])
    return CoefficientTable(
        t=t,
        a=1.0 + 0.5 * beta * h,
        b=-beta * h / sigma,
        c=guidance_scale * beta * h,
        d=np.sqrt(beta * h),
    )


def probability_flow(sde: VPSDE, t: np.ndarray, guidance_scale: np.ndarray | float) -> CoefficientTable:
    """Euler on the probability-flow ODE with the same guided score; no noise. Song et al. 2021,
    arXiv:2011.13456, eq. 13.

    Args:
        sde: Its β and σ.
        t: Falling times, float64, shape (num_steps + 1,).
        guidance_scale: λ, one number or one for each step.

    Returns:
        A row of coefficients for each step, float64.

    Example:
        >>> import numpy as np, coupfast
        >>> from coupfast.solvers import probability_flow
        >>> table = probability_flow(coupfast.VPSDE(), np.linspace(0.1, 1e-3, 11), 1.0)
        >>> table.num_steps, bool((table.d > 0).all())
        (10, False)
    """
    h, beta, sigma = t[:-1] - t[1:], sde.beta(t[:-1]), sde.sigma(t[:-1])
    return CoefficientTable(
        t=t,
        a=1.0 + 0.5 * beta * h,
        b=-0.5 * beta * h / sigma,
        c=0.5 * guidance_scale * beta * h,
        d=np.zeros_like(h),
    )
