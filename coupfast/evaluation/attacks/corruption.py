"""Corruptions: no adversary."""

from __future__ import annotations

import dataclasses

import torch

from coupfast.evaluation.attacks.base import Attack, Cost, Result
from coupfast.evaluation.attacks.knobs import knob
from coupfast.evaluation.metered import Metered


@dataclasses.dataclass(frozen=True)
class SaltAndPepper(Attack):
    """Each pixel, all channels together, is black or white with probability `amount`."""

    gradient = None

    amount: float = knob(
        0.05,
        "share of pixels that is changed",
        metavar="P",
        words="a share of pixels in (0, 1]",
        valid=lambda share: 0 < share <= 1,
    )

    def run(self, defense: Metered, x: torch.Tensor, y: torch.Tensor, *, seed: int) -> Result:
        generator = torch.Generator().manual_seed(seed)
        u = torch.rand((len(x), 1, *x.shape[2:]), generator=generator).to(x.device)
        x_adv = torch.where(u < self.amount / 2, torch.zeros_like(x), x)
        return Result(torch.where(u > 1 - self.amount / 2, torch.ones_like(x), x_adv))

    def cost(self) -> Cost:
        return Cost(0, 0)
