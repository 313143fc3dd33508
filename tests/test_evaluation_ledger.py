"""The ledger under faults: whatever happens, it names no file that is not whole, and says what is wrong."""

import contextlib
import errno
import fcntl
import itertools
import os
import re
import resource
import shutil
import signal
import sqlite3
import stat
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from coupfast.evaluation import ledger as ledger_module
from coupfast.evaluation.ledger import DATABASE, VERSION, Ledger, LedgerError, Outcome
from coupfast.evaluation.units import Unit

UNIT = Unit("apgd-ce", 3, (4, 5))


def outcome(name=UNIT.name, size=2):
    arrays = {"x_adv": np.arange(size, dtype=np.float32), "logits": np.zeros((2, 10), np.float32)}
    return Outcome(name, {"standing": [5]}, arrays, forward_images=7, gradient_images=8, seconds=1.5)


def create(folder, configuration=None):
    return Ledger.create(folder, configuration or {"seed": 1, "name": "it's"}, command="coupfast evaluate 'x'", started="now")


@pytest.fixture
def folder(tmp_path):
    """A run with one unit done."""
    with create(tmp_path / "run") as ledger:
        ledger.start(UNIT)
        ledger.finish(outcome(), "w")
    return tmp_path / "run"


def test_gives_back_what_it_was_given(folder):
    with Ledger(folder) as ledger:
        assert ledger.configuration == {"seed": 1, "name": "it's"}
        assert (ledger.command, ledger.started) == ("coupfast evaluate 'x'", "now")
        (record,) = ledger.done().values()
        assert (record.unit, record.result, record.worker) == (UNIT, {"standing": [5]}, "w")
        assert (record.forward_images, record.gradient_images, record.seconds) == (7, 8, 1.5)
        for name, array in outcome().arrays.items():
            np.testing.assert_array_equal(ledger.arrays(record)[name], array)
        ledger.note("plan", [1, None])
        assert ledger.notes() == {"plan": [1, None]}


def test_the_page_of_formats_has_its_tables_and_columns(folder):
    page = (Path(__file__).resolve().parents[1] / "docs" / "reference" / "formats.md").read_text()
    told = re.findall(r"^\| `(\w+)` \| (.*) \|$", page.partition("| table | columns |")[2].partition("\n\n")[0], re.MULTILINE)
    with contextlib.closing(sqlite3.connect(folder / DATABASE)) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        found = {name: [row[1] for row in database.execute(f"PRAGMA table_info({name})")] for name in tables}
    assert {name: re.findall(r"`(\w+)`", columns) for name, columns in told} == found


def test_units_in_flight_are_forgotten_when_their_process_is_gone(folder):
    with Ledger(folder) as ledger:
        ledger.start(Unit("apgd-ce", 4, (6,)))
        ledger.start(Unit("apgd-ce", 5, (7,)))
        ledger.fail("apgd-ce-00005", "no memory")
    with Ledger(folder) as ledger:
        assert list(ledger.done()) == [UNIT.name]
    with contextlib.closing(sqlite3.connect(folder / DATABASE)) as database:
        assert database.execute("SELECT count(*) FROM units").fetchone() == (1,)


def test_an_outcome_that_was_not_asked_for_is_not_counted(folder):
    with Ledger(folder) as ledger:
        ledger.finish(outcome("apgd-ce-00009"), "w")
        ledger.finish(outcome(size=9), "late twin of the worker that was replaced")
        assert list(ledger.done()) == [UNIT.name]
        assert ledger.done()[UNIT.name].worker == "w"


def test_refuses_a_second_run_in_the_same_folder(folder):
    with pytest.raises(LedgerError, match="holds a run already; continue it with --resume"):
        create(folder)


def test_one_writer_many_readers(folder):
    with Ledger(folder):
        with pytest.raises(LedgerError, match=rf"another process \(pid {os.getpid()}\) is working on the run"):
            Ledger(folder)
        with pytest.raises(LedgerError, match="another process"):
            create(folder)
        with Ledger(folder, read_only=True) as reader:
            assert list(reader.done()) == [UNIT.name]
    Ledger(folder).close()


