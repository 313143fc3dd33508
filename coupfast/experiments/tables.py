"""Tables and sentences that several experiments have."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import special

from coupfast.data import are_jpeg
from coupfast.evaluation import Spec, protocols
from coupfast.evaluation.configuration import environment
from coupfast.evaluation.plan import duration
from coupfast.evaluation.protocols import OFFICIAL, Accuracy, Comparison, wilson_interval
from coupfast.evaluation.purification import NO_DEFENSE
from coupfast.evaluation.report import Run, Table
from coupfast.experiments.defenses import NAMES
from coupfast.experiments.experiment import SOFTWARE, Case, Experiment, Results
from coupfast.experiments.scale import ROLES, SETS, Scale, sizes, sizes_of_stages
from coupfast.wording import counted, radius

NONE = "–"
#: Of fewer images a page says what they cannot show.
_MANY = 100
#: Of fewer images no difference is said to be one.
FEW = 30
#: Protocols that tables here have, with their names there.
SHOWN = {
    **{OFFICIAL: "official", "average": "average draw", "majority": "majority", "worst": "worst draw"},
    "mean logits": "mean logits",
}


def per_cent(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def accuracy(found: Accuracy) -> str:
    """In per cent, with Wilson's interval of 95 %."""
    low, high = found.wilson
    return f"{100 * found.value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def clean(run: Run, protocol: str = OFFICIAL) -> str:
    return accuracy(run.accuracies["clean"][protocol])


def robust(run: Run, protocol: str = OFFICIAL) -> str:
    return accuracy(run.accuracies["attacked"][protocol])


def lower(first: Run, second: Run, protocol: str = OFFICIAL) -> Accuracy:
    """The lower of one defense's accuracies under two attacks."""
    return protocols.lower(first.verdicts["attacked"], second.verdicts["attacked"], protocol)[0]


def plain(table: Table) -> str:
    """For a terminal."""
    rows = [table.header, *table.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.header))]
    shown = rows if any(table.header) else rows[1:]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown]
    note = textwrap.wrap(table.note, 118, initial_indent="  ", subsequent_indent="  ")
    return "\n".join([table.title, *(f"  {line}" for line in lines), *note])


def to_dict(table: Table) -> dict[str, Any]:
    """As JSON has it."""
    return {"title": table.title, "header": list(table.header), "rows": [list(row) for row in table.rows], "note": table.note}


def from_dict(found: Mapping[str, Any]) -> Table:
    """What `to_dict` made."""
    return Table(found["title"], tuple(found["header"]), [tuple(row) for row in found["rows"]], found["note"])


def mean(values: np.ndarray) -> str:
    """With Student's interval of 95 %."""
    count = len(values)
    if count < 2:
        return f"{values.mean():.3f} [{NONE}]"
    half = half_width(values)
    return f"{values.mean():.3f} [{values.mean() - half:.3f}, {values.mean() + half:.3f}]"


def half_width(values: np.ndarray) -> float:
    """Of Student's interval of 95 % for a mean; 0 of one value, which has none."""
    count = len(values)
    return float(special.stdtrit(count - 1, 0.975) * values.std(ddof=1) / np.sqrt(count)) if count > 1 else 0.0


def by_protocol(results: Results) -> Table:
    """Robust accuracy of every run by every protocol."""
    counts = [len(run.verdicts["attacked"].logits) for run in results.runs.values()]
    draws, more = counted(max(counts), "fresh draw"), ""
    if min(counts) < max(counts):
        draws, more = f"{min(counts)} to {draws}", ", as many as its attack has above: the worst of more draws is stricter"
    rows = [(name, *(robust(run, protocol) for protocol in SHOWN)) for name, run in results.runs.items()]
    return Table(
        "Robust accuracy by protocol",
        ("run", *SHOWN.values()),
        rows,
        "In %, with 95 % intervals over images. Official: right at a fresh draw before the attack and after each of its "
        f"stages. The others are of {draws} of the noise for each attacked image, at the strongest point that the attack "
        f"found{more}.",
    )


def compared(results: Results, pairs: Sequence[tuple[str, str]], title: str = "Differences of robust accuracy") -> Table:
    """Differences of accuracy under what they met, between runs on the same images."""
    rows = []
    for first, second in pairs:
        for protocol, name in SHOWN.items():
            found = compare(results, first, second, protocol)
            rows.append((f"{first} − {second}", name, points(found), NONE if found.p is None else f"{found.p:.3g}"))
    return Table(
        title,
        ("runs", "protocol", "points [95 %]", "McNemar's p"),
        rows,
        "Paired: both runs have the same images and the judge's noise. Intervals from resampled images and draws; p is exact "
        "and not corrected for the number of comparisons here.",
    )


