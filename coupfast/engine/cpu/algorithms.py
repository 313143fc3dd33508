"""Which algorithm a convolution takes, and the packed weights that it reads.

The choice follows from the shape, the batch and the width of the machine's vectors: nothing is timed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from coupfast.engine.cpu.parts import Convolution
from coupfast_kernels.convolution import cpu as kernels

#: Packed weights of an algorithm as a multiple of the weights of a 3x3 convolution.
PACKED = {kernels.DIRECT: 1.0, kernels.F2: 16 / 9, kernels.F4: 4.0}


@dataclasses.dataclass(frozen=True)
class _Effort:
    """What Winograd's algorithm costs in multiplications of a vector by a number: of the product, each; of a vector that the
    transforms of the input and of the output make or read."""

    product: float
    input: float
    output: float


# Fitted to the times of all algorithms on all shapes of the package's networks, at batch 1 to 20 on two instruction sets, as
# `bench/fit_algorithms.py` finds both (bench/results/algorithms-epyc-zen4.jsonl). Choosing by these numbers loses 0.7 % of the
# time that the best choice for every shape takes.
_EFFORT = {kernels.F2: _Effort(1.27, 0.55, 2.6), kernels.F4: _Effort(1.44, 8.1, 2.05)}
_FEW = 6.2  # adding up the parts of a sum to one of few outputs
_BYTE, _RESIDENT = 0.163, 1.8e6  # a byte of packed weights beyond those that a core's cache holds
_LEAST_ROWS = 4  # of a matrix product: fewer take as long
# From so many on, the error of F(4x4) is within four times that of PyTorch's float32 (tests/test_cpu_convolution.py).
_LEAST_CHANNELS = 16


def work(size: int, channels: int, out_channels: int, height: int, width: int, batch: int, lanes: int) -> float:
    """What a 3x3 convolution of stride 1 costs, in multiplications of a vector of `lanes` numbers by one number.

    Args:
        size: Tile of the algorithm.
        height, width: Of the result.
    """
    ins, outs = -(-channels // lanes), -(-out_channels // lanes)
    if size == kernels.DIRECT:
        if out_channels <= kernels.FEW_OUTPUTS and channels >= lanes:
            pixel = out_channels * (9 * channels / lanes + _FEW)
        else:
            pixel = 9.0 * channels * outs
        return max(_LEAST_ROWS, batch * height * width) * pixel + _reading(4 * 9 * channels * out_channels)
    products, effort = (size + 2) ** 2, _EFFORT[size]
    tiles = batch * -(-height // size) * -(-width // size)
    product = effort.product * ins * lanes * outs * max(_LEAST_ROWS, tiles)
    transforms = (effort.input * ins + effort.output * outs) * tiles
    return products * (product + transforms) + _reading(4 * products * ins * lanes * outs * lanes)


def _reading(packed_bytes: int) -> float:
    return _BYTE * max(0.0, packed_bytes - _RESIDENT)


def tile(
    conv: Convolution, shape: tuple[int, ...], batch: int, transposed: bool, allowed: tuple[int, ...] = kernels.TILES
) -> int:
    """The algorithm of one convolution whose output has (channels, height, width) = `shape`: the one with the least `work`.

    Nothing is timed: the choice, and with it every bit of the result, is the same in every run with the same algorithms
    `allowed` on the same instruction set.
    """
    if conv.weight.shape[2:] != (3, 3) or conv.stride != 1 or conv.padding != 1:
        return kernels.DIRECT
    out_channels, height, width = shape
    channels = conv.weight.shape[0 if transposed else 1]
    if channels < _LEAST_CHANNELS:
        allowed = tuple(size for size in allowed if size != kernels.F4)
    lanes = kernels.lanes()
    return min(allowed, key=lambda size: work(size, channels, out_channels, height, width, batch, lanes))


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
