"""Strict fp32, for the duration of a call: no autocast, no TF32, no bfloat16 inside fp32 operations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

# `autocast(enabled=False)` leaves TF32 as it is: cuDNN's convolutions use it by default, and
# `set_float32_matmul_precision` may have lowered matmuls on the GPU and, to bfloat16, on the CPU.
_FLAGS = tuple(
    (owner, "fp32_precision")
    for owner in (
        torch.backends.cuda.matmul,
        torch.backends.cudnn.conv,
        torch.backends.cudnn.rnn,
        torch.backends.mkldnn.matmul,
        torch.backends.mkldnn.conv,
    )
)


@contextlib.contextmanager
def strict_float32(device_type: str) -> Iterator[None]:
    """fp32 as IEEE 754 has it in everything that runs inside; the caller's settings are back afterwards."""
    before: list[tuple[Any, str, str]] = [(owner, name, getattr(owner, name)) for owner, name in _FLAGS]
    with torch.autocast(device_type, enabled=False), contextlib.ExitStack() as restore:
        for owner, name, value in before:
            restore.callback(setattr, owner, name, value)
            setattr(owner, name, "ieee")
        yield
