"""The steps of a `StepMethod` and the exact gradient of all of them: states are kept, one step at a time is taken once more.

Nothing is known of such a step but that it repeats itself: the backward pass runs it again from its stored state with gradients
recorded, and back-propagates through that one step. Memory: all states, and one step's graph, however many steps there are.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from coupfast import tape
from coupfast.derivatives import (
    all_finite,
    first_order_only,
    leaves,
    on_its_device,
    outside_transforms,
    pull,
    refuse_transforms,
    unwrapped,
)
from coupfast.engine import Noise, ReplayedNoise, StepMemory
from coupfast.engine.memory import AllocationAccount
from coupfast.engine.precision import strict_float32
from coupfast.integrate import Storage
from coupfast.methods import Networks, StepMethod, StepState
from coupfast.tape import Track


class BoundSteps:
    """A step method bound to networks and a shape of images; what a planner asks of an engine.

    Args:
        method: The method.
        networks: Frozen, in eval mode.
        example: A state; its image shape, dtype and device are those of all states to come.
    """

    engine = "eager"
    largest_batch: int | None = None

    def __init__(self, method: StepMethod, networks: Networks, example: torch.Tensor) -> None:
        self.method, self.networks = method, networks
        self.example = torch.zeros_like(example[:1])
        self._measured: tuple[StepMemory, int, dict[str, dict[str, int]]] | None = None

    def memory(self, batch: int) -> StepMemory:
        """In proportion to one image, which takes step 0 and back with every result's storage counted."""
        return StepMemory(*(batch * size for size in dataclasses.astuple(self._measure()[0])))

    def state_bytes(self) -> int:
        """Of one image's state, all of its tensors."""
        return self._measure()[1]

    def evaluations(self) -> dict[str, dict[str, int]]:
        """Calls of the networks and passes back through them in step 0, and in the rebuilt one with its back-propagation."""
        return self._measure()[2]

    def weights_bytes(self, batch: int, *, gradient: bool) -> int:
        return 0

    def _measure(self) -> tuple[StepMemory, int, dict[str, dict[str, int]]]:
        if self._measured is None:
            self._measured = self._account()
        return self._measured

    def _account(self) -> tuple[StepMemory, int, dict[str, dict[str, int]]]:
        method, x = self.method, self.example
        noise = ReplayedNoise(torch.zeros((method.num_noises, *x.shape), dtype=x.dtype, device=x.device))
        calls: collections.Counter[str] = collections.Counter()
        networks = [("score", self.networks.score), ("classifier", self.networks.classifier)]

        def count(name: str, output: Any) -> None:
            calls.update({f"{name} forward": 1})
            if isinstance(output, torch.Tensor) and output.requires_grad:
                # Once a backward pass: a step that differentiates for itself has its own, and the rebuilt one another.
                output.register_hook(lambda _: calls.update({f"{name} backward": 1}))

        hooks = [
            network.register_forward_hook(lambda _module, _inputs, output, name=name: count(name, output))
            for name, network in networks
            if network is not None
        ]
        weights = [
            tensor for _, network in networks if network is not None for tensor in [*network.parameters(), *network.buffers()]
        ]
        try:
            with torch.no_grad():
                state = method.start(x, noise)
                with AllocationAccount([x, noise.rows, *weights, *state]) as forward:
                    following = method.step(0, state, noise, self.networks)
            _check_state(state, following, self.method)
            step = dict(calls)
            calls.clear()
            with AllocationAccount([x, noise.rows, *weights, *state]) as rebuilding:
                _pull(lambda s, n: method.step(0, s, n, self.networks), state, [torch.zeros_like(s) for s in following], noise)
        finally:
            for hook in hooks:
                hook.remove()
        rebuild = dict(calls)
        size = sum(tensor.nbytes for tensor in state)
        memory = StepMemory(forward.peak, forward.peak, rebuilding.peak, rebuilding.peak, 0, 0)
        return memory, size, {"step": step, "rebuild": rebuild, "slopes": rebuild, "activations": rebuild}


