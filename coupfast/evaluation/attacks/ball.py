"""Steps in the ball of a norm around images in [0, 1]."""

from __future__ import annotations

import torch


def project(x_k: torch.Tensor, x: torch.Tensor, norm: str, eps: float) -> torch.Tensor:
    """The nearest points of the balls around `x`, then of [0, 1]."""
    delta = x_k - x
    if norm == "Linf":
        delta = delta.clamp(-eps, eps)
    else:
        delta = delta * (eps / delta.flatten(1).norm(dim=1).clamp_min(1e-12)).clamp_max(1.0).view(-1, 1, 1, 1)
    return (x + delta).clamp(0.0, 1.0)


def ascent(gradient: torch.Tensor, norm: str, size: float = 1.0) -> torch.Tensor:
    """Of length `size` in the norm, where the loss rises fastest: signs in Linf, along the gradient in L2; 0 where that is."""
    if norm == "Linf":
        return size * gradient.sign()
    return size * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp_min(1e-12)


def anywhere(x: torch.Tensor, norm: str, eps: float, *, seed: int) -> torch.Tensor:
    """Points of the balls around `x`, uniformly, then clipped to [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    if norm == "Linf":
        start = 2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1
    else:
        # Of a ball of d dimensions the share r^d lies within r of the centre; normal noise has no preferred direction.
        start = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        radius = torch.rand((len(x), 1, 1, 1), generator=generator, dtype=x.dtype) ** (1 / x[0].numel())
        start *= radius / start.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return project(x + eps * start.to(x.device), x, norm, eps)
