"""The named recipes of purification, as values. A new one is one entry of `METHODS`."""

from __future__ import annotations

import dataclasses

import numpy as np

from coupfast.sde import VPSDE, time_grid
from coupfast.solvers import SOLVERS, CoefficientTable


@dataclasses.dataclass(frozen=True)
class Method:
    """What a method does besides integrating the reverse SDE.

    Attributes:
        guidance: Follow the gradient of the classifier's log-confidence (needs a classifier).
        forward_noising: First move the image to time t of the forward SDE, with the discrete chain's ᾱ.
        reference: Where it comes from.
    """

    guidance: bool
    forward_noising: bool
    reference: str


METHODS: dict[str, Method] = {
    "coup": Method(True, False, "Zhang et al. 2024, arXiv:2408.05900, eq. 5"),
    "reverse-sde": Method(False, False, "Zhang et al. 2024, arXiv:2408.05900 (COUP without guidance)"),
    "diffpure": Method(False, True, "Nie et al. 2022, arXiv:2205.07460"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """A method made numeric: the table of its steps and, where it has one, the row of its forward noising."""

    table: CoefficientTable
    noising: tuple[float, float] | None  # (sqrt ᾱ, sqrt(1 − ᾱ))

    @property
    def num_noises(self) -> int:
        """Rows of an explicit `noise`: one a step, and the forward noising's as the last."""
        return self.table.num_steps + (self.noising is not None)


def recipe(
    method: Method,
    *,
    sde: VPSDE,
    t: float | np.ndarray,
    num_steps: int | None = None,
    solver: str = "euler-maruyama",
    guidance_scale: float = 1.0,
) -> Recipe:
    """Coefficients of `method` from time `t` (or on a whole grid, if `t` is an array of times) to 1e-5."""
    grid = np.asarray(t, dtype=np.float64) if isinstance(t, np.ndarray) else time_grid(t, num_steps)
    table = SOLVERS[solver](sde, grid, guidance_scale if method.guidance else 0.0)
    if not method.forward_noising:
        return Recipe(table, None)
    alpha_bar = sde.discrete_alpha_bar(float(grid[0]))
    return Recipe(table, (float(np.sqrt(alpha_bar)), float(np.sqrt(1.0 - alpha_bar))))
