"""Convolutions, as the kernels of this folder have to compute them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from coupfast_kernels.group_norm.definition import silu_normed_ref

#: Relative error, in the Euclidean norm and against float64, of a convolution that passes for float32: what Winograd's F(4 × 4)
#: makes of a layer at its usual points. Three TF32 products for one leave out 2⁻²¹ of each at most, and float32 sums of 4608
#: terms of random signs round by less: both stay well below. It refuses what is wrong, and plain TF32.
FLOAT32_LIMIT = 1e-5
#: The same of one TF32 product, of factors with 11 bits. Random data lose 3e-4 of the result's norm where they are rounded,
#: 8e-4 where they are truncated, which tensor cores may do to operands that nobody rounded (`tests/test_cuda_calibration.py`
#: computes both).
TF32_LIMIT = 2e-3


def conv2d_ref(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, stride: int = 1) -> torch.Tensor:
    """The definition: PyTorch's convolution with zero padding kernel // 2, in the dtype of `x`."""
    return F.conv2d(x, weight, bias, stride=stride, padding=(weight.shape[2] // 2, weight.shape[3] // 2))


def check_weight3x3(weight: torch.Tensor) -> None:
    """TypeError, ValueError unless these are float32 weights of a 3 × 3 convolution."""
    if weight.dtype != torch.float32:
        raise TypeError(f"conv3x3 takes float32, `weight` is {weight.dtype}")
    if weight.dim() != 4 or tuple(weight.shape[2:]) != (3, 3):
        raise ValueError(f"`weight` has shape (out_channels, in_channels, 3, 3), got {tuple(weight.shape)}")


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
        image_bias: Shape (batch, out_channels), or (1, out_channels) for all images, for instance a time embedding.
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


def conv3x3_normed_ref(
    x: torch.Tensor,
    statistics: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    image_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """`conv3x3_ref` of silu(GroupNorm(x)), which pads with zeros behind the SiLU.

    Args:
        statistics: Of `x`, shape (batch, 3, groups), as `group_norm_statistics_ref` gives them.
        norm_weight, norm_bias: Of each channel, (in_channels,).
    """
    normed = silu_normed_ref(x, statistics, norm_weight, norm_bias)
    return conv3x3_ref(normed, weight, bias, image_bias=image_bias, residual=residual, scale=scale)


#: F(4 × 4, 3 × 3) is interpolated at 0, at plus and minus these, and at infinity. They halve the error of the usual 1 and 2,
#: and all constants of the transforms of maps are exact in binary (docs/how/kernels-cpu.md, `bench/winograd_points.py`).
WINOGRAD_POINTS = (5 / 8, 3 / 2)


def winograd_matrices(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Aᵀ (4 × 6), G (6 × 3) and Bᵀ (6 × 6) with Aᵀ[(G w Gᵀ) ∘ (Bᵀ d B)]A the 4 × 4 outputs of w on a tile d of 6 × 6."""
    a, b = WINOGRAD_POINTS
    points = (0.0, a, -a, b, -b)
    products = [math.prod(p - q for q in points if q != p) for p in points]
    outputs = [[p**i for p in points] + [float(i == 3)] for i in range(4)]
    weights = [[p**i / product for i in range(3)] for p, product in zip(points, products, strict=True)] + [[0.0, 0.0, 1.0]]
    both, all_ = a * a + b * b, (a * b) ** 2
    inputs = [
        [all_, 0.0, -both, 0.0, 1.0, 0.0],
        [0.0, -a * b * b, -b * b, a, 1.0, 0.0],
        [0.0, a * b * b, -b * b, -a, 1.0, 0.0],
        [0.0, -b * a * a, -a * a, b, 1.0, 0.0],
        [0.0, b * a * a, -a * a, -b, 1.0, 0.0],
        [0.0, all_, 0.0, -both, 0.0, 1.0],
    ]
    made = (torch.tensor(matrix, dtype=torch.float64).to(dtype) for matrix in (outputs, weights, inputs))
    return next(made), next(made), next(made)


def winograd3x3_ref(
    x: torch.Tensor, weight: torch.Tensor, matrices: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
) -> torch.Tensor:
    """`conv3x3_ref` without anything added, by F(4 × 4, 3 × 3), in the dtype of `x`.

    Args:
        matrices: Others than `winograd_matrices`: with their absolute values, and those of `x` and `weight`, the result is what
            bounds of rounding are multiples of.
    """
    a, g, b = winograd_matrices(x.dtype) if matrices is None else matrices
    batch, channels, height, width = x.shape
    rows, columns = -(-height // 4), -(-width // 4)
    padded = F.pad(x, (1, 4 * columns + 1 - width, 1, 4 * rows + 1 - height))
    tiles = padded.unfold(2, 6, 4).unfold(3, 6, 4)  # [batch, channels, rows, columns, 6, 6]
    u, v = g @ weight @ g.T, b @ tiles @ b.T
    y = a @ torch.einsum("nchwij,ocij->nohwij", v, u) @ a.T
    return y.permute(0, 1, 2, 4, 3, 5).reshape(batch, -1, 4 * rows, 4 * columns)[:, :, :height, :width]


def sum_parts_ref(
    parts: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    image_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """The parts of a convolution's sum, [parts, batch, out_channels, height, width], and what `conv3x3_ref` adds to it.

    In one order, from the left: (bias + image_bias + parts[0] + parts[1] + … + residual) · scale.
    """
    y = torch.zeros_like(parts[0])
    if bias is not None:
        y = y + bias[:, None, None]
    if image_bias is not None:
        y = y + image_bias[:, :, None, None]
    for part in parts:
        y = y + part
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


def tf32_halves(x: torch.Tensor) -> torch.Tensor:
    """big = TF32(x) and small = TF32(x − big), stacked: their sum is off by 2⁻²³ of x at most."""
    big = round_to_tf32(x)
    return torch.stack([big, round_to_tf32(x - big)])


def tf32x3_ref(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A model of what `algorithm="tf32x3"` computes before anything is added: each product from three of TF32 numbers.

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
