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
from coupfast.options import check_name, number_or, one_or_several, option
from coupfast.sde import GRIDS, VPSDE, DiscreteVPSDE, check_num_steps, check_sde, check_t, check_times, time_grid
from coupfast.solvers import SOLVERS, CoefficientTable, NamedSolver, Solver, as_solver, solver_name


def _sde(word: str) -> VPSDE:
    parts = word.split(",")
    if len(parts) not in (2, 3) or parts[2:] not in ([], ["discrete"]):
        raise ValueError("two numbers, or two numbers and the word discrete")
    low, high, *chain = parts
    return (DiscreteVPSDE if chain else VPSDE)(float(low), float(high))


def _solver_option(default: Any) -> Any:
    return option(
        default, help=f"{', '.join(SOLVERS)}, or package.module:NAME of a function that fills a table", metavar="NAME"
    )


def sde_option(default: VPSDE) -> Any:
    """The field of methods that have a VP-SDE of one's own choice."""
    return option(
        default, help="beta(0),beta(1) of the VP-SDE; with ,discrete of the chain of 1000 steps", parse=_sde, metavar="B,B"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolverMethod(TableMethod):
    """Steps of the reverse VP-SDE by a solver.

    Attributes:
        num_steps: That many steps; None is the reference grid (steps of 1e-3, the last one shorter).
        grid: What they divide equally, see `coupfast.sde.time_grid`.
        solver: A name of `coupfast.solvers.SOLVERS`, an object of that kind such as `DDIM(eta=0.5)`, a function that fills a
            table, or `package.module:NAME` of one.
        sde: The VP-SDE; β from 0.1 to 20 unless given.
        clamp: Clip the state to [-1, 1] before the first and after the last step, as COUP's code does (DiffPure's does not:
            pass False to reproduce it). The gradient contains the clip.

    Raises:
        TypeError: if a field is of another type.
        ValueError: if `num_steps` is below 1, or a name is unknown; the message has the nearest one.
    """

    num_steps: int | None = option(
        None, help="that many equal steps; without it one step each 1e-3 of t, the last one shorter", parse=int, metavar="K"
    )
    grid: str = option(
        "time", choices=GRIDS, help="what the steps divide equally: time, log-SNR, or the square root of time (quadratic)"
    )
    solver: str | Solver = _solver_option("euler-maruyama")
    sde: VPSDE = sde_option(VPSDE())

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_num_steps()
        check_name("grid", self.grid, GRIDS)
        check_sde(self.sde)
        object.__setattr__(self, "solver", as_solver(self.solver))

    def _check_num_steps(self) -> None:
        object.__setattr__(self, "num_steps", check_num_steps(self.num_steps))

    def scale(self, t: float) -> float:
        """λ at time t; 0 without guidance."""
        return 0.0

    def table(self, grid: np.ndarray) -> CoefficientTable:
        """The coefficients on a grid of times."""
        solver: Any = self.solver
        if isinstance(solver, str):
            solver = SOLVERS[solver] if solver in SOLVERS else resolve(solver, option="solver")
        found = solver(self.sde, grid, np.array([self.scale(float(t)) for t in grid[:-1]], dtype=np.float64))
        if not isinstance(found, CoefficientTable):
            raise TypeError(f"a solver returns a CoefficientTable, {solver!r} returned a {type(found).__name__}")
        return found

    @property
    def is_defined(self) -> bool:
        """Whether the solver has a definition beside its table."""
        return solver_name(self.solver) in reference.DEFINED

    def solve_ref(
        self, state: StepState, networks: Networks, z: Callable[[int], torch.Tensor], grid: np.ndarray, steps: range
    ) -> StepState:
        """The solver's definition on some of the steps of a grid."""
        predicted = reference.GuidedNoise(
            networks.score, networks.classifier, self.sde, guidance_scale=self.scale, detached=networks.detached
        )
        knobs = dataclasses.asdict(self.solver) if isinstance(self.solver, NamedSolver) else {}
        return reference.solve_ref(solver_name(self.solver), state, predicted, z, grid, steps, knobs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionMethod(SolverMethod):
    """The reverse VP-SDE from time `t` to 1e-5, by a solver's table.

    Attributes:
        t: Purification time t* in (1e-5, 1]; step 100 of 1000 is 0.1. Or the whole grid: times t_0 > … > t_K in (0, 1].

    Raises:
        TypeError: if a field is of another type.
        ValueError: as `SolverMethod`, if `t` is out of range or no falling grid, or a grid comes with `num_steps` or `grid`.
    """

    t: float | tuple[float, ...] = option(
        0.1,
        help="purification time in (1e-5, 1], step 100 of 1000 is 0.1; or all times of a grid, T,T,...",
        parse=one_or_several(float),
        metavar="T",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.t, (Sequence, np.ndarray)) or isinstance(self.t, str):
            object.__setattr__(self, "t", check_t(self.t))  # type: ignore[arg-type]
            return
        times = check_times(self.t)
        object.__setattr__(self, "t", times)
        for name, value, unsaid in (("num_steps", self.num_steps, None), ("grid", self.grid, "time")):
            if value != unsaid:
                raise ValueError(f"`t` is a grid of {len(times) - 1} steps already; leave `{name}` out, got {value!r}")

    @property
    def times(self) -> np.ndarray:
        """Times t_0 > … > t_K at which states live; float64, shape (K + 1,)."""
        if isinstance(self.t, tuple):
            return np.asarray(self.t, dtype=np.float64)
        return time_grid(self.t, self.num_steps, grid=self.grid, sde=self.sde)

    def recipe(self) -> Recipe:
        return Recipe(self.table(self.times))

    def coarse(self, chosen: Sequence[int]) -> CoefficientTable:
        return self.table(self.times[list(chosen)])

    def definition(self, state: StepState, networks: Networks, noise: Noise, steps: range) -> StepState:
        if not self.is_defined:
            return super().definition(state, networks, noise, steps)
        x, recipe = state[0], self.recipe()
        if steps.start == 0 and recipe.noising is not None:
            alpha_bar = self.sde.discrete_alpha_bar(float(self.times[0]))
            state = (alpha_bar**0.5 * x + (1.0 - alpha_bar) ** 0.5 * noise.z(-1, x),)
        return self.solve_ref(state, networks, lambda k: noise.z(k, x), self.times, steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class COUP(DiffusionMethod):
    """The reverse SDE from the image itself, following the gradient of the classifier's log-confidence.

    x' = x + h β [½ x − ε̂/σ + λ ∇ log p(ŷ | x)] + sqrt(β h) z. Zhang et al. 2024, arXiv:2408.05900, eq. 5.

    Attributes:
        guidance_scale: λ of the paper, at least 0 (1.0 there); a number, or a function of t (`package.module:NAME` of one).

    Raises:
        TypeError: if a field is of another type.
        ValueError: as `DiffusionMethod`, or if λ is negative or not finite at a time of the run.

    Example:
        >>> import coupfast
        >>> score, classifier = coupfast.load_score("cifar10-tiny"), coupfast.load_classifier("cifar10-tiny")
        >>> coupfast.Purifier(score, classifier, method=coupfast.COUP(t=0.06, num_steps=20, guidance_scale=0.5)).num_steps
        20
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
            for t in self.times[:-1]:
                self.scale(float(t))

    def scale(self, t: float) -> float:
        given = self.guidance_scale
        if isinstance(given, str):
            given = resolve(given, option="guidance_scale")
        return given if isinstance(given, float) else _checked_scale(given(t), t)  # type: ignore[operator]


def _checked_scale(value: Any, t: float | None = None) -> float:
    found = value if t is None else f"{value!r} at t = {t:g}"
    is_number = isinstance(value, (int, float, np.floating, np.integer)) and not isinstance(value, bool)
    if not is_number or not 0.0 <= value < math.inf:
        raise ValueError(f"`guidance_scale` is a finite number >= 0, got {found}; the paper uses 1.0")
    return float(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReverseSDE(DiffusionMethod):
    """COUP without guidance: the reverse SDE from the image itself. Zhang et al. 2024, arXiv:2408.05900.

    Example:
        >>> import coupfast
        >>> score = coupfast.load_score("cifar10-tiny")
        >>> coupfast.Purifier(score, method=coupfast.ReverseSDE(t=0.06, num_steps=20)).num_steps
        20
    """

    name: ClassVar[str] = "reverse-sde"
    reference: ClassVar[str] = "Zhang et al. 2024, arXiv:2408.05900 (COUP without guidance)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffPure(DiffusionMethod):
    """Forward noising to time `t` with the discrete chain's ᾱ, then the reverse SDE. Nie et al. 2022, arXiv:2205.07460.

    Example:
        >>> import coupfast
        >>> score = coupfast.load_score("cifar10-tiny")
        >>> coupfast.Purifier(score, method=coupfast.DiffPure(t=0.06, num_steps=20)).num_steps
        20
    """

    name: ClassVar[str] = "diffpure"
    reference: ClassVar[str] = "Nie et al. 2022, arXiv:2205.07460"

    def recipe(self) -> Recipe:
        grid = self.times
        alpha_bar = self.sde.discrete_alpha_bar(float(grid[0]))
        return Recipe(self.table(grid), (float(np.sqrt(alpha_bar)), float(np.sqrt(1.0 - alpha_bar))))
