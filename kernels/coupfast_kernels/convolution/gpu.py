"""3 × 3 convolutions, stride 1, padding 1, channels last, as one matrix product that is never written down.

    y = (Σ_{i, j, c} x[n, c, h + i − 1, w + j − 1] · weight[o, c, i, j] + bias[o] + image_bias[n, o] + residual) · scale

M = batch · height · width rows, N = out_channels columns, K = 9 · in_channels terms: a tap (i, j) of a tile of pixels is that
tile moved by (i − 1) · width + (j − 1) pixels, so every operand is loaded from `x` itself, and what lies outside of the image
is masked. Bias and time embedding (a bias per image) begin the sum; residual and scale end it, before the one write.

The transpose with respect to x is the same convolution with the weights turned over and their channels exchanged: one kernel
serves both passes with other packed weights. Never a gradient of weights. Bound by arithmetic: judge it by its share of the
peak.

K runs over taps, then over channels. In `ieee` an output is one chain of 9 · in_channels fused multiply-adds in that order,
whatever the config: the tuner's choice moves no bit. `docs/how/kernels-gpu.md` says what the other algorithms' bits depend on.

`tf32x3-halves` is `tf32x3` with weights that were split once, when they were packed, and lie as [out_channels, K], which is how
tensor cores read them: a pass of the loop splits the pixels only, and takes 32 terms instead of 16. In `ieee-split` and
`tf32x3-halves-split` a program takes one tap, for results that are too small to fill a card otherwise (`gpu_split.py`).
`winograd` and `winograd-tf32x3-halves` are another way altogether (`gpu_winograd.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from torch import library

from coupfast_kernels.convolution.definition import check_weight3x3, conv3x3_ref, tf32_halves
from coupfast_kernels.convolution.gpu_products import image_bias_stride
from coupfast_kernels.convolution.gpu_split import MOST_BYTES, PARTS, is_small, launch_sum
from coupfast_kernels.convolution.gpu_tuning import LARGEST_BLOCK_M, Config, fastest
from coupfast_kernels.convolution.gpu_winograd import (
    launch_winograd,
    pack_winograd,
    pack_winograd_halves,
    tiles_of,
    unpack_winograd,
    unpack_winograd_halves,
    workspace_bytes,
)

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton exists for Linux only; the definition and the CPU need none of it
    triton = None


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """Weights in the order of the kernel's sum.

    Args:
        weight: Shape (out_channels, in_channels, 3, 3), float32, any strides. For the transpose:
            `weight.flip(2, 3).transpose(0, 1)`.

    Returns:
        Shape (9 · in_channels, out_channels), contiguous: row (3 i + j) · in_channels + c has weight[:, c, i, j].

    Raises:
        TypeError, ValueError: for another dtype or shape.
    """
    check_weight3x3(weight)
    return weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0]).contiguous()


def pack_halves(weight: torch.Tensor) -> torch.Tensor:
    """Weights split in two TF32 numbers, in the order of the kernel's sum.

    Args:
        weight: As `pack_weight` takes it.

    Returns:
        Shape (2, out_channels, 9 · in_channels), contiguous, the `tf32_halves`: column (3 i + j) · in_channels + c has those of
        weight[:, c, i, j].

    Raises:
        TypeError, ValueError: for another dtype or shape.
    """
    check_weight3x3(weight)
    return tf32_halves(weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1))


def _unpack_weight(packed: torch.Tensor) -> torch.Tensor:
    return packed.reshape(3, 3, packed.shape[0] // 9, packed.shape[1]).permute(3, 2, 0, 1)


def _unpack_halves(packed: torch.Tensor) -> torch.Tensor:
    return packed.sum(dim=0).reshape(packed.shape[1], 3, 3, packed.shape[2] // 9).permute(0, 3, 1, 2)


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """A way to compute a convolution.

    Attributes:
        products: How two numbers are multiplied: "ieee" in float32; "tf32x3" by three products on the tensor cores for one,
            with nearly float32's error; "tf32" by one, of factors with 10 bits of mantissa.
        pack: Weights → packed weights.
        packed_shape: (in_channels, out_channels) → the shape that packed weights have; `form` says it in words.
        unpack: Packed weights → weights, as far as packing kept them.
        out_axis: Which axis of packed weights is that of the output channels.
        least_channels: From how many input channels on it is worth trying: as exact as its products are, a tap a pass at least.
        way: "direct"; "split", where a program takes one tap and another kernel adds the nine; or "winograd".
    """

    products: str
    pack: Callable[[torch.Tensor], torch.Tensor]
    packed_shape: Callable[[int, int], tuple[int, ...]]
    form: str
    unpack: Callable[[torch.Tensor], torch.Tensor]
    out_axis: int = 1
    least_channels: int = 1
    way: Literal["direct", "split", "winograd"] = "direct"

    def suits(self, batch: int, in_channels: int, out_channels: int, height: int, width: int) -> bool:
        """Whether it is worth trying: not of few channels, nor to split a sum where there are programs enough without."""
        return in_channels >= self.least_channels and (self.way != "split" or is_small(batch * height * width, out_channels))


def _taps(products: str) -> Algorithm:
    return Algorithm(
        products,
        pack_weight,
        lambda channels, out_channels: (9 * channels, out_channels),
        "(9 · in_channels, out_channels)",
        _unpack_weight,
    )


_HALVES = Algorithm(
    "tf32x3",
    pack_halves,
    lambda channels, out_channels: (2, out_channels, 9 * channels),
    "(2, out_channels, 9 · in_channels)",
    _unpack_halves,
)

#: By name; `gpu_tuning.CONFIGS` has the same names.
ALGORITHMS: dict[str, Algorithm] = {
    "ieee": _taps("ieee"),
    "tf32x3": _taps("tf32x3"),
    "tf32": _taps("tf32"),
    "tf32x3-halves": _HALVES,
    "ieee-split": dataclasses.replace(_taps("ieee"), way="split", least_channels=16),
    "tf32x3-halves-split": dataclasses.replace(_HALVES, way="split", least_channels=16),
    # Of few channels the transforms round more than a direct sum does.
    "winograd": Algorithm(
        "ieee",
        pack_winograd,
        lambda channels, out_channels: (36, channels, out_channels),
        "(36, in_channels, out_channels)",
        unpack_winograd,
        out_axis=2,
        least_channels=16,
        way="winograd",
    ),
    "winograd-tf32x3-halves": Algorithm(
        "tf32x3",
        pack_winograd_halves,
        lambda channels, out_channels: (2 * 36, out_channels, channels),
        "(2 · 36, out_channels, in_channels)",
        unpack_winograd_halves,
        least_channels=16,
        way="winograd",
    ),
}


if triton is not None:
    from coupfast_kernels.convolution.gpu_products import sum_of_halves_kernel
    # Of the integers only the channels decide how wide an access can be; the others need no machine code of their own.
    @triton.jit(do_not_specialize=["pixels", "height", "width"])
    def _conv3x3_kernel(
        y_ptr,
        x_ptr,
        packed_ptr,
        small_ptr,
        bias_ptr,
        image_bias_ptr,
        residual_ptr,
        image_bias_stride,
        scale,
        pixels,
        height,
        width,
        in_channels,
        out_channels,
        INPUT_PRECISION: tl.constexpr,
        SPLIT: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        """`pixels` counts those of all images. Tiles of channels vary fastest, so that neighbours share their pixels in L2.

        With `small_ptr` the weights are halves, and `packed_ptr` has the large ones. Infinity becomes NaN.
        SPLIT takes the tap that the program has on the grid's second axis, and writes results of taps one behind the other.

        No spills but where `gpu_tuning` says so, and an SM holds at least 256 threads, with every config (sm_80, sm_90, sm_100;
        Triton 3.7.1 and 3.9.0).
        """
        column_tiles = tl.cdiv(out_channels, BLOCK_N)
        first = (tl.program_id(0) // column_tiles).to(tl.int64) * BLOCK_M  # pixel, among those of all images
        column = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        row, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)

        plane = height * width
        place = (first % plane).to(tl.int32) + row  # of the tile's first image, and beyond
        h, w = place % plane // width, place % plane % width
        inside = row < pixels - first
        # Bit 3 i + j: the pixel (h + i − 1, w + j − 1) exists. One register a pixel instead of comparisons a tap.
        across = tl.where(w > 0, 1, 0) | 2 | tl.where(w < width - 1, 4, 0)
        taps = tl.where(h > 0, across, 0) | (across << 3) | tl.where(h < height - 1, across << 6, 0)
        taps = tl.where(inside, taps, 0)

        # 64 bits for where the tile begins, 32 for where in it.
        x_tile = x_ptr + first * in_channels
        x_offset = row[:, None] * in_channels + k[None, :]  # [BLOCK_M, BLOCK_K]
        if small_ptr is None:
            packed_offset = k[:, None] * out_channels + column[None, :]  # [BLOCK_K, BLOCK_N]
        else:
            packed_offset = column[:, None] * (9 * in_channels) + k[None, :]  # [BLOCK_N, BLOCK_K]
        blocks = tl.cdiv(in_channels, BLOCK_K)
        mask = inside[:, None] & (column < out_channels)[None, :]
        # The biases begin the sum instead of ending it: loaded here they hold no registers beside the loop's.
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if bias_ptr is not None:
            sums += tl.load(bias_ptr + column, mask=column < out_channels, other=0.0)[None, :]
        if image_bias_ptr is not None:
            image = first // plane + place // plane
            sums += tl.load(image_bias_ptr + (image[:, None] * image_bias_stride + column[None, :]), mask=mask, other=0.0)
        begin = 0
        passes = 9 * blocks
        if SPLIT:
            begin = tl.program_id(1) * blocks
            passes = blocks
        for i in range(begin, begin + passes):
            tap, channel = i // blocks, i % blocks * BLOCK_K
            moved = ((tap // 3 - 1) * width + (tap % 3 - 1)) * in_channels + channel
            a = tl.load(
                x_tile + (moved + x_offset),
                mask=((taps >> tap) & 1 != 0)[:, None] & (k < in_channels - channel)[None, :],
                other=0.0,
            )
            if small_ptr is None:
                b = tl.load(
                    packed_ptr + ((tap * in_channels + channel) * out_channels + packed_offset),
                    mask=(k < in_channels - channel)[:, None] & (column < out_channels)[None, :],
                    other=0.0,
                )
                sums = tl.dot(a, b, sums, input_precision=INPUT_PRECISION)
            else:
                place_of_halves = tap * in_channels + channel + packed_offset
                there = (column < out_channels)[:, None] & (k < in_channels - channel)[None, :]
                big = tl.trans(tl.load(packed_ptr + place_of_halves, mask=there, other=0.0))
                small = tl.trans(tl.load(small_ptr + place_of_halves, mask=there, other=0.0))
                # A pass is a sum of its own on the tensor cores, whose rounding is not documented.
                sums += sum_of_halves_kernel(a, big, small)

        if SPLIT:
            first += tl.program_id(1).to(tl.int64) * pixels
        offset = first * out_channels + (row[:, None] * out_channels + column[None, :])  # [BLOCK_M, BLOCK_N]
        y = sums
        if residual_ptr is not None:
            y = y + tl.load(residual_ptr + offset, mask=mask, other=0.0)
        tl.store(y_ptr + offset, y * scale, mask=mask)


def conv3x3(
    x: torch.Tensor,
    packed: torch.Tensor,
    packed_vjp: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    *,
    image_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    scale: float = 1.0,
    algorithm: str = "ieee",
) -> torch.Tensor:
    """Fused `conv3x3_ref`, differentiable in `x` and `residual`, as often as wanted.

    Args:
        x: Shape (batch, in_channels, height, width), float32, channels_last.
        packed: `ALGORITHMS[algorithm].pack(weight)`; for most that is `pack_weight(weight)`.
        packed_vjp: The same of `weight.flip(2, 3).transpose(0, 1)`, for the gradient; None if there will be none.
        bias, image_bias, residual: As in `conv3x3_ref`, float32; the biases contiguous, the residual channels_last.
        scale: Rounded once to float32.
        algorithm: One of `ALGORITHMS`, for both passes. The CPU computes the definition in float32 whichever it is.

    Returns:
        A new channels_last tensor, shape (batch, out_channels, height, width).

    Raises:
        TypeError, ValueError: for tensors that do not fit each other, another memory format or an unknown algorithm.
        RuntimeError: for CUDA tensors without Triton; for a gradient that does not exist (of the weights, of a bias, or of `x`
            without `packed_vjp`); for a first call with a shape while a CUDA graph is captured.

    The first call with a shape, an algorithm and a device times its `gpu_tuning.CONFIGS` on that device and keeps the fastest
    for the process. Before it is timed Triton compiles each, which takes seconds, and keeps the machine code on disk.
    """
    return conv3x3_op(x, packed, packed_vjp, bias, image_bias, residual, scale, algorithm)


# Returns a new tensor, unlike `guided_step_out`: among convolutions a captured graph's pool places the activations itself.
@library.custom_op(
    "coupfast::conv3x3",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor packed, Tensor? packed_vjp, Tensor? bias, Tensor? image_bias, Tensor? residual, float scale, "
    "str algorithm) -> Tensor",
)
def conv3x3_op(x, packed, packed_vjp, bias, image_bias, residual, scale, algorithm):
    """`conv3x3` as PyTorch's dispatcher knows it. On the CPU: the definition, for tests of what runs on the GPU."""
    y = _new(x, _out_channels(x, packed, packed_vjp, bias, image_bias, residual, algorithm))
    if y.numel() == 0:  # which PyTorch's convolution refuses where it has no pixels
        return y
    weight = ALGORITHMS[algorithm].unpack(packed)
    return y.copy_(conv3x3_ref(x, weight, bias, image_bias=image_bias, residual=residual, scale=scale))


