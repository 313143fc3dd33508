"""Solvers as tables of coefficients. A new solver is one function that fills a table (`table`), and one entry here."""

from __future__ import annotations

from coupfast.solvers.euler import euler_maruyama, probability_flow
from coupfast.solvers.table import EXTRA_COLUMNS, CoefficientTable, Solver

__all__ = ["EXTRA_COLUMNS", "SOLVERS", "CoefficientTable", "Solver", "euler_maruyama", "probability_flow"]

SOLVERS: dict[str, Solver] = {
    "euler-maruyama": euler_maruyama,
    "probability-flow": probability_flow,
}
