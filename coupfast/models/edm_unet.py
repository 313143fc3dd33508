"""EDM's DDPM++ network for CIFAR (`SongUNet`), under its public parameter names, as a score network.

    eps_hat = SongUNet(x_k, 999 t), F behind EDM's preconditioning (`adapters.edm_eps_hat`), told c_noise = ln(σ/α)/4

DDPM++ once more, with blocks of one layout at every place, resampling inside a block's first convolution, and attention inside
the block. `cifar10-edm` has 55,733,891 parameters with the map of its augmentation labels, which no image has at test time.

A public snapshot is a pickle of the whole network with its source code; it is not read. Save `net.model.state_dict()`, or that
of `net` itself, with `torch.save` where EDM's code runs.

Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv:2206.00364, appendix F.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coupfast.models.adapters import edm_eps_hat
from coupfast.models.registry import CheckpointError, Config, Family, named_configuration, register
from coupfast.models.unet_parts import attend, check_sizes, check_states, resampled, time_features
from coupfast.sde import VPSDE

_FILTER = "resample_filter"  # buffers of the resampling layers: constants


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class _Block(nn.Module):
    """A residual block, with attention after it where `attention`; `resample` is None, "down" or "up"."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_channels: int,
        *,
        resample: str | None = None,
        attention: bool = False,
        dropout: float,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.resample, self.attention, self.dropout = resample, attention, dropout
        self.norm0, self.conv0 = _norm(in_channels), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(time_channels, out_channels)
        self.norm1, self.conv1 = _norm(out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip: nn.Conv2d | None = None
        if resample is not None or in_channels != out_channels:
            self.skip = nn.Conv2d(in_channels, out_channels, 1)
        if attention:
            self.norm2 = _norm(out_channels)
            self.qkv, self.proj = nn.Conv2d(out_channels, 3 * out_channels, 1), nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv0(resampled(F.silu(self.norm0(x)), self.resample)) + self.affine(temb)[:, :, None, None]
        h = self.conv1(F.dropout(F.silu(self.norm1(h)), self.dropout, self.training))
        h = (h + (x if self.skip is None else self.skip(resampled(x, self.resample)))) * math.sqrt(0.5)
        if not self.attention:
            return h
        # Every channel's query, key and value stand side by side.
        q, k, v = self.qkv(self.norm2(h)).view(len(h), self.out_channels, 3, -1).unbind(2)
        return (self.proj(attend(q, k, v).reshape(h.shape)) + h) * math.sqrt(0.5)


class SongUNet(nn.Module):
    """EDM's network without class labels as a score network.

    Args:
        model_channels: Channels that the levels' are multiples of; a multiple of 4.
        channel_mult: Channels of each level as a multiple of `model_channels`; a level halves the resolution of the one before.
        num_blocks: Residual blocks per level on the way down (one more on the way up).
        attn_resolutions: Resolutions with attention.
        image_size: Height and width of the images in pixels.
        channels: Image channels.
        augment_dim: Augmentation labels that it was trained with: a weight that images at test time do not use; 0 is none.
        sigma_data: Standard deviation of the data in its preconditioning.
        dropout: Probability in training mode; nothing in eval mode.

    Raises:
        ValueError: if an argument is out of range.

    Attributes:
        config: The arguments that fix the function, with `arch`, as JSON-ready values.
        image_size, channels: As given.
    """

    #: It knows what it predicts, and how it is told the time.
    is_adapted = True

    def __init__(
        self,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (2, 2, 2),
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        image_size: int = 32,
        channels: int = 3,
        augment_dim: int = 9,
        sigma_data: float = 0.5,
        *,
        dropout: float = 0.13,
    ) -> None:
        super().__init__()
        resolutions = check_sizes(model_channels, channel_mult, num_blocks, attn_resolutions, image_size, channels)
        if model_channels % 4:
            raise ValueError(f"`model_channels` is a multiple of 4, got {model_channels}")
        if augment_dim < 0 or not sigma_data > 0.0 or not 0.0 <= dropout < 1.0:
            raise ValueError(
                f"`augment_dim` is at least 0, `sigma_data` above 0 and `dropout` in [0, 1), got {augment_dim}, {sigma_data}, "
                f"{dropout}"
            )
        self.model_channels, self.image_size, self.channels, self.sigma_data = model_channels, image_size, channels, sigma_data
        self.config: dict[str, object] = {
            "arch": "SongUNet",
            "model_channels": model_channels,
            "channel_mult": list(channel_mult),
            "num_blocks": num_blocks,
            "attn_resolutions": list(attn_resolutions),
            "image_size": image_size,
            "channels": channels,
            "augment_dim": augment_dim,
            "sigma_data": sigma_data,
        }
        time = 4 * model_channels
        if augment_dim:
            self.map_augment = nn.Linear(augment_dim, model_channels, bias=False)
        self.map_layer0, self.map_layer1 = nn.Linear(model_channels, time), nn.Linear(time, time)

        def block(cin: int, cout: int, *, resample: str | None = None, attention: bool = False) -> _Block:
            return _Block(cin, cout, time, resample=resample, attention=attention, dropout=dropout)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        width, pushed = model_channels, []
        for level, resolution in enumerate(resolutions):
            place = f"{resolution}x{resolution}"
            if level == 0:
                self.enc[f"{place}_conv"] = nn.Conv2d(channels, width, 3, padding=1)
            else:
                self.enc[f"{place}_down"] = block(width, width, resample="down")
            pushed.append(width)
            for i in range(num_blocks):
                before, width = width, model_channels * channel_mult[level]
                self.enc[f"{place}_block{i}"] = block(before, width, attention=resolution in attn_resolutions)
                pushed.append(width)
        for level in reversed(range(len(resolutions))):
            resolution = resolutions[level]
            place = f"{resolution}x{resolution}"
            if level == len(resolutions) - 1:
                self.dec[f"{place}_in0"] = block(width, width, attention=True)
                self.dec[f"{place}_in1"] = block(width, width)
            else:
                self.dec[f"{place}_up"] = block(width, width, resample="up")
            for i in range(num_blocks + 1):
                before, width = width + pushed.pop(), model_channels * channel_mult[level]
                last = i == num_blocks and resolution in attn_resolutions
                self.dec[f"{place}_block{i}"] = block(before, width, attention=last)
        place = f"{image_size}x{image_size}"
        self.dec[f"{place}_aux_norm"] = _norm(width)
        self.dec[f"{place}_aux_conv"] = nn.Conv2d(width, channels, 3, padding=1)

    def predict(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """F(x, c_noise): x scaled to variance 1, c_noise (batch,) or (1,)."""
        features = time_features(c_noise, self.model_channels, last=self.model_channels // 2 - 1, cosine_first=False)
        temb = F.silu(self.map_layer1(F.silu(self.map_layer0(features.to(self.map_layer0.weight.dtype)))))
        stored = []
        for layer in self.enc.values():
            x = layer(x, temb) if isinstance(layer, _Block) else layer(x)
            stored.append(x)
        for layer in self.dec.values():
            if isinstance(layer, _Block):
                x = layer(x if x.shape[1] == layer.in_channels else torch.cat([x, stored.pop()], dim=1), temb)
            else:
                x = layer(F.silu(x)) if isinstance(layer, nn.Conv2d) else layer(x)
        return x

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """eps_hat of states x (batch, channels, image_size, image_size) in [-1, 1] at labels = 999 t, (batch,) or (1,)."""
        check_states(x, labels, self.channels, self.image_size)
        return edm_eps_hat(self.predict, x, labels, sde=VPSDE(), sigma_data=self.sigma_data)


def _recognise(state: Mapping[str, Tensor]) -> Config | None:
    if "map_layer0.weight" not in state or not any(name.startswith("enc.") for name in state):
        return None
    if "map_label.weight" in state:
        raise CheckpointError("this network of EDM is conditioned on class labels (map_label); one without is supported")
    if any(name.endswith(_FILTER) and value.shape != (1, 1, 2, 2) for name, value in state.items()):
        raise CheckpointError("this network of EDM resamples with a wider filter (NCSN++); DDPM++ (ddpmpp) is supported")
    augment = state["map_augment.weight"].shape[-1] if "map_augment.weight" in state else 0
    return named_configuration("SongUNet", state, {"augment_dim": augment} if augment != 9 else {})


def _filters() -> frozenset[str]:
    places = [(resolution, way) for resolution in (4, 8, 16, 32, 64) for way in ("enc.{0}x{0}_down", "dec.{0}x{0}_up")]
    return frozenset(f"{way.format(resolution)}.{layer}.{_FILTER}" for resolution, way in places for layer in ("conv0", "skip"))


register(
    Family(
        "SongUNet",
        "score",
        SongUNet,
        names={"cifar10-edm": {}},
        needs="give `weights=` a state dict of EDM's CIFAR network (its .pkl has code in it), or 'random'",
        recognise=_recognise,
        ignored=_filters(),
        weights_only=True,
    )
)
