"""Second-order solvers that remember the step before: DPM-Solver++(2M) and its SDE.

Lu et al. 2022, arXiv:2211.01095. With D = x̂0 of the guided score at s and D_r that of the step before,

    x' = (σ_t/σ_s) x + α_t (1 − e^{−h}) D′,                                        D′ = D + (D − D_r) h / (2 h_r)
    x' = (σ_t/σ_s) e^{−h} x + α_t (1 − e^{−2h}) D′ + σ_t sqrt(1 − e^{−2h}) z       (SDE)

where h_r = λ_s − λ_r is the step before. D_r is linear in x_{k−1} and ε̂(x_{k−1}), guidance included: columns p, q and s.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from coupfast.options import check_flag, option
from coupfast.sde import VPSDE
from coupfast.solvers.discrete import ClippingSolver, Levels
from coupfast.solvers.table import CoefficientTable


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMSolverPP2M(ClippingSolver):
    """DPM-Solver++(2M), of the probability-flow ODE: no noise. Lu et al. 2022, arXiv:2211.01095, algorithm 2.

    Attributes:
        lower_order_final: Take the last step with first order, which few steps need: it is the longest one in log-SNR.

    Raises:
        TypeError: if a field is no bool.

    Example:
        >>> import coupfast
        >>> table = coupfast.COUP(t=0.06, num_steps=20, solver=coupfast.DPMSolverPP2M(lower_order_final=False)).recipe().table
        >>> table.num_steps
        20
    """

    name: ClassVar[str] = "dpm-solver++-2m"
    reference: ClassVar[str] = "Lu et al. 2022, arXiv:2211.01095, algorithm 2"

    lower_order_final: bool = option(True, help="take the last step of a two-step solver with first order")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("lower_order_final", self.lower_order_final)

    def __call__(self, sde: VPSDE, t: np.ndarray, guidance_scale: np.ndarray | float) -> CoefficientTable:
        levels = Levels.of(sde, t)
        return self._table(levels, t, guidance_scale, levels.sigma_t / levels.sigma_s, levels.decay, np.zeros(len(t) - 1))

    def _table(
        self,
        levels: Levels,
        t: np.ndarray,
        guidance_scale: np.ndarray | float,
        kept: np.ndarray,
        decay: np.ndarray,
        d: np.ndarray,
    ) -> CoefficientTable:
        """x' = kept x + α_t (1 − decay) D′ + d z."""
        weight = levels.signal_t * (1.0 - decay)  # of D′
        with np.errstate(divide="ignore", invalid="ignore"):
            h = -np.log(levels.decay)
            earlier = weight[1:] * h[1:] / (2.0 * h[:-1])  # of D − D_r
        earlier = np.concatenate([[0.0], earlier])
        if self.lower_order_final:
            earlier[-1] = 0.0
        if not np.all(np.isfinite(earlier)):
            raise ValueError("the last step of this grid ends without noise: `lower_order_final` has to be on")
        m, n = levels.x_0
        b = (weight + earlier) * n
        columns = {"p": np.zeros(len(h)), "q": np.zeros(len(h))}
        columns["p"][1:], columns["q"][1:] = -earlier[1:] * m[:-1], -earlier[1:] * n[:-1]
        shift = -guidance_scale * levels.sigma_s
        if np.any(shift != 0.0):
            columns["s"] = shift
        return CoefficientTable(t=t, a=kept + (weight + earlier) * m, b=b, c=shift * b, d=d, **columns, **self._clip(levels))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SDEDPMSolverPP2M(DPMSolverPP2M):
    """SDE-DPM-Solver++(2M), of the reverse SDE. Lu et al. 2022, arXiv:2211.01095.

    Example:
        >>> import coupfast
        >>> table = coupfast.COUP(t=0.06, num_steps=20, solver=coupfast.SDEDPMSolverPP2M(clip_denoised=True)).recipe().table
        >>> table.num_steps
        20
    """

    name: ClassVar[str] = "sde-dpm-solver++-2m"
    reference: ClassVar[str] = "Lu et al. 2022, arXiv:2211.01095"

    def __call__(self, sde: VPSDE, t: np.ndarray, guidance_scale: np.ndarray | float) -> CoefficientTable:
        levels = Levels.of(sde, t)
        decay = levels.decay**2
        d = levels.sigma_t * np.sqrt(1.0 - decay)
        return self._table(levels, t, guidance_scale, levels.sigma_t / levels.sigma_s * levels.decay, decay, d)
