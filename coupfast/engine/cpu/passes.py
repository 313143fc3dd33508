"""A network's two passes as instructions: values in the order of its parts, cotangents in the reverse order.

Both lists are written when a program is made. `ForwardPass` says where every value lies; `BackwardPass` sums, for each value,
the cotangents of all that read it, mostly inside of the kernels that make them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from coupfast.engine.cpu.instructions import Instructions, Scaled, add_residual
from coupfast.engine.cpu.parts import Attention, Concatenation, Convolution, FusedNetwork, Heads, Part, Region
from coupfast.engine.cpu.placement import UNPLACED, Memory, View
from coupfast.engine.cpu.regions import Regions
from coupfast_kernels import operations


class Slopes:
    """Bits of every ReLU that a convolution takes in: on which side of its kink each element is.

    Args:
        kept: Whether they lie at the beginning of kept memory instead of in `bits`.

    Attributes:
        bits: uint8, one axis.
        kept_floats: What they take of kept memory.
    """

    def __init__(self, network: FusedNetwork, batch: int, *, kept: bool) -> None:
        self._offsets: dict[Convolution, int] = {}
        size = 0
        for conv in network.convolutions():
            if conv.z is not None:
                channels, height, width = network.shapes[conv.z]
                self._offsets[conv] = size
                size += batch * height * width * ((channels + 7) // 8)
        self.bits = torch.zeros(0 if kept else size + 8, dtype=torch.uint8)
        self.kept_floats = (size + 8) // 4 + 1 if kept and size else 0
        self._start = UNPLACED if kept else self.bits.data_ptr()

    def address(self, conv: Convolution) -> int:
        return self._start + self._offsets[conv]


class LabelRow:
    """The label values that convolutions add to every pixel, one behind the other.

    They are one image's: all images of a step have one label.
    """

    def __init__(self, network: FusedNetwork) -> None:
        biases = [conv.image_bias for conv in network.convolutions() if conv.image_bias is not None]
        self._biases = list(dict.fromkeys(biases))
        sizes = [int(node.meta["val"][0].numel()) for node in self._biases]
        self._starts = {node: sum(sizes[:index]) for index, node in enumerate(self._biases)}
        self._row = torch.zeros(sum(sizes), dtype=torch.float32)

    def set(self, values: dict[fx.Node, torch.Tensor]) -> None:
        if self._biases:
            torch.cat([values[node].reshape(-1) for node in self._biases], out=self._row)

    def address(self, bias: fx.Node) -> int:
        return self._row.data_ptr() + 4 * self._starts[bias]


class ForwardPass:
    """The instructions that make a network's values, or those of its linear part at given slopes.

    Args:
        network: The parts.
        instructions: Where the calls are added.
        regions: Runs what is PyTorch's.
        slopes: Where ReLUs leave their bits (or take them from).
        labels: Where image biases lie.

    Attributes:
        views: Where every value lies.
        affines: Where the statistics of a convolution's group norm lie.
        statistics: Where those of an attention's softmax lie.
    """

    def __init__(
        self, network: FusedNetwork, instructions: Instructions, regions: Regions, slopes: Slopes, labels: LabelRow
    ) -> None:
        self.network, self.instructions, self.regions = network, instructions, regions
        self.slopes, self.labels = slopes, labels
        self.linear, self.differentiable = regions.linear is not None, regions.differentiable
        self.views: dict[fx.Node, View] = {}
        self.affines: dict[Convolution, View] = {}
        self.statistics: dict[Attention, View] = {}
        self._place_concatenations()
        self.image = self.view(network.image)
        for part in network.parts:
            self._part(part)
        self.output = self.view(network.output)

    def view(self, node: fx.Node) -> View:
        """Where a value lies."""
        if node not in self.views:
            self.views[node] = self.instructions.new(self.network.shapes[node])
        return self.views[node]

    def _place_concatenations(self) -> None:
        """Parts of a concatenation lie in it, where each has no other place yet."""
        for part in self.network.parts:
            if isinstance(part, Concatenation):
                whole, start = self.view(part.y), 0
                for node in part.inputs:
                    channels = self.network.shapes[node][0]
                    if node not in self.views and node is not self.network.image:
                        self.views[node] = whole.channels(start, channels)
                    start += channels

    def _part(self, part: Part) -> None:
        if isinstance(part, Convolution):
            self._convolution(part)
        elif isinstance(part, Attention):
            assert not self.linear, "a softmax is not piecewise linear"
            self.statistics[part] = self.instructions.attention(part, self.heads(part), self.view(part.y))
        elif isinstance(part, Region):
            self._region(part)
        else:
            self._concatenation(part)

    def heads(self, part: Attention) -> dict[Heads, View]:
        """Where what an attention reads lies."""
        return {heads: self.view(heads.node) for heads in (part.q, part.k, part.v)}

    def _concatenation(self, part: Concatenation) -> None:
        whole, start = self.view(part.y), 0
        for node in part.inputs:
            view = self.view(node)
            if view.storage is not whole.storage or view.start != start:
                self.instructions.sum(view, 1.0, None, 0.0, whole.channels(start, view.shape[0]))
            start += view.shape[0]

    def _convolution(self, conv: Convolution) -> None:
        x = self.view(conv.x)
        y = self.view(conv.y) if conv.keeps_y else None
        z = self.view(conv.z) if conv.z is not None else None
        residual = self.view(conv.residual) if conv.residual is not None else None
        affine = None
        if conv.norm is not None:
            assert not self.linear, "a normalisation by the image's own statistics is not piecewise linear"
            affine = self.affines[conv] = self.instructions.affine(x)
            self.instructions.group_norm(conv.norm, x, affine)

        def fields(structure: Any, memory: Memory) -> None:
            pointer = self.instructions.pointer
            if y is not None:
                structure.y, structure.y_pixel = memory.address(y), y.pixel
            if z is not None:
                structure.z, structure.z_pixel, structure.z_activation = memory.address(z), z.pixel, operations.RELU
                structure.z_multiply = pointer(conv.z_multiply)
                if self.linear:
                    structure.z_slopes = self.slopes.address(conv)
                else:
                    structure.z_add = pointer(conv.z_add)
                    structure.z_mask = self.slopes.address(conv) if self.differentiable else None
            if not self.linear:
                structure.bias = pointer(conv.bias)
                if conv.image_bias is not None:
                    structure.image_bias = self.labels.address(conv.image_bias)
            add_residual(structure, memory, None if residual is None else (residual, 1.0))
            structure.scale = conv.scale
            if affine is not None and conv.norm is not None:
                addresses = self.instructions.affine_addresses(affine, memory)
                structure.subtract, structure.multiply = addresses["subtract"], addresses["multiply"]
                structure.add, structure.affine_image = addresses["add"], x.shape[0]
                structure.activation = operations.SILU if conv.norm.activation == "silu" else operations.IDENTITY

        shape = y.shape if y is not None else z.shape  # type: ignore[union-attr]
        reads, writes = [x, residual, affine], [y, z]
        self.instructions.convolution(conv, x, shape, transposed=False, fields=fields, reads=reads, writes=writes)

    def _region(self, region: Region) -> None:
        inputs, outputs = [self.view(node) for node in region.inputs], [self.view(node) for node in region.outputs]

        def make(memory: Memory) -> Callable[[], None]:
            sources, targets = memory.tensors(inputs), memory.tensors(outputs)
            calls = self.regions.calls(region)
            return lambda: self.regions.run(region, calls, sources(), targets())

        self.instructions.emit(make, inputs, outputs)


class BackwardPass:
    """The instructions of the transpose at the values that a forward pass left.

    Args:
        forward: The forward pass, whose instructions are written already.

    Attributes:
        seed: Where the output's cotangent goes.
        result: Where the image's cotangent lies and the factor that it lacks; None where the network is constant.
    """

    def __init__(self, forward: ForwardPass) -> None:
        self.forward, self.network, self.instructions = forward, forward.network, forward.instructions
        self._producers = {conv.z: conv for conv in self.network.convolutions() if conv.z is not None}
        self._readers = self._count_readers()
        self._cotangents: dict[fx.Node, Scaled] = {}
        self.seed = self.instructions.new(self.network.shapes[self.network.output])
        self._cotangents[self.network.output] = (self.seed, 1.0)
        for part in reversed(self.network.parts):
            self._part(part)
        self.result = self._cotangents.get(self.network.image)

    def _count_readers(self) -> dict[fx.Node, int]:
        count: dict[fx.Node, int] = {self.network.output: 1}
        for part in self.network.parts:
            for node in part.inputs:
                count[node] = count.get(node, 0) + 1
        return count

    def _add(self, node: fx.Node, view: View, factor: float) -> None:
        """One more reader's cotangent."""
        before = self._cotangents.get(node)
        if before is None:
            self._cotangents[node] = (view, factor)
            return
        total = self.instructions.new(view.shape)
        self.instructions.sum(before[0], before[1], view, factor, total)
        self._cotangents[node] = (total, 1.0)

    def _part(self, part: Part) -> None:
        if isinstance(part, Convolution):
            self._convolution(part)
        elif isinstance(part, Region):
            self._region(part)
        elif isinstance(part, Attention):
            self._attention(part)
        elif part.y in self._cotangents:
            (view, factor), start = self._cotangents[part.y], 0
            for node in part.inputs:
                channels = self.network.shapes[node][0]
                self._add(node, view.channels(start, channels), factor)
                start += channels

    def _region(self, region: Region) -> None:
        cotangents = [self._cotangents.get(node) for node in region.outputs]
        known = [pair[0] for pair in cotangents if pair is not None]
        if not known:
            return
        inputs = [self.forward.view(node) for node in region.inputs]
        results = [self.instructions.new(view.shape) for view in inputs]

        def make(memory: Memory) -> Callable[[], None]:
            seeds = [None if pair is None else (memory.tensor(pair[0]), pair[1]) for pair in cotangents]
            targets = list(map(memory.tensor, results))
            return lambda: self.forward.regions.transpose(region, seeds, targets)

        self.instructions.emit(make, [*inputs, *known], results)
        for node, result in zip(region.inputs, results, strict=True):
            self._add(node, result, 1.0)

    def _attention(self, part: Attention) -> None:
        if part.y not in self._cotangents:
            return
        reads, results = self.forward.heads(part), {}
        for node in part.inputs:
            readers = [heads for heads in reads if heads.node is node]
            channels = [channel for heads in readers for channel in heads.channels()]
            apart = len(channels) > len(set(channels))  # each reads all of it
            shared = self.instructions.new(reads[readers[0]].shape)
            for index, heads in enumerate(readers):
                results[heads] = self.instructions.new(shared.shape) if apart and index else shared
        self.instructions.attention_vjp(part, reads, self.forward.statistics[part], self._cotangents[part.y], results)
        for heads, view in {id(view): (heads, view) for heads, view in results.items()}.values():
            self._add(heads.node, view, 1.0)

    def _convolution(self, conv: Convolution) -> None:
        if conv.z is not None and conv.z in self._cotangents:
            view, factor = self._cotangents[conv.z]
            mask, before = self.forward.slopes.address(conv), self._cotangents.get(conv.y)
            self._cotangents[conv.y] = (self.instructions.masked(view, factor, conv.z_multiply, mask, before), 1.0)
        if conv.y not in self._cotangents:
            return
        dy, factor = self._cotangents[conv.y]
        factor *= conv.scale
        if conv.residual is not None:
            self._add(conv.residual, dy, factor)
        x = self.forward.view(conv.x)
        if conv.norm is not None:
            dh = self._transposed(conv, dy, factor, x.shape, None, None)
            affine, before = self.forward.affines[conv], self._cotangents.get(conv.x)
            self._cotangents[conv.x] = (self.instructions.group_norm_vjp(conv.norm, x, affine, dh, before), 1.0)
            return
        producer = self._producers.get(conv.x)
        if producer is not None and self._readers[conv.x] == 1:
            # This convolution alone reads a ReLU: its transpose goes through the ReLU in the same pass.
            before = self._cotangents.get(producer.y)
            self._cotangents[producer.y] = (self._transposed(conv, dy, factor, x.shape, producer, before), 1.0)
        else:
            before = self._cotangents.get(conv.x)
            self._cotangents[conv.x] = (self._transposed(conv, dy, factor, x.shape, None, before), 1.0)

    def _transposed(
        self,
        conv: Convolution,
        dy: View,
        factor: float,
        shape: tuple[int, ...],
        producer: Convolution | None,
        before: Scaled | None,
    ) -> View:
        """The transpose of a convolution, and of the ReLU of `producer` where there is one, plus `before`."""
        result = self.instructions.new(shape)

        def fields(structure: Any, memory: Memory) -> None:
            structure.y, structure.y_pixel, structure.scale = memory.address(result), result.pixel, factor
            if producer is not None:
                structure.mask = self.forward.slopes.address(producer)
                structure.mask_factor = self.instructions.pointer(producer.z_multiply)
            add_residual(structure, memory, before, divided_by=factor)

        reads = [dy, before[0] if before is not None else None]
        self.instructions.convolution(conv, dy, shape, transposed=True, fields=fields, reads=reads, writes=[result])
        return result
