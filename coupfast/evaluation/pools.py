"""Where workers are. A pool takes tasks and gives outcomes back in whatever order they come."""

from __future__ import annotations

import collections
import functools
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import traceback
from collections.abc import Callable
from typing import Any, Protocol

from tqdm import tqdm

from coupfast.evaluation.ledger import Outcome
from coupfast.evaluation.worker import Task, Worker

logger = logging.getLogger(__name__)

ATTEMPTS = 3  # of a unit whose worker dies, before it is the unit's fault


class UnitFailed(RuntimeError):
    """A unit that cannot be done.

    Attributes:
        name: The unit's.
    """

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


class Pool(Protocol):
    """Workers.

    Attributes:
        size: Tasks that can be in flight.
    """

    size: int

    def submit(self, task: Task) -> None:
        """Take a task; called while fewer than `size` are in flight."""

    def next(self, passed: Callable[[str, int], object]) -> tuple[Outcome, str]:
        """The next outcome and the worker's name; waits for it.

        Args:
            passed: Told meanwhile, now and then, that in a unit of that name so many more images are through the defense. A
                unit that is done again counts again.

        Raises:
            UnitFailed: if a task raised, or its workers died `ATTEMPTS` times.
        """

    def close(self) -> None:
        """Stop all workers."""


class InProcess:
    """One worker, this process."""

    size = 1

    def __init__(self, make: Callable[[str], Worker], device: str) -> None:
        self._worker = make(device)
        self._tasks: collections.deque[Task] = collections.deque()

    def submit(self, task: Task) -> None:
        self._tasks.append(task)

    def next(self, passed: Callable[[str, int], object]) -> tuple[Outcome, str]:
        task = self._tasks.popleft()
        try:
            return self._worker.execute(task, functools.partial(passed, task.unit.name)), "0"
        except Exception as error:
            raise UnitFailed(task.unit.name, f"unit {task.unit.name} failed: {_line(error)}") from error

    def close(self) -> None:
        pass


class Processes:
    """Several processes on this machine. One that dies is replaced, and its task done again.

    Args:
        make: Makes a worker on a device; goes to the processes pickled.
        devices: One for each worker.
    """

    def __init__(self, make: Callable[[str], Worker], devices: list[str]) -> None:
        self.size = len(devices)
        self._make, self._context = make, multiprocessing.get_context("spawn")
        self._members = [_Member(number, device) for number, device in enumerate(devices)]
        self._deaths: collections.Counter[str] = collections.Counter()

    def submit(self, task: Task) -> None:
        member = next(member for member in self._members if member.task is None)
        if member.process is None:
            # All at once: a new process takes its first task only when it has loaded, and until then a sender may have to wait.
            for idle in (other for other in self._members if other.process is None):
                self._start(idle)
        member.task = task
        try:
            member.pipe.send(task)
        except OSError:
            pass  # It died in between: `next` sees that and replaces it.

    def next(self, passed: Callable[[str, int], object]) -> tuple[Outcome, str]:
        while True:
            waiting = {member.pipe: member for member in self._members if member.task is not None}
            for pipe in multiprocessing.connection.wait(list(waiting)):
                member = waiting[pipe]  # type: ignore[index]
                task = member.task
                assert task is not None
                try:
                    answer = member.pipe.recv()
                except (EOFError, OSError):
                    self._replace(member, task)
                    continue
                if answer is None:
                    member.began = True
                    continue
                if isinstance(answer, int):
                    passed(task.unit.name, answer)
                    continue
                member.task = None
                if isinstance(answer, Outcome):
                    return answer, str(member.number)
                raise UnitFailed(task.unit.name, f"unit {task.unit.name} failed: {answer}")

    def _replace(self, member: _Member, task: Task) -> None:
        assert member.process is not None
        member.process.join()
        code = member.process.exitcode
        if not member.began and code is not None and code > 0:
            # Not killed: its own Python gave up before it could take a task.
            raise UnitFailed(
                task.unit.name,
                f"the worker of unit {task.unit.name} did not begin (exit code {code}; what it said stands above): a script "
                f'that starts workers runs again in each of them, and needs `if __name__ == "__main__":` around that; what was '
                f"defined in a notebook or on a prompt is not found there: put it into a file (file.py:build), or use one "
                f"worker",
            )
        self._deaths[task.unit.name] += 1
        if self._deaths[task.unit.name] == ATTEMPTS:
            member.task, member.process = None, None
            raise UnitFailed(
                task.unit.name,
                f"the worker of unit {task.unit.name} died {ATTEMPTS} times (last exit code {code}; -9 is often the system "
                f"being short of memory): fewer --workers or a smaller --shard need less",
            )
        logger.warning("worker %d died (exit code %s); doing unit %s again", member.number, code, task.unit.name)
        member.pipe.close()
        self._start(member)
        try:
            member.pipe.send(task)
        except OSError:
            pass

    def _start(self, member: _Member) -> None:
        member.pipe, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(theirs, self._make, member.device), name=f"worker-{member.number}", daemon=True
        )
        process.start()
        theirs.close()
        member.process, member.began = process, False

    def close(self) -> None:
        running = [member for member in self._members if member.process is not None]
        for member in running:
            member.pipe.close()  # An idle worker ends when its pipe does.
            if member.task is not None:
                member.process.kill()  # Nothing is lost: what its unit's journal has is with the system.
        for member in running:
            member.process.join(timeout=10)
            member.process.kill()
            member.process.join()
            member.process = None


class _Member:
    def __init__(self, number: int, device: str) -> None:
        self.number, self.device = number, device
        self.process: Any = None
        self.pipe: Any = None
        self.task: Task | None = None
        self.began = False  # it has loaded, and takes tasks


def _serve(pipe: Any, make: Callable[[str], Worker], device: str) -> None:
    """A worker's process: tasks in; None once, numbers of images that are through, and outcomes or errors, out, until nobody is
    there."""
    # Ctrl-C goes to all processes of a terminal, and SIGTERM to all of a cluster's job; the parent deals with them.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system's, left behind by a process that is killed
    threading.Thread(target=_die_with_parent, daemon=True).start()
    worker = None
    try:
        pipe.send(None)
    except OSError:
        return
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        answer: Outcome | str
        try:
            worker = worker or make(device)
            answer = worker.execute(task, pipe.send)
        except Exception as error:
            logger.debug("%s", traceback.format_exc())
            answer = _line(error)
        try:
            pipe.send(answer)
        except OSError:
            return


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _die_with_parent() -> None:
    # A unit may take hours: without this an orphan would finish it for nobody.
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
