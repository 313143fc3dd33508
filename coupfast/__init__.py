"""Fast, exact, reproducible diffusion-based adversarial purification and its evaluation."""

from coupfast.certificate import GradientCertificate, check_gradient
from coupfast.models.zoo import load_classifier, load_score
from coupfast.purify import Plan, PurifiedClassifier, Purifier, purify
from coupfast.sde import VPSDE

__version__ = "0.1.0"

__all__ = [
    "VPSDE",
    "GradientCertificate",
    "Plan",
    "PurifiedClassifier",
    "Purifier",
    "check_gradient",
    "load_classifier",
    "load_score",
    "purify",
]
