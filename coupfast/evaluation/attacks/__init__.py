"""Attacks by name. A new one is a file with an `Attack` in it and an entry in `SUITES` here.

A suite is what a user asks for: the stages that run one after the other on the images that still stand.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any, get_args

from coupfast.evaluation.attacks.autoattack import APGD, FABTargeted, Square, TargetedAPGD
from coupfast.evaluation.attacks.base import Attack, Cost, Result
from coupfast.evaluation.attacks.corruption import SaltAndPepper
from coupfast.evaluation.attacks.pgd import PGD, Drop

__all__ = ["ASSUMED", "SUITES", "Attack", "Cost", "Result", "attack_to_dict", "suite", "suite_gradient"]

# Stages by name, for a norm and a radius, at their published sizes.
SUITES: dict[str, Callable[[str, float], dict[str, Attack]]] = {
    "none": lambda norm, eps: {},
    "autoattack-standard": lambda norm, eps: {
        "apgd-ce": APGD(norm, eps),
        "apgd-t": TargetedAPGD(norm, eps),
        "fab-t": FABTargeted(norm, eps),
        "square": Square(norm, eps),
    },
    "autoattack-rand": lambda norm, eps: {
        "apgd-ce": APGD(norm, eps, eot_iter=20),
        "apgd-dlr": APGD(norm, eps, loss="dlr", eot_iter=20),
    },
    "apgd-ce": lambda norm, eps: {"apgd-ce": APGD(norm, eps)},
    # The 40 steps and 15 replicas of the field, and the 20 steps of COUP's Table 3, whose step size is taken to be 2/255.
    "bpda-eot": lambda norm, eps: {"bpda-eot": PGD(norm, eps, iterations=40, mean="logits", drop="mean")},
    "bpda-eot-20": lambda norm, eps: {"bpda-eot-20": PGD(norm, eps, iterations=20, mean="logits", drop="mean")},
    "pgd-eot": lambda norm, eps: {"pgd-eot": PGD(norm, eps, iterations=40, random_start=True)},
    "salt-and-pepper": lambda norm, eps: {"salt-and-pepper": SaltAndPepper()},
}


#: What a suite has on assumption, by the field that would set it: COUP's paper does not state it legibly.
ASSUMED: dict[str, dict[str, str]] = {
    "bpda-eot-20": {"eot_iter": "EOT 15 is an assumption", "step_size": "the step size of 2/255 is an assumption"},
    "salt-and-pepper": {"amount": "5 % of pixels is an assumption"},
}


def suite(name: str, norm: str, eps: float, changes: Mapping[str, Any] | None = None) -> dict[str, Attack]:
    """The stages of a suite.

    Args:
        name: A key of `SUITES`.
        norm: "Linf" or "L2".
        eps: Radius, for images in [0, 1].
        changes: Fields to set in every stage that has them (`iterations`, `eot_iter`, `queries`, `target_classes`, …).

    Raises:
        ValueError: for an unknown name, norm or radius, a field that no stage has, or a value that makes no sense.
    """
    if name not in SUITES:
        near = difflib.get_close_matches(name, SUITES, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"`attack` is one of {', '.join(SUITES)}, got {name!r}{hint}")
    if norm not in ("Linf", "L2"):
        raise ValueError(f"`norm` is 'Linf' or 'L2', got {norm!r}")
    if not 0 < eps < math.inf:
        raise ValueError(f"`eps` is a finite radius above 0 for images in [0, 1], got {eps!r}; 8/255 is {8 / 255:.6f}")
    if norm == "Linf" and eps >= 1:
        raise ValueError(f"`eps` = {eps:g} reaches every image in [0, 1]; in 0-255 units? {eps:g}/255 is {eps / 255:.6f}")
    if norm == "L2" and eps >= 8:
        published = "published radii are 0.5 to 3"
        raise ValueError(f"`eps` = {eps:g} in L2, where {published}; in 0-255 units? {eps:g}/255 is {eps / 255:.6f}")
    stages = SUITES[name](norm, eps)
    changes = {key: value for key, value in (changes or {}).items() if value is not None}
    unused = {key for key in changes if not any(key in _fields(attack) for attack in stages.values())}
    if unused:
        known = sorted({field for attack in stages.values() for field in _fields(attack)} - {"norm", "eps"})
        raise ValueError(f"{name!r} has no {', '.join(sorted(unused))} to set; it has {', '.join(known) or 'nothing to set'}")
    for field in ("iterations", "eot_iter", "queries", "target_classes"):
        if field in changes and changes[field] < 1:
            raise ValueError(f"`{field}` is at least 1, got {changes[field]!r}")
    if "step_size" in changes and not 0 < changes["step_size"] < math.inf:
        raise ValueError(f"`step_size` is a finite number above 0 for images in [0, 1], got {changes['step_size']!r}")
    if "drop" in changes and changes["drop"] not in get_args(Drop):
        raise ValueError(f"`drop` is one of {', '.join(get_args(Drop))}, got {changes['drop']!r}")
    if "amount" in changes and not 0 < changes["amount"] <= 1:
        raise ValueError(f"`amount` is a share of pixels in (0, 1], got {changes['amount']!r}")
    return {
        stage: dataclasses.replace(attack, **{k: v for k, v in changes.items() if k in _fields(attack)})  # type: ignore[type-var]
        for stage, attack in stages.items()
    }


def suite_gradient(name: str) -> str:
    """The gradient of the purifier that a suite is made for."""
    return "bpda" if name.startswith("bpda") else "exact"


def attack_to_dict(attack: Attack) -> dict[str, Any]:
    """An attack as JSON can hold it."""
    return {"class": type(attack).__name__, **{name: getattr(attack, name) for name in _fields(attack)}}


def _fields(attack: Attack) -> list[str]:
    return [field.name for field in dataclasses.fields(attack)]  # type: ignore[arg-type]
