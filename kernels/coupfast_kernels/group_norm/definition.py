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
    h = _in_front(x, image_bias, residual, scale)
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


def group_norm_statistics_ref(
    x: torch.Tensor,
    *,
    groups: int,
    eps: float,
    image_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first half of `group_norm_silu_ref`, of which `silu_normed_ref` is the other: what is normed, and by what.

    Args:
        x, groups, eps, image_bias, residual, scale: As in `group_norm_silu_ref`.

    Returns:
        h, and of each image and group a mean, what it is off by (the mean of h less that mean), and 1 / sqrt(var + eps), shape
        (batch, 3, groups).
    """
    h = _in_front(x, image_bias, residual, scale)
    grouped = h.reshape(len(h), groups, math.prod(h.shape[1:]) // groups)
    mean = grouped.mean(2)
    d = grouped - mean[:, :, None]
    shift = d.mean(2)
    variance = d.square().mean(2) - shift.square()
    return h, torch.stack([mean, shift, 1.0 / torch.sqrt(variance.clamp(min=0.0) + eps)], dim=1)


def silu_normed_ref(h: torch.Tensor, statistics: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """silu(n · weight + bias) of what `group_norm_statistics_ref` gives, like `h`."""
    size = h.shape[1] // statistics.shape[2]
    mean, shift, inverse = statistics.repeat_interleave(size, dim=2)[:, :, :, None, None].unbind(1)
    y = (h - mean - shift) * inverse * weight[:, None, None] + bias[:, None, None]
    return y * torch.sigmoid(y)


def group_norm_affine_ref(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, groups: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """GroupNorm(x) = (x − subtract) · multiply + add, channel by channel: the definition of what a convolution takes in.

    Args:
        x, weight, bias, groups, eps: As in `group_norm_silu_ref`.

    Returns:
        subtract, multiply, add and 1 / sqrt(var + eps), each (batch, channels), in the dtype of `x`.
    """
    grouped = x.reshape(len(x), groups, -1)
    mean, (_, deviation) = grouped.mean(2, keepdim=True), _normalised(x, groups, eps)
    size = x.shape[1] // groups
    subtract, inverse = (t.expand(-1, -1, size).reshape(len(x), -1) for t in (mean, 1.0 / deviation))
    return subtract, inverse * weight, bias.expand(len(x), -1), inverse


def _in_front(
    x: torch.Tensor, image_bias: torch.Tensor | None, residual: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """h; `x` itself where nothing is added and `scale` is 1."""
    h = x
    if image_bias is not None:
        h = h + image_bias[:, :, None, None]
    if residual is not None:
        h = h + residual
    if scale != 1.0:
        h = h * scale
    return h


def _normalised(h: torch.Tensor, groups: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """n, like `h`, and sqrt(var + eps), [batch, groups, 1]."""
    grouped = h.reshape(len(h), groups, math.prod(h.shape[1:]) // groups)
    centred = grouped - grouped.mean(2, keepdim=True)
    deviation = torch.sqrt(centred.square().mean(2, keepdim=True) + eps)
    return (centred / deviation).reshape(h.shape), deviation
