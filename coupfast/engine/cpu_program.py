"""A fused network bound to a batch size and to memory: lists of kernel calls, forwards and backwards, without allocation.

Every value has its place in one arena before anything runs; a place is used again as soon as its value has been read for the
last time. Maps are channels last, so that a concatenation's parts are written side by side and read where they lie.
"""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map, tree_unflatten

from coupfast.engine.fusion import Concatenation, Convolution, FusedNetwork, Region
from coupfast.guidance import PiecewiseLinearGraph, Slope
from coupfast.tracing import Operation, PerImage
from coupfast_kernels import convolution as kernels

aten = torch.ops.aten

_ALIGNMENT = 16  # floats: a cache line


@dataclasses.dataclass(eq=False)
class _Storage:
    """Floats of the arena, from the first instruction that writes them to the last that reads them."""

    floats: int
    offset: int = -1
    first: int = -1
    last: int = -1


@dataclasses.dataclass(frozen=True, eq=False)
class _View:
    """A value in a storage. Four axes: channels last, `pixel` floats from one pixel to the next; otherwise row-major."""

    storage: _Storage
    shape: tuple[int, ...]  # without the batch
    pixel: int
    start: int = 0

    def channels(self, start: int, count: int) -> _View:
        return _View(self.storage, (count, *self.shape[1:]), self.pixel, self.start + start)


@dataclasses.dataclass
class _Instruction:
    """`make` gives a kernel's structure or a function to call, when addresses are known."""

    make: Callable[[], ctypes.Structure | Callable[[], None]]
    reads: list[_Storage]
    writes: list[_Storage]


class Workspace:
    """Memory of programs that never run at the same time: the largest arena and the largest scratch of any of them.

    Attributes:
        moves: How often memory moved: programs bound before must be bound again.
    """

    def __init__(self) -> None:
        self.arena, self.scratch, self.moves = _memory(0), _memory(0), 0

    def hold(self, arena_floats: int, scratch_floats: int) -> None:
        """Make room."""
        self.moves += arena_floats > len(self.arena) or scratch_floats > len(self.scratch)
        if arena_floats > len(self.arena):
            self.arena = _memory(arena_floats)
        if scratch_floats > len(self.scratch):
            self.scratch = _memory(scratch_floats)

    def bytes(self) -> int:
        return self.arena.nbytes + self.scratch.nbytes


class WeightStore:
    """Packed weights of a network's convolutions, made once for all its programs.

    Attributes:
        tiles: (convolution, batch, transposed) → tile of its algorithm.
    """

    def __init__(self, tiles: Callable[[Convolution, tuple[int, ...], int, bool], int]) -> None:
        self.tiles = tiles
        self._packed: dict[tuple[Convolution, int, bool], torch.Tensor] = {}

    def packed(self, conv: Convolution, tile: int, transposed: bool) -> torch.Tensor:
        key = (conv, tile, transposed)
        if key not in self._packed:
            self._packed[key] = kernels.pack_weights(conv.weight, tile, transposed=transposed)
        return self._packed[key]