def _check_state(before: StepState, after: Any, method: StepMethod) -> None:
    name = type(method).__name__
    if not isinstance(after, tuple) or not all(isinstance(tensor, torch.Tensor) for tensor in after):
        raise TypeError(f"{name}.step returns a tuple of tensors, got {type(after).__name__}")
    found, wanted = ([(tuple(tensor.shape[1:]), tensor.dtype) for tensor in state] for state in (after, before))
    if found != wanted:
        raise ValueError(f"{name}.step returns a state like the one that it got, {wanted} an image; it returned {found}")


@dataclasses.dataclass
class StepRun:
    """One purification by a step method under way."""

    bound: BoundSteps
    noise: Noise
    storage: Storage
    progress: Callable[[], object] = lambda: None
    keep_states: bool = False
    check: Callable[[], object] = lambda: None  # before a backward pass: raises where the weights are others by then
    track: Track | None = None  # steps that outlive the run
    states: list[list[StepState]] = dataclasses.field(default_factory=list)  # [piece][step]

    def trajectory(self) -> list[torch.Tensor]:
        """The images of all states, x_0 … x_K."""
        return [torch.cat([piece[k][0] for piece in self.states]) for k in range(len(self.states[0]))]


def integrate_steps(x_in: torch.Tensor, run: StepRun, *, gradient: bool) -> torch.Tensor:
    """The purified image in the [-1, 1] scale, differentiable with respect to x_in and replayed noise if `gradient`.

    Args:
        x_in: State in the [-1, 1] scale, shape (batch, channels, height, width).
        run: How to run; `run.states` is filled as far as the run keeps states.
        gradient: Whether a backward pass is to be possible (the run then keeps every state).
    """
    on = tape.current()
    run.track = None if on is None else on.track(x_in.detach())
    with strict_float32(x_in.device.type):
        if gradient:
            return _StepGradient.apply(x_in, run.noise.rows if isinstance(run.noise, ReplayedNoise) else None, run)
        with torch.no_grad():
            return _forward(run, x_in.detach(), for_gradient=False)


def _forward(run: StepRun, x_in: torch.Tensor, *, for_gradient: bool) -> torch.Tensor:
    method, networks = run.bound.method, run.bound.networks
    run.states, ends = [], []
    for piece in run.storage.pieces(len(x_in)):
        noise = run.noise.images(piece)
        state = method.start(x_in[piece], noise)
        states, every = [state], for_gradient or run.keep_states
        taken = [] if run.track is None else run.track.taken(piece, method.num_steps, every=every)
        for k in range(method.num_steps):
            if k < len(taken):
                there = taken[k]
                state = state if there is None else tuple(there)  # type: ignore[arg-type]
            else:
                state = _step(method, k, state, noise, networks)
                if run.track is not None:
                    run.track.took(piece, k, state, every=every)
            if not every:
                states.clear()
            states.append(state)
            run.progress()
        run.states.append(states)
        ends.append(method.finish(state))
    return torch.cat(ends)


def _step(method: StepMethod, k: int, state: StepState, noise: Noise, networks: Networks) -> StepState:
    """The state after step k, which has to leave alone what it starts from."""
    rows = (noise.rows,) if isinstance(noise, ReplayedNoise) else ()
    versions = [tensor._version for tensor in (*state, *rows)]
    following = method.step(k, state, noise, networks)
    if k == 0:
        _check_state(state, following, method)
    if versions != [tensor._version for tensor in (*state, *rows)]:
        raise ValueError(
            f"{type(method).__name__}.step writes into its state or noise in step {k}, which the backward pass needs "
            "again: work on a copy"
        )
    return tuple(tensor.detach() for tensor in following)


