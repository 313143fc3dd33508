"""The unconditional U-Net of guided-diffusion, under its public parameter names: DiffPure's network for ImageNet.

    eps_hat = the first half of the channels of GuidedUNet(x_k), told the step floor(1000 t) (`adapters`: "floor")

Residual blocks that the time scales and shifts, resampling inside blocks, attention of several heads. `imagenet256-uncond`
(`256x256_diffusion_uncond.pt`) has 552,814,086 parameters in 566 tensors. The public code runs it in half precision; here it
runs in the dtype of its weights.

Source: Dhariwal and Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", arXiv:2105.05233, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coupfast.models.adapters import first_half, whole_step
from coupfast.models.registry import CheckpointError, Config, Family, named_configuration, register
from coupfast.models.unet_parts import attend, check_sizes, check_states, resampled, time_features


class _Res(nn.Module):
    """`resample` is None, "down" or "up"; it acts before the first convolution and on the skip connection."""

    def __init__(
        self, in_channels: int, out_channels: int, time_channels: int, *, resample: str | None = None, dropout: float
    ) -> None:
        super().__init__()
        self.resample = resample
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_channels, 2 * out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = in_channels == out_channels
        self.skip_connection: nn.Module = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        norm, activation, conv = self.in_layers
        h = conv(resampled(activation(norm(x)), self.resample))
        scale, shift = self.emb_layers(temb)[:, :, None, None].chunk(2, dim=1)
        norm, activation, dropout, conv = self.out_layers
        h = conv(dropout(activation(norm(h) * (1.0 + scale) + shift)))
        return self.skip_connection(resampled(x, self.resample)) + h


class _Attention(nn.Module):
    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.heads = channels // head_channels
        self.norm = nn.GroupNorm(32, channels)
        self.qkv, self.proj_out = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        # Heads are cut first, and each into query, key and value: the older of that code's two orders.
        heads = _each_pixel(self.qkv, self.norm(x)).reshape(batch * self.heads, 3 * channels // self.heads, -1)
        return x + _each_pixel(self.proj_out, attend(*heads.chunk(3, dim=1)).reshape(x.shape))


def _each_pixel(layer: nn.Conv1d, x: Tensor) -> Tensor:
    """A convolution of one pixel on images: its weights are stored for flat ones."""
    return F.conv2d(x, layer.weight[..., None], layer.bias)


class GuidedUNet(nn.Module):
    """The U-Net of guided-diffusion without class labels as a score network.

    Args:
        model_channels: Channels that the levels' are multiples of; a multiple of 32 (GroupNorm has 32 groups).
        channel_mult: Channels of each level as a multiple of `model_channels`; a level halves the resolution of the one before.
        num_res_blocks: Residual blocks per level on the way down (one more on the way up).
        attn_resolutions: Resolutions after whose residual blocks there is attention.
        head_channels: Channels of a head; divides those of every level with attention, and of the last.
        image_size: Height and width of the images in pixels.
        channels: Image channels.
        learned_variance: Whether it also predicts a variance, in channels of their own after the noise's.
        dropout: Probability in training mode; nothing in eval mode.

    Raises:
        ValueError: if an argument is out of range.

    Attributes:
        config: The arguments that fix the function, with `arch`, as JSON-ready values.
        image_size, channels: As given.
    """

    #: It is told whole steps, and knows what it predicts.
    whole_labels = is_adapted = True

    def __init__(
        self,
        model_channels: int = 256,
        channel_mult: Sequence[int] = (1, 1, 2, 2, 4, 4),
        num_res_blocks: int = 2,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        head_channels: int = 64,
        image_size: int = 256,
        channels: int = 3,
        learned_variance: bool = True,
        *,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        resolutions = check_sizes(model_channels, channel_mult, num_res_blocks, attn_resolutions, image_size, channels)
        if model_channels % 32:
            raise ValueError(f"`model_channels` is a multiple of 32, got {model_channels}")
        attending = [m for m, resolution in zip(channel_mult, resolutions, strict=True) if resolution in attn_resolutions]
        if head_channels < 1 or any(model_channels * m % head_channels for m in [*attending, channel_mult[-1]]):
            raise ValueError(f"`head_channels` divides the channels of every level with attention, got {head_channels}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"`dropout` must lie in [0, 1), got {dropout}")
        self.model_channels, self.image_size, self.channels = model_channels, image_size, channels
        self.learned_variance = bool(learned_variance)
        self.config: dict[str, object] = {
            "arch": "GuidedUNet",
            "model_channels": model_channels,
            "channel_mult": list(channel_mult),
            "num_res_blocks": num_res_blocks,
            "attn_resolutions": list(attn_resolutions),
            "head_channels": head_channels,
            "image_size": image_size,
            "channels": channels,
            "learned_variance": self.learned_variance,
        }
        time = 4 * model_channels
        self.time_embed = nn.Sequential(nn.Linear(model_channels, time), nn.SiLU(), nn.Linear(time, time))

        def res(cin: int, cout: int, resample: str | None = None) -> _Res:
            return _Res(cin, cout, time, resample=resample, dropout=dropout)

        width = model_channels * channel_mult[0]
        blocks: list[list[nn.Module]] = [[nn.Conv2d(channels, width, 3, padding=1)]]
        pushed = [width]
        for level, resolution in enumerate(resolutions):
            for _ in range(num_res_blocks):
                before, width = width, model_channels * channel_mult[level]
                attention = [_Attention(width, head_channels)] if resolution in attn_resolutions else []
                blocks.append([res(before, width), *attention])
                pushed.append(width)
            if level < len(resolutions) - 1:
                blocks.append([res(width, width, "down")])
                pushed.append(width)
        self.input_blocks = nn.ModuleList(nn.ModuleList(block) for block in blocks)
        self.middle_block = nn.ModuleList([res(width, width), _Attention(width, head_channels), res(width, width)])
        blocks = []
        for level in reversed(range(len(resolutions))):
            for i in range(num_res_blocks + 1):
                before, width = width + pushed.pop(), model_channels * channel_mult[level]
                attention = [_Attention(width, head_channels)] if resolutions[level] in attn_resolutions else []
                up = [res(width, width, "up")] if level > 0 and i == num_res_blocks else []
                blocks.append([res(before, width), *attention, *up])
        self.output_blocks = nn.ModuleList(nn.ModuleList(block) for block in blocks)
        out = (2 if self.learned_variance else 1) * channels
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1))

    def predict(self, x: Tensor, steps: Tensor) -> Tensor:
        """What the network returns for time steps (batch,) or (1,): ε̂ and, where it has one, the variance's share."""
        features = time_features(steps, self.model_channels, last=self.model_channels // 2, cosine_first=True)
        temb = self.time_embed(features.to(x.dtype))
        stored = []
        for block in self.input_blocks:
            x = _through(block, x, temb)
            stored.append(x)
        x = _through(self.middle_block, x, temb)
        for block in self.output_blocks:
            x = _through(block, torch.cat([x, stored.pop()], dim=1), temb)
        return self.out(x)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """eps_hat of states x (batch, channels, image_size, image_size) in [-1, 1] at labels = 999 t, (batch,) or (1,)."""
        check_states(x, labels, self.channels, self.image_size)
        predicted = self.predict(x, whole_step(labels, "floor"))
        return first_half(predicted, self.channels) if self.learned_variance else predicted


def _through(block: nn.Module, x: Tensor, temb: Tensor) -> Tensor:
    for layer in block:  # type: ignore[attr-defined]
        x = layer(x, temb) if isinstance(layer, _Res) else layer(x)
    return x


def _recognise(state: Mapping[str, Tensor]) -> Config | None:
    if not all(name in state for name in ("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.1.qkv.weight")):
        return None
    if "label_emb.weight" in state:
        raise CheckpointError("this network of guided-diffusion is conditioned on class labels (label_emb); take one without")
    return named_configuration("GuidedUNet", state)


register(
    Family(
        "GuidedUNet",
        "score",
        GuidedUNet,
        names={"imagenet256-uncond": {}},
        needs="give `weights=` the public 256x256_diffusion_uncond.pt, a converted safetensors file, or 'random'",
        recognise=_recognise,
        weights_only=True,
    )
)
