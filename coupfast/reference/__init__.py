"""The definitions, slow and obvious: purification as a stochastic differential equation solved by torchsde, and step by step.

Everything fast is checked against this package. It shares the SDE's β, ᾱ and σ with the rest and nothing else: no table of
coefficients, no guidance code, no kernels; its noise is an argument. A method has a file of its own here:

* `sde`: COUP, the reverse SDE and DiffPure by Euler's steps, `purify_ref`, on a grid and with noise that are given.
* `rows`: methods that are no SDE but rows of coefficients, `rows_ref`: the formula, step by step.
* `adp`: adaptive denoising purification, `adp_ref`.
* `gdmp_ssim`: GDMP guided by structural similarity, `gdmp_ssim_ref`.
* `lm`: likelihood maximisation, `lm_ref`.
* `published`: what DiffPure's and COUP's code asks of torchsde, `purify_published`.

States are in the [-1, 1] scale here, and nothing clips unless it says so.
"""

from __future__ import annotations

from coupfast.reference.adp import adp_ref
from coupfast.reference.confidence import confidence_gradient
from coupfast.reference.gdmp_ssim import gdmp_ssim_ref
from coupfast.reference.lm import lm_ref
from coupfast.reference.published import purify_published
from coupfast.reference.rows import rows_ref
from coupfast.reference.sde import Dynamics, purify_ref

__all__ = [
    "Dynamics",
    "adp_ref",
    "confidence_gradient",
    "gdmp_ssim_ref",
    "lm_ref",
    "purify_published",
    "purify_ref",
    "rows_ref",
]
