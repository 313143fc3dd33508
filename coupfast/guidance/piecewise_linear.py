"""The trace of a classifier that is linear between kinks: its value, its slopes, and its linear part at given slopes.

ReLU networks are such; whether a classifier is one is read off its trace, operation by operation.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from coupfast.agreement import agree, random_images, value_and_vjp
from coupfast.guidance.confidence import scaled_logits
from coupfast.guidance.slopes import Slope
from coupfast.tracing import LINEAR_VIEWS, Trace, trace

logger = logging.getLogger(__name__)

aten = torch.ops.aten

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
        x = random_images(example)
        with torch.enable_grad():
            logits, gradient, w = value_and_vjp(lambda x: scaled_logits(classifier, x), x)
            found, slopes = self.evaluate(x, keep_slopes=True)
            tangent = torch.zeros_like(x).requires_grad_()
            (found_gradient,) = torch.autograd.grad(self.linear(tangent, slopes), tangent, w)
        tolerance = 1e3 * torch.finfo(x.dtype).eps
        return agree(found, logits, tolerance) and agree(found_gradient, gradient, tolerance)

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
