"""Pages are Jinja templates: figures from result files, the command line's help, the lists of methods and solvers."""

from __future__ import annotations

import argparse
from typing import Any

import figures
import jinja2
from sphinx.application import Sphinx

from coupfast import cli
from coupfast.cli.methods import methods_table, solvers_table
from coupfast.experiments import DEFAULTS, EXPERIMENTS, QUICK, ROLES, SETS


def command_line() -> str:
    """A section for each command with what its `--help` prints."""
    parser = cli.parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    sections = []
    for name, command in commands.choices.items():
        sections.append(f"## coupfast {name}\n\n```text\n{command.format_help().rstrip()}\n```\n")
    return "\n".join(sections)


def experiments_table() -> str:
    """Every experiment of `coupfast reproduce`: its name, its place in the paper, what it is, what it takes."""
    rows = []
    for name, found in EXPERIMENTS.items():
        runs = f"{len(found.cases) or ''}{' and more' if found.then else ''}"
        rows.append([f"`{name}`", found.place, found.title, runs, ", ".join(ROLES[role] for role in found.needs)])
    return figures.markdown(["name", "in the paper", "what", "runs", "networks"], rows)


def sizes_table() -> str:
    """The sizes of `coupfast reproduce`, where no option says otherwise."""
    columns = {"`--quick`": QUICK, "`--networks tiny`": DEFAULTS["tiny"], "`--networks paper`": DEFAULTS["paper"]}
    names = {
        "images": "images",
        "budget": "share of an attack's published work",
        "steps": "steps of a purification from t = 0.1",
        "draws": "fresh draws that judge an image",
        "paths": "simulated paths of a point (`fig3b`)",
    }
    rows = []
    for name, told in names.items():
        values = [size[name] for size in columns.values()]
        rows.append([f"`--{name}`", told, *("as published" if value is None else f"{value:,.10g}" for value in values)])
    return figures.markdown(["option", "what", *columns], rows)


def networks_table() -> str:
    """The networks of `coupfast reproduce` by role, and where the weights of the paper's come from."""
    tiny, paper = SETS["tiny"], SETS["paper"]
    rows = [
        [f"`--{role}`, `--{role}-weights`", *(f"`{found.networks[role].name}`" for found in (tiny, paper)), paper.sources[role]]
        for role in ROLES
    ]
    return figures.markdown(["options", "tiny", "paper", "where the paper's weights come from"], rows)


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
    "experiments_table": experiments_table,
    "methods_table": methods_table,
    "networks_table": networks_table,
    "sizes_table": sizes_table,
    "solvers_table": solvers_table,
}


def render(app: Sphinx, name: str, source: list[str]) -> None:
    source[0] = ENVIRONMENT.from_string(source[0]).render()


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", render)
    return {"parallel_read_safe": True}
