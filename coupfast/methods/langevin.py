"""DiffPure's Langevin variant."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np

from coupfast import reference
from coupfast.methods.base import Networks, Recipe, StepState, TableMethod
from coupfast.methods.diffusion import sde_option
from coupfast.noise import Noise
from coupfast.options import check_number, option
from coupfast.sde import NUM_LABELS, VPSDE, check_sde, check_t
from coupfast.solvers import CoefficientTable


@dataclasses.dataclass(frozen=True, kw_only=True)
class LangevinSDE(TableMethod):
    """Langevin dynamics tied to the image: the score of a small time, and a pull back to x_in.

    dx = ½ λ [s(x, t_s) − (x − x_in)/σ²] dt + η sqrt(λ) dw on [0, t], Euler-Maruyama. Nie et al. 2022, arXiv:2205.07460
    (LD-SDE in its appendix).

    Attributes:
        t: How long it runs, in (1e-5, 1].
        step_size: Euler's steps; the last one is shorter where t is no multiple. λ step_size/(2 σ²) is at most 2: beyond, they
            diverge.
        score_time: t_s.
        pull_variance: σ².
        rate: λ.
        noise_scale: η.
        sde: The VP-SDE of the score network.

    Raises:
        TypeError: if a field is of another type.
        ValueError: if a number is outside of its range, or the steps diverge.

    Example:
        >>> import coupfast
        >>> score = coupfast.load_score("cifar10-tiny")
        >>> coupfast.Purifier(score, method=coupfast.LangevinSDE(step_size=0.02)).num_steps
        5
    """

    name: ClassVar[str] = "ld-sde"
    reference: ClassVar[str] = "Nie et al. 2022, arXiv:2205.07460 (LD-SDE)"

    t: float = option(0.1, help="how long the dynamics run", parse=float, metavar="T")
    step_size: float = option(1e-2, help="Euler's steps of method ld-sde", parse=float, metavar="H")
    score_time: float = option(0.01, help="time whose score method ld-sde follows", parse=float, metavar="T")
    pull_variance: float = option(
        1e-3, help="sigma squared of method ld-sde: the smaller, the stronger its pull to the image", parse=float, metavar="V"
    )
    rate: float = option(1e-2, help="lambda of method ld-sde, its speed", parse=float, metavar="L")
    noise_scale: float = option(5.0, help="eta of method ld-sde, at least 0", parse=float, metavar="E")
    sde: VPSDE = sde_option(VPSDE())

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sde(self.sde)
        object.__setattr__(self, "t", check_t(self.t))
        object.__setattr__(self, "score_time", check_t(self.score_time, "score_time"))
        for name in ("step_size", "pull_variance", "rate", "noise_scale"):
            object.__setattr__(self, name, check_number(name, getattr(self, name), zero=name == "noise_scale"))
        pull = 0.5 * self.rate * min(self.step_size, self.t) / self.pull_variance
        if pull > 2.0:
            raise ValueError(
                f"a step of `step_size` {self.step_size:g} goes {pull:.4g} times the way to the image (`rate` x `step_size` / "
                f"2 `pull_variance`), and above 2 steps diverge: take a smaller `step_size`"
            )

    @property
    def times(self) -> np.ndarray:
        """What is left of the run at each state, from t to 0; float64, shape (K + 1,)."""
        count = max(1, math.ceil(self.t / self.step_size - 1e-9))
        return np.append(self.t - self.step_size * np.arange(count, dtype=np.float64), 0.0)

    def recipe(self) -> Recipe:
        times = self.times
        h = times[:-1] - times[1:]
        pull = 0.5 * self.rate * h / self.pull_variance
        table = CoefficientTable(
            t=times,
            a=1.0 - pull,
            b=-0.5 * self.rate * h / float(self.sde.sigma(self.score_time)),
            c=np.zeros_like(h),
            d=self.noise_scale * np.sqrt(self.rate * h),
            e=pull,
            labels=np.full_like(h, NUM_LABELS * self.score_time),
        )
        return Recipe(table)

    def definition(self, state: StepState, networks: Networks, noise: Noise, steps: range) -> StepState:
        x, x_in = state if len(state) == 2 else (state[0], state[0])
        return (
            reference.langevin_ref(
                x,
                x_in,
                networks.score,
                lambda k: noise.z(k, x_in),
                steps,
                t=self.t,
                step_size=self.step_size,
                score_time=self.score_time,
                pull_variance=self.pull_variance,
                rate=self.rate,
                noise_scale=self.noise_scale,
                sde=self.sde,
            ),
            x_in,
        )
