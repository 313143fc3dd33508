"""The large operations that a network is cut into, before batch sizes and memory are known.

    Convolution   activation(GroupNorm(x)) → convolution → + bias + time embedding → + residual → · scale = y;
                  relu(y · multiply + add) = z, all in one pass over the data
    Attention     softmax(scale q kᵀ) v over the pixels, for every head
    Concatenation along the channels, which costs nothing where the parts are written into place
    Region        whatever else the network does, as PyTorch does it

Values are the nodes of the trace.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from coupfast.engine.partition import Partition
from coupfast.tracing import Operation


@dataclasses.dataclass(eq=False)
class GroupNorm:
    """GroupNorm with an activation ("identity" or "silu") behind it."""

    x: fx.Node
    groups: int
    weight: torch.Tensor
    bias: torch.Tensor
    eps: float
    activation: str


@dataclasses.dataclass(eq=False)
class Convolution:
    """One convolution and what it takes in.

    Attributes:
        x: What it reads; through `norm`, where there is one.
        y: Its value with image bias, residual and scale.
        z: relu(y · multiply + add), where the network uses it.
        keeps_y: Whether anything but z reads y.
        image_bias: A value of the time, added to every pixel.
    """

    x: fx.Node
    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: int
    padding: int
    y: fx.Node
    norm: GroupNorm | None = None
    image_bias: fx.Node | None = None
    residual: fx.Node | None = None
    scale: float = 1.0
    z: fx.Node | None = None
    z_multiply: torch.Tensor | None = None
    z_add: torch.Tensor | None = None
    keeps_y: bool = True

    @property
    def outputs(self) -> list[fx.Node]:
        return ([self.y] if self.keeps_y else []) + ([self.z] if self.z is not None else [])

    @property
    def inputs(self) -> list[fx.Node]:
        return [self.x] + ([self.residual] if self.residual is not None else [])


@dataclasses.dataclass(frozen=True, eq=False)
class Heads:
    """What an attention reads of a map, or of tokens (pixels, channels): `size` channels a head, the first from `start` on.

    Attributes:
        step: Channels from one head to the next.
    """

    node: fx.Node
    start: int
    step: int
    count: int
    size: int

    def channels(self) -> list[int]:
        return [self.start + head * self.step + channel for head in range(self.count) for channel in range(self.size)]


@dataclasses.dataclass(eq=False)
class Attention:
    """Self-attention over pixels; y is a map or tokens, its heads side by side."""

    q: Heads
    k: Heads
    v: Heads
    scale: float
    y: fx.Node

    @property
    def inputs(self) -> list[fx.Node]:
        return list(dict.fromkeys(heads.node for heads in (self.q, self.k, self.v)))

    @property
    def outputs(self) -> list[fx.Node]:
        return [self.y]


@dataclasses.dataclass(eq=False)
class Concatenation:
    """Maps side by side in one, by their channels."""

    y: fx.Node
    inputs: list[fx.Node]

    @property
    def outputs(self) -> list[fx.Node]:
        return [self.y]


@dataclasses.dataclass(eq=False)
class Region:
    """Operations as PyTorch runs them, in order."""

    operations: list[Operation]
    inputs: list[fx.Node]
    outputs: list[fx.Node]


Part = Convolution | Attention | Concatenation | Region


@dataclasses.dataclass
class FusedNetwork:
    """A network's parts in order.

    Attributes:
        partition: What depends on the images, on the labels, on neither.
        label_values: Values of the labels that `parts` read, in order.
        parts: What makes the values of the images.
        shapes: Of every value that an image reaches, without the batch.
    """

    partition: Partition
    label_values: list[fx.Node]
    parts: list[Part]
    shapes: dict[fx.Node, tuple[int, ...]]

    @property
    def image(self) -> fx.Node:
        """The placeholder of the images."""
        return self.partition.image

    @property
    def output(self) -> fx.Node:
        """The value that the network returns."""
        return self.partition.output

    def convolutions(self) -> list[Convolution]:
        return [part for part in self.parts if isinstance(part, Convolution)]

    def regions(self) -> list[Region]:
        return [part for part in self.parts if isinstance(part, Region)]

    def copied_bytes(self) -> int:
        """Copies of the network's own weights that PyTorch's operations read."""
        own = self.partition.traced.constants
        copies = (self.partition.constants[node] for node, value in own.items() if self.partition.constants[node] is not value)
        return sum(copy.nbytes for copy in copies)

    def at_label(self, label: torch.Tensor) -> dict[fx.Node, torch.Tensor]:
        """`label_values` at a label of shape (1,), for one image."""
        return self.partition.at_label(label, self.label_values)
