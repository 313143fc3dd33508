"""One guided step of the reverse VP-SDE (and, without noise, of its adjoint).

    y = a x + b eps_hat + c guidance + d z,      z ~ N(0, 1)

The map is linear in its tensors, so its transpose has the same form: the same step with J_εᵀv, Hv in place of eps_hat and
guidance, and without noise, takes the adjoint one step back.
"""

from __future__ import annotations

import torch


def guided_step_ref(
    x: torch.Tensor,
    eps_hat: torch.Tensor,
    guidance: torch.Tensor | None,
    coefficients: tuple[float, float, float, float],
    z: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition: plain PyTorch, any device, any dtype.

    Args:
        x, eps_hat: State and predicted noise (adjoint: v and J_εᵀv), one shape and dtype.
        guidance: Guidance gradient (adjoint: Hv), the same shape; None leaves the term out.
        coefficients: (a, b, c, d), rounded once to the dtype of `x`.
        z: Noise of the same shape; None leaves the term out.

    Returns:
        a x + b eps_hat + c guidance + d z, summed from left to right, each operation rounded.
    """
    a, b, c, d = coefficients
    y = a * x
    y = y + b * eps_hat
    if guidance is not None:
        y = y + c * guidance
    if z is not None:
        y = y + d * z
    return y
