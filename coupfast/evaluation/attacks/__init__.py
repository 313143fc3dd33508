"""Attacks: one frozen dataclass each. Which of them run one after the other, a suite says (`coupfast.evaluation.suites`)."""

from coupfast.evaluation.attacks.autoattack import APGD, FABTargeted, Square, TargetedAPGD
from coupfast.evaluation.attacks.base import Attack, Cost, Result
from coupfast.evaluation.attacks.corruption import SaltAndPepper
from coupfast.evaluation.attacks.diffhammer import DiffHammer
from coupfast.evaluation.attacks.iterative import InBall, Iterative
from coupfast.evaluation.attacks.knobs import count, knob
from coupfast.evaluation.attacks.pgd import BPDA, PGD
from coupfast.evaluation.attacks.stadv import StAdv
from coupfast.evaluation.attacks.transfer import Transfer

__all__ = [
    "APGD",
    "BPDA",
    "PGD",
    "Attack",
    "Cost",
    "DiffHammer",
    "FABTargeted",
    "InBall",
    "Iterative",
    "Result",
    "SaltAndPepper",
    "Square",
    "StAdv",
    "TargetedAPGD",
    "Transfer",
    "count",
    "knob",
]
