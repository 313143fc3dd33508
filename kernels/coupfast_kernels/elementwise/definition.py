"""What remains elementwise of a network's passes, as the kernels of this folder have to compute it.

    y = factor_a a + factor_b b                            two cotangents of one value; a map into its place in a concatenation
    y = multiply d where mask, else 0; + factor r          the transpose of relu(x · multiply + add), and another cotangent of x

Memory-bound: everything is read once and written once.
"""

from __future__ import annotations

import torch


def sum_ref(a: torch.Tensor, factor_a: float, b: torch.Tensor | None = None, factor_b: float = 0.0) -> torch.Tensor:
    """factor_a · a + factor_b · b, any device, any dtype; without b only the former."""
    return factor_a * a if b is None else factor_a * a + factor_b * b


def masked_ref(
    d: torch.Tensor,
    mask: torch.Tensor,
    multiply: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    factor: float = 0.0,
) -> torch.Tensor:
    """multiply · d where `mask`, zero elsewhere, plus factor · residual: any device, any dtype.

    Args:
        d, residual: Maps (batch, channels, height, width).
        mask: bool, of their shape.
        multiply: Of each channel, (channels,); None is 1.
    """
    y = d if multiply is None else d * multiply[:, None, None]
    y = torch.where(mask, y, torch.zeros((), dtype=d.dtype, device=d.device))
    return y if residual is None else y + factor * residual
