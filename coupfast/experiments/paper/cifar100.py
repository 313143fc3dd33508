"""CIFAR-100 (Section 5.2.1): likelihood maximisation without and with COUP's guidance."""

from coupfast.evaluation.protocols import OFFICIAL
from coupfast.evaluation.report import Section, Table
from coupfast.experiments import figures, tables
from coupfast.experiments.defenses import APGD_CE, EOT_ASSUMED, threat
from coupfast.experiments.experiment import Case, Experiment, Results
from coupfast.experiments.scale import Scale
from coupfast.experiments.tables import per_cent

_METHODS = {"LM": ("lm", 38.67), "LM + COUP": ("lm-coup", 40.55)}


def _check(scale: Scale) -> None:
    missing = [f"--{role} NAME|FILE" for role in ("score", "classifier") if role not in scale.roles]
    missing += ["--data FILE.npz or a folder of its test images"] if scale.data is None else []
    if missing:
        raise ValueError(
            "cifar100 runs on CIFAR-100's networks and images, and none ship: its training images are in no package of the "
            f"index, so no small pair could be trained, and --networks tiny has nothing for it. Give {', '.join(missing)}: a "
            "score network of the VP-SDE (the paper's is of the architecture `cifar10-ddpm`, and the paper does not say where "
            "its weights are from; or one that an adapter makes one of) and a classifier of 100 classes (a file that says "
            "its configuration, as `coupfast convert` writes it). What the two methods do on CIFAR-10 with networks that ship, "
            "`coupfast evaluate --method lm` and `--method lm-coup` with `--attack apgd-ce` tell"
        )


def _sections(results: Results) -> list[Section]:
    rows = [
        (name, tables.clean(results.runs[name]), per_cent(published), tables.robust(results.runs[name]))
        for name, (_, published) in _METHODS.items()
    ]
    table = Table(
        "APGD-CE in Linf on CIFAR-100, published beside measured",
        ("defense", "clean, here", "robust, published", "robust, here"),
        rows,
        "In %, with 95 % intervals over images.",
    )
    bars = {"APGD-CE": {name: run.accuracies["attacked"][OFFICIAL] for name, run in results.runs.items()}}
    marks = {"APGD-CE": {name: published for name, (_, published) in _METHODS.items()}}
    return [
        table,
        figures.bars("Robust accuracy", bars, "Lines are intervals of 95 % over images.", marks),
        tables.by_protocol(results),
        tables.compared(results, [("LM + COUP", "LM")]),
    ]


EXPERIMENT = Experiment(
    name="cifar100",
    place="Section 5.2.1",
    title="CIFAR-100, likelihood maximisation with and without guidance",
    asks="Does guidance by the classifier's confidence help a purification that maximises likelihood, on CIFAR-100?",
    setting="DDPM architecture, the purification of Chen et al. 2023, APGD-CE; robust 38.67 without, 40.55 with guidance",
    cases=[Case(name, {"method": method, **APGD_CE, **threat("Linf")}) for name, (method, _) in _METHODS.items()],
    sections=_sections,
    concludes=lambda results: [tables.says(results, "LM + COUP", "LM")],
    assumptions=(
        "The radius is not legible: Linf 8/255 is assumed.",
        "λ, learning rate and steps are not stated: λ = 1, and Chen et al.'s 0.1 and 5.",
        "Chen et al.'s code fixes the seed of its noise; here noise is drawn anew each time, as of every method.",
        EOT_ASSUMED,
    ),
    check=_check,
    lacks="its networks and images do not ship: its training images are in no package of the index",
)
