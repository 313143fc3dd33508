"""What of a purified classifier an attack may ask for beside its logits: the purified images, or a coarser purification."""

from __future__ import annotations

import dataclasses
from typing import Any

from coupfast.evaluation import purification
from coupfast.purify import PurifiedClassifier, Purifier


@dataclasses.dataclass(frozen=True)
class View:
    """One way to look at a defense.

    Attributes:
        steps: Of the purification, in the place of its own; see `coarser`.
        classified: Logits; or else the purified images, of the images' shape.
    """

    steps: int | tuple[int, ...] | None = None
    classified: bool = True

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, and so as a journal that is read again has it."""
        return {"steps": list(self.steps) if isinstance(self.steps, tuple) else self.steps, "classified": self.classified}


@dataclasses.dataclass(frozen=True)
class Known:
    """The noise that a judge will use: an attack that knows it asks for no other.

    Attributes:
        seed: The judge's.
        images: Ids of the attacked images there, in order.
        draws: How many it uses, from 0.
    """

    seed: int
    images: tuple[int, ...]
    draws: int


def coarser(defense: PurifiedClassifier, steps: int | tuple[int, ...]) -> PurifiedClassifier:
    """The same defense in fewer steps of the same time, with the gradient of those.

    Args:
        steps: Of the purification, or of each round of a multi-stage one: one number for all of them, or one a level.

    Raises:
        ValueError: if its method cannot be told a number of steps, or has no more than so many.
    """
    purifier = defense.purifier
    settings = purification.coarsened(purifier.settings, steps)
    if settings is None:
        method = purifier.settings.method
        lacks = "has no `num_steps` by which it could be made coarser"
        if isinstance(getattr(method, "t", None), tuple):
            lacks = "has a whole grid as `t`, and only steps from one time can be made fewer: set `t` to a number"
        raise ValueError(f"the method {method.name!r} {lacks}")
    if settings.num_steps >= purifier.num_steps:
        raise ValueError(
            f"a coarser purification takes fewer than the defense's {purifier.num_steps} steps, got {settings.num_steps}: "
            "set `coarse_steps`"
        )
    return PurifiedClassifier(Purifier(purifier.score, purifier.classifier, settings=settings), defense.classifier)
