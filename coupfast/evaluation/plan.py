"""What a run will take, from a short probe of the very networks on this machine; and afterwards, what it took.

Counts are of the worst case, that no image falls: AutoAttack never needs more. Times are scaled from a probe of a few steps of
one batch, so they assume that every step takes as long, and that larger batches take proportionally longer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coupfast.data import named_count
from coupfast.evaluation import purification
from coupfast.evaluation.attacks import Attack, Iterative
from coupfast.evaluation.building import Given, builder
from coupfast.evaluation.ledger import Ledger
from coupfast.evaluation.metered import Metered
from coupfast.evaluation.purification import NO_DEFENSE
from coupfast.evaluation.spec import GIVEN, Spec, checked_workers
from coupfast.evaluation.starts import check_source
from coupfast.evaluation.suites import stated_errors, told_errors
from coupfast.evaluation.units import CLEAN, JUDGE
from coupfast.gradients import Surrogate
from coupfast.methods import method_name
from coupfast.models.zoo import needs_weights
from coupfast.purify import PurifiedClassifier, Purifier
from coupfast.wording import counted, radius


@dataclasses.dataclass(frozen=True)
class Probe:
    """Seconds that one image takes through the whole defense.

    Attributes:
        forward: Without a gradient.
        gradient: With one, forwards and backwards.
        images: Of the batch that was probed.
        steps, of_steps: How many steps of a purification the probe ran, and how many there are.
        memory: Predicted peak bytes of a worker, weights included, over all stages; None if it cannot be told.
        memory_of: The same, stage by stage.
        coarse: Steps of the coarser purification that gradients go through, of stages that have one.
    """

    forward: float
    gradient: float
    images: int
    steps: int
    of_steps: int
    memory: int | None
    memory_of: Mapping[str, int] = dataclasses.field(default_factory=dict)
    coarse: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a plan, or of what happened.

    Attributes:
        name: The stage's.
        images: That enter it.
        forward, gradient: Images through the defense.
        seconds: Of work, all workers together.
        peak_bytes: Of what happened, the most that a worker had; see `Outcome`.
        steps: Of the purification that those with a gradient go through; None: all of the defense's.
    """

    name: str
    images: int
    forward: int
    gradient: int
    seconds: float
    peak_bytes: int = 0
    steps: int | None = None

    def timed(self, probe: Probe) -> float:
        """Seconds at a probe's speed; of fewer steps than the defense's in proportion to their number."""
        share = 1.0 if self.steps is None else self.steps / probe.of_steps
        return self.forward * probe.forward + self.gradient * probe.gradient * share

    def __str__(self) -> str:
        return f"{self.name:28s}{self.images:8d}{self.forward:12d}{self.gradient:12d}{duration(self.seconds):>12s}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run takes at most.

    Attributes:
        stages: In order.
        workers: That share the work.
        probe: What the times come from.
        price: Of a worker and hour; None if not given.
        random: Networks that had random weights.
        pilot: Its name, if a finished run's survival was taken for this one's; "" if not.
        expected: The stages with that survival.
        start: Of the run that attacks begin from; "" if they begin at clean images.
        errors: By stage, of tests by which images leave; see `suites.stated_errors`.
    """

    stages: tuple[Stage, ...]
    workers: int
    probe: Probe
    price: float | None = None
    random: tuple[str, ...] = ()
    pilot: str = ""
    expected: tuple[Stage, ...] = ()
    start: str = ""
    errors: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Of wall-clock, with all workers busy."""
        return sum(stage.seconds for stage in self.stages) / self.workers

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> Plan:
        stages = tuple(Stage(**stage) for stage in fields["stages"])
        expected = tuple(Stage(**stage) for stage in fields.get("expected", ()))
        probe = Probe(**fields["probe"])
        random, pilot, start = tuple(fields["random"]), fields.get("pilot", ""), fields.get("start", "")
        errors = dict(fields.get("errors", {}))
        return Plan(stages, fields["workers"], probe, fields["price"], random, pilot, expected, start, errors)

    def __str__(self) -> str:
        probe = self.probe
        lines = [
            f"probe: {counted(probe.images, 'image')}, {probe.forward:.3g} s an image without and "
            f"{probe.gradient:.3g} s with a gradient"
            + (f", scaled from {probe.steps} of {probe.of_steps} steps" if probe.steps < probe.of_steps else ""),
            f"{'at most, no image falling:':28s}{'images':>8s}{'forward':>12s}{'gradient':>12s}{'time':>12s}{'memory':>12s}"
            + ("" if self.price is None else f"{'cost':>12s}"),
        ]
        if self.random:
            lines.insert(0, f"random weights: {', '.join(self.random)} (trained ones take as long)")
        if self.start:
            lines.insert(0, f"attacks begin from the adversarial images of {self.start}, which takes as long at most")
        for stage in self.stages:
            memory = f"{probe.memory_of[stage.name] / 2**20:.0f} MiB" if stage.name in probe.memory_of else "?"
            lines.append(
                f"{stage}{memory:>12s}"
                + ("" if self.price is None else f"{self.price * stage.seconds / 3600:12.2f}")
                + ("" if stage.steps is None else f"  gradient through {counted(stage.steps, 'step')}")
            )
        forward, gradient = sum(stage.forward for stage in self.stages), sum(stage.gradient for stage in self.stages)
        work = sum(stage.seconds for stage in self.stages)
        lines.append(f"{'all purifications':36s}{forward:12d}{gradient:12d}{duration(work):>12s}")
        lines.append(f"{counted(self.workers, 'worker')}: {duration(self.seconds)}")
        if self.expected:
            lines.append(f"with the survival of {self.pilot}:")
            lines += map(str, self.expected)
            left = sum(stage.seconds for stage in self.expected)
            lines.append(f"{'all':60s}{duration(left):>12s}; {duration(left / self.workers)} on all workers")
        if self.errors:
            lines.append(f"stated error: {told_errors(self.errors)}")
        if probe.memory is not None:
            lines.append(f"memory of a worker: {probe.memory / 2**20:.0f} MiB and what Python and torch take")
        if self.price is not None:
            lines.append(f"cost: {self.price * work / 3600:.2f}, at {self.price:g} a worker and hour")
        return "\n".join(lines)


