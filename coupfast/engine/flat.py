"""A network's evaluations and products with its Jacobian as flat graphs: ATen operations in order, derivatives written out.

A flat graph has no autograd, no Python and no hidden tensor in it: weights, the table of time embeddings and the step's index
are inputs. It can be compiled whole, captured, counted, and run on tensors without data of a device that is not there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from coupfast.guidance import PiecewiseLinearGraph, kink
from coupfast.tracing import LINEAR_VIEWS, Trace

aten = torch.ops.aten

#: Operations that compute nothing: they look at memory another way, copy it into another format, or ask for it. Not counted.
VIEWS = LINEAR_VIEWS | {aten.split.Tensor, aten.split_with_sizes.default, aten.detach.default, aten.empty.memory_format}

#: Derivatives that read no more than the shape of their second argument (of a convolution's, the one for its input).
_OF_A_SHAPE = {aten.convolution_backward.default, aten.avg_pool2d_backward.default, aten._adaptive_avg_pool2d_backward.default}


@dataclasses.dataclass
class FlatGraph:
    """A graph with the constants that are its last inputs.

    Attributes:
        module: Called with the varying inputs, then `constants`; returns a tuple of tensors.
        varying: How many inputs vary from call to call.
        constants: Weights and tables, in order.
    """

    module: fx.GraphModule
    varying: int
    constants: list[torch.Tensor]

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.module(*inputs, *self.constants)

    def operations(self) -> list[fx.Node]:
        """The operations that launch something."""
        return [
            node
            for node in self.module.graph.nodes
            if node.op == "call_function" and node.target not in VIEWS and isinstance(node.target, torch._ops.OpOverload)
        ]

    def placeholders(self) -> list[fx.Node]:
        return [node for node in self.module.graph.nodes if node.op == "placeholder"]

    def constant_of(self, node: Any) -> torch.Tensor | None:
        """The constant that a node is, or None."""
        if not isinstance(node, fx.Node) or node.op != "placeholder":
            return None
        index = self.placeholders().index(node) - self.varying
        return self.constants[index] if index >= 0 else None

    def add_constant(self, constant: torch.Tensor) -> fx.Node:
        """A new last input."""
        graph = self.module.graph
        with graph.inserting_after(self.placeholders()[-1]):
            node = graph.placeholder(f"constant_{len(self.constants)}")
        node.meta["val"] = torch.empty_like(constant, device="meta")
        self.constants.append(constant)
        return node


def flatten(
    function: Callable[..., tuple[torch.Tensor, ...]], varying: Sequence[torch.Tensor], constants: Sequence[torch.Tensor]
) -> FlatGraph:
    """Run `function(*varying, *constants)` on tensors without data and keep its operations, those of autograd included.

    Raises:
        ValueError: if it uses a tensor that it was not given, or writes into one that it was.
        Exception: whatever the function raises.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # takes a second, which only this engine should

    varying = [tensor.clone() for tensor in varying]  # one tensor given twice would be one input
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has other operations on every device, and no second derivative
        # Tensors of elsewhere are let in, so that they can be named.
        module = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*varying, *constants)
    for node in module.graph.nodes:
        if node.op == "get_attr":
            raise ValueError(
                f"the function uses a tensor that it was not given ({node.target}, which {next(iter(node.users))} reads); "
                "make it a parameter or a buffer of the network"
            )
    if any(writes(node) for node in module.graph.nodes):
        # So that an operation may be moved to any place between what it reads and what reads it. Of the traced graph rather
        # than of the function, in which autograd still has to see what the function does.
        module = make_fx(torch.func.functionalize(module), tracing_mode="fake")(*varying, *constants)
    for node in module.graph.nodes:
        if writes(node):
            raise ValueError(f"the function writes into {node.args[0]}, which it was given, by {node.target}")
    for node in list(module.graph.nodes):
        if node.target in (aten.detach.default, aten.alias.default):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    _forget_unread(module.graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    return FlatGraph(module, len(varying), list(constants))


def _forget_unread(graph: fx.Graph) -> None:
    """Give derivatives that read a shape only an empty tensor of it: what computed its values may then be dead."""
    for node in list(graph.nodes):
        if node.target not in _OF_A_SHAPE or (len(node.args) == 11 and node.args[10] != [True, False, False]):
            continue
        unread: Any = node.args[1]
        value = unread.meta["val"]
        formats = [f for f in (torch.contiguous_format, torch.channels_last) if value.is_contiguous(memory_format=f)]
        if not formats:
            continue
        options = {"dtype": value.dtype, "device": value.device, "memory_format": formats[0]}
        with graph.inserting_before(node):
            empty = graph.call_function(aten.empty.memory_format, (list(value.shape),), options)
        empty.meta["val"] = value
        node.update_arg(1, empty)


def writes(node: fx.Node) -> bool:
    """Whether an operation writes into memory that it was given."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


class TracedScore:
    """A score network's trace with all that depends on the label alone found beforehand, a row a step of the grid.

    Args:
        traced: Of (states, labels).
        labels: 999 t of every step, shape (steps,).
    """

    def __init__(self, traced: Trace, labels: torch.Tensor) -> None:
        self.traced = traced
        nodes = [operation.node for operation in traced.operations]
        states, label = [node for node in nodes if node.op == "placeholder"]
        self.states, self._label = states, label
        self._active = _reached(nodes, states)
        timely = _reached(nodes, label) - self._active
        self._timely = [operation for operation in traced.operations if operation.node in timely]
        read = {used for node in self._active for used in node.all_input_nodes}
        frontier = [node for node in nodes if node in timely and node in read and _is_tensor(node)]
        self._frontier = [node for node in frontier if node.meta.get("images") != "elsewhere"]
        if len(self._frontier) < len(frontier):
            raise ValueError("a value of the labels has its images in another axis than the first")
        self.constant_nodes = list(traced.constants)
        self.tables = self._tables(labels)  # [steps, …] each

    @functools.cached_property
    def constants(self) -> list[torch.Tensor]:
        """Tables and weights; one copy of them for all graphs."""
        return [*self.tables, *(_channels_last(self.traced.constants[node]) for node in self.constant_nodes)]

    def __call__(self, x_k: torch.Tensor, step: torch.Tensor, *constants: torch.Tensor) -> torch.Tensor:
        """eps_hat of states at the grid's step `step` (int64, 0-dim)."""
        tables, weights = constants[: len(self.tables)], constants[len(self.tables) :]
        values: dict[fx.Node, Any] = dict(zip(self.constant_nodes, weights, strict=True))
        values[self.states] = x_k
        for node, table in zip(self._frontier, tables, strict=True):
            value = table.index_select(0, step.view(1))[0]
            values[node] = value.expand(len(x_k), *value.shape[1:]) if node.meta["images"] == "first" else value
        return _run(self.traced, values, len(x_k), skip={operation.node for operation in self._timely} | {self._label})

    def _tables(self, labels: torch.Tensor) -> list[torch.Tensor]:
        rows: list[list[torch.Tensor]] = []
        with torch.no_grad():
            for value in labels:
                values: dict[fx.Node, Any] = {**self.traced.constants, self._label: value.view(1)}
                for operation in self.traced.operations:
                    node = operation.node
                    # Constants that labels are combined with, such as frequencies, are found here, too.
                    if node.op == "call_function" and node not in self._active:
                        args, kwargs = operation.arguments(values, 1)
                        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                rows.append([values[node].clone() for node in self._frontier])
        return [torch.stack(column) for column in zip(*rows, strict=True)]


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


def _reached(nodes: list[fx.Node], start: fx.Node) -> set[fx.Node]:
    reached = {start}
    for node in nodes:
        if node.op == "call_function" and any(used in reached for used in node.all_input_nodes):
            reached.add(node)
    return reached


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
