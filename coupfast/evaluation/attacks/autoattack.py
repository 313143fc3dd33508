"""The attacks of AutoAttack (Croce and Hein 2020), in pyautoattack's unmodified code, set up as its `AutoAttack` does.

They return an image as it came if they saw the defense fail nowhere, or at their very first look. With a defense that draws
noise neither says that the attack found nothing: what it asked is watched, and the strongest point of it is kept beside.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
from typing import Any, Literal

import torch
from torch.nn import functional

from coupfast.evaluation.attacks.base import Attack, Cost, Result
from coupfast.evaluation.attacks.iterative import LOOKS
from coupfast.evaluation.attacks.knobs import count, dw_box_knob, knob, looks_knob
from coupfast.evaluation.metered import Metered

#: How often an image is offered to an attack that does not begin because its first look at it finds it misclassified already.
OFFERS = 8

_LOGGER = logging.getLogger("auto-attack")  # pyautoattack's own


class _AutoAttack(Attack):
    """What follows from fields that all of AutoAttack's attacks have; each declares them, in its own order."""

    norm: str
    eps: float
    looks: int
    dw_box: bool

    @property
    def replicas(self) -> int:
        return max(1, self.looks)

    @property
    def gradient_replicas(self) -> int:
        return 1

    @property
    def knows_noise(self) -> bool:
        return self.dw_box


class _AutoPGD(_AutoAttack):
    """The same of both APGDs."""

    iterations: int
    eot_iter: int

    def attacked(
        self, name: str, own: dict[str, Any], defense: Metered, x: torch.Tensor, y: torch.Tensor, *, seed: int
    ) -> tuple[torch.Tensor, _Seen]:
        """What pyautoattack's class `name` makes of images, with settings of its own beside these fields; and what it saw."""
        seen = _Seen(defense, x, y, self.norm, self.eps, draws=self.eot_iter, looks=self.looks, named=self.dw_box)
        settings = {
            "norm": self.norm,
            "eps": self.eps,
            "n_iter": self.iterations,
            "eot_iter": self.eot_iter,
            "rho": 0.75,
            "logger": _LOGGER,
            **own,
        }
        return _perturb(f"autopgd_base.{name}", settings, seen, seed=seed), seen


@dataclasses.dataclass(frozen=True)
class APGD(_AutoPGD):
    """APGD on the cross-entropy or the DLR loss, one restart.

    Attributes:
        looks: N-evaluation inside of the attack (see `Iterative`). Of the points, that of the least accuracy on its looks is
            returned then, as in Fixed-AutoAttack (20 looks), in the place of what APGD returns.
        dw_box: See `Iterative`.
    """

    norm: str = "Linf"
    eps: float = 8 / 255
    loss: Literal["ce", "dlr"] = knob("ce", "cross-entropy, or the difference of logits ratio")
    iterations: int = count(100, "steps of the attack")
    eot_iter: int = count(1, "draws of the noise that a gradient is averaged over")
    looks: int = looks_knob()
    dw_box: bool = dw_box_knob()

    def run(self, defense: Metered, x: torch.Tensor, y: torch.Tensor, *, seed: int) -> Result:
        x_adv, seen = self.attacked("APGDAttack", {"loss": self.loss}, defense, x, y, seed=seed)
        return seen.result(x_adv, self._curve(seen, y))

    def _curve(self, seen: _Seen, y: torch.Tensor) -> tuple[int, ...]:
        # APGD looks once at all images, then attacks those that are right; the last EOT sample of an iteration is its verdict.
        attacked = seen.plain[0] == y
        standing = torch.ones(int(attacked.sum()), dtype=torch.bool, device=y.device)
        curve = []
        for predictions in seen.with_gradient[self.eot_iter - 1 :: self.eot_iter]:
            standing &= predictions == y[attacked]
            curve.append(int(standing.sum()))
        return tuple(curve)

    @property
    def least_classes(self) -> int:
        return 3 if self.loss == "dlr" else 2

    def cost(self) -> Cost:
        points = self.iterations + 1
        return Cost(1 + points * self.looks, points * self.eot_iter, again=OFFERS - 1)


