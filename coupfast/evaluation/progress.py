"""How far a run is, on stderr."""

from __future__ import annotations

import collections
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from tqdm import tqdm

from coupfast.evaluation.attacks import Cost
from coupfast.evaluation.ledger import Record
from coupfast.evaluation.plan import duration
from coupfast.evaluation.units import CLEAN, JUDGE, Schedule, Unit
from coupfast.wording import counted

EVERY = 30.0  # seconds from one line of progress to the next


class Progress:
    """How far the images are through the stages, an image that falls counting for all stages that it is spared."""

    def __init__(self, schedule: Schedule, costs: Mapping[str, Cost], done: Iterable[Record], show: bool) -> None:
        self._stages, self._all = [CLEAN, *schedule.attacks], schedule.attack_all
        self._cost = {stage: cost.forward + cost.gradient for stage, cost in costs.items()}
        self._cost[JUDGE] += costs[JUDGE].again
        self._fooled = self._units = self._purified = 0
        self._in_flight: collections.Counter[str] = collections.Counter()  # images through the defense, of units not done yet
        self._started = time.monotonic()
        self._before = self._done = before = sum(self._count(record) for record in done)
        self._total = schedule.images * sum(self._cost.values())
        bar = show and sys.stderr.isatty()
        self._lines, self._said = show and not bar, self._started
        self._bar = tqdm(
            total=self._total,
            initial=before,
            desc="evaluate",
            unit_scale=True,
            smoothing=0,
            disable=not bar,
            # Without tqdm's own rate, which counts what falling images are spared: the state tells the one of purifications.
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )

    def __enter__(self) -> Progress:
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
        return f"{counted(self._fooled, 'image')} fooled, {counted(self._units, 'unit')} done, {rate:.3g} purifications/s"

    def _say(self) -> None:
        self._said = time.monotonic()
        done = self._done + self._in_flight.total()
        left = (self._said - self._started) * (self._total - done) / max(done - self._before, 1)
        share = f"{100 * done / self._total:.0f} %"
        rest = f", at most {duration(left)} left" if done < self._total else ""
        print(f"evaluate: {share}, {self._state()}{rest}", file=sys.stderr, flush=True)

    def _count(self, record: Record) -> int:
        """What a unit that is done takes off the work, at most."""
        unit = record.unit
        done = len(unit.images) * self._cost[unit.stage]
        if unit.stage != JUDGE and not (unit.stage == CLEAN and self._all):
            fallen = len(unit.images) - len(record.onward)
            self._fooled += fallen
            done += fallen * sum(self._cost[stage] for stage in self._stages[self._stages.index(unit.stage) + 1 :])
        self._units += 1
        return done