def plan(
    spec: Spec,
    *,
    defense: Given | None = None,
    workers: int | str = 1,
    probe_images: int = 1,
    probe_steps: int = 2,
    price: float | None = None,
    pilot: str | Path | None = None,
) -> Plan:
    """Probe and count.

    Args:
        spec: What would be evaluated. Networks take as long with random weights as with others: a name whose weights are not
            given gets them. Of a named set of images that is not here, the size is known, and its images are not read.
        defense: In the place of the one that `spec` names.
        workers: That would share it, as `evaluate` takes them.
        probe_images: Batch of the probe.
        probe_steps: Steps of the probe's purification, of the steps that a purification has.
        price: Of a worker and hour.
        pilot: Folder of a finished run of stages of the same names, at whatever size: what share of its most it took is
            expected here as well. What it had otherwise (method, time, ball, error) stands behind its name.

    Raises:
        ValueError: if the pilot is not finished, has no stage of a name, or images left one of its attacks by another rule.
    """
    checked_workers(workers)
    if probe_images < 1 or probe_steps < 1:
        raise ValueError(f"numbers of images and steps are at least 1, got {probe_images}, {probe_steps}")
    own = spec.defense is None and defense is None
    random: tuple[str, ...] = ()
    if own:
        score, classifier = (
            "random" if weights is None and needs_weights(name) else weights
            for name, weights in ((spec.score, spec.score_weights), (spec.classifier, spec.classifier_weights))
        )
        spec = dataclasses.replace(spec, score_weights=score, classifier_weights=classifier)
        if spec.guide is not None and spec.guide_weights is None and needs_weights(spec.guide):
            spec = dataclasses.replace(spec, guide_weights="random")
        networks = [(spec.score, score)] if spec.purifier is not None else []
        networks += [(spec.guide, spec.guide_weights)] if spec.guide is not None else []
        random = tuple(name for name, weights in [*networks, (spec.classifier, classifier)] if weights == "random")
    elif defense is not None:
        spec.refuse_own_defense()
    if (named := named_count(spec.images)) is not None:
        count, shape = named if spec.limit is None else spec.limit, torch.Size((3, 32, 32))
        if count > named:
            raise ValueError(f"`limit` asks for {count} images, and {spec.images} has {named}")
    else:
        x, _ = spec.load()
        count, shape = len(x), x.shape[1:]
    # Before the probe, which takes a while.
    named_pilot, shares = ("", {}) if pilot is None else _piloted(pilot, spec, given=defense is not None)
    if spec.start_from is not None:
        with Ledger(spec.start_from, read_only=True) as ledger:
            check_source(ledger)
    measured = probe(spec, shape, defense=defense, images=probe_images, steps=probe_steps)
    stages = []
    for name, forward, gradient in _counts(spec, count):
        stage = Stage(name, count, forward, gradient, 0.0, steps=measured.coarse.get(name))
        stages.append(dataclasses.replace(stage, seconds=stage.timed(measured)))
    expected = () if pilot is None else tuple(_surviving(stage, shares[stage.name], measured) for stage in stages)
    errors = stated_errors({stage: attack.to_dict() for stage, attack in spec.stages().items()})
    workers = spec.fitting(workers, count)
    return Plan(tuple(stages), workers, measured, price, random, named_pilot, expected, spec.start_from or "", errors)


