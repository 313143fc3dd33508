"""Steps of a purification that outlive it, for somebody who may be stopped in the middle of one.

A purification that runs inside of `kept_on` finds on the tape how far it came when it was stopped, forwards or backwards, and
goes on from there with the same bits: a step is a function of the state that it starts from. Nothing is written where a
purification takes less than `EVERY` seconds. Only the steps of `coupfast.integrate` are kept: not those of torchsde's adjoint,
nor of a method that brings its own.
"""

from __future__ import annotations

import abc
import contextlib
import contextvars
import time
from collections.abc import Hashable, Iterator, Sequence

import torch

from coupfast.engine import Cotangent, State

EVERY = 60.0  # seconds from one write to the next

Kept = Sequence[torch.Tensor | None]


class Tape(abc.ABC):
    """Where steps are kept; a subclass says how."""

    def __init__(self) -> None:
        self._tracks = 0
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
        return Track(self, f"{self._tracks}-{self.name(x_0)}")

    def due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() - self._written >= EVERY

    def wrote(self) -> None:
        self._written = time.monotonic()


class Track:
    """One purification's steps on a tape, piece by piece of its batch."""

    def __init__(self, tape: Tape, name: str) -> None:
        self._tape, self._name = tape, name
        self._waiting: list[tuple[tuple[Hashable, ...], Kept]] = []

    def name(self, x: torch.Tensor) -> str:
        return self._tape.name(x)

    def taken(self, piece: int, steps: int, *, every: bool) -> list[State | None]:
        """States after the steps that were taken: all of them if `every`, else of the last one only."""
        states: list[State | None] = []
        if not every:
            for k in reversed(range(steps)):
                if (kept := self._tape.read((self._name, piece, k))) is not None:
                    return [*states, *[None] * k, State(*kept)]  # type: ignore[arg-type]
            return states
        for k in range(steps):
            if (kept := self._tape.read((self._name, piece, k))) is None:
                break
            states.append(State(*kept))  # type: ignore[arg-type]
        return states

    def took(self, piece: int, k: int, state: State, *, every: bool) -> None:
        """A step is taken."""
        if not every:
            self._waiting.clear()
        self._waiting.append(((self._name, piece, k), state._replace(x_in=None)))  # x_in is there anyhow
        if self._tape.due():
            self._write()

    def gone(self, grad: str, piece: int, steps: int) -> tuple[int, Cotangent] | None:
        """The last step that was taken back, and the cotangent before it."""
        for k in range(steps):
            if (kept := self._tape.read((self._name, grad, piece, k))) is not None:
                return k, Cotangent(*kept)  # type: ignore[arg-type]
        return None

    def went(self, grad: str, piece: int, k: int, v: Cotangent) -> None:
        """A step is taken back."""
        if self._tape.due():
            self._waiting.append(((self._name, grad, piece, k), v))
            self._write()

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
