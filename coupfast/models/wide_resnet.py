"""Wide residual networks under the parameter names of RobustBench's `Standard` model, e.g. WRN-28-10.

Zagoruyko and Komodakis 2016, arXiv:1605.07146: pre-activation blocks, ReLU. Where a block changes the width, its
shortcut convolution reads relu(bn1(x)); an identity shortcut adds x itself. In eval mode the network is piecewise
linear in the image, and every operation is out of place and has a forward derivative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)


class BasicBlock(nn.Module):
    """Batch norm, ReLU, 3×3 convolution, twice, and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv(in_channels, out_channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv(out_channels, out_channels, 3, 1)
        self.convShortcut = _conv(in_channels, out_channels, 1, stride) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(h)
        h = self.conv2(F.relu(self.bn2(self.conv1(h))))
        return shortcut + h


class BlockGroup(nn.Module):
    """The blocks of one resolution; only the first of them strides and widens."""

    def __init__(self, num_blocks: int, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        blocks = [BasicBlock(in_channels, out_channels, stride)]
        blocks += [BasicBlock(out_channels, out_channels, 1) for _ in range(num_blocks - 1)]
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def blocks_per_group(depth: int) -> int:
    """The number of blocks in each of the three groups; a depth is 6 n + 4, n at least 1."""
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"`depth` of a wide residual network is 6 n + 4 (10, 16, 22, 28, …, 70), got {depth}")
    return (depth - 4) // 6


class WideResNet(nn.Module):
    """Classifier from images in [0, 1] to logits.

    Args:
        depth: 6 n + 4 with n blocks in each of three groups, e.g. 28.
        widen_factor: The groups have 16, 32 and 64 times this many channels, at least 1.
        num_classes: Number of logits, at least 1.
        mean, std: Per-channel normalisation of the image; None (as in `Standard`) takes images as they are. DiffPure's
            `wrn-70-16-dropout` has both. They are no part of the state dict.

    Raises:
        ValueError: if an argument is out of range.

    Attributes:
        config: The arguments, with `arch`, as JSON-ready values.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        depth: int = 28,
        widen_factor: int = 10,
        num_classes: int = 10,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        num_blocks = blocks_per_group(depth)
        if widen_factor < 1:
            raise ValueError(f"`widen_factor` must be at least 1, got {widen_factor}")
        if num_classes < 1:
            raise ValueError(f"`num_classes` must be at least 1, got {num_classes}")
        if (mean is None) != (std is None):
            raise ValueError(f"give both `mean` and `std`, or neither; got mean={mean}, std={std}")
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) != 3:
                raise ValueError(f"`{name}` must hold 3 numbers, one per channel, got {values}")
            self.register_buffer(name, None if values is None else torch.tensor(values)[:, None, None], persistent=False)
        self.config: dict[str, object] = {
            "arch": "WideResNet",
            "depth": depth,
            "widen_factor": widen_factor,
            "num_classes": num_classes,
        }
        if mean is not None and std is not None:
            self.config |= {"mean": list(mean), "std": list(std)}

        widths = [16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.conv1 = _conv(3, 16, 3, 1)
        self.block1 = BlockGroup(num_blocks, 16, widths[0], 1)
        self.block2 = BlockGroup(num_blocks, widths[0], widths[1], 2)
        self.block3 = BlockGroup(num_blocks, widths[1], widths[2], 2)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.fc = nn.Linear(widths[2], num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # He et al. 2015 with fan_out: keeps the variance of the backward pass.
                fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, 3, height, width) in [0, 1]."""
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"`x` must have shape (batch, 3, height, width), got {tuple(x.shape)}")
        if self.mean is not None and self.std is not None:
            x = (x - self.mean) / self.std
        h = self.conv1(x)  # [batch, 16, 32, 32]
        h = self.block1(h)  # [batch, 16 widen_factor, 32, 32]
        h = self.block2(h)  # [batch, 32 widen_factor, 16, 16]
        h = self.block3(h)  # [batch, 64 widen_factor, 8, 8]
        h = F.relu(self.bn1(h)).mean(dim=(2, 3))  # [batch, 64 widen_factor]
        return self.fc(h)
