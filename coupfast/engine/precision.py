"""Which arithmetic float32 operations take, for the duration of a call: no autocast, TF32 only where it was asked for, and on a
GPU none of cuDNN's algorithms whose bits differ from call to call."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from typing import Any, Literal

import torch

# `autocast(enabled=False)` leaves TF32 as it is: cuDNN's convolutions use it by default, and
# `set_float32_matmul_precision` may have lowered matmuls on the GPU and, to bfloat16, on the CPU.
_SETTINGS = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv")
_OWNERS = {setting: operator.attrgetter(setting)(torch.backends) for setting in _SETTINGS}


@contextlib.contextmanager
def float32_precision(device_type: str, precision: Literal["ieee", "tf32"]) -> Iterator[None]:
    """fp32 as IEEE 754 has it in everything that runs inside, or TF32 in CUDA's matmuls and convolutions; the caller's settings
    are back afterwards.

    cuDNN's algorithms that add in whichever order their threads come (some of a convolution's transposes do) are left out, and
    so is its choice by a trial's time, which may end either way: one image would not give the same bits twice.
    """
    before = {setting: owner.fp32_precision for setting, owner in _OWNERS.items()}
    legacy = _legacy_precision()
    cudnn: Any = torch.backends.cudnn
    with torch.autocast(device_type, enabled=False), contextlib.ExitStack() as restore:
        for name, value in (("deterministic", True), ("benchmark", False)):
            restore.callback(setattr, cudnn, name, getattr(cudnn, name))
            setattr(cudnn, name, value)
        for setting, owner in _OWNERS.items():
            restore.callback(setattr, owner, "fp32_precision", before[setting])
        # The older setting has to agree: PyTorch's compiler reads it, and reading raises where the two say different things.
        if legacy is not None:
            restore.callback(torch.set_float32_matmul_precision, legacy)
        torch.set_float32_matmul_precision("highest" if precision == "ieee" else "high")
        for setting, owner in _OWNERS.items():
            if precision == "ieee" or setting.startswith("cudnn"):
                owner.fp32_precision = precision
        yield


def _legacy_precision() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the caller set both, and differently
        return None


def strict_float32(device_type: str) -> contextlib.AbstractContextManager[None]:
    """fp32 as IEEE 754 has it in everything that runs inside."""
    return float32_precision(device_type, "ieee")


def allows_tf32() -> bool:
    """Whether PyTorch may take TF32 in a float32 operation on CUDA right now."""
    return any(owner.fp32_precision != "ieee" for setting, owner in _OWNERS.items() if setting.startswith("cud"))