class NetworkProgram:
    """A network at one batch size.

    Args:
        network: What to run.
        batch: Images.
        weights: Packed weights and the choice of algorithms, shared by the programs of a network.
        backward: Whether `backward` is to be possible.
        linear: The piecewise-linear trace that `network` was fused from: the program then takes the network's linear part at
            given slopes instead of the network.
        threads: CPU threads.
    """

    def __init__(
        self,
        network: FusedNetwork,
        batch: int,
        weights: WeightStore,
        *,
        backward: bool,
        linear: PiecewiseLinearGraph | None = None,
        threads: int,
    ) -> None:
        self.network, self.batch, self.weights, self.linear, self.threads = network, batch, weights, linear, threads
        self.differentiable = backward
        self._bound: tuple[Workspace, int] | None = None
        self._views: dict[fx.Node, _View] = {}
        self._norms: dict[Convolution, _View] = {}
        self._instructions: list[_Instruction] = []
        self._contributions: dict[fx.Node, tuple[_View, float]] = {}
        self.scratch_floats = 0
        self._keep: list[Any] = []  # memory behind pointers
        self._packed: dict[tuple[Convolution, int, bool], torch.Tensor] = {}
        self._region_state: dict[Region, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        self.region_slopes: list[Slope] = []
        self._time_values: dict[fx.Node, torch.Tensor] = {}
        self._time_row = torch.zeros(sum(self._row_size(node) for node in self._image_biases()), dtype=torch.float32)
        self._producers = {conv.z: conv for conv in self._convolutions() if conv.z is not None}
        self._readers = self._count_readers()
        self._mask_offsets: dict[Convolution, int] = {}
        mask_bytes = 0
        for conv in self._convolutions():
            if conv.z is not None:
                channels, height, width = network.shapes[conv.z]
                self._mask_offsets[conv] = mask_bytes
                mask_bytes += batch * height * width * ((channels + 7) // 8)
        self.slopes = torch.zeros(mask_bytes + 8, dtype=torch.uint8)

        self._constants = dict(network.constants)
        with torch.no_grad():
            for operation in network.batch_operations:
                args, kwargs = operation.arguments(self._constants, batch)
                self._constants[operation.node] = operation.node.target(*args, **kwargs)  # type: ignore[operator]
        self._place_concatenations()
        self.image = self._view(network.image)
        for part in network.parts:
            self._forward(part)
        self.output = self._view(network.output)
        forward_count = len(self._instructions)
        if backward:
            self._seed = self._new(network.shapes[network.output])
            self._contributions[network.output] = (self._seed, 1.0)
            for part in reversed(network.parts):
                self._backward(part)
            self._result = self._contributions.get(network.image)
        self._forward_count = forward_count
        self._allocate(forward_count)

    def bind(self, workspace: Workspace) -> None:
        """Fill in addresses, if they are not those of `workspace` as it lies now."""
        workspace.hold(self.arena_floats, self.scratch_floats)
        if self._bound == (workspace, workspace.moves):
            return
        self._bound = (workspace, workspace.moves)
        self._arena, self._scratch = workspace.arena, workspace.scratch
        self._forward_steps = self._bind(self._instructions[: self._forward_count])
        self._backward_steps = self._bind(self._instructions[self._forward_count :])
        self._image_tensor, self._output_tensor = self._tensor(self.image), self._tensor(self.output)
        if self.differentiable:
            self._seed_tensor = self._tensor(self._seed)
            self._result_tensor = None if self._result is None else self._tensor(self._result[0])

    # --- running --------------------------------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The network's output for images (batch, channels, height, width), in the arena: valid until something runs there."""
        self._image_tensor.copy_(x)
        if self.linear is not None:
            self._remaining_slopes = iter(self.region_slopes)
        else:
            self.region_slopes = []
        for step in self._forward_steps:
            step()
        return self._output_tensor

    def backward(self, cotangent: torch.Tensor) -> torch.Tensor:
        """The transpose at the images of the last `forward`, applied to `cotangent`; a tensor of the caller's own."""
        self._seed_tensor.copy_(cotangent)
        for step in self._backward_steps:
            step()
        self._region_state.clear()
        if self._result is None or self._result_tensor is None:  # the network is constant
            return torch.zeros((self.batch, *self.network.shapes[self.network.image]), dtype=torch.float32)
        return self._result_tensor.contiguous(memory_format=torch.contiguous_format) * self._result[1]

    def set_time(self, values: dict[fx.Node, torch.Tensor]) -> None:
        """What the labels alone decide, one image's worth: `FusedNetwork.time_values`."""
        self._time_values = {
            node: value.expand(self.batch, *value.shape[1:]) if value.shape != node.meta["val"].shape else value
            for node, value in values.items()
        }
        rows = [values[node].reshape(-1) for node in self._image_biases()]
        if rows:
            torch.cat(rows, out=self._time_row)

    def packed_bytes(self) -> dict[tuple[Convolution, int, bool], int]:
        """Bytes of every packed weight that the program reads."""
        return {key: packed.nbytes for key, packed in self._packed.items()}

    def region_bytes(self) -> int:
        """What PyTorch's operations between the kernels hold at once: all results of the largest region, or of all of them
        where the backward pass needs them."""
        sizes = [
            sum(
                int(np.prod(self.network.shapes.get(node, (0,))))
                for operation in part.operations
                if _allocates(operation)
                for node in _results(operation.node)
            )
            for part in self.network.parts
            if isinstance(part, Region)
        ]
        return 4 * self.batch * (sum(sizes) if self.differentiable else max(sizes, default=0))

    def slopes_bytes(self) -> int:
        """What a forward pass finds of slopes: bits where a kernel takes a ReLU, and what PyTorch's operations leave."""
        regions = [part for part in self.network.parts if isinstance(part, Region)]
        nodes = [operation.node for region in regions for operation in region.operations]
        return self.slopes.nbytes + sum(PiecewiseLinearGraph.slope_bytes(node, self.batch) for node in nodes)

    # --- values -----------------------------------------------------------------------------------------------------------

    def _convolutions(self) -> list[Convolution]:
        return [part for part in self.network.parts if isinstance(part, Convolution)]

    def _image_biases(self) -> list[fx.Node]:
        biases = [conv.image_bias for conv in self._convolutions() if conv.image_bias is not None]
        return list(dict.fromkeys(biases))

    def _row_size(self, node: fx.Node) -> int:
        return int(node.meta["val"][0].numel())

    def _count_readers(self) -> dict[fx.Node, int]:
        count: dict[fx.Node, int] = {self.network.output: 1}
        for part in self.network.parts:
            for node in part.inputs:
                count[node] = count.get(node, 0) + 1
        return count

    def _new(self, shape: Sequence[int]) -> _View:
        floats = self.batch * int(np.prod(shape))
        return _View(_Storage(floats), tuple(shape), shape[0] if len(shape) == 3 else 0)

    def _view(self, node: fx.Node) -> _View:
        if node not in self._views:
            self._views[node] = self._new(self.network.shapes[node])
        return self._views[node]

    def _place_concatenations(self) -> None:
        """Parts of a concatenation lie in it, where each has no other place yet."""
        for part in self.network.parts:
            if isinstance(part, Concatenation):
                whole, start = self._view(part.y), 0
                for node in part.inputs:
                    channels = self.network.shapes[node][0]
                    if node not in self._views and node is not self.network.image:
                        self._views[node] = whole.channels(start, channels)
                    start += channels

    def _allocate(self, forward_count: int) -> None:
        """First fit in order of first use; inputs live from the start, the forward pass's output to its end."""
        for index, instruction in enumerate(self._instructions):
            for storage in (*instruction.reads, *instruction.writes):
                if storage.first < 0:
                    storage.first = index
                storage.last = index
        for view, first, last in self._outside(forward_count):
            view.storage.first = first if view.storage.first < 0 else min(view.storage.first, first)
            view.storage.last = max(view.storage.last, last)
        named = [s for i in self._instructions for s in (*i.reads, *i.writes)]
        named += [view.storage for view, _, _ in self._outside(forward_count)]
        storages = dict.fromkeys(named)  # in order: the same plan every time
        placed: list[_Storage] = []
        self.arena_floats = 0
        for storage in sorted(storages, key=lambda s: (s.first, -s.floats)):
            size = -(-storage.floats // _ALIGNMENT) * _ALIGNMENT
            alive = sorted((s for s in placed if s.last >= storage.first), key=lambda s: s.offset)
            offset = 0
            for other in alive:
                if offset + size <= other.offset:
                    break
                offset = max(offset, other.offset + -(-other.floats // _ALIGNMENT) * _ALIGNMENT)
            storage.offset = offset
            placed.append(storage)
            self.arena_floats = max(self.arena_floats, offset + size)

    def _outside(self, forward_count: int) -> list[tuple[_View, int, int]]:
        end = len(self._instructions)
        outside = [(self.image, 0, 0), (self.output, forward_count - 1, forward_count)]
        if self.differentiable:
            outside.append((self._seed, forward_count, forward_count))
            if self._result is not None:
                outside.append((self._result[0], end, end))
        return outside

    def _address(self, view: _View) -> int:
        return self._arena.ctypes.data + 4 * (view.storage.offset + view.start)

    def _tensor(self, view: _View) -> torch.Tensor:
        """The view as a tensor with a version of its own: autograd must not take other values' writes for this one's."""
        flat = torch.from_numpy(self._arena[view.storage.offset : view.storage.offset + view.storage.floats])
        if len(view.shape) != 3:
            return flat.view(self.batch, *view.shape)
        channels, height, width = view.shape
        strides = (height * width * view.pixel, 1, width * view.pixel, view.pixel)
        return flat.as_strided((self.batch, channels, height, width), strides, view.start)

    def _bind(self, instructions: list[_Instruction]) -> list[Callable[[], None]]:
        steps: list[Callable[[], None]] = []
        structures: list[ctypes.Structure] = []

        def flush() -> None:
            if structures:
                operations, threads = kernels.Operations(list(structures)), self.threads
                steps.append(lambda: operations.run(threads))
                structures.clear()

        for instruction in instructions:
            made = instruction.make()
            if isinstance(made, ctypes.Structure):
                structures.append(made)
            else:
                flush()
                steps.append(made)
        flush()
        return steps

    def _emit(
        self,
        make: Callable[[], ctypes.Structure | Callable[[], None]],
        reads: Sequence[_View | None],
        writes: Sequence[_View | None],
    ) -> None:
        self._instructions.append(
            _Instruction(make, [view.storage for view in reads if view], [view.storage for view in writes if view])
        )

    # --- forwards ---------------------------------------------------------------------------------------------------------

    def _forward(self, part: Convolution | Concatenation | Region) -> None:
        if isinstance(part, Convolution):
            self._forward_convolution(part)
        elif isinstance(part, Region):
            self._forward_region(part)
        else:
            whole, start = self._view(part.y), 0
            for node in part.inputs:
                view = self._view(node)
                if view.storage is not whole.storage or view.start != start:
                    self._emit_sum(view, 1.0, None, 0.0, whole.channels(start, view.shape[0]))
                start += view.shape[0]

    def _forward_convolution(self, conv: Convolution) -> None:
        x = self._view(conv.x)
        y = self._view(conv.y) if conv.keeps_y else None
        z = self._view(conv.z) if conv.z is not None else None
        residual = self._view(conv.residual) if conv.residual is not None else None
        shape = y.shape if y is not None else z.shape  # type: ignore[union-attr]
        affine = None
        if conv.norm is not None:
            assert self.linear is None, "a normalisation by the image's own statistics is not piecewise linear"
            affine = self._norms[conv] = self._new((4, x.shape[0]))
            self._emit_norm(conv, x, affine)
        linear = self.linear is not None
        mask = self._mask_offsets.get(conv)

        def set_fields(structure: Any) -> None:
            if y is not None:
                structure.y, structure.y_pixel = self._address(y), y.pixel
            if z is not None:
                structure.z, structure.z_pixel, structure.z_activation = self._address(z), z.pixel, kernels.RELU
                structure.z_multiply = self._pointer(conv.z_multiply)
                where = self.slopes.data_ptr() + mask  # type: ignore[operator]
                if linear:
                    structure.z_slopes = where
                else:
                    structure.z_add = self._pointer(conv.z_add)
                    structure.z_mask = where if self.differentiable else None
            if not linear:
                structure.bias = self._pointer(conv.bias)
                if conv.image_bias is not None:
                    structure.image_bias = self._time_row.data_ptr() + 4 * self._row_start(conv.image_bias)
            if residual is not None:
                structure.residual, structure.residual_pixel = self._address(residual), residual.pixel
                structure.residual_factor = 1.0
            structure.scale = conv.scale
            if affine is not None:
                size = 4 * self.batch * x.shape[0]
                structure.subtract = self._address(affine)
                structure.multiply, structure.add = structure.subtract + size, structure.subtract + 2 * size
                structure.affine_image = x.shape[0]
                structure.activation = kernels.SILU if conv.norm.activation == "silu" else kernels.IDENTITY  # type: ignore[union-attr]

        self._emit_conv(conv, x, shape, False, set_fields, [x, residual, affine], [y, z])

    def _row_start(self, bias: fx.Node) -> int:
        start = 0
        for node in self._image_biases():
            if node is bias:
                return start
            start += self._row_size(node)
        raise AssertionError("an image bias of this network")

    def _emit_conv(
        self,
        conv: Convolution,
        x: _View,
        shape: tuple[int, ...],
        transposed: bool,
        set_fields: Callable[[Any], None],
        reads: list[_View | None],
        writes: list[_View | None],
    ) -> None:
        tile = self.weights.tiles(conv, shape, self.batch, transposed)
        packed = self.weights.packed(conv, tile, transposed)
        kernel = conv.weight.shape[2]
        pad = kernel - 1 - conv.padding if transposed else conv.padding
        shapes = (self.batch, *x.shape), (self.batch, *shape)
        structure = kernels.plain_conv(tile, *shapes, packed, kernel=kernel, stride=conv.stride, pad=pad)
        structure.x_pixel = x.pixel
        self._packed[conv, tile, transposed] = packed
        self.scratch_floats = max(self.scratch_floats, kernels.scratch_floats(structure, self.threads))

        def make() -> ctypes.Structure:
            structure.x, structure.scratch = self._address(x), self._scratch.ctypes.data
            set_fields(structure)
            return structure

        self._emit(make, reads, writes)

    def _emit_norm(self, conv: Convolution, x: _View, affine: _View) -> None:
        norm = conv.norm
        assert norm is not None
        channels, height, width = x.shape
        size = 4 * self.batch * channels

        def make() -> ctypes.Structure:
            at = self._address(affine)
            return kernels.GroupNormAffine(
                batch=self.batch,
                channels=channels,
                groups=norm.groups,
                pixels=height * width,
                x_pixel=x.pixel,
                eps=norm.eps,
                x=self._address(x),
                gamma=self._pointer(norm.weight),
                beta=self._pointer(norm.bias),
                subtract=at,
                multiply=at + size,
                add=at + 2 * size,
                inverse=at + 3 * size,
            )

        self._emit(make, [x], [affine])

    def _emit_sum(self, a: _View, factor_a: float, b: _View | None, factor_b: float, y: _View) -> None:
        channels, pixels = _rows(y)

        def make() -> ctypes.Structure:
            return kernels.Sum(
                pixels=self.batch * pixels,
                channels=channels,
                a_pixel=a.pixel or channels,
                b_pixel=0 if b is None else b.pixel or channels,
                y_pixel=y.pixel or channels,
                factor_a=factor_a,
                factor_b=factor_b,
                a=self._address(a),
                b=None if b is None else self._address(b),
                y=self._address(y),
            )

        self._emit(make, [a, b], [y])

    def _pointer(self, tensor: torch.Tensor | None) -> int | None:
        if tensor is None:
            return None
        tensor = tensor.contiguous()
        self._keep.append(tensor)
        return tensor.data_ptr()

    def _forward_region(self, region: Region) -> None:
        inputs, outputs = [self._view(node) for node in region.inputs], [self._view(node) for node in region.outputs]

        def make() -> Callable[[], None]:
            bound = list(map(self._tensor, inputs))
            targets = list(map(self._tensor, outputs))
            calls = self._calls(region)

            def run() -> None:
                with torch.set_grad_enabled(self.differentiable):
                    leaves = [tensor.detach().requires_grad_(self.differentiable) for tensor in bound]
                    # Many of PyTorch's operations refuse, or copy one by one, a map that lies inside a wider one.
                    values: dict[fx.Node, Any] = dict(zip(region.inputs, map(_dense, leaves), strict=True))
                    values.update(self._time_values)
                    self._run_region(calls, values)
                    results = [values[node] for node in region.outputs]
                with torch.no_grad():
                    for target, result in zip(targets, results, strict=True):
                        target.copy_(result)
                if self.differentiable:
                    self._region_state[region] = (leaves, results)

            return run

        self._emit(make, inputs, outputs)

    def _run_region(self, calls: list[_Call], values: dict[fx.Node, Any]) -> None:
        """Take the operations in order and leave their results in `values`."""
        for call in calls:
            arguments, keywords = call.arguments(values)
            if self.linear is not None and not call.reshapes:
                value = self.linear.tangent(call.node, arguments, keywords, self._remaining_slopes)
            else:
                value = call.target(*arguments, **keywords)
                if self.differentiable and self.linear is None:
                    slope = PiecewiseLinearGraph.slope(call.node, arguments, value)
                    if slope is not None:
                        self.region_slopes.append(slope)
            values[call.node] = value

    def _calls(self, region: Region) -> list[_Call]:
        """The region's operations for this batch size, their constant arguments filled in."""
        calls = []
        for operation in region.operations:
            node: Any = operation.node
            leaves = [self._constants.get(leaf, leaf) if isinstance(leaf, fx.Node) else leaf for leaf in operation.leaves]
            leaves = [leaf * self.batch if isinstance(leaf, PerImage) else leaf for leaf in leaves]
            args, kwargs = tree_unflatten(leaves, operation.spec)
            reshapes = node.target in _RESHAPES
            # Maps are channels last here, which a view of the traced network's memory cannot always be.
            target = aten.reshape.default if reshapes else node.target
            calls.append(_Call(node, target, reshapes, args, kwargs))
        return calls

    # --- backwards --------------------------------------------------------------------------------------------------------

    def _add(self, node: fx.Node, view: _View, factor: float) -> None:
        before = self._contributions.get(node)
        if before is None:
            self._contributions[node] = (view, factor)
            return
        total = self._new(view.shape)
        self._emit_sum(before[0], before[1], view, factor, total)
        self._contributions[node] = (total, 1.0)

    def _backward(self, part: Convolution | Concatenation | Region) -> None:
        if isinstance(part, Convolution):
            self._backward_convolution(part)
        elif isinstance(part, Region):
            self._backward_region(part)
        elif part.y in self._contributions:
            (view, factor), start = self._contributions[part.y], 0
            for node in part.inputs:
                channels = self.network.shapes[node][0]
                self._add(node, view.channels(start, channels), factor)
                start += channels

    def _backward_region(self, region: Region) -> None:
        known = [node in self._contributions for node in region.outputs]
        if not any(known):
            return
        cotangents = [self._contributions[node] for node in region.outputs if node in self._contributions]
        inputs = [self._view(node) for node in region.inputs]
        results = [self._new(view.shape) for view in inputs]

        def make() -> Callable[[], None]:
            seeds = [(self._tensor(view), factor) for view, factor in cotangents]
            targets = list(map(self._tensor, results))

            def run() -> None:
                leaves, outputs = self._region_state.pop(region)
                reached = [output for output, is_known in zip(outputs, known, strict=True) if is_known]
                pairs = [
                    (output, seed if factor == 1.0 else seed * factor)
                    for output, (seed, factor) in zip(reached, seeds, strict=True)
                    if output.requires_grad
                ]
                gradients: Sequence[torch.Tensor | None] = [None] * len(leaves)
                if pairs:
                    ends, cotangent = zip(*pairs, strict=True)
                    gradients = torch.autograd.grad(ends, leaves, cotangent, allow_unused=True)
                for target, gradient in zip(targets, gradients, strict=True):
                    target.zero_() if gradient is None else target.copy_(gradient)

            return run

        self._emit(make, [*inputs, *(view for view, _ in cotangents)], results)
        for node, result in zip(region.inputs, results, strict=True):
            self._add(node, result, 1.0)

    def _backward_convolution(self, conv: Convolution) -> None:
        if conv.z is not None and conv.z in self._contributions:
            view, factor = self._contributions[conv.z]
            self._masked(conv, view, factor)
        if conv.y not in self._contributions:
            return
        dy, factor = self._contributions[conv.y]
        factor *= conv.scale
        if conv.residual is not None:
            self._add(conv.residual, dy, factor)
        x = self._view(conv.x)
        if conv.norm is not None:
            dh = self._transposed(conv, dy, factor, x.shape, None, None)
            self._norm_vjp(conv, x, dh)
            return
        producer = self._producers.get(conv.x)
        if producer is not None and self._readers[conv.x] == 1 and conv.stride == 1:
            # This convolution alone reads a ReLU: its transpose goes through the ReLU in the same pass.
            before = self._contributions.get(producer.y)
            self._contributions[producer.y] = (self._transposed(conv, dy, factor, x.shape, producer, before), 1.0)
        elif conv.stride == 1:
            before = self._contributions.get(conv.x)
            self._contributions[conv.x] = (self._transposed(conv, dy, factor, x.shape, None, before), 1.0)
        else:
            self._add(conv.x, self._library_transposed(conv, dy, x.shape), factor)

    def _transposed(
        self,
        conv: Convolution,
        dy: _View,
        factor: float,
        shape: tuple[int, ...],
        producer: Convolution | None,
        residual: tuple[_View, float] | None,
    ) -> _View:
        result = self._new(shape)

        def set_fields(structure: Any) -> None:
            structure.y, structure.y_pixel, structure.scale = self._address(result), result.pixel, factor
            if producer is not None:
                structure.mask = self.slopes.data_ptr() + self._mask_offsets[producer]
                structure.mask_factor = self._pointer(producer.z_multiply)
            if residual is not None:
                view, residual_factor = residual
                structure.residual, structure.residual_pixel = self._address(view), view.pixel
                structure.residual_factor = residual_factor / factor

        reads = [dy, residual[0] if residual is not None else None]
        self._emit_conv(conv, dy, shape, True, set_fields, reads, [result])
        return result

    def _library_transposed(self, conv: Convolution, dy: _View, shape: tuple[int, ...]) -> _View:
        """Strided convolutions: PyTorch's own."""
        result = self._new(shape)
        weight = conv.weight.contiguous(memory_format=torch.channels_last)

        def make() -> Callable[[], None]:
            source, target = self._tensor(dy), self._tensor(result)

            def run() -> None:
                stride, padding = [conv.stride] * 2, [conv.padding] * 2
                options = (None, stride, padding, [1, 1], False, [0, 0], 1, [True, False, False])
                target.copy_(aten.convolution_backward(_dense(source), target, weight, *options)[0])

            return run

        self._emit(make, [dy], [result])
        return result

    def _norm_vjp(self, conv: Convolution, x: _View, dh: _View) -> None:
        norm, affine = conv.norm, self._norms[conv]
        assert norm is not None
        before = self._contributions.get(conv.x)
        result = self._new(x.shape)
        channels, height, width = x.shape
        size = 4 * self.batch * channels

        def make() -> ctypes.Structure:
            at = self._address(affine)
            structure = kernels.GroupNormVjp(
                batch=self.batch,
                channels=channels,
                groups=norm.groups,
                activation=kernels.SILU if norm.activation == "silu" else kernels.IDENTITY,
                pixels=height * width,
                x_pixel=x.pixel,
                dh_pixel=dh.pixel,
                dx_pixel=result.pixel,
                x=self._address(x),
                gamma=self._pointer(norm.weight),
                subtract=at,
                multiply=at + size,
                add=at + 2 * size,
                inverse=at + 3 * size,
                dh=self._address(dh),
                dx=self._address(result),
            )
            if before is not None:
                structure.residual, structure.residual_pixel = self._address(before[0]), before[0].pixel
                structure.residual_factor = before[1]
            return structure

        self._emit(make, [x, dh, affine, before[0] if before is not None else None], [result])
        self._contributions[conv.x] = (result, 1.0)

    def _masked(self, conv: Convolution, dz: _View, factor: float) -> None:
        """Through z's ReLU and affine map to y."""
        before = self._contributions.get(conv.y)
        result = self._new(dz.shape)
        multiply = conv.z_multiply
        if factor != 1.0:
            multiply = torch.full((dz.shape[0],), factor, dtype=torch.float32) if multiply is None else multiply * factor
        channels, pixels = _rows(result)

        def make() -> ctypes.Structure:
            structure = kernels.Masked(
                pixels=self.batch * pixels,
                channels=channels,
                d_pixel=dz.pixel,
                y_pixel=result.pixel,
                d=self._address(dz),
                mask=self.slopes.data_ptr() + self._mask_offsets[conv],
                multiply=self._pointer(multiply),
                y=self._address(result),
            )
            if before is not None:
                structure.residual, structure.residual_pixel = self._address(before[0]), before[0].pixel
                structure.residual_factor = before[1]
            return structure

        self._emit(make, [dz, before[0] if before is not None else None], [result])
        self._contributions[conv.y] = (result, 1.0)


_RESHAPES = {aten.view.default, aten._unsafe_view.default}


def _allocates(operation: Operation) -> bool:
    schema = getattr(operation.node.target, "_schema", None)
    return schema is not None and not any(argument.alias_info for argument in schema.arguments)


def _results(node: fx.Node) -> list[fx.Node]:
    """The nodes that stand for an operation's results: its own, or where it has several those that pick one."""
    return [node] if "val" in node.meta else list(node.users)


class _Call:
    """One operation of a region: its arguments, with nodes where values come in when it runs."""

    def __init__(self, node: fx.Node, target: Any, reshapes: bool, args: tuple, kwargs: dict) -> None:
        self.node, self.target, self.reshapes = node, target, reshapes
        self._args, self._kwargs = args, kwargs
        self._flat = not _has_nodes(kwargs) and not any(isinstance(a, (list, tuple)) and _has_nodes(a) for a in args)

    def arguments(self, values: dict[fx.Node, Any]) -> tuple[tuple, dict]:
        if self._flat:  # nearly always; looking into lists takes as long as a small operation
            return tuple([values[a] if type(a) is fx.Node else a for a in self._args]), self._kwargs
        return tree_map(lambda leaf: values[leaf] if type(leaf) is fx.Node else leaf, (self._args, self._kwargs))


def _has_nodes(argument: Any) -> bool:
    return any(isinstance(leaf, fx.Node) for leaf in tree_leaves(argument))


def _dense(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value


def _rows(view: _View) -> tuple[int, int]:
    """Floats that lie together, and how many such rows an image has."""
    if len(view.shape) == 3:
        return view.shape[0], view.shape[1] * view.shape[2]
    return int(np.prod(view.shape)), 1


def _memory(floats: int) -> np.ndarray:
    """Zeroed pages of the operating system, large ones where it has them."""
    size = max(4 * floats, mmap.PAGESIZE)
    pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype=np.float32, count=max(1, floats))
