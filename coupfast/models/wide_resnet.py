"""Wide residual networks under the parameter names of RobustBench's `Standard` model, e.g. WRN-28-10.

Zagoruyko and Komodakis 2016, arXiv:1605.07146: pre-activation blocks, ReLU. Where a block changes the width, its
shortcut convolution reads relu(bn1(x)); an identity shortcut adds x itself. In eval mode the network is piecewise
linear in the image, and every operation is out of place and has a forward derivative.

Here are also the names that it is loaded by and how its weight files are recognised.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coupfast.models.registry import CheckpointError, Config, Family, register


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


def read_size(
    state: Mapping[str, Tensor], arch: str, block: str, head: str, width: str
) -> dict[str, int] | None:
    """Depth, width and classes of a wide residual network, from the names and shapes of its weights.

    Args:
        state: Weights by name.
        arch: For messages.
        block: The name of the first convolution of a block of the first group, with {} for the block's number.
        head: The name of the last layer's weight.
        width: How the configuration calls the factor of the widths.

    Returns:
        ``{"depth": …, width: …, "num_classes": …}``; None where the names are not there.

    Raises:
        CheckpointError: if the shapes are of no such network.
    """
    first, last = state.get(block.format(0)), state.get(head)
    if first is None or last is None:
        return None
    if first.ndim != 4 or last.ndim != 2 or first.shape[0] % 16:
        raise CheckpointError(
            f"{block.format(0)} {tuple(first.shape)} and {head} {tuple(last.shape)} are not the shapes of a {arch}: "
            "expected (16 · width, 16, 3, 3) and (classes, features)"
        )
    num_blocks = 0
    while block.format(num_blocks) in state:
        num_blocks += 1
    return {"depth": 6 * num_blocks + 4, width: first.shape[0] // 16, "num_classes": last.shape[0]}


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
            # To draw nothing for shapes alone, PyTorch would import its compiler, which takes seconds.
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
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


# --- names and weights ------------------------------------------------------------------------------------------------


def _recognise(state: Mapping[str, Tensor]) -> Config | None:
    return read_size(state, "WideResNet", "block1.layer.{}.conv1.weight", "fc.weight", "widen_factor")


def _by_rule(name: str) -> Config | None:
    match = re.fullmatch(r"wrn-(\d+)-(\d+)", name)
    return None if match is None else {"depth": int(match[1]), "widen_factor": int(match[2])}


register(
    Family(
        "WideResNet",
        "classifier",
        WideResNet,
        names={
            "wrn-28-10": {"depth": 28, "widen_factor": 10},
            "wrn-70-16": {"depth": 70, "widen_factor": 16},
            # DiffPure's checkpoint of this name, which normalises inside.
            "wrn-70-16-dropout": {
                "depth": 70,
                "widen_factor": 16,
                "mean": (0.4914, 0.4822, 0.4465),
                "std": (0.2471, 0.2435, 0.2616),
            },
        },
        rule=_by_rule,
        rule_text="wrn-D-W",
        recognise=_recognise,
        fixed={"activation": "relu"},
    )
)
