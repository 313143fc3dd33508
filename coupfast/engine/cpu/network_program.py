"""A fused network bound to a batch size and to memory: lists of kernel calls, forwards and backwards, without allocation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from coupfast.engine.cpu.algorithms import PackedKey, WeightStore
from coupfast.engine.cpu.instructions import Instructions
from coupfast.engine.cpu.parts import FusedNetwork
from coupfast.engine.cpu.passes import BackwardPass, ForwardPass, LabelRow, Slopes
from coupfast.engine.cpu.placement import Memory, View, Workspace, allocate
from coupfast.engine.cpu.regions import Regions
from coupfast.guidance import PiecewiseLinearGraph, Slope


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

    Attributes:
        arena_floats, scratch_floats: Memory that a workspace must have for it.
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
        self.network, self.batch, self.weights = network, batch, weights
        self._slopes, self._label_row = Slopes(network, batch), LabelRow(network)
        self._regions = Regions(network, batch, linear=linear, differentiable=backward)
        self._instructions = Instructions(batch, weights, threads)
        self._forward = ForwardPass(network, self._instructions, self._regions, self._slopes, self._label_row)
        self._forward_count = len(self._instructions)
        self._backward = BackwardPass(self._forward) if backward else None
        self.arena_floats = allocate(self._instructions[:], self._outside())
        self.scratch_floats = self._instructions.scratch_floats
        self._bound: tuple[Workspace, int] | None = None

    def _outside(self) -> list[tuple[View, int, int]]:
        """What comes in and what goes out: inputs live from the start, the forward pass's output to its end."""
        start, end = self._forward_count, len(self._instructions)
        outside = [(self._forward.image, 0, 0), (self._forward.output, start - 1, start)]
        if self._backward is not None:
            outside.append((self._backward.seed, start, start))
            if self._backward.result is not None:
                outside.append((self._backward.result[0], end, end))
        return outside

    def bind(self, workspace: Workspace) -> None:
        """Fill in addresses, if they are not those of `workspace` as it lies now."""
        workspace.hold(self.arena_floats, self.scratch_floats)
        if self._bound == (workspace, workspace.moves):
            return
        self._bound = (workspace, workspace.moves)
        memory = Memory(workspace.arena, workspace.scratch, self.batch)
        self._forward_steps = self._instructions.bind(slice(0, self._forward_count), memory)
        self._backward_steps = self._instructions.bind(slice(self._forward_count, None), memory)
        self._image, self._output = memory.tensor(self._forward.image), memory.tensor(self._forward.output)
        if self._backward is not None:
            self._seed, result = memory.tensor(self._backward.seed), self._backward.result
            self._result = None if result is None else (memory.tensor(result[0]), result[1])

    # --- running --------------------------------------------------------------------------------------------------------

    def set_label(self, values: dict[fx.Node, torch.Tensor]) -> None:
        """What the labels alone decide, one image's worth: `FusedNetwork.at_label`."""
        self._regions.label_values = self.network.partition.for_images(values, self.batch)
        self._label_row.set(values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The network's output for images (batch, channels, height, width), in the arena: valid until something runs there."""
        self._image.copy_(x)
        self._regions.begin()
        _run(self._forward_steps)
        return self._output

    def backward(self, cotangent: torch.Tensor) -> torch.Tensor:
        """The transpose at the images of the last `forward`, applied to `cotangent`; a tensor of the caller's own."""
        self._seed.copy_(cotangent)
        _run(self._backward_steps)
        self._regions.end()
        if self._result is None:  # the network is constant
            return torch.zeros((self.batch, *self.network.shapes[self.network.image]), dtype=torch.float32)
        result, factor = self._result
        return result.contiguous(memory_format=torch.contiguous_format) * factor

    @property
    def slopes(self) -> torch.Tensor:
        """Bits of the ReLUs that kernels take, as the last `forward` left them or a linear part will read them."""
        return self._slopes.bits

    @property
    def region_slopes(self) -> list[Slope]:
        """Slopes of PyTorch's operations, as the last `forward` left them or a linear part will read them."""
        return self._regions.slopes

    @region_slopes.setter
    def region_slopes(self, slopes: list[Slope]) -> None:
        self._regions.slopes = slopes

    # --- memory -----------------------------------------------------------------------------------------------------------

    def packed_bytes(self) -> dict[PackedKey, int]:
        """Bytes of every packed weight that the program reads."""
        return {key: packed.nbytes for key, packed in self._instructions.packed.items()}

    def region_bytes(self) -> int:
        """What PyTorch's operations between the kernels hold at once."""
        return self._regions.bytes()

    def slopes_bytes(self) -> int:
        """What a forward pass finds of slopes: bits where a kernel takes a ReLU, and what PyTorch's operations leave."""
        return self.slopes.nbytes + self._regions.slopes_bytes()


def _run(steps: list[Callable[[], None]]) -> None:
    for step in steps:
        step()
