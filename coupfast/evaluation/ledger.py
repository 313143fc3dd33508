"""What is done, on disk: one SQLite file for a run, and one safetensors file for each unit's images and logits.

A unit's file is written under a temporary name, synced and renamed before the transaction that calls the unit done, and the
transaction holds its SHA-256. So whatever moment a process dies at, the ledger names no file that is not whole. Of a unit that
is under way a journal keeps what the defense has answered; it goes when the unit is done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from coupfast.evaluation import journal
from coupfast.evaluation.units import JUDGE, Unit
from coupfast_kernels.files import write_whole
from coupfast_kernels.locks import locked

logger = logging.getLogger(__name__)

#: 2: what attacks saw at their strongest images; 3: memory of units; 4: purifier and attack as objects in the configuration.
#: 5: gradients of units; 6: which of an image's forms was judged.
VERSION = 6
DATABASE, LOCK, FILES = "ledger.sqlite", "lock", "units"
#: Of a judge's unit, for each image, which of its forms was judged; −1 where there is one only.
FORM = "form"

_TABLES = """
CREATE TABLE run (version INTEGER NOT NULL, configuration TEXT NOT NULL, command TEXT NOT NULL, started TEXT NOT NULL);
CREATE TABLE units (
    name TEXT PRIMARY KEY, stage TEXT NOT NULL, images TEXT NOT NULL, state TEXT NOT NULL, worker TEXT,
    result TEXT, file TEXT, sha256 TEXT, forward_images INTEGER, gradient_images INTEGER, seconds REAL, peak_bytes INTEGER,
    gradients INTEGER, zero_gradients INTEGER, nonfinite_gradients INTEGER, error TEXT
);
CREATE TABLE notes (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


class LedgerError(OSError):
    """A ledger that cannot be read or written, or that is not what it should be."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a unit gave.

    Attributes:
        name: The unit's.
        result: Verdicts, as JSON has them.
        arrays: Images and logits, for the unit's file.
        forward_images, gradient_images: Images through the defense, without and with a gradient.
        seconds: Time that the unit took, by a clock that does not jump.
        peak_bytes: Most memory that the worker has had: of a CPU's all of its process, of a GPU what torch had for this unit.
        gradients, zero_gradients, nonfinite_gradients: See `Metered`.
    """

    name: str
    result: dict[str, Any]
    arrays: dict[str, np.ndarray]
    forward_images: int
    gradient_images: int
    seconds: float
    peak_bytes: int = 0
    gradients: int = 0
    zero_gradients: int = 0
    nonfinite_gradients: int = 0


@dataclasses.dataclass(frozen=True)
class Record:
    """A unit that is done, as the ledger has it; see `Unit` and `Outcome`."""

    unit: Unit
    result: dict[str, Any]
    file: str
    sha256: str
    forward_images: int
    gradient_images: int
    seconds: float
    peak_bytes: int
    worker: str
    gradients: int
    zero_gradients: int
    nonfinite_gradients: int

    @property
    def standing(self) -> tuple[int, ...]:
        """Those of its images that were not fooled; of the judge none."""
        return tuple(self.result.get("standing", ()))

    @property
    def onward(self) -> tuple[int, ...]:
        """Those that the next stage attacks."""
        return tuple(self.result.get("onward", self.standing))


@dataclasses.dataclass(frozen=True)
class Form:
    """What a stage made of an image.

    Attributes:
        x: The image.
        failed: Share of draws that its attack saw fail there.
        loss: Mean cross-entropy that it saw there; of an attack that does not tell it is above all others.
    """

    x: np.ndarray
    failed: float = 1.0
    loss: float = np.inf

    @property
    def strength(self) -> tuple[float, float]:
        return self.failed, self.loss


class Ledger:
    """A run's ledger. One process at a time may have it open for writing; any number may read.

    Args:
        folder: The run's folder.
        read_only: Open for reading, whatever the folder's rights.

    Attributes:
        configuration: What the run was started with.
        command: The command that started it.
        started: When, by the clock on the wall.

    Raises:
        LedgerError: if there is no ledger, it is of another version, or another process is writing to it.

    Example:
        >>> import tempfile, torch, coupfast
        >>> from coupfast.evaluation import Ledger
        >>> x, y = torch.rand(1, 3, 32, 32), torch.tensor([3])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     coupfast.evaluate(coupfast.load_classifier("cifar10-tiny"), x, y, attack="none", draws=2, out=folder).close()
        ...     ledger = Ledger(folder, read_only=True)
        ...     print(sorted(ledger.done()))
        ...     ledger.close()
        ['clean-00000', 'judge-00000']
    """

    def __init__(self, folder: str | Path, *, read_only: bool = False) -> None:
        self.folder = Path(folder)
        path = self.folder / DATABASE
        if not path.is_file():
            raise LedgerError(f"{self.folder} holds no run: there is no {DATABASE} in it")
        self._stack = contextlib.ExitStack()
        try:
            locks = read_only or _locked(self.folder, self._stack)
            with _explained(self.folder):
                self._database = _read(path) if read_only else _write(path, locks)
                self._read_run()
                if not read_only:
                    for left in (self.folder / FILES).glob(".*.partial"):  # by a process that was killed
                        left.unlink(missing_ok=True)
                    # Before any work: is this a place that can be written to? Units in flight died with their process.
                    with self._database:
                        self._database.execute("DELETE FROM units WHERE state != 'done'")
                    journal.remove_of(self.folder, self.done())  # of a process killed between a row and this
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, folder: str | Path, configuration: Mapping[str, Any], *, command: str, started: str) -> Ledger:
        """Start a run's ledger, which must not exist, and open it.

        Args:
            folder: The run's folder; made if it does not exist.
            configuration: All that its results depend on, as JSON has it.
            command: The command that starts it.
            started: The time.
        """
        folder = Path(folder)
        try:
            (folder / FILES).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LedgerError(f"{folder} cannot be made a run's folder: {error.strerror or error}") from error
        with contextlib.ExitStack() as stack:
            locks = _locked(folder, stack)
            with (
                _explained(folder, "Put that right and start it again"),
                contextlib.closing(_write(folder / DATABASE, locks)) as database,
            ):
                if database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    raise LedgerError(
                        f"{folder} holds a run already; continue it with --resume {folder} (in Python `resume=True`), or "
                        "choose another folder"
                    )
                # One transaction: a process that dies in here leaves no ledger at all.
                database.executescript(
                    f"BEGIN EXCLUSIVE;{_TABLES}INSERT INTO run VALUES ({VERSION}, {_quoted(json.dumps(configuration))}, "
                    f"{_quoted(command)}, {_quoted(started)});COMMIT;"
                )
        return cls(folder)

    @staticmethod
    def begun(folder: str | Path) -> bool:
        """Whether a folder has a run to continue; a process that was stopped before it began one leaves an empty ledger."""
        path = Path(folder) / DATABASE
        if not path.is_file():
            return False
        with _explained(Path(folder)), contextlib.closing(_read(path)) as database:
            return database.execute("SELECT 1 FROM sqlite_master WHERE name = 'run'").fetchone() is not None

    def _read_run(self) -> None:
        tables = {name for (name,) in self._database.execute("SELECT name FROM sqlite_master")}
        if "run" not in tables:
            raise LedgerError(f"the run in {self.folder} was stopped before it began; start it with --out instead of --resume")
        (version,) = self._database.execute("SELECT version FROM run").fetchone()
        if version != VERSION:
            raise LedgerError(
                f"the ledger in {self.folder} is of version {version}, this coupfast reads version {VERSION}, whose "
                f"configuration says other things; use the coupfast that wrote it, or start another run"
            )
        row = self._database.execute("SELECT configuration, command, started FROM run").fetchone()
        self.configuration: dict[str, Any] = json.loads(row[0])
        self.command, self.started = str(row[1]), str(row[2])

    def start(self, unit: Unit) -> None:
        """A unit is in flight."""
        with _explained(self.folder), self._database as database:
            database.execute(
                "INSERT OR REPLACE INTO units (name, stage, images, state) VALUES (?, ?, ?, 'running')",
                (unit.name, unit.stage, json.dumps(unit.images)),
            )

    def fail(self, name: str, error: str) -> None:
        """A unit could not be done; a resumed run tries again."""
        with _explained(self.folder), self._database as database:
            database.execute("UPDATE units SET state = 'failed', error = ? WHERE name = ?", (error, name))

    def finish(self, outcome: Outcome, worker: str) -> None:
        """A unit is done: its file first, then its row."""
        content = save(outcome.arrays)
        file = f"{FILES}/{outcome.name}.safetensors"
        with _explained(self.folder):
            write_whole(self.folder / file, content)
            with self._database as database:
                database.execute(
                    "UPDATE units SET state = 'done', worker = ?, result = ?, file = ?, sha256 = ?, forward_images = ?, "
                    "gradient_images = ?, seconds = ?, peak_bytes = ?, gradients = ?, zero_gradients = ?, "
                    "nonfinite_gradients = ? WHERE name = ? AND state = 'running'",
                    (
                        worker,
                        json.dumps(outcome.result),
                        file,
                        hashlib.sha256(content).hexdigest(),
                        outcome.forward_images,
                        outcome.gradient_images,
                        outcome.seconds,
                        outcome.peak_bytes,
                        outcome.gradients,
                        outcome.zero_gradients,
                        outcome.nonfinite_gradients,
                        outcome.name,
                    ),
                )
        journal.remove(self.folder, outcome.name)

    def done(self) -> dict[str, Record]:
        """All units that are done, by name."""
        with _explained(self.folder):
            rows = self._database.execute(
                "SELECT name, stage, images, result, file, sha256, forward_images, gradient_images, seconds, peak_bytes, "
                "worker, gradients, zero_gradients, nonfinite_gradients FROM units WHERE state = 'done' ORDER BY name"
            ).fetchall()
        return {
            row[0]: Record(
                unit=Unit(row[1], int(row[0].rpartition("-")[2]), tuple(json.loads(row[2]))),
                result=json.loads(row[3]),
                file=row[4],
                sha256=row[5],
                forward_images=row[6],
                gradient_images=row[7],
                seconds=row[8],
                peak_bytes=row[9],
                worker=row[10],
                gradients=row[11],
                zero_gradients=row[12],
                nonfinite_gradients=row[13],
            )
            for row in rows
        }

    def arrays(self, record: Record) -> dict[str, np.ndarray]:
        """A unit's images and logits.

        Raises:
            LedgerError: if the file is gone or is not the one that was written.
        """
        path = self.folder / record.file
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == record.sha256:
                return load(content)
            problem = "does not have the SHA-256 that it was written with"
        except (OSError, SafetensorError) as error:
            problem = f"cannot be read ({error})"
        raise LedgerError(f"{path} {problem}; `coupfast evaluate --resume {self.folder}` makes it again, with the same bits")

    def forms(self, images: Sequence[int]) -> dict[int, list[Form]]:
        """What the stages made of each image, in order and each form once; nothing where none attacked it."""
        found: dict[int, list[Form]] = {image: [] for image in images}
        done = self.done()
        for stage in self.configuration["stages"]:
            for record in done.values():
                if record.unit.stage != stage or not set(record.unit.images) & set(found):
                    continue
                arrays = self.arrays(record)
                if "x_strongest" in arrays:
                    forms = map(Form, arrays["x_strongest"], arrays["failed"].tolist(), arrays["loss"].tolist())
                else:  # of an attack that does not tell, what it returned
                    forms = map(Form, arrays["x_adv"])
                for image, form in zip(record.unit.images, forms, strict=True):
                    began = form.loss > -np.inf  # else the attack tried nothing but the image itself
                    if image in found and began and not any(np.array_equal(form.x, other.x) for other in found[image]):
                        found[image].append(form)
        return found

    def attacked_images(self, images: Sequence[int], x: np.ndarray) -> np.ndarray:
        """What each image has become: of the forms that stages made of it the one that the judge chose, and before there is a
        judgement the strongest by what they saw of it.

        Args:
            images: Their numbers.
            x: The run's clean images.
        """
        chosen: dict[int, int] = {}
        for record in self.done().values():
            if record.unit.stage == JUDGE and set(record.unit.images) & set(images):
                arrays = self.arrays(record)
                chosen |= dict(zip(record.unit.images, arrays.get(FORM, ()), strict=False))
        result = []
        for image, forms in self.forms(images).items():
            number = int(chosen.get(image, -1))
            form = forms[number] if number >= 0 else max(forms, key=lambda form: form.strength, default=Form(x[image]))
            result.append(form.x)
        return np.stack(result)

    def forget_damaged(self) -> list[str]:
        """Units whose file is gone or damaged are not done any more; their names."""
        damaged = []
        for name, record in self.done().items():
            try:
                self.arrays(record)
            except LedgerError as error:
                logger.warning("%s", error)
                damaged.append(name)
        with _explained(self.folder), self._database as database:
            database.executemany("DELETE FROM units WHERE name = ?", [(name,) for name in damaged])
        return damaged

    def note(self, name: str, value: Any) -> None:
        """Keep something beside the results: what was predicted, a certificate."""
        with _explained(self.folder), self._database as database:
            database.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, json.dumps(value)))

    def notes(self) -> dict[str, Any]:
        """All that `note` kept."""
        with _explained(self.folder):
            return {name: json.loads(value) for name, value in self._database.execute("SELECT name, value FROM notes")}

    def fingerprint(self) -> str:
        """SHA-256 over all results and files: equal for runs that are equal bit for bit, however long they took."""
        digest = hashlib.sha256()
        for name, record in self.done().items():
            digest.update(json.dumps([name, record.unit.images, record.result, record.sha256], sort_keys=True).encode())
        return digest.hexdigest()

    def close(self) -> None:
        if hasattr(self, "_database"):
            self._database.close()
        self._stack.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


