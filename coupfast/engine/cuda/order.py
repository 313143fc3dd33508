"""Memory that several streams of a GPU work on, one after the other.

A lock of the host orders calls, not what they have given a device to do: another stream may read what the first has not yet
written. So each call leaves an event behind its work, and the next one's stream waits for it; what that one leaves comes after
all that was before.
"""

from __future__ import annotations

import contextlib

import torch


def has_streams(device: torch.device) -> bool:
    return device.type == "cuda"


class Order:
    """A context of what is done with the memory, by one thread at a time: its stream waits for what was done before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._last: torch.cuda.Event | None = None

    def __enter__(self) -> None:
        if self._last is not None:
            torch.cuda.current_stream(self.device).wait_event(self._last)

    def __exit__(self, *_: object) -> None:
        self.record()

    def record(self) -> None:
        """What this thread has given its stream so far is done before what comes next."""
        if has_streams(self.device):
            self._last = torch.cuda.Event()
            self._last.record(torch.cuda.current_stream(self.device))

    def finish(self) -> None:
        """Wait, on the host, for what was done last."""
        if self._last is not None:
            with contextlib.suppress(RuntimeError):  # a device that has failed, or is gone with the interpreter
                self._last.synchronize()