@pytest.mark.parametrize("change", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_noticed(folder, change, caplog):
    path = folder / "units" / f"{UNIT.name}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if change == "remove":
        path.unlink()
    else:
        path.write_bytes(content if change == "flip" else content[:-1])
    with Ledger(folder) as ledger:
        with pytest.raises(LedgerError, match="--resume .* makes it again"):
            ledger.arrays(ledger.done()[UNIT.name])
        assert ledger.forget_damaged() == [UNIT.name]
        assert ledger.done() == {}
    assert UNIT.name in caplog.text


def test_a_file_cannot_be_larger_than_the_disk(folder):
    """A file-size limit stands in for a full disk: a write fails in the middle."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Ledger(folder) as ledger:
        unit = Unit("apgd-ce", 4, (6,))
        ledger.start(unit)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limit[1]))
        try:
            with pytest.raises(LedgerError, match="is the disk full"):
                ledger.finish(outcome(unit.name, size=100_000), "w")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert list(ledger.done()) == [UNIT.name]
    assert [path.name for path in (folder / "units").iterdir()] == [f"{UNIT.name}.safetensors"]


def test_the_database_itself_cannot_grow(folder):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Ledger(folder) as ledger:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, limit[1]))
        try:
            with pytest.raises(LedgerError, match="is the disk full"):
                ledger.note("large", "x" * 10_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    with Ledger(folder) as ledger:
        assert list(ledger.done()) == [UNIT.name] and ledger.notes() == {}


@pytest.mark.parametrize("room", [16, 5000, 12_000])  # bytes, for each file: the first transaction takes about 24,000
def test_a_disk_that_is_full_from_the_start(tmp_path, room):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
    try:
        with pytest.raises(LedgerError, match="is the disk full.* Put that right and start it again$"):
            create(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    with pytest.raises(LedgerError, match="stopped before it began; start it with --out instead of --resume"):
        Ledger(tmp_path / "run")
    create(tmp_path / "run").close()
    Ledger(tmp_path / "run").close()


def test_a_ledger_that_cannot_be_written(folder):
    # Root may write where modes forbid it: the database is opened read-only instead.
    with Ledger(folder, read_only=True) as ledger:
        for write in (lambda: ledger.start(UNIT), lambda: ledger.note("a", 1), lambda: ledger.fail("a", "b")):
            with pytest.raises(LedgerError, match="cannot be read or written .attempt to write a readonly database.*--resume"):
                write()
        assert list(ledger.done()) == [UNIT.name]


def test_a_finished_run_is_read_where_nothing_can_be_written(folder):
    assert {path.name for path in folder.iterdir()} == {DATABASE, "lock", "units"}  # its journal went when it was closed
    place = tempfile.mkdtemp()
    try:
        shutil.copytree(folder, place, dirs_exist_ok=True)
        os.chmod(place, 0o555)
        pid = os.fork()
        if pid == 0:
            try:
                if os.geteuid() == 0:  # which modes do not stop
                    os.setgroups([])
                    os.setgid(65534)
                    os.setuid(65534)
                assert not os.access(place, os.W_OK)
                with Ledger(place, read_only=True) as ledger:
                    (record,) = ledger.done().values()
                    assert (record.unit, ledger.notes()) == (UNIT, {}) and len(ledger.arrays(record)["x_adv"]) == 2
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
    finally:
        os.chmod(place, 0o755)
        shutil.rmtree(place)


def test_nothing_is_shared_in_memory(folder):
    """As a write-ahead log would be: file systems of clusters have no such memory."""
    with Ledger(folder) as ledger:
        ledger.start(Unit("apgd-ce", 4, (6,)))
        assert not [path.name for path in folder.iterdir() if path.name.endswith(("-wal", "-shm"))]
    with contextlib.closing(sqlite3.connect(folder / DATABASE)) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("delete",)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with create(tmp_path / "run") as ledger:
        ledger.start(UNIT)
        ledger.finish(outcome(), "w")
    with Ledger(tmp_path / "run") as ledger:
        assert list(ledger.done()) == [UNIT.name]
    assert "no file can be locked: see to it that no other process works on this run" in caplog.text


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_a_folder(folder, monkeypatch, code):
    fsync = os.fsync

    def refuse(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    with Ledger(folder) as ledger:
        unit = Unit("apgd-ce", 4, (6,))
        ledger.start(unit)
        ledger.finish(outcome(unit.name), "w")
        assert len(ledger.done()) == 2


def test_a_transaction_that_was_cut_off_is_undone_by_a_reader(folder):
    pid = os.fork()
    if pid == 0:
        database = sqlite3.connect(folder / DATABASE)
        database.execute("PRAGMA cache_size = 1")  # so that the file itself is written to before the end
        database.execute("BEGIN EXCLUSIVE")
        database.execute("DELETE FROM units")
        database.executemany("INSERT INTO notes VALUES (?, ?)", [(str(i), "x" * 1000) for i in range(100)])
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (folder / f"{DATABASE}-journal").exists()
    with Ledger(folder, read_only=True) as ledger:
        assert list(ledger.done()) == [UNIT.name] and ledger.notes() == {}


def test_what_a_killed_process_left_of_a_file_goes(folder):
    (folder / "units" / ".apgd-ce-00009.safetensors-abc.partial").write_bytes(b"half")
    Ledger(folder).close()
    assert [path.name for path in (folder / "units").iterdir()] == [f"{UNIT.name}.safetensors"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="cannot be made a run's folder: Not a directory"):
        create(tmp_path / "file" / "run")


def test_other_files(tmp_path, folder):
    with pytest.raises(LedgerError, match="holds no run"):
        Ledger(tmp_path)
    with sqlite3.connect(folder / DATABASE) as database:
        database.execute("UPDATE run SET version = 7")
    database.close()
    with pytest.raises(LedgerError, match=f"is of version 7, this coupfast reads version {VERSION}"):
        Ledger(folder)
    (folder / DATABASE).write_bytes(b"not a database, but long enough to be looked at" * 10)
    with pytest.raises(LedgerError, match="file is not a database"):
        Ledger(folder)


def test_a_start_that_was_interrupted_can_be_repeated(tmp_path):
    (tmp_path / "run").mkdir()
    sqlite3.connect(tmp_path / "run" / DATABASE).close()
    with pytest.raises(LedgerError, match="holds no run|stopped before it began"):
        Ledger(tmp_path / "run")
    create(tmp_path / "run").close()
    Ledger(tmp_path / "run").close()


def die_at(step):
    """Kill this process at a line of the ledger's code, or before a statement of SQL, counted from here."""
    left, connect = step, sqlite3.connect

    def count(*_):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return count

    def watched(*arguments, **options):
        database = connect(*arguments, **options)
        database.set_trace_callback(count)
        return database

    sqlite3.connect = watched
    sys.settrace(lambda frame, event, argument: count if frame.f_code.co_filename == ledger_module.__file__ else None)


def test_killed_at_every_step_of_a_start(tmp_path):
    """What is left is a run to resume, or none, and the next start says which."""
    found = {"a run": 0, "none": 0}
    for step in itertools.count(1):
        folder = tmp_path / str(step)
        pid = os.fork()
        if pid == 0:
            try:
                die_at(step)
                create(folder)
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        try:
            Ledger(folder).close()
            left = "a run"
        except LedgerError:
            left = "none"
        found[left] += 1
        if left == "a run":
            with pytest.raises(LedgerError, match="holds a run already; continue it with --resume"):
                create(folder)
        else:
            with pytest.raises(LedgerError, match="holds no run: there is no|stopped before it began; start it with --out"):
                Ledger(folder)
            create(folder).close()
        with Ledger(folder) as ledger:
            assert ledger.configuration == {"seed": 1, "name": "it's"} and ledger.done() == {}
    assert all(found.values()), found


def test_fingerprint_is_of_results_not_of_times(tmp_path):
    fingerprints = []
    for number, (seconds, size) in enumerate([(1.0, 2), (2.0, 2), (1.0, 3)]):
        with create(tmp_path / str(number)) as ledger:
            ledger.start(UNIT)
            ledger.finish(Outcome(UNIT.name, {}, {"a": np.zeros(size)}, 1, 1, seconds), f"w{number}")
            fingerprints.append(ledger.fingerprint())
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_killed_at_every_moment(tmp_path):
    """A process that finishes units is killed at random; what the ledger calls done is whole, always."""
    create(tmp_path / "run").close()
    rng = np.random.default_rng(0)
    last = kills = 0
    # On a busy machine a process may come to nothing before its end.
    while kills < 12 or (last <= 3 and kills < 200):
        kills += 1
        pid = os.fork()
        if pid == 0:
            try:
                with Ledger(tmp_path / "run") as ledger:
                    for index in range(len(ledger.done()), 10_000):
                        ledger.start(Unit("a", index, (0,)))
                        ledger.finish(outcome(f"a-{index:05d}", size=5000), "w")
            finally:
                os._exit(1)
        while len(list((tmp_path / "run" / "units").glob("a-*"))) <= last:  # it is at work
            time.sleep(0.001)
        time.sleep(float(rng.uniform(0.0, 0.2)))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with Ledger(tmp_path / "run") as ledger:
            done = ledger.done()
            assert len(done) >= last
            assert list(done) == [f"a-{index:05d}" for index in range(len(done))]
            assert ledger.forget_damaged() == []
            last = len(done)
    assert last > 3
