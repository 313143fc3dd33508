"""Attacks: one frozen dataclass each. Which of them run one after the other, a suite says (`coupfast.evaluation.suites`)."""

from coupfast.evaluation.attacks.autoattack import APGD, FABTargeted, Square, TargetedAPGD
from coupfast.evaluation.attacks.base import Attack, Cost, Result
from coupfast.evaluation.attacks.corruption import SaltAndPepper
from coupfast.evaluation.attacks.knobs import count, knob
from coupfast.evaluation.attacks.pgd import BPDA, PGD

__all__ = [
    "APGD",
    "BPDA",
    "PGD",
    "Attack",
    "Cost",
    "FABTargeted",
    "Result",
    "SaltAndPepper",
    "Square",
    "TargetedAPGD",
    "count",
    "knob",
]
