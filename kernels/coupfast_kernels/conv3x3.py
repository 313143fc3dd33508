"""3 × 3 convolutions, stride 1, padding 1, channels last, as one matrix product that is never written down.

    y = (Σ_{i, j, c} x[n, c, h + i − 1, w + j − 1] · weight[o, c, i, j] + bias[o] + image_bias[n, o] + residual) · scale

M = batch · height · width rows, N = out_channels columns, K = 9 · in_channels terms: a tap (i, j) of a tile of pixels is that
tile moved by (i − 1) · width + (j − 1) pixels, so every operand is loaded from `x` itself, and what lies outside of the image
is masked. Bias and time embedding (a bias per image) begin the sum; residual and scale end it, before the one write.

The transpose with respect to x is the same convolution with the weights turned over and their channels exchanged: one kernel
serves both passes with other packed weights. Never a gradient of weights. Bound by arithmetic: judge it by its share of the
peak.

K runs over taps, then over channels. In `ieee` an output is one chain of 9 · in_channels fused multiply-adds in that order,
whatever the config: the tuner's choice moves no bit. `kernels/README.md` says what the other precisions' bits depend on.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import statistics
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import library

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton exists for Linux only; the definition and the CPU need none of it
    triton = None

logger = logging.getLogger(__name__)

#: How products are taken: float32 multiply-adds; three TF32 products for one; one TF32 product.
PRECISIONS = ("ieee", "tf32x3", "tf32")


class Config(NamedTuple):
    """How a launch is cut: a program makes BLOCK_M pixels × BLOCK_N channels, BLOCK_K terms a pass of its loop."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


#: What the tuner chooses from, by precision: large tiles, then one for three channels out, then two for small maps of few
#: images. The tensor cores' sums depend on BLOCK_K, so a precision has one there; `ieee` does not depend on it.
CONFIGS: dict[str, tuple[Config, ...]] = {
    "ieee": (
        Config(128, 128, 16, 8, 4),
        Config(128, 64, 16, 4, 4),
        Config(64, 128, 16, 4, 4),
        Config(128, 32, 16, 4, 4),
        Config(64, 64, 16, 2, 4),  # with four warps ptxas takes 96 registers where 112 are needed
        Config(32, 32, 32, 4, 3),
        Config(128, 16, 32, 4, 3),
        Config(16, 32, 32, 4, 3),
        Config(16, 16, 32, 2, 3),
    ),
    # Of 32 terms a pass the halves of both factors do not fit into sm_80's registers.
    "tf32x3": (
        Config(128, 128, 16, 8, 4),
        Config(128, 64, 16, 4, 4),
        Config(64, 128, 16, 4, 4),
        Config(128, 32, 16, 4, 4),
        Config(64, 64, 16, 4, 4),
        Config(32, 32, 16, 4, 4),
        Config(128, 16, 16, 2, 4),
        Config(16, 32, 16, 2, 4),
        Config(16, 16, 16, 2, 4),
    ),
    "tf32": (
        Config(128, 128, 32, 8, 3),
        Config(128, 64, 32, 4, 3),
        Config(64, 128, 32, 4, 3),
        Config(128, 32, 32, 4, 3),
        Config(64, 64, 32, 4, 3),
        Config(32, 32, 32, 4, 3),
        Config(128, 16, 32, 4, 3),
        Config(16, 32, 32, 4, 3),
        Config(16, 16, 32, 2, 3),
    ),
}
LARGEST_BLOCK_M = max(config.block_m for configs in CONFIGS.values() for config in configs)

WARM_UPS, REPEATS, LAUNCHES = 2, 5, 4  # of the tuner: before, medians of, launches between two events

_chosen: dict[Hashable, Config] = {}  # by shape, precision and device
_one_tuner = threading.Lock()
_most: int | None = None  # configs that are tried


@contextlib.contextmanager
def trying(most: int) -> Iterator[None]:
    """Try that many configs of a shape and no more, where a result counts and not its time: each takes seconds to compile.

    For all threads: a backward pass on a GPU runs in one of its own.
    """
    global _most
    before, _most = _most, most
    try:
        yield
    finally:
        _most = before


def conv3x3_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    image_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """The definition: plain PyTorch, any device, any dtype, differentiable in everything.

    Args:
        x: Shape (batch, in_channels, height, width).
        weight: Shape (out_channels, in_channels, 3, 3), as `torch.nn.Conv2d` has it.
        bias: Shape (out_channels,); None leaves the term out, here and below.
        image_bias: Shape (batch, out_channels), for instance a time embedding.
        residual: Like the result.
        scale: Multiplies the sum of all that.

    Returns:
        (conv(x, weight) + bias + image_bias + residual) · scale, shape (batch, out_channels, height, width).
    """
    y = F.conv2d(x, weight, padding=1)
    if bias is not None:
        y = y + bias[:, None, None]
    if image_bias is not None:
        y = y + image_bias[:, :, None, None]
    if residual is not None:
        y = y + residual
    return y * scale


