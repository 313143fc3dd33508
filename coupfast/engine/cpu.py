"""The CPU engine: Winograd convolutions with everything around them fused in, one call per network and step.

Networks are traced once (`coupfast.tracing`), cut into large operations (`fusion`), bound to memory for each batch size
(`cpu_program`) and run by the C++ kernels of `coupfast_kernels`. Which algorithm a convolution takes follows from its shape and
the batch: runs give the same bits whatever the number of threads, and nothing depends on how a trial was timed. (Where less
memory is free than twice what all packed weights take, the largest are left out, which is said and gives other bits.)
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from coupfast.engine import CounterNoise, Keep, Noise, StepMemory
from coupfast.engine.cpu_program import NetworkProgram, WeightStore, Workspace
from coupfast.engine.eager import EagerProgram, guidance_of
from coupfast.engine.fusion import Convolution, FusedNetwork, fuse
from coupfast.engine.memory import available_bytes
from coupfast.guidance import Guidance, Linearization, scaled_logits
from coupfast.solvers import CoefficientTable
from coupfast.tracing import Trace, trace
from coupfast_kernels import convolution as kernels
from coupfast_kernels import native
from coupfast_kernels.cpu_guided_step import guided_step_cpu
from coupfast_kernels.guided_step import guided_step_ref

logger = logging.getLogger(__name__)

#: Batch sizes whose programs are kept: attacks run on fewer and fewer images. Their memory is one workspace.
KEPT_BATCHES = 8


def tile(
    conv: Convolution, shape: tuple[int, ...], batch: int, transposed: bool, allowed: tuple[int, ...] = kernels.TILES
) -> int:
    """The algorithm of one convolution whose output has (channels, height, width) = `shape`: the one with the least work.

    Work is counted in multiplications, a byte of weights that has to come from memory as `_BYTE` of them. Nothing is timed:
    the choice, and with it every bit of the result, is the same in every run, unless memory is short (`allowed`).
    """
    if conv.weight.shape[2:] != (3, 3) or conv.stride != 1 or conv.padding != 1:
        return kernels.DIRECT
    _, height, width = shape
    pairs = conv.weight.shape[0] * conv.weight.shape[1]
    if conv.weight.shape[0 if transposed else 1] < _LEAST_CHANNELS:
        allowed = tuple(size for size in allowed if size != kernels.F4)

    def work(size: int) -> float:
        tiles = batch * -(-height // size) * -(-width // size)
        products = 9 if size == 1 else (size + 2) ** 2
        return pairs * products * (tiles * _EFFORT[size] + 4 * _BYTE)

    return min(allowed, key=work)


#: Packed weights of an algorithm as a multiple of the weights of a 3x3 convolution.
PACKED = {kernels.DIRECT: 1.0, kernels.F2: 16 / 9, kernels.F4: 4.0}

# Multiplications that one multiplication of a tile's products costs with its share of the transforms, and that a byte of
# weights costs at the usual ratio of a core's arithmetic to its memory (40 G multiplications and 10 GB a second).
_EFFORT = {kernels.DIRECT: 1.0, kernels.F2: 1.15, kernels.F4: 1.4}
_BYTE = 4.0
# A direct sum over few channels is short and rounds little: F(4x4), whose error hardly depends on the sum's length, would miss
# the bound of four times PyTorch's error there.
_LEAST_CHANNELS = 64


@dataclasses.dataclass
class _Kept:
    """What a step leaves for its transpose: the classifier's slopes, as the program or as `Guidance` keeps them."""

    slopes: torch.Tensor | None = None
    region_slopes: list = dataclasses.field(default_factory=list)
    p: torch.Tensor | None = None
    linearization: Linearization | None = None


class _Network:
    """A fused network with its packed weights, shared by its programs."""

    def __init__(self, network: FusedNetwork, allowed: tuple[int, ...]) -> None:
        self.network = network
        self.weights = WeightStore(functools.partial(tile, allowed=allowed))


