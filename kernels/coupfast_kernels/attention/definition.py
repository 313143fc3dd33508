"""Self-attention over the pixels of a map, as the kernels of this folder have to compute it.

    y_i = Σ_j p_ij v_j,      p_ij = softmax_j(scale q_i · k_j)                         per image and head, i and j pixels
    dv_j = Σ_i p_ij dy_i,    dq_i = scale Σ_j s_ij k_j,    dk_j = scale Σ_i s_ij q_i,
    where s_ij = p_ij (dy_i · v_j − Σ_l p_il dy_i · v_l)

Vaswani et al. 2017, arXiv:1706.03762 (eq. 1), its transpose by the chain rule.
"""

from __future__ import annotations

import torch


def attention_ref(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, heads: int, scale: float) -> torch.Tensor:
    """The definition: plain PyTorch, any device, any dtype, differentiable as often as wanted.

    Args:
        q, k, v: Maps (batch, channels, height, width); a head's channels lie together.
        heads: Divides the channels.
        scale: Of the scores; usually 1 / √(channels / heads).

    Returns:
        y, of the same shape.
    """
    shape = q.shape
    q, k, v = _split(heads, q, k, v)
    weights = torch.softmax(scale * (q @ k.transpose(2, 3)), dim=3)  # [batch, heads, pixels, pixels]
    return _joined(shape, weights @ v)[0]


def attention_vjp_ref(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dy: torch.Tensor, *, heads: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The definition of the transpose: dq, dk and dv for the cotangent `dy` of y, written out."""
    shape = q.shape
    q, k, v, dy = _split(heads, q, k, v, dy)
    weights = torch.softmax(scale * (q @ k.transpose(2, 3)), dim=3)
    of_weights = dy @ v.transpose(2, 3)
    slopes = weights * (of_weights - (weights * of_weights).sum(3, keepdim=True))
    dq, dk, dv = scale * (slopes @ k), scale * (slopes.transpose(2, 3) @ q), weights.transpose(2, 3) @ dy
    return tuple(_joined(shape, dq, dk, dv))  # type: ignore[return-value]


def _split(heads: int, *maps: torch.Tensor) -> list[torch.Tensor]:
    """[batch, heads, pixels, channels of a head] each."""
    return [tensor.unflatten(1, (heads, -1)).flatten(3).transpose(2, 3) for tensor in maps]


def _joined(shape: torch.Size, *tokens: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.transpose(2, 3).reshape(shape) for tensor in tokens]
