"""Fast, exact, reproducible diffusion-based adversarial purification and its evaluation."""

from coupfast.budget import Plan
from coupfast.certificate import GradientCertificate, check_gradient
from coupfast.engines import Engine
from coupfast.evaluation import Evaluation, Spec, evaluate
from coupfast.gradients import BPDA, Adjoint, AdjointParameters, Exact, NoGradient, Surrogate
from coupfast.methods import COUP, DiffPure, Method, ReverseSDE, StepMethod, TableMethod
from coupfast.models.zoo import load_classifier, load_score
from coupfast.purify import PurifiedClassifier, Purifier, purify
from coupfast.sde import VPSDE
from coupfast.settings import Settings
from coupfast.solvers import CoefficientTable

__version__ = "0.1.0"

__all__ = [
    "Adjoint",
    "AdjointParameters",
    "BPDA",
    "COUP",
    "CoefficientTable",
    "DiffPure",
    "Engine",
    "Evaluation",
    "Exact",
    "GradientCertificate",
    "Method",
    "NoGradient",
    "Plan",
    "PurifiedClassifier",
    "Purifier",
    "ReverseSDE",
    "Settings",
    "Spec",
    "StepMethod",
    "Surrogate",
    "TableMethod",
    "VPSDE",
    "check_gradient",
    "evaluate",
    "load_classifier",
    "load_score",
    "purify",
]
