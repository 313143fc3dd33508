"""What attacks that climb step by step have in common: restarts, what is kept, when an image leaves and who takes its place.

Every image has its own count of steps, and its noise is named by image and step. So an image that leaves makes room for one
that waits, and neither's noise depends on the company.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Literal

import torch

from coupfast.evaluation.attacks import ball
from coupfast.evaluation.attacks.base import Attack, Result
from coupfast.evaluation.attacks.knobs import count, dw_box_knob, knob, looks_knob, step_size_knob
from coupfast.evaluation.attacks.losses import LOSSES, ce, least_classes, losses_knob, split
from coupfast.evaluation.metered import Metered

# Draws by what they are for: of gradients from 0, of looks at every iterate, and of looks at who seems to have fallen.
LOOKS, FALLEN = 2**30, 2**31

_NEVER = 2**62


@dataclasses.dataclass(frozen=True)
class Asked:
    """Some images' present points, as they are asked about.

    Attributes:
        images: Which of the batch, (n,): their ids.
        x: The points, (n, channels, height, width).
        y: Labels.
        number: How many points of each image were asked about before, over all restarts, (n,).
        restart: Which it is in, (n,).
        follow: Whether a gradient is wanted.
        draws: Of the noise, that the gradient is averaged over.
    """

    images: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    number: torch.Tensor
    restart: torch.Tensor
    follow: bool
    draws: int

    def only(self, chosen: torch.Tensor) -> Asked:
        """Those of them."""
        parts = {name: getattr(self, name)[chosen] for name in ("images", "x", "y", "number", "restart")}
        return Asked(**parts, follow=self.follow, draws=self.draws)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What an attack learnt of them.

    Attributes:
        wrong: Which draws were misclassified, bool (draws, n).
        failed: Which images count as failed on the attack's curve, (n,).
        loss: Cross-entropy, by which points are compared, (n,).
        gradient: Of what is climbed, like the points; None if it was not wanted.
        real: Whether the draws are the defense's own, and not those of a coarser one.
    """

    wrong: torch.Tensor
    failed: torch.Tensor
    loss: torch.Tensor
    gradient: torch.Tensor | None
    real: bool = True


