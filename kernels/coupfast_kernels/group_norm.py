"""GroupNorm with SiLU behind it and a sum in front of it, and its transpose with respect to the input.

    h  = (x + image_bias + residual) · scale                     each optional; none of them and scale 1: h is x
    n  = (h − mean(h)) / sqrt(var(h) + eps)                      over the channels of a group and all pixels of an image
    y  = silu(n · weight + bias)                                 or without silu
    gx = scale · (gh + (gn − mean(gn) − n mean(gn n)) / sqrt(var(h) + eps)),      gn = weight · ∂L/∂n̂,  n̂ = n · weight + bias

All that lies between two convolutions of a DDPM++ residual block: the time embedding (`image_bias`), or the block's end and
the next one's beginning (`residual`, scale 1/√2). Wu & He 2018 (GroupNorm), Song et al. 2021 (the block).

Memory-bound: a group is read once, stays in registers between its statistics and its output, and is written once; judge it
by its share of copy bandwidth. Groups too large for that are read three times (the transpose: four). Weights get no gradient.
"""

from __future__ import annotations

import math

import torch
from torch import library

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton exists for Linux only; the definitions and the CPU need none of it
    triton = None

#: Elements of one program's groups, padded to powers of two, that stay in registers: 2¹⁴ floats are a quarter of the 2¹⁶
#: registers of an SM, and the transpose holds two of them an element.
MOST_IN_REGISTERS = 2**14
ROW_BYTES = 32  # a program takes groups until a pixel's channels fill a sector of memory
VALUES_A_THREAD = 32  # that stay in registers; twice as many where 16 warps, hence 128 registers a thread, do not suffice
MOST_WARPS = 16
LOOP_BLOCK, LOOP_WARPS = 2048, 16  # elements at a time of a group that does not, one quad a thread


