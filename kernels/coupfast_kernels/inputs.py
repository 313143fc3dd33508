"""Numbers for cases, the same on every device."""

from __future__ import annotations

import math

import torch

LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def normals(
    device: torch.device, shape: tuple[int, ...], count: int, layout: torch.memory_format = torch.contiguous_format
) -> list[torch.Tensor]:
    """Float32 standard normal numbers."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    found = [torch.randn(shape, generator=generator).to(device) for _ in range(count)]
    return [tensor.contiguous(memory_format=layout) for tensor in found]


def by(shape: tuple[int, ...]) -> str:
    """A shape in words: 5x3x32x32."""
    return "x".join(map(str, shape))
