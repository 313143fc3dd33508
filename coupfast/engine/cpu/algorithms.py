"""Which algorithm a convolution takes, and the packed weights that it reads.

The choice follows from the shape and the batch: nothing is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from coupfast.engine.cpu.parts import Convolution
from coupfast_kernels.convolution import cpu as kernels

#: Packed weights of an algorithm as a multiple of the weights of a 3x3 convolution.
PACKED = {kernels.DIRECT: 1.0, kernels.F2: 16 / 9, kernels.F4: 4.0}

# Multiplications that one multiplication of a tile's products costs with its share of the transforms, and that a byte of
# weights costs at the usual ratio of a core's arithmetic to its memory (40 G multiplications and 10 GB a second).
_EFFORT = {kernels.DIRECT: 1.0, kernels.F2: 1.15, kernels.F4: 1.4}
_BYTE = 4.0
# A direct sum over few channels is short and rounds little: F(4x4), whose error hardly depends on the sum's length, would miss
# the bound of four times PyTorch's error there.
_LEAST_CHANNELS = 64


def tile(
    conv: Convolution, shape: tuple[int, ...], batch: int, transposed: bool, allowed: tuple[int, ...] = kernels.TILES
) -> int:
    """The algorithm of one convolution whose output has (channels, height, width) = `shape`: the one with the least work.

    Work is counted in multiplications, a byte of weights that has to come from memory as `_BYTE` of them. Nothing is timed:
    the choice, and with it every bit of the result, is the same in every run with the same algorithms `allowed`.
    """
    if conv.weight.shape[2:] != (3, 3) or conv.stride != 1 or conv.padding != 1:
        return kernels.DIRECT
    _, height, width = shape
    pairs = conv.weight.shape[0] * conv.weight.shape[1]
    if conv.weight.shape[0 if transposed else 1] < _LEAST_CHANNELS:
        allowed = tuple(size for size in allowed if size != kernels.F4)

    def work(size: int) -> float:
        tiles = batch * -(-height // size) * -(-width // size)
        products = 9 if size == 1 else (size + 2) ** 2
        return pairs * products * (tiles * _EFFORT[size] + 4 * _BYTE)

    return min(allowed, key=work)


def allowed_tiles(weights_bytes: int, available: int) -> tuple[int, ...]:
    """The algorithms whose packed weights, all together and in both directions, fit into half of the free memory.

    Args:
        weights_bytes: Of all convolutions.
        available: Bytes free.
    """
    allowed: tuple[int, ...] = kernels.TILES
    while len(allowed) > 1 and 2 * weights_bytes * sum(PACKED[t] for t in allowed) > available // 2:
        allowed = allowed[:-1]
    return allowed


#: A packed weight's name: its convolution, the tile of its algorithm, whether it is the transpose's.
PackedKey = tuple[Convolution, int, bool]


class WeightStore:
    """Packed weights of a network's convolutions, made once for all its programs.

    Attributes:
        tiles: (convolution, shape, batch, transposed) → tile of its algorithm.
    """

    def __init__(self, tiles: Callable[[Convolution, tuple[int, ...], int, bool], int]) -> None:
        self.tiles = tiles
        self._packed: dict[PackedKey, torch.Tensor] = {}

    def packed(self, conv: Convolution, tile: int, transposed: bool) -> torch.Tensor:
        key = (conv, tile, transposed)
        if key not in self._packed:
            stride = conv.stride if transposed else 1
            self._packed[key] = kernels.pack_weights(
                conv.weight, tile, transposed=transposed, stride=stride, padding=conv.padding
            )
        return self._packed[key]
