"""Whether a kernel agrees with its definition: to the bit, to rounding, or within a limit of its own."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from coupfast_kernels.registry import Trial

U = 2.0**-24  # one rounding of a float32

#: A kernel's error may be this many times that of the definition run in float32, which has the same sums in another order.
FLOAT32_FACTOR = 4.0


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How near a result has to be to its definition; without fields: the same bits.

    Attributes:
        roundings: Relative error, in the Euclidean norm and against float64, of at most FLOAT32_FACTOR times the definition's
            own in float32, or of so many roundings, whichever is more.
        limit: Such an error of at most this.
    """

    roundings: float | None = None
    limit: float | None = None


BITS = Agreement()


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`error` and `bound` as in `Agreement`; of bits, how many elements have other ones, and 0."""

    error: float
    bound: float

    @property
    def agrees(self) -> bool:
        return self.error <= self.bound

    def __str__(self) -> str:
        return f"error {self.error:.2e}, bound {self.bound:.2e}" if self.bound else f"{self.error:.0f} elements with other bits"


def compare(trial: Trial) -> Comparison:
    """Run a kernel and its definition; of several results, the one that is worst.

    Raises:
        ValueError: for results of another number, shape or dtype, and values that are not finite.
    """
    rounded = trial.definition(torch.float32)
    exact = rounded if all(agreement == BITS for agreement in trial.agreements) else trial.definition(torch.float64)
    _poison(rounded)
    found = trial.run()
    if not len(found) == len(rounded) == len(trial.agreements):
        raise ValueError(f"gives {len(found)} results, its definition {len(rounded)}; {len(trial.agreements)} are agreed on")
    comparisons = [_one(*each) for each in zip(found, rounded, exact, trial.agreements, strict=True)]
    return max(comparisons, key=lambda each: (not each.agrees, each.error / each.bound if each.bound else 0.0))


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """In the Euclidean norm, taken in float64; infinite for NaN."""
    error = float((value.double() - exact).norm() / exact.norm())
    return math.inf if math.isnan(error) else error


def _one(found: torch.Tensor, rounded: torch.Tensor, exact: torch.Tensor, agreement: Agreement) -> Comparison:
    if found.shape != rounded.shape or found.dtype != torch.float32:
        raise ValueError(f"gives {found.dtype} of shape {tuple(found.shape)}, not float32 of {tuple(rounded.shape)}")
    if not bool(found.isfinite().all()):
        raise ValueError("values that are not finite")
    if agreement == BITS:
        other = found.contiguous().view(torch.int32) != rounded.contiguous().view(torch.int32)
        return Comparison(float(other.sum()), 0.0)
    if agreement.limit is not None:
        bound = agreement.limit
    else:
        bound = max(FLOAT32_FACTOR * relative_error(rounded, exact), (agreement.roundings or 0.0) * U)
    error = relative_error(found, exact)
    if not math.isfinite(bound):
        raise ValueError("a definition that is not finite")
    return Comparison(error, bound)


def _poison(results: tuple[torch.Tensor, ...]) -> None:
    """NaN where the allocator is about to put results like these: what a kernel leaves out must not look right."""
    pieces = [torch.full_like(result, math.nan) for result in results]
    del pieces
