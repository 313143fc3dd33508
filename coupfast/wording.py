"""Numbers in sentences."""

from __future__ import annotations

#: Verbs whose form for one thing is not the other one with an s.
_OF_ONE = {"are": "is", "have": "has", "were": "was"}


def counted(count: int, noun: str, verb: str = "") -> str:
    """So many of something, and what they do: "1 image", "3 images", "1 image shows", "3 images show".

    Args:
        noun: Of one.
        verb: Of several.
    """
    if count == 1:
        does = _OF_ONE.get(verb, f"{verb}s")
        return f"{count} {noun} {does}" if verb else f"{count} {noun}"
    return f"{count} {noun}s {verb}".rstrip()


def radius(norm: str, eps: float) -> str:
    """A radius as papers write it: 8/255 in Linf, 0.5 in L2."""
    return f"{255 * eps:g}/255" if norm == "Linf" else f"{eps:g}"
