"""Tables 1 and 2: AutoAttack's standard and rand, in Linf and in L2."""

from __future__ import annotations

from coupfast.evaluation.protocols import OFFICIAL, Accuracy
from coupfast.evaluation.report import Section, Table
from coupfast.evaluation.report.published import Figures
from coupfast.experiments import figures, tables
from coupfast.experiments.defenses import LOST, NAMES, defense, threat
from coupfast.experiments.experiment import Case, Experiment, Results
from coupfast.experiments.tables import per_cent

_SUITES = {"rand": "autoattack-rand", "standard": "autoattack-standard"}
_DEFENDED = ("diffpure", "coup")


def experiment(name: str, norm: str, place: str, setting: str, published: dict[str, Figures]) -> Experiment:
    """The table for a norm; published figures by method."""
    cases = [Case(_name("none", "standard"), {**defense("none"), "attack": _SUITES["standard"], **threat(norm)})]
    for method in _DEFENDED:
        for suite, attack in _SUITES.items():
            cases.append(Case(_name(method, suite), {**defense(method, norm), "attack": attack, **threat(norm)}))

    pairs = [(_name("coup", suite), _name("diffpure", suite)) for suite in _SUITES]

    def sections(results: Results) -> list[Section]:
        runs, rows = results.runs, []
        for method in ("none", *_DEFENDED):
            under = {suite: runs.get(_name(method, suite)) for suite in _SUITES}
            rows.append(
                (
                    NAMES[method],
                    per_cent(published[method].clean),
                    tables.clean(runs[_name(method, "standard")]),
                    per_cent(published[method].robust),
                    tables.accuracy(_lower(results, method)),
                    *(tables.NONE if run is None else tables.robust(run) for run in under.values()),
                )
            )
        table = Table(
            f"AutoAttack in {norm}, published beside measured",
            ("defense", "clean, published", "clean, here", "robust, published", "robust, here", "under rand", "under standard"),
            rows,
            "In %, with 95 % intervals over images. Robust is the lower of rand and standard, as the paper has it; a "
            "classifier without noise is attacked by standard only.",
        )
        bars = {
            "clean": {NAMES[method]: runs[_name(method, "standard")].accuracies["clean"][OFFICIAL] for method in published},
            "under AutoAttack": {NAMES[method]: _lower(results, method) for method in published},
        }
        marks = {
            "clean": {NAMES[method]: found.clean for method, found in published.items()},
            "under AutoAttack": {NAMES[method]: found.robust for method, found in published.items()},
        }
        note = "Official verdicts, under attack the lower of rand and standard; lines are intervals of 95 % over images."
        picture = figures.bars("Accuracy, published beside measured", bars, note, marks)
        return [table, picture, tables.by_protocol(results), tables.compared(results, pairs)]

    def concludes(results: Results) -> list[str]:
        coup, diffpure = (_name(method, _lowest(results, method)) for method in ("coup", "diffpure"))
        return [
            tables.says(results, coup, diffpure, OFFICIAL),
            *(tables.says(results, *pair) for pair in pairs),
            "Each defense counts by the suite that leaves the lower accuracy, as in the paper; the first sentence compares "
            "those two runs, and makes no allowance for having chosen them.",
            "Standard AutoAttack does not average over noise, and stops attacking an image at its first misclassification: "
            "of a defense with noise its official verdict tells less than the worst of several draws.",
        ]

    return Experiment(
        name=name,
        place=place,
        title=f"AutoAttack in {norm}",
        asks="How accurate are an undefended classifier, DiffPure and COUP under AutoAttack's standard and rand, the worse "
        "of the two counting?",
        setting=setting,
        cases=cases,
        sections=sections,
        concludes=concludes,
        assumptions=(LOST,),
    )


def _lower(results: Results, method: str) -> Accuracy:
    """Of rand and standard; of standard alone where there is no noise."""
    standard, rand = results.runs[_name(method, "standard")], results.runs.get(_name(method, "rand"))
    return standard.accuracies["attacked"][OFFICIAL] if rand is None else tables.lower(rand, standard)


def _lowest(results: Results, method: str) -> str:
    """The suite that leaves the lower official accuracy."""
    return min(_SUITES, key=lambda suite: results.runs[_name(method, suite)].accuracies["attacked"][OFFICIAL].value)


def _name(method: str, suite: str) -> str:
    return f"{NAMES[method]} ({suite})"