def round_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """The nearest float32 whose mantissa has 10 bits, ties away from zero, as the instruction `cvt.rna.tf32.f32` has it.

    Relative error at most 2⁻¹¹ for normal numbers. Infinities and NaN stay.
    """
    bits = x.contiguous().view(torch.int32)
    rounded = ((bits + 0x1000) & ~0x1FFF).view(torch.float32)  # a carry goes into the exponent, which is right
    return torch.where(x.isfinite(), rounded, x)


def tf32x3_ref(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A model of what `precision="tf32x3"` computes before anything is added: each product from three of TF32 numbers.

    big = TF32(x), small = TF32(x − big), likewise for the weight; x · w ≈ small · big + big · small + big · big. What rounding
    leaves of a number is at most 2⁻²³ of it: x − big has 12 bits and a sign, of which small keeps 11. With small · small, at
    most 2⁻²², left out, a product is off by at most 2⁻²¹ of its size (and terms of 2⁻³³).

    The sums are taken in float64: how the tensor cores round theirs is not documented and not modelled.

    Args:
        x, weight: As in `conv3x3_ref`, float32.

    Returns:
        conv(x, weight), float64.
    """
    x_big, weight_big = round_to_tf32(x), round_to_tf32(weight)
    x_small, weight_small = round_to_tf32(x - x_big), round_to_tf32(weight - weight_big)

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.conv2d(a.double(), b.double(), padding=1)

    return product(x_small, weight_big) + product(x_big, weight_small) + product(x_big, weight_big)


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
    if weight.dtype != torch.float32:
        raise TypeError(f"conv3x3 takes float32, `weight` is {weight.dtype}")
    if weight.dim() != 4 or tuple(weight.shape[2:]) != (3, 3):
        raise ValueError(f"`weight` has shape (out_channels, in_channels, 3, 3), got {tuple(weight.shape)}")
    return weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0]).contiguous()


def _unpack_weight(packed: torch.Tensor) -> torch.Tensor:
    return packed.reshape(3, 3, packed.shape[0] // 9, packed.shape[1]).permute(3, 2, 0, 1)


if triton is not None:
    # Of the integers only the channels decide how wide an access can be; the others need no machine code of their own.
    @triton.jit(do_not_specialize=["pixels", "height", "width"])
    def _conv3x3_kernel(
        y_ptr,
        x_ptr,
        packed_ptr,
        bias_ptr,
        image_bias_ptr,
        residual_ptr,
        scale,
        pixels,
        height,
        width,
        in_channels,
        out_channels,
        INPUT_PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        """`pixels` counts those of all images. Tiles of channels vary fastest, so that neighbours share their pixels in L2.

        No spills, and an SM holds at least 256 threads, with every config (sm_80, sm_90, sm_100; Triton 3.7.1 and 3.9.0).
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
        packed_offset = k[:, None] * out_channels + column[None, :]  # [BLOCK_K, BLOCK_N]
        blocks = tl.cdiv(in_channels, BLOCK_K)
        mask = inside[:, None] & (column < out_channels)[None, :]
        # The biases begin the sum instead of ending it: loaded here they hold no registers beside the loop's.
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if bias_ptr is not None:
            sums += tl.load(bias_ptr + column, mask=column < out_channels, other=0.0)[None, :]
        if image_bias_ptr is not None:
            image = first // plane + place // plane
            sums += tl.load(image_bias_ptr + (image[:, None] * out_channels + column[None, :]), mask=mask, other=0.0)
        for i in range(9 * blocks):
            tap, channel = i // blocks, i % blocks * BLOCK_K
            moved = ((tap // 3 - 1) * width + (tap % 3 - 1)) * in_channels + channel
            a = tl.load(
                x_tile + (moved + x_offset),
                mask=((taps >> tap) & 1 != 0)[:, None] & (k < in_channels - channel)[None, :],
                other=0.0,
            )
            b = tl.load(
                packed_ptr + ((tap * in_channels + channel) * out_channels + packed_offset),
                mask=(k < in_channels - channel)[:, None] & (column < out_channels)[None, :],
                other=0.0,
            )
            sums = tl.dot(a, b, sums, input_precision=INPUT_PRECISION)

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
    precision: str = "ieee",
) -> torch.Tensor:
    """Fused `conv3x3_ref`, differentiable in `x` and `residual`, as often as wanted.

    Args:
        x: Shape (batch, in_channels, height, width), float32, channels_last.
        packed: `pack_weight(weight)`.
        packed_vjp: `pack_weight(weight.flip(2, 3).transpose(0, 1))`, for the gradient; None if there will be none.
        bias, image_bias, residual: As in `conv3x3_ref`, float32; the biases contiguous, the residual channels_last.
        scale: Rounded once to float32.
        precision: One of `PRECISIONS`, for both passes: "ieee" multiplies and adds in float32; "tf32x3" takes three products on
            the tensor cores for one, with nearly float32's error; "tf32" takes one, of factors with 10 bits of mantissa. The
            CPU computes the definition in float32 whichever it is.

    Returns:
        A new channels_last tensor, shape (batch, out_channels, height, width).

    Raises:
        TypeError, ValueError: for tensors that do not fit each other, another memory format or an unknown precision.
        RuntimeError: for CUDA tensors without Triton; for a gradient that does not exist (of the weights, of a bias, or of `x`
            without `packed_vjp`); for a first call with a shape while a CUDA graph is captured.

    The first call with a shape, a precision and a device times its `CONFIGS` on that device and keeps the fastest for the
    process. Before it is timed Triton compiles each, which takes seconds, and keeps the machine code on disk.
    """
    return conv3x3_op(x, packed, packed_vjp, bias, image_bias, residual, scale, precision)


# Returns a new tensor, unlike `guided_step_out`: among convolutions a captured graph's pool places the activations itself.
@library.custom_op(
    "coupfast::conv3x3",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor packed, Tensor? packed_vjp, Tensor? bias, Tensor? image_bias, Tensor? residual, float scale, "
    "str precision) -> Tensor",
)
def conv3x3_op(x, packed, packed_vjp, bias, image_bias, residual, scale, precision):
    """`conv3x3` as PyTorch's dispatcher knows it. On the CPU: the definition, for tests of what runs on the GPU."""
    y = _new(x, _out_channels(x, packed, packed_vjp, bias, image_bias, residual, precision))
    if y.numel() == 0:  # which PyTorch's convolution refuses where it has no pixels
        return y
    return y.copy_(conv3x3_ref(x, _unpack_weight(packed), bias, image_bias=image_bias, residual=residual, scale=scale))


@conv3x3_op.register_fake
def _(x, packed, packed_vjp, bias, image_bias, residual, scale, precision):
    return _new(x, _out_channels(x, packed, packed_vjp, bias, image_bias, residual, precision))


@conv3x3_op.register_kernel("cuda")
def _on_cuda(x, packed, packed_vjp, bias, image_bias, residual, scale, precision):
    y = _new(x, _out_channels(x, packed, packed_vjp, bias, image_bias, residual, precision))
    if triton is None:
        raise RuntimeError("conv3x3 on CUDA needs Triton, which is not installed; `pip install triton` (Linux)")
    if y.numel() == 0:
        return y

    def launch(config: Config) -> None:
        _launch(y, x, packed, bias, image_bias, residual, scale, precision, config)

    with torch.cuda.device_of(x):
        pixels = x.numel() // x.shape[1]
        key = (tuple(x.shape), y.shape[1], precision, x.device, _most)
        launch(tuned(key, candidates(pixels, y.shape[1], precision)[:_most], launch, _seconds))
    return y


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
            "conv3x3 needs `packed_vjp` for the gradient of `x`, got None; pass "
            "pack_weight(weight.flip(2, 3).transpose(0, 1)), or call it under torch.no_grad()"
        )
    if inputs[2] is not None:
        ctx.save_for_backward(inputs[1], inputs[2])
    ctx.scale, ctx.precision = inputs[6:]


def _backward(ctx, gy):
    gy = gy.contiguous(memory_format=torch.channels_last)
    gx = gresidual = None
    if ctx.needs_input_grad[0]:
        packed, packed_vjp = ctx.saved_tensors
        # scale · conv(gy) for conv(scale · gy): no pass of its own.
        gx = conv3x3_op(gy, packed_vjp, packed, None, None, None, ctx.scale, ctx.precision)
    if ctx.needs_input_grad[5]:
        gresidual = gy if ctx.scale == 1.0 else gy * ctx.scale
    return gx, None, None, None, None, gresidual, None, None


conv3x3_op.register_autograd(_backward, setup_context=_setup_context)


def _launch(y, x, packed, bias, image_bias, residual, scale, precision, config):
    """Writes `y`, which no other argument may overlap."""
    batch, in_channels, height, width = x.shape
    pixels, out_channels = batch * height * width, y.shape[1]
    # The current device, not the tensors', is where Triton launches.
    with torch.cuda.device_of(x):
        _conv3x3_kernel[(triton.cdiv(pixels, config.block_m) * triton.cdiv(out_channels, config.block_n),)](
            y,
            x,
            packed,
            bias,
            image_bias,
            residual,
            float(scale),
            pixels=pixels,
            height=height,
            width=width,
            in_channels=in_channels,
            out_channels=out_channels,
            INPUT_PRECISION=precision,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,  # said, since Triton's default changes with its version
        )


def candidates(pixels: int, out_channels: int, precision: str) -> tuple[Config, ...]:
    """The configs worth timing: those without a block of twice the whole result's size, or more."""
    return tuple(
        config
        for config in CONFIGS[precision]
        if config.block_m < 2 * max(pixels, 16) and config.block_n < 2 * max(out_channels, 16)
    )


def tuned(
    key: Hashable, configs: Sequence[Config], launch: Callable[[Config], None], seconds: Callable[[Callable[[], None]], float]
) -> Config:
    """The config for a key: `choose` at the first call, what it gave at later ones.

    Raises:
        RuntimeError: if the key is new while a CUDA graph is captured: nothing can be timed then.
    """
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"conv3x3 has not been tuned for {key}, and a CUDA graph is being captured, in which nothing can be timed; "
                "warm up first: run the same call once before the capture"
            )
        with _one_tuner:
            if key not in _chosen:
                _chosen[key] = choose(configs, launch, seconds)
                logger.info("conv3x3 %s takes %s", key, _chosen[key])
    return _chosen[key]


