"""Pages are Jinja templates: figures from result files, the command line's help, the lists of methods and solvers."""

from __future__ import annotations

import argparse
from typing import Any

import figures
import jinja2
from sphinx.application import Sphinx

from coupfast import cli
from coupfast.cli.methods import methods_table, solvers_table


def command_line() -> str:
    """A section for each command with what its `--help` prints."""
    parser = cli.parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    sections = []
    for name, command in commands.choices.items():
        sections.append(f"## coupfast {name}\n\n```text\n{command.format_help().rstrip()}\n```\n")
    return "\n".join(sections)


# Nothing that Markdown, Python or a shell would write by itself: pages have dictionaries, attributes and comments.
ENVIRONMENT = jinja2.Environment(
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
    autoescape=False,
    block_start_string="{%%",
    block_end_string="%%}",
    comment_start_string="{##",
    comment_end_string="##}",
)
ENVIRONMENT.globals |= figures.CONTEXT | {
    "command_line": command_line,
    "experiments": lambda: sorted(path.stem for path in (figures.ROOT / "docs" / "experiments").glob("*.md")),
    "methods_table": methods_table,
    "solvers_table": solvers_table,
}


def render(app: Sphinx, name: str, source: list[str]) -> None:
    source[0] = ENVIRONMENT.from_string(source[0]).render()


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", render)
    return {"parallel_read_safe": True}
