"""A finished run, read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coupfast.data import CIFAR10_CLASSES, named_count
from coupfast.evaluation import plan
from coupfast.evaluation.ledger import FORM, Record
from coupfast.evaluation.protocols import Accuracy, Judged
from coupfast.evaluation.result import Evaluation
from coupfast.evaluation.units import JUDGE
from coupfast.evaluation.worker import chosen


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run, read.

    Attributes:
        name: Of its folder.
        found: All of it, as JSON has it; see `Evaluation.to_dict`.
        shown: Of the images whose way through the purification was kept: arrays as the judge's units have them, images along
            the axis that `Worker` says, and `images`, their numbers.
    """

    name: str
    folder: Path
    command: str
    started: str
    configuration: dict[str, Any]
    notes: dict[str, Any]
    records: dict[str, Record]
    verdicts: dict[str, Judged]
    shown: dict[str, np.ndarray]
    happened: list[plan.Stage]
    fingerprint: str
    accuracies: dict[str, dict[str, Accuracy]]
    resubmission: dict[str, list[Accuracy]]
    inside: dict[str, Accuracy]
    found: dict[str, Any]

    @property
    def count(self) -> int:
        return int(self.configuration["images"]["count"])


def read(folder: str | Path) -> Run:
    """A finished run.

    Raises:
        LedgerError: if there is none, or a file of it is damaged.
        ValueError: if it is not finished.
    """
    with Evaluation(folder) as evaluation:
        ledger, records = evaluation.ledger, evaluation.ledger.done()
        parts: dict[str, list[np.ndarray]] = {}
        images: list[int] = []
        for record in records.values():
            if record.unit.stage == JUDGE:
                kept = chosen(ledger.configuration["spec"]["paths"], record.unit.images)
                images += [record.unit.images[i] for i in kept]
                for name, array in ledger.arrays(record).items() if kept else ():
                    if name != FORM:
                        parts.setdefault(name, []).append(array[:, kept] if name.endswith("_logits") else array)
        axis = {name: 0 if name.endswith(("_images", "_purified")) else 1 for name in parts}
        return Run(
            name=Path(folder).resolve().name,
            folder=Path(folder),
            command=ledger.command,
            started=ledger.started,
            configuration=ledger.configuration,
            notes=ledger.notes(),
            records=records,
            verdicts=evaluation.verdicts,
            shown={name: np.concatenate(arrays, axis=axis[name]) for name, arrays in parts.items()}
            | {"images": np.array(images, dtype=int)},
            happened=plan.happened(ledger),
            fingerprint=evaluation.fingerprint,
            accuracies=evaluation.accuracies,
            resubmission=evaluation.resubmission,
            inside=evaluation.inside,
            found=evaluation.to_dict(),
        )


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """Runs whose folders have one name get as much of the folders above as it takes."""
    places = [run.folder.resolve().parts for run in runs]
    if len(set(places)) < len(places):
        raise ValueError("a run is to be reported on twice; name every folder once")
    names, depth = [run.name for run in runs], 1
    while len(set(names)) < len(names):
        depth += 1
        names = ["/".join(place[-depth:]) for place in places]
    return [dataclasses.replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def class_name(run: Run, label: int) -> str:
    # Other images may have ten classes, too, and these a classifier of more.
    known, classes = named_count(run.configuration["spec"]["images"]) is not None, run.verdicts["clean"].logits.shape[2]
    return CIFAR10_CLASSES[label] if known and classes == len(CIFAR10_CLASSES) else str(label)