class _StepGradient(torch.autograd.Function):
    """x_in, noise → purified image, each step rebuilt from its state in the backward pass."""

    @staticmethod
    def forward(x_in: torch.Tensor, rows: torch.Tensor | None, run: StepRun) -> torch.Tensor:
        return _forward(run, x_in.detach(), for_gradient=True).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        x_in, rows, ctx.run = inputs
        ctx.save_for_backward(x_in)
        ctx.rows_shape = None if rows is None else rows.shape

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        refuse_transforms()
        grad, x_in = unwrapped(grad), unwrapped(ctx.saved_tensors[0])
        with outside_transforms(), on_its_device(grad.device):
            return *first_order_only(*_StepGradient._vjp(ctx, x_in, grad)), None

    @staticmethod
    def _vjp(ctx: Any, x_in: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.run.check()
        grad_rows = grad.new_zeros(ctx.rows_shape) if ctx.needs_input_grad[1] else None
        with torch.no_grad(), strict_float32(grad.device.type):
            grad_x = _backward(ctx.run, x_in, grad, grad_rows)
        return grad_x, grad_rows


class _Leaves:
    """A piece's replayed noise as leaves, kept in `taken`, so that what a step does with them can be differentiated."""

    def __init__(self, rows: torch.Tensor, taken: dict[int, torch.Tensor]) -> None:
        self.rows, self.taken = rows, taken

    def z(self, k: int, like: torch.Tensor) -> torch.Tensor:
        if k not in self.taken:
            self.taken[k] = self.rows[k].detach().requires_grad_()
        return self.taken[k]

    def z2(self, k: int, like: torch.Tensor) -> torch.Tensor:
        raise ValueError("a step function takes all of its noise by `noise.z`, which has `num_noises` rows")

    def images(self, piece: slice) -> Noise:
        raise AssertionError("a piece is not cut again")


def _backward(run: StepRun, x_in: torch.Tensor, grad: torch.Tensor, grad_rows: torch.Tensor | None) -> torch.Tensor:
    method, networks = run.bound.method, run.bound.networks
    grad_x = torch.empty_like(x_in)
    track = run.track if grad_rows is None else None  # whose sums are not kept
    name = "" if track is None else track.name(grad)

    def step(k: int) -> Callable[[StepState, Noise], StepState]:
        return lambda state, noise: method.step(k, state, noise, networks)

    for states, piece in zip(run.states, run.storage.pieces(len(x_in)), strict=True):
        noise = run.noise.images(piece)
        into = None if grad_rows is None else grad_rows[:, piece]
        steps, gone = method.num_steps, None if track is None else track.gone(name, piece, method.num_steps)
        if gone is None:
            v = _pull(lambda s, _: (method.finish(s),), states[-1], [grad[piece]], noise, into)
        else:
            steps, v = gone[0], [tensor for tensor in gone[1] if tensor is not None]  # all of them: zero where nothing flows
        for k in reversed(range(steps)):
            v = _pull(step(k), states[k], v, noise, into)
            if not all(all_finite(part) for part in v if part.is_floating_point()):
                raise FloatingPointError(
                    f"the gradient stopped being finite in step {k} of {type(method).__name__}; look at the state there "
                    f"(`return_trajectory=True` gives its image)"
                )
            if track is not None:
                track.went(name, piece, k, v)
        grad_x[piece] = _pull(lambda s, n: method.start(s[0], n), (x_in[piece],), v, noise, into)[0]
    return grad_x


def _pull(
    function: Callable[[StepState, Noise], StepState],
    state: StepState,
    v: Sequence[torch.Tensor],
    noise: Noise,
    grad_rows: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """The cotangents of `state` from those of function(state, noise); those of replayed noise are added to `grad_rows`."""
    rows: dict[int, torch.Tensor] = {}
    if grad_rows is not None:
        assert isinstance(noise, ReplayedNoise)
        noise = _Leaves(noise.rows, rows)
    with torch.enable_grad(), nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        inputs = leaves(state)
        results = function(inputs, noise)
        cotangents = pull(results, v, [*inputs, *rows.values()])
    if grad_rows is not None:
        for k, gradient in zip(rows, cotangents[len(inputs) :], strict=True):
            grad_rows[k] += gradient
    return cotangents[: len(inputs)]
