"""Work on fixed addresses, captured once and replayed: one launch from the host for all of a step's kernels.

A recording reads and writes the same memory at every replay. What varies (state, step, seed, ids) is written into static
buffers before, and what a replay leaves is read from static buffers after it.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

import torch

from coupfast.agreement import relative_difference

logger = logging.getLogger(__name__)

#: What a replay may differ by from the calls before it where those already differ from each other.
ROUNDING = 1e-4

Result = TypeVar("Result")


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

    def both(self, function: Callable[[], Result], beside: Callable[[], object]) -> Result:
        """What `function` returns, `beside` being done at the same time if the device has room for it.

        What ran before is done when either begins, and both are done when anything runs after. `beside` leaves what it finds in
        buffers that are there all the time: memory that it allocates may be handed out again when it has come to its end.
        """
        ...

    def out_of_memory(self) -> type[BaseException]:
        """The error that the device raises."""
        ...


# One capture at a time in a process: PyTorch's random state and the garbage collector belong to all threads.
_CAPTURE = threading.Lock()


class CudaBackend:
    """CUDA graphs with a memory pool and streams of their own: graphs captured on one stream share its workspaces."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream, self.second = torch.cuda.Stream(device), torch.cuda.Stream(device)
        # Newer versions of PyTorch leave pointers to a graph whose capture failed: it must outlive them.
        self._failed: list[torch.cuda.CUDAGraph] = []

    def capture(self, function: Callable[[], None]) -> Recording:
        graph = torch.cuda.CUDAGraph()
        with _CAPTURE, torch.cuda.device(self.device), _without_garbage_collection(), _own_workspaces():
            try:
                # The outer stream again at the end, also where the capture's own end raises.
                with torch.cuda.stream(torch.cuda.current_stream()):
                    # Other threads of the process may use the device meanwhile.
                    with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                        function()
            except BaseException:
                self._failed.append(graph)
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

    def both(self, function: Callable[[], Result], beside: Callable[[], object]) -> Result:
        # A stream that waits for one which is being captured belongs to the capture until that one waits for it. The allocator
        # hands out what a stream let go to the same stream again, so neither gets memory that the other one works on.
        outer = torch.cuda.current_stream(self.device)
        self.second.wait_stream(outer)
        try:
            with torch.cuda.stream(self.second):
                beside()
            return function()
        finally:
            outer.wait_stream(self.second)

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


@contextlib.contextmanager
def _own_workspaces() -> Iterator[None]:
    """cuBLAS allocates its workspaces inside of the capture, from the graph's own memory, and nobody else gets them.

    Those of before lie outside of the graph, which would go on writing there after another part of the process (a compiled
    model with CUDA graphs) had them freed.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def seconds_in_graph(
    function: Callable[[], object], backend: Backend, clock: Callable[[Callable[[], object]], float], *, calls: int = 20
) -> float:
    """Seconds of one call among so many in a recording: the device's, where a call alone would be timed by its launch.

    What a call reads may lie in a cache, where the one before it left it.

    Args:
        clock: Seconds that a call takes on the device, `rates.device_seconds` for one.
    """

    def many() -> None:
        for _ in range(calls):
            function()

    with backend.side_stream():
        function()
    recording = backend.capture(many)
    recording.replay()
    return clock(recording.replay) / calls


class Runner:
    """Named pieces of work on static buffers, each captured when it first runs (or never, without a backend).

    A recording is compared with the calls before it, bit for bit, before it serves anybody.

    Args:
        state: The buffers that the work writes and that carry meaning from call to call: a warm-up leaves them as they were.
        backend: None runs every piece call by call.
        needs: What the work is predicted to need, said when memory runs out.
        results: Further buffers that the work may write, which a call of it need not find as they were; asked after warm-ups.
    """

    def __init__(
        self,
        state: Iterable[torch.Tensor],
        backend: Backend | None,
        needs: Callable[[], str],
        results: Callable[[], Iterable[torch.Tensor]] = tuple,
    ) -> None:
        self.state, self.backend, self.needs, self.results = list(state), backend, needs, results
        self._recordings: dict[str, Recording] = {}
        self._lock = threading.RLock()

    def run(self, name: str, function: Callable[[], None]) -> None:
        """Do `function`, which reads and writes nothing but static buffers and constants, and decides nothing on the host.

        Raises:
            RuntimeError: if it cannot be captured, or a replay does something else than a call; the buffers then hold what they
                held, and nothing is kept of the attempt.
        """
        with self._lock:
            if self.backend is None:
                return function()
            if name not in self._recordings:
                self._recordings[name] = self._record(name, function)
            self._recordings[name].replay()

    def has(self, name: str) -> bool:
        """Whether there is a recording of this name."""
        return name in self._recordings

    def _record(self, name: str, function: Callable[[], None]) -> Recording:
        assert self.backend is not None
        before = [buffer.clone() for buffer in self.state]
        try:
            try:
                with self.backend.side_stream():
                    # Each begins where the first did: a second step after a table's last would read beyond it, which ends the
                    # process's use of a GPU. Tuning and libraries' own set-up happen in the first.
                    function()
                    ends = [self._from(before, function) for _ in range(2)]
                    # What a call leaves for another image: a replay that does not write a result would not go unseen.
                    self._from([-value if value.is_floating_point() else value for value in before], function)
            finally:
                self._restore(before)
            recording = self.backend.capture(function)
            try:
                replayed = self._from(before, recording.replay)
            finally:
                self._restore(before)
        except Exception as error:
            if _caused_by(error, self.backend.out_of_memory()):
                message = f"no memory is left to capture {name!r}: {self.needs()}; use fewer images a call"
                raise MemoryError(message) from error
            raise RuntimeError(
                f"{name!r} cannot be captured as a graph ({type(error).__name__}: {error}); "
                f"engine_options={{'graphs': False}} runs the same work without"
            ) from error
        _compare(name, replayed, *ends)
        return recording

    def _from(self, state: list[torch.Tensor], function: Callable[[], None]) -> list[torch.Tensor]:
        """What a call leaves that begins at a state."""
        self._restore(state)
        function()
        return [buffer.clone() for buffer in (*self.state, *self.results())]

    def _restore(self, before: list[torch.Tensor]) -> None:
        for buffer, value in zip(self.state, before, strict=True):
            buffer.copy_(value)


def _compare(name: str, replayed: list[torch.Tensor], *called: list[torch.Tensor]) -> None:
    """RuntimeError if a replay leaves other bits than a call; where calls differ from each other, more than rounding does."""
    first, second = called
    repeats = all(map(same_bits, first, second))
    if not repeats:
        logger.warning("%r gives other bits every time on this device: what a run returns cannot be repeated to the bit", name)
    for found, wanted in zip(replayed, second, strict=True):
        difference = 0.0 if same_bits(found, wanted) else relative_difference(found.double(), wanted.double())
        if not difference <= (0.0 if repeats or not wanted.is_floating_point() else ROUNDING):
            raise RuntimeError(
                f"replaying {name!r} gives something else than the call that was captured (relative difference "
                f"{difference:.3g} in {wanted.dtype} {tuple(wanted.shape)}): engine_options={{'graphs': False}} runs the same "
                f"work without graphs. Please report it with the output of `coupfast doctor`"
            )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one dtype and shape have them; NaN equals NaN."""
    kinds = {4: torch.int32, 8: torch.int64}
    if a.is_floating_point():
        a, b = a.view(kinds[a.element_size()]), b.view(kinds[b.element_size()])
    return torch.equal(a, b)


def _caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Whether an error is of a kind, or followed one of that kind: the end of a failed capture raises, too."""
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__ or error.__context__
    return False
