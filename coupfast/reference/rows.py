"""Methods that are no SDE but rows of coefficients: the formula, step by step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from coupfast.reference.confidence import confidence_gradient


def rows_ref(
    state: tuple[torch.Tensor, ...],
    score: nn.Module,
    classifier: nn.Module | None,
    rows: Sequence[Sequence[float]],
    labels: Sequence[float],
    noise: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    *,
    clips: Sequence[tuple[float, float]] | None = None,
    shifts: Sequence[float] | None = None,
    detached: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Steps that are given as rows of coefficients, one after the other, as the formula is written.

        x_{k+1} = a x_k + b ε̂(x_k) + c g(x_k) + d z + e x_in + f z′ + p x_{k−1} + q ε̂(x_{k−1})

    where ε̂(x_k) may be what belongs to clip(m x_k + n ε̂, ±1), and ε̂(x_{k−1}) may have s g(x_{k−1}) added to it.

    Args:
        state: (x_k,), (x_k, x_in) or (x_k, x_in, x_{k−1}, ε̂(x_{k−1})), each of shape (batch, channels, height, width).
        rows: (a, b, c, d) or (a, b, c, d, e, f, p, q), one a step.
        labels: Of the score network, one a step.
        noise: (z, z′) of each step.
        clips: (m, n) of each step; None clips nothing.
        shifts: s of each step; None is 0.
        detached: Take the guidance as a constant in gradients.

    Returns:
        (x_{k+1}, x_in, x_k, ε̂(x_k), with its shift) after the last step. Back-propagation goes through all of them.
    """
    x, x_in, x_before, eps_before = (*state, *[state[0]] * 3)[:4]  # what a first step does not read may be anything
    for i, (row, label, (z, z2)) in enumerate(zip(rows, labels, noise, strict=True)):
        a, b, c, d, e, f, p, q = (*row, 0.0, 0.0, 0.0, 0.0)[:8]
        s = 0.0 if shifts is None else shifts[i]
        eps_hat = score(x, torch.full((len(x),), label, dtype=x.dtype, device=x.device))
        if clips is not None:
            m, n = clips[i]
            eps_hat = (torch.clamp(m * x + n * eps_hat, -1.0, 1.0) - m * x) / n
        following = a * x + b * eps_hat + d * z
        if c != 0.0 or s != 0.0:
            assert classifier is not None
            gradient = confidence_gradient(classifier, x, detached=detached)
            following, eps_hat = following + c * gradient, eps_hat + s * gradient
        if e != 0.0:
            following = following + e * x_in
        if f != 0.0:
            assert z2 is not None
            following = following + f * z2
        if p != 0.0:
            following = following + p * x_before
        if q != 0.0:
            following = following + q * eps_before
        x, x_before, eps_before = following, x, eps_hat
    return x, x_in, x_before, eps_before
