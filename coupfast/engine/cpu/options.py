"""What can be chosen about the cpu engine."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from coupfast.engine.cpu.algorithms import allowed_tiles
from coupfast.engine.memory import available_bytes
from coupfast_kernels.convolution import cpu as kernels

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Options:
    """Choices that results depend on to the bit.

    Attributes:
        largest_tile: Convolutions take no algorithm with larger tiles: 4 allows Winograd's F(4x4), 2 only F(2x2), 1 neither.
            Larger tiles are faster and have larger packed weights. None: as large as half of the memory that is free when the
            engine is bound to networks holds; `decided` says which.
    """

    largest_tile: int | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Options:
        """From `engine_options`.

        Raises:
            ValueError: for an option that does not exist, or a value that is none of its own.
        """
        for name, value in (given or {}).items():
            if name != "largest_tile":
                raise ValueError(f"`engine_options` of the cpu engine are largest_tile; got {name!r}")
            if value is not None and (isinstance(value, bool) or value not in kernels.TILES):
                raise ValueError(f"`engine_options['largest_tile']` is 1, 2 or 4, got {value!r}")
        return cls(**(given or {}))

    def decided(self, *networks: nn.Module | None) -> Options:
        """With what was left open decided by the memory that is free now: given to later runs, they give the same bits."""
        if self.largest_tile is not None:
            return self
        weights = sum(w.nbytes for network in networks if network is not None for w in network.parameters() if w.dim() == 4)
        largest = allowed_tiles(weights, available_bytes(torch.device("cpu")))[-1]
        if largest != kernels.TILES[-1]:
            logger.warning(
                "little memory is free: convolutions leave out F(4x4)%s, whose packed weights are larger, which changes last "
                "digits; engine_options={'largest_tile': %d} does so whatever is free",
                "" if kernels.F2 <= largest else " and F(2x2)",
                largest,
            )
        return Options(largest)

    def tiles(self) -> tuple[int, ...]:
        """The tiles that convolutions may take."""
        return tuple(tile for tile in kernels.TILES if self.largest_tile is None or tile <= self.largest_tile)