def _piloted(pilot: str | Path, spec: Spec, *, given: bool) -> tuple[str, dict[str, tuple[float, float, float]]]:
    """A pilot's name with what it had otherwise, and the shares that each stage of `spec` took there, of its images and of its
    most forward and gradient cost."""
    with Ledger(pilot, read_only=True) as ledger:
        found = {stage.name: stage for stage in happened(ledger)}
        images = int(ledger.configuration["images"]["count"])
        asked, its_own = _asked(ledger), ledger.configuration["spec"]["defense"] == GIVEN
    most = {name: (forward, gradient) for name, forward, gradient in _counts(asked, images)}
    if missing := [stage for stage in spec.costs() if stage not in found and stage not in most]:
        raise ValueError(f"the pilot in {pilot} has no stage {', '.join(missing)}; it has {', '.join(most)}")
    if JUDGE not in found or found[JUDGE].images < images:
        raise ValueError(f"the pilot in {pilot} is not finished: continue it with coupfast evaluate --resume {pilot}")
    if changed := [stage for stage, attack in spec.stages().items() if _drop(attack) != _drop(asked.stages()[stage])]:
        mine, there = (_drop(one.stages()[changed[0]]) for one in (spec, asked))
        raise ValueError(
            f"in the pilot in {pilot} images left {changed[0]} otherwise: `drop` was {there!r} there and is {mine!r} here; "
            f"take a pilot of the same `mode` and `drop`"
        )
    shares = {}
    for stage in spec.costs():
        took, (forward, gradient) = found.get(stage, Stage(stage, 0, 0, 0, 0.0)), most[stage]
        shares[stage] = (took.images / images, took.forward / max(forward, 1), took.gradient / max(gradient, 1))
    here, had = _survives_by(spec, given=given), _survives_by(asked, given=its_own)
    others = "; ".join(f"{name} {value}" for name, value in had.items() if value != here.get(name, value))
    return f"{pilot}{f' (there {others})' if others else ''}", shares


def _survives_by(spec: Spec, *, given: bool) -> dict[str, str]:
    """Of what decides how many images survive, what a reader would compare first; of a defense that is given from Python its
    ball and its attack alone."""
    found = {}
    if not given:
        settings = spec.settings()
        t = None if settings is None else getattr(settings.method, "t", None)
        method = NO_DEFENSE if settings is None else method_name(settings.method)
        found = {"method": spec.defense or method, "t": str(t).lower()}
        if spec.defense is None:
            found |= {"score network": str(spec.score), "classifier": str(spec.classifier)}
        if settings is not None:
            found["steps"] = str(settings.num_steps)
    stages = spec.stages().values()
    for knob in ("iterations", "eot_iter"):
        found[knob] = ", ".join(str(getattr(attack, knob)) for attack in stages if hasattr(attack, knob))
    errors = sorted({f"{attack.error:g}" for attack in stages if isinstance(attack, Iterative)})
    ball = f"{spec.norm} {radius(str(spec.norm), spec.eps or 0.0)}"
    return {**found, "ball": ball, "error": ", ".join(errors)}


