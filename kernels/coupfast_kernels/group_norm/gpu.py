"""GroupNorm with SiLU, its statistics and its transpose as operators: each definition in one launch of `gpu_kernels`."""

from __future__ import annotations

import math

import torch
from torch import library

from coupfast_kernels.group_norm.definition import group_norm_silu_ref, group_norm_silu_vjp_ref, group_norm_statistics_ref

try:
    import triton

    from coupfast_kernels.group_norm.gpu_kernels import (
        _group_norm_kernel,
        _group_norm_loop_kernel,
        _group_norm_vjp_kernel,
        _group_norm_vjp_loop_kernel,
    )
except ImportError:  # Triton exists for Linux only; the definitions and the CPU need none of it
    triton = None

#: Elements of one program's groups, padded to powers of two, that stay in registers: 2¹⁴ floats are a quarter of the 2¹⁶
#: registers of an SM, and the transpose holds two of them an element.
MOST_IN_REGISTERS = 2**14
ROW_BYTES = 32  # a program takes groups until a pixel's channels fill a sector of memory
VALUES_A_THREAD = 32  # that stay in registers; twice as many where 16 warps, hence 128 registers a thread, do not suffice
MOST_WARPS = 16
LOOP_BLOCK, LOOP_WARPS = 2048, 16  # elements at a time of a group that does not, one quad a thread


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    groups: int,
    eps: float,
    image_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    scale: float = 1.0,
    silu: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fused `group_norm_silu_ref`; h has its bits, y agrees to rounding. Differentiable once, in `x` and `residual`.

    Neither the batch nor an image's place in it changes a bit of a result. One compilation per shape of an image.

    Args:
        x: Features, float32 (batch, channels, height, width), contiguous or channels_last, fewer than 2³¹ elements an image.
        weight, bias: float32 (channels,).
        groups: Divides the channels.
        eps: Added to the variance, at least 0.
        image_bias: Added to all pixels of an image, float32 (batch, channels) or (1, channels); None leaves it out.
        residual: Added, like `x`, in the same memory format; None leaves it out.
        scale: What the sum is multiplied by.
        silu: Whether y is silu(n̂) or n̂.

    Returns:
        h and y, in the memory format of `x`. Where nothing is added and `scale` is 1, h is `x` itself. Squares of h − mean
        whose sum exceeds float32 make the group NaN.

    Raises:
        TypeError, ValueError: for tensors that do not fit each other.
        RuntimeError: if weight, bias or image_bias requires a gradient, or for CUDA tensors without Triton.
    """
    h, y = _group_norm_silu(x, weight, bias, image_bias, residual, groups, eps, scale, silu)
    return (h if _adds(image_bias, residual, scale) else x), y


# Returns new tensors: the caching allocator's pool of a captured graph owns them, and a functional graph can reorder them.
# An operator may not return its argument, so h is an empty (0,) where it would be `x`.
@library.custom_op(
    "coupfast::group_norm_silu",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor weight, Tensor bias, Tensor? image_bias, Tensor? residual, int groups, float eps, float scale, "
    "bool silu) -> (Tensor, Tensor)",
)
def _group_norm_silu(x, weight, bias, image_bias, residual, groups, eps, scale, silu):
    """`group_norm_silu` as PyTorch's dispatcher knows it. On the CPU: the definition."""
    layout = _check(x, weight, bias, groups, eps, scale, image_bias=image_bias, like={"residual": residual})
    h, y = group_norm_silu_ref(
        x, weight, bias, groups=groups, eps=eps, image_bias=image_bias, residual=residual, scale=scale, silu=silu
    )
    h = h.contiguous(memory_format=layout) if _adds(image_bias, residual, scale) else x.new_empty(0)
    return h, y.contiguous(memory_format=layout)


@_group_norm_silu.register_fake
def _(x, weight, bias, image_bias, residual, groups, eps, scale, silu):
    _check(x, weight, bias, groups, eps, scale, image_bias=image_bias, like={"residual": residual})
    h = torch.empty_like(x) if _adds(image_bias, residual, scale) else x.new_empty(0)
    return h, torch.empty_like(x)


