"""Steps of the cpu engine and their transposes, for one batch size."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import torch

from coupfast.engine.cpu.network_program import Activations, NetworkProgram
from coupfast.engine.cpu.networks import CpuNetworks
from coupfast.engine.eager import ScoreGraph
from coupfast.engine.protocol import Cotangent, Keep, State, StepMemory
from coupfast.engine.rows import clipped, clipped_vjp, extra_images, reads_eps_hat, shifted, step_back
from coupfast.guidance import Linearization, Slope, confidence_cotangent, hessian_cotangent
from coupfast.noise import CounterNoise, Noise
from coupfast_kernels.guided_step import guided_step_ref
from coupfast_kernels.guided_step.cpu import guided_step_cpu

Pass = Literal["forward", "rebuilt", "kept"]
#: What runs in a step that keeps no activations, in that and its transpose, and in a step that keeps them and its transpose.
_PROGRAMS: dict[Pass, tuple[str, ...]] = {
    "forward": ("score", "guidance"),
    "rebuilt": ("score", "guidance", "score transpose", "hvp"),
    "kept": ("score, keeping", "guidance", "hvp"),
}


@dataclasses.dataclass
class _Kept:
    """What a step leaves for its transpose: the classifier's slopes and the score network's activations, as programs keep
    them or as PyTorch does."""

    slopes: torch.Tensor | None = None
    region_slopes: list[Slope] = dataclasses.field(default_factory=list)
    p: torch.Tensor | None = None
    linearization: Linearization | None = None
    score: Activations | ScoreGraph | None = None
    inside: torch.Tensor | None = None  # where x̂0 was not clipped, with kept activations of a program


class CpuProgram:
    """Steps of one batch size on a number of threads.

    Args:
        networks: What all batch sizes share.
        batch: Images.
        threads: CPU threads.
    """

    def __init__(self, networks: CpuNetworks, batch: int, threads: int) -> None:
        self.networks, self.batch, self.threads = networks, batch, threads
        self.table = networks.table
        self._programs: dict[str, NetworkProgram] = {}
        self._memory: StepMemory | None = None

    def step(
        self, k: int, x_k: torch.Tensor, noise: Noise, keep: Keep = "nothing", *, more: State | None = None
    ) -> tuple[Any, ...]:
        networks = self.networks
        x_k = _readable(x_k)
        with networks.turn, torch.no_grad():
            eps_hat, activations, inside = None, None, None
            if reads_eps_hat(self.table, k):
                eps_hat, activations, inside = self._eps_hat(k, x_k, keep == "activations")
            g, kept = None, _Kept()
            if networks.guidance is not None and self.table.guides(k):
                g, kept = self._guide(x_k, keep != "nothing" and networks.differentiate_guidance)
            kept.score, kept.inside = activations, inside
            extra = {name: _readable(image) for name, image in extra_images(self.table, k, more).items()}
            x_next = self._move(k, x_k, eps_hat, g, noise, extra)
            eps_hat = shifted(self.table, k, eps_hat, g)
        found = None if keep == "nothing" else kept
        return (x_next, found, eps_hat) if self.table.two_step else (x_next, found)

    def step_vjp(self, k: int, x_k: torch.Tensor, saved: Any, v: torch.Tensor, *, more: Cotangent | None = None) -> Any:
        row, networks = self.table.row(k), self.networks
        kept: _Kept = saved or _Kept()
        with networks.turn, torch.no_grad():
            curved = networks.guidance is not None and networks.differentiate_guidance
            if more is None:
                w = self._hvp(x_k, v, kept) if curved and row[2] != 0.0 else None
                return guided_step_ref(v, self._eps_hat_vjp(k, x_k, v, kept), w, row)
            hvp = (lambda w: self._hvp(x_k, w, kept)) if curved else None
            return step_back(self.table, k, v, hvp, lambda u: self._eps_hat_vjp(k, x_k, u, kept), more)

    def _eps_hat(
        self, k: int, x_k: torch.Tensor, keep: bool
    ) -> tuple[torch.Tensor, Activations | ScoreGraph | None, torch.Tensor | None]:
        """ε̂(x_k), and what is kept of it: activations, and where nothing was clipped."""
        networks = self.networks
        if networks.score is None:
            if not keep:
                return networks.eager.eps_hat(k, x_k), None, None
            graph = networks.eager.eps_hat_graph(k, x_k)
            return graph.eps_hat.detach(), graph, None
        program = self._program("score, keeping" if keep else "score")
        if keep:  # steps that keep nothing have run here, maybe in more memory: not beside what is kept
            kept = [self._plan(kind) for kind in self._kinds("kept")]
            networks.workspace.trim(max(p.arena_floats for p in kept), max(p.scratch_floats for p in kept))
        program.set_label(networks.label_values(k))
        eps_hat = torch.empty_like(x_k).copy_(program.forward(x_k))
        activations = program.activations() if keep else None
        clip = self.table.clip(k)
        if clip is None:
            return eps_hat, activations, None
        eps_hat, inside = clipped(x_k, eps_hat, *clip)
        return eps_hat, activations, inside if keep else None

    def _eps_hat_vjp(self, k: int, x_k: torch.Tensor, u: torch.Tensor, kept: _Kept) -> torch.Tensor:
        networks, score, inside = self.networks, kept.score, kept.inside
        if networks.score is None:
            assert not isinstance(score, Activations)
            return networks.eager.eps_hat_vjp(k, x_k, u, score)
        clip = self.table.clip(k)
        transposed: Callable[[torch.Tensor], torch.Tensor]
        if isinstance(score, Activations):
            score.program.bind(networks.workspace)  # maybe not this one's: the number of threads may have changed
            transposed = functools.partial(score.program.backward, activations=score)
        else:
            program = self._program("score transpose")
            program.set_label(networks.label_values(k))
            eps_hat = program.forward(x_k)
            transposed = program.backward
            if clip is not None:
                inside = clipped(x_k, eps_hat, *clip)[1]
        if clip is None:
            return transposed(u)
        assert inside is not None
        return clipped_vjp(u, inside, *clip, transposed)

    def _move(
        self,
        k: int,
        x_k: torch.Tensor,
        eps_hat: torch.Tensor | None,
        g: torch.Tensor | None,
        noise: Noise,
        extra: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """x_{k+1}; counted noise is made on the way."""
        row = self.table.row(k)
        first, second = row[3] != 0.0, self.table.extended and row[5] != 0.0
        if isinstance(noise, CounterNoise) and (first or second):
            seed, ids, draw = noise.seed, noise.ids, noise.draw
            more: dict[str, Any] = extra
            return guided_step_cpu(x_k, eps_hat, g, row, seed=seed, ids=ids, draw=draw, step=k, second_noise=second, **more)
        z = noise.z(k, x_k) if first else None
        return guided_step_ref(x_k, eps_hat, g, row, z, z2=noise.z2(k, x_k) if second else None, **extra)

    def memory(self) -> StepMemory:
        """What the programs need; found once."""
        if self._memory is None:
            slopes = self._plan("hvp").slopes_bytes() if self._has("hvp") else 0
            forward, transpose, kept = self.bytes("forward"), self.bytes("rebuilt"), self.bytes("kept")
            activations = slopes + (self._plan("score, keeping").activations_bytes() if self._has("score") else 0)
            if self._has("score") and self.table.clips:
                activations += self.batch * self.networks.example[0].numel()  # a bool each
            hvp = self.batch * self.networks.hvp_bytes  # the workspace stays where it is meanwhile
            self._memory = StepMemory(forward, kept + activations, transpose + hvp, kept + hvp, slopes, activations)
        return self._memory

    def bytes(self, which: Pass) -> int:
        """Workspace that the programs of a step need."""
        plans = [self._plan(kind) for kind in self._kinds(which)]
        arena, scratch = max((p.arena_floats for p in plans), default=0), max((p.scratch_floats for p in plans), default=0)
        return 4 * (arena + scratch) + max((p.region_bytes() for p in plans), default=0)

    def weights_bytes(self, *, gradient: bool) -> int:
        """Packed weights that the programs need, each once."""
        needed: dict[Any, int] = {}
        for kind in self._kinds("rebuilt" if gradient else "forward"):
            needed |= self._plan(kind).packed_bytes()
        return sum(needed.values())

    def _kinds(self, which: Pass) -> list[str]:
        return [kind for kind in _PROGRAMS[which] if self._has(kind)]

    # --- programs of networks -----------------------------------------------------------------------------------------------

    def _has(self, kind: str) -> bool:
        networks = self.networks
        network = {"guidance": networks.classifier, "hvp": networks.linear}.get(kind, networks.score)
        return network is not None and (kind != "hvp" or networks.differentiate_guidance)

    def _plan(self, kind: str) -> NetworkProgram:
        """A program of this kind, made when it is first wanted; memory is bound in `_program`."""
        if kind not in self._programs:
            networks = self.networks
            network = networks.score if kind.startswith("score") else networks.classifier
            assert network is not None
            self._programs[kind] = NetworkProgram(
                network.network,
                self.batch,
                network.weights,
                backward=kind != "score",
                keeps=kind == "score, keeping",
                linear=networks.guidance.graph if kind == "hvp" and networks.guidance is not None else None,
                threads=self.threads,
            )
        return self._programs[kind]

    def _program(self, kind: str) -> NetworkProgram:
        program = self._plan(kind)
        program.bind(self.networks.workspace)
        return program

    # --- the classifier ---------------------------------------------------------------------------------------------------

    def _guide(self, x_k: torch.Tensor, keep: bool) -> tuple[torch.Tensor, _Kept]:
        """∇ log p_ŷ = Jᵀ(e_ŷ − p), and what its Hessian needs."""
        guidance = self.networks.guidance
        assert guidance is not None
        if self.networks.classifier is None:
            g, linearization = guidance.gradient(x_k, keep_slopes=keep)
            return g, _Kept(linearization=linearization if keep else None)
        program = self._program("guidance")
        p, label = _confidence(program.forward(x_k))
        g = program.backward(confidence_cotangent(p, label))
        if not keep:
            return g, _Kept()
        if self.networks.linear is None:
            return g, _Kept(linearization=Linearization(label))
        return g, _Kept(program.slopes.clone(), program.region_slopes, p)

    def _hvp(self, x_k: torch.Tensor, v: torch.Tensor, kept: _Kept) -> torch.Tensor:
        guidance = self.networks.guidance
        assert guidance is not None
        if self.networks.linear is None:
            with torch.enable_grad():
                return guidance.hvp(x_k, v, kept.linearization)
        if kept.slopes is None or kept.p is None:
            program = self._program("guidance")
            p, _ = _confidence(program.forward(x_k))
            kept = _Kept(program.slopes, program.region_slopes, p)
        assert kept.slopes is not None and kept.p is not None
        program = self._program("hvp")
        program.slopes.copy_(kept.slopes)
        program.region_slopes = kept.region_slopes
        return program.backward(hessian_cotangent(kept.p, program.forward(v)))


def _readable(image: torch.Tensor) -> torch.Tensor:
    """In a format that the step's own kernel reads: images may come transposed."""
    return image if image.is_contiguous(memory_format=torch.channels_last) else image.contiguous()


def _confidence(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax and ŷ."""
    log_p = torch.log_softmax(logits, dim=1)
    return log_p.exp(), log_p.argmax(dim=1)
