"""Steps of the cuda engine for tables with columns beside the first four, and their transposes; see `coupfast.engine.rows`.

x_in, x_{k−1} and ε̂(x_{k−1}) lie in static buffers, as do the cotangents of x_in, x_k and ε̂(x_k) on the way back, so that one
graph serves every step here, too. What a step does not read has the factor zero, or is zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from coupfast.engine.cuda.program import Continuation, CudaProgram
from coupfast.engine.protocol import Cotangent, Keep, State
from coupfast.engine.rows import extra_images
from coupfast.noise import Noise
from coupfast_kernels.guided_step import guided_step, guided_step_ref


class ColumnsProgram(CudaProgram):
    """Steps of up to `bucket` images of an extended table."""

    def _more_buffers(self, image: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        table = self.table
        self._second = table.f is not None
        self.x_in = None if table.e is None else image()
        self.x_before = None if table.p is None else image()
        self.eps_before = image() if table.two_step else None  # also where only p is there: the step gives ε̂ to its caller
        self.v_in = None if table.e is None else image()
        self.v_before = None if table.p is None else image()
        self.v_eps = None if table.q is None else image()
        # (a, b, c, …) of a row → (a, b, c or 1, 0, 0, 0, 1, 0), which the way back takes.
        keeps, adds = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0.0] * 6 + [1.0, 0.0]
        device = self.networks.example.device
        self._shifts: torch.Tensor | None = None
        if table.s is not None:
            self._shifts = torch.tensor([table.shift(k) for k in range(table.num_steps)], dtype=torch.float32, device=device)
            keeps[2], adds[2] = 0.0, 1.0
        self._row_keeps, self._row_adds = (torch.tensor(row, device=device) for row in (keeps, adds))
        # Whether anything is in v_eps: then b is on the way into ε̂, else behind it, as `step_back` has it. (1,)
        self.eps_flows = torch.zeros(1, dtype=torch.bool, device=device)
        written = [self.x_before, self.eps_before, self.v_in, self.v_before, self.v_eps, self.eps_flows]
        return [buffer for buffer in written if buffer is not None]

    def step(
        self, k: int, x_k: torch.Tensor, noise: Noise, keep: Keep = "nothing", *, more: State | None = None
    ) -> tuple[Any, ...]:
        batch, extra = len(x_k), extra_images(self.table, k, more)
        counter = self._counter(noise)
        x_in, x_before, eps_before = (None, None, None) if more is None else more[1:]
        with self._exclusively():
            before, self._forward = self._forward, None
            if before is None or not before.leads_to(k, noise, x_k, x_in, x_before, eps_before):
                self._load(k, x_k, counter)
                self._fill(self.x_in, x_in)
                self._fill(self.x_before, x_before)
                self._fill(self.eps_before, eps_before)
            name = self._make_step(counter is not None, keep)
            if counter is not None or not self.networks.noisy:
                self._run_step(name, counter is not None)
            else:
                self._step_on_path(k, batch, noise, list(extra), name)
            x_next = self.x[:batch].clone(memory_format=torch.contiguous_format)
            eps_hat = None
            if self.eps_before is not None:
                eps_hat = self.eps_before[:batch].clone(memory_format=torch.contiguous_format)
            after = (x_k, eps_hat) if self.table.two_step else (None, None)
            self._forward = Continuation(k + 1, noise, x_next, x_in, *after)
            kept = self._keep(keep, name)
        return (x_next, kept, eps_hat) if self.table.two_step else (x_next, kept)

    def step_vjp(self, k: int, x_k: torch.Tensor, saved: Any, v: torch.Tensor, *, more: Cotangent | None = None) -> Cotangent:
        batch = len(x_k)
        given = (None, None, None) if more is None else more[1:]
        buffers = (self.v_in, self.v_before, self.v_eps)
        with self._exclusively():
            before, self._backward = self._backward, None
            if before is None or not before.leads_to(k, None, v, *given):
                self._put(self.v, v)
                self.step_back.fill_(k)
                for buffer, values in zip(buffers, given, strict=True):
                    self._fill(buffer, values)
                self.eps_flows.fill_(given[2] is not None)
            self._run_back(x_k, saved)
            v_k = self.v[:batch].clone(memory_format=torch.contiguous_format)
            left = [None if b is None else b[:batch].clone(memory_format=torch.contiguous_format) for b in buffers]
            if self.table.q is not None and self.table.q[k] == 0.0:
                left[2] = None
            self._backward = Continuation(k - 1, None, v_k, *left)
        return Cotangent(v_k, *left)

    # --- what is captured -------------------------------------------------------------------------------------------------

    def _step(self, counted: bool, name: str = "") -> None:
        eps_hat, g = self._eps_hat_and_guidance(name)
        y = guided_step(
            self.x,
            eps_hat,
            g,
            self.networks.coefficients,
            self.step_index,
            noise=(self.seed, self.ids, self.draw) if counted else None,
            x_in=self.x_in,
            second_noise=counted and self._second,
            x_before=self.x_before,
            eps_before=None if self.table.q is None else self.eps_before,
        )
        self._move_on(eps_hat, g, y)

    def _move_on(self, eps_hat: torch.Tensor, g: torch.Tensor | None, y: torch.Tensor) -> None:
        """The state that was is the one before, and `y` is the state."""
        if self.x_before is not None:
            self.x_before.copy_(self.x)
        if self.eps_before is not None:
            if self._shifts is not None and g is not None:
                eps_hat = eps_hat + self._shift(self.step_index) * g
            self.eps_before.copy_(eps_hat)
        self.x.copy_(y)
        self.step_index.add_(1)

    def _step_on_path(self, k: int, batch: int, noise: Noise, extra: list[str], name: str) -> None:
        """A step with explicit noise, in the order of its terms; not captured: a path is for comparisons."""
        row, like = self.table.row(k), self.x[:batch]
        eps_hat, g = self._eps_hat_and_guidance(name)
        y = self.x.clone()
        y[:batch] = guided_step_ref(
            like,
            eps_hat[:batch],
            None if g is None else g[:batch],
            row,
            noise.z(k, like) if row[3] != 0.0 else None,
            z2=noise.z2(k, like) if row[5] != 0.0 else None,
            **{name: getattr(self, name)[:batch] for name in extra},
        )
        self._move_on(eps_hat, g, y)

    def _shift(self, step: torch.Tensor) -> torch.Tensor:
        """s of a step, 0 where nobody reads it."""
        assert self._shifts is not None
        return self._shifts.index_select(0, step.view(1))[0]

    def _transpose(self, curved: bool, *, rebuilds: bool, at_kept: bool = False) -> None:
        row = self.networks.coefficients.index_select(0, self.step_back.view(1))[0]  # [8]
        back, u = row * self._row_keeps + self._row_adds, self.v
        if self.v_eps is not None:
            b, one = row[1:2], torch.ones_like(row[1:2])
            u = torch.where(self.eps_flows, b, one) * self.v + self.v_eps
            back[1:2] = torch.where(self.eps_flows, one, b)
        tangent = self.v
        if self._shifts is not None:
            assert self.v_eps is not None  # there is a column q
            tangent = row[2] * self.v + self._shift(self.step_back) * self.v_eps
        u, w = self._both(functools.partial(self._score_vjp, u, at_kept), self._hvp(curved, tangent, rebuilds=rebuilds))
        v_x = guided_step(self.v, u, w, back, self.step_back, x_before=self.v_before)
        if self.v_in is not None:
            self.v_in.add_(row[4] * self.v)
        if self.v_before is not None:
            self.v_before.copy_(row[6] * self.v)
        if self.v_eps is not None:
            self.v_eps.copy_(row[7] * self.v)
            self.eps_flows.copy_(row[7:8] != 0.0)
        self.v.copy_(v_x)
        self.step_back.sub_(1)

    def _fill(self, buffer: torch.Tensor | None, values: torch.Tensor | None) -> None:
        if buffer is not None:
            if values is None:
                buffer.zero_()
            else:
                self._put(buffer, values)
