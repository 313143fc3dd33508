"""Tables as the benchmarks print them."""

from __future__ import annotations

from collections.abc import Sequence


def lines(table: Sequence[Sequence[str]], *, markdown: bool = False) -> list[str]:
    """Rows of cells, the header first, in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    rows = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in table]
    if not markdown:
        return ["  ".join(row).rstrip() for row in rows]
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return [head, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *body]
