"""One step of a table of linear rows: of the guided reverse VP-SDE, of its adjoint (without noise), of other solvers.

    y = a x + b eps_hat + c guidance + d z  [+ e x_in + f z' + p x_before + q eps_before],      z, z' ~ N(0, 1)

x_in is the state that the purification began from, z' a second noise, x_before and eps_before state and predicted noise of the
step before. Each term is there or not, and what is not is compiled out.

The map is linear in its tensors, so that transposes have the same form. With the first four columns one call takes the adjoint
one step back, J_εᵀv and Hv in place of eps_hat and guidance. With the others, for the cotangents v of the new state, v_before
of x and v_eps of eps_hat that the later step left, u = b v + v_eps, and then

    v_x = a v + J_εᵀu + c Hv + v_before,      v_in += e v,      v_before = p v,      v_eps = q v

Memory-bound: reads a tensor a term, writes one, makes the noise in registers; judge it by its share of copy bandwidth. What it
reads besides (coefficients, step, seed, image ids, draws) lies in device memory, so that one captured CUDA graph serves every
step, seed and image. Bits equal to the definition's: `docs/how/kernels.md`.
"""

from __future__ import annotations

import torch


def guided_step_ref(
    x: torch.Tensor,
    eps_hat: torch.Tensor | None,
    guidance: torch.Tensor | None,
    coefficients: tuple[float, ...],
    z: torch.Tensor | None = None,
    *,
    x_in: torch.Tensor | None = None,
    z2: torch.Tensor | None = None,
    x_before: torch.Tensor | None = None,
    eps_before: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition: plain PyTorch, any device, any dtype.

    Args:
        x: State (adjoint: v).
        eps_hat: Predicted noise (adjoint: J_εᵀv), like `x` in shape and dtype, as are all others; None leaves its term out,
            here and below.
        guidance: Guidance gradient (adjoint: Hv).
        coefficients: (a, b, c, d), or (a, b, c, d, e, f, p, q), rounded once to the dtype of `x`.
        z: Noise.
        x_in: State that the purification began from.
        z2: Second noise.
        x_before, eps_before: State and predicted noise of the step before.

    Returns:
        a x + b eps_hat + c guidance + d z + e x_in + f z2 + p x_before + q eps_before, summed from left to right, each
        operation rounded.

    Raises:
        ValueError: for another number of coefficients, and for four with one of the last four terms.
    """
    more = (x_in, z2, x_before, eps_before)
    if len(coefficients) not in (4, 8) or (len(coefficients) == 4 and any(term is not None for term in more)):
        raise ValueError(
            f"a row is (a, b, c, d), or with any of x_in, z2, x_before, eps_before (a, b, c, d, e, f, p, q); got {coefficients}"
        )
    y = coefficients[0] * x
    for coefficient, term in zip(coefficients[1:], (eps_hat, guidance, z, *more), strict=False):
        if term is not None:
            y = y + coefficient * term
    return y
