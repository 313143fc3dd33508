"""Convolutions in C++ on channels-last float32 maps: the direct sum, and Winograd's algorithms.

    direct:  y[n, i, j, o] = sum_{a, b, c} w[o, c, a, b] x[n, s i + a - p, s j + b - p, c]
    F(m x m, 3 x 3):  Y = Aᵀ [(G w Gᵀ) ⊙ (Bᵀ X B)] A  for every m x m tile Y of outputs, X its (m + 2) x (m + 2) inputs

Winograd's F(2 x 2) takes 2.25 times fewer multiplications than the direct sum, F(4 x 4) four times fewer; the definition is
`conv2d_ref`. Source: Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks", arXiv:1509.09308; the points at
which F(4 x 4) evaluates, 0, ±5/8, ±3/2 and infinity, were chosen for their rounding error (docs/how/kernels-cpu.md).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from coupfast_kernels.operations import Conv, Operations, compiled, structure

DIRECT, F2, F4 = 1, 2, 4  #: Outputs of a tile along each axis.
TILES = (DIRECT, F2, F4)
#: Direct convolutions to so few output channels take their sums in vectors of terms: a vector of outputs would be padding.
FEW_OUTPUTS = 4

_Pack = structure(
    "Pack",
    i32="tile out_channels channels kernel_height kernel_width flip pad spread",
    i64="out_stride in_stride",
    p="weights to",
)


def plain_conv(
    tile: int,
    x_shape: Sequence[int],
    y_shape: Sequence[int],
    packed: torch.Tensor,
    *,
    kernel: int,
    stride: int,
    pad: int,
    spread: int = 1,
    threads: int,
) -> Any:
    """A `Conv` with nothing around it: addresses of maps and scratch memory are the caller's to fill in.

    Args:
        tile: DIRECT, F2 or F4.
        x_shape, y_shape: (batch, channels, height, width) of the maps, whose pixels lie side by side.
        packed: Its weights, from `pack_weights`.
        kernel, stride, pad: Of both axes; `pad` zeros before the first row and column.
        spread: Of a transpose, the stride of what it transposes: `x` is taken with `spread` − 1 zeros between its pixels, and
            `stride` is 1.
        threads: How many will run it; decides who computes what, and no bit.
    """
    batch, channels, height, width = x_shape
    _, out_channels, out_height, out_width = y_shape
    conv = Conv(
        tile=tile,
        batch=batch,
        height=height,
        width=width,
        channels=channels,
        out_height=out_height,
        out_width=out_width,
        out_channels=out_channels,
        kernel_height=kernel,
        kernel_width=kernel,
        stride=stride,
        pad_top=pad,
        pad_left=pad,
        spread=spread,
        x_pixel=channels,
        y_pixel=out_channels,
        scale=1.0,
        weights=packed.data_ptr(),
    )
    conv.block_rows, conv.alone = schedule(conv, packed.nbytes, threads)
    return conv


# What a thread keeps to itself while it takes a block, weights aside: half of a small L2 cache.
_OWN_BYTES = 1 << 18
# Packed weights that threads may each read block by block; larger ones are read once, for all threads' pixels. Winograd's may
# be larger: its threads would otherwise read transformed input and products, which are more, from each other's caches.
_OWN_WEIGHTS_BYTES = 1 << 20
_OWN_WINOGRAD_BYTES = 5 << 19
_SHARED_BYTES = 1 << 21  # of input that all threads share
# A thread, at least: one that is held back leaves the others something to take. Of small maps two, lest blocks be too small.
_BLOCKS, _FEWEST_BLOCKS = 4, 2


def schedule(conv: Any, weights_bytes: int, threads: int) -> tuple[int, int]:
    """(`block_rows`, `alone`) of a `Conv`: whether each thread takes blocks by itself, and how many rows of tiles a block has.

    By itself it has its data in its own cache and meets the others once, at the end. That wants blocks enough for all of them,
    each with enough rows that the border which neighbouring blocks share is the smaller part.
    """
    rows, columns = conv.batch * -(-conv.out_height // conv.tile), -(-conv.out_width // conv.tile)

    def most(least: int) -> int:
        return rows if threads == 1 else max(rows // (_BLOCKS * threads), min(least, rows // (_FEWEST_BLOCKS * threads)))

    if conv.tile == DIRECT:
        row_bytes = 4 * conv.channels * conv.stride * (columns * conv.stride + conv.kernel_width)
        least = min(conv.out_height, max(-(-48 // columns), 1 if conv.kernel_width == 1 else 4))
        block = min(most(least), max(least, _OWN_BYTES // row_bytes))
        if threads == 1 or (weights_bytes <= _OWN_WEIGHTS_BYTES and block >= least):
            return max(1, block), 1
        return max(1, min(rows, _SHARED_BYTES // row_bytes)), 0
    # 32 channels of products, all channels of the transformed input.
    row_bytes = 4 * (conv.tile + 2) ** 2 * columns * (conv.channels + 32)
    least = -(-16 // columns)
    block = min(most(least), max(1, 2 * _OWN_BYTES // row_bytes))
    if weights_bytes <= _OWN_WINOGRAD_BYTES and block >= least and block * row_bytes <= 2 * _OWN_BYTES:
        return block, 1
    return max(1, min(rows, 64 // columns)), 0


def lanes() -> int:
    """Floats of a vector in the compiled kernels; packed output channels fill whole ones."""
    return int(compiled().coupfast_lanes())


def scratch_floats(conv: ctypes.Structure, threads: int) -> int:
    """Floats of scratch memory that `conv` needs, for its `block_rows`."""
    return compiled().coupfast_conv_scratch(ctypes.byref(conv), threads)


def pack_weights(
    weight: torch.Tensor, tile: int, *, transposed: bool = False, stride: int = 1, padding: int | None = None
) -> torch.Tensor:
    """Weights as `Conv` reads them: transformed in float64, rounded once.

    Args:
        weight: float32 (out, in, kernel height, kernel width).
        tile: DIRECT, F2 or F4; the last two for 3 x 3 kernels.
        transposed: Those of the convolution that is this one's transpose.
        stride: Of the convolution, where its transpose is wanted; above 1 only in tiles of DIRECT.
        padding: Of the convolution, by default kernel // 2; a strided one's transpose is cut up by it.

    Returns:
        float32, one axis.
    """
    if weight.dtype != torch.float32 or weight.dim() != 4 or weight.device.type != "cpu":
        raise ValueError(f"`weight` is float32 on the CPU with four axes, got {weight.dtype} {tuple(weight.shape)}")
    if tile not in (DIRECT, F2, F4) or (tile != DIRECT and weight.shape[2:] != (3, 3)):
        raise ValueError(f"`tile` is 1, or 2 or 4 for 3 x 3 kernels; got {tile} for {tuple(weight.shape[2:])}")
    if stride < 1 or (stride > 1 and (tile != DIRECT or not transposed or weight.shape[2] != weight.shape[3])):
        raise ValueError(
            f"`stride` above 1 is that of a transpose with a square kernel, in tiles of 1; got {stride} for tile {tile}, "
            f"transposed={transposed}, {tuple(weight.shape[2:])}"
        )
    weight = weight.contiguous()
    pack = _pack(weight, tile, transposed, stride, padding)
    packed = torch.empty(compiled().coupfast_packed_floats(ctypes.byref(pack)), dtype=torch.float32)
    pack.to = packed.data_ptr()
    compiled().coupfast_pack(ctypes.byref(pack), torch.get_num_threads())
    return packed


def _pack(weight: torch.Tensor, tile: int, transposed: bool, stride: int, padding: int | None) -> Any:
    """The structure of `pack_weights`; `weight` is contiguous and outlives it."""
    out_axis, in_axis = (1, 0) if transposed else (0, 1)
    kernel = weight.shape[2]
    return _Pack(
        tile=tile,
        out_channels=weight.shape[out_axis],
        channels=weight.shape[in_axis],
        kernel_height=kernel,
        kernel_width=weight.shape[3],
        flip=int(transposed),
        pad=kernel - 1 - (kernel // 2 if padding is None else padding),
        spread=stride if transposed else 1,
        out_stride=weight.stride(out_axis),
        in_stride=weight.stride(in_axis),
        weights=weight.data_ptr(),
    )


def packed_conv2d(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, out_channels: int, kernel: int, stride: int, tile: int
) -> torch.Tensor:
    """`conv2d_ref` with weights from `pack_weights`: (batch, channels, height, width) → the same, channels last.

    Raises:
        ValueError: for shapes, dtypes or a tile that do not fit each other.
        NotImplementedError: for an `x` that wants a gradient.
    """
    x = _checked(x, kernel, stride, tile)
    _, _, height, width = x.shape
    if min(height, width) + 2 * (kernel // 2) < kernel:
        raise ValueError(f"a {height} x {width} map is smaller than the {kernel} x {kernel} kernel")
    size = [(axis + 2 * (kernel // 2) - kernel) // stride + 1 for axis in (height, width)]
    return _convolved(x, packed, bias, (out_channels, *size), kernel, stride, 1, kernel // 2, tile)


def packed_conv2d_vjp(
    dy: torch.Tensor, packed: torch.Tensor, x_shape: Sequence[int], kernel: int, stride: int, tile: int
) -> torch.Tensor:
    """The gradient of `conv2d_ref`'s input, with weights from `pack_weights(…, transposed=True, stride=stride)`.

    Args:
        dy: The gradient of its output, (batch, out channels, height, width).
        x_shape: (channels, height, width) of the input.
        kernel, stride, tile: The convolution's, as in `packed_conv2d`.

    Returns:
        (batch, *x_shape), channels last.

    Raises:
        ValueError: for shapes, dtypes or a tile that do not fit each other.
        NotImplementedError: for a `dy` that wants a gradient.
    """
    dy = _checked(dy, kernel, stride, tile)
    size = tuple((axis + 2 * (kernel // 2) - kernel) // stride + 1 for axis in x_shape[1:])
    if tuple(dy.shape[2:]) != size:
        found = tuple(dy.shape[2:])
        raise ValueError(f"a convolution of {tuple(x_shape)} maps gives {size} of stride {stride}, `dy` has {found}")
    return _convolved(dy, packed, None, tuple(x_shape), kernel, 1, stride, kernel - 1 - kernel // 2, tile)


def _checked(x: torch.Tensor, kernel: int, stride: int, tile: int) -> torch.Tensor:
    """A map, channels last."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise NotImplementedError(
            "packed_conv2d has no gradient: packed weights do not give those of the transpose. Call packed_conv2d_vjp on the "
            "output's gradient with `pack_weights(weight, tile, transposed=True)`, or use `conv2d_ref`"
        )
    if x.dtype != torch.float32 or x.dim() != 4 or x.numel() == 0:
        raise ValueError(f"`x` is float32 with four axes and not empty, got {x.dtype} {tuple(x.shape)}")
    if tile not in (DIRECT, F2, F4) or kernel < 1 or stride < 1 or (tile != DIRECT and (kernel, stride) != (3, 1)):
        found = f"{tile} for {kernel} x {kernel}, stride {stride}"
        raise ValueError(f"`tile` is 1, or 2 or 4 for 3 x 3 kernels of stride 1; got {found}")
    return x.contiguous(memory_format=torch.channels_last)


