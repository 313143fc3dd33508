"""Networks of other conventions, as what a purifier takes: ε̂ of labels 999 t, logits of images in [0, 1].

With x_k = α x₀ + σ ε, α² = ᾱ(t), σ² = 1 − ᾱ(t) (`coupfast.sde`), a network that predicts

    v = α ε − σ x₀      says  ε̂ = σ x_k + α v̂          ("v_prediction": Salimans and Ho 2022, arXiv:2202.00512)
    x₀                  says  ε̂ = (x_k − α x̂₀) / σ      ("sample"; at small t the division enlarges its error by 1/σ)

EDM's networks F see y = x_k/α = x₀ + s ε, s = σ/α, and make the denoiser D = c_skip y + c_out F(c_in y, ln(s)/4) (Karras et al.
2022, arXiv:2206.00364, table 1), so that ε̂ = (y − D)/s = s y/(s² + σ_d²) − σ_d/sqrt(s² + σ_d²) F(y/sqrt(s² + σ_d²), ln(s)/4).

Networks of whole time steps are told one of them ("the same t, 999 t = label"):

    rounded   the nearest integer to 999 t                    Score SDE's discrete networks
    index     the nearest integer to 1000 t − 1               DDPM: index i has the noise of i + 1 steps, t = 0.1 is index 99
    floor     the largest integer below or at 1000 t          guided-diffusion in DiffPure's use

Labels come in floating point, and 1000 t of a t that is a multiple of 1e-3 falls on either side of its integer: what is within
1e-3 below an integer is that integer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from coupfast.sde import NUM_LABELS, VPSDE

#: What a network can predict, as diffusers' schedulers spell it.
PREDICTIONS = ("epsilon", "v_prediction", "sample")
#: How a network is told the time.
LABELS = ("continuous", "rounded", "index", "floor")
#: Steps of the discrete chain, and how far below a whole number a time in steps may be by rounding.
STEPS, STEP_ROUNDING = 1000, 1e-3


def whole_step(labels: Tensor, rule: str) -> Tensor:
    """The time step that a network of whole steps is told, int64, for labels = 999 t; `rule` is one of `LABELS`."""
    exact = labels.to(torch.float64)
    if rule == "rounded":
        return exact.round().long()
    steps = exact * (STEPS / NUM_LABELS)
    if rule == "index":
        return (steps.round() - 1.0).clamp(0, STEPS - 1).long()
    if rule == "floor":
        return torch.floor(steps + STEP_ROUNDING).clamp(0, STEPS - 1).long()
    raise ValueError(f"the rule for whole steps is one of {', '.join(LABELS[1:])}, got {rule!r}")


def first_half(predicted: Tensor, channels: int) -> Tensor:
    """ε̂ of a network that predicts a variance, too: the first half of its channels.

    Raises:
        ValueError: if there are not twice as many as the image has.
    """
    if predicted.shape[1] != 2 * channels:
        raise ValueError(
            f"a network that also predicts a variance returns {2 * channels} channels for images of {channels}, this one "
            f"{predicted.shape[1]}; leave out `learned_variance`"
        )
    return predicted[:, :channels].contiguous()


def signal_and_noise(labels: Tensor, sde: VPSDE) -> tuple[Tensor, Tensor]:
    """α and σ at labels = 999 t, float64, shape (batch, 1, 1, 1): 1 − ᾱ is a difference of nearly equal numbers at small t."""
    t = labels.to(torch.float64)[:, None, None, None] / NUM_LABELS
    log_alpha_bar = -0.5 * (sde.beta_max - sde.beta_min) * t**2 - sde.beta_min * t
    return torch.exp(0.5 * log_alpha_bar), torch.sqrt(-torch.expm1(log_alpha_bar))


def edm_eps_hat(
    network: Callable[[Tensor, Tensor], Tensor], x: Tensor, labels: Tensor, *, sde: VPSDE, sigma_data: float = 0.5
) -> Tensor:
    """ε̂ of states x at labels = 999 t, of a network F(c_in y, c_noise) behind EDM's preconditioning.

    Args:
        network: F: scaled images, c_noise (batch,) → an output of their shape.
        sde: The schedule of the states (F knows standard deviations only, and serves any).
        sigma_data: σ_d that F was trained with.
    """
    alpha, sigma = signal_and_noise(labels, sde)
    s = sigma / alpha
    total = s**2 + sigma_data**2
    predicted = network(x * (1.0 / (alpha * total.sqrt())).to(x.dtype), (0.25 * torch.log(s)).to(x.dtype).flatten())
    # As (y − D)/s it would be a difference of nearly equal images over a small number.
    return (s / (alpha * total)).to(x.dtype) * x - (sigma_data / total.sqrt()).to(x.dtype) * predicted


class NoiseFrom(nn.Module):
    """A network of another prediction or with whole labels, as a score network.

    Args:
        network: (x_k, labels) → a prediction of the shape of x_k, trained on the linear schedule of `sde`.
        prediction: One of `PREDICTIONS`.
        whole_labels: The same as `labels="rounded"`, int64: for a network with a table of its time steps.
        labels: How the network is told the time, one of `LABELS`.
        learned_variance: The network also predicts a variance, in as many channels after those of its prediction.
        sde: The schedule that the network was trained on.

    Raises:
        ValueError: if `prediction` or `labels` is unknown.

    Attributes:
        image_size, channels: Those of the network, where it has them.

    Example:
        >>> import torch
        >>> from coupfast.models.adapters import NoiseFrom
        >>> class SeesTheImage(torch.nn.Module):
        ...     def forward(self, x_k, labels):
        ...         return 0.9 * x_k  # a prediction of the image, in [-1, 1]
        >>> score = NoiseFrom(SeesTheImage(), prediction="sample")
        >>> score(torch.randn(2, 3, 8, 8), torch.tensor([60.0, 60.0])).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        prediction: str = "epsilon",
        whole_labels: bool = False,
        labels: str | None = None,
        learned_variance: bool = False,
        sde: VPSDE | None = None,
    ) -> None:
        super().__init__()
        if prediction not in PREDICTIONS:
            raise ValueError(f"`prediction` is one of {', '.join(PREDICTIONS)}, got {prediction!r}")
        labels = labels or ("rounded" if whole_labels else "continuous")
        if labels not in LABELS or (whole_labels and labels == "continuous"):
            raise ValueError(f"`labels` is one of {', '.join(LABELS)}, got {labels!r}")
        self.network = network
        self.prediction = prediction
        self.labels = labels
        self.whole_labels = labels != "continuous"
        self.learned_variance = learned_variance
        self.sde = sde or VPSDE()
        _take_sizes(self, network)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """eps_hat of states x (batch, channels, height, width) at labels = 999 t, (batch,) or (1,)."""
        predicted = self.network(x, whole_step(labels, self.labels) if self.whole_labels else labels)
        if self.learned_variance:
            predicted = first_half(predicted, x.shape[1])
        if self.prediction == "epsilon":
            return predicted
        alpha, sigma = (rate.to(x.dtype) for rate in signal_and_noise(labels, self.sde))
        if self.prediction == "v_prediction":
            return sigma * x + alpha * predicted
        return (x - alpha * predicted) / sigma

    def alternatives(self) -> list[tuple[str, nn.Module]]:
        """The same network, adapted as if it predicted something else, with words for it."""
        others = [prediction for prediction in PREDICTIONS if prediction != self.prediction]
        same = {"labels": self.labels, "learned_variance": self.learned_variance, "sde": self.sde}
        return [(f"prediction={other!r}", NoiseFrom(self.network, prediction=other, **same)) for other in others]  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        labels = "" if self.labels == "continuous" else f", labels={self.labels!r}"
        return f"prediction={self.prediction!r}{labels}" + (", learned_variance=True" if self.learned_variance else "")


