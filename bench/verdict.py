"""Robust accuracy found against what it took: every attack and mode a curve, on several defenses.

    python bench/verdict.py --out verdict-runs --json bench/results/verdict.json --plot bench/results/verdict.png

A point of a curve is a whole run of `coupfast evaluate` (its folder is in `--out`), so anything that is stopped goes on where
it was, and a rerun with the same options makes no finished run again. Every run has the same images, judge and noise of the
judge.

What an attack took is counted in image-steps: steps of a purification that an image goes through, forwards one, and with its
gradient two (there and back), a coarser purification's by its own number; and in seconds of work of all workers. The judge's
draws are not counted: of clean and attacked images, which all runs have, and of the forms that it chooses among. Nor is the
run that a warm curve begins at.

The goal that is stated with the figure: the cheapest point of any curve that by every protocol, and by resubmission of every
number of times, finds no more robust accuracy than the upper end of the 95 % interval of AutoAttack's `rand` with the exact
gradient at its largest size, and its share of that one's image-steps. Points are compared on the same images; they are not
corrected for choosing the cheapest of many.

Without options it is the shipped networks on the 20 images that ship, `--sizes 0.1` a tenth of all iterations; the study is
`--images FILE.npz --limit 100`. `coupfast plan` says what one run would take.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import kept
import numpy as np
import torch
from timing import environment

from coupfast.evaluation import Evaluation, Spec, evaluate
from coupfast.evaluation import plan as planning
from coupfast.evaluation.attacks import Iterative
from coupfast.evaluation.drawing import COLOURS, new_figure, to_png
from coupfast.evaluation.ledger import Ledger
from coupfast.evaluation.protocols import OFFICIAL, PROTOCOLS
from coupfast.evaluation.units import CLEAN, JUDGE
from coupfast.experiments.defenses import NAMES
from coupfast_kernels.files import write_whole

DEFENSES = ("coup", "reverse-sde", "diffpure")
SHARES = (0.1, 0.25, 0.5, 1.0)  # of an attack's full number of iterations: the points of its curve


@dataclasses.dataclass(frozen=True)
class Curve:
    """An attack in a mode, at several sizes.

    Attributes:
        attack: The suite.
        mode: See `Spec`.
        knobs: That are not the suite's own.
        warm: Whether it begins at what `START` found on another defense, or in another ball (`--start-runs`).
    """

    attack: str
    mode: str = "full"
    knobs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    warm: bool = False

    def at(self, share: float, eps: float) -> dict[str, Any]:
        """Keywords of `Spec.of` for a share of every stage's iterations; where stages differ, each one's own as "STAGE.KNOB".

        Steps that are too short to cross the ball in fewer iterations grow to 2.5 eps / iterations, as is usual for PGD.
        """
        stages = Spec.of(attack=self.attack, **self.knobs).stages()
        sizes: dict[str, dict[str, Any]] = {}
        for stage, attack in stages.items():
            iterations = max(1, round(share * getattr(attack, "iterations", 1)))
            sizes[stage] = {"iterations": iterations}
            if isinstance(attack, Iterative):
                sizes[stage]["step_size"] = max(0.007, 2.5 * eps / iterations)
        longest = max(sizes.values(), key=lambda size: size["iterations"])
        own = [(stage, knob, value) for stage, size in sizes.items() for knob, value in size.items()]
        others = {f"{stage}.{knob}": value for stage, knob, value in own if value != longest.get(knob)}
        return {"attack": self.attack, "mode": self.mode, **self.knobs, **longest, **others}


CURVES = {
    "rand": Curve("autoattack-rand"),
    "fixed-autoattack": Curve("fixed-autoattack"),
    "pgd-eot": Curve("pgd-eot"),
    "pgd-eot, fast": Curve("pgd-eot", "fast"),
    "pgd-eot, growing": Curve("pgd-eot", "fast", {"eot_first": 2}),
    "diffhammer": Curve("diffhammer"),
    "diffhammer, fast": Curve("diffhammer", "fast"),
    "transfer through 5": Curve("transfer"),
    "transfer through 3": Curve("transfer", knobs={"coarse_steps": 3}),
    "cascade": Curve("cascade"),
    "cascade, fast": Curve("cascade", "fast"),
    "cascade, growing": Curve("cascade", "fast", {"transfer-3.eot_first": 2, "transfer-5.eot_first": 2}),
    "cascade, warm": Curve("cascade", "fast", warm=True),
}
#: Where warm curves begin: a curve and its share, on a defense that is not the one they attack.
START = ("cascade, fast", 0.5)
ELSEWHERE = {"coup": "reverse-sde", "reverse-sde": "coup", "diffpure": "reverse-sde"}
REFERENCE = "rand"
COUNTED = (OFFICIAL, *PROTOCOLS)
WORK = {"image_steps": "image-steps", "seconds": "seconds of work"}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    check(options)
    rows: list[dict[str, Any]] = []
    settings = {name: getattr(options, name) for name in ("images", "limit", "t", "num_steps", "norm", "eps", "seed", "draws")}
    settings |= {"shard": options.shard, "threads": options.threads, "eot_iter": options.eot_iter, "sizes": options.sizes}
    for defense in options.defenses:
        for name, share in points(options.curves, options.points):
            rows.append(point(defense, name, share, options))
            print(line(rows[-1]), flush=True)
            document = {
                "settings": settings,
                "environment": environment(torch.device(options.device)),
                "rows": rows,
                "goal": [goal(rows, each) for each in options.defenses],
            }
            kept.save(options.json, document)
    for found in document["goal"]:
        print(told(found))
    if options.plot is not None:
        write_whole(options.plot, picture(rows, options.protocol, options.work))
    return 0


def check(options: argparse.Namespace) -> None:
    """What is wrong with any of the runs, before the first one."""
    asked = points(options.curves, options.points)
    for defense in options.defenses:
        specs = [spec_of(defense, name, keywords_of(name, share, options), options) for name, share in asked]
        purified = specs[0].build("cpu")
        for attack in itertools.chain(*(spec.stages().values() for spec in specs)):
            attack.check(purified)


def points(curves: Sequence[str], shares: Sequence[float]) -> list[tuple[str, float]]:
    """Of "NAME" at each of the shares, of "NAME@SHARE" at its own."""
    found = []
    for curve in curves:
        name, at, share = curve.partition("@")
        found += [(name, float(share))] if at else [(name, each) for each in shares]
    return found


def point(defense: str, name: str, share: float, options: argparse.Namespace) -> dict[str, Any]:
    """One run, begun, continued or read."""
    keywords = keywords_of(name, share, options)
    spec = spec_of(defense, name, keywords, options)
    folder = folder_of(options.out / defense, name, keywords)
    begun = Ledger.begun(folder)
    with evaluate(spec, out=folder, resume=begun, workers=options.workers, progress=options.progress) as found:
        return row(found, defense, name, share, keywords)


def keywords_of(name: str, share: float, options: argparse.Namespace) -> dict[str, Any]:
    """Of `Spec.of`, those of the attack."""
    keywords = CURVES[name].at(share * options.sizes, options.eps)
    return keywords if options.eot_iter is None else {**keywords, "eot_iter": options.eot_iter}


def spec_of(defense: str, name: str, keywords: Mapping[str, Any], options: argparse.Namespace) -> Spec:
    return Spec.of(
        images=options.images,
        limit=options.limit,
        method=defense,
        t=options.t,
        num_steps=options.num_steps,
        memory_budget=options.memory_budget,
        norm=options.norm,
        eps=options.eps,
        seed=options.seed,
        shard=options.shard,
        draws=options.draws,
        threads=options.threads,
        device=options.device,
        paths=0,
        start_from=str(start_of(defense, options)) if CURVES[name].warm else None,
        **keywords,
    )


def folder_of(folder: Path, name: str, keywords: Mapping[str, Any]) -> Path:
    """Of a run on the defense whose folder it is."""
    return folder / f"{name.replace(', ', '-').replace(' ', '-')}-{keywords['iterations']}"


def start_of(defense: str, options: argparse.Namespace) -> Path:
    """The run that warm curves begin at."""
    name, share = START
    folder = options.out / ELSEWHERE[defense] if options.start_runs is None else options.start_runs / defense
    found = folder_of(folder, name, CURVES[name].at(share * options.sizes, options.eps))
    if not Ledger.begun(found):
        raise SystemExit(f"warm curves begin at {name}@{share:g} of {folder}, which is not there: run it first")
    return found


def row(found: Evaluation, defense: str, name: str, share: float, keywords: Mapping[str, Any]) -> dict[str, Any]:
    steps = found.ledger.configuration["defense"]["num_steps"]
    stages = [stage for stage in planning.happened(found.ledger) if stage.name not in (CLEAN, JUDGE)]
    attacked = found.verdicts["attacked"]
    accuracies = {**found.accuracies["attacked"], **found.inside}
    return {
        "defense": defense,
        "curve": name,
        "share": share,
        "attack": dict(keywords),
        "images": len(attacked.labels),
        "image_steps": sum(image_steps(stage, steps) for stage in stages),
        "seconds": sum(stage.seconds for stage in stages),
        "stages": [{**dataclasses.asdict(stage), "image_steps": image_steps(stage, steps)} for stage in stages],
        "robust": {
            protocol: {"value": one.value, "wilson": one.wilson, "bootstrap": one.bootstrap}
            for protocol, one in accuracies.items()
        },
        "resubmission": [{"value": one.value, "bootstrap": one.bootstrap} for one in found.resubmission["attacked"]],
        "fingerprint": found.fingerprint,
    }


def image_steps(stage: planning.Stage, steps: int) -> int:
    """Of a stage of an attack on a purification of so many steps."""
    return steps * stage.forward + 2 * (stage.steps or steps) * stage.gradient


def goal(rows: Sequence[Mapping[str, Any]], defense: str) -> dict[str, Any] | None:
    """The cheapest point that is as low as the reference at its largest size, by every count; None without a reference."""
    here = [row for row in rows if row["defense"] == defense]
    references = [row for row in here if row["curve"] == REFERENCE]
    if not references:
        return None
    reference = max(references, key=lambda row: row["share"])
    # What a warm curve begins at is not counted, so that it is no cheaper way to the same.
    cold = [row for row in here if not (row["curve"] in CURVES and CURVES[row["curve"]].warm)]
    enough = [row for row in cold if not above(row, reference)]
    cheapest = min(enough, key=lambda row: row["image_steps"])
    return {
        "defense": defense,
        "reference_share": reference["share"],
        "reference_image_steps": reference["image_steps"],
        "curve": cheapest["curve"],
        "attack": cheapest["attack"],
        "image_steps": cheapest["image_steps"],
        "ratio": cheapest["image_steps"] / reference["image_steps"],
        "seconds_ratio": cheapest["seconds"] / reference["seconds"],
        "lower_or_equal_in_value": [p for p in COUNTED if cheapest["robust"][p]["value"] <= reference["robust"][p]["value"]],
    }


def above(row: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    """By which counts a row finds more than the upper end of the reference's interval."""
    ends = counts(reference)
    return [by for by, found in counts(row).items() if found["value"] > interval(ends[by])[1]]


