"""What a report is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Table:
    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Picture:
    """`alt` says what is to be seen to whoever does not see it."""

    title: str
    png: bytes
    note: str
    alt: str


@dataclasses.dataclass(frozen=True)
class Text:
    title: str
    lines: str


Section = Table | Picture | Text
