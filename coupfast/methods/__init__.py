"""Methods of purification, each one object with its own knobs.

What a method is stands in `base`; families of methods have a file each. A method from elsewhere is an object of one of the
classes of `base`, given as `method=` or named `package.module:NAME`.
"""

from __future__ import annotations

from coupfast.methods.adp import ADP
from coupfast.methods.base import Method, Networks, Recipe, StepMethod, StepState, TableMethod
from coupfast.methods.diffusion import COUP, DiffPure, DiffusionMethod, ReverseSDE, SolverMethod
from coupfast.methods.gdmp import GDMP
from coupfast.methods.gdmp_ssim import GDMPSSIM
from coupfast.methods.langevin import LangevinSDE
from coupfast.methods.lm import LM, GuidedLM
from coupfast.methods.one_step import OneStep
from coupfast.methods.rounds import MultiStage
from coupfast.methods.smoothing import DenoisedSmoothing
from coupfast.naming import reference_to

__all__ = [
    "ADP",
    "COUP",
    "GDMP",
    "GDMPSSIM",
    "LM",
    "METHODS",
    "DenoisedSmoothing",
    "DiffPure",
    "DiffusionMethod",
    "GuidedLM",
    "LangevinSDE",
    "Method",
    "MultiStage",
    "Networks",
    "OneStep",
    "Recipe",
    "ReverseSDE",
    "SolverMethod",
    "StepMethod",
    "StepState",
    "TableMethod",
    "method_name",
]

_TABLES = (COUP, ReverseSDE, DiffPure, MultiStage, LangevinSDE, GDMP, OneStep, DenoisedSmoothing)
_STEP_FUNCTIONS = (GDMPSSIM, ADP, LM, GuidedLM)

#: The methods of this package by the names that people call them; a new one is a class and one entry here.
METHODS: dict[str, type[Method]] = {method.name: method for method in (*_TABLES, *_STEP_FUNCTIONS)}


def method_name(method: Method | type[Method]) -> str:
    """Its name of `METHODS`, or `package.module:NAME`."""
    owner = method if isinstance(method, type) else type(method)
    return owner.name if METHODS.get(owner.name) is owner else reference_to(owner)
