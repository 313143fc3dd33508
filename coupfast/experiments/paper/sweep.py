"""Fig. 4: accuracies over a setting of the purification."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from coupfast.evaluation.report import Section, Table
from coupfast.experiments import figures, tables
from coupfast.experiments.defenses import APGD_CE, EOT_ASSUMED, LOST, threat
from coupfast.experiments.experiment import Case, Experiment, Results

_PROTOCOL = "average"


def experiment(
    *,
    name: str,
    place: str,
    title: str,
    asks: str,
    setting: str,
    across: str,
    points: Sequence[float],
    lines: Mapping[str, Callable[[float], dict[str, Any]]],
    tried: str,
) -> Experiment:
    """A run for each point of each line, under APGD-CE in Linf.

    Args:
        lines: What the purification is at a point, by defense.
        tried: What of the points is assumed.
    """

    def run_name(line: str, point: float) -> str:
        return f"{line} at {point:g}"

    def sections(results: Results) -> list[Section]:
        found, rows = {}, []
        for line in lines:
            for kind, label in (("clean", "clean"), ("attacked", "robust")):
                found[f"{line}, {label}"] = [
                    results.runs[run_name(line, point)].accuracies[kind][_PROTOCOL] for point in points
                ]
            for point in points:
                run = results.runs[run_name(line, point)]
                average = (tables.clean(run, _PROTOCOL), tables.robust(run, _PROTOCOL))
                rows.append((line, f"{point:g}", *average, tables.robust(run)))
        note = "The average over the judge's draws; bands are 95 %, the wider of Wilson's and of resampled images and draws."
        return [
            figures.curves(f"Accuracy over {across}, curves", across, points, found, note),
            Table(
                f"Accuracy over {across}",
                ("defense", across, "clean", "robust", "robust, official"),
                rows,
                "In %, with 95 % intervals over images; the average over the judge's draws, and the official verdict.",
            ),
        ]

    def concludes(results: Results) -> list[str]:
        said = []
        for line in lines:
            robust = {p: results.runs[run_name(line, p)].accuracies["attacked"][_PROTOCOL].value for p in points}
            best = max(robust, key=lambda point: robust[point])
            pairs = {p: (run_name(line, best), run_name(line, p)) for p in points if p != best}
            worse = [p for p, pair in pairs.items() if tables.decided(tables.compare(results, *pair, _PROTOCOL)) > 0]
            which = ", ".join(f"{point:g}" for point in worse) or "none of the others"
            few = min(results.runs[run_name(line, p)].count for p in points) < tables.FEW
            nothing = f"of fewer than {tables.FEW} images none of the others is told apart from it"
            told = nothing if few else f"told apart from it: {which}"
            said.append(
                f"The robust accuracy of {line} was highest at {across} {best:g} ({100 * robust[best]:.1f} %); {told} (paired, "
                "95 %, not corrected for choosing the best)."
            )
        return said + [
            "The setting is chosen and judged on the same images here: the accuracy at the best point is that of a choice made "
            "with the answers known, and likely lower on others."
        ]

    return Experiment(
        name=name,
        place=place,
        title=title,
        asks=asks,
        setting=setting,
        cases=[
            Case(run_name(line, point), {**purifier(point), **APGD_CE, **threat("Linf")})
            for line, purifier in lines.items()
            for point in points
        ],
        sections=sections,
        concludes=concludes,
        assumptions=(tried, LOST, EOT_ASSUMED),
    )