@conv3x3_op.register_fake
def _(x, packed, packed_vjp, bias, image_bias, residual, scale, algorithm):
    return _new(x, _out_channels(x, packed, packed_vjp, bias, image_bias, residual, algorithm))


@conv3x3_op.register_kernel("cuda")
def _on_cuda(x, packed, packed_vjp, bias, image_bias, residual, scale, algorithm):
    y = _new(x, _out_channels(x, packed, packed_vjp, bias, image_bias, residual, algorithm))

    def launch(config: Config) -> None:
        _launch(y, x, packed, bias, image_bias, residual, scale, algorithm, config)

    fastest_launch(y, x, algorithm, launch)
    return y


def fastest_launch(y: torch.Tensor, x: torch.Tensor, algorithm: str, launch: Callable[[Config], None]) -> None:
    """Launch what writes `y` from `x` with the fastest config for their shapes, which is tuned by it if there is none yet."""
    if triton is None:
        raise RuntimeError("conv3x3 on CUDA needs Triton, which is not installed; `pip install triton` (Linux)")
    if y.numel() == 0:
        return
    # The current device, not the tensors', is where Triton launches.
    with torch.cuda.device_of(x):
        rows = tiles_of(x) if ALGORITHMS[algorithm].way == "winograd" else x.numel() // x.shape[1]
        launch(fastest((tuple(x.shape), y.shape[1], algorithm, x.device), rows, y.shape[1], algorithm, launch))


