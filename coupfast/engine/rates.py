"""What this machine can do at best, measured: the rates that a kernel's own are shares of."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from coupfast.engine.precision import strict_float32

FLUSH_BYTES = 2**28  # more than the L2 cache of any GPU
_FLUSHES = 4


def device_seconds(function: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes on the device, with nothing of its tensors in a GPU's L2 cache; on a CPU the wall clock's."""
    if device.type != "cuda":
        started = time.perf_counter()
        function()
        return time.perf_counter() - started
    with torch.cuda.device(device):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # These writes empty the cache. They also keep the device busy while the host enqueues the call between the two events:
        # without them a short kernel's time would be that of launching it.
        flush = torch.empty(FLUSH_BYTES // 4, device=device)
        for _ in range(_FLUSHES):
            flush.zero_()
        first.record()
        function()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3


def copy_bandwidth(device: torch.device, *, megabytes: int = 256, repeats: int = 5) -> float:
    """Bytes per second, read and written, of copying a tensor larger than the caches: what a memory-bound kernel can reach."""
    source = torch.zeros(megabytes * 2**18, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    best = min(device_seconds(lambda: target.copy_(source), device) for _ in range(repeats))
    return 2 * source.numel() * source.element_size() / best


def matmul_rate(device: torch.device, *, size: int | None = None, repeats: int = 5) -> float:
    """FLOP per second (2 a multiply-add) of a square float32 matrix product without TF32: what arithmetic can reach.

    Args:
        size: Of the matrices; None takes 8192 on a GPU, 1024 elsewhere.
    """
    size = size or (8192 if device.type == "cuda" else 1024)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device) for _ in range(2))
    with strict_float32(device.type):
        torch.mm(a, b)
        best = min(device_seconds(lambda: torch.mm(a, b), device) for _ in range(repeats))
    return 2 * size**3 / best
