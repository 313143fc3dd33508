"""The attacks of AutoAttack (Croce and Hein 2020), in pyautoattack's unmodified code, set up as its `AutoAttack` does."""

from __future__ import annotations

import dataclasses
import importlib
import logging
from collections.abc import Callable
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
        settings = {
            "norm": self.norm,
            "eps": self.eps,
            "n_iter": self.iterations,
            "eot_iter": self.eot_iter,
            "rho": 0.75,
            "loss": self.loss,
            "logger": _LOGGER,
        }
        x_adv = _perturb("autopgd_base.APGDAttack", settings, seen, x, y, seed=seed)
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
        settings = {
            "norm": self.norm,
            "eps": self.eps,
            "n_iter": self.iterations,
            "eot_iter": self.eot_iter,
            "rho": 0.75,
            "n_target_classes": self.target_classes,
            "logger": _LOGGER,
        }
        return Result(_perturb("autopgd_base.APGDAttack_targeted", settings, defense, x, y, seed=seed))

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
        settings = {
            "norm": self.norm,
            "eps": self.eps,
            "n_iter": self.iterations,
            "targeted": True,
            "n_target_classes": self.target_classes,
        }
        return Result(_perturb("fab_pt.FABAttack_PT", settings, defense, x, y, seed=seed))

    def cost(self) -> Cost:
        return Cost(1 + self.target_classes * (self.iterations + 3), self.target_classes * self.iterations)


@dataclasses.dataclass(frozen=True)
class Square(Attack):
    """Square: random search, no gradient."""

    norm: str
    eps: float
    queries: int = 5000

    def run(self, defense: Defense, x: torch.Tensor, y: torch.Tensor, *, seed: int) -> Result:
        settings = {"norm": self.norm, "eps": self.eps, "n_queries": self.queries, "p_init": 0.8, "resc_schedule": False}
        return Result(_perturb("square.SquareAttack", settings, defense, x, y, seed=seed))

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


def _perturb(
    name: str,
    settings: dict[str, Any],
    defense: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    seed: int,
) -> torch.Tensor:
    """What pyautoattack's "module.class" `name`, with these settings and one restart, makes of images."""
    module, name = name.split(".")
    attack = getattr(_pyautoattack(module), name)(defense, n_restarts=1, seed=seed, device=x.device, **settings)
    with torch.no_grad():
        return attack.perturb(x, y).detach()


def _pyautoattack(module: str) -> Any:
    try:
        return importlib.import_module(f"pyautoattack.{module}")
    except ModuleNotFoundError as error:
        raise ImportError(f'this attack is pyautoattack\'s ({error}); install it with: pip install "coupfast[demo]"') from error