class NoiseFromEDM(nn.Module):
    """A network F of EDM as a score network.

    Args:
        network: (c_in y, c_noise (batch,)) → F.
        sigma_data: What it was trained with.
        sde: The schedule of the states.

    Raises:
        ValueError: if `sigma_data` is not above 0.

    Example:
        >>> import torch
        >>> from coupfast.models.adapters import NoiseFromEDM
        >>> class F(torch.nn.Module):
        ...     def forward(self, y, c_noise):
        ...         return torch.zeros_like(y)
        >>> NoiseFromEDM(F(), sigma_data=0.5)(torch.randn(2, 3, 8, 8), torch.tensor([60.0, 60.0])).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(self, network: nn.Module, *, sigma_data: float = 0.5, sde: VPSDE | None = None) -> None:
        super().__init__()
        if not sigma_data > 0.0:
            raise ValueError(f"`sigma_data` is above 0, got {sigma_data}")
        self.network, self.sigma_data, self.sde = network, float(sigma_data), sde or VPSDE()
        _take_sizes(self, network)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """eps_hat of states x (batch, channels, height, width) at labels = 999 t, (batch,) or (1,)."""
        return edm_eps_hat(self.network, x, labels, sde=self.sde, sigma_data=self.sigma_data)

    def alternatives(self) -> list[tuple[str, nn.Module]]:
        """The same network, adapted as if it were not EDM's, with words for it."""
        return [(f"prediction={other!r}", NoiseFrom(self.network, prediction=other, sde=self.sde)) for other in PREDICTIONS]

    def extra_repr(self) -> str:
        return f"sigma_data={self.sigma_data:g}"


