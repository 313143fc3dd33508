"""Solvers as tables of coefficients.

Every step of every method here is

    x_{k+1} = a_k x_k + b_k ε̂(x_k, 999 t_k) + c_k g(x_k) + d_k z_k

with four float64 numbers per step, known before the run. A new solver is one function that fills a table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from coupfast.sde import NUM_LABELS, VPSDE


@dataclasses.dataclass(frozen=True, eq=False)
class CoefficientTable:
    """One purification's coefficients: K rows (a, b, c, d), and where its states live in time.

    Attributes:
        t: Times t_0 > … > t_K, float64, shape (K + 1,); row k goes from t[k] to t[k + 1].
        a, b, c, d: Factors of the state, the predicted noise, the guidance gradient and the noise; float64, shape (K,).
    """

    t: np.ndarray
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    d: np.ndarray

    @property
    def num_steps(self) -> int:
        return len(self.a)

    @property
    def labels(self) -> np.ndarray:
        """999 t_k, the label of the network at the start of each step; float64, shape (K,)."""
        return NUM_LABELS * self.t[:-1]

    @property
    def guided(self) -> bool:
        """Whether any step uses the guidance gradient."""
        return bool(np.any(self.c != 0.0))

    def row(self, k: int) -> tuple[float, float, float, float]:
        """(a_k, b_k, c_k, d_k) as Python floats (float64)."""
        return float(self.a[k]), float(self.b[k]), float(self.c[k]), float(self.d[k])

    def tensor(self, *, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
        """All rows, cast once; shape (K, 4)."""
        return torch.from_numpy(np.stack([self.a, self.b, self.c, self.d], axis=1)).to(device=device, dtype=dtype)


def euler_maruyama(sde: VPSDE, t: np.ndarray, guidance_scale: float) -> CoefficientTable:
    """Euler-Maruyama on the reverse SDE of COUP (Zhang et al. 2024, eq. 5), coefficients at the start of each step."""
    h, beta, sigma = t[:-1] - t[1:], sde.beta(t[:-1]), sde.sigma(t[:-1])
    return CoefficientTable(
        t=t,
        a=1.0 + 0.5 * beta * h,
        b=-beta * h / sigma,
        c=guidance_scale * beta * h,
        d=np.sqrt(beta * h),
    )


def probability_flow(sde: VPSDE, t: np.ndarray, guidance_scale: float) -> CoefficientTable:
    """Euler on the probability-flow ODE (Song et al. 2021, eq. 13) with the same guided score; no noise."""
    h, beta, sigma = t[:-1] - t[1:], sde.beta(t[:-1]), sde.sigma(t[:-1])
    return CoefficientTable(
        t=t,
        a=1.0 + 0.5 * beta * h,
        b=-0.5 * beta * h / sigma,
        c=0.5 * guidance_scale * beta * h,
        d=np.zeros_like(h),
    )


SOLVERS: dict[str, Callable[[VPSDE, np.ndarray, float], CoefficientTable]] = {
    "euler-maruyama": euler_maruyama,
    "probability-flow": probability_flow,
}
