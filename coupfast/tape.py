"""Steps of a purification that outlive it, for somebody who may be stopped in the middle of one.

A purification that runs inside of `kept_on` finds on the tape how far it came when it was stopped, forwards or backwards, and
goes on from there with the same bits: a step is a function of the state that it starts from. Nothing is written where a
purification takes less than `EVERY` seconds. Steps of tables and step functions are kept (`coupfast.integrate`,
`coupfast.step_functions`), not those of torchsde's adjoint: it solves one equation over all steps of a call, and what it was at
in the middle of one is torchsde's. `keeps_no_steps` says so where it matters.
"""

from __future__ import annotations

import abc
import contextlib
import contextvars
import logging
import time
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch

logger = logging.getLogger(__name__)

EVERY = 60.0  # seconds from one write to the next

Kept = Sequence[torch.Tensor | None]


class Tape(abc.ABC):
    """Where steps are kept; a subclass says how."""

    def __init__(self) -> None:
        self._tracks, self._within = 0, ""
        self._written = time.monotonic()

    @abc.abstractmethod
    def read(self, key: tuple[Hashable, ...]) -> Kept | None:
        """What was written under a key, as it was; None if nothing was."""

    @abc.abstractmethod
    def write(self, key: tuple[Hashable, ...], kept: Kept) -> None:
        """Keep tensors under a key."""

    @abc.abstractmethod
    def name(self, x: torch.Tensor) -> str:
        """A tensor's own."""

    def track(self, x_0: torch.Tensor) -> Track:
        """The steps of the next purification, which starts at `x_0`."""
        self._tracks += 1
        return Track(self, f"{self._within}{self._tracks}-{self.name(x_0)}")

    def once(self, name: str, make: Callable[[], Kept]) -> Kept:
        """What `make` makes, the first time; after that what it made. Purifications in it have tracks of their own."""
        if (kept := self.read(("once", name))) is not None:
            return kept
        self._tracks, self._within = 0, f"{name}-"
        made = make()
        self._tracks, self._within = 0, ""
        self.write(("once", name), made)
        return made

    def due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() - self._written >= EVERY

    def wrote(self) -> None:
        self._written = time.monotonic()


class Track:
    """One purification's steps on a tape, piece by piece of its batch. What a step leaves is the caller's to say."""

    def __init__(self, tape: Tape, name: str) -> None:
        self._tape, self._name = tape, name
        self._waiting: list[tuple[tuple[Hashable, ...], Kept]] = []

    def name(self, x: torch.Tensor) -> str:
        return self._tape.name(x)

    def taken(self, piece: slice, steps: int, *, every: bool) -> list[Kept | None]:
        """What was left of the steps that were taken: of all of them if `every`, else of the last one only."""
        left: list[Kept | None] = []
        if not every:
            for k in reversed(range(steps)):
                if (kept := self._tape.read(self._key(piece, k))) is not None:
                    return [*[None] * k, kept]
            return left
        for k in range(steps):
            if (kept := self._tape.read(self._key(piece, k))) is None:
                break
            left.append(kept)
        return left

    def took(self, piece: slice, k: int, kept: Kept, *, every: bool) -> None:
        """A step is taken."""
        if not every:
            self._waiting.clear()
        self._waiting.append((self._key(piece, k), kept))
        if self._tape.due():
            self._write()

    def gone(self, grad: str, piece: slice, steps: int) -> tuple[int, Kept] | None:
        """The last step that was taken back, and what was left by it."""
        for k in range(steps):
            if (kept := self._tape.read(self._key(piece, k, grad))) is not None:
                return k, kept
        return None

    def went(self, grad: str, piece: slice, k: int, kept: Kept) -> None:
        """A step is taken back."""
        if self._tape.due():
            self._waiting.append((self._key(piece, k, grad), kept))
            self._write()

    def _key(self, piece: slice, k: int, grad: str = "") -> tuple[Hashable, ...]:
        # With both ends: where less memory is free, pieces are smaller, and number 1 has other images.
        return (self._name, grad, piece.start, piece.stop, k)

    def _write(self) -> None:
        for key, kept in self._waiting:
            self._tape.write(key, kept)
        self._waiting.clear()
        self._tape.wrote()


_TAPE: contextvars.ContextVar[Tape | None] = contextvars.ContextVar("coupfast tape", default=None)


@contextlib.contextmanager
def kept_on(tape: Tape | None) -> Iterator[None]:
    """Purifications in here, and their backward passes wherever those run, keep their steps on a tape."""
    token = _TAPE.set(tape)
    try:
        yield
    finally:
        _TAPE.reset(token)


def current() -> Tape | None:
    """The tape of `kept_on`."""
    return _TAPE.get()


@contextlib.contextmanager
def keeps_no_steps(what: str) -> Iterator[None]:
    """Say once, for somebody who has a tape, what a stop costs where a call in here takes long: none of its steps are kept."""
    started = time.monotonic()
    yield
    seconds = time.monotonic() - started
    if current() is not None and seconds >= EVERY / 4 and what not in _SAID:  # the way back takes several times that
        _SAID.add(what)
        logger.warning(
            "%s took %.0f s forwards, and none of its steps are kept: what stops it loses the call that is under way, there "
            "and back; fewer images at a time (`shard`) make calls shorter",
            what,
            seconds,
        )


_SAID: set[str] = set()
