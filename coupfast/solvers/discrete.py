"""First-order solvers of samplers: steps between two noise levels, whatever lies between them.

With α = sqrt ᾱ and e^{−h} = α_s σ_t / (σ_s α_t) from time s to t < s. Guidance shifts the score, so that in all of them
c = −λ σ_s b. With `clip_denoised` the predicted noise becomes that of clip(x̂0, ±1), x̂0 = (x − σ_s ε̂)/α_s, before it is used.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar, Literal

import numpy as np

from coupfast.options import check_flag, check_name, check_number, option
from coupfast.sde import VPSDE
from coupfast.solvers.table import CoefficientTable


@dataclasses.dataclass(frozen=True, eq=False)
class Levels:
    """Signal and noise rates at both ends of every step, float64, shape (K,) each."""

    signal_s: np.ndarray
    sigma_s: np.ndarray
    signal_t: np.ndarray
    sigma_t: np.ndarray
    passed: np.ndarray  # ∫ β = log(α_t² / α_s²)

    @classmethod
    def of(cls, sde: VPSDE, t: np.ndarray) -> Levels:
        log_alpha_bar, sigma = sde.log_alpha_bar(t), sde.sigma(t)
        signal = np.exp(0.5 * log_alpha_bar)
        return cls(signal[:-1], sigma[:-1], signal[1:], sigma[1:], log_alpha_bar[1:] - log_alpha_bar[:-1])

    @property
    def a(self) -> np.ndarray:
        """α_t / α_s."""
        return self.signal_t / self.signal_s

    @property
    def decay(self) -> np.ndarray:
        """e^{−h}; 0 where the step ends without noise."""
        return self.signal_s * self.sigma_t / (self.sigma_s * self.signal_t)

    @property
    def x_0(self) -> tuple[np.ndarray, np.ndarray]:
        """Factors of x and ε̂ in x̂0."""
        return 1.0 / self.signal_s, -self.sigma_s / self.signal_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedSolver(abc.ABC):
    """A solver with knobs: a frozen dataclass that fills a table when it is called.

    Attributes:
        name: What people call it.
        reference: Where it comes from.
    """

    name: ClassVar[str] = ""
    reference: ClassVar[str] = ""

    @abc.abstractmethod
    def __call__(self, sde: VPSDE, t: np.ndarray, guidance_scale: np.ndarray | float) -> CoefficientTable:
        """The table of steps on the times `t`; `guidance_scale` at the start of each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClippingSolver(NamedSolver):
    """A solver that may clip what the network takes for the image.

    Attributes:
        clip_denoised: Clip x̂0 to [-1, 1], as `clip_denoised=True` of published samplers does; the gradient has the mask.

    Raises:
        TypeError: if `clip_denoised` is no bool.
    """

    clip_denoised: bool = option(
        False, help="clip the predicted image to [-1, 1] in every step (solvers ddim, ancestral, and of the DPM family)"
    )

    def __post_init__(self) -> None:
        check_flag("clip_denoised", self.clip_denoised)

    def _clip(self, levels: Levels) -> dict[str, np.ndarray]:
        return dict(zip("mn", levels.x_0, strict=True)) if self.clip_denoised else {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIM(ClippingSolver):
    """Denoising diffusion implicit models. Song et al. 2021, arXiv:2010.02502, eqs. 12 and 16.

    x' = α_t x̂0 + sqrt(σ_t² − d²) ε̂ + d z,      d = η σ_t sqrt(1 − e^{−2h})

    Attributes:
        eta: η, at least 0. 0 has no noise, and is DPM-Solver-1, the exact exponential step of the probability-flow ODE; 1 is
            ancestral sampling with small variance. Above 1 only as far as d stays below σ_t.

    Raises:
        TypeError: if a field is of another type.
        ValueError: if η is negative or not finite; that it is too large for a grid is said when its table is made.

    Example:
        >>> import coupfast
        >>> table = coupfast.COUP(t=0.06, num_steps=20, solver=coupfast.DDIM(eta=0.5)).recipe().table
        >>> table.num_steps
        20
    """

    name: ClassVar[str] = "ddim"
    reference: ClassVar[str] = "Song et al. 2021, arXiv:2010.02502, eqs. 12, 16"

    eta: float = option(
        0.0, help="noise of solver ddim, at least 0: 0 has none, 1 is ancestral sampling", parse=float, metavar="E"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "eta", check_number("eta", self.eta))

    def __call__(self, sde: VPSDE, t: np.ndarray, guidance_scale: np.ndarray | float) -> CoefficientTable:
        levels = Levels.of(sde, t)
        share = self.eta * np.sqrt(1.0 - levels.decay**2)
        if np.any(share > 1.0):
            k = int(np.argmax(share > 1.0))
            raise ValueError(
                f"`eta` = {self.eta:g} asks for noise of {share[k]:.6g} times the level that step {k} ends at, which has to be "
                f"1 at most: take eta <= {1.0 / np.max(share / self.eta):.4g}, or more steps"
            )
        d = share * levels.sigma_t
        b = np.sqrt(levels.sigma_t**2 - d**2) - levels.a * levels.sigma_s
        return CoefficientTable(
            t=t, a=levels.a, b=b, c=-guidance_scale * levels.sigma_s * b, d=d, **self._clip(levels)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ancestral(ClippingSolver):
    """Ancestral sampling of DDPM. Ho et al. 2020, arXiv:2006.11239, eqs. 6, 7 and section 3.2.

    x' = (x − β/σ_s ε̂) / sqrt(1 − β) + d z, with β = 1 − α_s²/α_t² of the step. d² is β σ_t²/σ_s² ("small", the posterior's
    variance; = DDIM with η = 1 = SDE-DPM-Solver++(1)) or β ("large"). The last step has "small" in both, as Ho's sampler takes
    no noise into t = 0: where the run ends at 1e-5, it leaves noise of 1e-3.

    Attributes:
        variance: "small" or "large".

    Raises:
        TypeError: if a field is of another type.
        ValueError: if `variance` is something else.

    Example:
        >>> import coupfast
        >>> table = coupfast.COUP(t=0.06, num_steps=20, solver=coupfast.Ancestral(variance="large")).recipe().table
        >>> table.num_steps
        20
    """

    name: ClassVar[str] = "ancestral"
    reference: ClassVar[str] = "Ho et al. 2020, arXiv:2006.11239, eqs. 6, 7"

    variance: Literal["small", "large"] = option(
        "small",
        choices=("small", "large"),
        help="of solver ancestral: small is the posterior's, large is beta (Ho's CIFAR-10 network)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("variance", self.variance, ("small", "large"))

    def __call__(self, sde: VPSDE, t: np.ndarray, guidance_scale: np.ndarray | float) -> CoefficientTable:
        levels = Levels.of(sde, t)
        gained = 1.0 - levels.decay**2
        b = -levels.a * levels.sigma_s * gained
        d = levels.sigma_t * np.sqrt(gained)
        if self.variance == "large":
            d[:-1] = np.sqrt(-np.expm1(-levels.passed))[:-1]
        return CoefficientTable(
            t=t, a=levels.a, b=b, c=-guidance_scale * levels.sigma_s * b, d=d, **self._clip(levels)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SDEDPMSolver1(ClippingSolver):
    """SDE-DPM-Solver-1, which is SEEDS-1: the reverse SDE with ε̂ held, in log-SNR. Lu et al. 2022, arXiv:2211.01095;
    Gonzalez et al. 2023, arXiv:2305.14267.

    x' = (α_t/α_s) x − 2 σ_t (e^h − 1) ε̂ + σ_t sqrt(e^{2h} − 1) z. It leaves noise of σ_s/α_s in the last step: poor in few.

    Example:
        >>> import coupfast
        >>> table = coupfast.COUP(t=0.06, num_steps=20, solver=coupfast.SDEDPMSolver1()).recipe().table
        >>> table.num_steps
        20
    """

    name: ClassVar[str] = "sde-dpm-solver-1"
    reference: ClassVar[str] = "Lu et al. 2022, arXiv:2211.01095; Gonzalez et al. 2023, arXiv:2305.14267"

    def __call__(self, sde: VPSDE, t: np.ndarray, guidance_scale: np.ndarray | float) -> CoefficientTable:
        levels = Levels.of(sde, t)
        before = levels.a * levels.sigma_s  # σ_t e^h
        b = -2.0 * (before - levels.sigma_t)
        d = np.sqrt(before**2 - levels.sigma_t**2)
        return CoefficientTable(
            t=t, a=levels.a, b=b, c=-guidance_scale * levels.sigma_s * b, d=d, **self._clip(levels)
        )


def reverse_diffusion(sde: VPSDE, t: np.ndarray, guidance_scale: np.ndarray | float) -> CoefficientTable:
    """The reverse-diffusion predictor of Score SDE. Song et al. 2021, arXiv:2011.13456, eq. 46 and algorithm 3.

    x' = (2 − sqrt(1 − β_i)) x + β_i s(x) + sqrt(β_i) z with β_i = β(t) h, and no noise in the last step (their `denoise`).

    Args:
        sde: Its β and σ.
        t: Falling times, float64, shape (num_steps + 1,).
        guidance_scale: λ, one number or one for each step.

    Returns:
        A row of coefficients for each step, float64.

    Raises:
        ValueError: where β(t) h exceeds 1: the steps are too long for this predictor.

    Example:
        >>> import numpy as np, coupfast
        >>> from coupfast.solvers import reverse_diffusion
        >>> table = reverse_diffusion(coupfast.VPSDE(), np.linspace(0.1, 1e-3, 11), 1.0)
        >>> table.num_steps, bool(table.d[-1] > 0)
        (10, False)
    """
    levels, beta = Levels.of(sde, t), sde.beta(t[:-1]) * (t[:-1] - t[1:])
    if np.any(beta > 1.0):
        k = int(np.argmax(beta > 1.0))
        raise ValueError(
            f"solver 'reverse-diffusion' has steps of β(t) h <= 1, and step {k} (t = {t[k]:g} to {t[k + 1]:g}) is one of "
            f"{beta[k]:.3g}: take more steps, or another solver"
        )
    b, d = -beta / levels.sigma_s, np.sqrt(beta)
    d[-1] = 0.0
    return CoefficientTable(t=t, a=2.0 - np.sqrt(1.0 - beta), b=b, c=-guidance_scale * levels.sigma_s * b, d=d)


def exponential(sde: VPSDE, t: np.ndarray, guidance_scale: np.ndarray | float) -> CoefficientTable:
    """The exponential integrator of the reverse SDE: its exact solution where the score is held at the start of each step. De
    Bortoli 2022, arXiv:2208.05314; Chen et al. 2023, arXiv:2209.11215.

    x' = r x + 2 (r − 1) s(x) + sqrt(r² − 1) z with r = α_t/α_s = exp(½ ∫ β). (The other exact steps hold ε̂ or x̂0 in the place
    of the score: the solvers sde-dpm-solver-1 and ancestral; that of the ODE with ε̂ held is ddim.)

    Args:
        sde: Its β and σ.
        t: Falling times, float64, shape (num_steps + 1,).
        guidance_scale: λ, one number or one for each step.

    Returns:
        A row of coefficients for each step, float64.

    Example:
        >>> import numpy as np, coupfast
        >>> from coupfast.solvers import exponential
        >>> table = exponential(coupfast.VPSDE(), np.linspace(0.1, 1e-3, 11), 1.0)
        >>> table.num_steps, bool((table.d > 0).all())
        (10, True)
    """
    levels = Levels.of(sde, t)
    b = -2.0 * np.expm1(0.5 * levels.passed) / levels.sigma_s
    return CoefficientTable(
        t=t, a=levels.a, b=b, c=-guidance_scale * levels.sigma_s * b, d=np.sqrt(np.expm1(levels.passed))
    )
