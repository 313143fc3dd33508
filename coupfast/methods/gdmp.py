"""Guided diffusion model for purification, with the mean squared error for its guide."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import numpy as np

from coupfast import reference
from coupfast.methods.base import Networks, Recipe, StepState, TableMethod
from coupfast.noise import Noise
from coupfast.options import check_integer, check_number, option
from coupfast.sde import NUM_LABELS, DiscreteVPSDE
from coupfast.solvers import CoefficientTable, noising, one_after_the_other


@dataclasses.dataclass(frozen=True, kw_only=True)
class GDMP(TableMethod):
    """Rounds of noising and clipped ancestral denoising, pulled towards the noised input. Wang et al. 2022, arXiv:2205.14969.

    On Ho's chain of 1000 steps (β 1e-4 … 0.02; index i is t = (i + 1)/1000), `rounds` times: x becomes
    sqrt(ᾱ_m) x + sqrt(1 − ᾱ_m) z, m = noise_steps − 1; then for i = m − 1 … 0, with x̂0 clipped to [-1, 1],

        x ← posterior mean of (x̂0, x) + σ_i² s_i ∇_x D + σ_i z (i > 0),        D = −MSE(x, sqrt(ᾱ_i) x_in + sqrt(1 − ᾱ_i) z′)

    where σ_i² = β_i (of i = 0 the posterior's of i = 1, as in Ho's "fixed large"), z′ is fresh in every step, x_in is the input
    of the whole purification and s_i = sqrt(1 − ᾱ_i)/(m_s sqrt(ᾱ_i)) with m_s = 2 radius/(3 scale). The published MSE is a mean
    over a whole batch of 100 images: its gradient is smaller by that factor, which is `guide_batch` here and does not follow
    the batch that happens to run. All of it is linear but the clip. Rounds chain on the unclipped state.

    Attributes:
        rounds: At least 1; 4 as published.
        noise_steps: Steps of the chain that a round noises by, 2 to 1000; one less are denoised, as published.
        guide_scale: Of m_s; 60000 as published with MSE. 0 is no guide.
        guide_radius: Of m_s, the attack's radius for images in [0, 1].
        guide_batch: Images that the mean is taken over, at least 1; 100 as published.
        image_elements: Elements of an image that the mean is taken over: 3 · 32 · 32.

    Raises:
        TypeError: if a field is of another type.
        ValueError: if a number is outside of its range.

    Example:
        >>> import coupfast
        >>> score = coupfast.load_score("cifar10-tiny")
        >>> coupfast.Purifier(score, method=coupfast.GDMP(rounds=1)).num_steps
        37
    """

    name: ClassVar[str] = "gdmp"
    reference: ClassVar[str] = "Wang et al. 2022, arXiv:2205.14969"

    rounds: int = option(4, help="rounds of noising and denoising", parse=int, metavar="N")
    noise_steps: int = option(
        37, help="steps of 1000 that a round noises by; it denoises one less", parse=int, metavar="N"
    )
    guide_scale: float = option(60000.0, help="strength of the guide; 0 is none", parse=float, metavar="G")
    guide_radius: float = option(8 / 255, help="radius that gdmp's guide is made for", parse=float, metavar="E")
    guide_batch: int = option(100, help="images that the published guide is a mean over", parse=int, metavar="N")
    image_elements: int = option(3 * 32 * 32, help="elements of an image, for gdmp's guide", parse=int, metavar="N")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "noise_steps", check_integer("noise_steps", self.noise_steps, 2, 1000))
        for name in ("rounds", "guide_batch", "image_elements"):
            object.__setattr__(self, name, check_integer(name, getattr(self, name), 1))
        for name in ("guide_scale", "guide_radius"):
            object.__setattr__(self, name, check_number(name, getattr(self, name), zero=name == "guide_scale"))

    def check_shape(self, image_shape: tuple[int, ...]) -> None:
        if math.prod(image_shape) != self.image_elements:
            raise ValueError(
                f"gdmp's guide is a mean over `image_elements` = {self.image_elements}, and images of shape {image_shape} have "
                f"{math.prod(image_shape)}: give that"
            )

    def recipe(self) -> Recipe:
        chain = DiscreteVPSDE()
        index = np.arange(self.noise_steps - 2, -1, -1)
        t = (index + 1) / 1000  # of the states that steps begin with
        signal, sigma = np.exp(0.5 * chain.log_alpha_bar(t)), chain.sigma(t)
        beta = -np.expm1(chain.log_alpha_bar(t) - chain.log_alpha_bar(index / 1000))
        variance = np.where(index > 0, beta, _posterior_variance_1(chain))
        scale = sigma / signal * (3.0 * self.guide_scale / (2.0 * self.guide_radius))
        pull = 2.0 * variance * scale / (self.image_elements * self.guide_batch)
        keep = np.sqrt(1.0 - beta)
        steps = CoefficientTable(
            t=np.append(t, 0.0),
            a=1.0 / keep - pull,
            b=-beta / (sigma * keep),
            c=np.zeros_like(t),
            d=np.where(index > 0, np.sqrt(variance), 0.0),
            e=pull * signal,
            f=pull * sigma,
            m=1.0 / signal,
            n=-sigma / signal,
            labels=NUM_LABELS * t,
        )
        level = self.noise_steps / 1000
        up = noising(0.0, level, float(np.exp(0.5 * chain.log_alpha_bar(level))), float(chain.sigma(level)))
        return Recipe(one_after_the_other([up, steps] * self.rounds))

    def definition(self, state: StepState, networks: Networks, noise: Noise, steps: range) -> StepState:
        x, x_in = state if len(state) == 2 else (state[0], state[0])
        knobs: dict[str, Any] = {name: getattr(self, name) for name in ("noise_steps", "guide_scale", "guide_radius")}
        x = reference.gdmp_ref(
            x,
            x_in,
            networks.score,
            lambda k: noise.z(k, x_in),
            lambda k: noise.z2(k, x_in),
            steps,
            elements=self.image_elements * self.guide_batch,
            **knobs,
        )
        return x, x_in


def _posterior_variance_1(chain: DiscreteVPSDE) -> float:
    """β̃ of index 1."""
    beta = -np.expm1(chain.log_alpha_bar(0.002) - chain.log_alpha_bar(0.001))
    return float(beta * chain.sigma(0.001) ** 2 / chain.sigma(0.002) ** 2)
