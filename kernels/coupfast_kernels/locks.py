"""Locks between processes, as files."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on every system
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(path: Path, *, work: str, patience: float) -> Iterator[bool]:
    """Hold a lock file; gives whether it is held. The system gives it back when its holder ends, in any way; the file stays.

    Args:
        work: What a process does that holds it, to say what is waited for.
        patience: Seconds to wait at most.

    Raises:
        TimeoutError: (an OSError) if another process holds it for longer than `patience`.

    Where there are no locks, nothing is held.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)  # not inherited by programs that are run meanwhile
    held = False
    try:
        started = time.monotonic()
        waiting = False
        while fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
                break
            except BlockingIOError:
                if not waiting:
                    logger.info("waiting for another process that %s", work)
                    waiting = True
                if time.monotonic() - started > patience:
                    raise TimeoutError(f"another process has held {path} for {patience:.0f} s") from None
                time.sleep(0.02)
            except OSError as error:
                logger.debug("no locks beside %s: %s", path, error)
                break
        yield held
    finally:
        os.close(descriptor)
