"""The steps of a table and the exact discrete gradient of all of them, in the memory of one step.

With x_{k+1} = a_k x_k + b_k ε̂(x_k) + c_k g(x_k) + d_k z_k, the gradient of any loss of x_K is

    v_k = a_k v_{k+1} + b_k J_ε(x_k)ᵀ v_{k+1} + c_k H(x_k) v_{k+1},      v_K = ∂L/∂x_K,     ∂L/∂z_k = d_k v_{k+1}

Every x_k is kept (12 KiB per CIFAR-10 image and step in float32), so each step is rebuilt exactly where it ran, one at a
time. What else is kept follows from a `Storage`: it changes time and memory, never the result. In an extended table a step also
reads x_in and the step before it; what flows back to those is carried in a `Cotangent`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from coupfast import tape
from coupfast.derivatives import all_finite, first_order_only, on_its_device, outside_transforms, refuse_transforms, unwrapped
from coupfast.engine import BoundEngine, Cotangent, Keep, Noise, Program, ReplayedNoise, State
from coupfast.engine.precision import strict_float32
from coupfast.engine.rows import extra_images, step_back
from coupfast.tape import Track
from coupfast_kernels.guided_step import guided_step_ref


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

    def pieces(self, batch: int) -> list[slice]:
        return [slice(start, min(start + self.piece, batch)) for start in range(0, batch, self.piece)]


@dataclasses.dataclass
class Run:
    """One purification under way: how to take its steps, what it keeps, and where it went."""

    bound: BoundEngine
    noise: Noise
    storage: Storage
    progress: Callable[[], object] = lambda: None
    keep_states: bool = False
    check: Callable[[], object] = lambda: None  # before a backward pass: raises where the weights are others by then
    surrogate: tuple[BoundEngine, list[int]] | None = None  # of a coarse table, where its states lie in the fine one
    track: Track | None = None  # steps that outlive the run
    saved: list[list[Any]] = dataclasses.field(default_factory=list)  # [piece][step]
    states: list[torch.Tensor] = dataclasses.field(default_factory=list)

    def keep(self, k: int, steps: int) -> Keep:
        if self.surrogate is not None:
            return "nothing"
        if k >= steps - self.storage.kept_steps:
            return "activations"
        return "slopes" if self.storage.slopes else "nothing"


def integrate(x_0: torch.Tensor, run: Run, *, gradient: bool, x_in: torch.Tensor | None = None) -> torch.Tensor:
    """x_K from x_0, differentiable with respect to x_0, x_in and replayed noise if `gradient`.

    Args:
        x_0: State in the [-1, 1] scale, shape (batch, channels, height, width).
        run: How to run, what to keep; `run.states` is filled as far as the run keeps states.
        gradient: Whether a backward pass is to be possible (the run then keeps every state).
        x_in: What a table with such a column reads in every step; the same shape.
    """
    on = tape.current()
    run.track = None if on is None else on.track(x_0.detach())
    with strict_float32(x_0.device.type):
        if gradient:
            rows, second = (run.noise.rows, run.noise.second) if isinstance(run.noise, ReplayedNoise) else (None, None)
            return _ExactGradient.apply(x_0, x_in, rows, second, run)
        with torch.no_grad():
            run.states = _forward(run, x_0.detach(), None if x_in is None else x_in.detach(), for_gradient=False)
            return run.states[-1]


def _forward(run: Run, x_0: torch.Tensor, x_in: torch.Tensor | None, *, for_gradient: bool) -> list[torch.Tensor]:
    """States x_0 … x_K (only x_K, if the others are not needed); `run.saved` is filled."""
    run.saved = []
    pieces = run.storage.pieces(len(x_0))
    steps = run.bound.for_batch(len(x_0[pieces[0]])).table.num_steps
    keep_states = for_gradient or run.keep_states
    whole: list[torch.Tensor] = []
    if len(pieces) > 1:  # the pieces' states go where they belong at once: together and apart would be twice the memory
        whole = [torch.empty_like(x_0) for _ in range(steps + 1 if keep_states else 1)]
    for piece in pieces:
        noise = run.noise.images(piece)
        state = State(x_0[piece], None if x_in is None else x_in[piece])
        program = run.bound.for_batch(len(state.x))
        states, saved = [state.x], []
        taken = [] if run.track is None else run.track.taken(piece, steps, every=keep_states)
        for k in range(steps):
            if k < len(taken):
                there = taken[k]
                state, kept = state if there is None else State(*there)._replace(x_in=state.x_in), None  # type: ignore[arg-type]
            else:
                state, kept = _step(program, k, state, noise, run.keep(k, steps) if for_gradient else "nothing")
                if run.track is not None:
                    run.track.took(piece, k, state._replace(x_in=None), every=keep_states)  # x_in is there anyhow
            saved.append(kept)
            if not keep_states:
                states.clear()
            states.append(state.x)
            if whole:
                if keep_states:
                    whole[k][piece] = states[0]
                    states = [state.x]
                if k == steps - 1:
                    whole[-1][piece] = state.x
            run.progress()
        run.saved.append(saved)
    return whole or states


def _step(program: Program, k: int, state: State, noise: Noise, keep: Keep) -> tuple[State, Any]:
    table = program.table
    if not table.evaluates(k):
        return State(_without_networks(program, k, state, noise), state.x_in, state.x if table.two_step else None), None
    if not table.extended:
        x_next, kept = program.step(k, state.x, noise, keep)
        return State(x_next), kept
    if not table.two_step:
        x_next, kept = program.step(k, state.x, noise, keep, more=state)
        return State(x_next, state.x_in), kept
    x_next, kept, eps_hat = program.step(k, state.x, noise, keep, more=state)
    return State(x_next, state.x_in, state.x, eps_hat), kept


def _without_networks(program: Program, k: int, state: State, noise: Noise) -> torch.Tensor:
    """A row that only mixes what is there, as a forward noising does: nothing for an engine to be fast at."""
    table, row, x = program.table, program.table.row(k), state.x
    z = noise.z(k, x) if row[3] != 0.0 else None
    z2 = noise.z2(k, x) if table.extended and row[5] != 0.0 else None
    return guided_step_ref(x, None, None, row, z, z2=z2, **extra_images(table, k, state))


class _ExactGradient(torch.autograd.Function):
    """x_0, x_in, noise → x_K, with the discrete adjoint for its backward pass."""

    @staticmethod
    def forward(
        x_0: torch.Tensor, x_in: torch.Tensor | None, rows: torch.Tensor | None, second: torch.Tensor | None, run: Run
    ) -> torch.Tensor:
        run.states = _forward(run, x_0.detach(), None if x_in is None else x_in.detach(), for_gradient=True)
        return run.states[-1].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        _, x_in, rows, second, ctx.run = inputs
        ctx.reads_x_in = x_in is not None
        ctx.noise_shapes = [None if noise is None else noise.shape for noise in (rows, second)]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        refuse_transforms()
        grad = unwrapped(grad)
        with outside_transforms(), on_its_device(grad.device):
            return *first_order_only(*_ExactGradient._vjp(ctx, grad)), None

    @staticmethod
    def _vjp(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.run.check()
        wanted = ctx.needs_input_grad[2:4]
        grad_rows, grad_second = (
            grad.new_zeros(shape) if needed else None for shape, needed in zip(ctx.noise_shapes, wanted, strict=True)
        )
        grad_in = torch.zeros_like(grad) if ctx.reads_x_in else None
        with torch.no_grad(), strict_float32(grad.device.type):
            grad_x = _backward(ctx.run, grad, grad_in, grad_rows, grad_second)
        return grad_x, grad_in, grad_rows, grad_second


def _backward(
    run: Run,
    grad: torch.Tensor,
    grad_in: torch.Tensor | None,
    grad_rows: torch.Tensor | None,
    grad_second: torch.Tensor | None,
) -> torch.Tensor:
    """∂L/∂x_0 from ∂L/∂x_K; fills the others that are given."""
    bound, states = run.bound, run.states[:-1]
    if run.surrogate is not None:
        bound, chosen = run.surrogate
        states = [states[k] for k in chosen]
    grad_x = torch.empty_like(grad)
    track = run.track if grad_rows is None and grad_second is None else None  # whose sums are not kept
    name = "" if track is None else track.name(grad)
    for index, piece in enumerate(run.storage.pieces(len(grad))):
        program = bound.for_batch(len(grad[piece]))
        v = Cotangent(grad[piece].contiguous(), None if grad_in is None else grad_in[piece])
        steps = len(states)
        if track is not None and (gone := track.gone(name, piece, steps)) is not None:
            steps, v = gone[0], Cotangent(*gone[1])  # type: ignore[arg-type]
        for k in reversed(range(steps)):
            saved = None
            if run.surrogate is None:
                # Used up: a second backward pass through a retained graph rebuilds the step instead.
                saved, run.saved[index][k] = run.saved[index][k], None
            row = program.table.row(k)
            if grad_rows is not None:
                grad_rows[k, piece] = row[3] * v.x
            if grad_second is not None and program.table.extended:
                grad_second[k, piece] = row[5] * v.x
            v = _step_vjp(program, k, states[k][piece], saved, v)
            if track is not None:
                track.went(name, piece, k, v)
        if not all_finite(v.x):
            _raise_not_finite(program, [state[piece] for state in states], grad[piece])
        grad_x[piece] = v.x
        if grad_in is not None:
            assert v.x_in is not None
            grad_in[piece] = v.x_in
    return grad_x


def _step_vjp(program: Program, k: int, x_k: torch.Tensor, saved: Any, v: Cotangent) -> Cotangent:
    """One step back, in the notation of `Cotangent`."""
    table = program.table
    if table.evaluates(k):
        if table.extended:
            return program.step_vjp(k, x_k, saved, v.x, more=v)
        return Cotangent(program.step_vjp(k, x_k, saved, v.x))
    return step_back(table, k, v.x, None, torch.zeros_like, v)  # into ε̂ nothing flows


def _raise_not_finite(program: Program, states: list[torch.Tensor], grad: torch.Tensor) -> None:
    """Walk back once more, looking at every step: that would cost a synchronisation a step in an ordinary run."""
    if not all_finite(grad):
        raise FloatingPointError(
            "the gradient that came into the purification is not finite: the loss, or the classifier after it, made it"
        )
    v = Cotangent(grad, torch.zeros_like(grad) if program.table.e is not None else None)
    k = len(states) - 1
    for k in reversed(range(len(states))):
        v = _step_vjp(program, k, states[k], None, v)
        if not all_finite(v.x):
            break
    raise FloatingPointError(
        f"the gradient stopped being finite in step {k} (t = {float(program.table.t[k]):.6g}): "
        f"{int((~torch.isfinite(v.x)).sum())} of {v.x.numel()} values; look at the networks' outputs at that state "
        f"(`return_trajectory=True` gives it)"
    )
