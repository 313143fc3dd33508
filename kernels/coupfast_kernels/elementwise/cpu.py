"""Sums and masked maps in C++ on channels-last float32 maps (`csrc/norm.h`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from coupfast_kernels.operations import Masked, Operations, Sum


def sum_cpu(a: torch.Tensor, factor_a: float, b: torch.Tensor | None = None, factor_b: float = 0.0) -> torch.Tensor:
    """`sum_ref` of maps, channels last.

    Raises:
        ValueError: for tensors that do not fit each other.
    """
    maps = _maps(a=a, **({} if b is None else {"b": b}))
    y, (pixels, channels) = torch.empty_like(maps[0]), _rows(a)
    structure = Sum(pixels=pixels, channels=channels, factor_a=factor_a, factor_b=factor_b, y=y.data_ptr())
    structure.a_pixel = structure.b_pixel = structure.y_pixel = channels
    structure.a, structure.b = maps[0].data_ptr(), None if b is None else maps[1].data_ptr()
    Operations([structure]).run(torch.get_num_threads())
    return y


def masked_cpu(
    d: torch.Tensor,
    bits: torch.Tensor,
    multiply: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    factor: float = 0.0,
) -> torch.Tensor:
    """`masked_ref`, channels last, with the mask as `pack_mask` makes it.

    Raises:
        ValueError: for tensors that do not fit each other.
    """
    maps = _maps(d=d, **({} if residual is None else {"residual": residual}))
    y, (pixels, channels) = torch.empty_like(maps[0]), _rows(d)
    expected = (d.shape[0], *d.shape[2:], (channels + 7) // 8)
    if bits.dtype != torch.uint8 or tuple(bits.shape) != expected or not bits.is_contiguous():
        raise ValueError(f"`bits` is contiguous uint8 {expected}, got {bits.dtype} {tuple(bits.shape)}")
    if multiply is not None and (multiply.dtype != torch.float32 or tuple(multiply.shape) != (channels,)):
        raise ValueError(f"`multiply` is float32 with {channels} values, got {multiply.dtype} {tuple(multiply.shape)}")
    multiply = None if multiply is None else multiply.contiguous()
    structure = Masked(pixels=pixels, channels=channels, d=maps[0].data_ptr(), mask=bits.data_ptr(), y=y.data_ptr())
    structure.d_pixel = structure.y_pixel = structure.residual_pixel = channels
    structure.multiply = None if multiply is None else multiply.data_ptr()
    if residual is not None:
        structure.residual, structure.residual_factor = maps[1].data_ptr(), factor
    Operations([structure]).run(torch.get_num_threads())
    return y


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """bool (batch, channels, height, width) → uint8 (batch, height, width, bytes), the first channel in the lowest bit."""
    by_pixel = F.pad(mask.permute(0, 2, 3, 1), (0, -mask.shape[1] % 8)).unflatten(-1, (-1, 8)).to(torch.uint8)
    return (by_pixel << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8).contiguous()


def _maps(**maps: torch.Tensor) -> list[torch.Tensor]:
    first = next(iter(maps.values()))
    for name, tensor in maps.items():
        if tensor.dtype != torch.float32 or tensor.dim() != 4 or tensor.shape != first.shape or tensor.device.type != "cpu":
            raise ValueError(
                f"`{name}` is a float32 map on the CPU, of the other's shape, got {tensor.dtype} {tuple(tensor.shape)}"
            )
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise NotImplementedError(f"`{name}` wants a gradient, which these kernels do not have; use their definitions")
    return [tensor.contiguous(memory_format=torch.channels_last) for tensor in maps.values()]


def _rows(tensor: torch.Tensor) -> tuple[int, int]:
    """Pixels of all images, and channels."""
    return tensor.shape[0] * tensor.shape[2] * tensor.shape[3], tensor.shape[1]