# Not a write-ahead log: processes share that in memory, which file systems of clusters (NFS, Lustre, GPFS) do not give.
_SAFE = ("PRAGMA journal_mode = DELETE", "PRAGMA synchronous = FULL")


def _write(path: Path, locks: bool) -> sqlite3.Connection:
    # quote() by as_uri: a folder may have any name. Autocommit outside `with connection`, transactions inside.
    database = sqlite3.connect(f"{path.absolute().as_uri()}{'' if locks else '?nolock=1'}", uri=True, timeout=30)
    for pragma in _SAFE:
        database.execute(pragma)
    return database


def _read(path: Path, *, recovered: bool = False) -> sqlite3.Connection:
    """A connection that reads only, also where nothing can be written and no file be locked."""
    for options in ("", "&nolock=1", "&immutable=1"):
        database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro{options}", uri=True, timeout=30)
        try:
            database.execute("SELECT count(*) FROM sqlite_master")
            return database
        except sqlite3.OperationalError as error:
            database.close()
            refused = error
        journal = path.with_name(f"{path.name}-journal")
        if journal.exists() and not recovered:
            # Left by a writer that died in a transaction, or of one that is at it: SQLite tells, and undoes what is half done.
            with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=30)) as writer:
                writer.execute("SELECT count(*) FROM sqlite_master")
            return _read(path, recovered=True)
        if not any(words in str(refused) for words in _REFUSED):
            raise refused
    raise refused


