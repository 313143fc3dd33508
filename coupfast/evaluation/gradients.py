"""Whether an attack had gradients to follow: a defense whose logits saturate gives it zeros, and looks robust.

A classifier with logits times 1e4 has a softmax that is 0 or 1 in every class, and a cross-entropy whose gradient is exactly 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from coupfast.evaluation.ledger import Record

SHARE = 0.1  # of an attack's gradients: from here on it is said without being asked for


@dataclasses.dataclass(frozen=True)
class Gradients:
    """What came back to the attack of one stage, one an image and backward pass.

    Attributes:
        stage: The attack.
        asked: All of them.
        zero: Those that are 0 in every value.
        nonfinite: Those with a value that is infinite or NaN.
    """

    stage: str
    asked: int
    zero: int
    nonfinite: int

    @property
    def useless(self) -> bool:
        """Whether so many led nowhere that the attack says little."""
        return self.zero + self.nonfinite >= SHARE * self.asked > 0

    def __str__(self) -> str:
        parts = [
            f"{count} ({100 * count / self.asked:.3g} %) {what}"
            for count, what in ((self.zero, "are exactly 0"), (self.nonfinite, "are not finite"))
            if count
        ]
        return f"of the {self.asked} gradients that {self.stage} followed, {' and '.join(parts) or 'none is 0'}"

    @property
    def warning(self) -> str:
        return (
            f"{self}: they lead nowhere, so that what stands under this attack may fall under another. Saturated logits do "
            f"that, rounding and clipping inside of the defense; square follows no gradient, and the loss of apgd-dlr does not "
            f"saturate"
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def followed(records: Iterable[Record]) -> dict[str, Gradients]:
    """By stage, of all stages that followed a gradient."""
    found: dict[str, Gradients] = {}
    for record in records:
        if record.gradients:
            stage = record.unit.stage
            before = found.get(stage, Gradients(stage, 0, 0, 0))
            found[stage] = Gradients(
                stage,
                before.asked + record.gradients,
                before.zero + record.zero_gradients,
                before.nonfinite + record.nonfinite_gradients,
            )
    return found
