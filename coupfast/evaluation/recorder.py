"""Between an attack and the defense: what was answered once is not computed again.

An attack is a function of its seed and of what the defense answers. So a unit that was stopped is done again from its
beginning, whosever code the attack is, and gets the answers that were recorded, logits and gradients, until there are no more;
from there on the networks answer. What comes out is the same to the bit.

Cost: a call's logits and 12 KiB of gradient per CIFAR-10 image are written, once, and removed with the unit; questions are
hashed. Of a call that is not done yet, `Steps` keeps those of a purification.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from coupfast.evaluation.configuration import difference
from coupfast.evaluation.journal import Journal, JournalError, digest
from coupfast.evaluation.metered import Draw, Ids, Metered
from coupfast.evaluation.views import View
from coupfast.tape import Kept, Tape, kept_on

logger = logging.getLogger(__name__)

_PROBE_SEED = 20240805  # of the one look by which a defense is known again


@dataclasses.dataclass(frozen=True)
class _State:
    """What a call may move: counters of draws, and torch's generators."""

    noise: list[tuple[int, int]]
    cpu: torch.Tensor
    device: torch.Tensor | None


class Recorder:
    """Answers for a defense, from a unit's journal as far as that goes.

    Args:
        defense: Answers, and has its state moved.
        journal: The unit's, open.
        device: The defense's.
        probe: An image, by the answer to which the defense is known again; None does without.

    Attributes:
        replayed: Calls that the journal has answered.

    Raises:
        JournalError: if the defense is not the one that the journal has answers of.
    """

    def __init__(self, defense: Metered, journal: Journal, device: torch.device, probe: torch.Tensor | None) -> None:
        self.journal: Journal | None = journal
        self.replayed = 0
        self._defense, self._device = defense, device
        self._calls = 0
        self._steps: _CallSteps | None = None  # of the last call that the networks answered
        self._backwards: collections.Counter[int] = collections.Counter()
        if probe is not None:
            self._recognise(journal, probe)

    def __call__(self, x: torch.Tensor, ids: Ids, draw: Draw, view: View | None = None) -> torch.Tensor:
        """The answer to the next call, as `Metered.ask` has it.

        Raises:
            JournalError: if the call is not the one that was recorded.
        """
        if self.journal is not None and torch._C._functorch.is_functorch_wrapped_tensor(x):
            self._give_up("the attack differentiates by torch.func")
        if self.journal is None:
            return self._defense.ask(x, ids, draw, view)
        number, self._calls = self._calls, self._calls + 1
        following = torch.is_grad_enabled() and x.requires_grad
        question = {
            "x": digest(x),
            "ids": _named(ids),
            "draw": _named(draw),
            "following": following,
            "noise": [list(noise) for noise in self._defense.noise()],
            **({} if view is None else {"view": view.to_dict()}),
        }
        entry = self.journal.get(("answer", number))
        if entry is None:
            return self._record(self.journal, number, question, x, ids, draw, view)
        if changed := difference(entry.said["question"], question):
            raise self._diverged(self.journal, f"call {number} of the attack is another one: {changed}")
        self.replayed += 1
        before = self._state()
        logits, *generators = self.journal.tensors(entry, self._device)
        noise = [(seed, next_draw) for seed, next_draw in entry.said["noise"]]
        self._set_state(_State(noise, *self._moved(before, generators)))
        if not following or not entry.said["follows"]:
            return logits
        return _Recorded.apply(x, _Call(self, number, x.detach().clone(), ids, draw, view, before, logits.clone()), logits)

    def close(self) -> None:
        if self._steps is not None:
            self._steps.close()
        if self.journal is not None:
            self.journal.close()

    def gradient(self, call: _Call, cotangent: torch.Tensor) -> torch.Tensor:
        """∂/∂x of a recorded call's logits times `cotangent`: recorded as well, or made now, from the same state."""
        number, journal = call.number, self.journal
        nth = self._backwards[number]
        self._backwards[number] += 1
        entry = None if journal is None else journal.get(("gradient", number, nth))
        if journal is not None and entry is not None:
            if entry.said["cotangent"] != digest(cotangent):
                raise self._diverged(journal, f"the attack asks for another gradient of its call {number}")
            gradient, *generators = journal.tensors(entry, self._device)
            if generators:
                self._set_state(_State(self._defense.noise(), *self._moved(self._state(), generators)))
            return gradient
        now = self._state()
        self._set_state(call.before)
        try:
            with torch.enable_grad(), self._kept(call.number):
                leaf = call.x.clone().requires_grad_()
                logits = self._defense.ask(leaf, call.ids, call.draw, call.view)
            if journal is not None and not torch.equal(logits.detach(), call.logits):
                raise self._diverged(journal, f"the defense answers call {number} otherwise than it did")
        finally:
            self._set_state(now)
        # From the generators as they are now, as in a unit that was not stopped: a backward pass may draw numbers, too.
        (gradient,) = torch.autograd.grad(logits, leaf, cotangent)
        if journal is not None:
            said = {"cotangent": digest(cotangent)}
            journal.append(("gradient", number, nth), said, [gradient, *self._generators(now)])
        return gradient

    def made(self, name: str, make: Callable[[], Sequence[torch.Tensor]]) -> list[torch.Tensor]:
        """What `make` makes of the unit's own images beside the attack's calls: recorded as answers are."""
        if self.journal is None:
            return list(make())
        entry = self.journal.get(("made", name))
        if entry is not None:
            tensors = self.journal.tensors(entry, self._device)
            generators = tensors[entry.said["count"] :]
            self._set_state(_State(self._defense.noise(), *self._moved(self._state(), generators)))
            return tensors[: entry.said["count"]]
        before = self._state()
        with self._kept(name):
            tensors = list(make())
        self.journal.append(("made", name), {"count": len(tensors)}, [*tensors, *self._generators(before)])
        return tensors

    def _record(
        self,
        journal: Journal,
        number: int,
        question: dict[str, Any],
        x: torch.Tensor,
        ids: Ids,
        draw: Draw,
        view: View | None,
    ) -> torch.Tensor:
        before = self._state()
        with self._kept(number):
            logits = self._defense.ask(x, ids, draw, view)
        said = {"question": question, "follows": logits.requires_grad, "noise": self._defense.noise()}
        journal.append(("answer", number), said, [logits, *self._generators(before)])
        if question["following"] and logits.requires_grad:
            pending: list[tuple[str, _State]] = []

            def came(cotangent: torch.Tensor) -> None:
                if torch.is_grad_enabled():
                    self._give_up("the attack differentiates gradients")
                else:
                    pending.append((digest(cotangent), self._state()))

            def went(gradient: torch.Tensor) -> None:
                if self.journal is None:
                    return
                if not pending:
                    self._give_up("the attack writes into the logits")
                    return
                cotangent, before = pending.pop()
                nth = self._backwards[number]
                self._backwards[number] += 1
                said = {"cotangent": cotangent}
                journal.append(("gradient", number, nth), said, [gradient, *self._generators(before)])

            logits.register_hook(came)
            x.register_hook(went)
        return logits

    @contextlib.contextmanager
    def _kept(self, call: int | str) -> Iterator[None]:
        """Purifications of this call keep their steps, in the place of those of the call before."""
        if self._steps is not None and self._steps.call != call:
            self._steps.remove()
            self._steps = None
        if self.journal is not None and self._steps is None:
            self._steps = _CallSteps(self.journal, call, self._device)
        with kept_on(self._steps):
            yield

    def _recognise(self, journal: Journal, x: torch.Tensor) -> None:
        """Raise where the defense answers one image otherwise than when the journal was begun."""
        with self._as_it_was():
            seen = self._look(x)
            entry = journal.get(("probe",))
            if entry is None:
                journal.append(("probe",), {}, [seen])
                return
            (was,) = journal.tensors(entry, self._device)
            if torch.equal(was, seen):
                return
            if torch.equal(self._look(x), seen):
                raise self._diverged(journal, "the defense answers otherwise than it did")
            logger.warning("the defense gives other logits for the same image and seed: it cannot be known again on resuming")

    def _look(self, x: torch.Tensor) -> torch.Tensor:
        self._defense.reseed(_PROBE_SEED)
        with torch.no_grad():
            return self._defense.ask(x, None, None).detach()

    @contextlib.contextmanager
    def _as_it_was(self) -> Iterator[None]:
        noise = self._defense.noise()
        try:
            with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
                yield
        finally:
            self._defense.set_noise(noise)

    def _state(self) -> _State:
        device = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        return _State(self._defense.noise(), torch.random.get_rng_state(), device)

    def _set_state(self, state: _State) -> None:
        self._defense.set_noise(state.noise)
        torch.random.set_rng_state(state.cpu)
        if state.device is not None:
            torch.cuda.set_rng_state(state.device, self._device)

    def _generators(self, before: _State) -> list[torch.Tensor]:
        """States of all of torch's generators, if one has moved."""
        now = self._state()
        moved = not torch.equal(now.cpu, before.cpu)
        if now.device is not None and before.device is not None:
            moved |= not torch.equal(now.device, before.device)
        return [state for state in (now.cpu, now.device) if state is not None] if moved else []

    @staticmethod
    def _moved(before: _State, recorded: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not recorded:
            return before.cpu, before.device
        return recorded[0].cpu(), recorded[1].cpu() if len(recorded) > 1 else None

    def _give_up(self, reason: str) -> None:
        """Record no more, and forget what is recorded."""
        if self.journal is None:
            return
        logger.warning("%s: this unit cannot be continued inside, and begins again if it is stopped", reason)
        path, journal = self.journal.path, self.journal
        self.journal = None
        journal.close()
        path.unlink(missing_ok=True)

    @staticmethod
    def _diverged(journal: Journal, what: str) -> JournalError:
        return JournalError(
            f"{what}. {journal.path} holds what was answered before this unit was stopped, and going on would mix two things: "
            f"put back what has changed, or remove that file, and the unit begins again"
        )


class Steps(Tape):
    """Steps in a file that is made when there is something to keep.

    Args:
        path: The file.
        about: Of which work, as JSON has it; what a file holds of other work is dropped.
        device: Where tensors go.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], device: torch.device) -> None:
        super().__init__()
        self._path, self._about, self._device = path, dict(about), device
        self._closed = False
        self._file: Journal | None = None
        if self._path.exists():
            self._open()

    def read(self, key: tuple[Hashable, ...]) -> Kept | None:
        entry = None if self._file is None else self._file.get(key)
        if self._file is None or entry is None:
            return None
        tensors = iter(self._file.tensors(entry, self._device))
        return [next(tensors) if there else None for there in entry.said["there"]]

    def write(self, key: tuple[Hashable, ...], kept: Kept) -> None:
        if self._file is None and not self._closed:
            self._open()
        if self._file is not None:
            said = {"there": [tensor is not None for tensor in kept]}
            self._file.append(key, said, [tensor for tensor in kept if tensor is not None])

    def name(self, x: torch.Tensor) -> str:
        return digest(x)

    def close(self) -> None:
        self._closed = True
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        self.close()
        self._path.unlink(missing_ok=True)

    def _open(self) -> None:
        try:
            self._file = Journal(self._path, self._about)
        except JournalError:  # of other work
            self._path.unlink()
            self._file = Journal(self._path, self._about)
        except OSError as error:
            self._closed = True
            logger.warning("%s cannot be written (%s): a call that is stopped begins again", self._path, error)


class _CallSteps(Steps):
    """Those of one call of a unit, beside its journal."""

    def __init__(self, journal: Journal, call: int | str, device: torch.device) -> None:
        super().__init__(journal.path.with_suffix(".steps"), {"journal": journal.name, "call": call}, device)
        self.call = call


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call that the journal has answered, as its gradient may need it."""

    recorder: Recorder
    number: int
    x: torch.Tensor
    ids: Ids
    draw: Draw
    view: View | None
    before: _State
    logits: torch.Tensor


class _Recorded(torch.autograd.Function):
    """Recorded logits, with the gradient that was recorded with them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, call: _Call, logits: torch.Tensor) -> torch.Tensor:
        ctx.call = call
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: torch.Tensor) -> Any:
        return ctx.call.recorder.gradient(ctx.call, cotangent), None, None


def _named(names: Any) -> Any:
    """Ids and draws, as JSON has them."""
    if names is None or isinstance(names, int):
        return names
    return digest(torch.as_tensor(names))
