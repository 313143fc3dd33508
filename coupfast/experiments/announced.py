"""Comparisons that are announced before they are made: what so many images can show, and correction for their number.

Two defenses on n images: on d of them only one is right. McNemar's test asks whether it is one of the two too often. With
ψ the share of images that only one classifies correctly and δ the difference of the accuracies,

    D ~ Binomial(n, ψ),   B | D = d ~ Binomial(d, ½ + δ / 2ψ),   power = P(p(B, D − B) <= α)

Holm 1979: of m p-values in rising order, the i-th is multiplied by m − i + 1, and is no smaller than the one before. The
chance that any true hypothesis is rejected stays at α, whatever depends on what.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from scipy import special

from coupfast.evaluation import Spec
from coupfast.evaluation.report import Table

Key = TypeVar("Key", bound=Hashable)
LEVEL, POWER = 0.05, 0.8
FLIPS = 20_000


@dataclasses.dataclass(frozen=True)
class Announcement:
    """What is said before the first run. Other runs, comparisons or another protocol are another one, and other words are not.

    Attributes:
        tables: In words.
        runs: All that there may be.
        compared: Of what with what.
        decides: The protocol that does.
    """

    tables: Sequence[Table]
    runs: Sequence[Spec]
    compared: Sequence[tuple[str, ...]]
    decides: str


def dated(announced: str, began: str) -> str:
    """In a sentence, when it was announced, and whether that was in time; both times as ISO 8601 has them."""
    if datetime.datetime.fromisoformat(announced) > datetime.datetime.fromisoformat(began):
        return f"Not announced before: written down at {announced}, and the first run began at {began}."
    return f"Written down at {announced}; the first run began at {began}."


def holm(p: Mapping[Key, float]) -> dict[Key, float]:
    """Adjusted p-values: at most α is significant at α."""
    found, least = {}, 0.0
    for i, (name, value) in enumerate(sorted(p.items(), key=lambda item: item[1])):
        least = found[name] = max(least, min(1.0, (len(p) - i) * value))
    return {name: found[name] for name in p}


def power(images: int, discordant: float, difference: float, level: float = LEVEL) -> float:
    """The chance that McNemar's exact test, two-sided, tells two defenses apart.

    Args:
        images: n.
        discordant: ψ, in (0, 1].
        difference: δ, from −ψ to ψ.
        level: α.

    Raises:
        ValueError: if the difference is larger than the share of images that it can come from.
    """
    if not (0 < discordant <= 1 and abs(difference) <= discordant):
        raise ValueError(f"a difference of {difference:g} needs as many discordant images at least, got {discordant:g}")
    counts = np.arange(images + 1)
    least = _critical(images, level)
    first = 0.5 + difference / (2 * discordant)
    # Beyond the critical counts on either side: B <= c or D − B <= c.
    decided = _at_most(least, counts, first) + _at_most(least, counts, 1 - first)
    chance = np.diff(_at_most(counts, images, discordant), prepend=0.0)
    return float((decided * chance).sum())


def detectable(images: int, discordant: float, level: float = LEVEL, wanted: float = POWER) -> float | None:
    """The smallest difference that is found with a chance of `wanted`; None if not even the largest one, ψ, is."""
    low, high = 0.0, discordant
    if power(images, discordant, high, level) < wanted:
        return None
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if power(images, discordant, middle, level) >= wanted else (middle, high)
    return high


@functools.cache
def _critical(images: int, level: float) -> np.ndarray:
    """By the number of discordant images, 0 … n, the largest smaller count that is significant; −1: none is."""
    found = []
    for discordant in range(images + 1):
        p = 2 * _at_most(np.arange(discordant // 2 + 1), np.array(discordant), 0.5)
        found.append(int((p <= level).sum()) - 1)
    return np.array(found)


def _at_most(count: np.ndarray, of: np.ndarray | int, share: float) -> np.ndarray:
    """The chance of at most so many successes; 0 where it is −1."""
    found: np.ndarray = np.where(count < 0, 0.0, special.bdtr(np.maximum(count, 0), of, share))
    return found


def sign_flips(differences: np.ndarray, flips: int = FLIPS) -> float:
    """Two-sided p of no difference, where each image's may as well have had the other sign (Fisher's test), by so many flips.

    McNemar's test is this one, of differences −1, 0 and 1, with all flips.
    """
    signs = 1 - 2 * np.random.Generator(np.random.Philox(0)).integers(2, size=(flips, len(differences)), dtype=np.int8)
    # Shares of draws: sums that are equal may differ in their rounding.
    extreme = np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9
    return float((1 + extreme.sum()) / (1 + flips))
