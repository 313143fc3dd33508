"""What an engine is: a function `prepare(score, classifier, table, example, …) → BoundEngine`.

A `BoundEngine` holds one `Program` per batch size, made when it is first wanted. A program knows how to run a step and its
transpose; nothing else does, and what it keeps between the two is its own business.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, Protocol

import torch

from coupfast.noise import Noise
from coupfast.solvers import CoefficientTable

#: What a step leaves for its transpose, from least to most: nothing, the activations' slopes, everything.
Keep = Literal["nothing", "slopes", "activations"]


class State(NamedTuple):
    """What a step of an extended table reads: x_k, the purification's input, x_{k−1} and ε̂(x_{k−1}), as far as they are."""

    x: torch.Tensor
    x_in: torch.Tensor | None = None
    x_before: torch.Tensor | None = None
    eps_before: torch.Tensor | None = None


class Cotangent(NamedTuple):
    """The gradient with respect to a `State`; None where nothing flows."""

    x: torch.Tensor
    x_in: torch.Tensor | None = None
    x_before: torch.Tensor | None = None
    eps_before: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes of one step of a program's batch, above the weights and the states.

    Attributes:
        forward: Peak of `step` that keeps nothing.
        forward_keeping: Peak of `step(keep="activations")`, kept activations included.
        transpose: Peak of `step_vjp` that rebuilds the step from its state.
        transpose_kept: Peak of `step_vjp` on kept activations, these not counted.
        slopes: What `keep="slopes"` leaves.
        activations: What `keep="activations"` leaves (slopes included).
    """

    forward: int
    forward_keeping: int
    transpose: int
    transpose_kept: int
    slopes: int
    activations: int


class Program(Protocol):
    """One purification's steps on one batch size."""

    table: CoefficientTable

    def step(
        self, k: int, x_k: torch.Tensor, noise: Noise, keep: Keep = "nothing", *, more: State | None = None
    ) -> tuple[Any, ...]:
        """x_{k+1}, and what `step_vjp` may use (None where nothing is kept); with a two-step table also ε̂(x_k).

        Args:
            k: The step.
            x_k: Its state.
            noise: Where z and z′ come from.
            keep: What to leave for `step_vjp`.
            more: What an extended table reads beside x_k, which need not be repeated in it.
        """
        ...

    def step_vjp(self, k: int, x_k: torch.Tensor, saved: Any, v: torch.Tensor, *, more: Cotangent | None = None) -> Any:
        """v_k = a_k v + b_k J_εᵀ v + c_k H v at x_k; with `more` a `Cotangent` (see `coupfast.engine.rows`).

        Args:
            k, x_k: The step and the state that it was taken from.
            saved: As `step` left it, or None to rebuild the step.
            v: Cotangent of x_{k+1}.
            more: With an extended table, what the later steps left of x_in, x_k and ε̂(x_k), the latter two in `x_before` and
                `eps_before`; None there where nothing flows.
        """
        ...


class BoundEngine(Protocol):
    """An engine bound to networks, a table and a shape of images."""

    engine: str
    largest_batch: int | None  # most images of one program; None: any number

    def for_batch(self, batch: int) -> Program:
        """The program for this many images."""
        ...

    def memory(self, batch: int) -> StepMemory:
        """What a step of this many images needs."""
        ...

    def weights_bytes(self, batch: int, *, gradient: bool) -> int:
        """What the engine makes of the weights and keeps, beside the networks' own."""
        ...

    def evaluations(self) -> dict[str, dict[str, int]]:
        """Network evaluations of a guided `step`, of a `step_vjp` that rebuilds, and of one on kept slopes/activations."""
        ...
