"""Adaptive denoising purification: noise, then ascent along a score with a step that each image sets, and stops, for itself.

    u ← clip(u + σ_in z, 0, 1) once, and then, of images that have not stopped,
    g = s(u),   ρ = ⟨g, s(u + δ g)⟩ / ⟨g, g⟩,   α = clamp(λ δ / (1 − ρ), α_min, α_max)
    α ≤ τ: the image stops for good;   else u ← clip(u + α g, 0, 1)

Images u are in [0, 1] and s is the score of images with noise of standard deviation σ_s: s(u) = ∇ log p_{σ_s}(u) =
−ε̂(2u − 1; 2σ_s) / σ_s in the notation of `variance_exploding`.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from coupfast import reference
from coupfast.methods.base import Networks, StepMethod, StepState, clip
from coupfast.methods.diffusion import sde_option
from coupfast.methods.variance_exploding import check_continuous, check_noise_level, eps_hat_of_noised
from coupfast.noise import Noise
from coupfast.options import check_integer, check_number, option
from coupfast.sde import VPSDE


@dataclasses.dataclass(frozen=True, kw_only=True)
class ADP(StepMethod):
    """Adaptive denoising: noise, then steps along a score whose size and number each image sets. Yoon et al. 2021, alg. 1.

    The paper classifies the mean logits of ten purifications with noise of their own: ten draws here, whose verdict is
    the protocol "mean logits" of an evaluation with `draws=10`.

    The paper's score network knows noise levels, and its label stands for one of them: `score_sigma`. An NCSN comes in by
    `coupfast.models.adapters.NoiseFromScore`, and is then asked at the level nearest to it; a network of the VP-SDE is asked at
    the time t where σ(t)/sqrt ᾱ(t) = 2 score_sigma, on sqrt ᾱ(t) (2u − 1). Where such a score is linear along itself, a step
    takes λ of the noise away, and ten published ones leave 0.95¹⁰ = 60 % of it: `step_share` is the knob for a network that
    is told its level. The gradient contains the step size's; that an image stops is piecewise constant.

    Attributes:
        num_steps: Most steps of an image (10 as published).
        noise_sigma: σ_in, standard deviation on images in [0, 1], at least 0 (0.25 as published).
        score_sigma: σ_s, standard deviation on images in [0, 1], above 0 (0.25: it does not follow `noise_sigma`).
        step_share: λ, the share of the way to where the score would vanish that one step goes (0.05 as published).
        probe: δ, the step that ρ is measured with (1e-3 as published).
        step_min, step_max: α_min and α_max (1e-5 and 0.1 as published).
        stop_below: τ, at or below which an image stops (1e-3 as published).
        sde: The schedule of the network.

    Raises:
        TypeError: if a field is of another type.
        ValueError: if a number is outside of its range, every image would stop at once, the schedule is discrete, or no time
            up to 1 of it is as noisy as `score_sigma`.

    Example:
        >>> import coupfast
        >>> score = coupfast.load_score("cifar10-tiny")
        >>> coupfast.Purifier(score, method=coupfast.ADP(num_steps=5)).num_steps
        5
    """

    name: ClassVar[str] = "adp"
    reference: ClassVar[str] = "Yoon et al. 2021, arXiv:2106.06041, algorithm 1"

    num_steps: int = option(10, help="steps of the method", parse=int, metavar="K")
    noise_sigma: float = option(0.25, help="noise added first, on images in [0, 1]", parse=float, metavar="S")
    score_sigma: float = option(0.25, help="noise level of the score, on images in [0, 1]", parse=float, metavar="S")
    step_share: float = option(0.05, help="share of the way that one step goes, in (0, 1]", parse=float, metavar="L")
    probe: float = option(1e-3, help="step that the curvature is measured with, above 0", parse=float, metavar="D")
    step_min: float = option(1e-5, help="least step size, above 0", parse=float, metavar="A")
    step_max: float = option(0.1, help="largest step size", parse=float, metavar="A")
    stop_below: float = option(1e-3, help="step size at which an image stops, at least 0", parse=float, metavar="A")
    sde: VPSDE = sde_option(VPSDE())

    def __post_init__(self) -> None:
        super().__post_init__()
        check_continuous(self.sde)
        values = {
            "num_steps": check_integer("num_steps", self.num_steps, 1),
            "noise_sigma": check_number("noise_sigma", self.noise_sigma),
            "score_sigma": check_noise_level("score_sigma", self.score_sigma, self.sde, scale=2.0),
            "step_share": check_number("step_share", self.step_share, zero=False),
            "probe": check_number("probe", self.probe, zero=False),
            "step_min": check_number("step_min", self.step_min, zero=False),
            "step_max": check_number("step_max", self.step_max, zero=False),
            "stop_below": check_number("stop_below", self.stop_below),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if self.step_share > 1.0:
            raise ValueError(f"`step_share` is above 0 and at most 1, got {self.step_share:g}")
        if self.step_min > self.step_max:
            raise ValueError(f"`step_min` is at most `step_max`, got {self.step_min:g} and {self.step_max:g}")
        if self.stop_below >= self.step_max:
            raise ValueError(
                f"`stop_below` is {self.stop_below:g} and no step is above `step_max`={self.step_max:g}: every image would "
                "stop at once"
            )

    @property
    def num_noises(self) -> int:
        """One: what is added at first."""
        return 1

    @property
    def score_evaluations(self) -> int:
        """Two a step of an image that has not stopped."""
        return 2 * self.num_steps

    def start(self, x_in: torch.Tensor, noise: Noise) -> StepState:
        u = clip((x_in + 1.0) * 0.5 + self.noise_sigma * noise.z(0, x_in), 0.0, 1.0)
        return 2.0 * u - 1.0, torch.ones_like(x_in[:, :1, :1, :1])

    def step(self, k: int, state: StepState, noise: Noise, networks: Networks) -> StepState:
        x, going = state
        if not bool(going.any()):
            return state
        u = (x + 1.0) * 0.5
        g = self._score(u, networks)
        # 1 − ρ in the form that does not subtract nearly equal numbers: with δ = 1e-3 they share most of their digits.
        size = _dot(g, g)
        falls = _dot(g, g - self._score(u + self.probe * g, networks)) / torch.where(size > 0.0, size, 1.0)
        straight = falls == 0.0  # the score does not change along itself: the largest step
        alpha = self.step_share * self.probe / torch.where(straight, 1.0, falls)
        alpha = torch.where(straight, self.step_max, alpha).clamp(self.step_min, self.step_max)
        going = going * ((alpha.detach() > self.stop_below) & (size.detach() > 0.0))
        moved = 2.0 * clip(u + alpha * g, 0.0, 1.0) - 1.0
        return torch.where(going > 0.0, moved, x), going

    def _score(self, u: torch.Tensor, networks: Networks) -> torch.Tensor:
        sigma = torch.full_like(u[:, :1, :1, :1], 2.0 * self.score_sigma)
        return eps_hat_of_noised(networks, self.sde, 2.0 * u - 1.0, sigma) / -self.score_sigma

    def definition(self, state: StepState, networks: Networks, noise: Noise, steps: range) -> StepState:
        return reference.adp_ref(
            state,
            networks.score,
            noise.z(0, state[0]) if steps.start == 0 else None,
            len(steps),
            noise_sigma=self.noise_sigma,
            score_sigma=self.score_sigma,
            step_share=self.step_share,
            probe=self.probe,
            step_sizes=(self.step_min, self.step_max),
            stop_below=self.stop_below,
            sde=self.sde,
        )


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """⟨a, b⟩ of each image, shape (batch, 1, 1, 1)."""
    return (a * b).sum(dim=(1, 2, 3), keepdim=True)
