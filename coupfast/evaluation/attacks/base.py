"""What an attack is."""

from __future__ import annotations

import abc
import dataclasses

import torch

from coupfast.evaluation.defense import Defense


@dataclasses.dataclass(frozen=True)
class Cost:
    """Images through the defense that one takes which survives everything: without a gradient, and with one.

    Attributes:
        again: Without a gradient, at most, besides: looks at an image that does not begin because it is seen misclassified.
    """

    forward: int
    gradient: int
    again: int = 0


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
        failed: Whether it saw them misclassified.
    """

    x_adv: torch.Tensor
    curve: tuple[int, ...] = ()
    strongest: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    failed: torch.Tensor | None = None


class Attack(abc.ABC):
    """One stage of an evaluation: a frozen dataclass of its settings, with a `run`."""

    @abc.abstractmethod
    def run(self, defense: Defense, x: torch.Tensor, y: torch.Tensor, *, seed: int) -> Result:
        """Attack a batch.

        Args:
            defense: Its noise is set by the caller.
            x: Images in [0, 1], float32.
            y: Their labels.
            seed: All randomness of the attack follows from it.
        """

    @property
    def least_classes(self) -> int:
        """Classes that its loss is defined for."""
        return 2

    @property
    def replicas(self) -> int:
        """Copies of an image that go through the defense in one batch."""
        return 1

    @abc.abstractmethod
    def cost(self) -> Cost:
        """Of one image, at most."""
