"""Transfer through a coarser purification: its exact gradient costs K'/K of the defense's (Lee and Kim's surrogate, 2023)."""

from __future__ import annotations

import dataclasses
from typing import Literal

from coupfast.evaluation.attacks.base import Cost
from coupfast.evaluation.attacks.iterative import Asked
from coupfast.evaluation.attacks.knobs import count, knob
from coupfast.evaluation.attacks.pgd import PGD
from coupfast.evaluation.metered import Metered
from coupfast.evaluation.views import View
from coupfast.options import check_integer, one_or_several


@dataclasses.dataclass(frozen=True)
class Transfer(PGD):
    """PGD with EOT on the same defense in few steps, with fresh noise; its last point is judged on the defense itself.

    While it climbs it sees the coarse defense only, and so does its curve. Who leaves is decided on the real one.

    Attributes:
        coarse_steps: Of the coarser purification, fewer than the defense has. Of method multi-stage those of each round, one
            number for all or one a level: Lee and Kim attack their levels through (1, 1, 5).
        keep: "accuracy" goes by looks at the real defense, and among equals by the cross-entropy of the coarse one.

    Raises:
        ValueError: as `Iterative`, or if `coarse_steps` are no integers of at least 1, or nothing tells which point to keep, or
            with `dw_box`: other steps have other noise than the judge's.
    """

    coarse_steps: int | tuple[int, ...] = knob(
        5,
        "steps of the purification that the attack goes through, fewer than the defense's; of each round of method "
        "multi-stage, one number or one a level",
        metavar="N,...",
        parse=one_or_several(int),
    )
    iterations: int = count(100, "steps of the attack")
    eot_iter: int = count(10, "draws of the noise that a gradient is averaged over")
    keep: Literal["last", "accuracy"] = knob(
        "last", "which point is returned: the last, or that of the least accuracy on its looks"
    )

    def __post_init__(self) -> None:
        given = self.coarse_steps
        several = tuple(given) if isinstance(given, (list, tuple)) else ()  # JSON has lists
        try:
            checked = tuple(check_integer("coarse_steps", steps, 1) for steps in several or (given,))
        except TypeError as error:
            what = "an integer, or one for each level of a method that has several"
            raise ValueError(f"`coarse_steps` is {what}, got {given!r}") from error
        object.__setattr__(self, "coarse_steps", checked if several else checked[0])
        super().__post_init__()
        if self.keep == "accuracy" and not self.looks:
            raise ValueError("`keep` = 'accuracy' goes by looks at the real defense, and `looks` is 0")
        if self.dw_box:
            raise ValueError(
                "`dw_box` is knowledge of the noise in the defense's own steps, and `coarse_steps` go through others: take it "
                "for an attack that goes through all steps, or as exact.dw_box for the cascade's last stage alone"
            )

    def check(self, defense: Metered) -> None:
        super().check(defense)
        defense.coarser(self.coarse_steps)

    def view(self, asked: Asked) -> View | None:
        return View(steps=self.coarse_steps) if asked.follow else None

    @property
    def tests(self) -> int:
        return self.points.bit_length()

    def more(self, draws: int) -> int:
        # Those of the gradient are the coarse defense's.
        return {"never": 0, "majority": self.needed}.get(self.drop, 1)

    def cost(self) -> Cost:
        return dataclasses.replace(super().cost(), steps=self.coarse_steps)
