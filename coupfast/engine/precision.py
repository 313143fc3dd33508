"""Which arithmetic float32 operations take, for the duration of a call: no autocast, TF32 only where it was asked for, and on a
GPU none of cuDNN's algorithms whose bits differ from call to call."""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch

logger = logging.getLogger(__name__)

Precision = Literal["ieee", "tf32"]

# `autocast(enabled=False)` leaves TF32 as it is: cuDNN's convolutions use it by default, and
# `set_float32_matmul_precision` may have lowered matmuls on the GPU and, to bfloat16, on the CPU.
_SETTINGS = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv")
_OWNERS = {setting: operator.attrgetter(setting)(torch.backends) for setting in _SETTINGS}


# PyTorch's settings are those of the whole process. So threads that compute in one precision share them, and a thread that
# wants the other one waits until those are done.
_changed = threading.Condition()
_in_force: dict[int, Precision] = {}  # by thread
_callers = contextlib.ExitStack()  # the settings to be back in the end


@contextlib.contextmanager
def float32_precision(device_type: str, precision: Precision) -> Iterator[None]:
    """fp32 as IEEE 754 has it in everything that runs inside, or TF32 in CUDA's matmuls and convolutions; the caller's settings
    are back afterwards.

    cuDNN's algorithms that add in whichever order their threads come (some of a convolution's transposes do) are left out, and
    so is its choice by a trial's time, which may end either way: one image would not give the same bits twice.

    It may wait for other threads. So take it before any lock that they could be waiting for, and do not hold "ieee" around a
    backward pass that asks for "tf32": on a GPU that runs in another thread.
    """
    with torch.autocast(device_type, enabled=False):
        before = _switch(precision)
        try:
            yield
        finally:
            _switch(before)


def _switch(precision: Precision | None) -> Precision | None:
    """Let this thread compute in a precision, or in none of them any more; returns what it did before."""
    thread = threading.get_ident()
    with _changed:
        before = _in_force.get(thread)
        if before == precision:
            return before
        # One that waits holds nothing itself: two threads that both go over to the same precision would never end.
        if _in_force.pop(thread, None) is not None:
            if not _in_force:
                _callers.close()
            _changed.notify_all()
        if precision is not None:
            while any(other != precision for other in _in_force.values()):
                if not _changed.wait(timeout=30.0):
                    logger.info("waiting to compute in %s until other threads are done with the other precision", precision)
            if not _in_force:
                _set(precision)
            _in_force[thread] = precision
    return before


def _set(precision: Precision) -> None:
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
    for read, write, ieee, tf32 in older:
        with contextlib.suppress(RuntimeError):  # the caller set both, and differently
            _callers.callback(write, read())
        write(ieee if precision == "ieee" else tf32)
    for setting, owner in _OWNERS.items():
        if precision == "ieee" or setting.startswith("cudnn"):
            owner.fp32_precision = precision


def strict_float32(device_type: str) -> contextlib.AbstractContextManager[None]:
    """fp32 as IEEE 754 has it in everything that runs inside."""
    return float32_precision(device_type, "ieee")


def allows_tf32() -> bool:
    """Whether PyTorch may take TF32 in a float32 operation on CUDA right now."""
    return any(owner.fp32_precision != "ieee" for setting, owner in _OWNERS.items() if setting.startswith("cud"))
