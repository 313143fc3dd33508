"""Tables and texts of a report."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coupfast.evaluation import gradients, plan, protocols, purification
from coupfast.evaluation.protocols import OFFICIAL, PROTOCOLS, RESUBMISSION, Accuracy, Comparison, Judged
from coupfast.evaluation.report import published
from coupfast.evaluation.report.parts import Section, Table, Text
from coupfast.evaluation.report.read import Run, class_name
from coupfast.evaluation.spec import GIVEN, NETWORKS, in_fast_mode
from coupfast.evaluation.suites import SUITES, stated_errors, told_errors
from coupfast.wording import counted, radius

_PLAIN = {OFFICIAL: "official", "average": "average over draws", "worst": "worst of the draws"}
_TELLING = tuple(_PLAIN)


def _cell(found: Accuracy) -> str:
    low, high = found.wilson
    text = f"{100 * found.value:.1f} % ({protocols.count(found)}), {100 * low:.1f} to {100 * high:.1f}"
    if found.bootstrap is not None:
        text += f"; {100 * found.bootstrap[0]:.1f} to {100 * found.bootstrap[1]:.1f}"
    return text


def summary(runs: Sequence[Run]) -> Table:
    """What matters most of every run, a column each."""
    rows: list[tuple[str, ...]] = [
        ("defense", *(_defense(run) for run in runs)),
        ("attack", *(_attack(run) for run in runs)),
        ("images", *(str(run.count) for run in runs)),
    ]
    for kind in ("clean", "attacked"):
        for protocol in _TELLING:
            if any(kind in run.accuracies for run in runs):
                rows.append((f"{kind}: {_PLAIN[protocol]}", *(_short(run, kind, protocol) for run in runs)))
    rows += [
        ("judge's draws", *(str(len(run.verdicts["clean"].logits)) for run in runs)),
        ("purifications or classifications", *(str(sum(s.forward + s.gradient for s in run.happened)) for run in runs)),
        ("time of work", *(plan.duration(sum(stage.seconds for stage in run.happened)) for run in runs)),
    ]
    if any("certificate" in run.notes for run in runs):
        rows.append(("cosine of the gradient to the exact one", *(_cosine(run) for run in runs)))
    return Table("Summary", ("", *(run.name for run in runs)), rows, "Accuracies with Wilson's intervals of 95 % over images.")


def _short(run: Run, kind: str, protocol: str) -> str:
    if kind not in run.accuracies:
        return ""
    found = run.accuracies[kind][protocol]
    return f"{100 * found.value:.1f} % ({100 * found.wilson[0]:.1f} to {100 * found.wilson[1]:.1f})"


def _cosine(run: Run) -> str:
    overall = (run.notes.get("certificate") or {}).get("overall") or {}
    return "" if overall.get("cosine") is None else f"{overall['cosine']:.6g}"


def accuracies(run: Run) -> Table:
    draws = len(run.verdicts["clean"].logits)
    rows = [
        (protocols.describe(protocol, draws), *(_cell(found[protocol]) for found in run.accuracies.values()))
        for protocol in (OFFICIAL, *PROTOCOLS)
    ]
    for m in protocols.told(draws):
        rows.append((protocols.describe(RESUBMISSION, m), *(_cell(curve[m - 1]) for curve in run.resubmission.values())))
    for protocol, found in run.inside.items():
        rows.append((protocols.describe(protocol, run.verdicts["attacked"].inside_draws), "", _cell(found)))
    for figure in published.like(run):
        rows += _published(figure, draws)
    return Table(
        f"{run.name}: accuracy",
        ("protocol", *run.verdicts),
        rows,
        f"{_described(run)}. Intervals of 95 %: Wilson's over images; then, from resampled images and draws, a bootstrap's. "
        f"The clean accuracy by a protocol is what its attacked accuracy is to be compared with, but for the official one."
        f"{_official(run)}{_left(run)}{_unchanged(run)}{_gradients(run)}{_assumed(run)}",
    )


def _published(figure: published.Published, draws: int) -> list[tuple[str, ...]]:
    return [
        (f"{protocols.describe(protocol, draws)}, published: {figure.source}", f"{figure.clean:.2f} %", f"{value:.2f} %")
        for protocol, value in figure.robust.items()
    ]


@dataclasses.dataclass(frozen=True)
class Lower:
    """A defense under AutoAttack's `rand` and under its `standard`.

    Attributes:
        rand, standard: The runs, of one defense and ball.
        found: By protocol; see `protocols.lower`. Empty where they cannot be compared.
        error: Why not.
    """

    rand: Run
    standard: Run
    found: Mapping[str, tuple[Accuracy, Accuracy]]
    error: str = ""

    @property
    def draws(self) -> int:
        """That both have."""
        return min(len(run.verdicts["attacked"].logits) for run in (self.rand, self.standard))


def lower(pairs: Sequence[Lower]) -> list[Section]:
    """Of every defense that was evaluated under AutoAttack's `rand` and under its `standard`: the lower of both."""
    parts: list[Section] = []
    for pair in pairs:
        names = f"{pair.rand.name} and {pair.standard.name}"
        if pair.error:
            parts.append(Text(f"The lower of {names}", pair.error))
            continue
        draws = pair.draws
        rows = [(protocols.describe(name, draws), _cell(one), _cell(both)) for name, (one, both) in pair.found.items()]
        alike = published.like(pair.standard, published.LOWER)
        for figure in [figure for figure in published.like(pair.rand, published.LOWER) if figure in alike]:
            rows += [
                (f"{protocols.describe(protocol, draws)}, published: {figure.source}", f"{value:.2f} %", "")
                for protocol, value in figure.robust.items()
            ]
        parts.append(
            Table(
                f"The lower of {names}",
                ("protocol", "the lower accuracy of the two", "right under both, image by image"),
                rows,
                "AutoAttack's rand, for defenses with noise, and its standard, for those without: DiffPure and COUP publish "
                "the lower of the two robust accuracies. AutoAttack would count an image as robust only if it is right under "
                "both, which is never more. The lower of two estimates is, on average, a little below the lower of what they "
                "estimate. Attacked images; intervals of 95 %, Wilson's and a bootstrap's that takes the lower one anew in "
                "every resample.",
            )
        )
    return parts