class CpuPrograms:
    """The engine bound to networks, a table and a shape of images; one `CpuProgram` per batch size. Made by `prepare`."""

    engine = "cpu"
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
        self.differentiate_guidance = differentiate_guidance
        self.example = torch.zeros_like(example[:1])
        self.allowed_tiles = self._allowed_tiles()
        #: What runs where the planner cannot follow a network, and Hessians of smooth classifiers.
        self.eager = EagerProgram(score, guidance, table, example, differentiate_guidance)
        self.score_network = self._fused_score()
        self.classifier_network = None if guidance is None else self._fused_classifier(guidance)
        self.linear_network = None
        if guidance is not None and self.classifier_network is not None and guidance.graph is not None:
            self.linear_network = self.classifier_network
        self._time: dict[int, dict[fx.Node, torch.Tensor]] = {}
        self._programs: OrderedDict[tuple[int, int], CpuProgram] = OrderedDict()
        self._lock = threading.Lock()
        self.workspace = Workspace()  # of all batch sizes, so that Python's threads take turns
        self.turn = threading.Lock()

    def for_batch(self, batch: int) -> CpuProgram:
        key = (batch, torch.get_num_threads())
        with self._lock:
            if key not in self._programs:
                self._programs[key] = CpuProgram(self, *key)
                while len(self._programs) > KEPT_BATCHES:
                    self._programs.popitem(last=False)
            self._programs.move_to_end(key)
            return self._programs[key]

    def memory(self, batch: int) -> StepMemory:
        """The programs' own memory, and what PyTorch's operations in between take of it, one image's in proportion."""
        if self.score_network is None or (self.guidance is not None and self.classifier_network is None):
            eager = self.eager.memory(batch)
            return dataclasses.replace(eager, forward_keeping=eager.forward, activations=eager.slopes)
        program = self.for_batch(batch)
        forward, transpose, slopes = program.bytes(gradient=False), program.bytes(gradient=True), program.slopes_bytes()
        return StepMemory(forward, forward + slopes, transpose, transpose, slopes, slopes)

    def weights_bytes(self, batch: int, *, gradient: bool) -> int:
        """Packed weights of the algorithms that this batch takes, beside the networks' own weights."""
        return self.for_batch(batch).weights_bytes(gradient=gradient)

    def _allowed_tiles(self) -> tuple[int, ...]:
        """The algorithms whose packed weights, all together and in both directions, fit into half of the free memory."""
        networks = [self.score] + ([self.guidance.classifier] if self.guidance is not None else [])
        weights = sum(w.nbytes for network in networks for w in network.parameters() if w.dim() == 4)
        allowed: tuple[int, ...] = kernels.TILES
        while len(allowed) > 1 and 2 * weights * sum(PACKED[t] for t in allowed) > available_bytes(self.example.device) // 2:
            allowed = allowed[:-1]
        if allowed != kernels.TILES:
            logger.warning(
                "little memory is free: convolutions leave out F(4x4)%s, whose packed weights are larger",
                "" if kernels.F2 in allowed else " and F(2x2)",
            )
        return allowed

    def evaluations(self) -> dict[str, dict[str, int]]:
        kinds = self.eager.evaluations()
        return kinds | {"activations": kinds["slopes"]}

    def time_values(self, k: int) -> dict[fx.Node, torch.Tensor]:
        """What step k's label alone decides in the score network, for one image; found once per step."""
        if k not in self._time:
            assert self.score_network is not None
            self._time[k] = self._time_values(self.score_network, k)
        return self._time[k]

    def _time_values(self, planned: _Network, k: int) -> dict[fx.Node, torch.Tensor]:
        network = planned.network
        values: dict[fx.Node, Any] = dict(network.constants)
        if network.time is not None:
            values[network.time] = self.eager.labels[k].view(1)
        with torch.no_grad():
            for operation in network.time_operations:
                args, kwargs = operation.arguments(values, 1)
                values[operation.node] = operation.node.target(*args, **kwargs)  # type: ignore[operator]
        return {node: values[node].clone() for node in network.time_values}

    def _fused_score(self) -> _Network | None:
        def arguments(batch: int) -> tuple[torch.Tensor, ...]:
            return self.example.new_zeros(batch, *self.example.shape[1:]), self.eager.labels[:1].expand(batch).clone()

        def traced() -> Trace:
            return trace(lambda x, labels: self.score(x, labels), arguments)

        # The label that was not traced: one that was read behind the trace's back would show.
        label = self.eager.labels[-1:]
        return self._planned("score net", traced, lambda x: self.score(x, label), gradient_tolerance=1e-4)

    def _fused_classifier(self, guidance: Guidance) -> _Network | None:
        def logits(x: torch.Tensor) -> torch.Tensor:
            return scaled_logits(guidance.classifier, x)

        def traced() -> Trace:
            if guidance.graph is not None:
                return guidance.graph.traced
            return trace(logits, lambda batch: (self.example.new_zeros(batch, *self.example.shape[1:]),))

        # A ReLU within rounding of its kink may fall on either side, and one of a layer's many is that much of the gradient.
        return self._planned("classifier", traced, logits, gradient_tolerance=3e-2)

    def _planned(
        self,
        name: str,
        traced: Callable[[], Trace],
        function: Callable[[torch.Tensor], torch.Tensor],
        *,
        gradient_tolerance: float,
    ) -> _Network | None:
        """The network fused, or None (and a warning) where it has to run in PyTorch."""
        try:
            network = _Network(fuse(traced()), self.allowed_tiles)
            agrees = self._agrees(network, function, gradient_tolerance)
        except Exception as error:  # a network may do anything in `forward`
            logger.warning("the %s cannot be planned and runs in PyTorch (%s: %s)", name, type(error).__name__, error)
            return None
        if not agrees:
            logger.warning("the %s does not do what its trace does (hooks, state?) and runs in PyTorch", name)
            return None
        return network

    def _agrees(self, network: _Network, function: Callable[[torch.Tensor], torch.Tensor], gradient_tolerance: float) -> bool:
        """Whether one random image gets the same value and transpose: a trace shows operations, not their gradients."""
        generator = torch.Generator().manual_seed(0)
        x = 2.0 * torch.rand(self.example.shape, generator=generator, dtype=torch.float32) - 1.0
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            wanted = function(leaf)
            v = torch.randn(wanted.shape, generator=generator, dtype=torch.float32)
            wanted_vjp = torch.autograd.grad(wanted, leaf, v)[0] if wanted.requires_grad else torch.zeros_like(x)
        program = NetworkProgram(network.network, 1, network.weights, backward=True, threads=torch.get_num_threads())
        program.bind(Workspace())
        program.set_time(self._time_values(network, -1))
        found = program.forward(x).clone()
        found_vjp = program.backward(v)
        pairs = ((found, wanted.detach(), 1e-4), (found_vjp, wanted_vjp, gradient_tolerance))
        return all(bool((a - b).norm() <= tolerance * b.norm()) for a, b, tolerance in pairs)


