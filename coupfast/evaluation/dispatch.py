"""Hands units to workers and their outcomes to the ledger, until nothing is left to do."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np

from coupfast.evaluation import gradients
from coupfast.evaluation.attacks import Cost
from coupfast.evaluation.ledger import Ledger
from coupfast.evaluation.pools import Pool, UnitFailed
from coupfast.evaluation.progress import Progress
from coupfast.evaluation.units import JUDGE, Schedule, Unit
from coupfast.evaluation.worker import Task

logger = logging.getLogger(__name__)


def dispatch(
    ledger: Ledger,
    schedule: Schedule,
    x: np.ndarray,
    y: np.ndarray,
    pool: Pool,
    *,
    costs: Mapping[str, Cost],
    start: np.ndarray | None = None,
    progress: bool = False,
) -> None:
    """Do what the ledger does not have yet.

    Args:
        ledger: Open for writing.
        schedule: The run's units.
        x: Images in [0, 1], float32, shape (images, channels, height, width).
        y: Labels, int64.
        pool: Workers; closed by the caller.
        costs: What one image takes at each stage, at most: for the time that is left.
        start: Where attacks begin, like `x`; None: where they do by themselves.
        progress: Show a bar on stderr; where that is no terminal, a line every half minute.

    Raises:
        UnitFailed: if a unit cannot be done; the others in flight are lost, those recorded are not.
        LedgerError: if a result cannot be written.
    """
    ledger.forget_damaged()
    records = ledger.done()
    standing = {name: record.onward for name, record in records.items()}
    in_flight: dict[str, Unit] = {}
    warned: set[str] = set()
    with Progress(schedule, costs, records.values(), show=progress) as bar:
        while True:
            for unit in schedule.ready(standing):
                if len(in_flight) < pool.size and unit.name not in in_flight:
                    task = Task(unit, _inputs(ledger, schedule, unit, x, y, start))
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
            standing[unit.name] = records[unit.name].onward
            bar.finished(records[unit.name])
            found = gradients.followed(records.values()).get(unit.stage)
            if found is not None and found.useless and unit.stage not in warned:
                warned.add(unit.stage)
                logger.warning("%s", found.warning)


def _inputs(
    ledger: Ledger,
    schedule: Schedule,
    unit: Unit,
    x: np.ndarray,
    y: np.ndarray,
    start: np.ndarray | None,
) -> dict[str, np.ndarray]:
    chosen = list(unit.images)
    arrays = {"x": x[chosen], "y": y[chosen]}
    if start is not None and unit.stage in schedule.attacks:
        arrays["x_start"] = start[chosen]
    if unit.stage == JUDGE and schedule.attacks:
        forms = ledger.forms(unit.images)
        arrays["x_adv"] = np.stack([forms[image][0].x if forms[image] else x[image] for image in chosen])
        several = [(place, forms[image]) for place, image in enumerate(chosen) if len(forms[image]) > 1]
        for number in range(max((len(found) for _, found in several), default=0)):
            here = [(place, found[number].x) for place, found in several if len(found) > number]
            arrays[f"form_{number}"] = np.stack([form for _, form in here])
            arrays[f"form_{number}_of"] = np.array([place for place, _ in here])
    return arrays
