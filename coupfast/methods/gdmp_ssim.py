"""GDMP guided by structural similarity; the one that is guided by squared error is a table of rows, `GDMP`.

    each round:  x ← sqrt ᾱ_I x + sqrt(1 − ᾱ_I) z,   I = noise_steps − 1,   and for i = I − 1 … 0
    x̂0 = clip((x − sqrt(1 − ᾱ_i) ε̂(x, i)) / sqrt ᾱ_i),   μ = the mean of q(x_{i−1} | x, x̂0)
    x ← μ + σ_i² s_i ∇_x SSIM(x, y_i) / B + σ_i z [i > 0],   y_i = sqrt ᾱ_i x_in + sqrt(1 − ᾱ_i) z′
    s_i = sqrt(1 − ᾱ_i) / (m sqrt ᾱ_i),   m = (2 · 8/255) / (3 G)

with the discrete chain's β_i and ᾱ_i (Ho et al. 2020, arXiv:2006.11239) and its larger variance, σ_i² = β_i, and β̃_1 for i = 0.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar, NamedTuple

import torch
from torch.nn import functional

from coupfast import reference
from coupfast.methods.base import Networks, StepMethod, StepState, clip
from coupfast.methods.diffusion import sde_option
from coupfast.noise import Noise
from coupfast.options import check_integer, check_number, option
from coupfast.sde import VPSDE, check_sde

INDICES = 1000  # of the discrete chain; index i is time (i + 1)/1000
SSIM_SIGMA = 1.5  # of the window's Gaussian, in pixels
SSIM_CONSTANTS = (0.01**2, 0.03**2)  # of images in [0, 1]


class _Index(NamedTuple):
    """One denoising step's numbers.

    Attributes:
        t: Its time, (i + 1)/1000.
        signal, spread: sqrt ᾱ_i and sqrt(1 − ᾱ_i).
        of_image, of_state: Factors of x̂0 and of x in μ.
        variance: σ_i².
        pull: Factor of the similarity's gradient.
    """

    t: float
    signal: float
    spread: float
    of_image: float
    of_state: float
    variance: float
    pull: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class GDMPSSIM(StepMethod):
    """Guided diffusion model for purification, guided by the similarity with the input. Wang et al. 2022, arXiv:2205.14969.

    SSIM is that of Wang et al. 2004 (Gaussian window, σ = 1.5 pixels, windows that lie inside the image, K = 0.01 and 0.03) of
    images in [0, 1], its mean over an image's elements, differentiated with respect to x in [-1, 1]. The published code
    takes the mean over the batch that happens to run, 100 images in its configuration; here that number is `guide_batch`. The
    published state is noised to index 36 and then denoised from index 35; so it is here.

    Attributes:
        rounds: How often noise is added and removed (4 as published).
        noise_steps: How many steps of the chain the noise of a round is (37 as published).
        guide_scale: G (70000 as published for SSIM), at least 0.
        guide_batch: B (100 as published).
        ssim_window: Side of the window in pixels (11 as published).
        sde: Whose discrete chain this is: β_i from beta_min/1000 to beta_max/1000.
        clamp: Clip at the end, as published; rounds follow each other without.

    Raises:
        TypeError: if a field is of another type.
        ValueError: if a number is outside of its range.

    Example:
        >>> import coupfast
        >>> score = coupfast.load_score("cifar10-tiny")
        >>> coupfast.Purifier(score, method=coupfast.GDMPSSIM(rounds=1)).num_steps
        36
    """

    name: ClassVar[str] = "gdmp-ssim"
    reference: ClassVar[str] = "Wang et al. 2022, arXiv:2205.14969 (SSIM)"

    rounds: int = option(4, help="how often noise is added and removed", parse=int, metavar="M")
    noise_steps: int = option(37, help="steps of the discrete chain that a round adds, from 2", parse=int, metavar="N")
    guide_scale: float = option(70000.0, help="strength of the guide, at least 0", parse=float, metavar="G")
    guide_batch: int = option(100, help="images that the published guide is a mean over", parse=int, metavar="B")
    ssim_window: int = option(11, help="side of SSIM's window in pixels", parse=int, metavar="W")
    sde: VPSDE = sde_option(VPSDE())

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sde(self.sde)
        values = {
            "rounds": check_integer("rounds", self.rounds, 1),
            "noise_steps": check_integer("noise_steps", self.noise_steps, 2, INDICES),
            "guide_scale": check_number("guide_scale", self.guide_scale),
            "guide_batch": check_integer("guide_batch", self.guide_batch, 1),
            "ssim_window": check_integer("ssim_window", self.ssim_window, 1),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property  # type: ignore[misc]
    def num_steps(self) -> int:
        return self.rounds * self._denoisings

    @property
    def num_noises(self) -> int:
        """Of each round: its noising's, z′ of every step, z of every step but the last."""
        return 2 * self.num_steps

    @property
    def _denoisings(self) -> int:
        return self.noise_steps - 1

    @functools.cached_property
    def _indices(self) -> list[_Index]:
        """By index, the numbers of every denoising step; one more at the end, for the noising."""
        alpha_bar = [1.0, *(self.sde.discrete_alpha_bar((i + 1) / INDICES) for i in range(self.noise_steps))]  # [i + 1]
        second = alpha_bar[2]
        least = (1.0 - second / alpha_bar[1]) * (1.0 - alpha_bar[1]) / (1.0 - second)
        m = (2.0 * 8.0 / 255.0) / (3.0 * self.guide_scale) if self.guide_scale else math.inf
        found = []
        for i in range(self.noise_steps):
            before, here = alpha_bar[i], alpha_bar[i + 1]
            alpha = here / before
            beta, spread = 1.0 - alpha, 1.0 - here
            variance = beta if i > 0 else least
            found.append(
                _Index(
                    t=(i + 1) / INDICES,
                    signal=math.sqrt(here),
                    spread=math.sqrt(spread),
                    of_image=math.sqrt(before) * beta / spread,
                    of_state=math.sqrt(alpha) * (1.0 - before) / spread,
                    variance=variance,
                    pull=variance * math.sqrt(spread / here) / m / self.guide_batch,
                )
            )
        return found

    def check_shape(self, image_shape: tuple[int, ...]) -> None:
        if min(image_shape[1:]) < self.ssim_window:
            raise ValueError(
                f"SSIM's window is {self.ssim_window} pixels wide and images are {image_shape[1]} x {image_shape[2]}; give a "
                "smaller `ssim_window`"
            )

    def start(self, x_in: torch.Tensor, noise: Noise) -> StepState:
        return x_in, x_in

    def step(self, k: int, state: StepState, noise: Noise, networks: Networks) -> StepState:
        x, x_in = state
        done, j = divmod(k, self._denoisings)
        first = 2 * self._denoisings * done  # of this round's noises
        if j == 0:
            top = self._indices[-1]
            x = top.signal * x + top.spread * noise.z(first, x)
        i = self._denoisings - 1 - j
        here = self._indices[i]
        image = clip((x - here.spread * networks.eps_hat(x, here.t)) / here.signal, -1.0, 1.0)
        following = here.of_image * image + here.of_state * x
        noised = here.signal * x_in + here.spread * noise.z(first + 1 + j, x)
        following = following + here.pull * _towards(x, noised, self.ssim_window)
        if i > 0:
            following = following + math.sqrt(here.variance) * noise.z(first + 1 + self._denoisings + j, x)
        return following, x_in

    def definition(self, state: StepState, networks: Networks, noise: Noise, steps: range) -> StepState:
        x, x_in = state if steps.start else (state[0], state[0])
        return reference.gdmp_ssim_ref(
            x,
            x_in,
            networks.score,
            [noise.z(row, x) for row in range(self.num_noises)],
            steps=steps,
            noise_steps=self.noise_steps,
            guide_scale=self.guide_scale,
            guide_batch=self.guide_batch,
            window=self.ssim_window,
            sde=self.sde,
        )


