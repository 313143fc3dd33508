"""Tables 1 and 2: AutoAttack's standard and rand, in Linf and in L2."""

from __future__ import annotations

from coupfast.evaluation.protocols import OFFICIAL
from coupfast.evaluation.report import Section, Table
from coupfast.evaluation.report.published import Figures
from coupfast.experiments import tables
from coupfast.experiments.defenses import NAMES, defense, threat
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

    def sections(results: Results) -> list[Section]:
        runs, rows = results.runs, []
        for method in ("none", *_DEFENDED):
            under = {suite: runs.get(_name(method, suite)) for suite in _SUITES}
            first = under["standard"]
            assert first is not None
            rand = under["rand"]
            low = first.accuracies["attacked"][OFFICIAL] if rand is None else tables.lower(rand, first)
            rows.append(
                (
                    NAMES[method],
                    per_cent(published[method].clean),
                    tables.clean(first),
                    per_cent(published[method].robust),
                    tables.accuracy(low),
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
        pairs = [(_name("coup", suite), _name("diffpure", suite)) for suite in _SUITES]
        return [table, tables.by_protocol(results), tables.compared(results, pairs)]

    def concludes(results: Results) -> list[str]:
        return [tables.says(results, _name("coup", suite), _name("diffpure", suite)) for suite in _SUITES] + [
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
        pictured=False,
    )


def _name(method: str, suite: str) -> str:
    return f"{NAMES[method]} ({suite})"