def compare(results: Results, first: str, second: str, protocol: str = OFFICIAL) -> Comparison:
    one, other = results.runs[first].verdicts["attacked"], results.runs[second].verdicts["attacked"]
    return protocols.compare(one, other, protocol)


def decided(found: Comparison) -> int:
    """`Comparison.conclusion`; without an exact p, of enough images: fewer that are resampled vary less than they would if they
    were drawn anew."""
    return found.conclusion if found.p is not None or found.images >= FEW else 0


def points(found: Comparison) -> str:
    low, high = found.interval
    if low == high:  # no resample differs: it is the images that do not, and not the defenses
        return f"{100 * found.difference:+.1f} [{NONE}]"
    return f"{100 * found.difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def says(results: Results, first: str, second: str, protocol: str = "average", *, under: str = "attack") -> str:
    """In a sentence, which of two runs is more accurate under what it met, if it can be told."""
    found = compare(results, first, second, protocol)
    p = "" if found.p is None else f", p = {found.p:.3g}"
    difference = f"{first} − {second}: {points(found)} points ({SHOWN[protocol]}, {counted(found.images, 'image')}{p})"
    if decided(found):
        better, worse = (first, second) if found.conclusion > 0 else (second, first)
        return f"Under {under} {better} is more accurate than {worse}; {difference}."
    if found.conclusion:
        return f"Under {under}, {difference}; of fewer than {FEW} images none is called a difference."
    return f"Under {under} {first} and {second} cannot be told apart; {difference}."