class CpuProgram:
    """Steps of one batch size on a number of threads."""

    def __init__(self, programs: CpuPrograms, batch: int, threads: int) -> None:
        self.programs, self.batch, self.threads = programs, batch, threads
        self.table = programs.table
        self._networks: dict[str, NetworkProgram] = {}

    def step(self, k: int, x_k: torch.Tensor, noise: Noise, keep: Keep = "nothing") -> tuple[torch.Tensor, Any]:
        row, programs = self.table.row(k), self.programs
        if not x_k.is_contiguous(memory_format=torch.channels_last):
            x_k = x_k.contiguous()  # images may come transposed, which the step's own kernel does not read
        with programs.turn, torch.no_grad():
            if programs.score_network is None:
                eps_hat = programs.score(x_k, programs.eager._label(k, x_k))
            else:
                network = self._network("score")
                network.set_time(programs.time_values(k))
                eps_hat = torch.empty_like(x_k).copy_(network.forward(x_k))
            g, kept = None, _Kept()
            if programs.guidance is not None and row[2] != 0.0:
                g, kept = self._guide(x_k, keep != "nothing" and programs.differentiate_guidance)
            return self._move(k, x_k, eps_hat, g, noise), None if keep == "nothing" else kept

    def step_vjp(self, k: int, x_k: torch.Tensor, saved: Any, v: torch.Tensor) -> torch.Tensor:
        row, programs = self.table.row(k), self.programs
        with programs.turn, torch.no_grad():
            w = None
            if programs.guidance is not None and row[2] != 0.0 and programs.differentiate_guidance:
                w = self._hvp(x_k, v, saved or _Kept())
            if programs.score_network is None:
                u = self._eager_score_vjp(k, x_k, v)
            else:
                network = self._network("score transpose")
                network.set_time(programs.time_values(k))
                network.forward(x_k)
                u = network.backward(v)
            return guided_step_ref(v, u, w, row)

    def _move(
        self, k: int, x_k: torch.Tensor, eps_hat: torch.Tensor, g: torch.Tensor | None, noise: Noise
    ) -> torch.Tensor:
        """x_{k+1}; counted noise is made on the way."""
        row = self.table.row(k)
        if isinstance(noise, CounterNoise) and row[3] != 0.0:
            return guided_step_cpu(x_k, eps_hat, g, row, seed=noise.seed, ids=noise.ids, draw=noise.draw, step=k)
        return guided_step_ref(x_k, eps_hat, g, row, noise.z(k, x_k) if row[3] != 0.0 else None)

    def bytes(self, *, gradient: bool) -> int:
        """Workspace that the programs need."""
        plans = [self._plan(kind) for kind in self._kinds(gradient)]
        arena, scratch = max((p.arena_floats for p in plans), default=0), max((p.scratch_floats for p in plans), default=0)
        return 4 * (arena + scratch) + max((p.region_bytes() for p in plans), default=0)

    def weights_bytes(self, *, gradient: bool) -> int:
        """Packed weights that the programs need, each once."""
        needed: dict[Any, int] = {}
        for kind in self._kinds(gradient):
            needed |= self._plan(kind).packed_bytes()
        return sum(needed.values())

    def slopes_bytes(self) -> int:
        if not self._has("hvp"):
            return 0
        return self._plan("hvp").slopes_bytes()

    def _kinds(self, gradient: bool) -> list[str]:
        kinds = ("score", "guidance", *(("score transpose", "hvp") if gradient else ()))
        return [kind for kind in kinds if self._has(kind)]

    # --- networks ---------------------------------------------------------------------------------------------------------

    def _has(self, kind: str) -> bool:
        programs = self.programs
        network = {"guidance": programs.classifier_network, "hvp": programs.linear_network}.get(kind, programs.score_network)
        return network is not None and (kind != "hvp" or programs.differentiate_guidance)

    def _plan(self, kind: str) -> NetworkProgram:
        """A program of this kind, made when it is first wanted; memory is bound in `_network`."""
        if kind not in self._networks:
            programs = self.programs
            network = programs.score_network if kind.startswith("score") else programs.classifier_network
            assert network is not None
            self._networks[kind] = NetworkProgram(
                network.network,
                self.batch,
                network.weights,
                backward=kind != "score",
                linear=programs.guidance.graph if kind == "hvp" and programs.guidance is not None else None,
                threads=self.threads,
            )
        return self._networks[kind]

    def _network(self, kind: str) -> NetworkProgram:
        network = self._plan(kind)
        network.bind(self.programs.workspace)
        return network

    # --- the classifier ---------------------------------------------------------------------------------------------------

    def _guide(self, x_k: torch.Tensor, keep: bool) -> tuple[torch.Tensor, _Kept]:
        """∇ log p_ŷ = Jᵀ(e_ŷ − p), and what its Hessian needs."""
        guidance = self.programs.guidance
        assert guidance is not None
        if self.programs.classifier_network is None:
            g, linearization = guidance.gradient(x_k, keep_slopes=keep)
            return g, _Kept(linearization=linearization if keep else None)
        network = self._network("guidance")
        p, label = _confidence(network.forward(x_k))
        g = network.backward(_one_hot(label, p) - p)
        if not keep:
            return g, _Kept()
        if self.programs.linear_network is None:
            return g, _Kept(linearization=Linearization(label))
        return g, _Kept(network.slopes.clone(), network.region_slopes, p)

    def _hvp(self, x_k: torch.Tensor, v: torch.Tensor, kept: _Kept) -> torch.Tensor:
        guidance = self.programs.guidance
        assert guidance is not None
        if self.programs.linear_network is None:
            with torch.enable_grad():
                return guidance.hvp(x_k, v, kept.linearization)
        if kept.slopes is None or kept.p is None:
            network = self._network("guidance")
            p, _ = _confidence(network.forward(x_k))
            kept = _Kept(network.slopes, network.region_slopes, p)
        assert kept.slopes is not None and kept.p is not None
        network = self._network("hvp")
        network.slopes.copy_(kept.slopes)
        network.region_slopes = kept.region_slopes
        q = network.forward(v)
        return network.backward(kept.p * ((kept.p * q).sum(dim=1, keepdim=True) - q))  # −(diag p − p pᵀ) J v

    def _eager_score_vjp(self, k: int, x_k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x_k.detach().requires_grad_()
            eps_hat = self.programs.score(x, self.programs.eager._label(k, x_k))
            return torch.autograd.grad(eps_hat, x, v)[0] if eps_hat.requires_grad else torch.zeros_like(v)


def _confidence(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_p = torch.log_softmax(logits, dim=1)
    return log_p.exp(), log_p.argmax(dim=1)


def _one_hot(label: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like).scatter_(1, label[:, None], 1.0)


def unavailable(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why this engine cannot run networks of this kind here, or None."""
    if device.type != "cpu" or dtype != torch.float32:
        return f"the cpu engine runs float32 on a CPU, not {dtype} on {device.type}"
    return native.unavailable()


def prepare(
    score: nn.Module,
    classifier: nn.Module | None,
    table: CoefficientTable,
    example: torch.Tensor,
    *,
    differentiate_guidance: bool = True,
) -> CpuPrograms:
    """Programs for states like `example`; the arguments are those of the eager engine.

    Raises:
        ValueError: for a dtype or device that is not this engine's.
        native.NativeUnavailable: if the C++ kernels cannot be built here.
    """
    reason = unavailable(example.dtype, example.device)
    if reason is not None:
        if example.dtype == torch.float32 and example.device.type == "cpu":
            raise native.NativeUnavailable(reason)
        raise ValueError(f"{reason}; engine='eager' does")
    return CpuPrograms(score, guidance_of(classifier, table, example), table, example, differentiate_guidance)
