"""The operations between a program's kernels, as PyTorch runs them: values, linear parts and transposes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map, tree_unflatten

from coupfast.engine.cpu.parts import FusedNetwork, Region
from coupfast.engine.cpu.placement import View, dense
from coupfast.engine.memory import AllocationAccount
from coupfast.guidance import PiecewiseLinearGraph, Slope
from coupfast.tracing import Operation, PerImage

aten = torch.ops.aten

#: For each region the leaves of autograd's graph and the edges that it ends in; None where nothing flows back.
Graphs = dict[Region, tuple[list[torch.Tensor], list[GradientEdge | None]]]

_RESHAPES = {aten.view.default, aten._unsafe_view.default}


class Regions:
    """Runs regions of a network at one batch size, and their transposes afterwards.

    Args:
        network: What the regions are of.
        batch: Images.
        linear: See `NetworkProgram`.
        differentiable: Whether transposes are to be possible: `run` then keeps autograd's graph until `transpose`.

    Attributes:
        label_values: What the labels alone decide, for the whole batch; to be set before a run.
        slopes: What a run of the network finds of kinks, in order; a run of its linear part takes them from here.
        graphs: What a run left for its transposes.
    """

    def __init__(self, network: FusedNetwork, batch: int, *, linear: PiecewiseLinearGraph | None, differentiable: bool) -> None:
        self.network, self.batch, self.linear, self.differentiable = network, batch, linear, differentiable
        self.label_values: dict[fx.Node, torch.Tensor] = {}
        self.slopes: list[Slope] = []
        self._remaining: Iterator[Slope] = iter(())
        self._constants = network.partition.at_batch(batch)
        self.graphs: Graphs = {}

    def begin(self) -> None:
        """Before the first region of a run."""
        if self.linear is not None:
            self._remaining = iter(self.slopes)
        else:
            self.slopes = []
        self.graphs = {}

    def end(self) -> None:
        """After the last transpose: nothing is kept of the run."""
        self.graphs = {}

    def run(self, region: Region, calls: list[Call], inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        """A region's operations on `inputs`, their results into `outputs`."""
        with torch.set_grad_enabled(self.differentiable):
            leaves = [tensor.detach().requires_grad_(self.differentiable) for tensor in inputs]
            values: dict[fx.Node, Any] = dict(zip(region.inputs, map(dense, leaves), strict=True))
            values.update(self.label_values)
            for call in calls:
                values[call.node] = self._value(call, *call.arguments(values))
            results = [values[node] for node in region.outputs]
        with torch.no_grad():
            for target, result in zip(outputs, results, strict=True):
                target.copy_(result)
        if self.differentiable:  # edges, not results: autograd saved those of their values that it reads
            self.graphs[region] = (leaves, [get_gradient_edge(r) if r.requires_grad else None for r in results])

    def _value(self, call: Call, arguments: tuple, keywords: dict) -> Any:
        if self.linear is not None and not call.reshapes:
            return self.linear.tangent(call.node, arguments, keywords, self._remaining)
        value = call.target(*arguments, **keywords)
        if self.differentiable and self.linear is None:
            slope = PiecewiseLinearGraph.slope(call.node, arguments, value)
            if slope is not None:
                self.slopes.append(slope)
        return value

    def transpose(
        self, region: Region, cotangents: list[tuple[torch.Tensor, float] | None], targets: list[torch.Tensor]
    ) -> None:
        """The transpose of the region's last run.

        Args:
            cotangents: Of each output, with a factor; None where there is none.
            targets: Where the cotangents of the inputs go.
        """
        leaves, edges = self.graphs.pop(region)
        pairs = [
            (edge, pair[0] if pair[1] == 1.0 else pair[0] * pair[1])
            for edge, pair in zip(edges, cotangents, strict=True)
            if pair is not None and edge is not None
        ]
        gradients: Sequence[torch.Tensor | None] = [None] * len(leaves)
        if pairs:
            ends, cotangent = zip(*pairs, strict=True)
            gradients = torch.autograd.grad(ends, leaves, cotangent, allow_unused=True)
        for target, gradient in zip(targets, gradients, strict=True):
            target.zero_() if gradient is None else target.copy_(gradient)

    def calls(self, region: Region) -> list[Call]:
        """The region's operations for this batch size, their constant arguments filled in."""
        calls = []
        for operation in region.operations:
            node: Any = operation.node
            leaves = [self._constants.get(leaf, leaf) if isinstance(leaf, fx.Node) else leaf for leaf in operation.leaves]
            leaves = [leaf * self.batch if isinstance(leaf, PerImage) else leaf for leaf in leaves]
            args, kwargs = tree_unflatten(leaves, operation.spec)
            reshapes = node.target in _RESHAPES
            # Maps are channels last here, which a view of the traced network's memory cannot always be, ...
            target = aten.reshape.default if reshapes else node.target
            if target is aten.native_group_norm.default:
                target = _group_norm
            calls.append(Call(node, target, reshapes, args, kwargs))
        return calls

    def bytes(self, *, all_at_once: bool) -> int:
        """What the operations hold: all results of the largest region, or of all of them where those of one outlive it."""
        sizes = [
            sum(
                int(np.prod(self.network.shapes.get(node, (0,))))
                for operation in region.operations
                if _allocates(operation)
                for node in _results(operation.node)
            )
            for region in self.network.regions()
        ]
        return 4 * self.batch * (sum(sizes) if all_at_once else max(sizes, default=0))

    def graph_bytes(self, view: Callable[[fx.Node], View]) -> int:
        """What `graphs` hold after a run beside the inputs and what is there anyway: that of one image, in proportion.

        Args:
            view: Where a value lies.
        """
        one = Regions(self.network, 1, linear=None, differentiable=True)
        nodes = self.network.label_values
        # What a trace keeps has no data; a region's maps have.
        one.label_values = {
            node: torch.zeros_like(node.meta["val"][:1], device="cpu", memory_format=torch.contiguous_format) for node in nodes
        }
        one.label_values = self.network.partition.for_images(one.label_values, 1)
        runs = []
        for region in self.network.regions():
            inputs = [view(node).zeros() for node in region.inputs]
            outputs = [view(node).zeros() for node in region.outputs]
            runs.append((region, one.calls(region), inputs, outputs))
        there = [*self._constants.values(), *one._constants.values(), *one.label_values.values()]
        outside = [value for value in there if isinstance(value, torch.Tensor)]
        outside += [tensor for *_, inputs, outputs in runs for tensor in (*inputs, *outputs)]
        with AllocationAccount(outside) as account:
            for run in runs:
                one.run(*run)
            one.slopes = []
        return self.batch * account.live

    def slopes_bytes(self) -> int:
        """What a run leaves in `slopes`."""
        nodes = [operation.node for region in self.network.regions() for operation in region.operations]
        return sum(PiecewiseLinearGraph.slope_bytes(node, self.batch) for node in nodes)


