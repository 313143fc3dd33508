"""Work on fixed addresses, captured once and replayed: one launch from the host for all of a step's kernels.

A recording reads and writes the same memory at every replay. What varies (state, step, seed, ids) is written into static
buffers before, and what a replay leaves is read from static buffers after it.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch

WARM_UPS = 3  # calls before a capture: compilation, tuning and libraries' workspaces happen there, not in the graph


class Recording(Protocol):
    """Something that was captured."""

    def replay(self) -> None: ...


class Backend(Protocol):
    """How work is captured on a device."""

    def capture(self, function: Callable[[], None]) -> Recording:
        """`function` recorded, not run."""
        ...

    def side_stream(self) -> contextlib.AbstractContextManager[None]:
        """Where a warm-up runs; what ran before is done when it begins, and it is done when anything runs after."""
        ...

    def out_of_memory(self) -> type[BaseException]:
        """The error that the device raises."""
        ...


# One capture at a time in a process: PyTorch's random state and the garbage collector belong to all threads.
_CAPTURE = threading.Lock()


class CudaBackend:
    """CUDA graphs with a memory pool and a stream of their own: graphs captured on one stream share its workspaces."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)

    def capture(self, function: Callable[[], None]) -> Recording:
        graph = torch.cuda.CUDAGraph()
        with _CAPTURE, torch.cuda.device(self.device), _without_garbage_collection():
            try:
                # The outer stream again at the end, also where the capture's own end raises.
                with torch.cuda.stream(torch.cuda.current_stream()):
                    # Other threads of the process may use the device meanwhile.
                    with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                        function()
            except BaseException:
                self._end_allocations()
                raise
        return graph

    def _end_allocations(self) -> None:
        """What the end of a capture leaves undone where it raises: the allocator would go on allocating to the capture's pool,
        and refuse every later one."""
        with contextlib.suppress(RuntimeError):  # it has been done: the capture itself could be ended
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
            torch._C._cuda_releasePool(self.device.index, self.pool)

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[None]:
        with torch.cuda.device(self.device):
            outer = torch.cuda.current_stream()
            self.stream.wait_stream(outer)
            try:
                with torch.cuda.stream(self.stream):
                    yield
            finally:
                outer.wait_stream(self.stream)

    def out_of_memory(self) -> type[BaseException]:
        return torch.cuda.OutOfMemoryError


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """A graph that is destroyed while another is captured would end the capture."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Runner:
    """Named pieces of work on static buffers, each captured when it first runs (or never, without a backend).

    Args:
        state: The buffers that the work writes and that carry meaning from call to call: a warm-up leaves them as they were.
        backend: None runs every piece call by call.
        needs: What the work is predicted to need, said when memory runs out.
    """

    def __init__(self, state: Iterable[torch.Tensor], backend: Backend | None, needs: Callable[[], str]) -> None:
        self.state, self.backend, self.needs = list(state), backend, needs
        self._recordings: dict[str, Recording] = {}
        self._lock = threading.RLock()

    def run(self, name: str, function: Callable[[], None]) -> None:
        """Do `function`, which reads and writes nothing but static buffers and constants, and decides nothing on the host.

        Raises:
            RuntimeError: if it cannot be captured; the buffers then hold what they held, and nothing is kept of the attempt.
        """
        with self._lock:
            if self.backend is None:
                return function()
            if name not in self._recordings:
                self._recordings[name] = self._record(name, function)
            self._recordings[name].replay()

    def _record(self, name: str, function: Callable[[], None]) -> Recording:
        assert self.backend is not None
        before = [buffer.clone() for buffer in self.state]
        try:
            try:
                with self.backend.side_stream():
                    for _ in range(WARM_UPS):
                        # Each begins where the first did: a second step after a table's last would read beyond it, which
                        # ends the process's use of a GPU.
                        self._restore(before)
                        function()
            finally:
                self._restore(before)
            return self.backend.capture(function)
        except Exception as error:
            if _caused_by(error, self.backend.out_of_memory()):
                message = f"no memory is left to capture {name!r}: {self.needs()}; use fewer images a call"
                raise MemoryError(message) from error
            raise RuntimeError(
                f"{name!r} cannot be captured as a graph ({type(error).__name__}: {error}); "
                f"engine_options={{'graphs': False}} runs the same work without"
            ) from error

    def _restore(self, before: list[torch.Tensor]) -> None:
        for buffer, value in zip(self.state, before, strict=True):
            buffer.copy_(value)


def _caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Whether an error is of a kind, or followed one of that kind: the end of a failed capture raises, too."""
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__ or error.__context__
    return False
