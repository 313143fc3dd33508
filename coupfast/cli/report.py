"""`coupfast report`: runs, side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from coupfast.cli.arguments import add_command
from coupfast.cli.reports import refuse_existing
from coupfast.evaluation import report


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "report",
        run,
        "Report on finished evaluations, side by side: an HTML file that needs nothing else, its tables as Markdown, and the "
        "numbers as JSON and CSV",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs")
    parser.add_argument("--out", metavar="FILE", help="the .html file to write; without it RUN/report.html")
    parser.add_argument("--force", action="store_true", help="replace what exists")


def run(options: argparse.Namespace) -> int:
    target = Path(options.out) if options.out else Path(options.runs[0]) / "report.html"
    if target.suffix != ".html":
        raise ValueError(f"{target} is written as HTML: give it that suffix; Markdown, JSON and CSV go beside it")
    refuse_existing([target.with_suffix(suffix) for suffix in report.SUFFIXES], options.force)
    print("\n".join(map(str, report.write(options.runs, target))))
    return 0
