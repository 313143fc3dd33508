"""What came out, to read: in a terminal, as JSON, and as a page of Markdown with its figures and the index of such pages."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import coupfast
from coupfast.environment import machine, version
from coupfast.evaluation.report import Picture, Section, Table
from coupfast.evaluation.report.render import markdown_rows
from coupfast.experiments import tables
from coupfast.experiments.experiment import Experiment, Results
from coupfast.experiments.scale import SETS
from coupfast.wording import counted
from coupfast_kernels.files import write_whole


class Page:
    """Everything that is said of an experiment that has run.

    Args:
        experiment: Which one.
        results: Of it.
        command: That made it.
    """

    def __init__(self, experiment: Experiment, results: Results, command: str) -> None:
        self.experiment, self.results, self.command = experiment, results, command
        self.sections = experiment.sections(results)
        self.concludes = experiment.concludes(results) + tables.few(results)

    @property
    def title(self) -> str:
        return f"{self.experiment.place}: {self.experiment.title}"

    @property
    def made(self) -> str:
        today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        here = machine()
        starts = sorted({run.started[:10] for run in self.results.runs.values()})
        begun = f"; its runs were begun on {' to '.join(dict.fromkeys((starts[0], starts[-1])))}" if starts else ""
        software = f"coupfast {coupfast.__version__}, torch {version('torch')}"
        environments = (run.configuration["environment"] for run in self.results.runs.values())
        gpus = "".join(f", {name}" for name in sorted({found["gpu"]["device"] for found in environments if "gpu" in found}))
        # Of runs, the table of them says it.
        older = "" if self.results.runs else tables.older(self.results)
        told = f"; {older}" if older else ""
        return f"{today}, {software}, {here['processor']}, {counted(here['cores'], 'core')}{gpus}{begun}{told}"

    def text(self) -> str:
        """For a terminal."""
        blocks = [self.title, *(tables.plain(part) for part in self._ran)]
        blocks += [tables.plain(part) for part in self.sections if isinstance(part, Table)]
        blocks += [_list("What differs from the paper", tables.differences(self.experiment, self.results))]
        blocks += [_list("Assumptions", self.experiment.assumptions), _list("What one may conclude", self.concludes)]
        return "\n\n".join(block for block in blocks if block)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: tables as they are shown, what is said of them, and every run's accuracies and configuration."""
        return {
            "name": self.experiment.name,
            "place": self.experiment.place,
            "title": self.experiment.title,
            "headline": self.concludes[0],
            "command": self.command,
            "made": self.made,
            "networks": self.results.scale.networks,
            "tables": [tables.to_dict(part) for part in self._tables()],
            "differences": tables.differences(self.experiment, self.results),
            "assumptions": list(self.experiment.assumptions),
            "concludes": self.concludes,
            "runs": {
                name: {key: run.found[key] for key in ("accuracies", "fingerprint", "configuration")}
                for name, run in self.results.runs.items()
            },
        }

    @property
    def _ran(self) -> list[Table]:
        """What was run."""
        scale, cases = self.results.scale, self.results.cases
        times, specs = tables.times(self.experiment, cases), [case.spec(scale) for case in cases]
        setting = tables.setting(self.experiment, scale, times, specs)
        return [setting, tables.attacks(scale, cases)] if self.experiment.cases else [setting]

    def _tables(self) -> list[Table]:
        here = [*self._ran, *(part for part in self.sections if isinstance(part, Table))]
        return here + ([tables.work(self.results)] if self.results.runs else [])

    def write(self, folder: Path, every: Iterable[Experiment] = ()) -> Path:
        """The page, its figures and its numbers, and the index of all pages that are in the folder.

        Args:
            folder: Where to.
            every: All experiments: the index names those without a page, too.

        Returns:
            The page's path.
        """
        path = folder / f"{self.experiment.name}.md"
        pictures = {}
        for part in self.sections:
            if isinstance(part, Picture):
                pictures[part.title] = f"{self.experiment.name}-{_slug(part.title)}.png"
                write_whole(folder / pictures[part.title], part.png)
        write_whole(path, self.markdown(pictures).encode())
        write_whole(path.with_suffix(".json"), (json.dumps(self.to_dict(), indent=1) + "\n").encode())
        write_whole(folder / "README.md", index(folder, every).encode())
        return path

    def markdown(self, pictures: dict[str, str]) -> str:
        """The page, with the files of its figures by their titles."""
        experiment = self.experiment
        blocks = [f"# {self.title}", experiment.asks, f"```\n{self.command}\n```", f"Page of {self.made}, by this command."]
        blocks += map(_section, self._ran)
        blocks += [_bullets("What differs from the paper", tables.differences(experiment, self.results))]
        blocks += [_section(part, pictures) for part in self.sections]
        blocks += [_bullets("What one may conclude", self.concludes), _bullets("Assumptions", experiment.assumptions)]
        if self.results.runs:
            blocks.append(_section(tables.work(self.results)))
        return "\n\n".join(block for block in blocks if block) + "\n"


def index(folder: Path, every: Iterable[Experiment] = ()) -> str:
    """The page of the pages that are in a folder, and which of all experiments have none."""
    here = [json.loads(path.read_text()) for path in folder.glob("*.json") if path.with_suffix(".md").is_file()]
    found = sorted((page for page in here if "headline" in page), key=lambda page: _order(page["place"]))
    rows = [(f"[{page['name']}]({page['name']}.md)", page["place"], page["title"], page["headline"]) for page in found]
    sets = sorted({page["networks"] for page in found})
    about = " ".join(f"`{name}`: {SETS[name].told}." for name in sets)
    missing = [one for one in every if one.name not in {page["name"] for page in found}]
    left = [f"`{one.name}` ({one.place}, {one.title}{f'; {one.lacks}' if one.lacks else ''})" for one in missing]
    told = f"\nWithout a page here: {', '.join(left)}. The command runs each, or says what it needs.\n" if left else ""
    return (
        "# The paper's experiments\n\nEach page is made by `coupfast reproduce NAME --page DIR` from what it ran, and says "
        f"what it ran, on which networks and images, and what differs from the paper. {about}\n\n"
        f"{markdown_rows(Table('', ('name', 'in the paper', 'what', 'what came out'), rows))}\n{told}"
    )


def _order(place: str) -> tuple[int, str]:
    return ("Table Fig. Section Appendix Study".split().index(place.split()[0]), place)


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:48]


def _section(part: Section, pictures: dict[str, str] | None = None) -> str:
    if isinstance(part, Picture):
        return f"## {part.title}\n\n![{part.alt}]({(pictures or {})[part.title]})\n\n{part.note}"
    if isinstance(part, Table):
        return f"## {part.title}\n\n" + (f"{part.note}\n\n" if part.note else "") + markdown_rows(part)
    return f"## {part.title}\n\n{part.lines}"


def _bullets(title: str, lines: Any) -> str:
    return f"## {title}\n\n" + "\n".join(f"* {line[0].upper()}{line[1:]}" for line in lines) if lines else ""


def _list(title: str, lines: Any) -> str:
    return f"{title}:\n" + "\n".join(f"  - {line}" for line in lines) if lines else ""
