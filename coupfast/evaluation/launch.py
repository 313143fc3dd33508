"""Start or continue a run: all checks first, then the work."""

from __future__ import annotations

import contextlib
import datetime
import functools
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coupfast.environment import machine
from coupfast.evaluation import building, checks, starts
from coupfast.evaluation.building import Given
from coupfast.evaluation.configuration import OtherConfiguration, configuration, difference, environment
from coupfast.evaluation.dispatch import dispatch
from coupfast.evaluation.ledger import Ledger
from coupfast.evaluation.metered import Metered
from coupfast.evaluation.pools import InProcess, Pool, Processes
from coupfast.evaluation.result import Evaluation
from coupfast.evaluation.spec import AUTO, GIVEN, Spec, checked_workers
from coupfast.evaluation.worker import Rules, Worker

logger = logging.getLogger(__name__)

CLUSTERS = ("none", "ray")


def evaluate(
    subject: Spec | Given | None = None,
    x: torch.Tensor | None = None,
    y: torch.Tensor | None = None,
    *,
    defense: Given | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    workers: int | str = 1,
    cluster: str = "none",
    command: str = "",
    notes: Mapping[str, Callable[[], Any]] | None = None,
    progress: bool = False,
    **options: Any,
) -> Evaluation:
    """Attack a defense, judge it on fresh draws, and say how sure the result is.

        evaluate(model, x, y, attack="autoattack-rand", norm="Linf", eps=8 / 255, out="runs/mine")
        evaluate(Spec(images="cifar10-20", purifier={"t": 0.06, "num_steps": 20}), out="runs/coup")

    Killed at any moment, a run loses what the defense was asked last and nothing else; `resume=True` continues it. For that
    the folder holds, of every unit that is under way, what the defense has answered in it: 12 KiB per CIFAR-10 image and
    gradient, removed when the unit is done.

    Args:
        subject: What to evaluate: a defense (see `defense`), or a `Spec`, which also names one. None is `Spec()`.
        x: Images in [0, 1], float32, shape (n, channels, height, width); None takes those that the spec names.
        y: Their labels, int64, shape (n,).
        defense: An `nn.Module` from images in [0, 1] to logits, in eval mode; a function that makes one on a device (`"cpu"`,
            `"cuda:0"`), which has to be of a module or a file where there are several workers; or the name of either,
            "file.py:build" or "package.module:NAME". Its noise comes from torch's generators or from a `PurifiedClassifier`.
            What purifiers inside of it leave open, to be decided by the memory that is free (`Engine.decided`,
            `memory_budget="auto"`), is decided once for the run, kept in its configuration, and taken from there by workers and
            on resuming, and batches are never split; an object of yours has its own settings back afterwards.
        out: The run's folder, which keeps ledger, logits and attacked images; None takes a temporary one that goes with the
            result.
        resume: Continue the run that is there; its configuration must be this one.
        workers: How many units at a time; "auto" takes as many as this machine has cores for `threads` each, or GPUs, and
            units to give them. Their number changes no bit of the result; memory is needed as many times.
        cluster: "none": one worker is this process, several are processes of this machine; "ray": workers on a Ray cluster.
        command: What a reader has to type to repeat the run.
        notes: What makes something to keep beside the results (a plan, a certificate), as JSON has it. Called when all checks
            are done, before the first unit, unless the run has it already.
        progress: Show a bar on stderr; where that is no terminal, a line every half minute.
        options: Everything else that `Spec.of` takes, in the place of what the spec has: `attack`, `norm`, `eps`, `seed`,
            `shard`, `draws`, …, the attack's knobs (`iterations`, …) and, where no defense is given, the purifier's keywords
            (`t`, …).

    Returns:
        The finished run: accuracies with intervals, logits and attacked images, and its ledger.

    Raises:
        ValueError: if images, labels, defense and attack do not fit, options contradict each other, or the configuration is
            not the run's; the message shows the difference. Before any work.
        LedgerError: if the ledger cannot be read or written, is another version's or is in use.
        UnitFailed: if a unit cannot be done.

    Example:
        >>> import torch, coupfast
        >>> classifier, x = coupfast.load_classifier("cifar10-tiny"), torch.rand(4, 3, 32, 32)
        >>> y = classifier(x).argmax(dim=1)
        >>> result = coupfast.evaluate(classifier, x, y, attack="pgd-eot", iterations=2, eot_iter=1, draws=1)
        >>> result.clean_accuracy
        1.0
    """
    if isinstance(x, (str, Path)):
        raise TypeError(f"`x` are images, got {x!r}; the run's folder is `out`")
    spec, defense = _what(subject, defense, options)
    checked_workers(workers)
    if workers == AUTO and cluster != "none":
        raise ValueError(f"`workers` is a number on a cluster ({cluster!r}), whose size is not known here, got 'auto'")
    if cluster not in CLUSTERS:
        raise ValueError(f"`cluster` is one of {', '.join(CLUSTERS)}, got {cluster!r}")
    if (x is None) != (y is None):
        raise ValueError("images come with their labels: give both `x` and `y`, or neither and name them in the spec")
    if resume and out is None:
        raise ValueError("`resume` continues the run in the folder `out`, which is not given")
    build = spec.builder() if defense is None else building.builder(defense)
    given = x is not None
    if x is None or y is None:
        x, y = spec.load()
    x, y = checks.checked_images(x, y, paths=spec.paths)
    workers = spec.fitting(workers, len(x))
    devices = _devices(spec.device, workers if cluster == "none" else 1)
    stages, device = spec.stages(), torch.device(devices[0])
    metered = Metered(build(devices[0]))
    with _borrowed(metered, _recorded(Path(out)) if resume and out is not None else None):
        checks.check_attacks(stages, x, y, checks.classes_of(metered, x, device))
        for attack in stages.values():
            attack.check(metered)
        described, randomized = metered.describe(), True
        if metered.purified is None:
            seen = checks.look(metered, stages, x, device)
            randomized = seen.randomized if defense is not None or spec.defense is not None else False
            if not seen.repeatable:
                logger.warning(
                    "the defense gives other logits for the same image and seed: it has noise that does not follow "
                    "torch.manual_seed, or an algorithm that is not deterministic, so no run of it can be repeated bit for bit"
                )
        elif (made_for := spec.suite.gradient) != metered.purified.purifier.settings.gradient.name and stages:
            logger.warning(
                "%s is made for the purifier's gradient %r, and this one has %r",
                spec.suite.name,
                made_for,
                metered.purified.purifier.settings.gradient.name,
            )
        said = spec.to_dict() | ({"images": GIVEN, "limit": None} if given else {})
        said |= {} if defense is None else {"defense": GIVEN}
        start = None
        if spec.start_from is not None:
            start = starts.start_of(spec.start_from, x, y, resumed=Path(str(out)) if resume else None)
        began = None if start is None else start.described
        found = configuration(said, stages, described, x, y, device=spec.device, start=began)
        temporary = tempfile.TemporaryDirectory(prefix="coupfast-") if out is None else None
        folder = Path(temporary.name if temporary is not None else str(out))
        rules = Rules(
            attacks=stages,
            seed=spec.seed,
            attack_seed=spec.seeding == "autoattack",
            draws=spec.draws,
            paths=spec.paths,
            threads=spec.threads,
            environment=environment(torch.device(spec.device)),
            defense=described,
            folder=None if temporary is not None else str(folder.absolute()),  # what goes with this process needs no journals
            fast=spec.mode == "fast",
            sharers=min(workers, max(1, machine()["cores"] // spec.threads)),
        )
        with contextlib.closing(_pool(rules, build, metered, devices, workers, cluster, spec)) as pool:
            if resume:
                ledger = Ledger(folder)
            else:
                now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
                ledger = Ledger.create(folder, found, command=command, started=now)
            with ledger:
                if difference(ledger.configuration, found):
                    raise OtherConfiguration(folder, ledger.configuration, found)
                if start is not None:
                    start.keep(folder)
                kept = ledger.notes()
                for name, make_note in (notes or {}).items():
                    if name not in kept:
                        ledger.note(name, make_note())
                schedule = spec.schedule(len(x), attack_all=randomized)
                begin = None if start is None else start.x
                dispatch(ledger, schedule, x.numpy(), y.numpy(), pool, costs=spec.costs(), start=begin, progress=progress)
    return Evaluation(folder, x=x, temporary=temporary)


def _recorded(folder: Path) -> dict[str, Any]:
    """What a run that is there says of its defense."""
    with Ledger(folder, read_only=True) as ledger:
        described: dict[str, Any] = ledger.configuration["defense"]
        return described


@contextlib.contextmanager
def _borrowed(metered: Metered, recorded: Mapping[str, Any] | None) -> Iterator[None]:
    """The defense as the run has it, with nothing left open that would follow from what memory is free: as the run that goes on
    began, else as it is now. Settings, seeds and counters of the caller's own object are afterwards as they were.
    """
    noise, settle_back = metered.noise(), metered.settle(recorded)
    try:
        yield
    finally:
        settle_back()
        metered.set_noise(noise)


def _what(subject: Spec | Given | None, defense: Given | None, options: Mapping[str, Any]) -> tuple[Spec, Given | None]:
    """The spec, and the defense where one is given beside it."""
    if subject is not None and not isinstance(subject, Spec):
        if defense is not None:
            raise TypeError("the defense is given twice: as the first argument and as `defense`")
        subject, defense = None, subject
    options = dict(options)
    if isinstance(defense, str):
        options, defense = {**options, "defense": defense}, None
    if isinstance(defense, nn.Module):
        here = next((parameter.device.type for parameter in (*defense.parameters(), *defense.buffers())), None)
        if subject is None and here is not None:
            options.setdefault("device", here)
    spec = (subject or Spec()).but(**options) if options else subject or Spec()
    if defense is not None:
        if spec.defense is not None:
            raise ValueError(f"the defense is given twice: {spec.defense!r} in the spec, and another one beside it")
        spec.refuse_own_defense()
        if isinstance(defense, nn.Module) and here is not None and here != spec.device:
            raise ValueError(f"the defense is on {here}, and `device` is {spec.device!r}; move one of them")
    return spec, defense


def _pool(
    rules: Rules, build: building.Builder, metered: Metered, devices: list[str], workers: int, cluster: str, spec: Spec
) -> Pool:
    make = functools.partial(Worker, rules, build)
    if cluster == "ray":
        from coupfast.evaluation.cluster import RayWorkers

        return RayWorkers(make, workers, gpus=spec.device == "cuda", threads=spec.threads)
    if workers == 1:
        # The defense that was checked is the one that runs.
        return InProcess(functools.partial(Worker, rules, lambda device: metered.model), devices[0])
    building.check_sendable(make)
    return Processes(make, devices)


def _devices(device: str, workers: int) -> list[str]:
    """One device a worker: GPUs are not shared."""
    if device == "cpu":
        return ["cpu"] * workers
    count = torch.cuda.device_count()
    if workers > count:
        raise ValueError(f"{workers} workers need a GPU each, and there are {count}; use fewer --workers")
    return [f"cuda:{i}" for i in range(workers)]