def _drop(attack: Attack) -> str | None:
    """When an image leaves an attack; None where none does."""
    return getattr(attack, "drop", None)


def _surviving(stage: Stage, shares: tuple[float, float, float], measured: Probe) -> Stage:
    """The stage with so much of its images and of its most forward and gradient cost."""
    most = (stage.images, stage.forward, stage.gradient)
    # Shares are rounded: a whole number that is a little more than it was is no other one.
    whole = [math.ceil(count * (1 - 1e-12)) for count in map(math.prod, zip(most, shares, strict=True))]
    images, forward, gradient = map(min, most, whole)
    fewer = dataclasses.replace(stage, images=images, forward=forward, gradient=gradient)
    return dataclasses.replace(fewer, seconds=fewer.timed(measured))


def _asked(ledger: Ledger) -> Spec:
    """What a run was asked to do, whatever images and defense were given from Python."""
    fields = ledger.configuration["spec"]
    return Spec.from_dict({**fields, **({"defense": None, "purifier": None} if fields["defense"] == GIVEN else {})})


def probe(spec: Spec, shape: torch.Size, *, defense: Given | None = None, images: int, steps: int) -> Probe:
    """Time a few steps on random images of a shape, and scale them."""
    device, threads = "cuda:0" if spec.device == "cuda" else "cpu", torch.get_num_threads()
    with contextlib.ExitStack() as borrowed:
        borrowed.callback(torch.set_num_threads, threads)
        torch.set_num_threads(spec.threads)
        x = torch.rand(images, *shape, generator=torch.Generator().manual_seed(0)).to(device)
        metered = Metered((spec.builder() if defense is None else builder(defense))(device))
        borrowed.callback(metered.settle())
        for attack in spec.stages().values():
            attack.check(metered)
        purified = metered.purified
        if purified is None:
            return Probe(_seconds(metered, x, False) / images, _seconds(metered, x, True) / images, images, 1, 1, None)
        purifier, classifier = purified.purifier, purified.classifier
        through = {name: cost.steps for name, cost in spec.costs().items() if cost.steps is not None}
        coarse = {name: metered.coarser(steps).purifier.num_steps for name, steps in through.items()}
        # The backward pass of a surrogate has another number of steps than the forward pass: nothing to scale by.
        ran = purifier.num_steps if purifier.settings.gradient.name == Surrogate.name else min(steps, purifier.num_steps)
        fewer = purification.begun(purifier.settings, ran)
        if fewer is None:
            ran = purifier.num_steps
        short = Purifier(purifier.score, purifier.classifier, settings=fewer or purifier.settings)
        seconds = []
        for gradient in (False, True):
            after = _seconds(Metered(classifier), x, gradient)
            all_of_it = _seconds(Metered(PurifiedClassifier(short, classifier)), x, gradient)
            seconds.append((max(all_of_it - after, 0.0) * purifier.num_steps / ran + after) / images)
        del short  # a purifier leaves out algorithms that have no room beside another one's weights
        memory_of = _memory(spec, purifier, classifier, shape)
        memory = max(memory_of.values()) if memory_of else None
        return Probe(seconds[0], seconds[1], images, ran, purifier.num_steps, memory, memory_of, coarse)


def _memory(spec: Spec, purifier: Purifier, classifier: nn.Module, shape: torch.Size) -> dict[str, int]:
    """Peak bytes of a worker at each stage; none where one cannot be told."""
    if not purification.plans_memory(purifier.settings):
        return {}
    networks = {network for network in (purifier.score, purifier.classifier, classifier) if network is not None}
    weights = sum(t.numel() * t.element_size() for network in networks for t in (*network.parameters(), *network.buffers()))
    stages, image = spec.stages(), (shape[0], shape[1], shape[2])

    @functools.cache
    def peak(batch: int, gradient: bool) -> int:
        gc.collect()
        settings = purifier.settings if gradient else purification.without_gradient(purifier.settings)
        alone = Purifier(purifier.score, purifier.classifier, settings=settings)
        predicted = alone.plan(batch, image_shape=image)
        return weights + predicted.weights_bytes + predicted.peak_bytes

    def attacked(attack: Attack) -> int:
        at_once, cost = attack.at_once(spec.shard), attack.cost()
        # The verdict that follows is on all of a unit.
        most = max(peak(at_once * attack.replicas, False), peak(spec.shard, False))
        if cost.gradient:
            most = max(most, peak(at_once * attack.gradient_replicas, True))
        if cost.steps is not None:  # another purifier, with what its engine makes of the weights
            most += purifier.plan(1, image_shape=image).weights_bytes
        return most

    attacks = {name: attacked(attack) for name, attack in stages.items()}
    return {CLEAN: peak(spec.shard, False), **attacks, JUDGE: peak(spec.shard, False)}


