"""A report as a page that needs no other file, and as Markdown."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Sequence
from typing import Any

from coupfast.evaluation.report.parts import Picture, Section, Table, Text

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
table { border-collapse: collapse; font-size: .86rem; display: block; overflow-x: auto; }
th, td { padding: .25rem .7rem; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #1a1a1a; } td { border-bottom: 1px solid #ddd; overflow-wrap: anywhere; }
p { color: #444; max-width: 50rem; } img { max-width: 100%; } pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; }
"""


def to_html(parts: Sequence[Section], about: str) -> str:
    """A page that needs no other file."""
    render: dict[type, Callable[[Any], str]] = {Table: _html_table, Picture: _html_picture, Text: _html_text}
    body = "\n".join(f"<h2>{html.escape(part.title)}</h2>\n{render[type(part)](part)}" for part in parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        "<title>coupfast report</title>"
        f"<style>{_STYLE}</style></head>\n<body>\n<h1>Evaluation of purification defenses</h1>\n"
        f"<p>{html.escape(about)}</p>\n{body}\n</body>\n</html>\n"
    )


def _html_table(table: Table) -> str:
    def row(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    note = f"<p>{html.escape(table.note)}</p>\n" if table.note else ""
    rows = "\n".join([row("th", table.header), *(row("td", cells) for cells in table.rows)])
    return f"{note}<table>\n{rows}\n</table>"


def _html_picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    alt = html.escape(picture.alt)
    return f'<p>{html.escape(picture.note)}</p>\n<img alt="{alt}" src="data:image/png;base64,{data}">'


def _html_text(text: Text) -> str:
    return f"<pre>{html.escape(text.lines)}</pre>"


def to_markdown(parts: Sequence[Section], about: str) -> str:
    """The tables and texts; pictures are in the HTML."""
    blocks = []
    for part in parts:
        if isinstance(part, Table):
            blocks.append(f"## {part.title}\n\n" + (f"{part.note}\n\n" if part.note else "") + markdown_rows(part))
        elif isinstance(part, Text):
            blocks.append(f"## {part.title}\n\n```\n{part.lines}\n```")
    return "\n\n".join(["# Evaluation of purification defenses", about, *blocks]) + "\n"


def markdown_rows(table: Table) -> str:
    """A table's header and rows in Markdown."""
    lines = [table.header, ("---",) * len(table.header), *table.rows]
    return "\n".join("| " + " | ".join(map(_escaped, cells)) + " |" for cells in lines)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
