"""Which arithmetic float32 operations take: its names, and PyTorch's settings for the duration of a call.

    strict   fp32 as IEEE 754 has it, with errors up to four times PyTorch's own
    fast     fp32 algorithms with errors up to 1e-5
    3xtf32   on tensor cores, every product of the 3x3 convolutions split in three
    tf32     on tensor cores, products of 11 bits

No autocast in any of them, and on a GPU none of cuDNN's algorithms whose bits differ from call to call.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch

logger = logging.getLogger(__name__)

Precision = Literal["strict", "fast", "3xtf32", "tf32"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
#: What runs without tensor cores, hence everywhere; the others are the cuda engine's.
FLOAT32_PRECISIONS: tuple[Precision, ...] = ("strict", "fast")
#: What `coupfast_kernels`' convolutions (and Triton, whose names these are) call their `products`; "ieee" is allowed in all.
PRODUCTS: dict[Precision, str] = {"strict": "ieee", "fast": "ieee", "3xtf32": "tf32x3", "tf32": "tf32"}

# `autocast(enabled=False)` leaves TF32 as it is: cuDNN's convolutions use it by default, and
# `set_float32_matmul_precision` may have lowered matmuls on the GPU and, to bfloat16, on the CPU.
_SETTINGS = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv")
_OWNERS = {setting: operator.attrgetter(setting)(torch.backends) for setting in _SETTINGS}


# PyTorch's settings are those of the whole process. So threads that compute with TF32 share them, as do those without, and a
# thread that wants the other waits until those are done.
_changed = threading.Condition()
_in_force: dict[int, bool] = {}  # by thread: whether TF32 is allowed
_callers = contextlib.ExitStack()  # the settings to be back in the end


@contextlib.contextmanager
def float32_precision(device_type: str, precision: Precision) -> Iterator[None]:
    """fp32 as IEEE 754 has it in everything of PyTorch's that runs inside, or with "tf32" TF32 in CUDA's matmuls and
    convolutions; the caller's settings are back afterwards.

    cuDNN's algorithms that add in whichever order their threads come (some of a convolution's transposes do) are left out, and
    so is its choice by a trial's time, which may end either way: one image would not give the same bits twice.

    It may wait for other threads. So take it before any lock that they could be waiting for, and do not hold another around a
    backward pass that asks for "tf32": on a GPU that runs in another thread.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` is one of {', '.join(PRECISIONS)}, got {precision!r}")
    with torch.autocast(device_type, enabled=False):
        before = _switch(precision == "tf32")
        try:
            yield
        finally:
            _switch(before)


def _switch(tf32: bool | None) -> bool | None:
    """Let this thread compute with or without TF32, or no matter how any more; returns what it did before."""
    thread = threading.get_ident()
    with _changed:
        before = _in_force.get(thread)
        if before == tf32:
            return before
        # One that waits holds nothing itself: two threads that both go over to the same would never end.
        if _in_force.pop(thread, None) is not None:
            if not _in_force:
                _callers.close()
            _changed.notify_all()
        if tf32 is not None:
            while any(other != tf32 for other in _in_force.values()):
                if not _changed.wait(timeout=30.0):
                    logger.info("waiting to compute %s TF32 until other threads are done", "with" if tf32 else "without")
            if not _in_force:
                _set(tf32)
            _in_force[thread] = tf32
    return before


def _set(tf32: bool) -> None:
    cudnn: Any = torch.backends.cudnn
    for name, value in (("deterministic", True), ("benchmark", False)):
        _callers.callback(setattr, cudnn, name, getattr(cudnn, name))
        setattr(cudnn, name, value)
    for owner in _OWNERS.values():
        _callers.callback(setattr, owner, "fp32_precision", owner.fp32_precision)
    # The older settings have to agree: PyTorch's compiler reads them, and reading raises where old and new differ.
    older: list[tuple[Callable[[], Any], Callable[[Any], None], Any, Any]] = [
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest", "high"),
        (lambda: cudnn.allow_tf32, functools.partial(setattr, cudnn, "allow_tf32"), False, True),
    ]
    for read, write, without, with_ in older:
        with contextlib.suppress(RuntimeError):  # the caller set both, and differently
            _callers.callback(write, read())
        write(with_ if tf32 else without)
    for setting, owner in _OWNERS.items():
        if not tf32 or setting.startswith("cudnn"):
            owner.fp32_precision = "tf32" if tf32 else "ieee"


def strict_float32(device_type: str) -> contextlib.AbstractContextManager[None]:
    """fp32 as IEEE 754 has it in everything that runs inside."""
    return float32_precision(device_type, "strict")
