"""The cpu engine: a program for each batch size, made when it is first wanted."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from coupfast.engine.cpu.networks import CpuNetworks
from coupfast.engine.cpu.options import Options
from coupfast.engine.cpu.program import CpuProgram
from coupfast.engine.eager import guidance_of
from coupfast.engine.protocol import StepMemory
from coupfast.solvers import CoefficientTable
from coupfast_kernels import native

#: Batch sizes whose programs are kept: attacks run on fewer and fewer images. Their memory is one workspace.
KEPT_BATCHES = 8


class BoundCpuEngine:
    """The engine bound to networks, a table and a shape of images; one `CpuProgram` per batch size. Made by `prepare`."""

    engine = "cpu"
    largest_batch: int | None = None

    def __init__(self, networks: CpuNetworks) -> None:
        self.networks = networks
        self._programs: OrderedDict[tuple[int, int], CpuProgram] = OrderedDict()
        self._lock = threading.Lock()

    def for_batch(self, batch: int) -> CpuProgram:
        key = (batch, torch.get_num_threads())
        with self._lock:
            if key not in self._programs:
                self._programs[key] = CpuProgram(self.networks, *key)
                while len(self._programs) > KEPT_BATCHES:
                    self._programs.popitem(last=False)
            self._programs.move_to_end(key)
            return self._programs[key]

    def memory(self, batch: int) -> StepMemory:
        """The programs' own memory, and what PyTorch takes of the networks and operations that it runs, one image's in
        proportion."""
        networks, program = self.networks, self.for_batch(batch).memory()
        if networks.score is not None and (networks.guidance is None or networks.classifier is not None):
            return program
        eager = networks.eager.memory(batch)
        most = StepMemory(*map(max, dataclasses.astuple(eager), dataclasses.astuple(program)))
        if networks.score is None:
            return most
        # PyTorch keeps nothing of the score network.
        activations = program.activations + most.slopes - program.slopes
        keeping = max(eager.forward, program.forward_keeping - program.activations) + activations
        return dataclasses.replace(most, forward_keeping=keeping, activations=activations)

    def weights_bytes(self, batch: int, *, gradient: bool) -> int:
        """Packed weights of the algorithms that this batch takes, and aligned copies, beside the networks' own weights."""
        planned = [network for network in (self.networks.score, self.networks.classifier) if network is not None]
        copied = sum(network.network.copied_bytes() for network in planned)
        return self.for_batch(batch).weights_bytes(gradient=gradient) + copied

    def evaluations(self) -> dict[str, dict[str, int]]:
        return self.networks.eager.evaluations()


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
    options: Mapping[str, Any] | None = None,
) -> BoundCpuEngine:
    """An engine bound to networks, for states like `example`; the first arguments are those of the eager engine.

    Args:
        options: See `Options`.

    Raises:
        ValueError: for a dtype or device that is not this engine's, or options that do not exist.
        native.NativeUnavailable: if the C++ kernels cannot be built here.
    """
    chosen = Options.of(options)
    reason = unavailable(example.dtype, example.device)
    if reason is not None:
        if example.dtype == torch.float32 and example.device.type == "cpu":
            raise native.NativeUnavailable(reason)
        raise ValueError(f"{reason}; engine='eager' does")
    guidance = guidance_of(classifier, table, example)
    return BoundCpuEngine(CpuNetworks(score, guidance, table, example, differentiate_guidance, chosen))
