"""Guidance: the log-confidence of a classifier, its gradient and its Hessian-vector product.

With f(x_k) = logits((x_k + 1)/2), p = softmax f(x_k) and ŷ = arg max p:

    g(x_k) = ∇ log p_ŷ = Jᵀ(e_ŷ − p),      J = ∂f/∂x_k
    H v    = ∇² log p_ŷ v

The ½ of the rescaling lives in f and nowhere else: g carries it once, H twice. Both are taken per sample (summed over the
batch, never averaged). H v has three routes, in float64 equal to rounding on the networks that each supports:

* piecewise-linear classifiers: H v = −Jᵀ(diag p − p pᵀ) J v, one forward-mode and one reverse-mode product through the
  classifier with its activations' slopes frozen at x_k. Whether a classifier is piecewise linear is read off its trace.
* smooth ones: forward-mode differentiation of the gradient.
* the rest: double back-propagation.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import fx, nn

from coupfast.tracing import LINEAR_VIEWS, Trace, trace

logger = logging.getLogger(__name__)

aten = torch.ops.aten

Route = Literal["piecewise-linear", "forward-over-reverse", "double-backward"]


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


@dataclasses.dataclass
class Slope:
    """Which side of its kink every element of an activation is on (bits), or which element a pool took (indices)."""

    data: torch.Tensor  # uint8 bits, eight to a byte; or int64 / int32 indices
    shape: torch.Size

    @staticmethod
    def of_mask(mask: torch.Tensor) -> Slope:
        return Slope(pack_bits(mask), mask.shape)

    def side(self) -> torch.Tensor:
        """What `kink` returned."""
        return unpack_bits(self.data, self.shape) if self.data.dtype == torch.uint8 else self.data


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """A bool tensor as bits, eight to a byte (uint8, one axis), last byte padded with zeros; row-major order."""
    flat = mask.reshape(-1)
    if flat.device.type == "cpu":
        # Into PyTorch's own memory, so that its accounts know of it.
        bits = torch.empty((flat.numel() + 7) // 8, dtype=torch.uint8)
        bits.numpy()[:] = np.packbits(flat.numpy(), bitorder="little")
        return bits
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8).to(torch.uint8)
    return (flat << _bit_positions(flat.device)).sum(dim=1, dtype=torch.uint8)


def unpack_bits(bits: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The bool tensor that `pack_bits` packed."""
    if bits.device.type == "cpu":
        count = int(np.prod(shape))
        mask = torch.empty(count, dtype=torch.uint8)
        mask.numpy()[:] = np.unpackbits(bits.numpy(), count=count, bitorder="little")
        return mask.view(torch.bool).view(shape)
    flat = (bits[:, None] >> _bit_positions(bits.device)) & 1
    return flat.view(-1)[: shape.numel()].view(shape).to(torch.bool)


