"""What autograd sees of a purification besides its steps: strict fp32 in both directions, first derivatives, BPDA's identity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from coupfast.engine.precision import strict_float32


class _FirstOrderOnly(torch.autograd.Function):
    """The identity, until somebody differentiates it. (`once_differentiable` is silent where the loss is linear.)"""

    @staticmethod
    def forward(grad: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        return grad.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        raise RuntimeError(
            "a purification has first derivatives only: its gradient cannot be differentiated again; a loss that contains "
            "the gradient needs plain back-propagation (`coupfast.reference.purify_ref`)"
        )


def first_order_only(*gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The results of a backward pass, which raise where `create_graph=True` makes somebody differentiate them again."""
    if not torch.is_grad_enabled():
        return gradients
    anchor = torch.zeros((), requires_grad=True)
    return tuple(None if gradient is None else _FirstOrderOnly.apply(gradient, anchor) for gradient in gradients)


def all_finite(v: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite; waits for the device."""
    return bool(torch.isfinite(v).all())


class _IdentityGradient(torch.autograd.Function):
    """image, purified → purified, with the gradient of the image taken to be that of the purified image."""

    @staticmethod
    def forward(image: torch.Tensor, purified: torch.Tensor) -> torch.Tensor:
        return purified.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad, None


def identity_gradient(image: torch.Tensor, purified: torch.Tensor) -> torch.Tensor:
    """BPDA (Athalye et al. 2018, arXiv:1802.00420): `purified` forwards, the identity backwards."""
    return _IdentityGradient.apply(image, purified.detach())


class _Strict(torch.autograd.Function):
    """x → function(x) whose backward pass, too, runs in strict fp32: autograd would run it in the caller's settings."""

    @staticmethod
    def forward(x: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor], graph: list) -> torch.Tensor:
        with torch.enable_grad(), strict_float32(x.device.type):
            start = x.detach().requires_grad_()
            end = function(start)
        graph[:] = [start, end]
        return end.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        ctx.graph = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        start, end = ctx.graph
        with torch.no_grad(), strict_float32(grad.device.type):
            (grad_x,) = torch.autograd.grad(end, start, grad, retain_graph=True)
        return *first_order_only(grad_x), None, None


def strictly(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """function(x) in strict fp32, forwards and backwards; first derivatives only."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Strict.apply(x, function, [])
    with strict_float32(x.device.type):
        return function(x)
