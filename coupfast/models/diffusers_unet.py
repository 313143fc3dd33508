"""Score networks from `diffusers`: the call of a `UNet2DModel` translated to (x_k, labels) → eps_hat."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class DiffusersScore(nn.Module):
    """A `diffusers.UNet2DModel` that predicts noise, as a score network.

    The labels 999 t are passed as diffusers' timesteps as they are, fractions included: a network trained on the
    steps 0 … 999 of the linear β schedule has seen t = step / 999.

    Args:
        unet: The `UNet2DModel`; its prediction must be the noise (`prediction_type="epsilon"` in its scheduler, which
            the network itself does not know).

    Raises:
        ValueError: if the network predicts a variance too, wants class labels, or has no square image size.

    Attributes:
        image_size, channels: From the configuration of the network.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        config: Any = unet.config
        size = config.sample_size
        sizes = {size} if isinstance(size, int) else set(size or ())
        if len(sizes) != 1:
            raise ValueError(f"the UNet needs one square `sample_size` in its config, found {size}")
        if config.in_channels != config.out_channels:
            raise ValueError(
                f"the UNet takes {config.in_channels} channels and returns {config.out_channels}; "
                "networks that also predict a variance are not supported"
            )
        if getattr(config, "num_class_embeds", None) or getattr(config, "class_embed_type", None):
            raise ValueError("the UNet is conditioned on class labels; only unconditional networks are supported")
        self.unet = unet
        self.image_size: int = sizes.pop()
        self.channels: int = config.in_channels

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """eps_hat of states x (batch, channels, height, width) in the [-1, 1] scale at labels = 999 t (batch,)."""
        return self.unet(x, labels).sample
