"""Solvers as tables of coefficients. A new solver is one function that fills a table (`table`), and one entry here.

One with knobs is a frozen dataclass that is called like such a function: `DDIM(eta=0.5)`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from coupfast.naming import is_reference, reference_to, resolve
from coupfast.options import check_name
from coupfast.solvers.discrete import (
    DDIM,
    Ancestral,
    ClippingSolver,
    NamedSolver,
    SDEDPMSolver1,
    exponential,
    reverse_diffusion,
)
from coupfast.solvers.euler import euler_maruyama, probability_flow
from coupfast.solvers.multistep import DPMSolverPP2M, SDEDPMSolverPP2M
from coupfast.solvers.table import EXTRA_COLUMNS, CoefficientTable, Solver, noising, one_after_the_other

__all__ = [
    "DDIM",
    "EXTRA_COLUMNS",
    "SOLVERS",
    "Ancestral",
    "ClippingSolver",
    "CoefficientTable",
    "DPMSolverPP2M",
    "NamedSolver",
    "SDEDPMSolver1",
    "SDEDPMSolverPP2M",
    "Solver",
    "as_solver",
    "euler_maruyama",
    "exponential",
    "noising",
    "one_after_the_other",
    "probability_flow",
    "reverse_diffusion",
    "solver_name",
]

#: Functions, and the classes of solvers with knobs, by the names that people call them.
SOLVERS: dict[str, Solver | type[NamedSolver]] = {
    "euler-maruyama": euler_maruyama,
    "probability-flow": probability_flow,
    "reverse-diffusion": reverse_diffusion,
    "exponential": exponential,
    **{solver.name: solver for solver in (DDIM, Ancestral, SDEDPMSolver1, DPMSolverPP2M, SDEDPMSolverPP2M)},
}


def as_solver(given: Any) -> Any:
    """A solver as methods keep it: the name of one without knobs, `package.module:NAME`, or an object.

    Raises:
        ValueError: for a name that does not exist.
        TypeError: for what is neither a name nor a function that fills a table.
    """
    if isinstance(given, str) and not is_reference(given):
        check_name("solver", given, SOLVERS)
        given = SOLVERS[given] if isinstance(SOLVERS[given], type) else given
    elif isinstance(given, str):
        found = resolve(given, option="solver")
        given = found if isinstance(found, type) else given
    if isinstance(given, type) and dataclasses.is_dataclass(given):
        given = given()
    if not isinstance(given, str) and not callable(given):
        raise TypeError(f"`solver` is a name or a function that fills a table, got {type(given).__name__}")
    return given


def solver_name(solver: Any) -> str:
    """The name of a solver or of its class: one of `SOLVERS`, or `package.module:NAME`."""
    if isinstance(solver, str):
        return solver
    owner = solver if hasattr(solver, "__qualname__") else type(solver)
    known = {id(found): name for name, found in SOLVERS.items()}
    return known.get(id(owner)) or reference_to(owner)