def lowers(runs: Sequence[Run]) -> list[Lower]:
    """Runs of one defense and ball under AutoAttack's rand and standard, with what `protocols.lower` finds."""

    def setting(run: Run) -> tuple[Any, ...]:
        spec = run.configuration["spec"]
        return run.configuration["defense"], spec["norm"], spec["eps"]

    rand, standard = (
        [run for run in runs if run.configuration["spec"]["attack"] == f"autoattack-{version}"]
        for version in ("rand", "standard")
    )
    return [_lower_of(one, other) for one in rand for other in standard if setting(one) == setting(other)]


def _lower_of(rand: Run, standard: Run) -> Lower:
    verdicts = (rand.verdicts["attacked"], standard.verdicts["attacked"])
    try:
        found = {protocol: protocols.lower(*verdicts, protocol) for protocol in (OFFICIAL, *PROTOCOLS)}
    except ValueError as error:
        return Lower(rand, standard, {}, str(error))
    return Lower(rand, standard, found)


def _official(run: Run) -> str:
    if "attacked" not in run.verdicts:
        return ""
    return (
        f" That is about the images that each attack returns, the others about the strongest that any attack tried "
        f"({protocols.official_baseline(run.verdicts)})."
    )


def _left(run: Run) -> str:
    told = told_errors(stated_errors(run.configuration["stages"]))
    return f" Images left the attack by a test: {told}." if told else ""


def _unchanged(run: Run) -> str:
    attacked = run.verdicts.get("attacked")
    return f" {protocols.unchanged(attacked)}." if attacked is not None and attacked.unchanged else ""


def _gradients(run: Run) -> str:
    texts = []
    for found in gradients.followed(run.records.values()).values():
        text = f"Warning: {found.warning}" if found.useless else str(found)
        texts.append(f" {text[0].upper()}{text[1:]}.")
    return "".join(texts)


def _assumed(run: Run) -> str:
    spec = run.configuration["spec"]
    suite = SUITES.get(spec["attack"])
    assumed = [words for name, words in suite.assumed.items() if name not in spec["attack_options"]] if suite else []
    return f" That {' and that '.join(assumed)} of this project: the paper does not state it legibly." if assumed else ""


def _described(run: Run) -> str:
    name = _defense(run)
    stages = run.configuration["stages"]
    sizes = "; ".join(
        f"{stage}: " + ", ".join(f"{key} {value}" for key, value in fields.items() if _says(key, value))
        for stage, fields in stages.items()
    )
    return f"{counted(run.count, 'image')}, {name}; {_attack(run)}" + (f" ({sizes})" if sizes else "")


def _says(knob: str, value: Any) -> bool:
    """Whether a stage's field tells a reader something: a ball is told of the run, and what is off need not be."""
    return knob not in ("class", "norm", "eps") and value is not None and value is not False


