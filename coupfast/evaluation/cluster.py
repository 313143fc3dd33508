"""Workers on a Ray cluster, or on a Ray that starts on this machine. The same units, the same bits."""

from __future__ import annotations

import collections
import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

from coupfast.evaluation.ledger import Outcome
from coupfast.evaluation.pools import ATTEMPTS, UnitFailed
from coupfast.evaluation.worker import Task, Worker

logger = logging.getLogger(__name__)

_EVERY = 5.0  # seconds from one question to a busy worker to the next
_WATCH = "watch"  # the group of threads that answers


class RayWorkers:
    """Ray actors. One that dies, whose node does or whose answer is lost is replaced elsewhere, and its task done again.

    Images travel through Ray, so the nodes need no common file system; the ledger stays where the run was started. They need
    the same coupfast and the same weight files. A unit that is stopped goes on inside of itself where its worker can write into
    the run's folder.

    Args:
        make: Makes a worker on a device; goes to the cluster pickled.
        size: How many.
        gpus: One GPU each.
        threads: CPUs that each takes.

    Raises:
        ImportError: if Ray is not installed.
        ValueError: if the cluster is too small.
    """

    def __init__(self, make: Callable[[str], Worker], size: int, *, gpus: bool, threads: int) -> None:
        try:
            import ray
        except ModuleNotFoundError as error:
            raise ImportError(f'Ray is not installed ({error}); install it with: pip install "coupfast[cluster]"') from error
        self._ray, self.size = ray, size
        self._idle: list[tuple[int, Any]] = []
        self._busy: dict[Any, tuple[int, Any, Task]] = {}
        self._deaths: collections.Counter[str] = collections.Counter()
        self._started_ray = not ray.is_initialized()
        if self._started_ray:
            # Connects to RAY_ADDRESS or a cluster on this machine; starts one here if there is neither.
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        needed = {"CPU": size * threads} | ({"GPU": size} if gpus else {})
        there = ray.cluster_resources()
        short = {kind: count for kind, count in needed.items() if there.get(kind, 0) < count}
        if short:
            self.close()
            raise ValueError(
                f"{size} workers need {', '.join(f'{count} {kind}s' for kind, count in short.items())}, and the Ray cluster "
                f"has {', '.join(f'{there.get(kind, 0):g}' for kind in short)}; use fewer --workers or --threads"
            )
        # A thread of its own for questions, since the other one is at work.
        options: dict[str, Any] = {"num_cpus": threads, "num_gpus": 1 if gpus else 0, "concurrency_groups": {_WATCH: 1}}
        remote: Any = ray.remote(**options)(_Actor)
        # Ray shows each actor its own GPU as the first one.
        self._new = lambda: remote.remote(make, "cuda:0" if gpus else "cpu")
        self._idle += [(number, self._new()) for number in range(size)]

    def submit(self, task: Task) -> None:
        number, actor = self._idle[-1]
        with self._connected(task.unit.name):
            self._busy[actor.execute.remote(task)] = (number, actor, task)
        self._idle.pop()

    def next(self, passed: Callable[[str, int], object]) -> tuple[Outcome, str]:
        while True:
            with self._connected(next(task.unit.name for _, _, task in self._busy.values())):
                done, _ = self._ray.wait(list(self._busy), num_returns=1, timeout=_EVERY)
                told = [] if done else self._ask()
            for unit, images in told:
                passed(unit, images)
            if not done:
                continue
            (ready,) = done
            number, actor, task = self._busy.pop(ready)
            name = task.unit.name
            try:
                answer = self._ray.get(ready)
            except self._ray.exceptions.RayError as error:
                # Not only RayActorError: want of memory, a lost node and a lost answer are errors of their own. What the task
                # itself raises comes as an answer.
                self._kill(actor)  # if it is alive, its successor needs its place
                self._deaths[name] += 1
                if self._deaths[name] == ATTEMPTS:
                    raise UnitFailed(name, f"the worker of unit {name} died {ATTEMPTS} times: {error}") from error
                logger.warning("worker %d died (%s); doing unit %s again", number, type(error).__name__, name)
                with self._connected(name):
                    self._idle.append((number, self._new()))
                self.submit(task)
                continue
            self._idle.append((number, actor))
            if isinstance(answer, Outcome):
                return answer, str(number)
            raise UnitFailed(name, f"unit {name} failed: {answer}")

    @contextlib.contextmanager
    def _connected(self, name: str) -> Iterator[None]:
        """Whatever goes wrong when Ray is asked for something, the unit `name` cannot be done."""
        try:
            yield
        except Exception as error:  # Ray says in many ways that it is gone: RayError, ConnectionError, RuntimeError, ...
            raise UnitFailed(
                name, f"unit {name} failed: Ray does not do what it is asked ({type(error).__name__}: {error}); has it stopped?"
            ) from error

    def _ask(self) -> list[tuple[str, int]]:
        """Images that are through since the last question, by unit; a worker that does not answer at once is not waited for."""
        questions = {
            actor.passed.options(concurrency_group=_WATCH).remote(): task.unit.name for _, actor, task in self._busy.values()
        }
        answered, _ = self._ray.wait(list(questions), num_returns=len(questions), timeout=_EVERY)
        told = []
        for question in answered:
            with contextlib.suppress(self._ray.exceptions.RayError):  # it died; `next` finds out
                images, warnings = self._ray.get(question)
                for warning in warnings:
                    logger.warning("%s", warning)
                if images:
                    told.append((questions[question], images))
        return told

    def close(self) -> None:
        if self._started_ray:
            self._ray.shutdown()
        else:
            for _, actor in [*self._idle, *((number, actor) for number, actor, _ in self._busy.values())]:
                self._kill(actor)

    def _kill(self, actor: Any) -> None:
        with contextlib.suppress(Exception):  # it is dead already, or Ray is gone
            self._ray.kill(actor)


class _Actor:
    """A worker where Ray puts it, built at its first unit."""

    def __init__(self, make: Callable[[str], Worker], device: str) -> None:
        self._make, self._device = make, device
        self._worker: Worker | None = None
        self._images = 0
        self._warnings = _Warnings()
        logging.getLogger("coupfast").addHandler(self._warnings)

    def passed(self) -> tuple[int, list[str]]:
        """Images through the defense, and what it was warned of, since the last question."""
        images, self._images = self._images, 0
        return images, self._warnings.taken()

    def execute(self, task: Task) -> Outcome | str:
        try:
            self._worker = self._worker or self._make(self._device)
            self._images = 0
            return self._worker.execute(task, self._count)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def _count(self, images: int) -> None:
        self._images += images


class _Warnings(logging.Handler):
    """Keeps what nobody would read in a worker's own log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: collections.deque[str] = collections.deque()

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())

    def taken(self) -> list[str]:
        return [self._lines.popleft() for _ in range(len(self._lines))]
