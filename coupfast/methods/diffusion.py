"""Methods that follow the reverse VP-SDE by a solver's table: COUP, its reverse SDE without guidance, DiffPure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from coupfast import reference
from coupfast.methods.base import Networks, Recipe, StepState, TableMethod
from coupfast.naming import is_reference, resolve
from coupfast.noise import Noise
from coupfast.options import check_name, number_or, option
from coupfast.sde import VPSDE, check_num_steps, check_t, check_times, time_grid
from coupfast.solvers import SOLVERS, CoefficientTable, Solver


def _times(word: str) -> Any:
    """0.1, or a grid: 0.1,0.05,0.01."""
    return tuple(float(part) for part in word.split(",") if part) if "," in word else float(word)


def parse_sde(word: str) -> VPSDE:
    """0.1,20: β(0) and β(1)."""
    low, _, high = word.partition(",")
    return VPSDE(float(low), float(high))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionMethod(TableMethod):
    """The reverse VP-SDE from time `t` to 1e-5, by a solver's table.

    Attributes:
        t: Purification time t* in (1e-5, 1]; step 100 of 1000 is 0.1. Or the whole grid: times t_0 > … > t_K in (0, 1].
        num_steps: That many equal steps; None is the reference grid (steps of 1e-3, the last one shorter).
        solver: A name of `coupfast.solvers.SOLVERS`, a function that fills a table, or `package.module:NAME` of one.
        sde: The VP-SDE; β from 0.1 to 20 unless given.
        clamp: Clip the state to [-1, 1] before the first and after the last step, as COUP's code does (DiffPure's does not:
            pass False to reproduce it). The gradient contains the clip.
    """

    t: float | tuple[float, ...] = option(
        0.1,
        help="purification time in (1e-5, 1], step 100 of 1000 is 0.1; or all times of a grid, T,T,...",
        parse=_times,
        metavar="T",
    )
    num_steps: int | None = option(
        None, help="that many equal steps; without it one step each 1e-3 of t, the last one shorter", parse=int, metavar="K"
    )
    solver: str | Solver = option(
        "euler-maruyama", help=f"{', '.join(SOLVERS)}, or package.module:NAME of a function that fills a table", metavar="NAME"
    )
    sde: VPSDE = option(VPSDE(), help="beta(0),beta(1) of the VP-SDE", parse=parse_sde, metavar="B,B")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.t, (Sequence, np.ndarray)) and not isinstance(self.t, str):
            object.__setattr__(self, "t", check_times(self.t))
            if self.num_steps is not None:
                raise ValueError(
                    f"`t` is a grid of {len(self.t) - 1} steps already; leave `num_steps` out, got {self.num_steps}"
                )  # type: ignore[arg-type]
        else:
            object.__setattr__(self, "t", check_t(self.t))  # type: ignore[arg-type]
        object.__setattr__(self, "num_steps", check_num_steps(self.num_steps))
        if not isinstance(self.sde, VPSDE):
            raise TypeError(f"`sde` is a coupfast.VPSDE, got {type(self.sde).__name__}")
        if isinstance(self.solver, str):
            if is_reference(self.solver):
                resolve(self.solver, option="solver")
            else:
                check_name("solver", self.solver, SOLVERS)
        elif not callable(self.solver):
            raise TypeError(f"`solver` is a name or a function that fills a table, got {type(self.solver).__name__}")

    @property
    def grid(self) -> np.ndarray:
        """Times t_0 > … > t_K at which states live; float64, shape (K + 1,)."""
        if isinstance(self.t, tuple):
            return np.asarray(self.t, dtype=np.float64)
        return time_grid(self.t, self.num_steps)

    def scale(self, t: float) -> float:
        """λ at time t; 0 without guidance."""
        return 0.0

    def table(self, grid: np.ndarray) -> CoefficientTable:
        """The coefficients on a grid of times."""
        solver = self.solver
        if isinstance(solver, str):
            solver = SOLVERS[solver] if solver in SOLVERS else resolve(solver, option="solver")
        found = solver(self.sde, grid, np.array([self.scale(float(t)) for t in grid[:-1]], dtype=np.float64))  # type: ignore[operator]
        if not isinstance(found, CoefficientTable):
            raise TypeError(f"a solver returns a CoefficientTable, {solver!r} returned a {type(found).__name__}")
        return found

    def recipe(self) -> Recipe:
        return Recipe(self.table(self.grid))

    def coarse(self, chosen: Sequence[int]) -> CoefficientTable:
        return self.table(self.grid[list(chosen)])

    def definition(self, state: StepState, networks: Networks, noise: Noise, steps: range) -> StepState:
        if self.solver not in ("euler-maruyama", "probability-flow"):
            return super().definition(state, networks, noise, steps)
        # The SDE itself, through torchsde: not even the coefficients are shared.
        grid, (x,) = self.grid, state
        noising = steps.start == 0 and self.recipe().noising is not None
        rows = [noise.z(k, x) for k in steps] + ([noise.z(-1, x)] if noising else [])
        end = reference.purify_ref(
            x,
            networks.score,
            networks.classifier,
            torch.stack(rows),
            grid=grid[steps.start : steps.stop + 1],
            forward_noising=noising,
            dynamics=self.solver,  # type: ignore[arg-type]
            guidance_scale=self.scale,
            sde=self.sde,
            detached=networks.detached,
        )
        return (end,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class COUP(DiffusionMethod):
    """The reverse SDE from the image itself, following the gradient of the classifier's log-confidence.

    x' = x + h β [½ x − ε̂/σ + λ ∇ log p(ŷ | x)] + sqrt(β h) z. Zhang et al. 2024, arXiv:2408.05900, eq. 5.

    Attributes:
        guidance_scale: λ of the paper, at least 0 (1.0 there); a number, or a function of t (`package.module:NAME` of one).
    """

    name: ClassVar[str] = "coup"
    reference: ClassVar[str] = "Zhang et al. 2024, arXiv:2408.05900, eq. 5"
    guided: ClassVar[bool] = True

    guidance_scale: float | str | Callable[[float], float] = option(
        1.0,
        help="the paper's lambda, at least 0; or package.module:NAME of a function of t",
        parse=number_or(str),
        metavar="L",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.guidance_scale
        if isinstance(given, (int, float, np.floating, np.integer)) and not isinstance(given, bool):
            object.__setattr__(self, "guidance_scale", _checked_scale(given))
        elif isinstance(given, str) and is_reference(given):
            resolve(given, option="guidance_scale")
        elif not callable(given):
            raise ValueError(f"`guidance_scale` is a finite number >= 0, or a function of t, got {given!r}; the paper uses 1.0")
        if not isinstance(self.guidance_scale, float):
            for t in self.grid[:-1]:
                self.scale(float(t))

    def scale(self, t: float) -> float:
        given = self.guidance_scale
        if isinstance(given, str):
            given = resolve(given, option="guidance_scale")
        return given if isinstance(given, float) else _checked_scale(given(t), t)  # type: ignore[operator]


def _checked_scale(value: Any, t: float | None = None) -> float:
    found = value if t is None else f"{value!r} at t = {t:g}"
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise ValueError(f"`guidance_scale` is a finite number >= 0, got {found}; the paper uses 1.0")
    if not 0.0 <= value < math.inf:
        raise ValueError(f"`guidance_scale` is a finite number >= 0, got {found}; the paper uses 1.0")
    return float(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReverseSDE(DiffusionMethod):
    """COUP without guidance: the reverse SDE from the image itself. Zhang et al. 2024, arXiv:2408.05900."""

    name: ClassVar[str] = "reverse-sde"
    reference: ClassVar[str] = "Zhang et al. 2024, arXiv:2408.05900 (COUP without guidance)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffPure(DiffusionMethod):
    """Forward noising to time `t` with the discrete chain's ᾱ, then the reverse SDE. Nie et al. 2022, arXiv:2205.07460."""

    name: ClassVar[str] = "diffpure"
    reference: ClassVar[str] = "Nie et al. 2022, arXiv:2205.07460"

    def recipe(self) -> Recipe:
        grid = self.grid
        alpha_bar = self.sde.discrete_alpha_bar(float(grid[0]))
        return Recipe(self.table(grid), (float(np.sqrt(alpha_bar)), float(np.sqrt(1.0 - alpha_bar))))
