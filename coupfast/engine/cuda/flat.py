"""A network's evaluations and products with its Jacobian as flat graphs: ATen operations in order, derivatives written out.

A flat graph has no autograd, no Python and no hidden tensor in it: weights, the table of time embeddings and the step's index
are inputs. It can be compiled whole, captured, counted, and run on tensors without data of a device that is not there.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from coupfast.tracing import LINEAR_VIEWS

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

    def copy(self) -> FlatGraph:
        """Another graph of the same constants."""
        return FlatGraph(copy.deepcopy(self.module), self.varying, list(self.constants))

    def example_inputs(self) -> list[torch.Tensor]:
        """Zeros in the formats of the varying inputs, and the constants."""
        found = []
        for node in self.placeholders()[: self.varying]:
            value = node.meta["val"]
            found.append(torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).zero_())
        return [*found, *self.constants]

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
    # Fused attention has other operations on every device, and no second derivative. Autograd's own threads see no trace.
    with sdpa_kernel(SDPBackend.MATH), torch.autograd.set_multithreading_enabled(False):
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


#: A result is kept if it is at most so many times as large as what it is made of.
MOST_FOLDED = 2
#: (operation, its arguments by address and format) → the constants it read, which those addresses are, and its result.
Folded = dict[tuple, tuple[list[torch.Tensor], torch.Tensor]]


def fold_constants(graph: FlatGraph, folded: Folded) -> None:
    """Replace operations on constants alone by their results, in place: no step has to find them again.

    Args:
        folded: Results, shared between graphs of the same constants; filled.
    """
    known: dict[fx.Node, torch.Tensor] = dict(zip(graph.placeholders()[graph.varying :], graph.constants, strict=True))
    for node in list(graph.module.graph.nodes):
        inputs = node.all_input_nodes
        if node.op != "call_function" or not inputs or not all(used in known for used in inputs):
            continue
        target: Any = node.target
        if not isinstance(target, torch._ops.OpOverload) or not isinstance(node.meta.get("val"), torch.Tensor) or writes(node):
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda used: known[used])
        if target in VIEWS - {aten.clone.default, aten.contiguous.default, aten.empty.memory_format}:
            known[node] = target(*args, **kwargs)
            continue
        read = [known[used] for used in inputs]
        if node.meta["val"].nbytes > MOST_FOLDED * sum(tensor.untyped_storage().nbytes() for tensor in read):
            continue  # one that grows with the batch
        named = fx.map_arg((node.args, node.kwargs), lambda used: _named(known[used]))
        key = (str(target), repr(named))
        if key not in folded:
            with torch.no_grad():
                folded[key] = read, target(*args, **kwargs)
        known[node] = folded[key][1]
        new = graph.add_constant(known[node])
        known[new] = known[node]
        new.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(new)
        graph.module.graph.erase_node(node)
    graph.module.graph.eliminate_dead_code()
    graph.module.recompile()


def _named(tensor: torch.Tensor) -> str:
    return f"{tensor.data_ptr()} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}"


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
