"""What an attack is."""

from __future__ import annotations

import abc
import dataclasses
import json
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from coupfast.evaluation.attacks import knobs
from coupfast.evaluation.metered import Metered
from coupfast.naming import is_from_file, name_of, reference_to, resolve


@dataclasses.dataclass(frozen=True)
class Cost:
    """Images through the defense that one takes which survives everything: without a gradient, and with one.

    Attributes:
        again: Without a gradient, at most, besides: looks at an image that does not begin because it is seen misclassified, or
            that seems to have fallen; and the judge's at the forms that several stages made of one.
        steps: Of the coarser purification that those with a gradient go through (`Metered.coarser`); None: the defense's.

    Example:
        >>> from coupfast.evaluation import Cost
        >>> Cost(forward=1, gradient=20)
        Cost(forward=1, gradient=20, again=0, steps=None)
    """

    forward: int
    gradient: int
    again: int = 0
    steps: int | tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """What an attack leaves.

    Attributes:
        x_adv: The images that it returns, in [0, 1]: what its own verdict is about.
        curve: Images that the attack had not yet seen misclassified, at its starting point and after each iteration; empty if
            it does not tell.
        strongest: The images to judge by on many draws, where those are others: of the points inside of the ball at which the
            attack saw a failure, or of all if it saw none, the one of the highest loss. An attack that returns an image as it
            came wherever it saw no failure (AutoAttack's do) would be judged by clean images there.
        loss: The mean cross-entropy that it saw at them, −inf where it has tried no point but the image itself.
        failed: Whether it saw them misclassified, or the share of draws in which it did.
        left: Images that it gave up before its last iteration since they have fallen; None if it does not tell.
        looked: Of the fresh draws of each iterate, how many were misclassified where most were; None if it does not tell.
        looks: How many fresh draws those were.

    Example:
        >>> import torch
        >>> from coupfast.evaluation import Result
        >>> found = Result(torch.rand(4, 3, 32, 32), curve=(4, 3, 1))  # of four images three fell in two iterations
        >>> found.x_adv.shape, found.strongest is None
        (torch.Size([4, 3, 32, 32]), True)
    """

    x_adv: torch.Tensor
    curve: tuple[int, ...] = ()
    strongest: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    failed: torch.Tensor | None = None
    left: torch.Tensor | None = None
    looked: torch.Tensor | None = None
    looks: int = 0


class Attack(abc.ABC):
    """One stage of an evaluation: a frozen dataclass whose fields are its knobs (see `knobs`), with a `run` and a `cost`.

    Fields `norm` ("Linf" or "L2") and `eps` (for images in [0, 1]) are the evaluation's; an attack without them knows no ball.
    All values are such as JSON holds: a ledger keeps them.

    Attributes:
        gradient: The gradient of a purifier that the attack is made for; None where it follows none.

    Raises:
        ValueError: if a knob has a value that it does not take, or `eps` is no radius above 0 or reaches every image.

    Example:
        >>> from coupfast.evaluation.attacks import PGD
        >>> attack = PGD(norm="Linf", eps=8 / 255, iterations=40, eot_iter=10)
        >>> attack.cost().gradient  # images through the defense with a gradient, for one image
        400
    """

    gradient: ClassVar[str | None] = "exact"

    def __post_init__(self) -> None:
        """Checks the fields; a subclass with more to check calls this first."""
        knobs.check(self)
        fields = knobs.names(self)
        if "eps" in fields:
            knobs.check_ball(getattr(self, "norm", "Linf"), self.eps)  # type: ignore[attr-defined]

    @abc.abstractmethod
    def run(self, defense: Metered, x: torch.Tensor, y: torch.Tensor, *, seed: int) -> Result:
        """Attack a batch.

        Args:
            defense: Its noise is set by the caller.
            x: Images in [0, 1], float32; not to be written into.
            y: Their labels.
            seed: All randomness of the attack follows from it.
        """

    @property
    def least_classes(self) -> int:
        """Classes that its loss is defined for."""
        return 2

    def check(self, defense: Metered) -> None:
        """ValueError if the attack cannot ask this defense what it has to, in one line. Before any work."""
        if self.knows_noise and defense.purified is None:
            raise ValueError(
                f"`dw_box` is knowledge of a purification's noise, and {type(defense.model).__name__} is no "
                f"coupfast.PurifiedClassifier"
            )

    @property
    def replicas(self) -> int:
        """Copies of an image that go through the defense in one batch."""
        return 1

    @property
    def gradient_replicas(self) -> int:
        """The same of those with a gradient."""
        return self.replicas

    @property
    def knows_noise(self) -> bool:
        """Whether it attacks the very draws that the judge will use."""
        return False

    def at_once(self, images: int) -> int:
        """Of so many images, how many it attacks at a time."""
        return images

    @abc.abstractmethod
    def cost(self) -> Cost:
        """Of one image, at most."""

    def to_dict(self) -> dict[str, Any]:
        """The class and all fields, as JSON has them.

        Raises:
            ValueError: if a field's value is not one of JSON's.
        """
        kind = type(self)
        fields = {name: getattr(self, name) for name in knobs.names(self)}
        for name, value in fields.items():
            try:
                fields[name] = json.loads(json.dumps(value))  # tuples are lists there
            except TypeError as error:
                raise ValueError(
                    f"`{name}` of {kind.__name__} is a {type(value).__name__}, and a ledger keeps numbers, texts and lists of "
                    f"them ({error})"
                ) from error
        own = kind.__module__.startswith("coupfast.")
        return {"class": kind.__name__ if own else reference_to(kind), **fields}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Of a class in a file, which no other process could import: its name and its fields."""
        if not is_from_file(type(self)):
            return super().__reduce_ex__(protocol)
        return _rebuild, (name_of(type(self), option="attack"), {name: getattr(self, name) for name in knobs.names(self)})


def _rebuild(name: str, fields: Mapping[str, Any]) -> Attack:
    attack: Attack = resolve(name, Attack)(**fields)
    return attack
