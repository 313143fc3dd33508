"""Whether something made of a network still computes what the network does: one random image, there and back.

A trace shows the operations that ran, and not hooks, detached parts, state, or derivatives that somebody wrote by hand.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def random_images(example: torch.Tensor, batch: int = 1) -> torch.Tensor:
    """States uniform in [-1, 1] with the image shape, dtype and device of `example`; the same ones at every call."""
    generator = torch.Generator().manual_seed(0)
    return (2.0 * torch.rand(batch, *example.shape[1:], generator=generator, dtype=torch.float32) - 1.0).to(example)


def value_and_vjp(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, cotangent: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A function's value at `x`, and its transpose there applied to `cotangent`; all detached.

    Args:
        cotangent: Like the value; None takes normal numbers, the same ones at every call.

    Returns:
        Value, Jᵀ cotangent (zero where the value does not depend on `x`), and the cotangent.
    """
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        value = function(leaf)
        if cotangent is None:
            generator = torch.Generator().manual_seed(1)
            cotangent = torch.randn(value.shape, generator=generator, dtype=torch.float32).to(value)
        vjp = torch.autograd.grad(value, leaf, cotangent)[0] if value.requires_grad else torch.zeros_like(x)
    return value.detach(), vjp, cotangent


def relative_difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖; NaN where a value is not finite, which is within no tolerance."""
    return float((found - wanted).norm() / wanted.norm().clamp_min(torch.finfo(wanted.dtype).tiny))


def agree(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> bool:
    """Whether the relative difference is within `tolerance`."""
    return relative_difference(found.detach(), wanted.detach()) <= tolerance
