"""The columns of a table beside the first four: what a step reads for them, and their transposes.

    x_{k+1} = a x_k + b ε̂(x_k) + c g(x_k) + d z + e x_in + f z′ + p x_{k−1} + q ε̂(x_{k−1})

With the cotangents v of x_{k+1}, v_before of x_k and v_eps of ε̂(x_k) that the later step left, one step back is

    u = b v + v_eps,      v_x = a v + J_εᵀ u + H w + v_before,      v_in += e v,      v_before = p v,      v_eps = q v

where w = c v, and c v + s v_eps where ε̂(x_{k−1}) carries the guidance of its step. A clipped ε̂ is the network's where
|x̂0| ≤ 1, and (±1 − m x)/n elsewhere: there its Jacobian is −m/n, and the network's gets nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from coupfast.engine.protocol import Cotangent, State
from coupfast.solvers import CoefficientTable
from coupfast_kernels.guided_step import guided_step_ref


def reads_eps_hat(table: CoefficientTable, k: int) -> bool:
    """Whether step k, or the step after it, reads ε̂(x_k). Every step of a table of four columns is taken to."""
    return not table.extended or table.reads_eps_hat(k)


def clipped(
    x: torch.Tensor, eps_hat: torch.Tensor, m: float | torch.Tensor, n: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """ε̂ that belongs to clip(x̂0, ±1) with x̂0 = m x + n ε̂, and where nothing was clipped; differentiable."""
    x_0 = (m * x + n * eps_hat).detach()
    inside = x_0.abs() <= 1.0
    return torch.where(inside, eps_hat, (x_0.sign() - m * x) / n), inside


def clipped_vjp(
    u: torch.Tensor, inside: torch.Tensor, m: float, n: float, eps_hat_vjp: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Of `clipped`, as a function of x alone: J_ε̂ᵀ u of what is inside, −m/n u of what is not."""
    return eps_hat_vjp(torch.where(inside, u, 0.0)) + torch.where(inside, 0.0, (-m / n) * u)


def extra_images(table: CoefficientTable, k: int, more: State | None) -> dict[str, torch.Tensor]:
    """The images that step k reads beside x_k, ε̂ and g, by their names in a guided step: those whose factor is not zero.

    Raises:
        ValueError: if one is missing.
    """
    if not table.extended:
        return {}
    _, _, _, _, e, _, p, q = table.row(k)
    wanted = [name for name, factor in (("x_in", e), ("x_before", p), ("eps_before", q)) if factor != 0.0]
    found = {name: None if more is None else getattr(more, name) for name in wanted}
    missing = [name for name, image in found.items() if image is None]
    if missing:
        raise ValueError(f"step {k} of this table reads {', '.join(missing)}; give them in `more`")
    return found  # type: ignore[return-value]


def shifted(
    table: CoefficientTable, k: int, eps_hat: torch.Tensor | None, g: torch.Tensor | None
) -> torch.Tensor | None:
    """What the step after k reads as ε̂(x_k)."""
    shift = table.shift(k)
    if shift == 0.0 or g is None:
        return eps_hat
    assert eps_hat is not None
    return eps_hat + shift * g


def step_back(
    table: CoefficientTable,
    k: int,
    v: torch.Tensor,
    hvp: Callable[[torch.Tensor], torch.Tensor] | None,
    eps_hat_vjp: Callable[[torch.Tensor], torch.Tensor],
    more: Cotangent,
) -> Cotangent:
    """The transpose of step k, of the parts that an engine has computed.

    Args:
        v: Cotangent of x_{k+1}.
        hvp: w → H(x_k) w; None where no gradient flows through guidance. Called where step k is guided.
        eps_hat_vjp: u → J_ε(x_k)ᵀ u; called where anything flows into ε̂.
        more: Cotangents that the later steps left; its `x` is not read.

    Returns:
        Cotangents of x_k, x_in, x_{k−1} and ε̂(x_{k−1}).
    """
    a, b, c, _, e, _, p, q = table.row(k) if table.extended else (*table.row(k), 0.0, 0.0, 0.0, 0.0)
    u = None
    if more.eps_before is not None:
        u, b = eps_hat_vjp(b * v + more.eps_before), 1.0
    elif b != 0.0:
        u = eps_hat_vjp(v)
    w = None
    if hvp is not None and table.guides(k):
        shift = 0.0 if more.eps_before is None else table.shift(k)
        if shift != 0.0:
            assert more.eps_before is not None
            w, c = hvp(c * v + shift * more.eps_before), 1.0
        elif c != 0.0:
            w = hvp(v)
    v_x = guided_step_ref(v, u, w, (a, b, c, 0.0, 0.0, 0.0, 1.0, 0.0), x_before=more.x_before)
    v_in = more.x_in
    if e != 0.0:
        v_in = e * v if v_in is None else v_in + e * v
    return Cotangent(v_x, v_in, p * v if p != 0.0 else None, q * v if q != 0.0 else None)