@dataclasses.dataclass(frozen=True)
class Iterative(Attack):
    """Points, each found from the gradient at the one before.

    Attributes:
        losses: See `losses`; every restart has a loss of its own, and an image whose kept point failed more than half of its
            draws does not restart.
        keep: Which point is returned: that of the highest expected cross-entropy; the "last", of several restarts' last ones
            that of the least accuracy; or of all that of the least "accuracy", the cross-entropy deciding among equals: on its
            looks (Fixed-AutoAttack, 20 of them), or without such on the draws of its gradient.
        drop: When an image leaves, its present form kept. "never"; once "any" of its draws is misclassified, which decides it
            where the worst of several draws counts; once the "mean" logits are; or by a test for the "majority": once so many
            fresh draws at one point are misclassified, and none is not, that an image which more than half of all draws
            classify correctly would leave with a probability of `error` at most, over all points at which it is tested.
        looks: N-evaluation inside of the attack: fresh draws, without a gradient, at every point; 0 takes the gradient's draws,
            which are fresh as well, since no point depends on the draws that are made at it. What a run says of the worst
            point is a harsher verdict than the judge's, who sees one.
        batch: How many images are attacked at a time; of the others one begins as one leaves. None: all of a unit.
        dw_box: The attacker knows the noise that the judge will use, and asks for no other, one of its draws after the other
            and from the first again. No draw of it is fresh, so that there is neither a test for the majority nor an
            N-evaluation to be told; and the official verdict is the judge's first draw. With one draw of the judge's it is the
            DW-box of the literature, in which the defense has one noise.
        eot_first: Few draws early and many late: so many at the first point of every restart, and more by one and the same
            factor from point to point, rounded, up to `eot_iter` at the last one. None: `eot_iter` at every point. Means of
            unequally many draws are not compared: `keep` is "last", or "accuracy" with `looks`, and there is an N-evaluation
            with `looks` only.

    Raises:
        ValueError: as `Attack`, or if knobs contradict each other or ask for more draws than there are.
    """

    iterations: int = count(40, "steps of the attack")
    eot_iter: int = count(15, "draws of the noise that a gradient is averaged over")
    losses: str = losses_knob("ce")
    keep: Literal["loss", "last", "accuracy"] = knob(
        "loss", "which point is returned: of the highest loss, the last, or of the least accuracy on its looks"
    )
    drop: Literal["never", "any", "mean", "majority"] = knob(
        "never", "when an image leaves: never, once any draw is wrong, once the mean logits are, or by a test of its majority"
    )
    error: float = knob(
        0.01,
        "probability at most with which that test lets an image go that more than half of all draws classify correctly",
        metavar="P",
        words="a probability in (0, 1)",
        valid=lambda p: 0 < p < 1,
    )
    looks: int = looks_knob()
    batch: int | None = knob(
        None, "images attacked at a time, the others of a unit waiting", metavar="N", words="at least 1", valid=lambda n: n >= 1
    )
    dw_box: bool = dw_box_knob()
    eot_first: int | None = knob(
        None,
        "draws of a gradient at the first step, growing to --eot-iter at the last",
        metavar="N",
        words="at least 1",
        valid=lambda n: n >= 1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eot_first is not None and self.eot_first > self.eot_iter:
            raise ValueError(f"`eot_first` is at most `eot_iter` = {self.eot_iter}, to which draws grow, got {self.eot_first}")
        if self.eot_first is not None and (self.keep == "loss" or self.keep == "accuracy" and not self.looks):
            raise ValueError(
                f"`keep` = {self.keep!r} compares points by equally many draws, and with `eot_first` they have fewer at first: "
                "set `keep` = 'last', or 'accuracy' with `looks`"
            )
        if max(self.eot_iter, self.looks, self.needed) * self.points >= LOOKS:
            raise ValueError(
                f"`iterations` = {self.iterations} with {self.eot_iter} draws each take more draws than there are, {LOOKS}"
            )
        if self.dw_box and self.drop == "majority":
            raise ValueError("`drop` = 'majority' is a test on fresh draws, and with `dw_box` there are none")

    @abc.abstractmethod
    def ask(self, defense: Metered, asked: Asked) -> Answer:
        """One look at some images' points, `asked.draws` draws each."""

    @abc.abstractmethod
    def step(self, memory: dict[str, torch.Tensor], asked: Asked, gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The next points.

        Args:
            memory: The attack's own; see there.
            asked: The present ones.
            gradient: What was found there.
            x: The clean images.
        """

    def memory(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """What it remembers from step to step, by name: tensors with a row an image, 0 where a restart begins."""
        return {}

    def start(self, x: torch.Tensor, *, seed: int) -> torch.Tensor:
        """Where it begins."""
        return x.clone()

    def run(
        self, defense: Metered, x: torch.Tensor, y: torch.Tensor, *, seed: int, x_start: torch.Tensor | None = None
    ) -> Result:
        """See `Attack.run`. With `x_start`, points like `x` that the attack may return, the first restart begins there."""
        images, device = len(x), x.device
        x_k, memory = self.start(x, seed=seed) if x_start is None else x_start.clone(), self.memory(x)
        best = _Best(x_k)
        k, restart, fell = (torch.full((images,), value, device=device) for value in (0, 0, _NEVER))
        left, looked = torch.zeros_like(k, dtype=torch.bool), torch.zeros_like(k)
        tests = _Tests(k)
        waiting = self.at_once(images)
        active, reached = torch.arange(waiting, device=device), 0
        while len(active):
            going = torch.ones(len(active), dtype=torch.bool, device=device)
            for places, follow, draws in self._together(k[active]):
                here = active[places]
                number = restart[here] * (self.iterations + 1) + k[here]
                asked = Asked(here, x_k[here], y[here], number, restart[here], follow, draws)
                answer = self.ask(defense, asked)
                wrong = self._look(defense, asked, LOOKS, self.looks, apart=self.looks) if self.looks else answer.wrong
                if self.looks or answer.real:
                    looked[here] = torch.maximum(looked[here], wrong.sum(dim=0))
                share = wrong.float().mean(dim=0)
                best.see(here, asked.x, answer.loss, share, keep=self.keep, last=not follow)
                leaving = self._leaving(defense, asked, answer, tests)
                if not answer.real:  # then it was the looks that failed, all of them
                    share = torch.where(leaving, 1.0, share)
                    if not self.looks:
                        looked[here[leaving]] = self.eot_iter
                best.take(here[leaving], asked.x[leaving], answer.loss[leaving], share[leaving])
                left[here[leaving]] = True
                failed = answer.failed | leaving
                fell[here[failed]] = torch.minimum(fell[here[failed]], number[failed])
                reached = max(reached, int(number.max()))
                if follow:
                    onward = ~leaving
                    if answer.gradient is not None and bool(onward.any()):
                        moved = asked.only(onward)
                        x_k[moved.images] = self.step(memory, moved, answer.gradient[onward], x[moved.images])
                        k[moved.images] += 1
                    going[places[leaving]] = False
                else:
                    again = ~leaving & (best.share[here] <= 0.5) & (restart[here] + 1 < len(split(self.losses)))
                    restart[here[again]] += 1
                    k[here[again]] = 0
                    for number_of in restart[here[again]].unique().tolist():
                        these = here[again][restart[here[again]] == number_of]
                        x_k[these] = self.start(x, seed=seed + number_of)[these]
                        for row in memory.values():
                            row[these] = 0
                    going[places[~again]] = False
            active = active[going]
            room = min(self.at_once(images) - len(active), images - waiting)
            if room > 0:
                active = torch.cat([active, torch.arange(waiting, waiting + room, device=device)])
                waiting += room
        curve = tuple(int((fell > number).sum()) for number in range(reached + 1))
        told = looked if self.looks or self.eot_first is None else None
        return Result(best.x, curve, best.x, best.loss, best.share, left, told, self.looks or self.eot_iter)

    def _together(self, k: torch.Tensor) -> list[tuple[torch.Tensor, bool, int]]:
        """Of images at their k-th points, those that are asked about in one batch: their places, whether a gradient is wanted,
        and how many draws."""
        last, draws = k == self.iterations, torch.tensor(self.schedule, device=k.device)[k]
        return [
            (torch.nonzero(these & (draws == count))[:, 0], follow, count)
            for these, follow in ((~last, True), (last, False))
            for count in draws[these].unique().tolist()
        ]

    def failing(self, logits: torch.Tensor, asked: Asked) -> tuple[torch.Tensor, torch.Tensor]:
        """`wrong` and `failed` of an `Answer`, of logits (draws, n, classes)."""
        wrong = logits.argmax(dim=2) != asked.y
        failed = wrong.any(dim=0) if self.drop == "any" else logits.mean(dim=0).argmax(dim=1) != asked.y
        return wrong, failed

    def cross_entropy(self, logits: torch.Tensor, asked: Asked) -> torch.Tensor:
        """Mean over the draws, logits being (draws, n, classes)."""
        draws, n, _ = logits.shape
        return ce(logits.flatten(0, 1), asked.y.repeat(draws)).view(draws, n).mean(dim=0)

    def climbed(self, logits: torch.Tensor, asked: Asked) -> torch.Tensor:
        """The loss of each image's restart, of logits (n, classes) or (draws, n, classes): (n,) or (draws, n)."""
        names = split(self.losses)
        flat = logits.flatten(0, -2)
        y = asked.y.repeat(len(flat) // len(asked.y))
        used = asked.restart.unique().tolist()
        found = LOSSES[names[used[0]]](flat, y)
        for number in used[1:]:
            mine = (asked.restart == number).repeat(len(flat) // len(asked.y))
            found = torch.where(mine, LOSSES[names[number]](flat, y), found)
        return found.view(logits.shape[:-1])

    def draws(self, asked: Asked) -> torch.Tensor:
        """Those of the gradient, (draws n,): by image and point, whoever else is here."""
        numbers = torch.arange(asked.draws, device=asked.x.device).repeat_interleave(len(asked.x))
        return asked.number.repeat(asked.draws) * self.eot_iter + numbers

    def _look(self, defense: Metered, asked: Asked, base: int, draws: int, *, apart: int) -> torch.Tensor:
        """Which of so many fresh draws are misclassified, bool (draws, n).

        They are named from `base`, and from point to point `apart` further: as many as any point is looked at with.
        """
        n = len(asked.x)
        numbers = torch.arange(draws, device=asked.x.device).repeat_interleave(n)
        names = base + asked.number.repeat(draws) * apart + numbers
        with torch.no_grad():
            logits = defense(asked.x.repeat(draws, 1, 1, 1), ids=asked.images.repeat(draws), draw=names)
        wrong: torch.Tensor = logits.view(draws, n, -1).argmax(dim=2) != asked.y
        return wrong

    @property
    def schedule(self) -> list[int]:
        """Draws at each point of a restart."""
        first, times = self.eot_first or self.eot_iter, self.iterations
        return [round(first * (self.eot_iter / first) ** (k / times)) for k in range(times + 1)]

    @property
    def points(self) -> int:
        """At most, of an image, over all restarts."""
        return len(split(self.losses)) * (self.iterations + 1)

    @property
    def tests(self) -> int:
        """At most, of an image: how often it is asked whether its majority has fallen. Here at every point."""
        return self.points

    @property
    def needed(self) -> int:
        """Draws that all have to fail at one point before the test lets an image go; 0 where there is none.

        Draws at a point are independent of how it was found. Where at most half of all draws fail, so many do with a
        probability of 2^−needed at most; and there are so many tests.
        """
        return math.ceil(math.log2(self.tests / self.error)) if self.drop == "majority" else 0

    def more(self, draws: int) -> int:
        """Looks at one point of an image that seems to have fallen, beside so many draws of its gradient."""
        return max(0, self.needed - draws)

    @property
    def again(self) -> int:
        """Looks of that kind at an image, at most."""
        return self.more(self.schedule[0]) * self.points.bit_length()

    def _leaving(self, defense: Metered, asked: Asked, answer: Answer, tests: _Tests) -> torch.Tensor:
        if self.drop == "never":
            return torch.zeros_like(answer.failed)
        leaving = answer.wrong.all(dim=0) if self.drop == "majority" else answer.failed.clone()
        if more := self.more(asked.draws):
            begun = leaving & tests.due(asked)
            tried = begun.clone()
            # One first: most of those that have not fallen show it.
            for base, draws, apart in ((FALLEN, 1, 1), (FALLEN + LOOKS, more - 1, self.more(self.schedule[0]) - 1)):
                if draws and bool(tried.any()):
                    tried[tried.clone()] = self._look(defense, asked.only(tried), base, draws, apart=apart).all(dim=0)
            leaving = tried
            tests.undecided(asked.only(begun & ~leaving))
        return leaving

    @property
    def least_classes(self) -> int:
        return least_classes(self.losses)

    @property
    def replicas(self) -> int:
        return max(self.eot_iter, self.looks, self.more(self.schedule[0]))

    @property
    def gradient_replicas(self) -> int:
        return self.eot_iter

    @property
    def knows_noise(self) -> bool:
        return self.dw_box

    def at_once(self, images: int) -> int:
        return min(images, self.batch or images)


@dataclasses.dataclass(frozen=True)
class _Radius(Attack):
    """First among an attack's fields."""

    norm: str = "Linf"
    eps: float = 8 / 255


@dataclasses.dataclass(frozen=True)
class InBall(Iterative, _Radius):
    """Steps of one length along the gradient, projected onto the ball."""

    step_size: float | None = step_size_knob("2/255")

    def run(
        self, defense: Metered, x: torch.Tensor, y: torch.Tensor, *, seed: int, x_start: torch.Tensor | None = None
    ) -> Result:
        """See `Attack.run`. With `x_start`, images like `x`, the first restart begins at the nearest points of the ball."""
        near = None if x_start is None else ball.project(x_start, x, self.norm, self.eps)
        return super().run(defense, x, y, seed=seed, x_start=near)

    def step(self, memory: dict[str, torch.Tensor], asked: Asked, gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        size = self.step_size or (2 / 255 if self.norm == "Linf" else self.eps / 5)
        return ball.project(asked.x + ball.ascent(gradient, self.norm, size), x, self.norm, self.eps)


class _Best:
    """The point of each image that is kept, its loss and the share of draws that failed there."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x.clone()
        self.loss = torch.full((len(x),), -math.inf, dtype=x.dtype, device=x.device)
        self.share = torch.zeros(len(x), device=x.device)

    def see(
        self, images: torch.Tensor, x: torch.Tensor, loss: torch.Tensor, share: torch.Tensor, *, keep: str, last: bool
    ) -> None:
        higher, more = loss > self.loss[images], share > self.share[images]
        even = higher & (share == self.share[images])
        better = {
            "loss": higher,
            "last": (more | even) if last else torch.zeros_like(higher),
            "accuracy": more | even,
        }[keep]
        self.take(images[better], x[better], loss[better], share[better])

    def take(self, images: torch.Tensor, x: torch.Tensor, loss: torch.Tensor, share: torch.Tensor) -> None:
        self.x[images], self.loss[images], self.share[images] = x, loss, share


class _Tests:
    """When an image is looked at that seems to have fallen: each time that it has not, twice as many points have to pass.

    Of P points it is P.bit_length() times at most.
    """

    def __init__(self, like: torch.Tensor) -> None:
        self._next, self._pause = torch.zeros_like(like), torch.ones_like(like)

    def due(self, asked: Asked) -> torch.Tensor:
        due: torch.Tensor = asked.number >= self._next[asked.images]
        return due

    def undecided(self, asked: Asked) -> None:
        self._next[asked.images] = asked.number + self._pause[asked.images]
        self._pause[asked.images] *= 2
