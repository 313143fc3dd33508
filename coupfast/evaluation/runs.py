"""Start or continue a run: all checks first, then the work."""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from coupfast.evaluation import runner
from coupfast.evaluation.defense import Defense
from coupfast.evaluation.ledger import Ledger
from coupfast.evaluation.pools import InProcess, Pool, Processes
from coupfast.evaluation.spec import Spec, configuration
from coupfast.evaluation.worker import Worker, difference

logger = logging.getLogger(__name__)

CLUSTERS = ("none", "ray")


def evaluate(
    spec: Spec,
    folder: str | Path,
    *,
    resume: bool = False,
    workers: int = 1,
    cluster: str = "none",
    build: Callable[[str], Defense] | None = None,
    images: tuple[torch.Tensor, torch.Tensor] | None = None,
    command: str = "",
    notes: Mapping[str, Callable[[], Any]] | None = None,
    progress: bool = False,
) -> Ledger:
    """Run an evaluation to its end. Killed at any moment, it loses the units in flight and nothing else.

    Args:
        spec: What to evaluate.
        folder: The run's folder.
        resume: Continue the run that is there; its configuration must be this one.
        workers: How many units at a time. Their number changes no bit of the result.
        cluster: "none": one worker is this process, several are processes of this machine; "ray": workers on a Ray cluster.
        build: Makes the defense on a device, instead of what `spec` names; a function that can be pickled, if there are
            several workers.
        images: (x, y) instead of what `spec` names.
        command: What a reader has to type to repeat the run.
        notes: What makes something to keep beside the results (a plan, a certificate), as JSON has it. Called when all checks
            are done, before the first unit, unless the run has it already.
        progress: Show a bar on stderr; where that is no terminal, a line every half minute.

    Returns:
        The ledger, open for reading.

    Raises:
        ValueError: if the images, labels and networks do not fit, or the configuration is not the run's; the message
            shows the difference. Before any work.
        LedgerError: if the ledger cannot be read or written, is another version's or is in use.
        UnitFailed: if a unit cannot be done.
    """
    if workers < 1:
        raise ValueError(f"`workers` is at least 1, got {workers}")
    if cluster not in CLUSTERS:
        raise ValueError(f"`cluster` is one of {', '.join(CLUSTERS)}, got {cluster!r}")
    build = build or spec.build
    devices = _devices(spec.device, workers if cluster == "none" else 1)
    x, y = images or spec.load()
    defense = build(devices[0])
    check_images(spec, defense, x, y)
    found = configuration(spec, defense, x, y)
    rules = spec.rules(found["defense"])
    make = functools.partial(Worker, rules, build)
    pool: Pool
    if cluster == "ray":
        from coupfast.evaluation.cluster import RayWorkers

        pool = RayWorkers(make, workers, gpus=spec.device == "cuda", threads=spec.threads)
    elif workers == 1:
        # The defense that was checked is the one that runs.
        pool = InProcess(functools.partial(Worker, rules, lambda device: defense), devices[0])
    else:
        pool = Processes(make, devices)
    with contextlib.closing(pool):
        if resume:
            ledger = Ledger(folder)
        else:
            now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
            ledger = Ledger.create(folder, found, command=command, started=now)
        with ledger:
            if changed := difference(ledger.configuration, found):
                raise ValueError(f"the run in {folder} was started with another configuration: {changed}")
            kept = ledger.notes()
            for name, make_note in (notes or {}).items():
                if name not in kept:
                    ledger.note(name, make_note())
            runner.run(ledger, spec.schedule(len(x)), x.numpy(), y.numpy(), pool, cost=spec.cost(), progress=progress)
    return Ledger(folder, read_only=True)


def check_images(spec: Spec, defense: Defense, x: torch.Tensor, y: torch.Tensor) -> None:
    """ValueError if these are no images in [0, 1] with labels that the defense knows, or the attack does not fit them."""
    if x.dtype != torch.float32 or x.dim() != 4 or len(x) == 0:
        raise ValueError(f"images are float32 of shape (n, channels, height, width), got {x.dtype} of {tuple(x.shape)}")
    low, high = float(x.min()), float(x.max())
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(f"images have values in [0, 1], got [{low:.6g}, {high:.6g}]")
    if y.dtype != torch.int64 or y.shape != x.shape[:1]:
        raise ValueError(f"labels are int64, one per image: {len(x)} images, got {y.dtype} of shape {tuple(y.shape)}")
    model = defense.model if defense.purified is None else defense.purified.classifier
    with torch.no_grad():
        classes = model(x[:1].to(torch.device(spec.device))).shape[1]
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise ValueError(f"labels are in [0, {classes}), the classes of the classifier, got [{int(y.min())}, {int(y.max())}]")
    if not isinstance(spec.paths, int) and spec.paths and spec.paths[-1] >= len(x):
        raise ValueError(f"`paths` names image {spec.paths[-1]}, and there are {len(x)}, numbered from 0")
    stages = spec.stages()
    digests: dict[bytes, int] = {}
    for i, image in enumerate(x.numpy()):
        first = digests.setdefault(hashlib.sha256(image.tobytes()).digest(), i)
        if y[first] != y[i]:
            raise ValueError(f"images {first} and {i} are equal, and their labels are {int(y[first])} and {int(y[i])}")
    if stages and spec.norm == "L2" and spec.eps >= math.sqrt(x[0].numel()):
        raise ValueError(
            f"`eps` = {spec.eps:g} reaches every image in [0, 1] of {x[0].numel()} values, which are at most "
            f"{math.sqrt(x[0].numel()):.4g} apart in L2"
        )
    for name, attack in stages.items():
        if classes < attack.least_classes:
            raise ValueError(f"{name} needs {attack.least_classes} classes or more, and the classifier has {classes}")
    targets = max((getattr(attack, "target_classes", 0) for attack in stages.values()), default=0)
    if targets >= classes:
        raise ValueError(f"`target_classes` is at most {classes - 1} for a classifier of {classes} classes, got {targets}")


def _devices(device: str, workers: int) -> list[str]:
    """One device a worker: GPUs are not shared."""
    if device == "cpu":
        return ["cpu"] * workers
    count = torch.cuda.device_count()
    if workers > count:
        raise ValueError(f"{workers} workers need a GPU each, and there are {count}; use fewer --workers")
    return [f"cuda:{i}" for i in range(workers)]
