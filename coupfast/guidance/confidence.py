"""The log-confidence log p_ŷ of a classifier at a state, and the cotangents of its logits that g and H v are made of.

g = Jᵀ(e_ŷ − p),      H v = −Jᵀ(diag p − p pᵀ) J v      (the second where f is linear between its kinks)
"""

from __future__ import annotations

import torch
from torch import nn


def scaled_logits(classifier: nn.Module, x_k: torch.Tensor) -> torch.Tensor:
    """f(x_k) = logits((x_k + 1)/2): the classifier as a function of the state in [-1, 1]."""
    return classifier((x_k + 1.0) * 0.5)


def log_confidence(
    classifier: nn.Module, x_k: torch.Tensor, label: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(ŷ | x_k) and ŷ.

    Args:
        classifier: Images in [0, 1] → logits.
        x_k: States in the [-1, 1] scale, shape (batch, channels, height, width).
        label: ŷ where it is already known, int64 (batch,); None takes the arg max at x_k.

    Returns:
        Log-probabilities (batch,) and labels (batch,).
    """
    log_p = torch.log_softmax(scaled_logits(classifier, x_k), dim=1)
    if label is None:
        label = log_p.detach().argmax(dim=1)
    return log_p.gather(1, label[:, None])[:, 0], label


def guidance_gradient(classifier: nn.Module, x_k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """g(x_k) = ∇ log max_y p(y | x_k) by back-propagation, and ŷ; Zhang et al. 2024, eq. 5."""
    with torch.enable_grad():
        x = x_k.detach().requires_grad_()
        log_p, label = log_confidence(classifier, x)
        (g,) = torch.autograd.grad(log_p.sum(), x)
    return g, label


def confidence_cotangent(p: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """e_ŷ − p, the gradient of log p_ŷ with respect to the logits.

    Args:
        p: softmax of the logits, (batch, classes).
        label: ŷ, int64 (batch,).
    """
    return torch.zeros_like(p).scatter_(1, label.unsqueeze(1), 1.0) - p


def hessian_cotangent(p: torch.Tensor, jv: torch.Tensor) -> torch.Tensor:
    """−(diag p − p pᵀ) J v, the Hessian of log p_ŷ with respect to the logits, applied to J v; both (batch, classes)."""
    return p * ((p * jv).sum(dim=1, keepdim=True) - jv)
