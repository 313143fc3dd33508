"""How much Triton compiles while something runs: what a first look at a GPU spends its time on."""

from __future__ import annotations

from types import TracebackType
from typing import Any


class Compilations:
    """Counts kernels that Triton compiles in this process while it is open; those that it finds on the disk are none.

    What PyTorch's compiler has its own processes compile is not seen.

    Attributes:
        count: Kernels.
        seconds: What they took.
    """

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0
        self._knobs: Any = None
        self._before: Any = None

    def __enter__(self) -> Compilations:
        try:
            from triton import knobs
        except ImportError:  # Triton exists for Linux only
            return self
        self._knobs, self._before = knobs.compilation, knobs.compilation.listener
        knobs.compilation.listener = self._listen
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._knobs is not None:
            self._knobs.listener = self._before

    def _listen(self, *, times: Any, cache_hit: bool, **more: Any) -> None:
        if not cache_hit:
            self.count += 1
            self.seconds += times.total / 1e6  # microseconds
        if self._before is not None:
            self._before(times=times, cache_hit=cache_hit, **more)
