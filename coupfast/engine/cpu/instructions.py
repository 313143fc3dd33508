"""The kernel calls of a program, written down before addresses are known and bound to memory afterwards."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from coupfast.engine.cpu.algorithms import PackedKey, WeightStore
from coupfast.engine.cpu.parts import Attention, Convolution, GroupNorm, Heads
from coupfast.engine.cpu.placement import UNPLACED, Memory, Storage, View, new_view
from coupfast_kernels import operations
from coupfast_kernels.attention import cpu as attention_kernels
from coupfast_kernels.convolution import cpu as kernels

#: What an instruction becomes: a kernel's structure, or a function to call.
Step = ctypes.Structure | Callable[[], None]
#: A value and the factor that it still has to be multiplied with.
Scaled = tuple[View, float]


@dataclasses.dataclass
class Instruction:
    """`make` gives a kernel's structure or a function to call, when addresses are known."""

    make: Callable[[Memory], Step]
    reads: list[Storage]
    writes: list[Storage]


class BoundSteps:
    """Instructions bound to memory.

    Args:
        calls: Functions to call in order.
        structures: What the kernels among them read.
    """

    def __init__(self, calls: list[Callable[[], None]], structures: list[ctypes.Structure]) -> None:
        self._calls = calls
        self._kept = [
            (structure, name, address - UNPLACED)
            for structure in structures
            for name, kind, *_ in structure._fields_
            if kind is ctypes.c_void_p and (address := getattr(structure, name) or 0) >= UNPLACED
        ]

    def run(self, kept: int = 0) -> None:
        """All of them; what is kept lies from address `kept` on."""
        for structure, name, offset in self._kept:
            setattr(structure, name, kept + offset)
        for call in self._calls:
            call()


