"""The attacks of AutoAttack (Croce and Hein 2020), in pyautoattack's unmodified code, set up as its `AutoAttack` does."""

from __future__ import annotations

import dataclasses
import importlib
import logging
from typing import Any, Literal

import torch

from coupfast.evaluation.attacks.base import Attack, Cost, Result
from coupfast.evaluation.defense import Defense

_LOGGER = logging.getLogger("auto-attack")  # pyautoattack's own


@dataclasses.dataclass(frozen=True)
class APGD(Attack):
    """APGD on the cross-entropy or the DLR loss, one restart."""

    norm: str
    eps: float
    loss: Literal["ce", "dlr"] = "ce"
    iterations: int = 100
    eot_iter: int = 1

    def run(self, defense: Defense, x: torch.Tensor, y: torch.Tensor, *, seed: int) -> Result:
        seen = _Predictions(defense)
        attack = _pyautoattack("autopgd_base").APGDAttack(
            seen,
            n_restarts=1,
            n_iter=self.iterations,
            eps=self.eps,
            norm=self.norm,
            eot_iter=self.eot_iter,
            rho=0.75,
            loss=self.loss,
            seed=seed,
            device=x.device,
            logger=_LOGGER,
        )
        with torch.no_grad():
            x_adv = attack.perturb(x, y).detach()
        return Result(x_adv, self._curve(seen, y))

    def _curve(self, seen: _Predictions, y: torch.Tensor) -> tuple[int, ...]:
        # APGD looks once at all images, then attacks those that are right; the last EOT sample of an iteration is its verdict.
        attacked = seen.plain[0] == y
        standing = torch.ones(int(attacked.sum()), dtype=torch.bool, device=y.device)
        curve = []
        for predictions in seen.with_gradient[self.eot_iter - 1 :: self.eot_iter]:
            standing &= predictions == y[attacked]
            curve.append(int(standing.sum()))
        return tuple(curve)

    def cost(self) -> Cost:
        return Cost(forward=1, gradient=(self.iterations + 1) * self.eot_iter)


@dataclasses.dataclass(frozen=True)
class TargetedAPGD(Attack):
    """APGD on the targeted DLR loss, against the most likely other classes in turn."""

    norm: str
    eps: float
    iterations: int = 100
    eot_iter: int = 1
    target_classes: int = 9

    def run(self, defense: Defense, x: torch.Tensor, y: torch.Tensor, *, seed: int) -> Result:
        attack = _pyautoattack("autopgd_base").APGDAttack_targeted(
            defense,
            n_restarts=1,
            n_iter=self.iterations,
            eps=self.eps,
            norm=self.norm,
            eot_iter=self.eot_iter,
            rho=0.75,
            n_target_classes=self.target_classes,
            seed=seed,
            device=x.device,
            logger=_LOGGER,
        )
        with torch.no_grad():
            return Result(attack.perturb(x, y).detach())

    def cost(self) -> Cost:
        return Cost(1 + self.target_classes, self.target_classes * (self.iterations + 1) * self.eot_iter)


@dataclasses.dataclass(frozen=True)
class FABTargeted(Attack):
    """FAB, against the most likely other classes in turn."""

    norm: str
    eps: float
    iterations: int = 100
    target_classes: int = 9

    def run(self, defense: Defense, x: torch.Tensor, y: torch.Tensor, *, seed: int) -> Result:
        attack = _pyautoattack("fab_pt").FABAttack_PT(
            defense,
            n_restarts=1,
            n_iter=self.iterations,
            eps=self.eps,
            norm=self.norm,
            targeted=True,
            n_target_classes=self.target_classes,
            seed=seed,
            device=x.device,
        )
        with torch.no_grad():
            return Result(attack.perturb(x, y).detach())

    def cost(self) -> Cost:
        return Cost(1 + self.target_classes * (self.iterations + 3), self.target_classes * self.iterations)


@dataclasses.dataclass(frozen=True)
class Square(Attack):
    """Square: random search, no gradient."""

    norm: str
    eps: float
    queries: int = 5000

    def run(self, defense: Defense, x: torch.Tensor, y: torch.Tensor, *, seed: int) -> Result:
        attack = _pyautoattack("square").SquareAttack(
            defense,
            p_init=0.8,
            n_queries=self.queries,
            eps=self.eps,
            norm=self.norm,
            n_restarts=1,
            seed=seed,
            device=x.device,
            resc_schedule=False,
        )
        with torch.no_grad():
            return Result(attack.perturb(x, y).detach())

    def cost(self) -> Cost:
        return Cost(self.queries + 3, 0)


class _Predictions:
    """Between an attack and the defense: what the attack sees the images classified as."""

    def __init__(self, defense: Defense) -> None:
        self.defense = defense
        self.plain: list[torch.Tensor] = []
        self.with_gradient: list[torch.Tensor] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.defense(x)
        (self.with_gradient if x.requires_grad else self.plain).append(logits.detach().argmax(dim=1))
        return logits


def _pyautoattack(module: str) -> Any:
    try:
        return importlib.import_module(f"pyautoattack.{module}")
    except ModuleNotFoundError as error:
        raise ImportError(f'this attack is pyautoattack\'s ({error}); install it with: pip install "coupfast[demo]"') from error
