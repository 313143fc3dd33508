"""Runs on a real local Ray: the same bits, whoever is killed."""

import contextlib
import functools
import logging
import multiprocessing
import os
import pathlib
import re
import signal
import time

import pytest
from evaluation_cases import dies_once, purified, run

from coupfast.evaluation import cluster
from coupfast.evaluation.ledger import Ledger, LedgerError, Outcome
from coupfast.evaluation.units import Unit
from coupfast.evaluation.worker import Task

pytest.importorskip("ray", reason='needs Ray: pip install "coupfast[cluster]"')
if not pathlib.Path("/proc/self/task").exists():
    pytest.skip("needs Linux's /proc to find Ray's processes", allow_module_level=True)

TESTS = str(pathlib.Path(__file__).parent)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    with run(tmp_path_factory.mktemp("reference") / "run") as ledger:
        return ledger.fingerprint()


@contextlib.contextmanager
def local_ray():
    # Ray's workers import what the tests import.
    os.environ["PYTHONPATH"] = os.pathsep.join([TESTS, os.environ.get("PYTHONPATH", "")])
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    os.environ.pop("RAY_ADDRESS", None)
    import ray

    # A cluster of its own, without dashboard, whatever the machine runs otherwise.
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
    yield
    ray.shutdown()


def work(folder, build):
    logging.basicConfig(filename=f"{folder}.log")
    with local_ray(), run(folder, build=build, workers=2, cluster="ray"):
        pass


def start(folder, build=purified):
    process = multiprocessing.get_context("spawn").Process(target=work, args=(folder, build))
    process.start()
    return process


def done(folder):
    try:
        with Ledger(folder, read_only=True) as ledger:
            return len(ledger.done())
    except LedgerError:
        return 0


def processes(root, pattern):
    """Descendants of a process whose command line has a word in it."""
    found = []
    for child in (int(p) for p in pathlib.Path(f"/proc/{root}/task/{root}/children").read_text().split()):
        try:
            if pattern in pathlib.Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
            found += processes(child, pattern)
        except FileNotFoundError:
            pass
    return found


def until(condition, process, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)


def test_a_worker_is_killed_on_the_way(reference, tmp_path):
    process = start(tmp_path / "run", functools.partial(dies_once, tmp_path / "flag"))
    process.join(600)
    assert process.exitcode == 0
    said = (tmp_path / "run.log").read_text()
    ((worker, unit),) = re.findall(r"worker (\d) died \(ActorDiedError\); doing unit (apgd-ce-\d+) again", said)
    with Ledger(tmp_path / "run", read_only=True) as ledger:
        assert ledger.fingerprint() == reference
        assert ledger.done()[unit].worker == worker
        assert {record.worker for record in ledger.done().values()} == {"0", "1"}


def test_the_node_is_killed_on_the_way(reference, tmp_path):
    process = start(tmp_path / "run")
    until(lambda: done(tmp_path / "run") >= 2, process)
    (raylet,) = [pid for pid in processes(process.pid, b"raylet/raylet")]
    os.kill(raylet, signal.SIGKILL)
    process.join(120)
    if process.is_alive():  # Ray may wait for its node for long: the run is killed, too
        process.kill()
        process.join()
    with Ledger(tmp_path / "run", read_only=True) as ledger:
        # Actors may finish without their node; but success is not to be claimed where something is missing.
        assert process.exitcode != 0 or ledger.fingerprint() == reference
    with run(tmp_path / "run", resume=True) as ledger:
        assert ledger.fingerprint() == reference


class Slow:
    """A worker that says every tenth of a second that an image is through, for two seconds."""

    def __init__(self, device):
        pass

    def execute(self, task, passed):
        for _ in range(20):
            time.sleep(0.1)
            passed(1)
        return Outcome(task.unit.name, {}, {}, 20, 0, 2.0)


def watch(told):
    cluster._EVERY = 0.2
    with local_ray():
        pool = cluster.RayWorkers(Slow, 2, gpus=False, threads=1)
        for index in range(2):
            pool.submit(Task(Unit("clean", index, (0,)), {}))
        for _ in range(2):
            outcome, _ = pool.next(lambda name, images: told.put((name, images)))
            assert outcome.forward_images == 20
        pool.close()
    told.put(None)


def test_says_how_far_a_unit_is():
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    process = context.Process(target=watch, args=(told,))
    process.start()
    heard = list(iter(lambda: told.get(timeout=300), None))
    process.join(60)
    assert process.exitcode == 0
    for unit in ("clean-00000", "clean-00001"):
        images = [images for name, images in heard if name == unit]
        assert len(images) > 1 and all(number > 0 for number in images) and sum(images) <= 20
