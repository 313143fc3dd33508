"""What a run keeps for its gradient, from what its steps need and what memory there is. Arithmetic only: nothing runs here."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

from coupfast.engine import StepMemory
from coupfast.integrate import Storage
from coupfast.wording import counted

logger = logging.getLogger(__name__)

#: Bytes, or what to take: as much as half of what is free allows; as much, and the batch never split; states alone, neither.
Budget: TypeAlias = int | Literal["auto", "whole", "least"]

# States, masks and images that a run holds besides x_0 … x_K: the caller's image, its scaling and clip, the result's clip
# and scaling, and v before and after a step.
EXTRA_IMAGES = 8


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one purification of a batch, with its gradient, will store and evaluate.

    Attributes:
        batch: Images.
        engine: The engine that will run.
        num_steps: Steps of the table.
        storage: Images at a time, what is kept.
        step: Bytes of one step of a piece, above states and weights.
        states_bytes: All states of the batch.
        slopes_bytes, activations_bytes: All slopes and activations that are kept.
        weights_bytes: Transformed weights that the engine keeps beside the networks' own.
        peak_bytes: Predicted peak above all weights, the caller's own `noise` not counted.
        least_bytes: The least `memory_budget` that this batch can run in.
        budget_bytes: The budget that the plan was made for.
        evaluations: Predicted network evaluations of the whole batch, forward and backward pass together, by kind.

    Example:
        >>> import coupfast
        >>> score, classifier = coupfast.load_score("cifar10-tiny"), coupfast.load_classifier("cifar10-tiny")
        >>> plan = coupfast.Purifier(score, classifier, num_steps=5, memory_budget="least").plan(4)
        >>> plan.least_bytes <= plan.peak_bytes
        True
    """

    batch: int
    engine: str
    num_steps: int
    storage: Storage
    step: StepMemory
    states_bytes: int
    slopes_bytes: int
    activations_bytes: int
    weights_bytes: int
    peak_bytes: int
    least_bytes: int
    budget_bytes: int
    evaluations: dict[str, int]

    @property
    def fits(self) -> bool:
        """Whether the predicted peak is within the budget."""
        return self.peak_bytes <= self.budget_bytes

    def check_fits(self) -> None:
        """MemoryError if it does not."""
        if not self.fits:
            raise MemoryError(
                f"{counted(self.batch, 'image')} in {counted(self.num_steps, 'step')} would need "
                f"{self.least_bytes / 2**20:.0f} MiB even one image at a time, and half of the free memory is "
                f"{self.budget_bytes / 2**20:.0f} MiB; use fewer images a call, or give `memory_budget` in bytes"
            )

    def __str__(self) -> str:
        kept = ["all states"]
        if self.storage.slopes:
            kept.append("the classifier's slopes as bits")
        if self.storage.kept_steps:
            kept.append(f"the activations of the last {counted(self.storage.kept_steps, 'step')}")
        counts = ", ".join(f"{count} {kind}" for kind, count in self.evaluations.items())
        return (
            f"{counted(self.batch, 'image')}, {counted(self.num_steps, 'step')}, engine {self.engine}, "
            f"{counted(self.storage.piece, 'image')} at a time\n"
            f"keeps {', '.join(kept)}\n"
            f"transformed weights {self.weights_bytes / 2**20:.1f} MiB; "
            f"predicted peak {self.peak_bytes / 2**20:.1f} MiB above all weights (budget {self.budget_bytes / 2**20:.1f}, "
            f"least {self.least_bytes / 2**20:.1f}){'' if self.fits else ', which does not fit'}\n"
            f"network evaluations, forward and backward: {counts}"
        )

    def __repr__(self) -> str:
        return (
            f"Plan({counted(self.batch, 'image')}, {counted(self.num_steps, 'step')}, engine={self.engine!r}, {self.storage}, "
            f"peak {self.peak_bytes / 2**20:.1f} MiB of {self.budget_bytes / 2**20:.1f})"
        )


