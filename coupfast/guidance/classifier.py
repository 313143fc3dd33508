"""The guidance of one classifier: g and H v, by the route that it has.

H v has three routes, in float64 equal to rounding on the networks that each supports:

* piecewise-linear classifiers: H v = −Jᵀ(diag p − p pᵀ) J v, one forward-mode and one reverse-mode product through the
  classifier with its activations' slopes frozen at x_k.
* smooth ones: forward-mode differentiation of the gradient.
* the rest: double back-propagation.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Literal

import torch
from torch import nn

from coupfast.guidance.confidence import guidance_gradient, hessian_cotangent, log_confidence
from coupfast.guidance.piecewise_linear import PiecewiseLinearGraph
from coupfast.guidance.slopes import Slope

logger = logging.getLogger(__name__)

Route = Literal["piecewise-linear", "forward-over-reverse", "double-backward"]


@dataclasses.dataclass
class Linearization:
    """What a step keeps of the classifier at x_k for the Hessian-vector product.

    Attributes:
        label: ŷ, int64 (batch,).
        p: softmax, (batch, classes); None on routes that do not use it.
        slopes: What freezes the activations at x_k, one entry per piecewise-linear operation; None on other routes.
    """

    label: torch.Tensor
    p: torch.Tensor | None = None
    slopes: list[Slope] | None = None

    def tensors(self) -> list[torch.Tensor]:
        """All tensors held, for memory accounting."""
        held = [self.label] + ([self.p] if self.p is not None else [])
        return held + [slope.data for slope in self.slopes or []]


class Guidance:
    """Gradient and Hessian-vector product of one classifier's log-confidence, for images of one shape.

    Args:
        classifier: In eval mode, parameters frozen; images in [0, 1] → logits.
        example: A state of the shape, dtype and device to come; its batch size and values do not matter.
        route: Forces a route of the Hessian-vector product; None takes the first that can serve.

    Raises:
        ValueError: if a forced route cannot serve this classifier.
    """

    def __init__(self, classifier: nn.Module, example: torch.Tensor, *, route: Route | None = None) -> None:
        self.classifier = classifier
        self._example = torch.zeros_like(example[:1])
        self._wanted = route
        if route is not None:
            self.route  # noqa: B018  (finds out now whether it can serve)

    @functools.cached_property
    def graph(self) -> PiecewiseLinearGraph | None:
        """The classifier's trace, where it is piecewise linear; made when a Hessian or slopes are first asked for."""
        if self._wanted not in (None, "piecewise-linear"):
            return None
        graph = PiecewiseLinearGraph.trace(self.classifier, self._example)
        if graph is None and self._wanted is not None:
            raise ValueError("the classifier is not piecewise linear (or cannot be traced): leave `route` open")
        return graph

    @functools.cached_property
    def route(self) -> Route:
        """How Hessian-vector products are taken."""
        if self.graph is not None:
            return "piecewise-linear"
        if self._wanted is not None:
            return self._wanted
        if _has_forward_over_reverse(self.classifier, self._example):
            return "forward-over-reverse"
        logger.warning("the classifier has no forward-mode derivative: Hessian-vector products by double backward")
        return "double-backward"

    def gradient(self, x_k: torch.Tensor, *, keep_slopes: bool = False) -> tuple[torch.Tensor, Linearization]:
        """g(x_k), and what the Hessian-vector product needs of this evaluation (slopes only if asked for)."""
        if not keep_slopes or self.graph is None:
            g, label = guidance_gradient(self.classifier, x_k)
            return g, Linearization(label)
        with torch.enable_grad():
            x = x_k.detach().requires_grad_()
            logits, slopes = self.graph.evaluate(x, keep_slopes=True)
            log_p = torch.log_softmax(logits, dim=1)
            label = log_p.detach().argmax(dim=1)
            (g,) = torch.autograd.grad(log_p.gather(1, label[:, None]).sum(), x)
        return g, Linearization(label, log_p.detach().exp(), slopes)

    def hvp(self, x_k: torch.Tensor, v: torch.Tensor, kept: Linearization | None = None) -> torch.Tensor:
        """H(x_k) v, by this object's route; `kept` is what `gradient` returned at the same x_k (None: found again)."""
        if self.graph is not None:
            return self._piecewise_linear(x_k, v, kept)
        label = kept.label if kept is not None else log_confidence(self.classifier, x_k)[1]
        if self.route == "forward-over-reverse":
            return _forward_over_reverse(self.classifier, x_k, v, label)
        return _double_backward(self.classifier, x_k, v, label)

    def hvp_evaluations(self, *, slopes_kept: bool) -> dict[str, int]:
        """Passes through the classifier that one `hvp` takes."""
        if self.graph is not None:
            recomputed = {} if slopes_kept else {"classifier forward": 1}
            return recomputed | {"classifier forward-mode": 1, "classifier reverse-mode": 1}
        label = {} if slopes_kept else {"classifier forward": 1}
        return label | {f"classifier {self.route}": 1}

    def _piecewise_linear(self, x_k: torch.Tensor, v: torch.Tensor, kept: Linearization | None) -> torch.Tensor:
        assert self.graph is not None
        if kept is None or kept.slopes is None or kept.p is None:
            with torch.no_grad():
                logits, slopes = self.graph.evaluate(x_k, keep_slopes=True)
                p = torch.log_softmax(logits, dim=1).exp()  # as `gradient` takes it, to the bit
        else:
            slopes, p = kept.slopes, kept.p
        with torch.enable_grad():
            tangent = v.detach().requires_grad_()
            jv = self.graph.linear(tangent, slopes)
            (w,) = torch.autograd.grad(jv, tangent, hessian_cotangent(p, jv.detach()))
        return w


def _forward_over_reverse(classifier: nn.Module, x_k: torch.Tensor, v: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    def gradient(x: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda y: log_confidence(classifier, y, label)[0].sum())(x)

    # Fused attention has no second derivative; the plain formula has.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.func.jvp(gradient, (x_k.detach(),), (v.detach(),))[1]


def _double_backward(classifier: nn.Module, x_k: torch.Tensor, v: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        x = x_k.detach().requires_grad_()
        (g,) = torch.autograd.grad(log_confidence(classifier, x, label)[0].sum(), x, create_graph=True)
        (w,) = torch.autograd.grad(g, x, v.detach())
    return w


def _has_forward_over_reverse(classifier: nn.Module, example: torch.Tensor) -> bool:
    """Whether PyTorch has forward-mode derivatives of everything in this classifier's backward pass; tried on one image."""
    label = torch.zeros(1, dtype=torch.int64, device=example.device)
    try:
        _forward_over_reverse(classifier, example, torch.ones_like(example), label)
    except (NotImplementedError, RuntimeError) as error:
        logger.info("no forward-over-reverse: %s", error)
        return False
    return True
