"""Projected gradient ascent on the expectation over a defense's noise, images and draws in one batch.

With the purifier's gradient "bpda" this is BPDA + EOT (Athalye et al. 2018; Hill et al. 2021; Nie et al. 2022).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from coupfast.evaluation.attacks import ball
from coupfast.evaluation.attacks.base import Cost
from coupfast.evaluation.attacks.iterative import Answer, Asked, InBall, Iterative
from coupfast.evaluation.attacks.knobs import knob
from coupfast.evaluation.attacks.losses import ce
from coupfast.evaluation.metered import Metered
from coupfast.evaluation.views import View


@dataclasses.dataclass(frozen=True)
class Expectation(Iterative):
    """The gradient is that of the expected loss: backwards through all draws.

    Attributes:
        mean: The loss is the mean of the draws' losses, or the loss of their mean logits.
    """

    mean: Literal["losses", "logits"] = knob("losses", "the loss is of the draws' mean losses, or of their mean logits")

    def ask(self, defense: Metered, asked: Asked) -> Answer:
        with torch.set_grad_enabled(asked.follow):
            x = asked.x.detach().requires_grad_(asked.follow)
            logits = self.logits(defense, x, asked)
            if self.mean == "logits":
                loss = self.climbed(logits.mean(dim=0), asked)
                compared = ce(logits.mean(dim=0), asked.y)
            else:
                loss = self.climbed(logits, asked).mean(dim=0)
                compared = self.cross_entropy(logits, asked)
            gradient = torch.autograd.grad(loss.sum(), x)[0] if asked.follow else None
        logits = logits.detach()
        wrong, failed = self.failing(logits, asked)
        return Answer(wrong, failed, compared.detach(), gradient, real=self.view(asked) is None)

    def view(self, asked: Asked) -> View | None:
        """What is asked in the place of the defense itself, where anything is."""
        return None

    def logits(self, defense: Metered, x: torch.Tensor, asked: Asked) -> torch.Tensor:
        """Of all draws, (draws, n, classes)."""
        copies, ids = x.repeat(asked.draws, 1, 1, 1), asked.images.repeat(asked.draws)
        return defense(copies, ids=ids, draw=self.draws(asked), view=self.view(asked)).view(asked.draws, len(x), -1)

    def cost(self) -> Cost:
        restarts = self.points // (self.iterations + 1)
        looks, (*draws, last) = self.looks * self.points, self.schedule
        return Cost(restarts * last + looks, restarts * sum(draws), again=self.again)


@dataclasses.dataclass(frozen=True)
class PGD(Expectation, InBall):
    """PGD with EOT, in sign steps (Linf) or normalized ones (L2).

    Attributes:
        step_size: None is 2/255 in Linf, eps/5 in L2.
        drop: See `Iterative`. DiffPure's published BPDA + EOT confirms a failure of the mean logits on 150 further draws before
            the image counts as fallen; "mean" does not.
        random_start: Start anywhere in the ball, uniformly, then clip to [0, 1].
    """

    random_start: bool = knob(False, "start anywhere in the ball")

    def start(self, x: torch.Tensor, *, seed: int) -> torch.Tensor:
        return ball.anywhere(x, self.norm, self.eps, seed=seed) if self.random_start else x.clone()


@dataclasses.dataclass(frozen=True)
class BPDA(PGD):
    """BPDA + EOT as the field runs it: PGD on the mean logits of 15 draws, through the purifier's gradient "bpda"."""

    gradient = "bpda"

    mean: Literal["losses", "logits"] = knob("logits", "the loss is of the draws' mean losses, or of their mean logits")
    drop: Literal["never", "any", "mean", "majority"] = knob(
        "mean", "when an image leaves: never, once any draw is wrong, once the mean logits are, or by a test of its majority"
    )