def _defense(run: Run) -> str:
    spec = run.configuration["spec"]
    built = None if spec["defense"] == GIVEN else spec["defense"]
    return purification.words(run.configuration["defense"], built=built, alone=spec["purifier"] is None)


def _attack(run: Run) -> str:
    spec = run.configuration["spec"]
    if not run.configuration["stages"]:
        return "no attack"
    # Salt and pepper knows no ball.
    ball = any("eps" in fields for fields in run.configuration["stages"].values())
    name = f"{spec['attack']}{in_fast_mode(run.configuration)}"
    return name + (f" {spec['norm']} {_radius(spec)}" if ball else "") + _begun(run)


def _begun(run: Run) -> str:
    """Where the attack began, if not at clean images."""
    start = run.configuration.get("start")
    if start is None:
        return ""
    ball = f"{start['norm']} {_radius(start)}"
    return f", begun from the adversarial images of {Path(start['run']).name} ({start['attack']} {ball}, projected)"


def _radius(spec: Mapping[str, Any]) -> str:
    return radius(spec["norm"], spec["eps"])


def comparison(first: Run, second: Run) -> list[Section]:
    names = (first.name, second.name)
    seeds = {run.configuration["spec"]["seed"] for run in (first, second)}
    noise = "noise of their own, since their seeds differ"
    if len(seeds) == 1:
        noise = (
            "in the judge's draws common noise (the official row's follows units of work: it is common only where stage, shard "
            "and the images in it are)"
        )
    parts: list[Section] = []
    for kind in ("clean", "attacked"):
        if kind not in first.verdicts or kind not in second.verdicts:
            continue
        a, b = first.verdicts[kind], second.verdicts[kind]
        try:
            found = {protocol: protocols.compare(a, b, protocol) for protocol in (OFFICIAL, *PROTOCOLS)}
        except ValueError as error:
            return [Text(f"{names[0]} against {names[1]}", str(error))]
        rows = [
            (
                protocols.describe(protocol, c.draws),
                f"{100 * c.difference:+.1f} ({100 * c.interval[0]:+.1f} to {100 * c.interval[1]:+.1f})",
                "" if c.only_first is None else f"{c.only_first} / {c.only_second}",
                "" if c.p is None else f"{c.p:.3g}",
            )
            for protocol, c in found.items()
        ]
        warnings = protocols.contradictions(names, found)
        if shared := _shared(a, b, found[OFFICIAL]):
            warnings.insert(0, shared)
        if kind == "attacked" and first.configuration["stages"] != second.configuration["stages"]:
            warnings.insert(0, "they were not attacked in the same way")
        quiet = "No protocol contradicts another." if any(c.conclusion for c in found.values()) else "None tells them apart."
        parts.append(
            Table(
                f"{names[0]} against {names[1]}, {kind}",
                ("protocol", "difference in points (95 %)", "right in one only", "McNemar's exact p"),
                rows,
                f"The same images, {noise}. "
                + (f"Warning: {'; '.join(warnings)}." if warnings else quiet)
                + " Not corrected for testing several protocols.",
            )
        )
    return parts


def _shared(first: Judged, second: Judged, common: Comparison) -> str:
    """In words, what of two runs was not compared, since only one of them has it."""
    parts = []
    if max(len(first.labels), len(second.labels)) > common.images:
        images = counted(common.images, "image")
        parts.append(f"on the {images} that both have, of {len(first.labels)} and {len(second.labels)}")
    if max(len(first.logits), len(second.logits)) > common.draws:
        parts.append(f"on the first {counted(common.draws, 'draw')}, of {len(first.logits)} and {len(second.logits)}")
    return f"compared {' and '.join(parts)}" if parts else ""


def classes(runs: Sequence[Run]) -> list[Section]:
    parts: list[Section] = []
    for run in runs:
        labels = run.verdicts["clean"].labels
        rows = []
        for label in sorted(set(labels.tolist())):
            here = labels == label
            cells = []
            for kind in run.verdicts.values():
                for protocol in (OFFICIAL, "average"):
                    low, high = protocols.wilson_interval(float(protocols.scores(kind, protocol)[here].sum()), int(here.sum()))
                    value = 100 * protocols.scores(kind, protocol)[here].mean()
                    cells.append(f"{value:.1f} % ({100 * low:.0f} to {100 * high:.0f})")
            rows.append((class_name(run, label), str(int(here.sum())), *cells))
        columns = [f"{kind}, {protocol}" for kind in run.verdicts for protocol in (OFFICIAL, "average over draws")]
        parts.append(Table(f"{run.name}: by class", ("class", "images", *columns), rows, "Wilson's intervals of 95 %."))
    return parts


