"""Docstrings are plain text with `code` in it; this makes reStructuredText of them before napoleon reads their sections."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

import coupfast
from coupfast import settings

_SECTION = re.compile(r"\s*(Args|Attributes|Returns|Raises|Example|Examples|Yields|Memory|Note):\s*$")
_CODE = re.compile(r"(``[^`]+``|`[^`]+`)")
_BULLET = re.compile(r"\s*\* ")
#: A line of the list that `purify` has of its options.
_OPTION = re.compile(r"(\s{8,})([a-z_]+) \((.*?)\): (.*)")

#: What a docstring may name and a reader may want to go to: what the page of the API has, by the names that docstrings use.
LINKS = {
    name: f"{module}.{name}"
    for module, names in {
        "coupfast.solvers": ("euler_maruyama", "probability_flow", "reverse_diffusion", "exponential"),
        "coupfast.data": ("load_images", "save_images", "image_files", "cifar10_512_indices"),
        "coupfast.evaluation": ("Attack", "Cost", "Result", "Suite", "Ledger", "count", "knob"),
        "coupfast.evaluation.protocols": ("wilson_interval", "resubmissions", "mcnemar"),
        "coupfast.methods": ("Recipe", "Networks"),
        "coupfast.models.adapters": ("NoiseFrom", "NoiseFromEDM", "NoiseFromScore", "Normalized"),
        "coupfast.models.registry": ("register_score", "register_classifier", "CheckpointError"),
        "coupfast.options": ("option",),
        "coupfast": coupfast.__all__,
    }.items()
    for name in names
}


def plain(line: str) -> str:
    """A line whose characters mean themselves, code that names what is documented being a link."""
    parts = _CODE.split(line)
    for i, part in enumerate(parts):
        if i % 2 == 0:
            bullet = _BULLET.match(part)[0] if i == 0 and _BULLET.match(part) else ""
            rest = part[len(bullet) :].replace("\\", "\\\\").replace("*", "\\*").replace("|", "\\|")
            parts[i] = bullet + re.sub(r"(\w)_(?!\w)", r"\1\\_", rest)
        else:
            code = part.strip("`")
            name = code.removesuffix("()")
            parts[i] = f":py:obj:`~{LINKS[name]}`" if name in LINKS else f"``{code}``"
    return "".join(parts)


def _is_option(name: str) -> bool:
    return any(name == option.keyword for options in settings.options().values() for option in options)


def convert(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    made: list[str] = []
    literal: int | None = None  # the indentation of text that an indented block stands under
    section, doctest = False, False
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        previous = next((each for each in reversed(lines[:number]) if each.strip()), "")
        if not line.strip():
            made.append(line)
            doctest = False
            continue
        if literal is not None and indent <= literal:
            literal = None
        doctest = doctest or line.lstrip().startswith(">>>")
        if doctest or literal is not None:
            made.append(line)
            continue
        base = len(previous) - len(previous.lstrip())
        starts = number > 0 and not lines[number - 1].strip() and indent > base
        if starts and previous and not _SECTION.match(previous) and not section:
            # Formulas and lines of code, set off by an indentation.
            literal = base
            made += [" " * base + "::", ""]
            made.append(line)
            continue
        if name == "coupfast.purify" and (option := _OPTION.fullmatch(line)) and _is_option(option[2]):
            made.append(f"{option[1]}* ``{option[2]}`` ({plain(option[3])}): {plain(option[4])}")
            continue
        section = bool(_SECTION.match(line)) or (section and indent > 0)
        made.append(line if _SECTION.match(line) else plain(line))
    lines[:] = made


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", convert, priority=400)  # napoleon's is 500
    return {"parallel_read_safe": True}
