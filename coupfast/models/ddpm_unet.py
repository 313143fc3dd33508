"""The noise-prediction U-Net of DDPM, under the parameter names of its `pytorch_diffusion` port: GDMP's network.

    eps_hat = DDPMUNet(x_k, 999 t), told the index of the discrete chain, 1000 t − 1 (`adapters`: "index")

Residual blocks of GroupNorm, swish and 3x3 convolutions, the time added between them; strided convolutions down, nearest
neighbours and a convolution up; attention of one head. `cifar10-ddpm` has 35,746,307 parameters.

Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239, appendix B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coupfast.models.adapters import whole_step
from coupfast.models.registry import Config, Family, named_configuration, register
from coupfast.models.unet_parts import attend, check_sizes, check_states, time_features


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6) if channels % 32 == 0 else nn.GroupNorm(channels // 4, channels, eps=1e-6)


class _Res(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, time_channels: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm1, self.conv1 = _norm(in_channels), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.temb_proj = nn.Linear(time_channels, out_channels)
        self.norm2, self.conv2 = _norm(out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.temb_proj(temb)[:, :, None, None]
        h = self.conv2(F.dropout(F.silu(self.norm2(h)), self.dropout, self.training))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h


class _Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        return x + self.proj_out(attend(q, k, v).view(x.shape))


class _Resampling(nn.Module):
    """A convolution after nearest neighbours (up), or with stride 2 after a row and a column of zeros at the end (down)."""

    def __init__(self, channels: int, *, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest") if self.up else F.pad(x, (0, 1, 0, 1)))


class _Level(nn.Module):
    """Blocks of one resolution, and what leads to the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.attn = nn.ModuleList(), nn.ModuleList()

    def take(self, i: int, x: Tensor, temb: Tensor) -> Tensor:
        x = self.block[i](x, temb)
        return self.attn[i](x) if len(self.attn) else x


class _Middle(nn.Module):
    def __init__(self, channels: int, time_channels: int, dropout: float) -> None:
        super().__init__()
        self.block_1 = _Res(channels, channels, time_channels, dropout)
        self.attn_1 = _Attention(channels)
        self.block_2 = _Res(channels, channels, time_channels, dropout)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x, temb)), temb)


class _Time(nn.Module):
    def __init__(self, ch: int) -> None:
        super().__init__()
        self.dense = nn.ModuleList([nn.Linear(ch, 4 * ch), nn.Linear(4 * ch, 4 * ch)])

    def forward(self, features: Tensor) -> Tensor:
        # Every block takes the embedding behind one more swish.
        return F.silu(self.dense[1](F.silu(self.dense[0](features))))


class DDPMUNet(nn.Module):
    """DDPM's U-Net as a score network.

    Args:
        ch: Channels of the first level; a multiple of 4.
        ch_mult: Channels of each level as a multiple of `ch`; each level after the first halves the resolution.
        num_res_blocks: Residual blocks per level on the way down (one more on the way up).
        attn_resolutions: Resolutions after whose residual blocks there is attention.
        image_size: Height and width of the images in pixels.
        channels: Image channels.
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
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attn_resolutions: Sequence[int] = (16,),
        image_size: int = 32,
        channels: int = 3,
        *,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        resolutions = check_sizes(ch, ch_mult, num_res_blocks, attn_resolutions, image_size, channels)
        if ch % 4:
            raise ValueError(f"`ch` is a multiple of 4, got {ch}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"`dropout` must lie in [0, 1), got {dropout}")
        self.ch, self.image_size, self.channels = ch, image_size, channels
        self.config: dict[str, object] = {
            "arch": "DDPMUNet",
            "ch": ch,
            "ch_mult": list(ch_mult),
            "num_res_blocks": num_res_blocks,
            "attn_resolutions": list(attn_resolutions),
            "image_size": image_size,
            "channels": channels,
        }
        time, levels = 4 * ch, len(ch_mult)
        self.temb = _Time(ch)
        self.conv_in = nn.Conv2d(channels, ch, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList(_Level() for _ in range(levels))
        width, pushed = ch, [ch]
        for level in range(levels):
            down = _Level()
            for _ in range(num_res_blocks):
                down.block.append(_Res(width, ch * ch_mult[level], time, dropout))
                width = ch * ch_mult[level]
                if resolutions[level] in attn_resolutions:
                    down.attn.append(_Attention(width))
                pushed.append(width)
            if level < levels - 1:
                down.downsample = _Resampling(width, up=False)
                pushed.append(width)
            self.down.append(down)
        self.mid = _Middle(width, time, dropout)
        for level in reversed(range(levels)):
            up = self.up[level]
            for _ in range(num_res_blocks + 1):
                up.block.append(_Res(width + pushed.pop(), ch * ch_mult[level], time, dropout))  # type: ignore[union-attr,operator]
                width = ch * ch_mult[level]
                if resolutions[level] in attn_resolutions:
                    up.attn.append(_Attention(width))  # type: ignore[union-attr,operator]
            if level > 0:
                up.upsample = _Resampling(width, up=True)
        self.norm_out, self.conv_out = _norm(width), nn.Conv2d(width, channels, 3, padding=1)

    def predict(self, x: Tensor, index: Tensor) -> Tensor:
        """ε̂ of states of the chain's indices, (batch,) or (1,)."""
        features = time_features(index, self.ch, last=self.ch // 2 - 1, cosine_first=False)
        temb = self.temb(features.to(self.conv_in.weight.dtype))
        h = self.conv_in(x)
        stored = [h]
        for level in self.down:
            for i in range(len(level.block)):  # type: ignore[arg-type]
                h = level.take(i, h, temb)  # type: ignore[operator]
                stored.append(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)  # type: ignore[operator]
                stored.append(h)
        h = self.mid(h, temb)
        for level in reversed(self.up):
            for i in range(len(level.block)):  # type: ignore[arg-type]
                h = level.take(i, torch.cat([h, stored.pop()], dim=1), temb)  # type: ignore[operator]
            if hasattr(level, "upsample"):
                h = level.upsample(h)  # type: ignore[operator]
        return self.conv_out(F.silu(self.norm_out(h)))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """eps_hat of states x (batch, channels, image_size, image_size) in [-1, 1] at labels = 999 t, (batch,) or (1,)."""
        check_states(x, labels, self.channels, self.image_size)
        return self.predict(x, whole_step(labels, "index"))


def _recognise(state: Mapping[str, Tensor]) -> Config | None:
    if "temb.dense.0.weight" not in state or "conv_in.weight" not in state:
        return None
    # The size of the images cannot be read off the weights: what is told is whether they are those of a name.
    return named_configuration("DDPMUNet", state)


register(
    Family(
        "DDPMUNet",
        "score",
        DDPMUNet,
        names={"cifar10-ddpm": {}, "celebahq-ddpm": {"ch_mult": [1, 1, 2, 2, 4, 4], "image_size": 256}},
        needs="give `weights=` a checkpoint of pytorch_diffusion, a converted safetensors file, or 'random'",
        recognise=_recognise,
        weights_only=True,
    )
)