class Call:
    """One operation of a region: its arguments, with nodes where values come in when it runs."""

    def __init__(self, node: fx.Node, target: Callable, reshapes: bool, args: tuple, kwargs: dict) -> None:
        self.node, self.target, self.reshapes = node, target, reshapes
        self._args, self._kwargs = args, kwargs
        self._flat = not _has_nodes(kwargs) and not any(isinstance(a, (list, tuple)) and _has_nodes(a) for a in args)

    def arguments(self, values: dict[fx.Node, Any]) -> tuple[tuple, dict]:
        if self._flat:  # nearly always; looking into lists takes as long as a small operation
            return tuple([values[a] if type(a) is fx.Node else a for a in self._args]), self._kwargs
        return tree_map(lambda leaf: values[leaf] if type(leaf) is fx.Node else leaf, (self._args, self._kwargs))


def _group_norm(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    """... and whose rows (as attention has them) do not lie as this operation wants them."""
    formats = (torch.contiguous_format, *([torch.channels_last] if x.dim() == 4 else []))
    if not any(x.is_contiguous(memory_format=format) for format in formats):
        x = x.contiguous()
    return aten.native_group_norm.default(x, *rest)


def _allocates(operation: Operation) -> bool:
    schema = getattr(operation.node.target, "_schema", None)
    return schema is not None and not any(argument.alias_info for argument in schema.arguments)


def _results(node: fx.Node) -> list[fx.Node]:
    """The nodes that stand for an operation's results: its own, or where it has several those that pick one."""
    return [node] if "val" in node.meta else list(node.users)


def _has_nodes(argument: Any) -> bool:
    return any(isinstance(leaf, fx.Node) for leaf in tree_leaves(argument))
