"""What came out, to read: one HTML file that needs nothing else, its tables as Markdown, and the numbers as JSON and CSV.

parts     what a report is made of
read      a finished run
tables, pictures, words
published figures of others
render    as HTML and as Markdown
"""

from __future__ import annotations

import datetime
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coupfast.evaluation.report import pictures, tables, words
from coupfast.evaluation.report.parts import Picture, Section, Table, Text
from coupfast.evaluation.report.read import Run, read, told_apart
from coupfast.evaluation.report.render import to_html, to_markdown
from coupfast.evaluation.result import csv_of, row
from coupfast.wording import counted
from coupfast_kernels.files import write_whole

__all__ = ["Picture", "Run", "Section", "Table", "Text", "read", "sections", "to_html", "to_markdown", "write"]

SUFFIXES = (".html", ".md", ".json", ".csv")


def write(folders: Sequence[str | Path], target: str | Path) -> list[Path]:
    """Report on runs, side by side.

    Args:
        folders: The runs'.
        target: The HTML file; Markdown, JSON and CSV go beside it.

    Returns:
        The paths of all four.
    """
    runs = told_apart([read(folder) for folder in folders])
    lower = tables.lowers(runs)
    parts = _sections(runs, lower)
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    about = f"{counted(len(folders), 'run')}; reported on {today}."
    found = {run.name: run.found for run in runs} | _lower(lower)
    texts = (to_html(parts, about), to_markdown(parts, about), json.dumps(found, indent=1) + "\n", csv_of(found))
    paths = [Path(target).with_suffix(suffix) for suffix in SUFFIXES]
    for path, text in zip(paths, texts, strict=True):
        write_whole(path, text.encode())
    return paths


def _lower(pairs: Sequence[tables.Lower]) -> dict[str, dict[str, Any]]:
    """What `tables.lower` says, as JSON has it."""
    found = {}
    for pair in pairs:
        if pair.error:  # the report says it
            continue
        names = f"{pair.rand.name}, {pair.standard.name}"
        for number, name in enumerate((f"lower of {names}", f"both of {names}")):
            found[name] = {"accuracies": [row("attacked", p, pair.draws, both[number]) for p, both in pair.found.items()]}
    return found


def sections(runs: Sequence[Run]) -> list[Section]:
    """Everything that a report says, in order.

    Raises:
        ValueError: if a run is there twice.
    """
    runs = told_apart(runs)
    return _sections(runs, tables.lowers(runs))


def _sections(runs: Sequence[Run], lower: Sequence[tables.Lower]) -> list[Section]:
    parts: list[Section] = [tables.summary(runs), *(tables.accuracies(run) for run in runs)]
    parts += [*tables.lower(lower), words.protocols(runs), *words.attacks(runs)]
    if max(len(run.verdicts["clean"].logits) for run in runs) > 1:
        parts.append(pictures.resubmission_picture(runs))
    for pair in itertools.combinations(runs, 2):
        parts += tables.comparison(*pair)
    parts += tables.classes(runs)
    curved = [run for run in runs if pictures.curves(run)]
    if curved:
        parts.append(pictures.curve_picture(curved))
    for run in runs:
        if len(run.shown["images"]):
            if "clean_confidences" in run.shown:
                parts.append(pictures.path_picture(run))
            parts.append(pictures.gallery(run))
    for run in runs:
        parts += [*tables.found_by_stage(run), tables.time(run), *tables.certificate(run)]
        parts += [tables.configuration(run), *tables.stages(run), tables.again(run)]
    return parts
