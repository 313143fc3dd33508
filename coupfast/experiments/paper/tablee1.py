"""Table E1 (Appendix E.1): salt-and-pepper noise."""

from coupfast.evaluation.report import Section, Table
from coupfast.experiments import figures, tables
from coupfast.experiments.defenses import LOST, NAMES, defense
from coupfast.experiments.experiment import Case, Experiment, Results
from coupfast.experiments.tables import per_cent

_PUBLISHED = {"none": 87.80, "reverse-sde": 92.60, "coup": 93.00}


def _sections(results: Results) -> list[Section]:
    rows = [
        (NAMES[method], tables.clean(run, "average"), per_cent(published), tables.robust(run, "average"))
        for (method, published), run in zip(_PUBLISHED.items(), results.runs.values(), strict=True)
    ]
    table = Table(
        "Accuracy under salt-and-pepper noise, published beside measured",
        ("defense", "clean, here", "noisy, published", "noisy, here"),
        rows,
        "In %, with 95 % intervals over images; the average over the judge's draws of the purification's noise.",
    )
    names = [NAMES[method] for method in _PUBLISHED]
    bars = {
        kind: {name: results.runs[name].accuracies[key]["average"] for name in names}
        for kind, key in (("clean", "clean"), ("salt and pepper", "attacked"))
    }
    marks = {"clean": {}, "salt and pepper": {NAMES[method]: value for method, value in _PUBLISHED.items()}}
    pairs = [(NAMES["coup"], NAMES["reverse-sde"]), (NAMES["coup"], NAMES["none"])]
    return [
        table,
        figures.bars("Accuracy", bars, "Lines are intervals of 95 % over images.", marks),
        tables.compared(results, pairs, "Differences of accuracy under this noise"),
    ]


EXPERIMENT = Experiment(
    name="tableE1",
    images=500,
    place="Appendix E.1",
    title="salt-and-pepper noise",
    asks="Does purification help against salt-and-pepper noise, which is no adversary, and does guidance add to it?",
    setting="500 images of CIFAR-10, WRN-28-10: 87.80 without purification, 92.60 with the reverse SDE, 93.00 with COUP",
    cases=[Case(NAMES[method], {**defense(method), "attack": "salt-and-pepper"}) for method in _PUBLISHED],
    sections=_sections,
    concludes=lambda results: [
        tables.says(results, NAMES["coup"], NAMES["reverse-sde"], under="this noise"),
        tables.says(results, NAMES["coup"], NAMES["none"], under="this noise"),
        "This noise has no adversary behind it: it says nothing of robustness to attacks.",
    ],
    assumptions=(
        "The amount of noise is not legible: 5 % of pixels, black or white with equal chance, is assumed.",
        "Which 500 images is not said: here they are the first. No t* is stated for this noise: it is that of Linf.",
        LOST,
    ),
)