def group_norm_statistics(
    x: torch.Tensor,
    *,
    groups: int,
    eps: float,
    image_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fused `group_norm_statistics_ref`, for a convolution that norms what it reads; not differentiable.

    Args:
        x, groups, eps, image_bias, residual, scale: As in `group_norm_silu`.

    Returns:
        h as `group_norm_silu` gives it, to the bit, and the statistics that it norms with, which `group_norm_statistics_ref`
        describes.

    Raises:
        TypeError, ValueError: for tensors that do not fit each other.
        RuntimeError: for CUDA tensors without Triton.
    """
    h, statistics = _group_norm_statistics(x, image_bias, residual, groups, eps, scale)
    return (h if _adds(image_bias, residual, scale) else x), statistics


@library.custom_op(
    "coupfast::group_norm_statistics",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor? image_bias, Tensor? residual, int groups, float eps, float scale) -> (Tensor, Tensor)",
)
def _group_norm_statistics(x, image_bias, residual, groups, eps, scale):
    """`group_norm_statistics` as PyTorch's dispatcher knows it. On the CPU: the definition."""
    layout = _check(x, None, None, groups, eps, scale, image_bias=image_bias, like={"residual": residual})
    h, statistics = group_norm_statistics_ref(
        x, groups=groups, eps=eps, image_bias=image_bias, residual=residual, scale=scale
    )
    return h.contiguous(memory_format=layout) if _adds(image_bias, residual, scale) else x.new_empty(0), statistics


@_group_norm_statistics.register_fake
def _(x, image_bias, residual, groups, eps, scale):
    _check(x, None, None, groups, eps, scale, image_bias=image_bias, like={"residual": residual})
    h = torch.empty_like(x) if _adds(image_bias, residual, scale) else x.new_empty(0)
    return h, x.new_empty(len(x), 3, groups)


@library.custom_op(
    "coupfast::group_norm_silu_vjp",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor h, Tensor gy, Tensor? gh, Tensor weight, Tensor bias, int groups, float eps, float scale, bool silu) "
    "-> Tensor",
)
def _group_norm_silu_vjp(h, gy, gh, weight, bias, groups, eps, scale, silu):
    """The transpose, which `group_norm_silu` differentiates to. On the CPU: the definition."""
    layout = _check(h, weight, bias, groups, eps, scale, like={"gy": gy, "gh": gh}, name="h")
    gx = group_norm_silu_vjp_ref(h, gy, gh, weight, bias, groups=groups, eps=eps, scale=scale, silu=silu)
    return gx.contiguous(memory_format=layout)


@_group_norm_silu_vjp.register_fake
def _(h, gy, gh, weight, bias, groups, eps, scale, silu):
    _check(h, weight, bias, groups, eps, scale, like={"gy": gy, "gh": gh}, name="h")
    return torch.empty_like(h)


def _setup_context(ctx, inputs, output):
    x, weight, bias, image_bias, residual, groups, eps, scale, silu = inputs
    for name, index in (("weight", 1), ("bias", 2), ("image_bias", 3)):
        if ctx.needs_input_grad[index]:
            raise RuntimeError(
                f"group_norm_silu is differentiable in `x` and `residual` only, and `{name}` requires a gradient; freeze the "
                f"network (requires_grad_(False)) or give `{name}.detach()`"
            )
    ctx.adds = _adds(image_bias, residual, scale)
    ctx.save_for_backward(output[0] if ctx.adds else x, weight, bias)
    ctx.options = (groups, eps, scale, silu)
    ctx.set_materialize_grads(False)  # an h that nobody uses has no gradient, and zeros would be read


