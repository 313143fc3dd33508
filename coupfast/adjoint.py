"""The exact discrete gradient of a whole purification, in the memory of one step.

With x_{k+1} = a_k x_k + b_k ε̂(x_k) + c_k g(x_k) + d_k z_k, the gradient of any loss of x_K is

    v_k = a_k v_{k+1} + b_k J_ε(x_k)ᵀ v_{k+1} + c_k H(x_k) v_{k+1},      v_K = ∂L/∂x_K,     ∂L/∂z_k = d_k v_{k+1}

Every x_k is kept (12 KiB per CIFAR-10 image and step in float32), so each step is rebuilt exactly where it ran, one at a
time. What else is kept follows from a `Plan`: it changes time and memory, never the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from coupfast.engine import Keep, Noise, Program, Programs, ReplayedNoise
from coupfast.engine.precision import strict_float32


@dataclasses.dataclass(frozen=True)
class Storage:
    """What a run keeps for its gradient, besides every state.

    Attributes:
        piece: Images that go through all steps together.
        slopes: Whether every step keeps its activations' slopes (bits).
        kept_steps: How many of the last steps keep all activations, so that they need not be recomputed.
    """

    piece: int
    slopes: bool = False
    kept_steps: int = 0


@dataclasses.dataclass
class Run:
    """One purification under way: how to take its steps, what it keeps, and where it went."""

    programs: Programs
    noise: Noise
    storage: Storage
    progress: Callable[[], None] = lambda: None
    keep_states: bool = False
    surrogate: tuple[Programs, list[int]] | None = None  # programs of a coarse table, where its states lie in the fine one
    saved: list[list[Any]] = dataclasses.field(default_factory=list)  # [piece][step]
    states: list[torch.Tensor] = dataclasses.field(default_factory=list)

    def pieces(self, batch: int) -> list[slice]:
        return [slice(start, min(start + self.storage.piece, batch)) for start in range(0, batch, self.storage.piece)]


def _forward(run: Run, x_0: torch.Tensor, *, for_gradient: bool) -> list[torch.Tensor]:
    """States x_0 … x_K (only x_K, if the others are not needed); `run.saved` is filled."""
    run.saved = []
    pieces = run.pieces(len(x_0))
    steps = run.programs.for_batch(len(x_0[pieces[0]])).table.num_steps
    keep_states = for_gradient or run.keep_states
    whole: list[torch.Tensor] = []
    if len(pieces) > 1:  # the pieces' states go where they belong at once: together and apart would be twice the memory
        whole = [torch.empty_like(x_0) for _ in range(steps + 1 if keep_states else 1)]
    for piece in pieces:
        x_k, noise = x_0[piece], run.noise.images(piece)
        program = run.programs.for_batch(len(x_k))
        states, saved = [x_k], []
        for k in range(steps):
            keep: Keep = "nothing"
            if for_gradient and run.surrogate is None:
                if k >= steps - run.storage.kept_steps:
                    keep = "activations"
                elif run.storage.slopes:
                    keep = "slopes"
            x_k, kept = program.step(k, x_k, noise, keep)
            saved.append(kept)
            if not keep_states:
                states.clear()
            states.append(x_k)
            if whole:
                if keep_states:
                    whole[k][piece] = states[0]
                    states = [x_k]
                if k == steps - 1:
                    whole[-1][piece] = x_k
            run.progress()
        run.saved.append(saved)
    return whole or states


class _ExactGradient(torch.autograd.Function):
    """x_0, noise → x_K, with the discrete adjoint for its backward pass."""

    @staticmethod
    def forward(x_0: torch.Tensor, noise: torch.Tensor | None, run: Run) -> torch.Tensor:
        run.states = _forward(run, x_0.detach(), for_gradient=True)
        return run.states[-1].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        _, noise, ctx.run = inputs
        ctx.noise_shape = None if noise is None else noise.shape

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        grad_noise = grad.new_zeros(ctx.noise_shape) if ctx.needs_input_grad[1] else None
        with torch.no_grad(), strict_float32(grad.device.type):
            grad_x = _backward(ctx.run, grad, grad_noise)
        if torch.is_grad_enabled():  # create_graph=True
            anchor = torch.zeros((), requires_grad=True)
            grad_x = _FirstOrderOnly.apply(grad_x, anchor)
            grad_noise = None if grad_noise is None else _FirstOrderOnly.apply(grad_noise, anchor)
        return grad_x, grad_noise, None


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


def _backward(run: Run, grad: torch.Tensor, grad_noise: torch.Tensor | None) -> torch.Tensor:
    """∂L/∂x_0 from ∂L/∂x_K; fills `grad_noise`."""
    programs, states = run.programs, run.states[:-1]
    if run.surrogate is not None:
        programs, chosen = run.surrogate
        states = [states[k] for k in chosen]
    grad_x = torch.empty_like(grad)
    for index, piece in enumerate(run.pieces(len(grad))):
        v = grad[piece].contiguous()
        program = programs.for_batch(len(v))
        for k in reversed(range(len(states))):
            saved = None
            if run.surrogate is None:
                # Used up: a second backward pass through a retained graph rebuilds the step instead.
                saved, run.saved[index][k] = run.saved[index][k], None
            if grad_noise is not None:
                grad_noise[k, piece] = program.table.row(k)[3] * v
            v = program.step_vjp(k, states[k][piece], saved, v)
        if not _all_finite(v):
            _raise_not_finite(program, [state[piece] for state in states], grad[piece])
        grad_x[piece] = v
    return grad_x


def _all_finite(v: torch.Tensor) -> bool:
    return bool(torch.isfinite(v).all())


def _raise_not_finite(program: Program, states: list[torch.Tensor], grad: torch.Tensor) -> None:
    """Walk back once more, looking at every step: that would cost a synchronisation a step in an ordinary run."""
    if not _all_finite(grad):
        raise FloatingPointError(
            "the gradient that came into the purification is not finite: the loss, or the classifier after it, made it"
        )
    v = grad
    for k in reversed(range(len(states))):
        v = program.step_vjp(k, states[k], None, v)
        if not _all_finite(v):
            break
    raise FloatingPointError(
        f"the gradient stopped being finite in step {k} (t = {float(program.table.t[k]):.6g}): "
        f"{int((~torch.isfinite(v)).sum())} of {v.numel()} values; look at the networks' outputs at that state "
        f"(`return_trajectory=True` gives it)"
    )


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


def wanted(x_0: torch.Tensor, noise: Noise) -> bool:
    """Whether autograd would ask for a gradient of a run from this state with this noise."""
    rows_wanted = isinstance(noise, ReplayedNoise) and noise.rows.requires_grad
    return torch.is_grad_enabled() and (x_0.requires_grad or rows_wanted)


def integrate(x_0: torch.Tensor, run: Run, *, gradient: bool) -> torch.Tensor:
    """x_K from x_0, differentiable with respect to x_0 and replayed noise if `gradient`.

    Args:
        x_0: State in the [-1, 1] scale, shape (batch, channels, height, width).
        run: How to run, what to keep; `run.states` is filled as far as the run keeps states.
        gradient: Whether a backward pass is to be possible (the run then keeps every state).
    """
    with strict_float32(x_0.device.type):
        if gradient:
            return _ExactGradient.apply(x_0, run.noise.rows if isinstance(run.noise, ReplayedNoise) else None, run)
        with torch.no_grad():
            run.states = _forward(run, x_0.detach(), for_gradient=False)
            return run.states[-1]


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
        if torch.is_grad_enabled():  # create_graph=True
            grad_x = _FirstOrderOnly.apply(grad_x, torch.zeros((), requires_grad=True))
        return grad_x, None, None


def strictly(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """function(x) in strict fp32, forwards and backwards; first derivatives only."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Strict.apply(x, function, [])
    with strict_float32(x.device.type):
        return function(x)
