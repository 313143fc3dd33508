"""What is kept of a classifier's activations: on which side of its kink each is, a bit an element."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch


@dataclasses.dataclass
class Slope:
    """Which side of its kink every element of an activation is on (bits), or which element a pool took (indices)."""

    data: torch.Tensor  # uint8 bits, eight to a byte; or int64 / int32 indices
    shape: torch.Size

    @staticmethod
    def of_mask(mask: torch.Tensor) -> Slope:
        return Slope(pack_bits(mask), mask.shape)

    def side(self) -> torch.Tensor:
        """What `kink` returned."""
        return unpack_bits(self.data, self.shape) if self.data.dtype == torch.uint8 else self.data


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """A bool tensor as bits, eight to a byte (uint8, one axis), last byte padded with zeros; row-major order."""
    flat = mask.reshape(-1)
    if flat.device.type == "cpu":
        # Into PyTorch's own memory, so that its accounts know of it.
        bits = torch.empty((flat.numel() + 7) // 8, dtype=torch.uint8)
        bits.numpy()[:] = np.packbits(flat.numpy(), bitorder="little")
        return bits
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8).to(torch.uint8)
    return (flat << _bit_positions(flat.device)).sum(dim=1, dtype=torch.uint8)


def unpack_bits(bits: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The bool tensor that `pack_bits` packed."""
    if bits.device.type == "cpu":
        count = int(np.prod(shape))
        mask = torch.empty(count, dtype=torch.uint8)
        mask.numpy()[:] = np.unpackbits(bits.numpy(), count=count, bitorder="little")
        return mask.view(torch.bool).view(shape)
    flat = (bits[:, None] >> _bit_positions(bits.device)) & 1
    return flat.view(-1)[: shape.numel()].view(shape).to(torch.bool)


def _bit_positions(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
