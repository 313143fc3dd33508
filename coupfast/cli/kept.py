"""What `coupfast purify` has done in a folder: the same command goes on after it was stopped, and skips what is there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from coupfast.batches import image_sha256
from coupfast.cli.reports import refuse_existing
from coupfast.data import load_images
from coupfast.evaluation.configuration import difference
from coupfast.evaluation.journal import Journal, JournalError, read_about

JOURNAL = "purify.journal"

Row = Mapping[str, Any]


class Kept:
    """Batches that are done: in the journal of a run that was stopped, or by the report of one that was finished.

    Args:
        out: The folder.
        report, archive: Names of the files in it that tell of a finished run, and hold its exact values.
        targets: Names of all files that are to be written.
        force: Begin again, and replace what is there.

    Raises:
        FileExistsError: if a file is in the way that is of neither.
    """

    def __init__(self, out: Path, report: str, archive: str, targets: Sequence[str], *, force: bool) -> None:
        self._out, self._archive, self._targets, self._force = out, archive, targets, force
        self._report_name = report
        self._journal: Journal | None = None
        self._report = None if force else _read(out / report)
        self._values: torch.Tensor | None = None
        if force or not (out / JOURNAL).is_file():
            rows = [] if self._report is None else self._report["images"]
            own = {row["file"] for row in rows} | ({report, archive} if self._report is not None else set())
            refuse_existing([out / name for name in targets if name not in own], force)

    def settings(self) -> Mapping[str, Any] | None:
        """How what is there was purified; None where nothing is."""
        about = self._report if self._report is not None else None if self._force else read_about(self._out / JOURNAL)
        return None if about is None else about.get("settings")

    def open(self, about: Mapping[str, Any], rows: Iterable[Row]) -> None:
        """Go on, or begin.

        Args:
            about: All that decides what becomes of an image, as JSON has it.
            rows: Of every image and draw its record so far.

        Raises:
            ValueError: if what is there was made otherwise, or of other images; the message says what differs.
        """
        about = json.loads(json.dumps(about))
        if self._report is not None:
            if changed := difference({name: self._report.get(name) for name in about}, about):
                raise ValueError(
                    f"{self._out} holds images that were made otherwise: {changed}; choose another folder, or --force to "
                    f"replace them"
                )
            here = {_key(row) for row in rows}
            if gone := [row for row in self._report["images"] if _key(row) not in here]:
                raise ValueError(
                    f"{self._out} holds {len(gone)} images that are not among the inputs now, the first of "
                    f"{gone[0]['source']}; choose another folder, or --force to replace them"
                )
        self._out.mkdir(parents=True, exist_ok=True)
        path = self._out / JOURNAL
        if self._force:  # and what a run that goes on after this one would take for its own goes as well
            for old in (path, self._out / self._report_name):
                old.unlink(missing_ok=True)
        begun = path.exists()
        try:
            self._journal = Journal(path, about)
        except JournalError as error:
            raise ValueError(f"{error}, as --force does, or choose another folder") from error
        before = self._journal.get(("targets",))
        if begun and before is not None:
            refuse_existing([self._out / name for name in self._targets if name not in before.said["names"]], force=False)
        self._journal.append(("targets",), {"names": list(self._targets)})

    def values(self, rows: Sequence[Row]) -> torch.Tensor | None:
        """What became of a batch's images, exactly, if it is known."""
        assert self._journal is not None
        entry = self._journal.get(("batch", _batch(rows)))
        if entry is not None:
            (purified,) = self._journal.tensors(entry, torch.device("cpu"))
            return purified
        places = self._places(rows)
        if places is None or self._report is None or self._report["archive"] is None:
            return None
        if self._values is None:
            self._values, _ = load_images(self._out / self._archive)
        found = self._values[places] if max(places) < len(self._values) else None
        hashes = [self._report["images"][place]["output_sha256"] for place in places]
        return found if found is not None and [image_sha256(x) for x in found] == hashes else None

    def hashes(self, rows: Sequence[Row]) -> list[str] | None:
        """SHA-256 of what became of a batch's images, if that is known and their files are there."""
        places = self._places(rows)
        if (
            self._report is None
            or places is None
            or not all(row["file"] and (self._out / row["file"]).is_file() for row in rows)
        ):
            return None
        return [self._report["images"][place]["output_sha256"] for place in places]

    def keep(self, rows: Sequence[Row], purified: torch.Tensor) -> None:
        """A batch is done; its files come after this, so that they are known to be its."""
        assert self._journal is not None
        self._journal.append(("batch", _batch(rows)), {}, [purified])

    def close(self, *, done: bool = False) -> None:
        """Nothing more is done in here now; or ever, if all is `done`."""
        if self._journal is not None:
            self._journal.close()
        if done:
            for name in (JOURNAL, f"{JOURNAL}.lock"):
                (self._out / name).unlink(missing_ok=True)

    def _places(self, rows: Sequence[Row]) -> list[int] | None:
        """Where the report tells of these images."""
        known = {} if self._report is None else {_key(row): place for place, row in enumerate(self._report["images"])}
        found = [known.get(_key(row)) for row in rows]
        return None if None in found else found  # type: ignore[return-value]


def _read(path: Path) -> dict[str, Any] | None:
    """A report of `coupfast purify`; None where there is none, or something else under its name."""
    try:
        report = json.loads(path.read_text())
        whole = all({"id", "draw", "input_sha256", "output_sha256", "file", "source"} <= {*row} for row in report["images"])
        return report if whole and "archive" in report else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _key(row: Row) -> tuple[Any, ...]:
    return row["id"], row["draw"], row["input_sha256"]


def _batch(rows: Sequence[Row]) -> str:
    return hashlib.sha256(json.dumps([_key(row) for row in rows]).encode()).hexdigest()
