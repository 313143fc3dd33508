"""Networks of other conventions, as what a purifier takes: ε̂ of labels 999 t, logits of images in [0, 1].

With x_k = α x₀ + σ ε, α² = ᾱ(t), σ² = 1 − ᾱ(t) (`coupfast.sde`), a network that predicts

    v = α ε − σ x₀      says  ε̂ = σ x_k + α v̂          ("v_prediction": Salimans and Ho 2022, arXiv:2202.00512)
    x₀                  says  ε̂ = (x_k − α x̂₀) / σ      ("sample"; at small t the division enlarges its error by 1/σ)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from coupfast.sde import NUM_LABELS, VPSDE

#: What a network can predict, as diffusers' schedulers spell it.
PREDICTIONS = ("epsilon", "v_prediction", "sample")


class NoiseFrom(nn.Module):
    """A network of another prediction or with whole labels, as a score network.

    Args:
        network: (x_k, labels) → a prediction of the shape of x_k, trained on the linear schedule of `sde`.
        prediction: One of `PREDICTIONS`.
        whole_labels: Give the network labels rounded to the nearest integer, int64, for one with a table of its time steps.
        sde: The schedule that the network was trained on.

    Raises:
        ValueError: if `prediction` is unknown.

    Attributes:
        image_size, channels: Those of the network, where it has them.
    """

    def __init__(
        self, network: nn.Module, *, prediction: str = "epsilon", whole_labels: bool = False, sde: VPSDE | None = None
    ) -> None:
        super().__init__()
        if prediction not in PREDICTIONS:
            raise ValueError(f"`prediction` is one of {', '.join(PREDICTIONS)}, got {prediction!r}")
        self.network = network
        self.prediction = prediction
        self.whole_labels = whole_labels
        self.sde = sde or VPSDE()
        for name in ("image_size", "channels"):
            if isinstance(value := getattr(network, name, None), int):
                setattr(self, name, value)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """eps_hat of states x (batch, channels, height, width) at labels = 999 t, (batch,) or (1,)."""
        predicted = self.network(x, labels.round().long() if self.whole_labels else labels)
        if self.prediction == "epsilon":
            return predicted
        # In float64: 1 − ᾱ is a difference of nearly equal numbers at small t.
        t = labels.to(torch.float64)[:, None, None, None] / NUM_LABELS
        log_alpha_bar = -0.5 * (self.sde.beta_max - self.sde.beta_min) * t**2 - self.sde.beta_min * t
        alpha = torch.exp(0.5 * log_alpha_bar).to(x.dtype)
        sigma = torch.sqrt(-torch.expm1(log_alpha_bar)).to(x.dtype)
        if self.prediction == "v_prediction":
            return sigma * x + alpha * predicted
        return (x - alpha * predicted) / sigma

    def extra_repr(self) -> str:
        return f"prediction={self.prediction!r}" + (", whole_labels=True" if self.whole_labels else "")


class Normalized(nn.Module):
    """A classifier behind a normalisation of its images, (x − mean) / std per channel.

    Args:
        network: Normalised images → logits.
        mean, std: One number for each channel, or one for all; no part of the state dict.
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
