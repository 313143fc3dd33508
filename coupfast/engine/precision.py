"""Strict fp32, for the duration of a call: no autocast, no TF32, no bfloat16 inside fp32 operations."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator

import torch

# `autocast(enabled=False)` leaves TF32 as it is: cuDNN's convolutions use it by default, and
# `set_float32_matmul_precision` may have lowered matmuls on the GPU and, to bfloat16, on the CPU.
_SETTINGS = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv")
_OWNERS = tuple(operator.attrgetter(setting)(torch.backends) for setting in _SETTINGS)


@contextlib.contextmanager
def strict_float32(device_type: str) -> Iterator[None]:
    """fp32 as IEEE 754 has it in everything that runs inside; the caller's settings are back afterwards."""
    before = [(owner, owner.fp32_precision) for owner in _OWNERS]
    with torch.autocast(device_type, enabled=False), contextlib.ExitStack() as restore:
        for owner, value in before:
            restore.callback(setattr, owner, "fp32_precision", value)
            owner.fp32_precision = "ieee"
        yield
