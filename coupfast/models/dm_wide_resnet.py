"""Wide residual networks under the parameter names of the adversarially trained models of Gowal, Rebuffi and Wang.

Gowal et al. 2020 (arXiv:2010.03593) and 2021, Rebuffi et al. 2021, Wang et al. 2023, as RobustBench stores them:
images are normalised inside, the activation is ReLU or Swish (SiLU), and convolutions with stride 2 pad below and to
the right only. Every operation is out of place and has a forward derivative.

Here are also the names that it is loaded by and how its weight files are recognised; they do not tell the activation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coupfast.models.registry import Config, Family, register
from coupfast.models.wide_resnet import blocks_per_group, read_size

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2471, 0.2435, 0.2616)

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}


class Block(nn.Module):
    """Batch norm, activation, 3×3 convolution, twice; the shortcut convolution reads the first activation."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(in_channels)
        self.conv_0 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(out_channels)
        self.conv_1 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
        self.activation = activation()
        # The weights come from a framework whose "same" padding at stride 2 is all on the far side.
        self.padding = (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1)  # left, right, top, bottom

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.batchnorm_0(x))
        shortcut = x if self.shortcut is None else self.shortcut(h)
        h = self.conv_0(F.pad(h, self.padding))
        h = self.conv_1(self.activation(self.batchnorm_1(h)))
        return shortcut + h


class BlockGroup(nn.Module):
    """The blocks of one resolution; only the first of them strides and widens."""

    def __init__(self, num_blocks: int, in_channels: int, out_channels: int, stride: int, activation: type[nn.Module]) -> None:
        super().__init__()
        blocks = [Block(in_channels, out_channels, stride, activation)]
        blocks += [Block(out_channels, out_channels, 1, activation) for _ in range(num_blocks - 1)]
        self.block = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class DMWideResNet(nn.Module):
    """Classifier from images in [0, 1] to logits, normalising inside.

    Args:
        depth: 6 n + 4 with n blocks in each of three groups, e.g. 28 or 70.
        width: The groups have 16, 32 and 64 times this many channels, at least 1.
        num_classes: Number of logits, at least 1.
        activation: "relu", "silu" (Swish), or a class of nn.Module without arguments. Weight files do not tell which:
            the published Gowal, Rebuffi and Wang models have "silu".
        mean, std: Normalisation of the image per channel; no part of the state dict.

    Raises:
        ValueError: if an argument is out of range.

    Attributes:
        config: The arguments, with `arch`, as JSON-ready values (an activation class by its name).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        depth: int = 28,
        width: int = 10,
        num_classes: int = 10,
        activation: str | type[nn.Module] = "silu",
        mean: Sequence[float] = CIFAR10_MEAN,
        std: Sequence[float] = CIFAR10_STD,
    ) -> None:
        super().__init__()
        num_blocks = blocks_per_group(depth)
        if width < 1:
            raise ValueError(f"`width` must be at least 1, got {width}")
        if num_classes < 1:
            raise ValueError(f"`num_classes` must be at least 1, got {num_classes}")
        if isinstance(activation, str):
            if activation not in ACTIVATIONS:
                raise ValueError(f"`activation` is one of {sorted(ACTIVATIONS)} or a class, got {activation!r}")
            activation_class = ACTIVATIONS[activation]
        else:
            activation_class = activation
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != 3:
                raise ValueError(f"`{name}` must hold 3 numbers, one per channel, got {values}")
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.config: dict[str, object] = {
            "arch": "DMWideResNet",
            "depth": depth,
            "width": width,
            "num_classes": num_classes,
            "activation": activation if isinstance(activation, str) else activation.__name__,
            "mean": list(mean),
            "std": list(std),
        }

        widths = [16 * width, 32 * width, 64 * width]
        self.init_conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layer = nn.Sequential(
            BlockGroup(num_blocks, 16, widths[0], 1, activation_class),
            BlockGroup(num_blocks, widths[0], widths[1], 2, activation_class),
            BlockGroup(num_blocks, widths[1], widths[2], 2, activation_class),
        )
        self.batchnorm = nn.BatchNorm2d(widths[2])
        self.activation = activation_class()
        self.logits = nn.Linear(widths[2], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, 3, height, width) in [0, 1]."""
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"`x` must have shape (batch, 3, height, width), got {tuple(x.shape)}")
        h = self.init_conv((x - self.mean) / self.std)  # [batch, 16, 32, 32]
        h = self.layer(h)  # [batch, 64 width, 8, 8]
        h = self.activation(self.batchnorm(h)).mean(dim=(2, 3))  # [batch, 64 width]
        return self.logits(h)


# --- names and weights ------------------------------------------------------------------------------------------------


def _recognise(state: Mapping[str, Tensor]) -> Config | None:
    return read_size(state, "DMWideResNet", "layer.0.block.{}.conv_0.weight", "logits.weight", "width")


def _by_rule(name: str) -> Config | None:
    match = re.fullmatch(r"dm-wrn-(\d+)-(\d+)", name)
    return None if match is None else {"depth": int(match[1]), "width": int(match[2])}


register(
    Family(
        "DMWideResNet",
        "classifier",
        DMWideResNet,
        names={
            "dm-wrn-28-10": {"depth": 28, "width": 10},
            "dm-wrn-70-16": {"depth": 70, "width": 16},
            # DiffPure's checkpoint of this name.
            "wideresnet-70-16": {"depth": 70, "width": 16, "activation": "silu"},
        },
        rule=_by_rule,
        rule_text="dm-wrn-D-W",
        recognise=_recognise,
        untold={"activation": "give activation='silu' (the published Gowal, Rebuffi and Wang models) or 'relu'"},
    )
)
