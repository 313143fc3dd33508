"""The guidance of COUP: the gradient of the classifier's log-confidence, by plain autograd."""

from __future__ import annotations

import torch
from torch import nn


def confidence_gradient(classifier: nn.Module, x: torch.Tensor, *, detached: bool) -> torch.Tensor:
    """∇ log max_y p(y | x) with respect to x in [-1, 1], differentiable again unless `detached`."""
    create_graph = torch.is_grad_enabled() and x.requires_grad and not detached
    with torch.enable_grad():
        point = x if create_graph else x.detach().requires_grad_()
        log_p = torch.log_softmax(classifier((point + 1) / 2), dim=1)
        confidence = log_p.max(dim=1).values.sum()
        return torch.autograd.grad(confidence, point, create_graph=create_graph)[0]
