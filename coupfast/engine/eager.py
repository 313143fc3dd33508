"""The eager engine: one step as PyTorch runs it, operation by operation. The other engines are checked against it."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from coupfast.engine.memory import AllocationAccount
from coupfast.engine.protocol import Cotangent, Keep, State, StepMemory
from coupfast.engine.rows import clipped, extra_images, reads_eps_hat, shifted, step_back
from coupfast.guidance import Guidance, Linearization
from coupfast.noise import Noise, ReplayedNoise
from coupfast.solvers import CoefficientTable
from coupfast_kernels.guided_step import guided_step_ref


class ScoreGraph(NamedTuple):
    """A score network's output with autograd's graph back to its images."""

    x: torch.Tensor
    eps_hat: torch.Tensor


@dataclasses.dataclass
class _Saved:
    """What a step leaves for its transpose."""

    linearization: Linearization | None = None
    score: ScoreGraph | None = None


class EagerProgram:
    """Steps of one table, for any batch size; made by `prepare`."""

    engine = "eager"
    largest_batch: int | None = None

    def __init__(
        self,
        score: nn.Module,
        guidance: Guidance | None,
        table: CoefficientTable,
        example: torch.Tensor,
        differentiate_guidance: bool,
    ) -> None:
        self.score, self.guidance, self.table = score, guidance, table
        self.image_shape, self.dtype, self.device = example.shape[1:], example.dtype, example.device
        self.differentiate_guidance = differentiate_guidance
        # On the device once: a fill in the loop would be one more transfer a step on a GPU.
        self.labels = torch.from_numpy(table.labels).to(device=self.device, dtype=self.dtype)  # [steps]
        self._one_image: StepMemory | None = None

    def for_batch(self, batch: int) -> EagerProgram:
        return self

    def step(
        self, k: int, x_k: torch.Tensor, noise: Noise, keep: Keep = "nothing", *, more: State | None = None
    ) -> tuple[Any, ...]:
        row = self.table.row(k)
        saved, eps_hat = _Saved(), None
        if reads_eps_hat(self.table, k):
            if keep == "activations":
                saved.score = self.eps_hat_graph(k, x_k)
                eps_hat = saved.score.eps_hat.detach()
            else:
                with torch.no_grad():
                    eps_hat = self.eps_hat(k, x_k)
        g = None
        if self.guidance is not None and self.table.guides(k):
            keep_slopes = keep != "nothing" and self.differentiate_guidance
            g, linearization = self.guidance.gradient(x_k, keep_slopes=keep_slopes)
            saved.linearization = linearization if keep_slopes else None
        z = noise.z(k, x_k) if row[3] != 0.0 else None
        z2 = noise.z2(k, x_k) if self.table.extended and row[5] != 0.0 else None
        with torch.no_grad():
            x_next = guided_step_ref(x_k, eps_hat, g, row, z, z2=z2, **extra_images(self.table, k, more))
            eps_hat = shifted(self.table, k, eps_hat, g)
        kept = None if keep == "nothing" else saved
        return (x_next, kept, eps_hat) if self.table.two_step else (x_next, kept)

    def step_vjp(self, k: int, x_k: torch.Tensor, saved: Any, v: torch.Tensor, *, more: Cotangent | None = None) -> Any:
        row = self.table.row(k)
        saved = saved or _Saved()
        guidance, hvp = self.guidance, None
        if guidance is not None and self.differentiate_guidance:

            def hvp(w: torch.Tensor) -> torch.Tensor:
                return guidance.hvp(x_k, w, saved.linearization)

        with torch.no_grad():
            if more is None:
                w = hvp(v) if hvp is not None and row[2] != 0.0 else None
                return guided_step_ref(v, self.eps_hat_vjp(k, x_k, v, saved.score), w, row)
            return step_back(self.table, k, v, hvp, lambda u: self.eps_hat_vjp(k, x_k, u, saved.score), more)

    def eps_hat(self, k: int, x_k: torch.Tensor) -> torch.Tensor:
        """ε̂(x_k) at step k's label, clipped where the table says so, with autograd's graph where gradients are enabled."""
        eps_hat = self.score(x_k, self.labels[k].expand(len(x_k)))
        clip = self.table.clip(k)
        return eps_hat if clip is None else clipped(x_k, eps_hat, *clip)[0]

    def eps_hat_graph(self, k: int, x_k: torch.Tensor) -> ScoreGraph:
        """ε̂(x_k) with what `eps_hat_vjp` takes of it."""
        with torch.enable_grad():
            x = x_k.detach().requires_grad_()
            return ScoreGraph(x, self.eps_hat(k, x))

    def eps_hat_vjp(self, k: int, x_k: torch.Tensor, v: torch.Tensor, graph: ScoreGraph | None = None) -> torch.Tensor:
        """J_ε(x_k)ᵀ v."""
        x, eps_hat = self.eps_hat_graph(k, x_k) if graph is None else graph
        # A score net may be constant in x at some label: its transpose is zero then.
        return torch.autograd.grad(eps_hat, x, v)[0] if eps_hat.requires_grad else torch.zeros_like(v)

    def evaluations(self) -> dict[str, dict[str, int]]:
        step = {"score forward": 1}
        rebuild = {"score forward": 1, "score backward": 1}
        if self.guidance is not None:
            step |= {"classifier forward": 1, "classifier backward": 1}
        kept_slopes, kept_activations = dict(rebuild), {"score backward": 1}
        if self.guidance is not None and self.differentiate_guidance:
            rebuild |= self.guidance.hvp_evaluations(slopes_kept=False)
            kept_slopes |= self.guidance.hvp_evaluations(slopes_kept=True)
            kept_activations |= self.guidance.hvp_evaluations(slopes_kept=True)
        return {"step": step, "rebuild": rebuild, "slopes": kept_slopes, "activations": kept_activations}

    def weights_bytes(self, batch: int, *, gradient: bool) -> int:
        return 0

    def memory(self, batch: int) -> StepMemory:
        """In proportion to one image, which takes one step and back with every result's storage counted."""
        if self._one_image is None:
            self._one_image = self._account()
        return StepMemory(*(batch * size for size in dataclasses.astuple(self._one_image)))

    def _account(self) -> StepMemory:
        table = self.table
        # Some step that guides and asks for ε̂, if any does, and of those one that reads most.
        k = max(
            range(table.num_steps),
            key=lambda k: (table.guides(k), reads_eps_hat(table, k), np.count_nonzero(table.row(k)[4:])),
        )
        with torch.no_grad():
            x = torch.zeros((1, *self.image_shape), dtype=self.dtype, device=self.device)
            rows = torch.zeros((table.num_steps, *x.shape), dtype=self.dtype, device=self.device)
            noise = ReplayedNoise(rows, rows if table.f is not None else None)
            more = State(x, x, x, x) if table.extended else None
            back = None if not table.extended else Cotangent(x, x, x, x) if table.two_step else Cotangent(x, x)
            outside = [x, noise.rows, self.labels, *_weights(self.score)]
            if self.guidance is not None:
                outside += _weights(self.guidance.classifier)
                self.guidance.route  # noqa: B018  (found out once, and not part of a step)
            with AllocationAccount(outside) as forward:
                self.step(k, x, noise, more=more)
            with AllocationAccount(outside) as keeping:
                x_next, saved, *eps_hat = self.step(k, x, noise, "activations", more=more)
                del x_next, eps_hat
                activations = keeping.live
            slopes = sum(t.nbytes for t in saved.linearization.tensors()) if saved.linearization else 0
            with AllocationAccount(outside) as on_kept:
                self.step_vjp(k, x, saved, x, more=back)
            del saved
            with AllocationAccount(outside) as rebuilding:
                self.step_vjp(k, x, None, x, more=back)
        return StepMemory(forward.peak, keeping.peak, rebuilding.peak, on_kept.peak, slopes, activations)


def _weights(network: nn.Module) -> list[torch.Tensor]:
    return [*network.parameters(), *network.buffers()]


def guidance_of(classifier: nn.Module | None, table: CoefficientTable, example: torch.Tensor) -> Guidance | None:
    """What guides the steps of a table; None if nothing does."""
    return Guidance(classifier, example) if classifier is not None and table.guided else None


def prepare(
    score: nn.Module,
    classifier: nn.Module | None,
    table: CoefficientTable,
    example: torch.Tensor,
    *,
    differentiate_guidance: bool = True,
) -> EagerProgram:
    """An engine bound to networks, for states like `example`, of any batch size.

    Args:
        score, classifier: In eval mode with frozen parameters; `classifier` is needed where the table guides.
        table: Coefficients of all steps.
        example: A state; its image shape, dtype and device are those of all states to come.
        differentiate_guidance: Whether `step_vjp` includes the Hessian of the guidance.
    """
    return EagerProgram(score, guidance_of(classifier, table, example), table, example, differentiate_guidance)
