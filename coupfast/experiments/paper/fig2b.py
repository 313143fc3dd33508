"""Fig. 2b: APGD-CE on two classifiers, without and with guidance."""

from coupfast.evaluation.protocols import OFFICIAL
from coupfast.evaluation.report import Section, Table
from coupfast.experiments import figures, tables
from coupfast.experiments.defenses import APGD_CE, EOT_ASSUMED, LOST, NAMES, defense, threat
from coupfast.experiments.experiment import Case, Experiment, Results

_METHODS = ("diffpure", "reverse-sde", "coup")
_ROLES = {"classifier": "first classifier", "second": "second classifier"}


def _name(method: str, role: str) -> str:
    return f"{NAMES[method]} ({_ROLES[role]})"


def case(method: str, role: str = "classifier") -> Case:
    """APGD-CE in Linf on a method; other figures are made of the same runs."""
    return Case(_name(method, role), {**defense(method), **APGD_CE, **threat("Linf")}, classifier=role)


def _sections(results: Results) -> list[Section]:
    groups, rows = {}, []
    for role, what in _ROLES.items():
        name = f"{what}\n{results.scale.network(role).name}"
        groups[name] = {NAMES[m]: results.runs[_name(m, role)].accuracies["attacked"][OFFICIAL] for m in _METHODS}
        for method in _METHODS:
            run = results.runs[_name(method, role)]
            rows.append((NAMES[method], results.scale.network(role).name, tables.clean(run), tables.robust(run)))
    pairs = [(_name("coup", role), _name(other, role)) for role in _ROLES for other in ("reverse-sde", "diffpure")]
    return [
        figures.bars("Robust accuracy under APGD-CE", groups, "Official verdicts; lines are intervals of 95 % over images."),
        Table(
            "APGD-CE in Linf on two classifiers",
            ("defense", "classifier", "clean", "robust"),
            rows,
            "In %, with 95 % intervals over images. The paper shows bars and no numbers.",
        ),
        tables.by_protocol(results),
        tables.compared(results, pairs),
    ]


def _concludes(results: Results) -> list[str]:
    said = [tables.says(results, _name("coup", role), _name("reverse-sde", role)) for role in _ROLES]
    return said + [tables.says(results, _name("reverse-sde", role), _name("diffpure", role)) for role in _ROLES]


EXPERIMENT = Experiment(
    name="fig2b",
    place="Fig. 2b",
    title="APGD-CE on two classifiers",
    asks="Does guidance help on more than one architecture, and does it help to leave out DiffPure's noising?",
    setting="APGD-CE in Linf 8/255 on WRN-28-10 and WRN-70-16, t* = 0.1 in 100 steps; a bar chart without numbers",
    cases=[case(method, role) for role in _ROLES for method in _METHODS],
    sections=_sections,
    concludes=_concludes,
    assumptions=(LOST, EOT_ASSUMED),
)
