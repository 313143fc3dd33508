"""Likelihood maximisation by a denoiser, and the same with COUP's guidance: a few Adam steps on the image.

    loss(x) = ‖D(x + σ z; σ) − x‖² [− λ log max_y p(y | x)],   z ~ N(0, 1), σ ~ U(σ_min, σ_max), fresh for each image and step
    m ← β₁ m + (1 − β₁) ∇loss,   v ← β₂ v + (1 − β₂) ∇loss²,   x ← x − lr (m / (1 − β₁ᵏ)) / (sqrt(v / (1 − β₂ᵏ)) + 1e-8)

D(y; σ) = y − σ ε̂(y; σ) is the denoiser of a network of the VP-SDE (`variance_exploding`); ∇loss goes through D and through x.
The norm is a sum over an image's elements and the loss one of each image alone. Adam: Kingma and Ba 2015, arXiv:1412.6980.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from coupfast import reference
from coupfast.methods.base import Networks, StepMethod, StepState
from coupfast.methods.diffusion import sde_option
from coupfast.methods.variance_exploding import check_continuous, check_noise_level, eps_hat_of_noised
from coupfast.noise import CounterNoise, Noise, uniform
from coupfast.options import check_integer, check_number, option
from coupfast.sde import VPSDE

BETAS, EPSILON = (0.9, 0.999), 1e-8  # Adam's defaults, which the published code leaves as they are


@dataclasses.dataclass(frozen=True, kw_only=True)
class LM(StepMethod):
    """Likelihood maximisation: Adam on how far a denoiser moves the image. Chen et al. 2023, arXiv:2305.15241.

    The exact gradient has the denoiser's Hessian-vector products. Adam's first step moves each element by the learning rate
    towards the sign of its gradient: what flows through it is almost the identity.

    Attributes:
        num_steps: Adam steps (5 as published).
        learning_rate: Of the image in the [-1, 1] scale (0.1 as published).
        sigma_min, sigma_max: Between which σ is drawn, standard deviations in the [-1, 1] scale (0.4 and 0.6 as published).
        fixed_seed: Draw z and σ from this seed at every call, the same for all images and draws, as the published code does: a
            defense without randomness. None (not as published) draws them as all methods do.
        sde: The schedule of the network.
        clamp: Clip to [-1, 1] at the end, as published.

    Raises:
        TypeError: if a field is of another type.
        ValueError: if a number is outside of its range, `sigma_min` is above `sigma_max`, the schedule is discrete, or no time
            up to 1 of it is so noisy.

    Example:
        >>> import coupfast
        >>> score = coupfast.load_score("cifar10-tiny")
        >>> coupfast.Purifier(score, method=coupfast.LM(num_steps=3)).num_steps
        3
    """

    name: ClassVar[str] = "lm"
    reference: ClassVar[str] = "Chen et al. 2023, arXiv:2305.15241"

    num_steps: int = option(5, help="steps of the method", parse=int, metavar="K")
    learning_rate: float = option(0.1, help="Adam's, of the image in [-1, 1]", parse=float, metavar="LR")
    sigma_min: float = option(0.4, help="least noise that the image is denoised from, in [-1, 1]", parse=float, metavar="S")
    sigma_max: float = option(0.6, help="most noise that the image is denoised from, in [-1, 1]", parse=float, metavar="S")
    fixed_seed: int | None = option(
        None, help="draw the noise from this seed at every call, as published: no randomness is left", parse=int, metavar="S"
    )
    sde: VPSDE = sde_option(VPSDE())

    def __post_init__(self) -> None:
        super().__post_init__()
        check_continuous(self.sde)
        object.__setattr__(self, "num_steps", check_integer("num_steps", self.num_steps, 1))
        object.__setattr__(self, "learning_rate", check_number("learning_rate", self.learning_rate, zero=False))
        for name in ("sigma_min", "sigma_max"):
            object.__setattr__(self, name, check_noise_level(name, getattr(self, name), self.sde))
        if self.sigma_min > self.sigma_max:
            raise ValueError(f"`sigma_min` is at most `sigma_max`, got {self.sigma_min:g} and {self.sigma_max:g}")
        if self.fixed_seed is not None:
            object.__setattr__(self, "fixed_seed", check_integer("fixed_seed", self.fixed_seed, 0, 2**64 - 1))

    @property
    def num_noises(self) -> int:
        """z of every step, then a row whose first element gives every step's σ; none where the seed is fixed."""
        return 2 * self.num_steps if self.fixed_seed is None else 0

    def start(self, x_in: torch.Tensor, noise: Noise) -> StepState:
        return x_in, torch.zeros_like(x_in), torch.zeros_like(x_in)

    def step(self, k: int, state: StepState, noise: Noise, networks: Networks) -> StepState:
        x, m, v = state
        noise = self._noise(noise, x)
        z, sigma = noise.z(k, x), self._sigma(noise, k, x)
        again = torch.is_grad_enabled() and x.requires_grad
        with torch.enable_grad():
            point = x if again else x.detach().requires_grad_()
            y = point + sigma * z
            moved = y - sigma * eps_hat_of_noised(networks, self.sde, y, sigma) - point
            (gradient,) = torch.autograd.grad(moved.square().sum(), point, create_graph=again)
        gradient = gradient + self._pull(point if again else x, networks)
        m = BETAS[0] * m + (1.0 - BETAS[0]) * gradient
        v = BETAS[1] * v + (1.0 - BETAS[1]) * gradient.square()
        size = _root(v / (1.0 - BETAS[1] ** (k + 1)))
        return x - self.learning_rate / (1.0 - BETAS[0] ** (k + 1)) * m / (size + EPSILON), m, v

    def _pull(self, x: torch.Tensor, networks: Networks) -> torch.Tensor | float:
        """What is added to the gradient of the loss."""
        return 0.0

    def _noise(self, noise: Noise, x: torch.Tensor) -> Noise:
        if self.fixed_seed is None:
            return noise
        zeros = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return CounterNoise(self.fixed_seed, zeros, zeros)

    def _sigma(self, noise: Noise, k: int, x: torch.Tensor) -> torch.Tensor:
        return self.sigma_min + (self.sigma_max - self.sigma_min) * uniform(noise, self.num_steps + k, x)

    def definition(self, state: StepState, networks: Networks, noise: Noise, steps: range) -> StepState:
        x = state[0]
        source = self._noise(noise, x)
        return reference.lm_ref(
            state if steps.start else (x, torch.zeros_like(x), torch.zeros_like(x)),
            networks.score,
            networks.classifier,
            [source.z(k, x) for k in steps],
            [self._sigma(source, k, x).flatten() for k in steps],
            first=steps.start,
            learning_rate=self.learning_rate,
            guidance_scale=getattr(self, "guidance_scale", 0.0),
            sde=self.sde,
            detached=networks.detached,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidedLM(LM):
    """Likelihood maximisation that follows a classifier's confidence, too. Zhang et al. 2024, arXiv:2408.05900 (CIFAR-100).

    The paper adds −λ log p(ŷ | x) to the loss and states neither λ nor learning rate nor steps: λ = 1 here, of the loss as it
    stands above (a sum over elements, x in [-1, 1]), and LM's own values otherwise.

    Attributes:
        guidance_scale: λ, at least 0.

    Raises:
        TypeError: if a field is of another type.
        ValueError: as `LM`, or if λ is negative or not finite.

    Example:
        >>> import coupfast
        >>> score, classifier = coupfast.load_score("cifar10-tiny"), coupfast.load_classifier("cifar10-tiny")
        >>> coupfast.Purifier(score, classifier, method=coupfast.GuidedLM(num_steps=3)).num_steps
        3
    """

    name: ClassVar[str] = "lm-coup"
    reference: ClassVar[str] = "Zhang et al. 2024, arXiv:2408.05900, on Chen et al. 2023, arXiv:2305.15241"
    guided: ClassVar[bool] = True

    guidance_scale: float = option(1.0, help="the paper's lambda, at least 0", parse=float, metavar="L")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "guidance_scale", check_number("guidance_scale", self.guidance_scale))

    def _pull(self, x: torch.Tensor, networks: Networks) -> torch.Tensor | float:
        return -self.guidance_scale * networks.guidance(x)


def _root(v: torch.Tensor) -> torch.Tensor:
    """sqrt v, with derivative 0 where v = 0: there Adam's step is 0, and so is what flows through its size."""
    positive = v > 0.0
    return torch.where(positive, torch.sqrt(torch.where(positive, v, 1.0)), 0.0)