def found_by_stage(run: Run) -> list[Section]:
    """What each stage of the attack found."""
    rows = []
    for stage in run.configuration["stages"]:
        records = [record for record in run.records.values() if record.unit.stage == stage]
        attacked = sum(len(record.unit.images) for record in records)
        fooled = attacked - sum(len(record.standing) for record in records)
        rows.append((stage, str(attacked), str(fooled), str(sum(len(record.onward) for record in records))))
    if not rows:
        return []
    fast = run.configuration["spec"].get("mode") == "fast"
    onward = "those that it did not let go by a test, or the others if it has none" if fast else "the others"
    return [
        Table(
            f"{run.name}: what each stage found",
            ("stage", "images attacked", "of these fooled", "went on"),
            rows,
            f"Fooled: misclassified on one fresh draw after the stage. Went on: {onward}, which the next stage attacks.",
        )
    ]


def time(run: Run) -> Table | Text:
    predicted = run.notes.get("plan")
    if predicted is not None:
        return Text(f"{run.name}: what was planned and what it took", plan.beside(plan.Plan.from_dict(predicted), run.happened))
    rows = [
        (stage.name, str(stage.images), str(stage.forward), str(stage.gradient), plan.duration(stage.seconds))
        for stage in run.happened
    ]
    total = (sum(s.forward for s in run.happened), sum(s.gradient for s in run.happened), sum(s.seconds for s in run.happened))
    rows.append(("all", "", str(total[0]), str(total[1]), plan.duration(total[2])))
    return Table(
        f"{run.name}: what it took",
        ("stage", "images", "through the defense without gradient", "with gradient", "time"),
        rows,
        "Time of work, all workers together.",
    )


def certificate(run: Run) -> list[Section]:
    certificate = run.notes.get("certificate")
    if certificate is None:
        return []
    fields = {**certificate, **{f"overall.{name}": value for name, value in (certificate["overall"] or {}).items()}}
    rows = [
        (name, f"{value:.3g}" if isinstance(value, float) else str(value))
        for name, value in fields.items()
        if not isinstance(value, (list, dict))
    ]
    of = counted(len(certificate["ids"]), "image")
    note = f"Of {of}, against float64 back-propagation through the definition; see check-gradient."
    return [Table(f"{run.name}: certificate of the gradient that the attack followed", ("what", "value"), rows, note)]


def configuration(run: Run) -> Table:
    spec = run.configuration["spec"]
    spec = {**spec, "eps": _radius(spec)}
    if spec["defense"] is not None:
        # It has networks of its own: a spec's are those that would be taken if none were given.
        spec = {name: value for name, value in spec.items() if name not in NETWORKS}
    rows = [("started", run.started), ("fingerprint of the results", run.fingerprint)]
    for section in ("environment", "defense", "images", "spec"):
        for name, value in _flat(spec if section == "spec" else run.configuration[section]):
            # What was not set follows from the stages below.
            if name not in ("labels", "sha256") and (section, value) not in (("spec", None), ("spec", {})):
                rows.append((f"{section}.{name}", value if isinstance(value, str) else json.dumps(value)))
    return Table(f"{run.name}: configuration, versions, hashes", ("what", "value"), rows)


def _flat(fields: Mapping[str, Any], name: str = "") -> list[tuple[str, Any]]:
    """Fields of fields as name.name."""
    rows: list[tuple[str, Any]] = []
    for key, value in fields.items():
        rows += _flat(value, f"{name}{key}.") if isinstance(value, dict) and value else [(f"{name}{key}", value)]
    return rows


def stages(run: Run) -> list[Section]:
    stages: dict[str, dict[str, Any]] = run.configuration["stages"]
    if not stages:
        return []
    fields = list(dict.fromkeys(name for stage in stages.values() for name in stage))
    rows = []
    for stage, values in stages.items():
        told = {**values, "eps": _radius(values)} if {"norm", "eps"} <= set(values) else values
        rows.append((stage, *(str(told.get(name, "")) for name in fields)))
    return [Table(f"{run.name}: stages of the attack", ("stage", *fields), rows)]


def again(run: Run) -> Text:
    words = shlex.split(run.command)
    for i, word in enumerate(words):
        # Into a folder of its own: the one that was named holds this run.
        if word == "--out" and i + 1 < len(words):
            words[i + 1] += "-again"
        elif word.startswith("--out="):
            words[i] += "-again"
    return Text(f"{run.name}: the command to repeat it", shlex.join(words) or "(started from Python)")
