"""The noise of a run: as a function of (seed, image id, draw, step, element), or an explicit path.

    x_{k+1} = … + d_k z_k + f_k z′_k,      z, z′ ~ N(0, 1), independent

What counts is defined in `coupfast_kernels.noise`; here is which of it a step takes.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch

from coupfast_kernels.noise import FORWARD_NOISING_STEP, SECOND_NOISE_STEP, standard_normal_ref


class Noise(Protocol):
    """The noise of a run, by step."""

    def z(self, k: int, like: torch.Tensor) -> torch.Tensor:
        """Standard normal noise of step k (−1: of the forward noising), with the shape, dtype and device of `like`."""
        ...

    def z2(self, k: int, like: torch.Tensor) -> torch.Tensor:
        """The second noise z′ of step k, independent of all z."""
        ...

    def images(self, piece: slice) -> Noise:
        """The noise of a part of the batch."""
        ...


@dataclasses.dataclass(frozen=True)
class CounterNoise:
    """Noise as a function of (seed, image id, draw, step, element): nothing is stored.

    Attributes:
        seed: In [0, 2⁶⁴).
        ids: Image ids in [0, 2³²), int64 (batch,).
        draw: Draw indices in [0, 2³²), int64 (batch,).
    """

    seed: int
    ids: torch.Tensor
    draw: torch.Tensor

    def z(self, k: int, like: torch.Tensor) -> torch.Tensor:
        return self._normal(FORWARD_NOISING_STEP if k < 0 else k, like)

    def z2(self, k: int, like: torch.Tensor) -> torch.Tensor:
        return self._normal(SECOND_NOISE_STEP + k, like)

    def _normal(self, step: int, like: torch.Tensor) -> torch.Tensor:
        z = standard_normal_ref(tuple(like.shape), seed=self.seed, ids=self.ids, draw=self.draw, step=step)
        return z.to(like.dtype)

    def images(self, piece: slice) -> CounterNoise:
        return CounterNoise(self.seed, self.ids[piece], self.draw[piece])


@dataclasses.dataclass(frozen=True)
class ReplayedNoise:
    """An explicit path.

    Attributes:
        rows: Row k is the noise of step k, the last row that of the forward noising where there is one; (rows, batch, …).
        second: Row k is the second noise of step k; None where no step has one.
    """

    rows: torch.Tensor
    second: torch.Tensor | None = None

    def z(self, k: int, like: torch.Tensor) -> torch.Tensor:
        return self.rows[k]

    def z2(self, k: int, like: torch.Tensor) -> torch.Tensor:
        if self.second is None:
            raise ValueError("this explicit path has no second noise, and a step asks for it")
        return self.second[k]

    def images(self, piece: slice) -> ReplayedNoise:
        return ReplayedNoise(self.rows[:, piece], None if self.second is None else self.second[:, piece])


def uniform(noise: Noise, k: int, like: torch.Tensor) -> torch.Tensor:
    """Numbers uniform in (0, 1), one an image: Φ of the first element of row k, which is read for nothing else.

    A function of a counted normal, so that an explicit path decides it, too, and has a gradient through it.

    Returns:
        Shape (batch, 1, 1, 1), dtype of the noise.
    """
    return torch.special.ndtr(noise.z(k, like[:, :1, :1, :1])[:, :1, :1, :1])
