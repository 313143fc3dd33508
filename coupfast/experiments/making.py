"""Makes what an experiment is made of: its runs, each in a folder that its spec names, and what is measured beside them."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coupfast.evaluation import Evaluation, Spec, evaluate
from coupfast.evaluation.configuration import OtherConfiguration, difference, environment
from coupfast.evaluation.drawing import check_matplotlib
from coupfast.evaluation.ledger import Ledger
from coupfast.evaluation.report import Run, read
from coupfast.experiments import tables
from coupfast.experiments.defenses import TIMES
from coupfast.experiments.experiment import SOFTWARE, Case, Experiment, Results
from coupfast.experiments.scale import Scale
from coupfast_kernels.files import write_whole

_OTHERWISE = (
    " With --networks tiny the networks that ship are taken, on images that ship (--data names others): methods can be "
    "compared with each other there, and not with the published figures."
)
RUNS, MEASURED, ANNOUNCED = "runs", "measured", "announced"


def check(experiment: Experiment, scale: Scale) -> None:
    """Everything that can be wrong before any work.

    Raises:
        MissingNetworks: see `Scale.check`.
        ValueError, OSError: if images are not there, or what the experiment itself needs is not.
        ImportError: if its pictures cannot be drawn.
    """
    check_matplotlib()
    experiment.check(scale)
    scale.check(
        experiment.needs,
        experiment=experiment.name,
        otherwise="" if scale.networks == "tiny" else _OTHERWISE,
    )
    for case in experiment.cases[:1]:
        case.spec(scale).load()
    for case in experiment.cases:
        case.spec(scale)


def make(experiment: Experiment, scale: Scale, out: Path, *, command: str = "", workers: int | str = 1) -> Results:
    """All runs and measurements of an experiment; those that are there are read, and those that were stopped go on.

    Args:
        experiment: Which one.
        scale: How large.
        out: Folder of the runs of all experiments: one that two of them need is made once.
        command: What a reader has to type to repeat it.
        workers: Units of a run at a time, as `evaluate` takes them; their number changes no bit.
    """
    # Of an announced experiment every run that there may be, also those that follow from the first ones.
    for spec in experiment.announces(scale).runs if experiment.announces else ():
        _check_goes_on(out / RUNS / name_of(spec), scale)
    kept = _announced(experiment, scale, out)
    run = functools.partial(_runs, experiment.name, scale, out, command=command, workers=workers)
    cases, runs = list(experiment.cases), run(experiment.cases)
    if experiment.then is not None:
        more = experiment.then(runs)
        cases, runs = [*cases, *more], runs | run(more)
    return Results(scale, runs, _measured(experiment, scale, out, runs), cases, kept)


def _runs(name: str, scale: Scale, out: Path, cases: Sequence[Case], *, command: str, workers: int | str) -> dict[str, Run]:
    found = {}
    specs = [case.spec(scale) for case in cases]
    folders = [out / RUNS / name_of(spec) for spec in specs]
    for folder in folders:
        _check_goes_on(folder, scale)
    for number, (case, spec, folder) in enumerate(zip(cases, specs, folders, strict=True), start=1):
        begun = Ledger.begun(folder)
        _say(f"{name}, run {number} of {len(cases)}: {case.name}{', which has begun' if begun else ''}")
        try:
            evaluate(spec, out=folder, resume=begun, workers=workers, command=command, progress=True).close()
        except OtherConfiguration as other:
            if not (other.software and _is_finished(folder)):
                raise _refused(other) from other
        found[case.name] = dataclasses.replace(read(folder), name=case.name)
    return found


def _check_goes_on(folder: Path, scale: Scale) -> None:
    """That a run is not there, or is this software's, or is finished.

    What is done is shown by whatever comes later; only to go on would mix the work of two.

    Raises:
        ValueError: if it is not so.
    """
    if Ledger.begun(folder):
        with Ledger(folder, read_only=True) as ledger:
            began = ledger.configuration
        here = {**began, "environment": environment(torch.device(scale.device))}
        if difference(began, here) and not _is_finished(folder):
            raise _refused(OtherConfiguration(folder, began, here))


def _refused(other: OtherConfiguration) -> ValueError:
    return ValueError(f"{other}; delete that folder, take another --out, or go on with what began it")


def _is_finished(folder: Path) -> bool:
    with contextlib.closing(Evaluation(folder)) as evaluation, contextlib.suppress(ValueError):
        return bool(evaluation.verdicts)
    return False


def _announced(experiment: Experiment, scale: Scale, out: Path) -> dict[str, Any]:
    """What is said before the first run, as it was written down then; empty where nothing is."""
    if experiment.announces is None:
        return {}
    said = experiment.announces(scale)
    runs = sorted({name_of(spec) for spec in said.runs})
    content: dict[str, Any] = {"runs": runs, "compared": said.compared, "decides": said.decides}
    path = out / ANNOUNCED / f"{experiment.name}-{_digest(content)}.json"
    if not path.is_file():
        # The paper's times, for steps to be counted by: which ones the runs take, the first of them decide.
        shown = [tables.setting(experiment, scale, TIMES.values(), said.runs), *said.tables]
        _say("\n\n".join(["announced before the first run:", *map(tables.plain, shown)]))
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        kept = {"at": now, "tables": [tables.to_dict(table) for table in shown], **content}
        write_whole(path, (json.dumps(kept, indent=1) + "\n").encode())
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def name_of(spec: Spec) -> str:
    """The folder of a run: what it is in a word, and a hash of all of its spec."""
    fields = spec.to_dict()
    method = "none" if spec.purifier is None else dict(fields["purifier"]).get("method", "coup")
    return f"{method}-{fields['attack']}-{spec.norm}-{_digest(fields)}"


def _digest(fields: Any) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:10]


def _measured(experiment: Experiment, scale: Scale, out: Path, runs: Mapping[str, Run]) -> dict[str, np.ndarray]:
    if experiment.measure is None:
        return {}
    # What it follows from: the runs, which their folders' names tell, and, for networks and images, all of the size.
    size: Any = (scale.paths, scale.seed) if experiment.simulates else dataclasses.asdict(scale)
    key = _digest([experiment.version, size, sorted(run.folder.name for run in runs.values())])
    # Named by where it is defined: two experiments may show one measurement.
    path = out / MEASURED / f"{experiment.measure.__module__.rpartition('.')[2]}-{key}.npz"
    if not path.is_file():
        _say(f"{experiment.name}: measuring")
        arrays = experiment.measure(scale, {name: str(run.folder) for name, run in runs.items()})
        software = np.array(json.dumps(environment(torch.device(scale.device))))
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays, **{SOFTWARE: software})  # type: ignore[arg-type]
        write_whole(path, buffer.getvalue())
    with np.load(path, allow_pickle=False) as kept:
        return dict(kept)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
