"""Ctrl-C, and the SIGTERM of a cluster that takes a machine back: nothing that is done is lost, and it is said how to go on."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Terminated(SystemExit):
    """SIGTERM; the exit status is 143, as shells have it."""


@contextlib.contextmanager
def said_how_to_go_on(command: Callable[[], str | None]) -> Iterator[None]:
    """If this is stopped, the last line is the command that goes on; None where there is nothing to go on with."""

    def terminate(*_: Any) -> None:
        raise Terminated(128 + signal.SIGTERM)

    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():  # no other one may
            stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, terminate))
        try:
            yield
        except (KeyboardInterrupt, Terminated):
            if (words := command()) is not None:
                print(f"\nto go on: {words}", file=sys.stderr, flush=True)
            raise