@dataclasses.dataclass(frozen=True)
class TargetedAPGD(_AutoPGD):
    """APGD on the targeted DLR loss, against the most likely other classes in turn. `looks` and `dw_box` as `APGD` has them."""

    norm: str = "Linf"
    eps: float = 8 / 255
    iterations: int = count(100, "steps of the attack")
    eot_iter: int = count(1, "draws of the noise that a gradient is averaged over")
    target_classes: int = count(9, "the most likely other classes, attacked in turn")
    looks: int = looks_knob()
    dw_box: bool = dw_box_knob()

    def run(self, defense: Metered, x: torch.Tensor, y: torch.Tensor, *, seed: int) -> Result:
        own = {"n_target_classes": self.target_classes}
        x_adv, seen = self.attacked("APGDAttack_targeted", own, defense, x, y, seed=seed)
        return seen.result(x_adv)

    @property
    def least_classes(self) -> int:
        return 4

    def cost(self) -> Cost:
        points = self.target_classes * (self.iterations + 1)
        return Cost(1 + self.target_classes + points * self.looks, points * self.eot_iter, again=OFFERS - 1)


@dataclasses.dataclass(frozen=True)
class FABTargeted(_AutoAttack):
    """FAB, against the most likely other classes in turn. `looks`, at all of its points in the ball, and `dw_box` as `APGD` has
    them."""

    norm: str = "Linf"
    eps: float = 8 / 255
    iterations: int = count(100, "steps of the attack")
    target_classes: int = count(9, "the most likely other classes, attacked in turn")
    looks: int = looks_knob()
    dw_box: bool = dw_box_knob()

    def run(self, defense: Metered, x: torch.Tensor, y: torch.Tensor, *, seed: int) -> Result:
        settings = {
            "norm": self.norm,
            "eps": self.eps,
            "n_iter": self.iterations,
            "targeted": True,
            "n_target_classes": self.target_classes,
        }
        seen = _Seen(defense, x, y, self.norm, self.eps, looks=self.looks, everywhere=True, named=self.dw_box)
        return seen.result(_perturb("fab_pt.FABAttack_PT", settings, seen, seed=seed))

    def cost(self) -> Cost:
        # Of a class, one with a gradient is the image itself, and the last one is asked about again.
        points = self.target_classes * 2 * self.iterations
        forward = 1 + self.target_classes * (self.iterations + 3) + points * self.looks
        return Cost(forward, self.target_classes * self.iterations, again=OFFERS - 1)


@dataclasses.dataclass(frozen=True)
class Square(_AutoAttack):
    """Square: random search, no gradient.

    AutoAttack's asks a randomised defense once a query, and keeps a square that was lucky. With `eot_iter` the answer to a
    query is the mean logits of so many draws, as its authors advise for such defenses. `looks`, at every query, and `dw_box` as
    `APGD` has them.
    """

    gradient = None

    norm: str = "Linf"
    eps: float = 8 / 255
    queries: int = count(5000, "queries for an image")
    eot_iter: int = count(1, "draws of the noise that an answer is averaged over")
    looks: int = looks_knob()
    dw_box: bool = dw_box_knob()

    def run(self, defense: Metered, x: torch.Tensor, y: torch.Tensor, *, seed: int) -> Result:
        settings = {"norm": self.norm, "eps": self.eps, "n_queries": self.queries, "p_init": 0.8, "resc_schedule": False}
        looks, named = self.looks, self.dw_box
        seen = _Seen(defense, x, y, self.norm, self.eps, copies=self.eot_iter, looks=looks, everywhere=True, named=named)
        return seen.result(_perturb("square.SquareAttack", settings, seen, seed=seed))

    @property
    def replicas(self) -> int:
        return max(self.eot_iter, self.looks)

    def cost(self) -> Cost:
        # The image itself is not looked at.
        forward = (self.queries + 3) * self.eot_iter + (self.queries + 2) * self.looks
        return Cost(forward, 0, again=(OFFERS - 1) * self.eot_iter)


