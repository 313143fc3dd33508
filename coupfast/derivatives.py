"""What autograd sees of a purification besides its steps: strict fp32 both ways, first derivatives only, BPDA's identity.

And one step of back-propagation by hand, `leaves` and `pull`, where a step is a function of tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

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


def refuse_transforms() -> None:
    """RuntimeError inside of a `torch.func` transform that cannot go through a purification, in words."""
    interpreter = torch._C._functorch.peek_interpreter_stack()
    if interpreter is None or interpreter.key() == torch._C._functorch.TransformType.Grad:
        return
    name = str(interpreter.key()).rpartition(".")[2].lower()
    raise RuntimeError(
        f"a purification cannot run inside of torch.func.{name} (nor jacrev, jacfwd, hessian, which use it): it looks at its "
        "images and has reverse-mode first derivatives only; pass the whole batch, and use torch.autograd.grad or "
        "torch.func.grad"
    )


def on_its_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Where tensors without a `device` are made: beside those of a CPU, whatever default device the caller has set."""
    if device.type != "cpu" or torch.get_default_device().type == "cpu":
        return contextlib.nullcontext()
    return torch.device("cpu")


def outside_transforms() -> contextlib.AbstractContextManager:
    """Outside of `torch.func.grad` and its kind for a while: what is made and kept in here must not be theirs."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return contextlib.nullcontext()
    return temporarily_clear_interpreter_stack()


def unwrapped(x: torch.Tensor) -> torch.Tensor:
    """The tensor inside of what `torch.func` transforms put around it."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x.detach()


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


class _Graph:
    """What a forward pass leaves for its backward pass: a graph of its own, or what it takes to make one."""

    start: torch.Tensor | None = None
    end: torch.Tensor | None = None
    function: Callable[[torch.Tensor], torch.Tensor] | None = None


class _Strict(torch.autograd.Function):
    """x → function(x) whose backward pass, too, runs in strict fp32: autograd would run it in the caller's settings."""

    @staticmethod
    def forward(
        x: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor], graph: _Graph, check: Callable[[], object]
    ) -> torch.Tensor:
        if torch._C._functorch.peek_interpreter_stack() is not None:  # which has no graph of one's own: made in `backward`
            graph.start, graph.function = x, function
            with torch.no_grad(), strict_float32(x.device.type):
                return function(x)
        with torch.enable_grad(), strict_float32(x.device.type):
            start = x.detach().requires_grad_()
            end = function(start)
        graph.start, graph.end = start, end
        return end.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        _, _, ctx.graph, ctx.check = inputs

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        refuse_transforms()
        grad = unwrapped(grad)
        with outside_transforms(), on_its_device(grad.device):
            return *first_order_only(_Strict._vjp(ctx, grad)), None, None, None

    @staticmethod
    def _vjp(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        ctx.check()
        start, end = ctx.graph.start, ctx.graph.end
        assert start is not None
        if end is None:
            assert ctx.graph.function is not None
            with torch.enable_grad(), strict_float32(grad.device.type):
                start = unwrapped(start).requires_grad_()
                end = ctx.graph.function(start)
        with torch.no_grad(), strict_float32(grad.device.type):
            (grad_x,) = torch.autograd.grad(end, start, grad, retain_graph=True)
        return grad_x


class _ParameterGradients(torch.autograd.Function):
    """Zeros like network(x); the backward pass gives the parameters' gradients, and runs only where one is wanted."""

    @staticmethod
    def forward(
        network: torch.nn.Module,
        check: Callable[[], object],
        x: torch.Tensor,
        like: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        return torch.zeros_like(like)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        ctx.network, ctx.check, x, _, *parameters = inputs
        ctx.save_for_backward(x, *parameters)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        ctx.check()
        x, *parameters = ctx.saved_tensors
        with torch.enable_grad(), strict_float32(grad.device.type):
            found = torch.autograd.grad(ctx.network(x), parameters, grad, allow_unused=True)
        return None, None, None, None, *first_order_only(*found)


def with_parameter_gradients(
    logits: torch.Tensor, network: torch.nn.Module, x: torch.Tensor, check: Callable[[], object]
) -> torch.Tensor:
    """`logits`, which are network(x), such that those parameters of the network that require gradients get them.

    `check` runs before a backward pass.
    """
    parameters = [each for each in network.parameters() if each.requires_grad and not each.is_inference()]
    if not parameters or not torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
        return logits
    return logits + _ParameterGradients.apply(network, check, x.detach(), logits.detach(), *parameters)


def strictly(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, check: Callable[[], object] = lambda: None
) -> torch.Tensor:
    """function(x) in strict fp32, forwards and backwards; first derivatives only. `check` runs before a backward pass."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Strict.apply(x, function, _Graph(), check)
    with strict_float32(x.device.type):
        return function(x)


def leaves(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The same values without what they were made of, to be differentiated with respect to as far as they are numbers."""
    return tuple(tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in tensors)


def pull(outputs: Sequence[torch.Tensor], v: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The cotangents of leaves from those, `v`, of what was computed of them; zero where nothing flows."""
    flowing = [(output, w) for output, w in zip(outputs, v, strict=True) if output.requires_grad]
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    found: Iterator[torch.Tensor | None] = iter([None] * len(wanted))
    if flowing:
        found = iter(torch.autograd.grad([o for o, _ in flowing], wanted, [w for _, w in flowing], allow_unused=True))
    cotangents = []
    for tensor in inputs:
        gradient = next(found) if tensor.requires_grad else None
        cotangents.append(torch.zeros_like(tensor) if gradient is None else gradient)
    return cotangents