def _setup_context(ctx, inputs, output):
    names = ("x", "packed", "packed_vjp", "bias", "image_bias", "residual")
    wanted = [name for name, needed in zip(names, ctx.needs_input_grad, strict=False) if needed]
    impossible = [name for name in wanted if name not in ("x", "residual")]
    if impossible:
        raise RuntimeError(
            f"conv3x3 has gradients for `x` and `residual` only, asked for: {', '.join(impossible)}; "
            "freeze them (`requires_grad_(False)`) or detach them"
        )
    if "x" in wanted and inputs[2] is None:
        raise RuntimeError(
            "conv3x3 needs `packed_vjp` for the gradient of `x`, got None; pass weight.flip(2, 3).transpose(0, 1), packed as "
            "`packed` is, or call it under torch.no_grad()"
        )
    if inputs[2] is not None:
        ctx.save_for_backward(inputs[1], inputs[2])
    ctx.scale, ctx.algorithm = inputs[6:]


def _backward(ctx, gy):
    gy = gy.contiguous(memory_format=torch.channels_last)
    gx = gresidual = None
    if ctx.needs_input_grad[0]:
        packed, packed_vjp = ctx.saved_tensors
        # scale · conv(gy) for conv(scale · gy): no pass of its own.
        gx = conv3x3_op(gy, packed_vjp, packed, None, None, None, ctx.scale, ctx.algorithm)
    if ctx.needs_input_grad[5]:
        gresidual = gy if ctx.scale == 1.0 else gy * ctx.scale
    return gx, None, None, None, None, gresidual, None, None


