"""Guidance: the log-confidence of a classifier, its gradient and its Hessian-vector product.

With f(x_k) = logits((x_k + 1)/2), p = softmax f(x_k) and ŷ = arg max p:

    g(x_k) = ∇ log p_ŷ = Jᵀ(e_ŷ − p),      J = ∂f/∂x_k
    H v    = ∇² log p_ŷ v

The ½ of the rescaling lives in f and nowhere else: g carries it once, H twice. Both are taken per sample (summed over the
batch, never averaged). `confidence` has the formulas, `piecewise_linear` the trace of a classifier that is linear between its
kinks, `slopes` what is kept of those, and `classifier` the guidance of one classifier, whichever kind it is of.
"""

from coupfast.guidance.classifier import Guidance, Linearization, Route
from coupfast.guidance.confidence import (
    confidence_cotangent,
    guidance_gradient,
    hessian_cotangent,
    log_confidence,
    scaled_logits,
)
from coupfast.guidance.piecewise_linear import PiecewiseLinearGraph, kink
from coupfast.guidance.slopes import Slope, pack_bits, unpack_bits

__all__ = [
    "Guidance",
    "Linearization",
    "PiecewiseLinearGraph",
    "Route",
    "Slope",
    "confidence_cotangent",
    "guidance_gradient",
    "hessian_cotangent",
    "kink",
    "log_confidence",
    "pack_bits",
    "scaled_logits",
    "unpack_bits",
]