def ssim(x: torch.Tensor, y: torch.Tensor, window: int = 11) -> torch.Tensor:
    """Structural similarity of images in [0, 1], shape (batch,). Wang et al. 2004, doi:10.1109/TIP.2003.819861, eq. 13.

    The mean over channels and over all windows that lie inside the image, each weighted by a Gaussian of 1.5 pixels.

    Args:
        x, y: Shape (batch, channels, height, width).
        window: Side in pixels, at most that of the images.
    """
    channels = x.shape[1]
    along = torch.arange(window, dtype=x.dtype, device=x.device) - (window - 1) / 2
    weights = torch.exp(-along.square() / (2 * SSIM_SIGMA**2))
    weights = weights / weights.sum()

    def means(images: torch.Tensor) -> torch.Tensor:
        rows = functional.conv2d(images, weights.view(1, 1, -1, 1).expand(images.shape[1], 1, -1, 1), groups=images.shape[1])
        return functional.conv2d(rows, weights.view(1, 1, 1, -1).expand(images.shape[1], 1, 1, -1), groups=images.shape[1])

    mean_x, mean_y, xx, yy, xy = means(torch.cat([x, y, x * x, y * y, x * y], dim=1)).split(channels, dim=1)
    c1, c2 = SSIM_CONSTANTS
    light = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * (xy - mean_x * mean_y) + c2) / (xx - mean_x.square() + yy - mean_y.square() + c2)
    return (light * structure).mean(dim=(1, 2, 3))


def _towards(x: torch.Tensor, y: torch.Tensor, window: int) -> torch.Tensor:
    """∇_x SSIM(x, y) of states in the [-1, 1] scale, differentiable where gradients are on."""
    again = torch.is_grad_enabled() and x.requires_grad
    with torch.enable_grad():
        point = x if again else x.detach().requires_grad_()
        similarity = ssim((point + 1.0) * 0.5, (y + 1.0) * 0.5, window).sum()
        return torch.autograd.grad(similarity, point, create_graph=again)[0]