def few(results: Results) -> list[str]:
    """In words, what so few images cannot show."""
    images = max((run.count for run in results.runs.values()), default=_MANY)
    if images >= _MANY:
        return []
    half = wilson_interval(images // 2, images)
    return [
        f"{counted(images, 'image', 'show')} that this runs and what it looks like, and little of which defense is better: the "
        f"interval of 95 % of {images // 2} right among {images} is from {100 * half[0]:.0f} to {100 * half[1]:.0f} %."
    ]


def times(experiment: Experiment, cases: Sequence[Case]) -> list[float]:
    """That images are purified from, the longest first."""
    return sorted({*experiment.times, *(case.keywords["t"] for case in cases if "t" in case.keywords)}, reverse=True)


def setting(experiment: Experiment, scale: Scale, times: Iterable[float], specs: Iterable[Spec]) -> Table:
    """What was run, beside what is published.

    Args:
        times: That images are purified from.
        specs: Of all runs.
    """
    rows = [("as published", experiment.setting)]
    if experiment.simulates:
        rows.append(("here", f"{scale.paths:,} simulated paths for each point, no networks"))
        return Table("Setting", ("", ""), rows)
    for role in experiment.needs:
        network = scale.network(role)
        rows.append((ROLES[role], network.name + (f" ({network.weights})" if network.weights else "")))
    if experiment.cases:
        rows.append(("images", f"{scale.images or 'all'} of {scale.source}"))
        steps = [f"{scale.steps_of(t)} from t = {t:g}" for t in times]
        steps += [f"{NAMES.get(method, method.upper())}'s own" for method in _with_own_steps(experiment.cases)]
        if steps:
            rows.append(("steps of a purification", ", ".join(steps)))
        if followed := dict.fromkeys(_followed(spec) for spec in specs):
            rows.append(("gradient that attacks follow", ", ".join(filter(None, followed)) or NONE))
        if any(sizes(case.spec(scale)) for case in experiment.cases):
            rows.append(("budget", f"{scale.budget:g} of the work of an attack at its full size for an image"))
        rows.append(("seed", str(scale.seed)))
    return Table("Setting", ("", ""), rows)


def _with_own_steps(cases: Iterable[Case]) -> list[str]:
    """Methods whose steps no time sets."""
    methods = (str(case.keywords.get("method")) for case in cases if "t" not in case.keywords and "method" in case.keywords)
    return [method for method in dict.fromkeys(methods) if method != NO_DEFENSE]


def _followed(spec: Spec) -> str:
    """The gradient of the purification that attacks follow; "" of none."""
    settings = spec.settings()
    if settings is None or not any(attack.cost().gradient for attack in spec.stages().values()):
        return ""
    gradient = settings.gradient
    return gradient.name + ("" if gradient.differentiates_guidance or not gradient.flows else " (guidance detached)")


def attacks(scale: Scale, cases: Iterable[Case]) -> Table:
    """Sizes of the attacks, beside the published ones."""
    rows: dict[tuple[str, ...], None] = {}
    note = (
        "Draws: of the noise, for a gradient; questions: of an attack without gradients; targets: classes in turn. A row for "
        "stages of one size. Cut ones beside their full size, which is the published one where a suite is published."
    )
    whole = dataclasses.replace(scale, budget=1.0)
    for case in cases:
        spec = case.spec(scale)
        ball = f"{spec.norm}, {radius(str(spec.norm), float(spec.eps or 0))}" if case.keywords.get("eps") else NONE
        full, name = sizes_of_stages(case.spec(whole)), str(spec.to_dict()["attack"])
        by_size: dict[str, list[str]] = {}
        for stage, counts in sizes_of_stages(spec).items():
            by_size.setdefault(_counts(counts, full[stage]), []).append(stage)
        for said, stages in by_size.items():
            rows[name if len(by_size) == 1 else f"{name}: {', '.join(stages)}", ball, said, str(spec.draws)] = None
        if not by_size:
            rows[name, ball, NONE, str(spec.draws)] = None
    return Table("Attacks", ("attack", "ball", "size", "judge's draws"), list(rows), note)


def _counts(found: Mapping[str, int], full: Mapping[str, int]) -> str:
    words = {"iterations": "iteration", "eot_iter": "draw", "target_classes": "target", "queries": "question"}
    said = [
        counted(count, words[name]) if full[name] == count else f"{count} of {counted(full[name], words[name])}"
        for name, count in found.items()
        if full[name] > 1
    ]
    return ", ".join(said) or NONE


def differences(experiment: Experiment, results: Results) -> list[str]:
    """In words, what is not as published."""
    scale = results.scale
    if experiment.simulates:
        return []
    found = []
    default = SETS["paper"]
    others = [role for role in experiment.needs if scale.network(role).name != default.networks[role].name]
    if others:
        found.append(
            f"other networks ({', '.join(f'{ROLES[role]} {scale.network(role).name}' for role in others)}): published and "
            f"measured figures stand beside each other to be seen, and do not test each other"
        )
    found += experiment.differs
    if not experiment.cases:
        return found
    count = scale.images or max((run.count for run in results.runs.values()), default=None)
    if scale.source != default.data or count != experiment.images:
        images = "all images" if count is None else counted(count, "image")
        copies = " (JPEG copies: not the pixels that were published)" if are_jpeg(scale.source) else ""
        found.append(f"{images} of {scale.source}{copies}, and not those of the paper")
    published = dataclasses.replace(scale, steps=None)
    for t in times(experiment, results.cases)[:1]:
        if scale.steps_of(t) != published.steps_of(t):
            steps = counted(scale.steps_of(t), "step")
            of = " where a method has steps from there" if _with_own_steps(results.cases) else ""
            coarser = "a coarser discretisation of the same SDE"
            found.append(f"{steps} from t = {t:g}{of}, and not {published.steps_of(t)}: {coarser}")
    whole = dataclasses.replace(scale, budget=1.0)
    specs = [case.spec(scale) for case in results.cases]
    if any(sizes(spec) != sizes(case.spec(whole)) for case, spec in zip(results.cases, specs, strict=True)):
        found.append("smaller attacks than at their full size: robust accuracies here are likely above what that would find")
    if any(_followed(spec) == "exact" for spec in specs):
        found.append(
            "attacks follow the exact gradient of the steps that ran, and the published ones that of a continuous adjoint, "
            "which is another one (--gradient adjoint)"
        )
    return found


def work(results: Results) -> Table:
    """Of every run, where it is and what it took."""
    rows = []
    for name, run in results.runs.items():
        stages = run.happened
        seconds, asked = sum(stage.seconds for stage in stages), sum(stage.forward + stage.gradient for stage in stages)
        rows.append((name, run.folder.name, str(asked), duration(seconds), run.fingerprint[:16]))
    told = older(results)
    return Table(
        "Runs",
        ("run", "folder", "images through the defense", "work", "fingerprint"),
        rows,
        "Folders of `coupfast report`, for everything else about a run. Work: on the clock while its units ran, whatever else "
        f"the machine did.{f' {told.capitalize()}.' if told else ''}",
    )


def older(results: Results) -> str:
    """In words, what is of other versions of the software than this one; "" if nothing is."""
    here = environment(torch.device(results.scale.device))
    runs = sum(run.configuration["environment"] != here for run in results.runs.values())
    found = [counted(runs, "run")] if runs else []
    if results.measured and json.loads(str(results.measured.get(SOFTWARE, "null"))) != here:
        found.append("what was measured beside the runs" if results.runs else "what was measured")
    return f"of other versions of the software than the page: {' and '.join(found)}" if found else ""