conv3x3_op.register_autograd(_backward, setup_context=_setup_context)


def _launch(y, x, packed, bias, image_bias, residual, scale, algorithm, config):
    """Writes `y`, which no other argument may overlap."""
    way = ALGORITHMS[algorithm].way
    if way == "winograd":
        launch_winograd(y, x, packed, bias, image_bias, residual, scale, config)
    elif way == "split":
        parts = torch.empty(PARTS, y.numel(), dtype=y.dtype, device=y.device)
        launch_direct(parts, x, packed, None, None, None, 1.0, algorithm, config)
        launch_sum(y, parts, bias, image_bias, residual, scale)
    else:
        launch_direct(y, x, packed, bias, image_bias, residual, scale, algorithm, config)


def launch_direct(y, x, packed, bias, image_bias, residual, scale: float, algorithm: str, config: Config) -> None:
    """Writes `y`; where the sum is split that of each tap, [9, pixels, out_channels], to which nothing is added."""
    batch, in_channels, height, width = x.shape
    split, out_axis = ALGORITHMS[algorithm].way == "split", ALGORITHMS[algorithm].out_axis
    pixels, out_channels = batch * height * width, packed.shape[out_axis]
    big, small = packed if packed.dim() == 3 else (packed, None)
    tiles = triton.cdiv(pixels, config.block_m) * triton.cdiv(out_channels, config.block_n)
    _conv3x3_kernel[(tiles, PARTS if split else 1)](
        y,
        x,
        big,
        small,
        bias,
        image_bias,
        residual,
        image_bias_stride=image_bias_stride(image_bias),
        scale=float(scale),
        pixels=pixels,
        height=height,
        width=width,
        in_channels=in_channels,
        out_channels=out_channels,
        INPUT_PRECISION=ALGORITHMS[algorithm].products,
        SPLIT=split,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,  # said, since Triton's default changes with its version
    )


