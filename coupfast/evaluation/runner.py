"""Hands units to workers and their outcomes to the ledger, until nothing is left to do."""

from __future__ import annotations

import collections
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from coupfast.evaluation.ledger import Ledger, Record
from coupfast.evaluation.plan import duration
from coupfast.evaluation.pools import Pool, UnitFailed
from coupfast.evaluation.units import CLEAN, JUDGE, Schedule, Unit
from coupfast.evaluation.worker import Task

EVERY = 30.0  # seconds from one line of progress to the next


def run(
    ledger: Ledger,
    schedule: Schedule,
    x: np.ndarray,
    y: np.ndarray,
    pool: Pool,
    *,
    cost: Mapping[str, int],
    progress: bool = False,
) -> None:
    """Do what the ledger does not have yet.

    Args:
        ledger: Open for writing.
        schedule: The run's units.
        x: Images in [0, 1], float32, shape (images, channels, height, width).
        y: Labels, int64.
        pool: Workers; closed by the caller.
        cost: Images through the defense that one image takes at each stage, at most: for the time that is left.
        progress: Show a bar on stderr; where that is no terminal, a line every half minute.

    Raises:
        UnitFailed: if a unit cannot be done; the others in flight are lost, those recorded are not.
        LedgerError: if a result cannot be written.
    """
    ledger.forget_damaged()
    records = ledger.done()
    standing = {name: _standing(record) for name, record in records.items()}
    in_flight: dict[str, Unit] = {}
    with _Progress(schedule, cost, records.values(), show=progress) as bar:
        while True:
            for unit in schedule.ready(standing):
                if len(in_flight) < pool.size and unit.name not in in_flight:
                    task = Task(unit, _inputs(ledger, schedule, records, unit, x, y))
                    ledger.start(unit)
                    in_flight[unit.name] = unit
                    pool.submit(task)
            if not in_flight:
                return
            try:
                outcome, worker = pool.next(lambda name, images: bar.passed(in_flight[name], images))
            except UnitFailed as failure:
                ledger.fail(failure.name, str(failure))
                raise
            unit = in_flight.pop(outcome.name)
            ledger.finish(outcome, worker)
            records = ledger.done()
            standing[unit.name] = _standing(records[unit.name])
            bar.finished(records[unit.name])


def attacked_images(
    ledger: Ledger, attacks: Sequence[str], records: Mapping[str, Record], images: Sequence[int], x: np.ndarray
) -> np.ndarray:
    """What each image has become: its strongest form by what any stage saw of it, else what the last stage left of it."""
    result = {image: x[image] for image in images}
    highest = dict.fromkeys(images, (False, -np.inf))
    for stage in attacks:
        for record in records.values():
            if record.unit.stage != stage or not set(record.unit.images) & set(result):
                continue
            arrays = ledger.arrays(record)
            if "x_strongest" in arrays:
                forms = arrays["x_strongest"]
                strengths = list(zip(arrays["failed"].tolist(), arrays["loss"].tolist(), strict=True))
            else:  # of an attack that does not tell, the last counts
                forms = arrays["x_adv"]
                strengths = [(True, np.inf)] * len(forms)
            for image, form, strength in zip(record.unit.images, forms, strengths, strict=True):
                if image in result and (strength > highest[image] or strength[1] == np.inf):
                    result[image], highest[image] = form, strength
    return np.stack([result[image] for image in images])


def _inputs(
    ledger: Ledger, schedule: Schedule, records: Mapping[str, Record], unit: Unit, x: np.ndarray, y: np.ndarray
) -> dict[str, np.ndarray]:
    chosen = list(unit.images)
    arrays = {"x": x[chosen], "y": y[chosen]}
    if unit.stage == JUDGE and schedule.attacks:
        arrays["x_adv"] = attacked_images(ledger, schedule.attacks, records, unit.images, x)
    return arrays


def _standing(record: Record) -> tuple[int, ...]:
    return tuple(record.result.get("standing", ()))


class _Progress:
    """How far the images are through the stages, an image that falls counting for all stages that it is spared."""

    def __init__(self, schedule: Schedule, cost: Mapping[str, int], done: Iterable[Record], show: bool) -> None:
        self._stages, self._all = [CLEAN, *schedule.attacks], schedule.attack_all
        self._cost, self._fooled, self._units, self._purified = cost, 0, 0, 0
        self._in_flight: collections.Counter[str] = collections.Counter()  # images through the defense, of units not done yet
        self._started = time.monotonic()
        self._before = self._done = before = sum(self._count(record) for record in done)
        self._total = schedule.images * sum(cost.values())
        bar = show and sys.stderr.isatty()
        self._lines, self._said = show and not bar, self._started
        self._bar = tqdm(
            total=self._total, initial=before, desc="evaluate", unit="image", unit_scale=True, smoothing=0, disable=not bar
        )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()
        if self._lines and self._purified:
            self._say()

    def passed(self, unit: Unit, images: int) -> None:
        # Not beyond what it can take: a unit whose worker died begins again.
        self._in_flight[unit.name] = min(self._in_flight[unit.name] + images, len(unit.images) * self._cost[unit.stage])
        self._show()

    def finished(self, record: Record) -> None:
        self._in_flight.pop(record.unit.name, None)
        self._purified += record.forward_images + record.gradient_images
        self._done += self._count(record)
        self._show()

    def _show(self) -> None:
        self._bar.set_postfix_str(self._state(), refresh=False)
        self._bar.update(self._done + self._in_flight.total() - self._bar.n)
        if self._lines and time.monotonic() - self._said >= EVERY:
            self._say()

    def _state(self) -> str:
        rate = (self._purified + self._in_flight.total()) / max(time.monotonic() - self._started, 1e-9)
        return f"{self._fooled} images fooled, {self._units} units done, {rate:.3g} purifications/s"

    def _say(self) -> None:
        self._said = time.monotonic()
        done = self._done + self._in_flight.total()
        left = (self._said - self._started) * (self._total - done) / max(done - self._before, 1)
        share = f"{100 * done / self._total:.0f} %"
        print(f"evaluate: {share}, {self._state()}, at most {duration(left)} left", file=sys.stderr, flush=True)

    def _count(self, record: Record) -> int:
        """What a unit that is done takes off the work, at most."""
        unit = record.unit
        done = len(unit.images) * self._cost[unit.stage]
        if unit.stage != JUDGE and not (unit.stage == CLEAN and self._all):
            fallen = len(unit.images) - len(_standing(record))
            self._fooled += fallen
            done += fallen * sum(self._cost[stage] for stage in self._stages[self._stages.index(unit.stage) + 1 :])
        self._units += 1
        return done