def _backward(ctx, gh, gy):
    h, weight, bias = ctx.saved_tensors
    groups, eps, scale, silu = ctx.options
    gh = gh if ctx.adds else None  # else that of the empty tensor; what comes through x is no business of the operator's
    if gy is None:
        gx = None if gh is None else gh * scale
    else:
        layout = _layout({"h": h})
        gy = gy.contiguous(memory_format=layout)
        gh = None if gh is None else gh.contiguous(memory_format=layout)
        gx = _group_norm_silu_vjp(h, gy, gh, weight, bias, groups, eps, scale, silu)
    return (
        gx if ctx.needs_input_grad[0] else None,
        None,
        None,
        None,
        gx if ctx.needs_input_grad[4] else None,
        None,
        None,
        None,
        None,
    )


_group_norm_silu.register_autograd(_backward, setup_context=_setup_context)


@_group_norm_silu.register_kernel("cuda")
def _launch(x, weight, bias, image_bias, residual, groups, eps, scale, silu):
    layout = _check(x, weight, bias, groups, eps, scale, image_bias=image_bias, like={"residual": residual})
    _needs_triton()
    h = torch.empty_like(x) if _adds(image_bias, residual, scale) else None
    y = torch.empty_like(x)
    _launch_norm(h, y, None, x, weight, bias, image_bias, residual, groups, eps, scale, silu, layout)
    return x.new_empty(0) if h is None else h, y


@_group_norm_statistics.register_kernel("cuda")
def _launch_statistics(x, image_bias, residual, groups, eps, scale):
    layout = _check(x, None, None, groups, eps, scale, image_bias=image_bias, like={"residual": residual})
    _needs_triton()
    h = torch.empty_like(x) if _adds(image_bias, residual, scale) else None
    statistics = torch.empty(len(x), 3, groups, dtype=x.dtype, device=x.device)
    _launch_norm(h, None, statistics, x, None, None, image_bias, residual, groups, eps, scale, False, layout)
    return x.new_empty(0) if h is None else h, statistics


def _launch_norm(h, y, statistics, x, weight, bias, image_bias, residual, groups, eps, scale, silu, layout):
    """Writes `h`, and `y` or `statistics`."""
    if x.numel() > 0:
        grid, shape, options = _launch_shape(x, groups, layout, values=1)
        kernel = _group_norm_loop_kernel if "BLOCK" in shape else _group_norm_kernel
        # The current device, not the tensors', is where Triton launches.
        with torch.cuda.device_of(x):
            kernel[grid](
                h,
                y,
                statistics,
                x,
                weight,
                bias,
                image_bias,
                residual,
                image_bias_stride=0 if image_bias is None or len(image_bias) == 1 else x.shape[1],
                scale=scale,
                eps=eps,
                SILU=silu,
                **shape,
                **options,
            )


@_group_norm_silu_vjp.register_kernel("cuda")
def _launch_vjp(h, gy, gh, weight, bias, groups, eps, scale, silu):
    layout = _check(h, weight, bias, groups, eps, scale, like={"gy": gy, "gh": gh}, name="h")
    _needs_triton()
    gx = torch.empty_like(h)
    if h.numel() > 0:
        grid, shape, options = _launch_shape(h, groups, layout, values=2)
        kernel = _group_norm_vjp_loop_kernel if "BLOCK" in shape else _group_norm_vjp_kernel
        with torch.cuda.device_of(h):
            kernel[grid](gx, h, gy, gh, weight, bias, scale=scale, eps=eps, SILU=silu, **shape, **options)
    return gx


