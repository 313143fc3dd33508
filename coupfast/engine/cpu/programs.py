"""The cpu engine bound to networks: what is planned, for whom, and the program of each batch size."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import OrderedDict

import torch
from torch import fx, nn

from coupfast.engine.cpu.algorithms import allowed_tiles
from coupfast.engine.cpu.placement import Workspace
from coupfast.engine.cpu.planned import PlannedNetwork, planned
from coupfast.engine.cpu.program import CpuProgram
from coupfast.engine.eager import EagerProgram, guidance_of
from coupfast.engine.memory import available_bytes
from coupfast.engine.protocol import StepMemory
from coupfast.guidance import Guidance, scaled_logits
from coupfast.solvers import CoefficientTable
from coupfast.tracing import Trace, trace
from coupfast_kernels import convolution as kernels
from coupfast_kernels import native

logger = logging.getLogger(__name__)

#: Batch sizes whose programs are kept: attacks run on fewer and fewer images. Their memory is one workspace.
KEPT_BATCHES = 8


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
        self.score_network = self._planned_score()
        self.classifier_network = None if guidance is None else self._planned_classifier(guidance)
        self.linear_network = None
        if guidance is not None and self.classifier_network is not None and guidance.graph is not None:
            self.linear_network = self.classifier_network
        self._label_values: dict[int, dict[fx.Node, torch.Tensor]] = {}
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
        networks = [self.score] + ([self.guidance.classifier] if self.guidance is not None else [])
        weights = sum(w.nbytes for network in networks for w in network.parameters() if w.dim() == 4)
        allowed = allowed_tiles(weights, available_bytes(self.example.device))
        if allowed != kernels.TILES:
            logger.warning(
                "little memory is free: convolutions leave out F(4x4)%s, whose packed weights are larger",
                "" if kernels.F2 in allowed else " and F(2x2)",
            )
        return allowed

    def evaluations(self) -> dict[str, dict[str, int]]:
        kinds = self.eager.evaluations()
        return kinds | {"activations": kinds["slopes"]}

    def label_values(self, k: int) -> dict[fx.Node, torch.Tensor]:
        """What step k's label alone decides in the score network, for one image; found once per step."""
        if k not in self._label_values:
            assert self.score_network is not None
            self._label_values[k] = self.score_network.network.at_label(self.eager.labels[k].view(1))
        return self._label_values[k]

    def _planned_score(self) -> PlannedNetwork | None:
        labels = self.eager.labels

        def arguments(batch: int) -> tuple[torch.Tensor, ...]:
            return self.example.new_zeros(batch, *self.example.shape[1:]), labels[:1].expand(batch).clone()

        return planned(
            "score net",
            lambda: trace(lambda x, labels: self.score(x, labels), arguments),
            lambda x: self.score(x, labels[-1:]),
            self.example,
            allowed=self.allowed_tiles,
            # Not the label that was traced: one that was read behind the trace's back would show.
            label=labels[-1:],
            gradient_tolerance=1e-4,
        )

    def _planned_classifier(self, guidance: Guidance) -> PlannedNetwork | None:
        def logits(x: torch.Tensor) -> torch.Tensor:
            return scaled_logits(guidance.classifier, x)

        def traced() -> Trace:
            if guidance.graph is not None:
                return guidance.graph.traced
            return trace(logits, lambda batch: (self.example.new_zeros(batch, *self.example.shape[1:]),))

        return planned(
            "classifier",
            traced,
            logits,
            self.example,
            allowed=self.allowed_tiles,
            label=self.eager.labels[-1:],
            # A ReLU within rounding of its kink may fall on either side, and one of a layer's many is that much of it.
            gradient_tolerance=3e-2,
        )


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