def _bit_positions(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


# --- piecewise-linear classifiers -------------------------------------------------------------------------------------

# Linear in their first argument, everything else being constant; applied to a tangent as they are.
_LINEAR = LINEAR_VIEWS | {
    aten.flatten.using_ints,
    aten.clone.default,
    aten.neg.default,
    aten.mean.dim,
    aten.mean.default,
    aten.sum.dim_IntList,
    aten.avg_pool2d.default,
    aten._adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.upsample_nearest2d.default,
    aten.upsample_bilinear2d.default,
    aten.pixel_shuffle.default,
    aten._to_copy.default,
}
_SUMS = {aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar, aten.rsub.Scalar}
_PRODUCTS = {aten.mul.Tensor, aten.mul.Scalar, aten.mm.default, aten.bmm.default, aten.matmul.default}
_QUOTIENTS = {aten.div.Tensor, aten.div.Scalar}
_BATCH_NORMS = {
    aten._native_batch_norm_legit_no_training.default,
    aten.native_batch_norm.default,
    aten.cudnn_batch_norm.default,
    aten._batch_norm_no_update.default,
}
_KINKED = {
    aten.relu.default,
    aten.leaky_relu.default,
    aten.hardtanh.default,
    aten.clamp_min.default,
    aten.threshold.default,
    aten.max_pool2d_with_indices.default,
}


def _training_flag(node: fx.Node) -> bool:
    """Whether a batch norm node normalises by the batch's own statistics."""
    if node.target is aten.native_batch_norm.default or node.target is aten.cudnn_batch_norm.default:
        return bool(node.args[5])
    return False


class PiecewiseLinearGraph:
    """A classifier's trace f, with two evaluations: the ordinary one, which keeps slopes, and its linear part J v.

    Built by `trace`, which returns None where f is not piecewise linear. Serves every batch size.
    """

    def __init__(self, traced: Trace, active: set[fx.Node]) -> None:
        self.traced, self.active = traced, active

    @staticmethod
    def trace(classifier: nn.Module, example: torch.Tensor) -> PiecewiseLinearGraph | None:
        """Trace f at the image shape of `example` and check every operation that x_k reaches."""
        try:
            traced = trace(
                lambda x: scaled_logits(classifier, x), lambda batch: (example.new_zeros(batch, *example.shape[1:]),)
            )
        except Exception as error:  # a classifier may do anything in `forward`; another route serves it
            logger.info("the classifier cannot be traced (%s: %s)", type(error).__name__, error)
            return None
        nodes = [operation.node for operation in traced.operations]
        active: set[fx.Node] = set()
        for node in nodes:
            if node.op == "placeholder":
                active.add(node)
            elif node.op == "call_function" and any(used in active for used in node.all_input_nodes):
                reason = _why_not_piecewise_linear(node, active)
                if reason:
                    logger.info("the classifier is not piecewise linear: %s", reason)
                    return None
                active.add(node)
        if not any(node in active for node in nodes[-1].all_input_nodes):
            return None
        graph = PiecewiseLinearGraph(traced, active)
        if not graph._is_that_of(classifier, example):
            logger.info("the classifier does not do what its trace does (detached parts, hooks, state or randomness?)")
            return None
        return graph

    def _is_that_of(self, classifier: nn.Module, example: torch.Tensor) -> bool:
        """Whether logits and Jᵀw of a random image are the classifier's own: a trace shows operations, not their gradients."""
        generator = torch.Generator().manual_seed(0)
        image = 2.0 * torch.rand(1, *example.shape[1:], generator=generator) - 1.0
        x = image.to(example).requires_grad_()
        with torch.enable_grad():
            logits = scaled_logits(classifier, x)
            w = torch.randn(logits.shape, generator=generator).to(logits)
            (gradient,) = torch.autograd.grad(logits, x, w)
            found, slopes = self.evaluate(x.detach(), keep_slopes=True)
            tangent = torch.zeros_like(x).requires_grad_()
            (found_gradient,) = torch.autograd.grad(self.linear(tangent, slopes), tangent, w)
        tolerance = 1e3 * torch.finfo(x.dtype).eps
        pairs = ((found.detach(), logits.detach()), (found_gradient, gradient))
        return all(bool((a - b).norm() <= tolerance * b.norm()) for a, b in pairs)

    def evaluate(self, x_k: torch.Tensor, *, keep_slopes: bool) -> tuple[torch.Tensor, list[Slope]]:
        """f(x_k), differentiable like the classifier itself, and (if asked for) every kinked operation's slope."""
        slopes: list[Slope] = []

        def run(node: fx.Node, args: tuple, kwargs: dict) -> Any:
            value = node.target(*args, **kwargs)  # type: ignore[operator]
            if keep_slopes and node in self.active and node.target in _KINKED:
                slopes.append(_slope(node, args, value))
            return value

        return self._interpret(x_k, run), slopes

    def linear(self, v: torch.Tensor, slopes: Sequence[Slope | torch.Tensor]) -> torch.Tensor:
        """J v, a linear and differentiable function of `v`; shape (batch, classes). `slopes` are packed, or as `kink` returns
        them."""
        remaining = iter(slopes)

        def run(node: fx.Node, args: tuple, kwargs: dict) -> Any:
            if node not in self.active:
                return node.target(*args, **kwargs)  # type: ignore[operator]
            return self.tangent(node, args, kwargs, remaining)

        return self._interpret(v, run)

    def _interpret(self, x: torch.Tensor, run: Callable[[fx.Node, tuple, dict], Any]) -> torch.Tensor:
        values: dict[fx.Node, Any] = {}
        for operation in self.traced.operations:
            node = operation.node
            if node.op == "placeholder":
                values[node] = x
            elif node.op == "get_attr":
                values[node] = self.traced.constants[node]
            elif node.op == "output":
                return values[node.all_input_nodes[0]]
            else:
                values[node] = run(node, *operation.arguments(values, len(x)))
            for dead in operation.dead:
                del values[dead]
        raise AssertionError("a graph has an output")

    @staticmethod
    def slope(node: fx.Node, args: tuple, value: Any) -> Slope | None:
        """The slope that an operation leaves for `tangent`; None if it has no kink."""
        return _slope(node, args, value) if node.target in _KINKED else None

    @staticmethod
    def slope_bytes(node: fx.Node, batch: int) -> int:
        """What `slope` of a traced operation takes for so many images."""
        if node.target not in _KINKED:
            return 0
        is_pool = node.target is aten.max_pool2d_with_indices.default
        # A pool has two results: its own node has no shape, the one that picks the first has that of the indices.
        value = next(iter(node.users)).meta["val"] if is_pool else node.meta["val"]
        elements = batch * value.numel() // 2  # traced at two images
        return 8 * elements if is_pool else (elements + 7) // 8

    def tangent(self, node: fx.Node, args: tuple, kwargs: dict, slopes: Iterator[Slope | torch.Tensor]) -> Any:
        """The operation's linear part; `args` hold tangents where the node's inputs are active, values elsewhere; `slopes` are
        packed, or as `kink` returns them."""
        target: Any = node.target
        is_active = [isinstance(arg, fx.Node) and arg in self.active for arg in node.args]
        if target in _KINKED:
            return _apply_slope(node, args, next(slopes))
        if target in _SUMS:
            if len(is_active) > 1 and all(is_active):
                return target(*args, **kwargs)
            if target is aten.rsub.Scalar:
                return -args[0] * (args[2] if len(args) > 2 else 1)
            # The constant becomes zero, not nothing: it may broadcast the sum to a larger shape than its active term's.
            args = tuple(
                arg if active else torch.zeros_like(arg) if isinstance(arg, torch.Tensor) else 0
                for arg, active in zip(args, is_active, strict=True)
            )
            return target(*args, **kwargs)
        if target in _BATCH_NORMS:
            _, weight, _, _, variance, *rest = args
            scale = torch.rsqrt(variance + rest[-1])
            if weight is not None:
                scale = scale * weight
            return (args[0] * scale.view(1, -1, *([1] * (args[0].dim() - 2))),)
        if target in (aten.convolution.default, aten.linear.default):
            return target(args[0], args[1], None, *args[3:])
        if target is aten.addmm.default:
            return torch.mm(args[1], args[2]) * kwargs.get("alpha", 1)
        if target is aten.constant_pad_nd.default:
            return target(args[0], args[1], 0.0)
        return target(*args, **kwargs)


def _why_not_piecewise_linear(node: fx.Node, active: set[fx.Node]) -> str | None:
    """What breaks piecewise linearity in this operation, or None."""
    target: Any = node.target
    is_active = [isinstance(arg, fx.Node) and arg in active for arg in node.args]
    only_first = bool(is_active) and is_active[0] and not any(is_active[1:])
    nested = [used for arg in node.args if isinstance(arg, (list, tuple)) for used in arg if isinstance(used, fx.Node)]
    if target is aten.cat.default:
        return None if all(used in active for used in nested) else f"{target} with a constant part"
    if any(used in active for used in nested) or any(used in active for used in _keyword_nodes(node)):
        return f"{target} of a list"
    if target is aten._to_copy.default and "dtype" in node.kwargs:
        return "a change of dtype"
    if target in _LINEAR or target is aten.constant_pad_nd.default:
        return None if only_first else f"{target} with a computed argument"
    if target in _SUMS:
        return None
    if target in _PRODUCTS:
        return None if sum(is_active) == 1 else f"{target} of two values that depend on the image"
    if target in _QUOTIENTS or target in (aten.convolution.default, aten.linear.default):
        return None if only_first and "rounding_mode" not in node.kwargs else f"{target} by a computed value"
    if target is aten.addmm.default:
        return None if is_active == [False, True, False] else f"{target} with a computed weight or bias"
    if target in _BATCH_NORMS:
        if not only_first:
            return f"{target} with computed parameters"
        return "a batch norm in training mode" if _training_flag(node) else None
    if target in _KINKED:
        return None if only_first else f"{target} with a computed argument"
    if target is operator.getitem:
        source = node.args[0]
        if isinstance(source, fx.Node) and source.target in _BATCH_NORMS | {aten.max_pool2d_with_indices.default}:
            return None if node.args[1] == 0 else f"output {node.args[1]} of {source.target}"
    return f"{target}"


def _keyword_nodes(node: fx.Node) -> list[fx.Node]:
    return [value for value in node.kwargs.values() if isinstance(value, fx.Node)]


def kink(node: fx.Node, args: tuple, value: Any) -> torch.Tensor | None:
    """On which side of its kink every element of an activation is (bool), or which element a pool took (indices); None for an
    operation without a kink."""
    target: Any = node.target
    if target not in _KINKED:
        return None
    x = args[0].detach()
    if target is aten.max_pool2d_with_indices.default:
        return value[1]
    if target is aten.hardtanh.default:
        low, high = args[1] if len(args) > 1 else -1.0, args[2] if len(args) > 2 else 1.0
        return (x > low) & (x < high)
    threshold = args[1] if target in (aten.clamp_min.default, aten.threshold.default) else 0.0
    # What back-propagation takes at the kink itself: clamp passes the gradient there, the others do not.
    return x >= threshold if target is aten.clamp_min.default else x > threshold


def _slope(node: fx.Node, args: tuple, value: Any) -> Slope:
    side = kink(node, args, value)
    assert side is not None
    return Slope.of_mask(side) if side.dtype == torch.bool else Slope(side, args[0].shape)


def _apply_slope(node: fx.Node, args: tuple, slope: Slope | torch.Tensor) -> Any:
    target: Any = node.target
    tangent = args[0]
    side = slope if isinstance(slope, torch.Tensor) else slope.side()
    if target is aten.max_pool2d_with_indices.default:
        indices = side
        pooled = tangent.flatten(-2).gather(-1, indices.flatten(-2)).view(indices.shape)
        return (pooled,)
    if target is aten.leaky_relu.default:
        negative_slope = args[1] if len(args) > 1 else 0.01
        return torch.where(side, tangent, negative_slope * tangent)
    return tangent * side


# --- the guidance of one classifier ----------------------------------------------------------------------


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
            q = jv.detach()
            cotangent = p * ((p * q).sum(dim=1, keepdim=True) - q)  # −(diag p − p pᵀ) J v
            (w,) = torch.autograd.grad(jv, tangent, cotangent)
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