def _convolved(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    y_shape: tuple[int, ...],
    kernel: int,
    stride: int,
    spread: int,
    pad: int,
    tile: int,
) -> torch.Tensor:
    """`plain_conv` of a whole batch, run; `y_shape` is (channels, height, width)."""
    out_channels = y_shape[0]
    shape = _Pack(
        tile=tile,
        out_channels=out_channels,
        channels=x.shape[1],
        kernel_height=kernel,
        kernel_width=kernel,
        pad=pad,
        spread=spread,
    )
    for name, tensor, floats in (
        ("packed", packed, compiled().coupfast_packed_floats(ctypes.byref(shape))),
        ("bias", bias, out_channels),
    ):
        if tensor is not None and (tensor.dtype != torch.float32 or tensor.numel() != floats or not tensor.is_contiguous()):
            raise ValueError(f"`{name}` is contiguous float32 with {floats} values, got {tensor.dtype} {tuple(tensor.shape)}")
    y = torch.empty((x.shape[0], *y_shape), dtype=x.dtype, memory_format=torch.channels_last)
    threads = torch.get_num_threads()
    conv = plain_conv(
        tile, x.shape, y.shape, packed, kernel=kernel, stride=stride, pad=pad, spread=spread, threads=threads
    )
    conv.x, conv.y, conv.bias = x.data_ptr(), y.data_ptr(), None if bias is None else bias.data_ptr()
    scratch = torch.empty(scratch_floats(conv, threads), dtype=torch.float32)
    conv.scratch = scratch.data_ptr()
    Operations([conv]).run(threads)
    return y