def loops(channels: int, pixels: int, groups: int) -> bool:
    """Whether a group of such images is too large for the registers of a program, and is read several times."""
    return triton.next_power_of_2(pixels) * triton.next_power_of_2(channels // groups) > MOST_IN_REGISTERS


def _launch_shape(x, groups, layout, *, values):
    """Grid, constants and options of a launch that keeps `values` floats an element; a function of the image's shape alone."""
    channels, pixels, last = x.shape[1], x.shape[2] * x.shape[3], layout is torch.channels_last
    group_channels, tiles = channels // groups, groups
    shape = dict(PIXELS=pixels, CHANNELS=channels, GROUP_CHANNELS=group_channels, CHANNELS_LAST=last)
    if loops(channels, pixels, groups):
        shape |= dict(BLOCK=LOOP_BLOCK)
        num_warps = LOOP_WARPS
    else:
        block_p, block_c = triton.next_power_of_2(pixels), triton.next_power_of_2(group_channels)
        block_g = 1
        while last and 4 * group_channels * block_g < ROW_BYTES and groups % (2 * block_g) == 0:
            if 2 * block_g * block_p * block_c > MOST_IN_REGISTERS:
                break
            block_g *= 2
        tiles = groups // block_g
        shape |= dict(BLOCK_P=block_p, BLOCK_G=block_g, BLOCK_C=block_c)
        num_warps = min(max(values * block_p * block_g * block_c // (32 * VALUES_A_THREAD), 1), MOST_WARPS)
    # No contraction: h − mean would contain the product with `scale` unrounded, hence another h than the one that is stored
    # and that the transpose reads. What it would save is hidden behind memory.
    options = dict(num_warps=num_warps, enable_fp_fusion=False)
    return (len(x) * tiles,), shape | dict(TILES=tiles), options


def _needs_triton() -> None:
    if triton is None:
        raise RuntimeError("group_norm_silu on CUDA needs Triton, which is not installed; `pip install triton` (Linux)")


def _adds(image_bias, residual, scale) -> bool:
    return image_bias is not None or residual is not None or scale != 1.0


def _check(x, weight, bias, groups, eps, scale, *, like, image_bias=None, name="x") -> torch.memory_format:
    """The memory format that all images share, after checking that everything fits; reads no values."""
    images = {name: x} | {other: tensor for other, tensor in like.items() if tensor is not None}
    words = {"weight": weight, "bias": bias, "image_bias": image_bias}
    words = {other: tensor for other, tensor in words.items() if tensor is not None}
    for other, tensor in (images | words).items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"group_norm_silu takes float32, `{other}` is {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"`{name}` is on {x.device}, `{other}` on {tensor.device}; a kernel reads from its own device")
    if x.dim() != 4:
        raise ValueError(f"`{name}` has shape (batch, channels, height, width), got {tuple(x.shape)}")
    batch, channels = x.shape[0], x.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"`groups` must divide the channels, got {groups} groups of {channels} channels")
    if x.shape[1] * x.shape[2] * x.shape[3] >= 2**31:
        raise ValueError(f"an image has fewer than 2**31 elements, `{name}` has shape {tuple(x.shape)}; take it in parts")
    if not eps >= 0.0 or not math.isfinite(scale):
        raise ValueError(f"`eps` is at least 0 and `scale` finite, got {eps} and {scale}")
    for other, tensor in images.items():
        if tensor.shape != x.shape:
            raise ValueError(f"`{name}` is {tuple(x.shape)}, `{other}` is {tuple(tensor.shape)}; they must agree")
    for other, tensor in words.items():
        shapes = [(channels,)] if other != "image_bias" else [(batch, channels), (1, channels)]
        if tuple(tensor.shape) not in shapes or not tensor.is_contiguous():
            raise ValueError(
                f"`{other}` must be contiguous of shape {' or '.join(map(str, shapes))}, got shape {tuple(tensor.shape)}, "
                f"strides {tensor.stride()}"
            )
    return _layout(images)


def _layout(images) -> torch.memory_format:
    # Images of one channel or of one pixel are both; then the addresses are the same, too.
    for layout in (torch.channels_last, torch.contiguous_format):
        if all(tensor.is_contiguous(memory_format=layout) for tensor in images.values()):
            return layout
    strides = ", ".join(f"`{name}` {tensor.stride()}" for name, tensor in images.items())
    raise ValueError(
        f"images must be all contiguous or all channels_last, got strides {strides}; call .contiguous(memory_format=…)"
    )
