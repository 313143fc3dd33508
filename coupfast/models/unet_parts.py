"""What the U-Nets of several papers share: features of a time step, resampling, attention, and how sizes are checked."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def time_features(steps: Tensor, features: int, *, last: int, cosine_first: bool) -> Tensor:
    """Sines and cosines of a time step at falling frequencies, float32 as the networks were trained: (batch, features).

    Args:
        steps: (batch,), whole or not.
        features: Even; half of them are sines.
        last: k of the frequency 1e-4: half − 1 where the last of the half frequencies is that one, half where it would be the
            next.
        cosine_first: The order of the halves.
    """
    k = torch.arange(features // 2, dtype=torch.float32, device=steps.device)
    angles = steps.to(torch.float32)[:, None] * torch.exp(k * (-math.log(10000.0) / last))[None, :]
    halves = (torch.cos(angles), torch.sin(angles)) if cosine_first else (torch.sin(angles), torch.cos(angles))
    return torch.cat(halves, dim=1)


def resampled(x: Tensor, way: str | None) -> Tensor:
    """Means of 2 x 2 pixels where `way` is "down", each pixel four times where it is "up", x itself where it is None."""
    if way == "down":
        return F.avg_pool2d(x, 2)
    if way == "up":
        return F.interpolate(x, scale_factor=2, mode="nearest")
    return x


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(qᵀ k / sqrt(channels)) applied to v; all (batch, channels, pixels), heads among the batch.

    The softmax is written out because the fused attention kernels have no second derivative.
    """
    weights = torch.softmax((q * q.shape[1] ** -0.5).transpose(1, 2) @ k, dim=-1)  # [batch, pixels of q, pixels of k]
    return v @ weights.transpose(1, 2)


def check_sizes(
    width: int, mult: Sequence[int], num_blocks: int, attention: Sequence[int], image_size: int, channels: int
) -> list[int]:
    """The resolution of every level, or ValueError if a network of these sizes cannot be.

    Args:
        width: Channels of the first level.
        mult: Channels of each level as a multiple of `width`; each level after the first halves the resolution.
        num_blocks: Residual blocks of a level.
        attention: Resolutions with attention.
    """
    if width < 1 or channels < 1 or num_blocks < 1:
        raise ValueError(f"channels and blocks are at least 1, got width {width}, {channels} channels, {num_blocks} blocks")
    if not mult or any(isinstance(m, bool) or int(m) != m or m < 1 for m in mult):
        raise ValueError(f"levels have channels as positive whole multiples, at least one, got {tuple(mult)}")
    halvings = 2 ** (len(mult) - 1)
    if image_size < 1 or image_size % halvings:
        raise ValueError(f"{len(mult)} levels need an image size that {halvings} divides, got {image_size}")
    resolutions = [image_size >> level for level in range(len(mult))]
    if unknown := sorted(set(attention) - set(resolutions)):
        raise ValueError(f"there is no resolution {unknown} for attention: the maps have sizes {resolutions}")
    return resolutions


def check_states(x: Tensor, labels: Tensor, channels: int, image_size: int) -> None:
    """ValueError unless these are states and labels of such a network."""
    check_images(x, channels, image_size)
    check_labels(labels, x)


def check_images(x: Tensor, channels: int, image_size: int) -> None:
    """ValueError unless these are square images of that many channels and pixels a side."""
    expected = (channels, image_size, image_size)
    if x.ndim != 4 or tuple(x.shape[1:]) != expected:
        raise ValueError(f"`x` must have shape (batch, {', '.join(map(str, expected))}), got {tuple(x.shape)}")


def check_labels(labels: Tensor, x: Tensor) -> None:
    """ValueError unless there is one label for each of the images, or one for all."""
    if labels.ndim != 1 or labels.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"`labels` must have shape ({x.shape[0]},), one 999 t per image (or (1,)), got {tuple(labels.shape)}")