class Instructions:
    """A list of kernel calls for one batch size that grows by one a call.

    Args:
        batch: Images.
        weights: Packed weights and the choice of algorithms.
        threads: CPU threads.

    Attributes:
        scratch_floats: Scratch memory that the largest of them needs.
        packed: Packed weights that they read.
    """

    def __init__(self, batch: int, weights: WeightStore, threads: int) -> None:
        self.batch, self.weights, self.threads = batch, weights, threads
        self.scratch_floats = 0
        self.packed: dict[PackedKey, torch.Tensor] = {}
        self._list: list[Instruction] = []
        self._keep: list[torch.Tensor] = []  # memory behind pointers

    def __len__(self) -> int:
        return len(self._list)

    def __getitem__(self, which: slice) -> list[Instruction]:
        return self._list[which]

    def new(self, shape: Sequence[int]) -> View:
        """A value of this shape (without the batch) that lies in no other."""
        return new_view(shape, self.batch)

    def pointer(self, tensor: torch.Tensor | None) -> int | None:
        """Where a constant lies, which is kept from now on; None for none."""
        if tensor is None:
            return None
        tensor = tensor.contiguous()
        self._keep.append(tensor)
        return tensor.data_ptr()

    def emit(self, make: Callable[[Memory], Step], reads: Sequence[View | None], writes: Sequence[View | None]) -> None:
        self._list.append(Instruction(make, [v.storage for v in reads if v], [v.storage for v in writes if v]))

    def sum(self, a: View, factor_a: float, b: View | None, factor_b: float, y: View) -> None:
        """y = factor_a a + factor_b b."""
        channels, pixels = y.rows()

        def make(memory: Memory) -> ctypes.Structure:
            return operations.Sum(
                pixels=self.batch * pixels,
                channels=channels,
                a_pixel=a.pixel or channels,
                b_pixel=0 if b is None else b.pixel or channels,
                y_pixel=y.pixel or channels,
                factor_a=factor_a,
                factor_b=factor_b,
                a=memory.address(a),
                b=None if b is None else memory.address(b),
                y=memory.address(y),
            )

        self.emit(make, [a, b], [y])

    def convolution(
        self,
        conv: Convolution,
        x: View,
        shape: tuple[int, ...],
        *,
        transposed: bool,
        fields: Callable[[Any, Memory], None],
        reads: list[View | None],
        writes: list[View | None],
    ) -> None:
        """One convolution of `x`, or its transpose, with a result of `shape`; `fields` says what comes before and behind."""
        tile = self.weights.tiles(conv, shape, self.batch, transposed)
        packed = self.weights.packed(conv, tile, transposed)
        kernel = conv.weight.shape[2]
        pad = kernel - 1 - conv.padding if transposed else conv.padding
        shapes = (self.batch, *x.shape), (self.batch, *shape)
        stride, spread = (1, conv.stride) if transposed else (conv.stride, 1)
        structure = kernels.plain_conv(
            tile, *shapes, packed, kernel=kernel, stride=stride, pad=pad, spread=spread, threads=self.threads
        )
        structure.x_pixel = x.pixel
        self.packed[conv, tile, transposed] = packed
        self.scratch_floats = max(self.scratch_floats, kernels.scratch_floats(structure, self.threads))

        def make(memory: Memory) -> ctypes.Structure:
            structure.x, structure.scratch = memory.address(x), memory.scratch.ctypes.data
            fields(structure, memory)
            return structure

        self.emit(make, reads, writes)

    def affine(self, x: View) -> View:
        """A place for what `group_norm` finds: four numbers an image and channel."""
        return self.new((4, x.shape[0]))

    def affine_addresses(self, affine: View, memory: Memory) -> dict[str, int]:
        """Where subtrahend, factor, addend and inverse deviation lie."""
        start, size = memory.address(affine), 4 * self.batch * affine.shape[1]
        return {name: start + i * size for i, name in enumerate(("subtract", "multiply", "add", "inverse"))}

    def group_norm(self, norm: GroupNorm, x: View, affine: View) -> None:
        """The statistics of `x` as an affine map a channel."""
        channels, height, width = x.shape

        def make(memory: Memory) -> ctypes.Structure:
            return operations.GroupNormAffine(
                batch=self.batch,
                channels=channels,
                groups=norm.groups,
                pixels=height * width,
                x_pixel=x.pixel,
                eps=norm.eps,
                x=memory.address(x),
                gamma=self.pointer(norm.weight),
                beta=self.pointer(norm.bias),
                **self.affine_addresses(affine, memory),
            )

        self.emit(make, [x], [affine])

    def group_norm_vjp(self, norm: GroupNorm, x: View, affine: View, dh: View, before: Scaled | None) -> View:
        """The transpose of activation(GroupNorm(x)), applied to `dh`, plus `before`."""
        result = self.new(x.shape)
        channels, height, width = x.shape

        def make(memory: Memory) -> ctypes.Structure:
            structure = operations.GroupNormVjp(
                batch=self.batch,
                channels=channels,
                groups=norm.groups,
                activation=operations.SILU if norm.activation == "silu" else operations.IDENTITY,
                pixels=height * width,
                x_pixel=x.pixel,
                dh_pixel=dh.pixel,
                dx_pixel=result.pixel,
                x=memory.address(x),
                gamma=self.pointer(norm.weight),
                dh=memory.address(dh),
                dx=memory.address(result),
                **self.affine_addresses(affine, memory),
            )
            add_residual(structure, memory, before)
            return structure

        self.emit(make, [x, dh, affine, before[0] if before is not None else None], [result])
        return result

    def attention(self, part: Attention, reads: dict[Heads, View], y: View) -> View:
        """softmax(scale q kᵀ) v; returns where the largest score and the inverse sum of every query lie."""
        statistics = self.new((2 * part.q.count * pixels_of(y),))
        structure = self._attention(operations.Attention, part, pixels_of(y))

        def make(memory: Memory) -> ctypes.Structure:
            self._statistics(structure, statistics, memory)
            for name, heads in (("q", part.q), ("k", part.k), ("v", part.v)):
                set_heads(structure, name, reads[heads], heads.start, heads.step, memory)
            set_heads(structure, "y", y, 0, part.q.size, memory)
            return structure

        self.emit(make, list(reads.values()), [y, statistics])
        return statistics

    def attention_vjp(
        self, part: Attention, reads: dict[Heads, View], statistics: View, dy: Scaled, results: dict[Heads, View]
    ) -> None:
        """Its transpose applied to `dy`: cotangents of q, k and v into their channels of `results`."""
        structure = self._attention(operations.AttentionVjp, part, pixels_of(dy[0]))
        structure.dy_factor = dy[1]

        def make(memory: Memory) -> ctypes.Structure:
            self._statistics(structure, statistics, memory)
            for name, heads in (("q", part.q), ("k", part.k), ("v", part.v)):
                set_heads(structure, name, reads[heads], heads.start, heads.step, memory)
                set_heads(structure, f"d{name}", results[heads], heads.start, heads.step, memory)
            set_heads(structure, "dy", dy[0], 0, part.q.size, memory)
            return structure

        self.emit(make, [*reads.values(), statistics, dy[0]], list(results.values()))

    def _attention(self, kind: type[ctypes.Structure], part: Attention, pixels: int) -> Any:
        heads, size = part.q.count, part.q.size
        block = attention_kernels.block_pairs(self.batch, heads, pixels, self.threads)
        structure = kind(batch=self.batch, heads=heads, size=size, pixels=pixels, block=block, scale=part.scale)
        self.scratch_floats = max(self.scratch_floats, attention_kernels.scratch_floats(structure, self.threads))
        return structure

    def _statistics(self, structure: Any, statistics: View, memory: Memory) -> None:
        structure.largest = memory.address(statistics)
        structure.inverse = structure.largest + 2 * self.batch * statistics.shape[0]  # half of its floats
        structure.scratch = memory.scratch.ctypes.data

    def masked(self, dz: View, factor: float, multiply: torch.Tensor | None, mask_address: int, before: Scaled | None) -> View:
        """The transpose of relu(y · multiply + add) with respect to y, applied to `dz`, plus `before`."""
        result = self.new(dz.shape)
        if factor != 1.0:
            multiply = torch.full((dz.shape[0],), factor, dtype=torch.float32) if multiply is None else multiply * factor
        channels, pixels = result.rows()

        def make(memory: Memory) -> ctypes.Structure:
            structure = operations.Masked(
                pixels=self.batch * pixels,
                channels=channels,
                d_pixel=dz.pixel,
                y_pixel=result.pixel,
                d=memory.address(dz),
                mask=mask_address,
                multiply=self.pointer(multiply),
                y=memory.address(result),
            )
            add_residual(structure, memory, before)
            return structure

        self.emit(make, [dz, before[0] if before is not None else None], [result])
        return result

    def bind(self, which: slice, memory: Memory) -> BoundSteps:
        """Some of them as functions to call in order; kernels that follow each other are one call."""
        steps: list[Callable[[], None]] = []
        structures: list[ctypes.Structure] = []
        everything: list[ctypes.Structure] = []

        def flush() -> None:
            if structures:
                call, threads = operations.Operations(list(structures)), self.threads
                steps.append(lambda: call.run(threads))
                structures.clear()

        for instruction in self[which]:
            made = instruction.make(memory)
            if isinstance(made, ctypes.Structure):
                structures.append(made)
                everything.append(made)
            else:
                flush()
                steps.append(made)
        flush()
        return BoundSteps(steps, everything)


def add_residual(structure: Any, memory: Memory, residual: Scaled | None, divided_by: float = 1.0) -> None:
    """Let a kernel add a value to its result; the kernel multiplies the sum by `divided_by` afterwards."""
    if residual is not None:
        view, factor = residual
        structure.residual, structure.residual_pixel = memory.address(view), view.pixel
        structure.residual_factor = factor / divided_by


def pixels_of(view: View) -> int:
    """Of a map, or how many tokens there are."""
    return view.shape[1] * view.shape[2] if len(view.shape) == 3 else view.shape[0]


def set_heads(structure: Any, name: str, view: View, start: int, step: int, memory: Memory) -> None:
    """Where a kernel finds the heads of a map or of tokens, from channel `start` on."""
    setattr(structure, name, memory.address(view) + 4 * start)
    setattr(structure, f"{name}_pixel", view.pixel or view.shape[1])
    setattr(structure, f"{name}_head", step)