# How SQLite says that it may not lock a file, or make one beside it.
_REFUSED = ("unable to open", "readonly database", "locking protocol", "disk I/O error")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


@contextlib.contextmanager
def _explained(folder: Path, then: str | None = None) -> Iterator[None]:
    """What went wrong with the run's files, in words, and what to do; nothing that was recorded before is lost by it."""
    try:
        yield
    except LedgerError:
        raise
    except (sqlite3.Error, OSError) as error:
        then = then or f"What is recorded is safe; put that right and continue with --resume {folder}"
        raise LedgerError(
            f"the ledger in {folder} cannot be read or written ({error}): is the disk full, or the folder read-only? {then}"
        ) from error


def _locked(folder: Path, stack: contextlib.ExitStack) -> bool:
    """Take the run for this process, until it ends, however it ends. False where the file system has no locks."""
    path = folder / LOCK
    try:
        held = stack.enter_context(locked(path, work="works on this run", patience=0.0))
        if held:
            with contextlib.suppress(OSError):  # the number is for a message only
                path.write_text(f"{os.getpid()}\n")
        else:
            logger.warning("%s is where no file can be locked: see to it that no other process works on this run", folder)
        return held
    except TimeoutError as error:
        owner = path.read_text(errors="replace").strip() or "unknown"
        raise LedgerError(
            f"another process (pid {owner}) is working on the run in {folder}; wait for it, or use --workers there"
        ) from error
    except OSError as error:
        raise LedgerError(f"{folder} cannot be written to: {error.strerror or error}") from error