def happened(ledger: Ledger) -> list[Stage]:
    """What each stage of a run took, as far as it is done."""
    stages: dict[str, Stage] = {}
    for record in ledger.done().values():
        before = stages.get(record.unit.stage, Stage(record.unit.stage, 0, 0, 0, 0.0))
        coarse = ledger.configuration["stages"].get(record.unit.stage, {}).get("coarse_steps")
        stages[record.unit.stage] = Stage(
            record.unit.stage,
            before.images + len(record.unit.images),
            before.forward + record.forward_images,
            before.gradient + record.gradient_images,
            before.seconds + record.seconds,
            max(before.peak_bytes, record.peak_bytes),
            None if coarse is None else purification.coarse_count(ledger.configuration["defense"], coarse),
        )
    order = [CLEAN, *ledger.configuration["stages"], JUDGE]
    return [stages[name] for name in order if name in stages]


def beside(predicted: Plan, found: list[Stage]) -> str:
    """A plan and what happened, stage by stage."""
    by_name = {stage.name: stage for stage in found}
    lines = [f"{'':28s}{'predicted at most':>36s}{'happened':>36s}"]
    lines.append(f"{'':28s}" + 2 * f"{'forward':>12s}{'gradient':>12s}{'time':>12s}")
    for stage in predicted.stages:
        pair = (stage, by_name.get(stage.name, Stage(stage.name, 0, 0, 0, 0.0)))
        cells = [f"{entry.forward:12d}{entry.gradient:12d}{duration(entry.seconds):>12s}" for entry in pair]
        lines.append(f"{stage.name:28s}{''.join(cells)}")
    expected = sum(stage.timed(predicted.probe) for stage in found)
    seconds = sum(stage.seconds for stage in found)
    lines.append(f"what happened, at the probe's speed: {duration(expected)}; it took {duration(seconds)}")
    if predicted.price is not None:
        work = sum(stage.seconds for stage in predicted.stages)
        costs = (f"{predicted.price * spent / 3600:.2f}" for spent in (work, seconds))
        lines.append(f"cost at {predicted.price:g} a worker and hour: at most {next(costs)} predicted, {next(costs)} happened")
    memory = predicted.probe.memory
    lines.append(
        f"memory of a worker: {'not' if memory is None else f'{memory / 2**20:.0f} MiB, besides Python and torch,'} predicted, "
        f"{max((stage.peak_bytes for stage in found), default=0) / 2**20:.0f} MiB happened, on a CPU the whole process"
    )
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """In the unit that a reader would use."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _counts(spec: Spec, images: int) -> list[tuple[str, int, int]]:
    """Stage, images through the defense without and with a gradient, in a run on that many images."""
    counts = [(stage, images * (cost.forward + cost.again), images * cost.gradient) for stage, cost in spec.costs().items()]
    stage, judged, none = counts[-1]
    return [*counts[:-1], (stage, judged + (0 if spec.purifier is None else spec.path_cost(images)), none)]


def _seconds(defense: Metered, x: torch.Tensor, gradient: bool) -> float:
    """The second of two calls: the first one builds and warms up."""
    for _ in range(2):
        started = time.perf_counter()
        x = x.detach().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            logits = defense(x, draw=0)
            if gradient:
                torch.autograd.grad(logits.sum(), x)
        if x.is_cuda:
            torch.cuda.synchronize()
    return time.perf_counter() - started
