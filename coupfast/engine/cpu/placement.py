"""Where the values of a program lie: each in one arena, a place used again as soon as its value was read for the last time.

Maps are channels last, so that a concatenation's parts are written side by side and read where they lie. What a forward pass is
to leave for a transpose much later lies apart from the arena, in memory that every such pass has for itself.
"""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
import torch

ALIGNMENT = 16  # floats: a cache line

#: The address that kept memory has until a pass brings its own. No pointer can have it: one that was forgotten does not go
#: unnoticed.
UNPLACED = 1 << 62


@dataclasses.dataclass(eq=False)
class Storage:
    """Floats of the arena, from the first instruction that writes them to the last that reads them; or of kept memory."""

    floats: int
    offset: int = -1
    first: int = -1
    last: int = -1
    kept: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A value in a storage. Four axes: channels last, `pixel` floats from one pixel to the next; otherwise row-major."""

    storage: Storage
    shape: tuple[int, ...]  # without the batch
    pixel: int
    start: int = 0

    def channels(self, start: int, count: int) -> View:
        return View(self.storage, (count, *self.shape[1:]), self.pixel, self.start + start)

    def zeros(self) -> torch.Tensor:
        """A tensor that lies as one image of this value does."""
        if len(self.shape) != 3:
            return torch.zeros(1, *self.shape, dtype=torch.float32)
        channels, height, width = self.shape
        strides = (height * width * self.pixel, 1, width * self.pixel, self.pixel)
        return torch.zeros(strides[0], dtype=torch.float32).as_strided((1, channels, height, width), strides)

    def rows(self) -> tuple[int, int]:
        """Floats that lie together, and how many such rows an image has."""
        if len(self.shape) == 3:
            return self.shape[0], self.shape[1] * self.shape[2]
        return int(np.prod(self.shape)), 1


def new_view(shape: Sequence[int], batch: int) -> View:
    """A value of this shape (without the batch) in a storage of its own."""
    return View(Storage(batch * int(np.prod(shape))), tuple(shape), shape[0] if len(shape) == 3 else 0)


class Access(Protocol):
    """What an instruction reads and writes."""

    reads: list[Storage]
    writes: list[Storage]


def keep(forward: Sequence[Access], backward: Sequence[Access], start: int) -> int:
    """Give every storage that both passes touch a place in kept memory.

    Args:
        start: Floats that are taken there.

    Returns:
        Floats of the kept memory, those included.
    """
    read_later = {storage for instruction in backward for storage in (*instruction.reads, *instruction.writes)}
    end = _aligned(start)
    for storage in dict.fromkeys(s for instruction in forward for s in (*instruction.reads, *instruction.writes)):
        if storage in read_later:
            storage.kept, storage.offset = True, end
            end += _aligned(storage.floats)
    return end


def allocate(instructions: Sequence[Access], outside: Iterable[tuple[View, int, int]]) -> int:
    """Give every storage that is not kept its offset: first fit in order of first use.

    Args:
        instructions: In the order in which they run.
        outside: Values that somebody else writes or reads, with the first and the last instruction (by index) that they must
            be there for.

    Returns:
        Floats of the arena.
    """
    outside = list(outside)
    for index, instruction in enumerate(instructions):
        for storage in (*instruction.reads, *instruction.writes):
            if storage.first < 0:
                storage.first = index
            storage.last = index
    for view, first, last in outside:
        view.storage.first = first if view.storage.first < 0 else min(view.storage.first, first)
        view.storage.last = max(view.storage.last, last)
    named = [s for i in instructions for s in (*i.reads, *i.writes)] + [view.storage for view, _, _ in outside]
    storages = dict.fromkeys(storage for storage in named if not storage.kept)  # in order: the same plan every time
    placed: list[Storage] = []
    arena_floats = 0
    for storage in sorted(storages, key=lambda s: (s.first, -s.floats)):
        size = _aligned(storage.floats)
        alive = sorted((s for s in placed if s.last >= storage.first), key=lambda s: s.offset)
        offset = 0
        for other in alive:
            if offset + size <= other.offset:
                break
            offset = max(offset, other.offset + _aligned(other.floats))
        storage.offset = offset
        placed.append(storage)
        arena_floats = max(arena_floats, offset + size)
    return arena_floats


def _aligned(floats: int) -> int:
    return -(-floats // ALIGNMENT) * ALIGNMENT


class Workspace:
    """Memory of programs that never run at the same time: the largest arena and the largest scratch of any of them.

    Attributes:
        moves: How often memory moved: programs bound before must be bound again.
    """

    def __init__(self) -> None:
        self.arena, self.scratch, self.moves = pages(0), pages(0), 0

    def hold(self, arena_floats: int, scratch_floats: int) -> None:
        """Make room."""
        self.moves += arena_floats > len(self.arena) or scratch_floats > len(self.scratch)
        if arena_floats > len(self.arena):
            self.arena = pages(arena_floats)
        if scratch_floats > len(self.scratch):
            self.scratch = pages(scratch_floats)

    def trim(self, arena_floats: int, scratch_floats: int) -> None:
        """Give the pages beyond back to the operating system until somebody writes there; nothing moves."""
        for memory, floats in ((self.arena, arena_floats), (self.scratch, scratch_floats)):
            start = -(-4 * floats // mmap.PAGESIZE) * mmap.PAGESIZE
            if start < memory.nbytes and hasattr(mmap, "MADV_DONTNEED"):
                memory.base.obj.madvise(mmap.MADV_DONTNEED, start)  # type: ignore[union-attr]

    def bytes(self) -> int:
        return self.arena.nbytes + self.scratch.nbytes


@dataclasses.dataclass(eq=False)
class Memory:
    """A workspace as it lies now, seen by a program of one batch size whose storages have offsets.

    Attributes:
        kept: The memory of the pass that runs, for what it keeps; None between passes.
    """

    arena: np.ndarray
    scratch: np.ndarray
    batch: int
    kept: np.ndarray | None = None

    def address(self, view: View) -> int:
        """Where the view begins; what is kept counts from `UNPLACED`."""
        base = UNPLACED if view.storage.kept else self.arena.ctypes.data
        return base + 4 * (view.storage.offset + view.start)

    def tensors(self, views: Sequence[View]) -> Callable[[], list[torch.Tensor]]:
        """What gives the views as tensors while a pass runs: what is kept lies elsewhere in every pass."""
        fixed = [None if view.storage.kept else self.tensor(view) for view in views]
        return lambda: [self.tensor(v) if f is None else f for v, f in zip(views, fixed, strict=True)]

    def tensor(self, view: View) -> torch.Tensor:
        """The view as a tensor with a version of its own: autograd must not take other values' writes for this one's."""
        place = self.arena
        if view.storage.kept:
            assert self.kept is not None, "what is kept lies nowhere before a pass runs: see `tensors`"
            place = self.kept
        flat = torch.from_numpy(place[view.storage.offset : view.storage.offset + view.storage.floats])
        if len(view.shape) != 3:
            return flat.view(self.batch, *view.shape)
        channels, height, width = view.shape
        strides = (height * width * view.pixel, 1, width * view.pixel, view.pixel)
        return flat.as_strided((self.batch, channels, height, width), strides, view.start)


def dense(value: torch.Tensor) -> torch.Tensor:
    """A map in channels last without gaps: many of PyTorch's operations refuse, or copy one by one, one inside a wider one."""
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value


def pages(floats: int) -> np.ndarray:
    """Zeroed pages of the operating system, large ones where it has them."""
    size = max(4 * floats, mmap.PAGESIZE)
    # Not shared, as an anonymous map is by default: a fork would write into its parent's values, no page would be large, and
    # none could be given back.
    found = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        found.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(found, dtype=np.float32, count=max(1, floats))
