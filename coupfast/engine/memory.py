"""Bytes alive: an account of every storage that is made while it is open. And where they lie."""

from __future__ import annotations

import os
import pathlib
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Counting:
    def __init__(self, outside: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._outside = {tensor.untyped_storage()._cdata for tensor in outside}
        self._storages: dict[int, weakref.ref] = {}  # by address, which is theirs while they live

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in (result,) if isinstance(result, torch.Tensor) else tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._storages or address in self._outside:
            return

        def release(_: weakref.ref) -> None:
            del self._storages[address]
            self.live -= size

        self._storages[address] = weakref.ref(storage, release)
        self.live += size
        self.peak = max(self.peak, self.live)


class AllocationAccount(_Counting, TorchDispatchMode):  # in two classes for the reason given in `coupfast.tracing`
    """Counts the storages of operations' results while they live; works on real and on fake tensors.

    What an operation allocates and frees inside itself is not seen.

    Args:
        outside: Tensors that were there before: an operation's view of one of them is no new storage.

    Attributes:
        live: Bytes alive now that were made inside.
        peak: Most bytes alive at once so far.
    """


CACHE_LINE = 64  # bytes, which PyTorch's own allocations begin at


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it whose memory begins at a cache line if its own does not (as in a file that is mapped).

    PyTorch's vectorised sums on a CPU begin at the first aligned element, and round otherwise for another address.
    """
    return tensor if tensor.data_ptr() % CACHE_LINE == 0 else tensor.clone()


def available_bytes(device: torch.device) -> int:
    """Memory that a process could still take on `device`; on Linux within its control group's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        available = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        # No account of free memory here (macOS, Windows): take a quarter of what is built in.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4 if hasattr(os, "sysconf") else 2 * 2**30
    group = pathlib.Path("/sys/fs/cgroup")
    # Control groups of version 2, then 1; what they count as used includes cached files, which give way.
    for folder, limit_file, used_file, cached in (
        (group, "memory.max", "memory.current", "inactive_file"),
        (group / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit, used = (folder / limit_file).read_text().strip(), int((folder / used_file).read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        if limit == "max":
            return available
        return min(available, max(0, int(limit) - used + int(statistics.get(cached, 0))))
    return available
