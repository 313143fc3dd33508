"""Fast, exact, reproducible diffusion-based adversarial purification and its evaluation."""

import importlib
from typing import Any

from coupfast.budget import Plan
from coupfast.certificate import GradientCertificate
from coupfast.engines import Engine
from coupfast.gradient_check import check_gradient
from coupfast.gradients import BPDA, Adjoint, AdjointParameters, Exact, NoGradient, Surrogate
from coupfast.methods import (
    ADP,
    COUP,
    GDMP,
    GDMPSSIM,
    LM,
    DenoisedSmoothing,
    DiffPure,
    GuidedLM,
    LangevinSDE,
    Method,
    MultiStage,
    OneStep,
    ReverseSDE,
    StepMethod,
    TableMethod,
)
from coupfast.models.zoo import load_classifier, load_score
from coupfast.purify import PurifiedClassifier, Purifier, purify
from coupfast.sde import VPSDE
from coupfast.settings import Settings
from coupfast.solvers import DDIM, Ancestral, CoefficientTable, DPMSolverPP2M, SDEDPMSolver1, SDEDPMSolverPP2M

__version__ = "0.1.0"

__all__ = [
    "ADP",
    "Adjoint",
    "AdjointParameters",
    "Ancestral",
    "BPDA",
    "COUP",
    "Certification",
    "CoefficientTable",
    "DDIM",
    "DPMSolverPP2M",
    "DenoisedSmoothing",
    "DiffPure",
    "Engine",
    "Evaluation",
    "Exact",
    "GradientCertificate",
    "GDMP",
    "GDMPSSIM",
    "GuidedLM",
    "LM",
    "LangevinSDE",
    "Method",
    "MultiStage",
    "NoGradient",
    "OneStep",
    "Plan",
    "PurifiedClassifier",
    "Purifier",
    "ReverseSDE",
    "SDEDPMSolver1",
    "SDEDPMSolverPP2M",
    "Settings",
    "Spec",
    "StepMethod",
    "Surrogate",
    "TableMethod",
    "VPSDE",
    "certify",
    "check_gradient",
    "evaluate",
    "load_classifier",
    "load_score",
    "purify",
]

_OF_EVALUATION = ("Certification", "Evaluation", "Spec", "certify", "evaluate")


def __getattr__(name: str) -> Any:
    # Loaded when asked for: a purification needs no ledger, no workers and no attacks.
    if name not in _OF_EVALUATION:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("coupfast.evaluation"), name)
