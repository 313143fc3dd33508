"""Bytes: those that a device has left, where they lie, and an account of every storage that is made while it is open."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coupfast.free_memory import free_memory


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


#: Processes that share the host's memory, this one among them.
_sharers = 1


def share_memory(processes: int) -> None:
    """Tell that so many processes of this machine plan with its memory: `available_bytes` is a part of it from now on."""
    global _sharers
    _sharers = processes


CACHE_LINE = 64  # bytes, which PyTorch's own allocations begin at


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it whose memory begins at a cache line if its own does not (as in a file that is mapped).

    PyTorch's vectorised sums on a CPU begin at the first aligned element, and round otherwise for another address.
    """
    return tensor if tensor.data_ptr() % CACHE_LINE == 0 else tensor.clone()


def available_bytes(device: torch.device) -> int:
    """Memory that a process could still take on `device`: what is free, within all limits that are set for the process.

    On a GPU also what PyTorch's allocator holds and nothing uses: a plan must not shrink after earlier work.
    """
    if device.type != "cuda":
        return free_memory() // _sharers
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached
