"""The noise of `definition.py` in C++, bit for bit: the guided step's (`csrc/guided_step.h`), with nothing to add it to."""

from __future__ import annotations

import torch

from coupfast_kernels.guided_step.cpu import checked_seed_and_step, draws_tensor, guided_step_structure
from coupfast_kernels.operations import Operations


def standard_normal_cpu(
    shape: tuple[int, ...], *, seed: int, ids: torch.Tensor, draw: torch.Tensor | int, step: int
) -> torch.Tensor:
    """Fused `standard_normal_ref`; equal bits.

    Args:
        shape: (batch, …).
        seed, ids, draw, step: As for `guided_step_cpu`.

    Returns:
        Standard normal noise, contiguous float32.

    Raises:
        ValueError, TypeError: for arguments that do not fit.
        native.NativeUnavailable: if the C++ kernels cannot be built here.
    """
    z = torch.empty(shape, dtype=torch.float32)
    structure = guided_step_structure(z, None, None, None, ids=ids, draw=draws_tensor(draw, len(z) if shape else 0))
    structure.seed, structure.step = checked_seed_and_step(seed, step)
    Operations([structure]).run(torch.get_num_threads())
    return z
