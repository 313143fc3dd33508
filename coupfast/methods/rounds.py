"""Purification in several rounds of noising and denoising."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from coupfast.methods.base import Networks, Recipe, StepState
from coupfast.methods.diffusion import SolverMethod
from coupfast.noise import Noise
from coupfast.options import check_integer, one_or_several, option, other_default, several
from coupfast.sde import VPSDE, DiscreteVPSDE, check_t, time_grid
from coupfast.solvers import Ancestral, Solver, noising, one_after_the_other


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiStage(SolverMethod):
    """Rounds of noising to a level and denoising from there, gentle ones first. Lee & Kim 2023, arXiv:2303.09051.

    Their CIFAR-10 defense: levels of 30, 50 and 125 of 1000 steps, 4, 2 and 2 times, ancestral sampling (DDIM with η = 1) in
    every step of the chain; ten purified copies vote, which is the judge's matter. A round starts from what the one before
    left, unclipped. Each ends at t = 1e-5 as every run here does.

    Attributes:
        levels: Times in (1e-5, 1] that rounds noise to, level n of 1000 being n/1000.
        repeats: How many rounds each level has, at least 1.
        num_steps: Steps of each round, one number for all of them or one a level; None is a step each 1e-3.
        solver: By default `Ancestral()`.
        sde: By default the discrete chain.

    Raises:
        TypeError: if a field is of another type.
        ValueError: as `SolverMethod`, if a level or a count is out of range, or there is not one of each for every level.

    Example:
        >>> import coupfast
        >>> score = coupfast.load_score("cifar10-tiny")
        >>> coupfast.Purifier(score, method=coupfast.MultiStage(levels=(0.03,), repeats=(2,))).num_steps
        62
    """

    name: ClassVar[str] = "multi-stage"
    reference: ClassVar[str] = "Lee & Kim 2023, arXiv:2303.09051"

    levels: tuple[float, ...] = option(
        (0.03, 0.05, 0.125),
        help="times that method multi-stage noises to, level 30 of 1000 being 0.03",
        parse=several(float),
        metavar="T,...",
    )
    repeats: tuple[int, ...] = option(
        (4, 2, 2), help="rounds at each of the levels", parse=several(int), metavar="N,..."
    )
    num_steps: int | tuple[int, ...] | None = option(  # type: ignore[assignment]  # wider: several levels
        None,
        help="that many equal steps a round, one number or one a level; without it one step each 1e-3",
        parse=one_or_several(int),
        metavar="K,...",
    )
    solver: str | Solver = other_default(SolverMethod, "solver", Ancestral())
    sde: VPSDE = other_default(SolverMethod, "sde", DiscreteVPSDE())

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("levels", "repeats"):
            given = getattr(self, name)
            if not isinstance(given, (Sequence, np.ndarray)) or isinstance(given, str) or len(given) == 0:
                raise ValueError(f"`{name}` is a sequence, one entry a level, got {given!r}")
        object.__setattr__(self, "levels", tuple(check_t(level, "levels") for level in self.levels))
        if len(self.repeats) != len(self.levels):
            raise ValueError(f"{len(self.levels)} `levels` need as many `repeats`, got {len(self.repeats)}: {self.repeats}")
        object.__setattr__(self, "repeats", tuple(check_integer("repeats", count, 1) for count in self.repeats))
        if isinstance(self.num_steps, tuple) and len(self.num_steps) != len(self.levels):
            raise ValueError(
                f"{len(self.levels)} `levels` need as many `num_steps`, or one number for all, got {self.num_steps}"
            )

    def _check_num_steps(self) -> None:
        if isinstance(self.num_steps, Sequence) and not isinstance(self.num_steps, str):
            object.__setattr__(self, "num_steps", tuple(check_integer("num_steps", steps, 1) for steps in self.num_steps))
        else:
            super()._check_num_steps()

    def _rounds(self) -> list[np.ndarray]:
        """The times of each round."""
        steps = self.num_steps if isinstance(self.num_steps, tuple) else [self.num_steps] * len(self.levels)
        levels = zip(self.levels, self.repeats, steps, strict=True)
        grids = [(time_grid(level, num_steps, grid=self.grid, sde=self.sde), count) for level, count, num_steps in levels]
        return [times for times, count in grids for _ in range(count)]

    def recipe(self) -> Recipe:
        tables, t = [], 0.0
        for times in self._rounds():
            level = float(times[0])
            signal, sigma = float(np.sqrt(self.sde.alpha_bar(level))), float(self.sde.sigma(level))
            tables += [noising(t, level, signal, sigma), self.table(times)]
            t = float(times[-1])
        return Recipe(one_after_the_other(tables))

    def definition(self, state: StepState, networks: Networks, noise: Noise, steps: range) -> StepState:
        if not self.is_defined:
            return super().definition(state, networks, noise, steps)
        like, first = state[0], 0  # the row that a round begins with
        for times in self._rounds():
            if first in steps:
                level = float(times[0])
                signal, sigma = float(self.sde.alpha_bar(level)) ** 0.5, float(self.sde.sigma(level))
                state = (signal * state[0] + sigma * noise.z(first, like),)
            begin, offset = first + 1, first + 1
            end = begin + len(times) - 1
            taken = range(max(begin, steps.start) - begin, min(end, steps.stop) - begin)
            if len(taken) > 0:
                state = self.solve_ref(state, networks, lambda k, o=offset: noise.z(o + k, like), times, taken)  # type: ignore[misc]
            first = end
        return state
