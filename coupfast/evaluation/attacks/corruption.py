"""Corruptions: no adversary."""

from __future__ import annotations

import dataclasses

import torch

from coupfast.evaluation.attacks.base import Attack, Cost, Result
from coupfast.evaluation.defense import Defense


@dataclasses.dataclass(frozen=True)
class SaltAndPepper(Attack):
    """Each pixel, all channels together, is black or white with probability `amount`."""

    amount: float = 0.05

    def run(self, defense: Defense, x: torch.Tensor, y: torch.Tensor, *, seed: int) -> Result:
        generator = torch.Generator().manual_seed(seed)
        u = torch.rand((len(x), 1, *x.shape[2:]), generator=generator).to(x.device)
        x_adv = torch.where(u < self.amount / 2, torch.zeros_like(x), x)
        return Result(torch.where(u > 1 - self.amount / 2, torch.ones_like(x), x_adv))

    def cost(self) -> Cost:
        return Cost(0, 0)
