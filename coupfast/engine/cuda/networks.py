"""The networks of a run as the cuda engine has them: what programs of all batch sizes share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from coupfast.engine.cuda.capture import Backend
from coupfast.engine.cuda.compiled import Compiler
from coupfast.engine.cuda.pieces import Pieces
from coupfast.engine.cuda.substitution import Conv3x3Choice
from coupfast.engine.eager import EagerProgram
from coupfast.engine.precision import Precision
from coupfast.engine.protocol import StepMemory
from coupfast.guidance import Guidance
from coupfast.solvers import CoefficientTable


class CudaNetworks:
    """A score network and what guides, for one table and one shape of images.

    Everything here runs on any device: tests run it on the CPU with a stand-in for graph capture.

    Args:
        precision: Of the pieces.
        backend: Makes what captures graphs; None runs pieces call by call.
        compiler: Compiles a piece; None runs its operations one by one.
        choose: Which algorithm a convolution takes; None leaves all to the library.
        fuse_norms: Whether this project's group norms replace the library's.
        workspace: Bytes that a convolution which `choose` gives may take beside its result.
        beside: The most images of a bucket whose guidance runs beside the score network, on a second stream.
    """

    def __init__(
        self,
        score: nn.Module,
        guidance: Guidance | None,
        table: CoefficientTable,
        example: torch.Tensor,
        differentiate_guidance: bool,
        *,
        precision: Precision = "strict",
        backend: Callable[[], Backend] | None = None,
        compiler: Compiler | None = None,
        choose: Conv3x3Choice | None = None,
        fuse_norms: bool = False,
        workspace: int = 0,
        beside: int = 0,
    ) -> None:
        self.guidance, self.table = guidance, table
        self.differentiate_guidance = differentiate_guidance
        self.precision, self.backend, self.compiler = precision, backend, compiler
        self.workspace, self.beside = workspace, beside
        self.example = torch.zeros_like(example[:1])
        self.eager = EagerProgram(score, guidance, table, example, differentiate_guidance)
        self.pieces = Pieces(
            score,
            guidance,
            self.eager.labels,
            example,
            differentiate_guidance,
            clip=_clip_columns(table, example),
            choose=choose,
            fuse_norms=fuse_norms,
        )
        self.coefficients = table.tensor(dtype=torch.float32, device=example.device)
        self.noisy = bool((table.d != 0.0).any() or (table.f is not None and (table.f != 0.0).any()))
        self.pieces.order.record()  # what is here is there for whichever stream makes a piece

    def runs_beside(self, bucket: int) -> bool:
        """Whether guidance runs beside the score network."""
        return self.guidance is not None and self.backend is not None and bucket <= self.beside

    def peaks(self, bucket: int) -> tuple[int, int, int]:
        """Of a step, its transpose, and that at kept activations: as PyTorch would need it operation by operation, which is
        more than compiled pieces take; and the workspace.

        All once more where guidance runs beside the score network: neither stream gets what the other one let go. In larger
        buckets, where it does not, as much as in the largest one where it does: more images never need less.
        """
        parts = [self.eager.memory(bucket)]
        if self.runs_beside(1):
            parts.append(self.eager.memory(min(bucket, self.beside)))
        needs = [(part.forward, part.transpose, part.transpose_kept) for part in parts]
        forward, transpose, at_kept = (sum(most) + len(parts) * self.workspace for most in zip(*needs, strict=True))
        return forward, transpose, at_kept

    def memory(self, bucket: int) -> StepMemory:
        """`peaks`, and what is kept: of the score network once more where every step of the bucket leaves and finds it."""
        forward, transpose, at_kept = self.peaks(bucket)
        slopes, kept = self.eager.memory(bucket).slopes, self.pieces.kept_bytes(bucket)
        return StepMemory(forward, forward + 2 * kept + slopes, transpose, at_kept + kept, slopes, kept + slopes)


def _clip_columns(table: CoefficientTable, example: torch.Tensor) -> torch.Tensor | None:
    """Columns m and n side by side, shape (steps, 2)."""
    if table.m is None or table.n is None:
        return None
    columns = torch.stack([torch.from_numpy(column) for column in (table.m, table.n)], dim=1)
    return columns.to(device=example.device, dtype=torch.float32)
