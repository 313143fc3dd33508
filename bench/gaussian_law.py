"""What a solver makes of Gaussian data, whose score is known: exactly, step by step, no sampling.

Data N(MEAN, VARIANCE) a pixel; a run begins with the law of its time, moved away by AWAY as an attacked image is. Every step is
affine there, so that mean and variance follow from the table alone.
"""

from __future__ import annotations

import numpy as np

from coupfast.sde import VPSDE
from coupfast.solvers import CoefficientTable

MEAN, VARIANCE = 0.4, 0.3
AWAY = 0.7


def marginal(t: float, sde: VPSDE) -> tuple[float, float]:
    """Mean and variance at time t."""
    alpha_bar = float(sde.alpha_bar(t))
    return float(np.sqrt(alpha_bar)) * MEAN, alpha_bar * VARIANCE + 1.0 - alpha_bar


def law_after(table: CoefficientTable, sde: VPSDE) -> tuple[float, float]:
    """Mean and variance after all steps of a table that reads neither guidance nor x_in nor a second noise."""

    def prediction(t: float) -> tuple[float, float]:
        """ε̂ = slope x + offset."""
        alpha, sigma = float(np.sqrt(sde.alpha_bar(t))), float(sde.sigma(t))
        slope = sigma / (alpha**2 * VARIANCE + sigma**2)
        return slope, -slope * alpha * MEAN

    mean, variance = marginal(float(table.t[0]), sde)
    joint_mean, joint = np.array([mean + AWAY, 0.0, 1.0]), np.zeros((3, 3))  # of (x_k, x_{k−1}, 1)
    joint[0, 0] = variance
    for k in range(table.num_steps):
        a, b, _, d, _, _, p, q = (*table.row(k), 0.0, 0.0, 0.0, 0.0)[:8]
        slope, offset = prediction(float(table.t[k]))
        before = prediction(float(table.t[k - 1])) if k else (0.0, 0.0)
        step = np.array([[a + b * slope, p + q * before[0], b * offset + q * before[1]], [1, 0, 0], [0, 0, 1]])
        joint_mean, joint = step @ joint_mean, step @ joint @ step.T
        joint[0, 0] += d**2
    return float(joint_mean[0]), float(joint[0, 0])


def exact_law(start: float, end: float, sde: VPSDE, share: float) -> tuple[float, float]:
    """Of dx = ½ β [x + (1 + share) s] dt + sqrt(share β) dw backwards in time: the SDE has share 1, the ODE 0.

    All of them keep the marginals. A mean that is off shrinks as under the ODE (like the standard deviation) and under the SDE
    (like the regression of x_t on x_T), to the powers of 1 − share and share.
    """
    (mean, variance), before = marginal(end, sde), marginal(start, sde)[1]
    of_ode = np.sqrt(variance / before)
    of_sde = np.sqrt(float(sde.alpha_bar(start) / sde.alpha_bar(end))) * variance / before
    return float(mean + of_ode ** (1.0 - share) * of_sde**share * AWAY), variance


def wasserstein(a: tuple[float, float], b: tuple[float, float]) -> float:
    """The 2-Wasserstein distance of two Gaussians, given as (mean, variance)."""
    return float(np.hypot(a[0] - b[0], np.sqrt(a[1]) - np.sqrt(b[1])))
