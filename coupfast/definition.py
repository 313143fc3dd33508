"""What a purifier is defined to compute, in float64 and by plain back-propagation: what everything fast is compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from coupfast.derivatives import leaves, pull
from coupfast.engine import CounterNoise, ReplayedNoise
from coupfast.engine.memory import AllocationAccount
from coupfast.engine.networks import frozen
from coupfast.methods import Networks, Recipe, StepMethod, StepState, TableMethod
from coupfast.purify import Purifier


class Definition:
    """The purifier's `method.definition` between the two changes of range.

    Args:
        purifier: Whose networks are copied to `dtype` (those that have it already are shared).
        head: A classifier of purified images to put after it, or None.
        dtype: Of everything but the noise, which is made in float32 and cast.
        detached: Whether gradients take the guidance as a constant.
    """

    def __init__(
        self,
        purifier: Purifier,
        head: nn.Module | None = None,
        *,
        dtype: torch.dtype = torch.float64,
        detached: bool = False,
    ) -> None:
        self.method, self.num_steps = purifier.settings.method, purifier.num_steps
        self.dtype = dtype
        copies: dict[int, nn.Module] = {}
        for network in (purifier.score, purifier.classifier, head):
            if network is not None and id(network) not in copies:
                copies[id(network)] = frozen(network).to(dtype)
        self.networks = tuple(copies.values())
        self.score = copies[id(purifier.score)]
        self.classifier = None if purifier.classifier is None else copies[id(purifier.classifier)]
        self._called = Networks(self.score, self.classifier, detached)
        self.head = None if head is None else copies[id(head)]
        self._recipe: Recipe | None = self.method.recipe() if isinstance(self.method, TableMethod) else None

    def noise(self, x: torch.Tensor, seed: int, ids: torch.Tensor, draw: int) -> ReplayedNoise:
        """The path that the purifier takes for this seed, these ids and this draw, of images like `x`."""
        draws = torch.full((len(x),), draw, dtype=torch.int64, device=x.device)
        source = CounterNoise(seed, ids.to(device=x.device, dtype=torch.int64), draws)
        like = torch.empty_like(x, dtype=torch.float32)
        if self._recipe is None:
            rows = [source.z(k, like) for k in range(self.method.num_noises)]
            return ReplayedNoise((torch.stack(rows) if rows else like.new_zeros(0, *like.shape)).to(self.dtype))
        rows = [source.z(k, like) for k in range(self.num_steps)]
        if self._recipe.noising is not None:
            rows.append(source.z(-1, like))
        second = None
        if self._recipe.table.f is not None:
            second = torch.stack([source.z2(k, like) for k in range(self.num_steps)]).to(self.dtype)
        return ReplayedNoise(torch.stack(rows).to(self.dtype), second)

    def output(self, x: torch.Tensor, noise: ReplayedNoise) -> torch.Tensor:
        """Logits (purified images without a head) of images of `dtype`, differentiable."""
        with _plain_attention():
            return self._end(self._steps((2.0 * x - 1.0,), noise, 0, self.num_steps))

    def gradient(
        self,
        x: torch.Tensor,
        noise: ReplayedNoise,
        losses: Callable[[torch.Tensor], torch.Tensor],
        *,
        steps_at_once: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`output`, and the gradient of the sum of its losses by back-propagation through every step.

        Args:
            x: Images in [0, 1], of `dtype`.
            noise: As `noise` returns it.
            losses: Output → one loss per image.
            steps_at_once: Steps whose activations are held together; None holds all of them.
        """
        first = list(range(0, self.num_steps, steps_at_once or self.num_steps))
        last = [*first[1:], self.num_steps]
        states: list[StepState] = [(2.0 * x.detach() - 1.0,)]
        with torch.no_grad(), _plain_attention():
            for begin, end in list(zip(first, last, strict=True))[:-1]:
                states.append(self._steps(states[-1], noise, begin, end))
        with torch.enable_grad(), _plain_attention():
            state = leaves(states[-1])
            output = self._end(self._steps(state, noise, first[-1], last[-1]))
            leaf = output.detach().requires_grad_()
            v = pull([output], torch.autograd.grad(losses(leaf).sum(), leaf), state)
            for state, begin, end in reversed(list(zip(states[:-1], first[:-1], last[:-1], strict=True))):
                state = leaves(state)
                v = pull(self._steps(state, noise, begin, end), v, state)
        return output.detach(), 2.0 * v[0]

    def fit(self, x: torch.Tensor, limit: int) -> tuple[int, int]:
        """Predicted bytes of `gradient` and the steps at once that fit into `limit`.

        Raises:
            MemoryError: if not even one step fits.
            ValueError: if a network computes in another dtype than that of its weights.
        """
        step, transient = self._account_of_function(x) if isinstance(self.method, StepMethod) else self._account(x)
        tensors = {id(t): t for network in self.networks for t in [*network.parameters(), *network.buffers()]}
        # Noise twice over (float32, then float64), and the images, scalings and boundaries around the steps.
        fixed = sum(t.nbytes for t in tensors.values()) + x.nbytes * (2 * (self.method.num_noises + 1) + 16) + transient
        at_once = min(self.num_steps, max(0, limit - fixed) // max(step, 1))
        if at_once < 1:
            raise MemoryError(
                f"float64 back-propagation through one step of {len(x)} images needs {(fixed + step) / 2**20:.0f} MiB, the "
                f"limit is {limit / 2**20:.0f} MiB; take fewer images (`images=`), or give `memory_limit` in bytes"
            )
        return fixed + at_once * step, at_once

    def _account(self, x: torch.Tensor) -> tuple[int, int]:
        """Bytes that one step keeps for back-propagation, and those that come and go besides."""
        with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad(), _plain_attention():
            state = torch.empty(x.shape, dtype=x.dtype, device=x.device).requires_grad_()
            with AllocationAccount() as account:
                drift = self._tried("score net", self.score, state, torch.zeros(len(x), dtype=x.dtype, device=x.device))
                if self.classifier is not None:
                    logits = self._tried("classifier", self.classifier, (state + 1.0) * 0.5)
                    confidence = torch.log_softmax(logits, dim=1).amax(dim=1).sum()
                    drift = drift + torch.autograd.grad(confidence, state, create_graph=True)[0]
                kept = account.live
                torch.autograd.grad(drift, state, torch.empty_like(state))
                step_peak = account.peak
            head_peak = 0
            if self.head is not None:
                with AllocationAccount() as account:
                    torch.autograd.grad(self._tried("classifier", self.head, state).sum(), state)
                    head_peak = account.peak
        return kept, max(step_peak - kept, head_peak)

    def _tried(self, name: str, network: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """The output of a network, after a look at its dtype: what was rounded inside looks exact outside."""
        problem, output = None, inputs[0]
        try:
            output = network(*inputs)
        except RuntimeError as error:
            problem = f"fails ({error})"
        if output.dtype != self.dtype:
            problem = f"returns {output.dtype}"
        if problem:
            raise ValueError(
                f"a copy of the {name} with {self.dtype} weights {problem} on {self.dtype} inputs: it fixes the dtype of its "
                "computation, so there is no exact gradient to compare with; let it follow its input's dtype"
            )
        return output

    def _account_of_function(self, x: torch.Tensor) -> tuple[int, int]:
        """The same of a step function, which may do with numbers what fake tensors do not have: one image takes step 0."""
        one = x[:1]
        rows = torch.zeros((self.method.num_noises, *one.shape), dtype=x.dtype, device=x.device)
        with torch.enable_grad(), _plain_attention():
            state = leaves(self._steps((2.0 * one - 1.0,), ReplayedNoise(rows), 0, 1))
            # From its result: another first step, as far as memory goes.
            with AllocationAccount([*state, rows]) as account:
                after = self.method.definition((state[0],), self._called, ReplayedNoise(rows), range(1))
                kept = account.live
                pull(after, [torch.zeros_like(tensor) for tensor in after], state)
        return len(x) * kept, len(x) * max(account.peak - kept, 0)

    def _steps(self, state: StepState, noise: ReplayedNoise, first: int, last: int) -> StepState:
        return self.method.definition(state, self._called, noise, range(first, last))

    def _end(self, state: StepState) -> torch.Tensor:
        x = self.method.finish(state)
        purified = ((x.clamp(-1.0, 1.0) if self.method.clamp else x) + 1.0) * 0.5
        return purified if self.head is None else self.head(purified)


def _plain_attention() -> contextlib.AbstractContextManager:
    """Fused attention has no second derivative, which the gradient through guidance is; the plain formula has."""
    return sdpa_kernel(SDPBackend.MATH)