def counts(row: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What is compared of a row: by the official verdict, the protocols, and resubmission of 2 times up to one less than there
    are draws. (Once it is the average, and with all draws the worst of them.)"""
    again = dict(enumerate(row["resubmission"], start=1))
    return {by: row["robust"][by] for by in COUNTED} | {f"{m} times": again[m] for m in range(2, len(again))}


def interval(found: Mapping[str, Any]) -> Sequence[float]:
    """Of a row's accuracy: the bootstrap's, and Wilson's where there is none, as of the official verdict."""
    ends: Sequence[float] = found["bootstrap"] or found["wilson"]
    return ends


def told(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return f"no curve {REFERENCE!r} to compare with"
    return (
        f"{found['defense']}: {found['curve']} {found['attack']} is as low as {REFERENCE} at {found['reference_share']:g} of "
        f"its size by every count, within its intervals, in {found['ratio']:.3g} of its image-steps and "
        f"{found['seconds_ratio']:.3g} of its time"
    )


def line(row: Mapping[str, Any]) -> str:
    robust = "  ".join(f"{name} {100 * one['value']:5.1f}" for name, one in row["robust"].items() if name in PROTOCOLS)
    return (
        f"{row['defense']:12s} {row['curve']:20s} {row['share']:5g}  {row['image_steps']:12d} image-steps "
        f"{row['seconds']:9.1f} s  {robust}"
    )


def picture(rows: Sequence[Mapping[str, Any]], protocol: str, works: Sequence[str] = tuple(WORK)) -> bytes:
    """A panel for each defense and measure of work: a row of defenses, or a row for each of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    defenses = list(dict.fromkeys(row["defense"] for row in rows))
    lines = 1 if len(works) == 1 else len(defenses)
    columns = len(defenses) * len(works) // lines
    figure = new_figure(max(3.1 * columns, 5.0), 2.6 * lines + 0.6)
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).reshape(len(defenses), len(works))
    names = list(dict.fromkeys(row["curve"] for row in rows))
    for line_of_panels, defense in zip(panels, defenses, strict=True):
        for panel, work in zip(line_of_panels, works, strict=True):
            for number, name in enumerate(names):
                points = [row for row in rows if (row["defense"], row["curve"]) == (defense, name)]
                points.sort(key=lambda row: row[work])
                values = np.array([100 * row["robust"][protocol]["value"] for row in points])
                ends = np.array([interval(row["robust"][protocol]) for row in points])
                below, above = values - 100 * ends[:, 0], 100 * ends[:, 1] - values
                panel.errorbar(
                    [row[work] for row in points],
                    values,
                    yerr=np.stack([below, above]).clip(min=0),
                    label=name if work == works[0] and defense == defenses[0] else None,
                    color=COLOURS[number % len(COLOURS)],
                    marker="os^Dvp*Xh"[number % 9],
                    markersize=4,
                    linewidth=1.3,
                    capsize=2,
                    elinewidth=0.6,
                )
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.set_xlabel(WORK[work])
            panel.set_title(NAMES[defense], fontsize=9)
            if panel.get_subplotspec().is_first_col():
                panel.set_ylabel(f"robust, {protocol}, %")
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    return to_png(figure)


def short(value: float) -> str:
    """Thousands as "20k"."""
    return f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the runs; those that are there are continued")
    add("--json", type=Path, help="what was found, written after every run")
    add("--plot", type=Path, help="the figure, a PNG")
    add("--work", nargs="+", choices=list(WORK), default=list(WORK), help="that the figure has panels of (default: both)")
    add("--protocol", choices=list(PROTOCOLS), default="average", help="that the figure shows (default: %(default)s)")
    add("--defenses", nargs="+", choices=DEFENSES, default=list(DEFENSES), help="(default: all)")
    cold = [name for name, curve in CURVES.items() if not curve.warm]
    said = f"of {', '.join(CURVES)}; NAME@SHARE is one point (default: all that begin at clean images)"
    add("--curves", nargs="+", metavar="NAME[@SHARE]", default=cold, help=said)
    said = "--out of runs in another ball: warm curves begin at theirs on the same defense (default: on another one, in --out)"
    add("--start-runs", type=Path, metavar="RUNS", help=said)
    add("--points", nargs="+", type=float, default=list(SHARES), help="shares of the full iterations (default: %(default)s)")
    add("--sizes", type=float, default=1.0, help="of all iterations, so much: 0.1 for a tenth (default: %(default)s)")
    add("--eot-iter", type=int, help="draws of every gradient (default: each attack's own)")
    add("--images", default="cifar10-20", help="as for `coupfast evaluate` (default: %(default)s)")
    add("--limit", type=int, help="the first N images (default: all)")
    add("--t", type=float, default=0.06, help="purification time (default: %(default)s)")
    add("--num-steps", type=int, default=20, help="steps of the defense (default: %(default)s)")
    add("--norm", choices=("Linf", "L2"), default="Linf", help="(default: %(default)s)")
    add("--eps", type=float, default=8 / 255, help="for images in [0, 1] (default: 8/255)")
    add("--draws", type=int, default=10, help="fresh draws of the judge (default: %(default)s)")
    add("--shard", type=int, default=20, help="images of a unit (default: %(default)s)")
    add("--seed", type=int, default=121, help="(default: %(default)s)")
    add("--memory-budget", type=int, default=2**31, help="bytes of a backward pass; decides no bit (default: %(default)s)")
    add("--threads", type=int, default=1, help="CPU threads of a worker (default: %(default)s)")
    add("--workers", type=int, default=1, help="units at a time (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    add("--progress", action="store_true", help="a bar for each run")
    options = parser.parse_args(arguments)
    try:
        asked = points(options.curves, options.points)
    except ValueError as error:
        parser.error(f"--curves takes NAME or NAME@SHARE: {error}")
    if unknown := {name for name, _ in asked} - CURVES.keys():
        parser.error(f"--curves knows no {', '.join(map(repr, sorted(unknown)))}; it knows {', '.join(map(repr, CURVES))}")
    if not all(0 < share <= 1 for _, share in asked) or options.sizes <= 0:
        parser.error("shares are in (0, 1] and --sizes is above 0")
    return options


if __name__ == "__main__":
    sys.exit(main())
