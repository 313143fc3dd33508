"""Table 3: BPDA + EOT on ADP, GDMP, DiffPure and COUP."""

from coupfast.evaluation.report import Section, Table
from coupfast.evaluation.report.published import TABLE_3
from coupfast.experiments import figures, tables
from coupfast.experiments.defenses import LOST, defense, threat
from coupfast.experiments.experiment import Case, Experiment, Results
from coupfast.experiments.tables import per_cent

_TWENTY = {"attack": "bpda-eot-20", **threat("Linf")}
_FORTY = {"attack": "bpda-eot", **threat("Linf")}
_FIFTY = {"attack": "bpda-eot", "iterations": 50, "draws": 150, **threat("Linf")}
_METHODS = {
    "ADP": ({"method": "adp"}, TABLE_3["adp"]),
    "GDMP": ({"method": "gdmp"}, TABLE_3["gdmp"]),
    "DiffPure": (defense("diffpure"), TABLE_3["diffpure"]),
    "COUP": (defense("coup"), TABLE_3["coup"]),
}
_RUNS = {
    **{name: (name, _TWENTY) for name in _METHODS},
    **{f"{name}, of 40": (name, _FORTY) for name in ("ADP", "GDMP")},
    **{f"{name}, of 50": (name, _FIFTY) for name in ("DiffPure", "COUP")},
}
#: The paper's DiffPure figure is of the long protocol; ADP's and GDMP's may be of 20 iterations or of 40.
_PUBLISHED = {name: _METHODS[_RUNS[name][0]][1].robust for name in _RUNS if name not in ("DiffPure", "COUP, of 50")}
_PROTOCOL = "mean logits"
_PAIRS = [("COUP", "DiffPure"), ("COUP", "GDMP"), ("COUP", "ADP"), ("COUP, of 50", "DiffPure, of 50")]


def _sections(results: Results) -> list[Section]:
    rows = []
    for name, run in results.runs.items():
        clean = _METHODS[_RUNS[name][0]][1].clean
        found = tables.robust(run, _PROTOCOL)
        draws = str(len(run.verdicts["clean"].logits))
        published = per_cent(_PUBLISHED.get(name))
        rows.append((name, per_cent(clean), tables.clean(run, _PROTOCOL), published, found, tables.robust(run), draws))
    table = Table(
        "BPDA + EOT in Linf, published beside measured",
        ("defense", "clean, published", "clean, here", "robust, published", "robust, here", "official", "judge's draws"),
        rows,
        "In %, with 95 % intervals over images; the mean logits of the judge's draws are right, as BPDA + EOT is judged. Of "
        "40, of 50: the attack has so many iterations at its full size, and else 20.",
    )
    bars = {"BPDA + EOT": {name: run.accuracies["attacked"][_PROTOCOL] for name, run in results.runs.items()}}
    note = (
        "By mean logits; lines are intervals of 95 % over images. Bars of 20, 40 and 50 iterations at full size are of three "
        "protocols. ADP's and GDMP's published figures may be of 20 or of 40, and stand beside both."
    )
    picture = figures.bars("Robust accuracy, published beside measured", bars, note, {"BPDA + EOT": _PUBLISHED})
    return [table, picture, tables.by_protocol(results), tables.compared(results, _PAIRS)]


def _concludes(results: Results) -> list[str]:
    return [tables.says(results, *pair, _PROTOCOL) for pair in _PAIRS] + [
        "BPDA takes the gradient of a purification for the identity, which is an attack on none of these methods in "
        "particular: robust accuracy under it says little of what an attacker finds who follows the exact gradient (table1, "
        "fig2b).",
        "The paper sets figures of several protocols beside each other: its own of 20 iterations, and those of other papers. "
        "Rows of one protocol can be compared here, those of two cannot.",
    ]


EXPERIMENT = Experiment(
    name="table3",
    place="Table 3",
    title="BPDA + EOT",
    asks="How accurate are ADP, GDMP, DiffPure and COUP if an attack takes a purification's gradient for the identity?",
    setting="PGD-20 in Linf 8/255 with BPDA + EOT; DiffPure's figure is its own paper's, of 50 iterations and a second look "
    "of 150 draws at what has fallen",
    cases=[Case(name, {**_METHODS[method][0], **attack}) for name, (method, attack) in _RUNS.items()],
    sections=_sections,
    concludes=_concludes,
    assumptions=(
        LOST,
        "ADP's and GDMP's own papers attack in 40 iterations with 15 copies, and the published figures may be those, or of the "
        "20 of the paper's text: here both have either.",
        "The step size and the draws of a gradient are not legible: 2/255 and 15 are assumed.",
        "DiffPure's protocol counts an image as fallen if the mean logits of 15 draws, and then of 150, are wrong. Here the "
        "strongest point of the attack is judged by the mean logits of so many fresh draws as the table says (150 at the full "
        "budget), also of images that never seemed to fall.",
        "ADP and GDMP were published with score networks of their own (NCSN, Ho's DDPM). Here all methods have one network, "
        "which is asked at the noise levels that theirs would be.",
    ),
)