def group_norm_silu_ref(
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
    """The definition: plain PyTorch, any device, any dtype.

    Args:
        x: Features, (batch, channels, height, width).
        weight, bias: Of each channel, (channels,).
        groups: Divides the channels.
        eps: Added to the variance.
        image_bias: Added to all pixels of an image, (batch, channels) or (1, channels).
        residual: Added, like `x`.
        scale: What the sum is multiplied by, rounded once to the dtype of `x`.
        silu: Whether y is silu(n̂) or n̂.

    Returns:
        h and y, like `x`; h is `x` itself where nothing is added and `scale` is 1.
    """
    h = x
    if image_bias is not None:
        h = h + image_bias[:, :, None, None]
    if residual is not None:
        h = h + residual
    if scale != 1.0:
        h = h * scale
    n, _ = _normalised(h, groups, eps)
    y = n * weight[:, None, None] + bias[:, None, None]
    return h, y * torch.sigmoid(y) if silu else y


def group_norm_silu_vjp_ref(
    h: torch.Tensor,
    gy: torch.Tensor,
    gh: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    groups: int,
    eps: float,
    scale: float = 1.0,
    silu: bool = True,
) -> torch.Tensor:
    """The definition of the transpose: plain PyTorch, any device, any dtype.

    Args:
        h: As `group_norm_silu_ref` returned it.
        gy, gh: ∂L/∂y and ∂L/∂h, like `h`; None leaves the latter out.

    Returns:
        ∂L/∂x, which is ∂L/∂residual too.
    """
    n, deviation = _normalised(h, groups, eps)
    gn = gy * weight[:, None, None]
    if silu:
        a = n * weight[:, None, None] + bias[:, None, None]
        s = torch.sigmoid(a)
        gn = gn * (s * (1.0 + a * (1.0 - s)))
    grouped, n = (t.reshape(len(h), groups, -1) for t in (gn, n))  # [batch, groups, elements of a group]
    g = (grouped - grouped.mean(2, keepdim=True) - n * (grouped * n).mean(2, keepdim=True)) / deviation
    g = g.reshape(h.shape)
    if gh is not None:
        g = g + gh
    return g * scale


def _normalised(h: torch.Tensor, groups: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """n, like `h`, and sqrt(var + eps), [batch, groups, 1]."""
    grouped = h.reshape(len(h), groups, math.prod(h.shape[1:]) // groups)
    centred = grouped - grouped.mean(2, keepdim=True)
    deviation = torch.sqrt(centred.square().mean(2, keepdim=True) + eps)
    return (centred / deviation).reshape(h.shape), deviation


if triton is not None:

    @triton.jit
    def _tile_kernel(
        tile,
        PIXELS: tl.constexpr,
        CHANNELS: tl.constexpr,
        GROUP_CHANNELS: tl.constexpr,
        CHANNELS_LAST: tl.constexpr,
        BLOCK_P: tl.constexpr,
        BLOCK_G: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        """Of BLOCK_G whole groups: offsets in the image, what exists of them, channels, which exist."""
        p = tl.arange(0, BLOCK_P)[:, None, None]
        g = tl.arange(0, BLOCK_G)[None, :, None]
        c = tl.arange(0, BLOCK_C)[None, None, :]
        channel = (tile * BLOCK_G + g) * GROUP_CHANNELS + c  # [1, BLOCK_G, BLOCK_C]
        if CHANNELS_LAST:
            offset = p * CHANNELS + channel
        else:
            offset = channel * PIXELS + p
        # Channels have a mask of their own, so that the pixels of a thread share what it reads of them.
        known = (c < GROUP_CHANNELS) & (g >= 0)
        return offset, (p < PIXELS) & known, channel, known  # [BLOCK_P, BLOCK_G, BLOCK_C] twice, [1, BLOCK_G, BLOCK_C] twice

    @triton.jit
    def _part_kernel(
        group,
        start,
        PIXELS: tl.constexpr,
        CHANNELS: tl.constexpr,
        GROUP_CHANNELS: tl.constexpr,
        CHANNELS_LAST: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Elements start … start + BLOCK of one group, as they lie in memory: offsets, channels, and what exists; [BLOCK]."""
        i = start + tl.arange(0, BLOCK)
        if CHANNELS_LAST:
            channel = group * GROUP_CHANNELS + i % GROUP_CHANNELS
            offset = i // GROUP_CHANNELS * CHANNELS + channel
        else:
            channel = group * GROUP_CHANNELS + i // PIXELS
            offset = group * (GROUP_CHANNELS * PIXELS) + i
        return offset, channel, i < GROUP_CHANNELS * PIXELS

    @triton.jit
    def _h_kernel(x_ptr, image_bias_ptr, residual_ptr, scale, offset, mask, channel, known):
        """h of what exists; each operation rounded, in the order of the definition."""
        h = tl.load(x_ptr + offset, mask=mask, other=0.0)
        if image_bias_ptr is not None:
            h = h + tl.load(image_bias_ptr + channel, mask=known, other=0.0)
        if residual_ptr is not None:
            h = h + tl.load(residual_ptr + offset, mask=mask, other=0.0)
        return h * scale

    @triton.jit
    def _sum_kernel(t):
        """Sums over pixels, then over the channels of a group: [BLOCK_P, BLOCK_G, BLOCK_C] → [1, BLOCK_G, 1]."""
        return tl.sum(tl.sum(t, axis=0), axis=1)[None, :, None]

    @triton.jit
    def _inverse_deviation_kernel(squares, shift, eps):
        """1 / sqrt(var + eps) from the means of d² and of d, for d = h less nearly its mean; NaN where squares overflowed."""
        # Rounding can take the difference below 0 by as much as its error, with eps = 0 below the root's domain.
        inverse = tl.rsqrt(tl.maximum(squares - shift * shift, 0.0) + eps)
        return tl.where(squares < float("inf"), inverse, float("nan"))

    @triton.jit
    def _sigmoid_kernel(a):
        return 1.0 / (1.0 + tl.exp(-a))

    @triton.jit
    def _gn_kernel(gy_ptr, offset, mask, n, weight, bias, SILU: tl.constexpr):
        """∂L/∂n, 0 where nothing exists."""
        gn = tl.load(gy_ptr + offset, mask=mask, other=0.0) * weight
        if SILU:
            a = n * weight + bias
            s = _sigmoid_kernel(a)
            gn = gn * (s * (1.0 + a * (1.0 - s)))
        return gn

    @triton.jit
    def _group_norm_kernel(
        h_ptr,
        y_ptr,
        x_ptr,
        weight_ptr,
        bias_ptr,
        image_bias_ptr,
        residual_ptr,
        image_bias_stride,
        scale,
        eps,
        TILES: tl.constexpr,
        PIXELS: tl.constexpr,
        CHANNELS: tl.constexpr,
        GROUP_CHANNELS: tl.constexpr,
        CHANNELS_LAST: tl.constexpr,
        SILU: tl.constexpr,
        BLOCK_P: tl.constexpr,
        BLOCK_G: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        """One program takes BLOCK_G groups of one image, TILES programs an image.

        No spills; registers leave an SM at least 512 threads on the maps of DDPM++ deep (sm_80 … sm_100).
        """
        image, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
        start = image.to(tl.int64) * (PIXELS * CHANNELS)
        if image_bias_ptr is not None:
            image_bias_ptr += image.to(tl.int64) * image_bias_stride
        if residual_ptr is not None:
            residual_ptr += start
        offset, exists, channel, known = _tile_kernel(
            tile, PIXELS, CHANNELS, GROUP_CHANNELS, CHANNELS_LAST, BLOCK_P, BLOCK_G, BLOCK_C
        )
        inverse_count: tl.constexpr = 1.0 / (PIXELS * GROUP_CHANNELS)

        h = _h_kernel(x_ptr + start, image_bias_ptr, residual_ptr, scale, offset, exists, channel, known)
        if h_ptr is not None:
            tl.store(h_ptr + start + offset, h, mask=exists)
        d = tl.where(exists, h - _sum_kernel(h) * inverse_count, 0.0)
        # The mean's own rounding, which a large mean makes large, is seen in d, whose mean would be 0 without it.
        shift = _sum_kernel(d) * inverse_count
        inverse = _inverse_deviation_kernel(_sum_kernel(d * d) * inverse_count, shift, eps)
        weight = tl.load(weight_ptr + channel, mask=known, other=0.0)
        bias = tl.load(bias_ptr + channel, mask=known, other=0.0)
        y = (d - shift) * inverse * weight + bias
        if SILU:
            y = y * _sigmoid_kernel(y)
        tl.store(y_ptr + start + offset, y, mask=exists)

    @triton.jit
    def _group_norm_vjp_kernel(
        gx_ptr,
        h_ptr,
        gy_ptr,
        gh_ptr,
        weight_ptr,
        bias_ptr,
        scale,
        eps,
        TILES: tl.constexpr,
        PIXELS: tl.constexpr,
        CHANNELS: tl.constexpr,
        GROUP_CHANNELS: tl.constexpr,
        CHANNELS_LAST: tl.constexpr,
        SILU: tl.constexpr,
        BLOCK_P: tl.constexpr,
        BLOCK_G: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        """One program takes BLOCK_G groups of one image, TILES programs an image.

        No spills; registers leave an SM at least 512 threads on the maps of DDPM++ deep (sm_80 … sm_100).
        """
        image, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
        start = image.to(tl.int64) * (PIXELS * CHANNELS)
        offset, exists, channel, known = _tile_kernel(
            tile, PIXELS, CHANNELS, GROUP_CHANNELS, CHANNELS_LAST, BLOCK_P, BLOCK_G, BLOCK_C
        )
        inverse_count: tl.constexpr = 1.0 / (PIXELS * GROUP_CHANNELS)

        h = tl.load(h_ptr + start + offset, mask=exists, other=0.0)
        d = tl.where(exists, h - _sum_kernel(h) * inverse_count, 0.0)
        shift = _sum_kernel(d) * inverse_count
        inverse = _inverse_deviation_kernel(_sum_kernel(d * d) * inverse_count, shift, eps)
        n = (d - shift) * inverse
        weight = tl.load(weight_ptr + channel, mask=known, other=0.0)
        bias = tl.load(bias_ptr + channel, mask=known, other=0.0)
        gn = _gn_kernel(gy_ptr + start, offset, exists, n, weight, bias, SILU)
        mean, slope = _sum_kernel(gn) * inverse_count, _sum_kernel(gn * n) * inverse_count
        g = (gn - mean - n * slope) * inverse
        if gh_ptr is not None:
            g = g + tl.load(gh_ptr + start + offset, mask=exists, other=0.0)
        tl.store(gx_ptr + start + offset, g * scale, mask=exists)

    @triton.jit
    def _group_norm_loop_kernel(
        h_ptr,
        y_ptr,
        x_ptr,
        weight_ptr,
        bias_ptr,
        image_bias_ptr,
        residual_ptr,
        image_bias_stride,
        scale,
        eps,
        TILES: tl.constexpr,
        PIXELS: tl.constexpr,
        CHANNELS: tl.constexpr,
        GROUP_CHANNELS: tl.constexpr,
        CHANNELS_LAST: tl.constexpr,
        SILU: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """`_group_norm_kernel` for a group that registers do not hold: three times over it, BLOCK elements at a time.

        No spills; registers leave an SM at least 512 threads.
        """
        image, group = tl.program_id(0) // TILES, tl.program_id(0) % TILES
        start = image.to(tl.int64) * (PIXELS * CHANNELS)
        if image_bias_ptr is not None:
            image_bias_ptr += image.to(tl.int64) * image_bias_stride
        if residual_ptr is not None:
            residual_ptr += start
        x_ptr += start
        count: tl.constexpr = PIXELS * GROUP_CHANNELS
        inverse_count: tl.constexpr = 1.0 / count

        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, count, BLOCK):
            offset, channel, exists = _part_kernel(group, first, PIXELS, CHANNELS, GROUP_CHANNELS, CHANNELS_LAST, BLOCK)
            total += _h_kernel(x_ptr, image_bias_ptr, residual_ptr, scale, offset, exists, channel, exists)
        mean = tl.sum(total) * inverse_count

        total, squares = tl.zeros((BLOCK,), dtype=tl.float32), tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, count, BLOCK):
            offset, channel, exists = _part_kernel(group, first, PIXELS, CHANNELS, GROUP_CHANNELS, CHANNELS_LAST, BLOCK)
            h = _h_kernel(x_ptr, image_bias_ptr, residual_ptr, scale, offset, exists, channel, exists)
            d = tl.where(exists, h - mean, 0.0)
            total += d
            squares += d * d
        shift = tl.sum(total) * inverse_count
        inverse = _inverse_deviation_kernel(tl.sum(squares) * inverse_count, shift, eps)

        for first in range(0, count, BLOCK):
            offset, channel, exists = _part_kernel(group, first, PIXELS, CHANNELS, GROUP_CHANNELS, CHANNELS_LAST, BLOCK)
            h = _h_kernel(x_ptr, image_bias_ptr, residual_ptr, scale, offset, exists, channel, exists)
            if h_ptr is not None:
                tl.store(h_ptr + start + offset, h, mask=exists)
            weight = tl.load(weight_ptr + channel, mask=exists, other=0.0)
            bias = tl.load(bias_ptr + channel, mask=exists, other=0.0)
            y = (h - mean - shift) * inverse * weight + bias
            if SILU:
                y = y * _sigmoid_kernel(y)
            tl.store(y_ptr + start + offset, y, mask=exists)

    @triton.jit
    def _group_norm_vjp_loop_kernel(
        gx_ptr,
        h_ptr,
        gy_ptr,
        gh_ptr,
        weight_ptr,
        bias_ptr,
        scale,
        eps,
        TILES: tl.constexpr,
        PIXELS: tl.constexpr,
        CHANNELS: tl.constexpr,
        GROUP_CHANNELS: tl.constexpr,
        CHANNELS_LAST: tl.constexpr,
        SILU: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """`_group_norm_vjp_kernel` for a group that registers do not hold: h is read four times, gy twice.

        No spills; registers leave an SM at least 512 threads.
        """
        image, group = tl.program_id(0) // TILES, tl.program_id(0) % TILES
        start = image.to(tl.int64) * (PIXELS * CHANNELS)
        h_ptr += start
        gy_ptr += start
        count: tl.constexpr = PIXELS * GROUP_CHANNELS
        inverse_count: tl.constexpr = 1.0 / count

        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, count, BLOCK):
            offset, channel, exists = _part_kernel(group, first, PIXELS, CHANNELS, GROUP_CHANNELS, CHANNELS_LAST, BLOCK)
            total += tl.load(h_ptr + offset, mask=exists, other=0.0)
        mean_h = tl.sum(total) * inverse_count

        total, squares = tl.zeros((BLOCK,), dtype=tl.float32), tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, count, BLOCK):
            offset, channel, exists = _part_kernel(group, first, PIXELS, CHANNELS, GROUP_CHANNELS, CHANNELS_LAST, BLOCK)
            d = tl.where(exists, tl.load(h_ptr + offset, mask=exists, other=0.0) - mean_h, 0.0)
            total += d
            squares += d * d
        shift = tl.sum(total) * inverse_count
        inverse = _inverse_deviation_kernel(tl.sum(squares) * inverse_count, shift, eps)

        total, products = tl.zeros((BLOCK,), dtype=tl.float32), tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, count, BLOCK):
            offset, channel, exists = _part_kernel(group, first, PIXELS, CHANNELS, GROUP_CHANNELS, CHANNELS_LAST, BLOCK)
            n = (tl.load(h_ptr + offset, mask=exists, other=0.0) - mean_h - shift) * inverse
            weight = tl.load(weight_ptr + channel, mask=exists, other=0.0)
            bias = tl.load(bias_ptr + channel, mask=exists, other=0.0)
            gn = _gn_kernel(gy_ptr, offset, exists, n, weight, bias, SILU)
            total += gn
            products += gn * n
        mean, slope = tl.sum(total) * inverse_count, tl.sum(products) * inverse_count

        for first in range(0, count, BLOCK):
            offset, channel, exists = _part_kernel(group, first, PIXELS, CHANNELS, GROUP_CHANNELS, CHANNELS_LAST, BLOCK)
            n = (tl.load(h_ptr + offset, mask=exists, other=0.0) - mean_h - shift) * inverse
            weight = tl.load(weight_ptr + channel, mask=exists, other=0.0)
            bias = tl.load(bias_ptr + channel, mask=exists, other=0.0)
            gn = _gn_kernel(gy_ptr, offset, exists, n, weight, bias, SILU)
            g = (gn - mean - n * slope) * inverse
            if gh_ptr is not None:
                g = g + tl.load(gh_ptr + start + offset, mask=exists, other=0.0)
            tl.store(gx_ptr + start + offset, g * scale, mask=exists)


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
    if x.numel() > 0:
        grid, shape, options = _launch_shape(x, groups, layout, values=1)
        kernel = _group_norm_loop_kernel if "BLOCK" in shape else _group_norm_kernel
        # The current device, not the tensors', is where Triton launches.
        with torch.cuda.device_of(x):
            kernel[grid](
                h,
                y,
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
    return x.new_empty(0) if h is None else h, y


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
    words = {"weight": weight, "bias": bias} | ({} if image_bias is None else {"image_bias": image_bias})
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
