"""`coupfast methods`: every method and solver, from the objects themselves."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

import torch

from coupfast.cli.arguments import add_command
from coupfast.methods import METHODS, Method, StepMethod, TableMethod
from coupfast.noise import ReplayedNoise
from coupfast.options import options_of
from coupfast.solvers import SOLVERS, NamedSolver, solver_name

#: What every method has; said once.
_COMMON = {option.keyword for option in options_of(Method)}
_IMAGE = 3 * 32 * 32 * 4  # bytes of one state of a CIFAR-10 image


def add(commands: Any) -> None:
    add_command(
        commands,
        "methods",
        run,
        "List every method of purification and every solver, with options, defaults and what they take",
        "Evaluations are those of one image at the defaults, states what the gradient of a CIFAR-10 image keeps, beside "
        "one step's activations.",
    )


def run(options: argparse.Namespace) -> int:
    print(methods_table())
    print()
    print(solvers_table())
    return 0


def methods_table() -> str:
    """A row a method, in Markdown."""
    rows: list[tuple[str, ...]] = [
        ("`--method`", "what", "options and defaults", "kind", "evaluations of the score net", "states", "source")
    ]
    for name, kind in METHODS.items():
        made: Any = kind()
        steps = made.recipe().table.num_steps if isinstance(made, TableMethod) else made.num_steps
        asked = made.score_evaluations
        states = f"{(steps + 1) * _state_bytes(made) / 2**20:.2f} MiB"
        what, knobs = _first(kind).partition(". ")[0].rstrip("."), _knobs(made, _COMMON)
        rows.append((f"`{name}`", what, knobs, _kind(made), f"{asked} in {steps} steps", states, kind.reference))
    return _markdown(rows)


def solvers_table() -> str:
    """A row a solver, in Markdown."""
    rows: list[tuple[str, ...]] = [("`--solver`", "what, and its source", "options and defaults")]
    for name, solver in SOLVERS.items():
        knobs = _knobs(solver(), set()) if isinstance(solver, type) else ""
        rows.append((f"`{name}`", _first(solver), knobs))
    return _markdown(rows)


def _state_bytes(method: Method) -> int:
    """Of what a CIFAR-10 image leaves with every step; what all steps share is not counted."""
    if not isinstance(method, StepMethod):
        return _IMAGE
    x = torch.zeros(1, 3, 32, 32)
    state = method.start(x, ReplayedNoise(torch.zeros(method.num_noises, *x.shape)))
    own = {tensor.data_ptr(): tensor.nbytes for tensor in state}
    return sum(own.values())


def _kind(method: Method) -> str:
    if isinstance(method, StepMethod):
        return "step function, guided" if method.guided else "step function"
    assert isinstance(method, TableMethod)
    table = method.recipe().table
    said = [
        word
        for word, there in (
            ("guided", method.guided),
            ("x_in", table.e is not None),
            ("second noise", table.f is not None),
            ("clipped", table.clips),
        )
        if there
    ]
    return ", ".join(["rows", *said])


def _knobs(owner: Any, left_out: set[str]) -> str:
    return ", ".join(
        f"{option.keyword} {_value(option.default)}" for option in options_of(owner) if option.keyword not in left_out
    )


def _value(value: Any) -> str:
    if isinstance(value, NamedSolver):
        return solver_name(value)
    if isinstance(value, tuple):
        return ",".join(f"{part:g}" for part in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if hasattr(value, "beta_min"):
        return f"{value.beta_min:g},{value.beta_max:g}{',discrete' if type(value).__name__.startswith('Discrete') else ''}"
    return str(value)


def _first(owner: Any) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((inspect.getdoc(owner) or "").split("\n\n")[0].split())


def _markdown(rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
