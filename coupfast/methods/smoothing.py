"""Denoised smoothing: Gaussian noise on the image, and one step of the network to what it was.

    x + 2σ z, z ~ N(0, 1), in the [-1, 1] scale, times α = 1/sqrt(1 + 4σ²), is the state at the time t where σ(t)/α(t) = 2σ;
    x̂0 = (α (x + 2σ z) − σ(t) ε̂)/α
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np

from coupfast import reference
from coupfast.methods.base import Networks, Recipe, StepState, TableMethod
from coupfast.methods.diffusion import sde_option
from coupfast.methods.variance_exploding import check_continuous, check_noise_level
from coupfast.noise import Noise
from coupfast.options import check_flag, option
from coupfast.sde import NUM_LABELS, VPSDE
from coupfast.solvers import CoefficientTable, noising, one_after_the_other


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoisedSmoothing(TableMethod):
    """Noise of a given standard deviation and one denoising step: what a smoothed classifier is made of. Carlini et al. 2022.

    Many draws of it, a classifier and Clopper and Pearson's bound certify an L2 radius: `coupfast.certify`. The noise is
    normal on the image as it is, and what it makes of it leaves [0, 1]: a certificate is about nothing else.

    Attributes:
        sigma: Standard deviation of the noise on images in [0, 1] (0.25, 0.5 and 1 are published).
        clip_denoised: Clip x̂0 to [-1, 1]; the gradient has the mask.
        sde: The schedule of the network.

    Raises:
        TypeError: if a field is of another type.
        ValueError: if no time up to 1 of the schedule is as noisy as `sigma`, or the schedule is discrete.

    Example:
        >>> import coupfast
        >>> score = coupfast.load_score("cifar10-tiny")
        >>> coupfast.Purifier(score, method=coupfast.DenoisedSmoothing(sigma=0.25)).num_steps
        2
    """

    name: ClassVar[str] = "denoised-smoothing"
    reference: ClassVar[str] = "Carlini et al. 2022, arXiv:2206.10550, algorithm 1"

    sigma: float = option(0.25, help="noise of denoised smoothing, on images in [0, 1]", parse=float, metavar="S")
    clip_denoised: bool = option(False, help="clip the predicted image to [-1, 1]")
    sde: VPSDE = sde_option(VPSDE())

    def __post_init__(self) -> None:
        super().__post_init__()
        check_continuous(self.sde)
        object.__setattr__(self, "sigma", check_noise_level("sigma", self.sigma, self.sde, scale=2.0))
        check_flag("clip_denoised", self.clip_denoised)

    @property
    def t(self) -> float:
        """The time at which the network is asked."""
        return self.sde.time_of(2.0 * self.sigma)

    def recipe(self) -> Recipe:
        t, zero = self.t, np.zeros(1)
        alpha = 1.0 / math.sqrt(1.0 + 4.0 * self.sigma**2)
        skip, out = np.array([1.0 / alpha]), np.array([-2.0 * self.sigma])
        clip = {"m": skip, "n": out} if self.clip_denoised else {}
        denoise = CoefficientTable(
            t=np.array([t, 0.0]), a=skip, b=out, c=zero, d=zero, labels=np.array([NUM_LABELS * t]), **clip
        )
        return Recipe(one_after_the_other([noising(0.0, t, alpha, 2.0 * self.sigma * alpha), denoise]))

    def definition(self, state: StepState, networks: Networks, noise: Noise, steps: range) -> StepState:
        x = state[0]
        z = noise.z(0, x) if steps.start == 0 else None
        return (reference.smoothing_ref(x, networks.score, z, steps, sigma=self.sigma, clip=self.clip_denoised, sde=self.sde),)