@dataclasses.dataclass(frozen=True)
class Need:
    """What decides a plan besides the budget.

    Attributes:
        batch: Images.
        shape: Of one image, for messages.
        num_steps: Steps of the run.
        backward_steps: Steps that the backward pass rebuilds; 0 without a gradient.
        image_bytes: One image of a state.
        state_bytes: All that a state keeps of one image.
        may_keep: Whether slopes and activations serve this gradient.
        largest_batch: Most images of one program; None: any number.
        memory: Bytes of one step of a number of images.
    """

    batch: int
    shape: tuple[int, ...]
    num_steps: int
    backward_steps: int
    image_bytes: int
    state_bytes: int
    may_keep: bool
    largest_batch: int | None
    memory: Callable[[int], StepMemory]

    @property
    def stored_states(self) -> int:
        return self.num_steps + 1 if self.backward_steps else 1

    def peak(self, piece: int, slopes: bool, kept_steps: int) -> int:
        """Bytes above all weights."""
        states = self.batch * ((self.stored_states - 1) * self.state_bytes + EXTRA_IMAGES * self.image_bytes)
        step = self.memory(piece)
        kept = self.num_steps * self.slopes_of_batch() if slopes else 0
        activations = kept_steps * (step.activations - (step.slopes if slopes else 0))
        rebuilds = self.backward_steps and kept_steps < self.num_steps
        at_once = [step.forward, step.transpose if rebuilds else 0]
        if kept_steps:
            at_once += [activations + step.transpose_kept, activations - step.activations + step.forward_keeping]
        return states + kept + max(at_once)

    def slopes_of_batch(self) -> int:
        """Slopes that one step of the whole batch leaves: they are bits of each image, and rounded up for each."""
        whole = self.batch if self.largest_batch is None else min(self.batch, self.largest_batch)
        pieces, rest = divmod(self.batch, whole)
        return pieces * self.memory(whole).slopes + (self.memory(rest).slopes if rest else 0)


def allowed_bytes(need: Need, budget: Budget, free: int) -> int:
    """The bytes that a budget allows, of so many that are free."""
    least = need.peak(1, False, 0)
    if budget == "auto":
        return free // 2
    if budget in ("least", "whole"):
        unsplit = need.peak(need.batch if need.largest_batch is None else min(need.batch, need.largest_batch), False, 0)
        return unsplit if budget == "least" else max(unsplit, free // 2)
    assert isinstance(budget, int)
    if budget < least:
        raise ValueError(
            f"`memory_budget` is {budget} bytes; {need.batch} images of shape {need.shape} in {need.num_steps} steps "
            f"need at least {least} ({least / 2**20:.1f} MiB), one image at a time"
        )
    return budget


def choose_storage(need: Need, budget: Budget, allowed: int) -> Storage:
    """How many images at a time, and what is kept; the batch is split only where one step of it does not fit."""
    piece = min(need.batch, need.largest_batch or need.batch)
    while piece > 1 and need.peak(piece, False, 0) > allowed:
        piece = (piece + 1) // 2
    if piece < need.batch and budget == "auto":
        logger.info("%d images do not fit at once: purifying %d at a time", need.batch, piece)
    slopes = need.may_keep and need.memory(1).slopes > 0 and need.peak(piece, True, 0) <= allowed
    kept_steps, one = 0, need.memory(piece)
    if piece == need.batch and budget != "least" and need.may_keep and one.activations > one.slopes:
        while kept_steps < need.num_steps and need.peak(piece, slopes, kept_steps + 1) <= allowed:
            kept_steps += 1
    return Storage(piece, slopes, kept_steps)


def make_plan(
    need: Need,
    budget: Budget,
    *,
    free: int,
    engine: str,
    weights_bytes: Callable[[int], int],
    evaluations: Mapping[str, Mapping[str, int]],
    asked: Mapping[str, Sequence[bool]] | None = None,
) -> Plan:
    """The plan of one batch.

    Args:
        free: Bytes that are free.
        engine: Its name.
        weights_bytes: Transformed weights for a number of images at a time.
        evaluations: Network evaluations of a "step", and of a transposed one that is a "rebuild", or on kept "slopes" or
            "activations".
        asked: By the first word of an evaluation's name, whether each step of the run asks that network; all do otherwise.

    Raises:
        ValueError: if the budget is below the least that is possible.
    """
    allowed = allowed_bytes(need, budget, free)
    storage = choose_storage(need, budget, allowed)
    step = need.memory(storage.piece)
    pieces = -(-need.batch // storage.piece)
    rebuilt = need.backward_steps - storage.kept_steps
    counts: dict[str, int] = {}
    parts = [
        ("step", range(need.num_steps)),
        ("slopes" if storage.slopes else "rebuild", range(rebuilt)),
        ("activations", range(rebuilt, need.backward_steps)),
    ]
    for kind, steps in parts:
        for name, each in evaluations[kind].items():
            # A surrogate's way back has steps of its own, each of which asks.
            asks = (asked or {}).get(name.split()[0]) if kind == "step" or need.backward_steps == need.num_steps else None
            times = len(steps) if asks is None else sum(asks[k] for k in steps)
            counts[name] = counts.get(name, 0) + each * times * pieces
    return Plan(
        batch=need.batch,
        engine=engine,
        num_steps=need.num_steps,
        storage=storage,
        step=step,
        states_bytes=need.batch * need.stored_states * need.state_bytes,
        slopes_bytes=need.num_steps * need.slopes_of_batch() if storage.slopes else 0,
        activations_bytes=storage.kept_steps * step.activations,
        weights_bytes=weights_bytes(storage.piece),
        peak_bytes=need.peak(storage.piece, storage.slopes, storage.kept_steps),
        least_bytes=need.peak(1, False, 0),
        budget_bytes=allowed,
        evaluations={name: count for name, count in counts.items() if count},
    )
