"""A function of tensors as a graph of ATen operations that serves every batch size.

The operations are written down while PyTorch runs them: some tens of microseconds each, where tracers that also serve compilers
take milliseconds.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

aten = torch.ops.aten

#: Operations that only look at one tensor another way (or copy it into another format, if it is not in that), and that
#: autograd sees through.
LINEAR_VIEWS = {
    aten.contiguous.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.alias.default,
}


class PerImage(int):
    """An integer argument that is this many times the batch size."""


@dataclasses.dataclass
class Operation:
    """One node of a trace, its arguments flattened: leaves are nodes, `PerImage`s or constants."""

    node: fx.Node
    leaves: list[Any]
    spec: Any
    dead: list[fx.Node]  # values that nothing needs after this operation

    def arguments(self, values: Any, batch: int) -> tuple[tuple, dict]:
        """Positional and keyword arguments, `values` mapping nodes to values, for so many images."""
        leaves = [
            values[leaf] if isinstance(leaf, fx.Node) else leaf * batch if isinstance(leaf, PerImage) else leaf
            for leaf in self.leaves
        ]
        return tree_unflatten(leaves, self.spec)


@dataclasses.dataclass
class Trace:
    """Operations in order, and the tensors that they found ready: parameters and buffers.

    `node.meta["val"]` is a tensor without data with the shape and dtype of the node's value at two images.
    `node.meta["images"]` says where its images are: "first" (they are the first axis), "absent" (it has none) or "elsewhere".
    """

    operations: list[Operation]
    constants: dict[fx.Node, torch.Tensor]


def trace(function: Callable[..., torch.Tensor], arguments: Callable[[int], tuple[torch.Tensor, ...]]) -> Trace:
    """Run `function` at two and at three images and keep what it did.

    Args:
        function: Deterministic; its operations may not depend on values.
        arguments: Arguments for a number of images, which is their first axis.

    Raises:
        ValueError: if it does different things at different batch sizes, reads a value, or writes into shared memory.
        Exception: whatever `function` raises.
    """
    (graph, constants), (wider, _) = (_record(function, arguments(batch)) for batch in (2, 3))
    return Trace(_for_any_batch(list(graph.nodes), list(wider.nodes)), constants)


def _record(
    function: Callable[..., torch.Tensor], arguments: tuple[torch.Tensor, ...]
) -> tuple[fx.Graph, dict[fx.Node, torch.Tensor]]:
    recorder = _Recorder(arguments)
    with torch.no_grad(), recorder:
        result = function(*arguments)
    if not isinstance(result, torch.Tensor):
        raise ValueError(f"it returns {type(result).__name__}, not a tensor")
    recorder.graph.output(recorder.node_of(result))
    recorder.graph.eliminate_dead_code()  # outputs that nothing reads, such as a batch norm's saved statistics
    return recorder.graph, recorder.constants


class _Writing:
    """Writes down every ATen operation. In-place operations become the operations whose results they keep."""

    def __init__(self, arguments: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.constants: dict[fx.Node, torch.Tensor] = {}
        self._nodes: dict[int, fx.Node] = {}  # by identity of the tensor, which `_alive` keeps
        self._alive: list[torch.Tensor] = []
        self._memory: dict[int, int] = {}  # by storage: tensors that share it
        for index, argument in enumerate(arguments):
            self._name(argument, self.graph.placeholder(f"argument_{index}"))

    def node_of(self, tensor: torch.Tensor) -> fx.Node:
        node = self._nodes.get(id(tensor))
        if node is None:
            node = self.graph.create_node("get_attr", f"constant_{len(self.constants)}")
            self.constants[node] = tensor.detach()
            self._name(tensor, node)
        return node

    def _name(self, tensor: torch.Tensor, node: fx.Node) -> None:
        node.meta["val"] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        if id(tensor) not in self._nodes:
            self._alive.append(tensor)
            storage = tensor.untyped_storage()._cdata
            self._memory[storage] = self._memory.get(storage, 0) + 1
        self._nodes[id(tensor)] = node

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        target = func
        if func._schema.is_mutable:
            target = self._out_of_place(func, args)
        to_node = lambda leaf: self.node_of(leaf) if isinstance(leaf, torch.Tensor) else leaf  # noqa: E731
        node_args, node_kwargs = tree_map(to_node, args), tree_map(to_node, kwargs)
        node = self.graph.call_function(target, node_args, node_kwargs)
        if isinstance(result, torch.Tensor):
            self._name(result, node)
        elif isinstance(result, (tuple, list)):
            for index, item in enumerate(result):
                if isinstance(item, torch.Tensor):
                    self._name(item, self.graph.call_function(operator.getitem, (node, index)))
        else:
            raise ValueError(f"{func} makes a number of a tensor: what is done next may depend on it")
        return result

    def _out_of_place(self, func: Any, args: tuple) -> Any:
        """`relu` for `relu_`, where nothing else would have seen what was written."""
        name = func._schema.name.removeprefix("aten::")
        packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
        target = getattr(packet, func._overloadname, None)
        written = [argument for argument in func._schema.arguments if argument.alias_info and argument.alias_info.is_write]
        if not name.endswith("_") or target is None or written != func._schema.arguments[:1]:
            raise ValueError(f"{func} writes into memory in a way that is not followed here")
        storage = args[0].untyped_storage()._cdata
        if id(args[0]) not in self._nodes or self._nodes[id(args[0])].op != "call_function" or self._memory[storage] > 1:
            raise ValueError(f"{func} writes into memory that other values share")
        return target


class _Recorder(_Writing, TorchDispatchMode):
    """`_Writing` as a mode. A mode that defined the method itself would import PyTorch's compiler, which takes 2 s."""


def _for_any_batch(nodes: list[fx.Node], wider: list[fx.Node]) -> list[Operation]:
    """The trace at two images with every argument that grows with the batch found by the trace at three."""
    unlike = ValueError("it does different things at different batch sizes")
    if len(nodes) != len(wider):
        raise unlike
    last_use = {used: node for node in nodes for used in node.all_input_nodes}
    dead: dict[fx.Node, list[fx.Node]] = {}
    for used, user in last_use.items():
        dead.setdefault(user, []).append(used)
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
        if isinstance(node.meta.get("val"), torch.Tensor):
            node.meta["images"] = _images_axis(node.meta["val"].shape, other.meta["val"].shape)
        operations.append(Operation(node, leaves, spec, dead.get(node, [])))
    return operations


def _images_axis(two: torch.Size, three: torch.Size) -> str:
    """Where a value's images are, by its shapes at two and at three images."""
    if two == three:
        return "absent"
    return "first" if two[1:] == three[1:] and (two[0], three[0]) == (2, 3) else "elsewhere"
