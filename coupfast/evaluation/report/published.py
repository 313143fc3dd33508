"""Published figures, to print beside measured ones where the setting is the same, and marked as published."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from coupfast.evaluation.report.read import Run
from coupfast.settings import Settings

LOWER = "lower of rand and standard"


@dataclasses.dataclass(frozen=True)
class Published:
    """One published evaluation on CIFAR-10's test images.

    Attributes:
        source: Where it is published.
        method, t, steps: Of the purification, with the score network of Score SDE (`cifar10-ddpmpp-deep`).
        classifier: Its name here.
        norm, eps: Of the attack.
        attack: The suite, at its published size; `LOWER` where two are combined.
        gradient: That the attack followed.
        clean: In per cent.
        robust: In per cent, by protocol as the tables here name it.
    """

    source: str
    method: str
    t: float
    steps: int
    classifier: str
    norm: str
    eps: float
    attack: str
    gradient: str
    clean: float
    robust: dict[str, float]


class Figures(NamedTuple):
    """Of a row of a table, in per cent."""

    clean: float
    robust: float


#: Tables 1 to 3 of Zhang et al. 2024 by method: AutoAttack in Linf and in L2, the lower of rand and standard; BPDA + EOT.
TABLE_1 = {"none": Figures(96.09, 0.0), "diffpure": Figures(89.02, 70.64), "coup": Figures(90.04, 73.05)}
TABLE_2 = {"none": Figures(96.09, 0.0), "diffpure": Figures(91.03, 78.58), "coup": Figures(92.58, 83.13)}
TABLE_3 = {
    "adp": Figures(86.14, 70.01),
    "gdmp": Figures(93.50, 76.22),
    "diffpure": Figures(89.02, 81.40),
    "coup": Figures(90.04, 83.20),
}

_COUP = "Zhang et al. 2024 (COUP)"
_BPDA = f"{_COUP}, table 3, which does not state EOT, step and way of counting legibly"
_MAE = "MAE-Pure's re-measurement"
# Not here, since the setting is another one: figures of networks, images or methods that need other networks than these;
# MAE-Pure's in L2, whose purification time is not known; DiffBreak's under AutoAttack, whose APGD there has no momentum; and
# DiffHammer's, whose published code does not do what this project's does.
PUBLISHED = (
    *(
        Published(source, method, t, steps, "wrn-28-10", norm, eps, attack, gradient, found.clean, {"official": found.robust})
        for source, t, steps, norm, eps, attack, gradient, table in (
            (_COUP, 0.1, 100, "Linf", 8 / 255, LOWER, "adjoint", TABLE_1),
            (_COUP, 0.075, 75, "L2", 0.5, LOWER, "adjoint", TABLE_2),
            (_BPDA, 0.1, 100, "Linf", 8 / 255, "bpda-eot-20", "bpda", TABLE_3),
        )
        for method, found in table.items()
        if method in ("coup", "diffpure")
    ),
    Published(_MAE, "coup", 0.1, 100, "wrn-28-10", "Linf", 8 / 255, "pgd-eot", "exact", 90.33, {"single": 41.72}),
    Published(_MAE, "diffpure", 0.1, 100, "wrn-70-16", "Linf", 8 / 255, "pgd-eot", "exact", 92.50, {"single": 42.20}),
)


def like(run: Run, attack: str | None = None) -> list[Published]:
    """Published evaluations of the setting of a run: images, networks and their weights, all of the defense, ball, attack and
    gradient.

    Args:
        attack: In the place of the run's own.
    """
    spec, defense = run.configuration["spec"], run.configuration["defense"]
    if spec["defense"] is not None or spec["guide"] is not None or "method" not in defense:
        return []
    if spec["images"] != "cifar10-512" or spec["limit"] not in (None, 512) or spec["score"] != "cifar10-ddpmpp-deep":
        return []
    # Attacks at their published size, which the fast mode cuts short.
    other_size = spec["attack_options"] or spec.get("mode", "full") != "full" or spec.get("start_from") is not None
    if other_size or "random" in (spec["score_weights"], spec["classifier_weights"]):
        return []
    here = {"classifier": spec["classifier"], "norm": spec["norm"], "eps": spec["eps"], "attack": attack or spec["attack"]}
    return [
        figure
        for figure in PUBLISHED
        if all(getattr(figure, name) == value for name, value in here.items()) and _purifies_like(defense, figure)
    ]


def _purifies_like(defense: Mapping[str, Any], figure: Published) -> bool:
    settings, gradient = Settings.of(method=figure.method, t=figure.t, gradient=figure.gradient), defense["gradient"]
    # None is the published number: one every 1e-3.
    published, here = ({**method, "num_steps": None} for method in (settings.to_dict()["method"], defense["method"]))
    # Published adjoints take COUP's guidance for a constant.
    guidance = "detached" if figure.gradient == "adjoint" else "exact"
    if settings.method.guided and gradient.get("guidance", guidance) != guidance:
        return False
    return gradient["name"] == figure.gradient and here == published and defense["num_steps"] == figure.steps
