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
    ) -> None:
        self.guidance, self.table = guidance, table
        self.differentiate_guidance = differentiate_guidance
        self.precision, self.backend, self.compiler = precision, backend, compiler
        self.workspace = workspace
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

    def memory(self, bucket: int) -> StepMemory:
        """As PyTorch would need it operation by operation, which is more than compiled pieces take; and the workspace."""
        eager = self.eager.memory(bucket)
        forward, transpose = eager.forward + self.workspace, eager.transpose + self.workspace
        return StepMemory(forward, forward, transpose, transpose, eager.slopes, eager.slopes)


def _clip_columns(table: CoefficientTable, example: torch.Tensor) -> torch.Tensor | None:
    """Columns m and n side by side, shape (steps, 2)."""
    if table.m is None or table.n is None:
        return None
    columns = torch.stack([torch.from_numpy(column) for column in (table.m, table.n)], dim=1)
    return columns.to(device=example.device, dtype=torch.float32)