def choose(
    configs: Sequence[Config], launch: Callable[[Config], None], seconds: Callable[[Callable[[], None]], float]
) -> Config:
    """The config whose launch takes the least time; the first of equals.

    Args:
        configs: To choose from, at least one.
        launch: Launches with a config.
        seconds: Times a call.

    Raises:
        RuntimeError: if no config runs; the message has every reason. One that does not is logged as a warning and left out,
            for instance since it wants more shared memory than the device has. Running out of device memory is no such reason.
    """
    times: dict[Config, float] = {}
    reasons: dict[Config, str] = {}
    for config in configs:
        try:
            times[config] = seconds(functools.partial(launch, config))
        except torch.OutOfMemoryError:
            raise
        # What Triton cannot build or place; from its C++ parts and the driver come RuntimeErrors.
        except (_triton_error(), RuntimeError) as error:
            reasons[config] = f"{type(error).__name__}: {error}"
            logger.warning("conv3x3 leaves out %s: %s", config, reasons[config])
    if not times:
        found = "\n".join(f"  {config}: {reason}" for config, reason in reasons.items())
        raise RuntimeError(f"conv3x3: none of {len(reasons)} configs runs on this device; use another engine. Found:\n{found}")
    return min(times, key=times.__getitem__)


def _triton_error() -> type[Exception]:
    return RuntimeError if triton is None else triton.TritonError


