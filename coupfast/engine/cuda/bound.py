"""The cuda engine: a program for each bucket of batch sizes, made when it is first wanted."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from coupfast.engine.cuda.calibration import Calibration, ConvolutionShape
from coupfast.engine.cuda.capture import CudaBackend
from coupfast.engine.cuda.columns import ColumnsProgram
from coupfast.engine.cuda.compiled import Inductor
from coupfast.engine.cuda.networks import CudaNetworks
from coupfast.engine.cuda.options import Options
from coupfast.engine.cuda.program import CudaProgram
from coupfast.engine.cuda.substitution import CONTIGUOUS, LIBRARY
from coupfast.engine.cuda.support import unavailable
from coupfast.engine.eager import guidance_of
from coupfast.engine.precision import Precision
from coupfast.engine.protocol import StepMemory
from coupfast.solvers import CoefficientTable
from coupfast_kernels.convolution.gpu import most_workspace

#: Batches are padded up to one of these, so that a smaller last batch needs no graph of its own. Above 16 a step's time grows
#: with its images: half steps, too.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512)
#: Kernels of so few images leave most of a GPU idle: guidance then runs beside the score network. With more, either fills it.
SMALL_BUCKET = 4
#: Programs that are kept: each holds graphs and their memory.
KEPT_PROGRAMS = 4


class BoundCudaEngine:
    """The engine bound to networks, a table and a shape of images; one `CudaProgram` per bucket of batch sizes.

    Made by `prepare`, which checks the device.
    """

    engine = "cuda"
    largest_batch: int | None = BUCKETS[-1]

    def __init__(self, networks: CudaNetworks) -> None:
        self.networks = networks
        self._programs: OrderedDict[int, CudaProgram] = OrderedDict()
        self._lock = threading.RLock()

    def for_batch(self, batch: int) -> CudaProgram:
        """The program of the smallest bucket that holds so many images.

        Also where a larger one is there already: what a batch gives must not depend on which batches came before it.

        Raises:
            ValueError: for more images than the largest bucket.
        """
        bucket = bucket_of(batch)
        with self._lock:
            if bucket not in self._programs:
                kind = ColumnsProgram if self.networks.table.extended else CudaProgram
                self._programs[bucket] = kind(self.networks, bucket)
                while len(self._programs) > KEPT_PROGRAMS:
                    self._programs.popitem(last=False)
            self._programs.move_to_end(bucket)
            return self._programs[bucket]

    def memory(self, batch: int) -> StepMemory:
        return self.networks.memory(bucket_of(batch))

    def weights_bytes(self, batch: int, *, gradient: bool) -> int:
        """Copies of weights, as far as they are made."""
        return self.networks.pieces.weights_bytes()

    def evaluations(self) -> dict[str, dict[str, int]]:
        return self.networks.eager.evaluations()


def bucket_of(batch: int) -> int:
    """The smallest bucket for so many images; ValueError if there is none."""
    for bucket in BUCKETS:
        if batch <= bucket:
            return bucket
    raise ValueError(f"the cuda engine runs up to {BUCKETS[-1]} images at a time, got {batch}; split the batch")


def prepare(
    score: nn.Module,
    classifier: nn.Module | None,
    table: CoefficientTable,
    example: torch.Tensor,
    *,
    differentiate_guidance: bool = True,
    precision: Precision = "strict",
    options: Mapping[str, Any] | None = None,
) -> BoundCudaEngine:
    """An engine bound to networks, for states like `example`; the first arguments are those of the eager engine.

    Args:
        precision: One of `PRECISIONS`: "strict" and "fast" compute in IEEE float32 (calibration allows errors of four times the
            library's, and up to 1e-5); "3xtf32" takes 3x3 convolutions on tensor cores, with every product split in three;
            "tf32" allows TF32 in all convolutions and matrix products.
        options: Parts to switch on or off, see `Options`.

    Raises:
        ValueError: for a dtype or device that is not this engine's, or options that do not exist or contradict each other.
        RuntimeError: where the device, PyTorch or Triton is not up to it.
    """
    chosen = Options.of(options)
    beside = {"auto": SMALL_BUCKET, True: BUCKETS[-1], False: 0}[chosen.beside]
    if precision == "3xtf32" and not chosen.triton:
        raise ValueError("precision='3xtf32' is a precision of this project's convolutions: it needs engine_options 'triton'")
    reason = unavailable(example.dtype, example.device)
    if reason is not None:
        if example.device.type == "cuda" and example.dtype == torch.float32:
            raise RuntimeError(f"{reason}; engine='eager' runs without")
        raise ValueError(f"{reason}; engine='eager' does")
    compiler = Inductor(example.device, always=chosen.compile is True) if chosen.compile else None
    choose = None
    if chosen.triton:
        alone = Inductor(example.device) if chosen.compile else None  # a convolution of its own would never be worth it
        calibration = Calibration(example.device, precision=precision, compiler=alone)

        def choose(batch: int, in_channels: int, out_channels: int, height: int, width: int, groups: int = 0) -> str:
            shape = ConvolutionShape(batch, in_channels, out_channels, height, width, groups)
            kind, _, algorithm = calibration.choose(shape).candidate.partition("triton-")
            if groups:
                return kind
            if kind == CONTIGUOUS:
                return CONTIGUOUS
            return LIBRARY if kind else algorithm

    networks = CudaNetworks(
        score,
        guidance_of(classifier, table, example),
        table,
        example,
        differentiate_guidance,
        precision=precision,
        backend=(lambda: CudaBackend(example.device)) if chosen.graphs else None,
        compiler=compiler,
        choose=choose,
        fuse_norms=chosen.triton,
        workspace=most_workspace(example.device) if chosen.triton else 0,
        beside=beside,
    )
    return BoundCudaEngine(networks)
