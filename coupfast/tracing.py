"""A function of tensors as a graph of ATen operations that serves every batch size."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten


class PerImage(int):
    """An integer argument that is this many times the batch size."""


@dataclasses.dataclass
class Operation:
    """One node of a trace, its arguments flattened: leaves are nodes, `PerImage`s or constants."""

    node: fx.Node
    leaves: list[Any]
    spec: Any
    dead: list[fx.Node]  # values that nothing needs after this operation

    def arguments(self, values: dict[fx.Node, Any], batch: int) -> tuple[tuple, dict]:
        leaves = [
            values[leaf] if isinstance(leaf, fx.Node) else leaf * batch if isinstance(leaf, PerImage) else leaf
            for leaf in self.leaves
        ]
        return tree_unflatten(leaves, self.spec)


@dataclasses.dataclass
class Trace:
    """Operations in order; parameters and buffers are constants of `module`."""

    module: fx.GraphModule
    operations: list[Operation]

    def constant(self, node: fx.Node) -> torch.Tensor:
        """The value of a `get_attr` node."""
        return operator.attrgetter(str(node.target))(self.module)


def trace(function: Callable[..., torch.Tensor], arguments: Callable[[int], tuple[torch.Tensor, ...]]) -> Trace:
    """Run `function` at two and at three images and keep what it did.

    Args:
        function: Deterministic; its operations may not depend on values.
        arguments: Arguments for a number of images, which is their first axis.

    Raises:
        ValueError: if it does different things at different batch sizes.
        Exception: whatever `function` raises under tracing.
    """
    module, wider = (_graph(function, arguments(batch)) for batch in (2, 3))
    return Trace(module, _for_any_batch(list(module.graph.nodes), list(wider.graph.nodes)))


def _graph(function: Callable[..., torch.Tensor], arguments: tuple[torch.Tensor, ...]) -> fx.GraphModule:
    with torch.no_grad():
        # In-place operations, which many networks use, have no place in a trace that is evaluated out of order.
        module = make_fx(torch.func.functionalize(function))(*arguments)
    module.graph.eliminate_dead_code()  # outputs that nothing reads, such as a batch norm's saved statistics
    return module


def _for_any_batch(nodes: list[fx.Node], wider: list[fx.Node]) -> list[Operation]:
    """The trace at two images with every argument that grows with the batch found by the trace at three."""
    unlike = ValueError("it does different things at different batch sizes")
    if len(nodes) != len(wider):
        raise unlike
    last_use = {used: node for node in nodes for used in node.all_input_nodes}
    operations = []
    for node, other in zip(nodes, wider, strict=True):
        if (node.op, node.target) != (other.op, other.target):
            raise unlike
        leaves, spec = tree_flatten((node.args, node.kwargs))
        other_leaves, other_spec = tree_flatten((other.args, other.kwargs))
        if spec != other_spec:
            raise unlike
        for index, (leaf, other_leaf) in enumerate(zip(leaves, other_leaves, strict=True)):
            if isinstance(leaf, fx.Node):
                if leaf.name != other_leaf.name:
                    raise unlike
            elif leaf != other_leaf:
                if not isinstance(leaf, int) or 3 * leaf != 2 * other_leaf:
                    raise unlike
                leaves[index] = PerImage(leaf // 2)
        operations.append(Operation(node, leaves, spec, [used for used, user in last_use.items() if user is node]))
    return operations