def _seconds(launch: Callable[[], None]) -> float:
    """Median time of a launch on the current device's current stream."""
    for _ in range(WARM_UPS):
        launch()
    times = []
    for _ in range(REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(LAUNCHES):
            launch()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / LAUNCHES)
    return statistics.median(times)


def _new(x: torch.Tensor, out_channels: int) -> torch.Tensor:
    shape = (x.shape[0], out_channels, x.shape[2], x.shape[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _out_channels(x, packed, packed_vjp, bias, image_bias, residual, precision) -> int:
    """The number of output channels, after checking that everything fits; reads no values."""
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` is one of {', '.join(PRECISIONS)}, got {precision!r}")
    tensors = {"x": x, "packed": packed, "packed_vjp": packed_vjp, "bias": bias, "image_bias": image_bias, "residual": residual}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"conv3x3 takes float32, `{name}` is {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"`x` is on {x.device}, `{name}` on {tensor.device}; a kernel reads from its own device")
    if x.dim() != 4:
        raise ValueError(f"`x` has shape (batch, channels, height, width), got {tuple(x.shape)}")
    if packed.dim() != 2 or packed.shape[0] != 9 * x.shape[1]:
        raise ValueError(
            f"`packed` is pack_weight(weight), shape (9 · {x.shape[1]}, out_channels) for this `x`, got {tuple(packed.shape)}"
        )
    batch, in_channels, height, width = x.shape
    out_channels = packed.shape[1]
    wanted = {
        "packed_vjp": (9 * out_channels, in_channels),
        "bias": (out_channels,),
        "image_bias": (batch, out_channels),
        "residual": (batch, out_channels, height, width),
    }
    for name, shape in wanted.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            raise ValueError(f"`{name}` must have shape {shape} for this `x` and `packed`, got {tuple(tensors[name].shape)}")
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
