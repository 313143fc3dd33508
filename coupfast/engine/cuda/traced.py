"""A network's trace as functions of tensors that hide nothing: weights and tables of the labels' values are arguments.

Called on tensors without data they become flat graphs (`coupfast.engine.cuda.flat`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from coupfast.engine.partition import Partition
from coupfast.guidance import PiecewiseLinearGraph, kink
from coupfast.tracing import Trace

aten = torch.ops.aten


ALIGNED = 16  # bytes, at which a value begins within a row: kernels then read four floats at once


class TracedScore:
    """A score network's trace with all that depends on the label alone found beforehand, a row a step of the grid.

    Args:
        traced: Of (states, labels).
        labels: 999 t of every step, shape (steps,).

    Attributes:
        tables: All such values of a dtype side by side, shape (steps, elements): one gather finds a step's.
    """

    def __init__(self, traced: Trace, labels: torch.Tensor) -> None:
        self.traced, self.partition = traced, Partition(traced)
        self._read = self.partition.frontier({used for node in self.partition.of_images for used in node.all_input_nodes})
        self.constant_nodes = list(traced.constants)
        rows = [self.partition.at_label(label.view(1), self._read) for label in labels]
        by_dtype: dict[torch.dtype, list[tuple[fx.Node, torch.Tensor]]] = {}
        for node in self._read:
            values = torch.stack([row[node] for row in rows])  # [steps, …]
            by_dtype.setdefault(values.dtype, []).append((node, values))
        found = [_side_by_side(values) for values in by_dtype.values()]
        self.tables, self._places = [table for table, _ in found], [places for _, places in found]

    @functools.cached_property
    def constants(self) -> list[torch.Tensor]:
        """Tables and weights; one copy of them for all graphs."""
        return [*self.tables, *(_channels_last(self.traced.constants[node]) for node in self.constant_nodes)]

    def __call__(self, x_k: torch.Tensor, step: torch.Tensor, *constants: torch.Tensor) -> torch.Tensor:
        """eps_hat of states at the grid's step `step` (int64, 0-dim)."""
        tables, weights = constants[: len(self.tables)], constants[len(self.tables) :]
        values: dict[fx.Node, Any] = dict(zip(self.constant_nodes, weights, strict=True))
        values[self.partition.image] = x_k
        row = {}
        for table, places in zip(tables, self._places, strict=True):
            values_of_step = table.index_select(0, step.view(1))[0]
            for node, start, shape in places:
                row[node] = values_of_step[start : start + shape.numel()].view(shape)
        values |= self.partition.for_images(row, len(x_k))
        return _run(self.traced, values, len(x_k), skip=self.partition.of_labels)


def _side_by_side(
    values: list[tuple[fx.Node, torch.Tensor]],
) -> tuple[torch.Tensor, list[tuple[fx.Node, int, torch.Size]]]:
    """Values [steps, …] of one dtype as one table, and where in a row each begins."""
    parts, places, start = [], [], 0
    for node, value in values:
        flat = value.flatten(1)
        gap = -flat.shape[1] % (ALIGNED // flat.element_size())
        parts += [flat, flat.new_zeros(len(flat), gap)]
        places.append((node, start, value.shape[1:]))
        start += flat.shape[1] + gap
    return torch.cat(parts, dim=1), places


class TracedLogits:
    """A classifier's trace on states in the [-1, 1] scale or images in [0, 1], whichever it was made of."""

    def __init__(self, traced: Trace) -> None:
        self.traced = traced
        self.constant_nodes = list(traced.constants)

    @functools.cached_property
    def constants(self) -> list[torch.Tensor]:
        """Weights; one copy of them for all graphs."""
        return [_channels_last(self.traced.constants[node]) for node in self.constant_nodes]

    def __call__(self, x: torch.Tensor, *constants: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes)."""
        return self._run(x, constants, _plain)

    def _run(self, x: torch.Tensor, constants: tuple, run: Callable[[fx.Node, tuple, dict], Any]) -> torch.Tensor:
        values: dict[fx.Node, Any] = dict(zip(self.constant_nodes, constants, strict=True))
        values[self.traced.operations[0].node] = x
        return _run(self.traced, values, len(x), run=run)


class TracedClassifier(TracedLogits):
    """A piecewise linear classifier's value, slopes, and the two products with its Jacobian at given slopes.

    Slopes are bool masks, and indices where the network takes a maximum over a window.
    """

    def __init__(self, graph: PiecewiseLinearGraph) -> None:
        super().__init__(graph.traced)
        self.graph = graph

    def evaluate(self, x_k: torch.Tensor, *constants: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """f(x_k) of shape (batch, classes), then the slopes."""
        slopes: list[torch.Tensor] = []

        def run(node: fx.Node, args: tuple, kwargs: dict) -> Any:
            value = node.target(*args, **kwargs)  # type: ignore[operator]
            if node in self.graph.active:
                side = kink(node, args, value)
                if side is not None:
                    slopes.append(side)
            return value

        return (self._run(x_k, constants, run), *slopes)

    def tangent(self, v: torch.Tensor, slopes: Sequence[torch.Tensor], *constants: torch.Tensor) -> torch.Tensor:
        """J v of shape (batch, classes)."""
        remaining = iter(slopes)

        def run(node: fx.Node, args: tuple, kwargs: dict) -> Any:
            if node not in self.graph.active:
                return node.target(*args, **kwargs)  # type: ignore[operator]
            return self.graph.tangent(node, args, kwargs, remaining)

        return self._run(v, constants, run)

    def cotangent(
        self, image_shape: torch.Size, u: torch.Tensor, slopes: Sequence[torch.Tensor], *constants: torch.Tensor
    ) -> torch.Tensor:
        """Jᵀ u, of shape (batch, *image_shape), from u of shape (batch, classes)."""
        with torch.enable_grad():
            v = u.new_zeros(len(u), *image_shape).contiguous(memory_format=torch.channels_last).requires_grad_()
            return torch.autograd.grad(self.tangent(v, slopes, *constants), v, u)[0]


def _plain(node: fx.Node, args: tuple, kwargs: dict) -> Any:
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _run(
    traced: Trace,
    values: dict[fx.Node, Any],
    batch: int,
    run: Callable[[fx.Node, tuple, dict], Any] = _plain,
    skip: set[fx.Node] = frozenset(),  # type: ignore[assignment]
) -> torch.Tensor:
    """A trace's output, `values` holding its placeholders and constants (and whatever is found already)."""
    for operation in traced.operations:
        node = operation.node
        if node.op == "output":
            return values[node.all_input_nodes[0]]
        if node.op == "call_function" and node not in values and node not in skip:
            args, kwargs = operation.arguments(values, batch)
            if node.target is aten.view.default:  # which the trace's maps allowed, being contiguous; these are in channels last
                args = (args[0].reshape(args[1]), *args[1:])
            values[node] = run(node, args, kwargs)
    raise AssertionError("a trace has an output")


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
