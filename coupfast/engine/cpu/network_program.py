"""A fused network bound to a batch size and to memory: lists of kernel calls, forwards and backwards, without allocation."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import fx

from coupfast.engine.cpu.algorithms import PackedKey, WeightStore
from coupfast.engine.cpu.instructions import Instructions
from coupfast.engine.cpu.parts import FusedNetwork
from coupfast.engine.cpu.passes import BackwardPass, ForwardPass, LabelRow, Slopes
from coupfast.engine.cpu.placement import Memory, View, Workspace, allocate, keep, pages
from coupfast.engine.cpu.regions import Graphs, Regions
from coupfast.guidance import PiecewiseLinearGraph, Slope


@dataclasses.dataclass(eq=False)
class Activations:
    """What one forward pass left for its transpose, in memory of its own: nothing that runs in between writes there.

    Attributes:
        program: Whose pass it was.
        memory: What kernels read.
        graphs: What PyTorch's operations read; used up by the transpose.
    """

    program: NetworkProgram
    memory: np.ndarray
    graphs: Graphs


class NetworkProgram:
    """A network at one batch size.

    Args:
        network: What to run.
        batch: Images.
        weights: Packed weights and the choice of algorithms, shared by the programs of a network.
        backward: Whether `backward` is to be possible.
        keeps: Whether a forward pass leaves `activations`, so that others may run before its transpose.
        linear: The piecewise-linear trace that `network` was fused from: the program then takes the network's linear part at
            given slopes instead of the network.
        threads: CPU threads.

    Attributes:
        arena_floats, scratch_floats: Memory that a workspace must have for it.
        kept_floats: Memory of `Activations`.
    """

    def __init__(
        self,
        network: FusedNetwork,
        batch: int,
        weights: WeightStore,
        *,
        backward: bool,
        keeps: bool = False,
        linear: PiecewiseLinearGraph | None = None,
        threads: int,
    ) -> None:
        assert backward or not keeps
        self.network, self.batch, self.weights, self.keeps = network, batch, weights, keeps
        self._slopes, self._label_row = Slopes(network, batch, kept=keeps), LabelRow(network)
        self._regions = Regions(network, batch, linear=linear, differentiable=backward)
        self._instructions = Instructions(batch, weights, threads)
        self._forward = ForwardPass(network, self._instructions, self._regions, self._slopes, self._label_row)
        self._forward_count = len(self._instructions)
        self._backward = BackwardPass(self._forward) if backward else None
        forwards, backwards = self._halves()
        self.kept_floats = 0
        if keeps:
            self.kept_floats = keep(self._instructions[forwards], self._instructions[backwards], self._slopes.kept_floats)
        self.arena_floats = allocate(self._instructions[:], self._outside())
        self.scratch_floats = self._instructions.scratch_floats
        self._bound: tuple[Workspace, int] | None = None

    def _halves(self) -> tuple[slice, slice]:
        return slice(0, self._forward_count), slice(self._forward_count, None)

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
        self._memory = memory = Memory(workspace.arena, workspace.scratch, self.batch)
        forwards, backwards = self._halves()
        self._forward_steps = self._instructions.bind(forwards, memory)
        self._backward_steps = self._instructions.bind(backwards, memory)
        self._ends = memory.tensors([self._forward.image, self._forward.output])
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
        self._memory.kept = pages(self.kept_floats) if self.keeps else None
        image, output = self._ends()
        image.copy_(x)
        self._regions.begin()
        self._forward_steps.run(self._kept_address())
        return output

    def activations(self) -> Activations:
        """What the last `forward` left for its transpose, which is the caller's from now on; of a program that `keeps`."""
        assert self._memory.kept is not None
        found = Activations(self, self._memory.kept, self._regions.graphs)
        self._memory.kept, self._regions.graphs = None, {}
        return found

    def backward(self, cotangent: torch.Tensor, activations: Activations | None = None) -> torch.Tensor:
        """The transpose, applied to `cotangent`; a tensor of the caller's own.

        Args:
            cotangent: Of the output.
            activations: At the images of which forward pass; None takes those of the last `forward`. They are used up.
        """
        if activations is not None:
            assert activations.program is self
            self._memory.kept, self._regions.graphs = activations.memory, activations.graphs
        self._seed.copy_(cotangent)
        self._backward_steps.run(self._kept_address())
        self._regions.end()
        self._memory.kept = None
        if self._result is None:  # the network is constant
            return torch.zeros((self.batch, *self.network.shapes[self.network.image]), dtype=torch.float32)
        result, factor = self._result
        return result.contiguous(memory_format=torch.contiguous_format) * factor

    def _kept_address(self) -> int:
        return 0 if self._memory.kept is None else self._memory.kept.ctypes.data

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
        """What PyTorch's operations between the kernels hold at once, beside what is in `activations`."""
        return self._regions.bytes(all_at_once=self._backward is not None and not self.keeps)

    def activations_bytes(self) -> int:
        """What `Activations` take."""
        return 4 * self.kept_floats + self._regions.graph_bytes(self._forward.view)

    def slopes_bytes(self) -> int:
        """What a forward pass finds of slopes: bits where a kernel takes a ReLU, and what PyTorch's operations leave."""
        return self.slopes.nbytes + self._regions.slopes_bytes()