class NoiseFromScore(nn.Module):
    """A noise-conditional score network (NCSN) of images in [0, 1] as a score network: ε̂ = −σ_j s(y, j).

    y = (x_k/α + 1)/2 has noise of standard deviation σ/(2α); j is the level whose σ_j is nearest to that, in the logarithm. A
    method that asks at a level of the network, such as `ADP(score_sigma=σ_j)`, follows s(·, j) itself.

    Args:
        network: (images, levels (batch,) int64) → ∇ log p of images with that noise.
        sigmas: σ_j of every level, standard deviations on images in [0, 1], in the order of the levels.
        sde: The schedule of the states.

    Raises:
        ValueError: if there are no `sigmas`, or one is not above 0 and finite.

    Example:
        >>> import torch
        >>> from coupfast.models.adapters import NoiseFromScore
        >>> class Scores(torch.nn.Module):
        ...     def forward(self, x, levels):
        ...         return -x
        >>> NoiseFromScore(Scores(), sigmas=[0.5, 0.1, 0.02])(torch.randn(2, 3, 8, 8), torch.tensor([60.0, 60.0])).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(self, network: nn.Module, sigmas: Sequence[float], *, sde: VPSDE | None = None) -> None:
        super().__init__()
        levels = torch.tensor([float(sigma) for sigma in sigmas], dtype=torch.float64)
        if levels.numel() == 0 or not bool((levels > 0).all() and torch.isfinite(levels).all()):
            raise ValueError(f"`sigmas` are standard deviations above 0, one a level, got {list(sigmas)[:4]}")
        self.network, self.sde, self.whole_labels = network, sde or VPSDE(), True
        self._levels = tuple(levels.tolist())
        _take_sizes(self, network)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """eps_hat of states x (batch, channels, height, width) at labels = 999 t, (batch,) or (1,)."""
        alpha, sigma = signal_and_noise(labels.expand(len(x)), self.sde)
        levels = torch.tensor(self._levels, dtype=torch.float64, device=x.device)
        wanted = torch.log(sigma / (2.0 * alpha)).flatten()
        level = (wanted[:, None] - torch.log(levels)[None, :]).abs().argmin(dim=1)
        images = (x / alpha.to(x.dtype) + 1.0) * 0.5
        return -levels[level].to(x.dtype)[:, None, None, None] * self.network(images, level)


def _take_sizes(adapter: nn.Module, network: nn.Module) -> None:
    """`image_size` and `channels`, where the network has them."""
    for name in ("image_size", "channels"):
        if isinstance(value := getattr(network, name, None), int):
            setattr(adapter, name, value)


class Normalized(nn.Module):
    """A classifier behind a normalisation of its images, (x − mean) / std per channel.

    Args:
        network: Normalised images → logits.
        mean, std: One number for each channel, or one for all; no part of the state dict.

    Example:
        >>> import torch
        >>> from coupfast.models.adapters import Normalized
        >>> classifier = Normalized(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)), mean=[0.5], std=[0.25])
        >>> classifier(torch.rand(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(list(values))[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images (batch, channels, height, width) in [0, 1]."""
        return self.network((x - self.mean) / self.std)
