"""The definitions, slow and obvious: purification as a stochastic differential equation solved by torchsde, and step by step.

Everything fast is checked against this package. It shares the SDE's β, ᾱ and σ with the rest and nothing else: no table of
coefficients, no guidance code, no kernels; its noise is an argument. A method has a file of its own here:

* `sde`: COUP, the reverse SDE and DiffPure by Euler's steps, `purify_ref`, on a grid and with noise that are given.
* `rows`: methods that are no SDE but rows of coefficients, `rows_ref`: the formula, step by step.
* `samplers`: other solvers of a diffusion model, a loop each over the equation of its paper; `solve_ref` finds them by name.
* `gdmp`, `gdmp_ssim`, `langevin`, `lm`, `one_step`, `smoothing`, `adp`: the methods of those names.
* `published`: what DiffPure's and COUP's code asks of torchsde, `purify_published`.

States are in the [-1, 1] scale here, and nothing clips unless it says so.
"""

from __future__ import annotations

from coupfast.reference.adp import adp_ref
from coupfast.reference.confidence import confidence_gradient
from coupfast.reference.gdmp import gdmp_ref
from coupfast.reference.gdmp_ssim import gdmp_ssim_ref
from coupfast.reference.guided_noise import GuidedNoise
from coupfast.reference.langevin import langevin_ref
from coupfast.reference.lm import lm_ref
from coupfast.reference.one_step import one_step_ref
from coupfast.reference.published import purify_published
from coupfast.reference.rows import rows_ref
from coupfast.reference.sde import Dynamics, purify_ref
from coupfast.reference.smoothing import smoothing_ref
from coupfast.reference.solve import DEFINED, solve_ref

__all__ = [
    "DEFINED",
    "Dynamics",
    "GuidedNoise",
    "adp_ref",
    "confidence_gradient",
    "gdmp_ref",
    "gdmp_ssim_ref",
    "langevin_ref",
    "lm_ref",
    "one_step_ref",
    "purify_published",
    "purify_ref",
    "rows_ref",
    "smoothing_ref",
    "solve_ref",
]