def most_workspace(device: torch.device) -> int:
    """The most bytes that a convolution which suits its algorithm takes beside its result."""
    return max(workspace_bytes(device), MOST_BYTES)


def _new(x: torch.Tensor, out_channels: int) -> torch.Tensor:
    shape = (x.shape[0], out_channels, x.shape[2], x.shape[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _out_channels(x, packed, packed_vjp, bias, image_bias, residual, algorithm) -> int:
    """The number of output channels, after checking that everything fits; reads no values."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"`algorithm` is one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    tensors = {"x": x, "packed": packed, "packed_vjp": packed_vjp, "bias": bias, "image_bias": image_bias, "residual": residual}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"conv3x3 takes float32, `{name}` is {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"`x` is on {x.device}, `{name}` on {tensor.device}; a kernel reads from its own device")
    if x.dim() != 4:
        raise ValueError(f"`x` has shape (batch, channels, height, width), got {tuple(x.shape)}")
    batch, in_channels, height, width = x.shape
    packed_shape = ALGORITHMS[algorithm].packed_shape
    out_axis = ALGORITHMS[algorithm].out_axis
    out_channels = packed.shape[out_axis] if packed.dim() > out_axis else 0
    if tuple(packed.shape) != packed_shape(in_channels, out_channels):
        raise ValueError(
            f"`packed` is {ALGORITHMS[algorithm].pack.__name__}(weight) for algorithm={algorithm!r}, shape "
            f"{ALGORITHMS[algorithm].form} where `x` has {in_channels} channels, got {tuple(packed.shape)}"
        )
    wanted: dict[str, list[tuple[int, ...]]] = {
        "packed_vjp": [packed_shape(out_channels, in_channels)],
        "bias": [(out_channels,)],
        "image_bias": [(batch, out_channels), (1, out_channels)],
        "residual": [(batch, out_channels, height, width)],
    }
    for name, shapes in wanted.items():
        if name in tensors and tuple(tensors[name].shape) not in shapes:
            raise ValueError(
                f"`{name}` must have shape {' or '.join(map(str, shapes))} for this `x` and `packed`, got "
                f"{tuple(tensors[name].shape)}"
            )
    for name, tensor in tensors.items():
        layout = torch.channels_last if name in ("x", "residual") else torch.contiguous_format
        if not tensor.is_contiguous(memory_format=layout):
            raise ValueError(
                f"`{name}` must be {str(layout).removeprefix('torch.')}, got strides {tensor.stride()}; "
                f"use .contiguous(memory_format={layout})"
            )
    # Offsets inside of a tile and of the weights, and a tile's first pixel in its image, have 31 bits; all else has 63.
    within = (LARGEST_BLOCK_M + width + 2) * max(in_channels, out_channels)
    if max(within, packed.numel(), height * width + LARGEST_BLOCK_M) >= 2**31:
        raise ValueError(
            f"`x` of shape {tuple(x.shape)} with {out_channels} output channels needs offsets of 32 bits inside of an image; "
            "cut the image"
        )
    return out_channels
