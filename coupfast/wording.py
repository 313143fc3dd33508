"""Numbers in sentences."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """So many of something: "1 image", "3 images"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
