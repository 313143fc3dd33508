"""The columns of a table beside the first four: what a step reads for them, and their transposes.

    x_{k+1} = a x_k + b ε̂(x_k) + c g(x_k) + d z + e x_in + f z′ + p x_{k−1} + q ε̂(x_{k−1})

With the cotangents v of x_{k+1}, v_before of x_k and v_eps of ε̂(x_k) that the later step left, one step back is

    u = b v + v_eps,      v_x = a v + J_εᵀ u + c H v + v_before,      v_in += e v,      v_before = p v,      v_eps = q v
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from coupfast.engine.protocol import Cotangent, State
from coupfast.solvers import CoefficientTable
from coupfast_kernels.guided_step import guided_step_ref


def reads_eps_hat(table: CoefficientTable, k: int) -> bool:
    """Whether step k, or the step after it, reads ε̂(x_k). Every step of a table of four columns is taken to."""
    read_later = table.q is not None and k + 1 < table.num_steps and table.q[k + 1] != 0.0
    return bool(not table.extended or table.b[k] != 0.0 or read_later)


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


def step_back(
    table: CoefficientTable,
    k: int,
    v: torch.Tensor,
    w: torch.Tensor | None,
    eps_hat_vjp: Callable[[torch.Tensor], torch.Tensor],
    more: Cotangent,
) -> Cotangent:
    """The transpose of step k, of the parts that an engine has computed.

    Args:
        v: Cotangent of x_{k+1}.
        w: H v; None where nothing is guided.
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
    v_x = guided_step_ref(v, u, w, (a, b, c, 0.0, 0.0, 0.0, 1.0, 0.0), x_before=more.x_before)
    v_in = more.x_in
    if e != 0.0:
        v_in = e * v if v_in is None else v_in + e * v
    return Cotangent(v_x, v_in, p * v if p != 0.0 else None, q * v if q != 0.0 else None)