class _Seen:
    """Between an attack and the defense: what the attack asked, and what it got to see.

    The strongest point of an image is one that was seen misclassified, if any was, and of those the one of the highest mean
    loss. (By the loss alone a defense without noise would be judged at points that it is right about, though others fooled it.)

    Args:
        defense: Answers.
        x: The images under attack.
        y: Their labels.
        norm, eps: The ball around each.
        draws: How often the attack asks at one point, one time after the other.
        copies: Of each image in one call, which have noise of their own; the answer is their mean logits.
        looks: Fresh draws at every point that it asks about with a gradient.
        everywhere: Whether they are at every point that it asks about without one, too.
        named: Whether the noise of every call is to be named, since it is somebody else's.
    """

    def __init__(
        self,
        defense: Metered,
        x: torch.Tensor,
        y: torch.Tensor,
        norm: str,
        eps: float,
        *,
        draws: int = 1,
        copies: int = 1,
        looks: int = 0,
        everywhere: bool = False,
        named: bool = False,
    ) -> None:
        self.copies, self.everywhere = copies, everywhere
        self.looks, self.named, self._calls, self._looks = looks, named, 0, 0
        self.looked = torch.zeros_like(y)  # how many of the looks were wrong where most were
        self.defense, self.x, self.y, self.norm, self.eps, self.draws = defense, x, y, norm, eps, draws
        self.plain: list[torch.Tensor] = []
        self.with_gradient: list[torch.Tensor] = []
        self.offers = 1  # predictions are those of the first
        self.begun = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self._strongest, self._loss = x.clone(), torch.full((len(x),), -float("inf"), device=x.device)
        self._point, self._sum, self._count = x.clone(), torch.zeros_like(self._loss), torch.zeros_like(y)
        self._failed = torch.zeros(len(x), device=x.device)  # at the strongest point: whether, or the share of the looks
        self._failing = torch.zeros_like(self._failed)  # at the last one
        # Equal images, which differ by their noise only, under the first of them.
        equal = [torch.nonzero((x == image).flatten(1).all(dim=1)).flatten() for image in x]
        self._equal = {int(images[0]): images for images in equal if len(images) > 1}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        logits = self._answer(x)
        self._calls += 1
        if self.offers == 1:
            (self.with_gradient if x.requires_grad else self.plain).append(logits.detach().argmax(dim=1))
        self._keep(x.detach(), logits.detach(), followed=x.requires_grad)
        return logits

    def _answer(self, x: torch.Tensor) -> torch.Tensor:
        many, names = x if self.copies == 1 else x.repeat(self.copies, 1, 1, 1), {}
        if self.named:
            draws = torch.arange(self._calls * self.copies, (self._calls + 1) * self.copies, device=x.device)
            names = {"ids": self._images(x.detach()).repeat(self.copies), "draw": draws.repeat_interleave(len(x))}
        logits: torch.Tensor = self.defense(many, **names)
        return logits if self.copies == 1 else logits.view(self.copies, len(x), -1).mean(dim=0)

    def result(self, x_adv: torch.Tensor, curve: tuple[int, ...] = ()) -> Result:
        for images in self._equal.values():
            best = max(images.tolist(), key=lambda image: (float(self._failed[image]), float(self._loss[image])))
            for kept in (self._strongest, self._loss, self._failed):
                kept[images] = kept[best].clone()
        if self.looks:
            # Who was misclassified at every first look was not attacked, and has fallen all the same.
            looked = torch.where(self.begun, self.looked, self.looks)
            return Result(self._strongest, curve, self._strongest, self._loss, self._failed, None, looked, self.looks)
        return Result(x_adv, curve, self._strongest, self._loss, self._failed > 0)

    def _keep(self, x: torch.Tensor, logits: torch.Tensor, *, followed: bool) -> None:
        images = self._images(x)
        change = (x - self.x[images]).flatten(1)
        size = change.abs().amax(dim=1) if self.norm == "Linf" else change.norm(dim=1)
        # FAB begins at the image itself, and stays there if the gradient is 0.
        self.begun[images if followed else images[size > 0]] = True
        for equal in self._equal.values():
            self.begun[equal] = self.begun[equal].any()
        # A little more than eps is rounding; FAB asks far outside, too.
        inside = (size > 0) & (size <= self.eps + 1e-6) & (x >= 0).flatten(1).all(1) & (x <= 1).flatten(1).all(1)
        images, x = images[inside], x[inside]
        loss = functional.cross_entropy(logits[inside], self.y[images], reduction="none")
        again = (x == self._point[images]).flatten(1).all(dim=1) & (self._count[images] < self.draws)
        self._point[images] = x
        self._sum[images] = torch.where(again, self._sum[images], 0.0) + loss
        self._count[images] = torch.where(again, self._count[images], 0) + 1
        wrong = (logits[inside].argmax(dim=1) != self.y[images]).float()
        self._failing[images] = torch.maximum(torch.where(again, self._failing[images], 0.0), wrong)
        whole = self._count[images] == self.draws
        if self.looks:
            whole &= self.everywhere or followed
            self._failing[images[whole]] = self._look(x[whole], images[whole])
        mean, failing, failed = self._sum[images] / self.draws, self._failing[images], self._failed[images]
        better = whole & ((failing > failed) | ((failing == failed) & (mean > self._loss[images])))
        images = images[better]
        self._strongest[images], self._loss[images], self._failed[images] = x[better], mean[better], failing[better]

    def _look(self, x: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """The share of fresh draws that are misclassified, of each of these points."""
        if len(x) == 0:
            return x.new_zeros(0)
        numbers = torch.arange(self._looks, self._looks + self.looks, device=x.device).repeat_interleave(len(x))
        self._looks += self.looks
        with torch.no_grad():
            logits = self.defense(x.repeat(self.looks, 1, 1, 1), ids=images.repeat(self.looks), draw=LOOKS + numbers)
        wrong = (logits.view(self.looks, len(x), -1).argmax(dim=2) != self.y[images]).sum(dim=0)
        self.looked[images] = torch.maximum(self.looked[images], wrong)
        return wrong / self.looks

    def _images(self, x: torch.Tensor) -> torch.Tensor:
        """Which images the attack asks about: it asks about some at a time, in order, and does not say which."""
        images = torch.cdist(x.flatten(1), self.x.flatten(1), p=float("inf") if self.norm == "Linf" else 2.0).argmin(dim=1)
        for first, equal in self._equal.items():
            rows = torch.nonzero(images == first).flatten()[: len(equal)]
            images[rows] = equal[: len(rows)]
        return images


def _perturb(name: str, settings: dict[str, Any], seen: _Seen, *, seed: int) -> torch.Tensor:
    """What pyautoattack's "module.class" `name`, with these settings and one restart, makes of images."""
    module, name = name.split(".")
    attack = getattr(_pyautoattack(module), name)(seen, n_restarts=1, seed=seed, device=seen.x.device, **settings)
    with torch.no_grad():
        x_adv = attack.perturb(seen.x, seen.y).detach()
        # Its verdict stands; but with another draw at the first look there is an attack, whose images are worth having.
        while seen.offers < OFFERS and not bool(seen.begun.all()):
            seen.offers += 1
            left = ~seen.begun
            attack.perturb(seen.x[left], seen.y[left])
    return x_adv


def _pyautoattack(module: str) -> Any:
    try:
        return importlib.import_module(f"pyautoattack.{module}")
    except ModuleNotFoundError as error:
        raise ImportError(f'this attack is pyautoattack\'s ({error}); install it with: pip install "coupfast[demo]"') from error
