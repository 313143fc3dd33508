"""Whole runs: the same bits however they are cut up, interrupted, resumed or spread over workers."""

import dataclasses
import functools
import json
import logging
import math
import multiprocessing
import os
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from evaluation_cases import SMALL, dies_once, labelled, plain, purified, purified_bpda, run

from coupfast.evaluation import Spec, evaluate, launch, pools, progress
from coupfast.evaluation import configuration as configuration_module
from coupfast.evaluation import ledger as ledger_module
from coupfast.evaluation import spec as spec_module
from coupfast.evaluation.attacks import Attack, Cost, Result
from coupfast.evaluation.ledger import DATABASE, Ledger, LedgerError, Outcome
from coupfast.evaluation.metered import Metered
from coupfast.evaluation.pools import UnitFailed
from coupfast.evaluation.units import Schedule, Unit
from coupfast.evaluation.worker import Rules, Task, Worker


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    with run(folder) as ledger:
        assert {record.unit.stage for record in ledger.done().values()} == {"clean", "apgd-ce", "apgd-dlr", "judge"}
        return ledger.fingerprint()


def test_is_deterministic_and_leaves_torch_alone(reference, tmp_path):
    torch.manual_seed(1)
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    with run(tmp_path / "run") as ledger:
        assert ledger.fingerprint() == reference
    assert torch.equal(torch.random.get_rng_state(), before) and torch.get_num_threads() == threads


def test_several_processes_give_the_same_bits(reference, tmp_path):
    with run(tmp_path / "run", workers=2) as ledger:
        assert ledger.fingerprint() == reference
        assert {record.worker for record in ledger.done().values()} == {"0", "1"}


def test_units_hold_what_protocols_need(tmp_path):
    with run(tmp_path / "run") as ledger:
        records = ledger.done()
        clean, judged = records["clean-00000"], records["judge-00000"]
        assert clean.unit.images == (0, 1) and clean.result["standing"] == [0]  # image 1 has a wrong label
        assert np.shape(judged.result["clean"]) == np.shape(judged.result["attacked"]) == (3, 2)
        # It is offered to the attack, which may see it right in another draw; it never is, and stays as it came.
        assert records["apgd-ce-00000"].unit.images == (0, 1) and judged.result["unchanged"] == [1]
        arrays = ledger.arrays(judged)
        assert arrays["clean_logits"].shape == (3, 2, 10)
        np.testing.assert_array_equal(arrays["clean_logits"].argmax(axis=2), judged.result["clean"])
        assert arrays["attacked_confidences"].shape == (3, 1, 10)  # two steps, one image to show
        assert "clean_confidences" not in ledger.arrays(records["judge-00001"])
        attack = ledger.arrays(records["apgd-ce-00001"])
        x, _ = labelled(5)
        assert np.abs(attack["x_adv"] - x[[2, 3]].numpy()).max() <= SMALL.eps + 1e-6
        forward = sum(record.forward_images for record in records.values())
        assert forward > 0 and sum(record.gradient_images for record in records.values()) > 0


def test_judging_noise_is_common_to_defenses_and_shards(tmp_path):
    """An image's noise depends on the run's seed, the image and the draw: not on its shard, nor on the attack."""
    logits = []
    for number, (shard, attack) in enumerate([(2, "autoattack-rand"), (5, "none")]):
        cut = {} if attack == "none" else {"iterations": 1, "eot_iter": 1}
        spec = Spec.of(attack=attack, shard=shard, eps=SMALL.eps, draws=3, seed=121, **cut)
        with run(tmp_path / str(number), spec) as ledger:
            judged = [record for record in ledger.done().values() if record.unit.stage == "judge"]
            logits.append(np.concatenate([ledger.arrays(record)["clean_logits"] for record in judged], axis=1))
    # Batches of other sizes round convolutions otherwise; another noise would differ by far more.
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-3, atol=1e-3)
    assert np.abs(logits[0][0] - logits[0][1]).max() > 0.01


def test_progress_is_said_where_there_is_no_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    clock = iter(range(10**6))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with run(tmp_path / "run", progress=True) as ledger:
        records = ledger.done()
    *lines, last = capsys.readouterr().err.splitlines()
    assert len(lines) > 2 * len(records)  # within units, too
    fooled = set()
    for record in (record for record in records.values() if record.unit.stage.startswith("apgd")):
        fooled |= {*record.unit.images} - {*record.result["standing"]}
    pattern = r"evaluate: (\d+) %, (\d+) images? fooled, (\d+) units? done, ([\d.e+]+) purifications/s(?:, at most .* left)?"
    found = [re.fullmatch(pattern, line).groups() for line in [*lines, last]]
    units = [int(units) for _, _, units, _ in found]
    assert units == sorted(units) and set(units) == {*range(len(records) + 1)}
    shares = [int(share) for share, *_ in found]
    assert shares == sorted(shares) and shares[-1] == 100
    assert int(found[-1][1]) == len(fooled) > 0
    assert all(float(rate) > 0 for *_, rate in found)
    assert re.search("at most .* left$", lines[0]) and last.endswith("purifications/s")
    run(tmp_path / "quiet").close()
    assert capsys.readouterr().err == ""


class Counting:
    """A worker whose units say three times that two images are through; the first process that has one dies of the second."""

    def __init__(self, flag, device):
        self.flag = flag

    def execute(self, task, passed):
        for _ in range(3):
            passed(2)
            if not self.flag.exists():
                self.flag.touch()
                os._exit(1)
        return Outcome(task.unit.name, {}, {}, 6, 0, 0.0)


def test_processes_say_how_far_a_unit_is(tmp_path):
    pool = pools.Processes(functools.partial(Counting, tmp_path / "flag"), ["cpu"])
    told = []
    pool.submit(Task(Unit("clean", 0, (0,)), {}))
    outcome, _ = pool.next(lambda name, images: told.append((name, images)))
    pool.close()
    assert outcome.forward_images == 6
    assert told in ([("clean-00000", 2)] * 3, [("clean-00000", 2)] * 4)  # what a dead worker said may be lost


def test_progress_stays_within_what_a_unit_can_take(capsys):
    """A unit that is done again, since its worker died, is counted again."""
    schedule, unit = Schedule(4, 2, ("attack",)), Unit("attack", 0, (0, 1))
    costs = {"clean": Cost(1, 0), "attack": Cost(4, 6), "judge": Cost(1, 0)}
    with progress.Progress(schedule, costs, [], show=True) as bar:
        for _ in range(100):
            bar.passed(unit, 2)
        bar._say()
    assert capsys.readouterr().err.startswith(f"evaluate: {100 * 20 / 48:.0f} %, 0 images fooled, 0 units done")


# --- killed -------------------------------------------------------------------------------------------------------------


def work(folder, resume, workers, build):
    logging.basicConfig(filename=f"{folder}.log")
    with run(folder, resume=resume, workers=workers, build=build):
        pass


def start(folder, workers=1, build=purified):
    """A process that runs or continues a run, in a session of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["evaluation_cases"])
    process = context.Process(target=work, args=(folder, begun(folder), workers, build))
    process.start()
    return process


def begun(folder):
    """Whether there is a run to resume; a start that was killed may leave less."""
    try:
        Ledger(folder, read_only=True).close()
    except LedgerError:
        return False
    return True


def done(folder):
    if not (folder / DATABASE).is_file():
        return 0
    try:
        with Ledger(folder, read_only=True) as ledger:
            return len(ledger.done())
    except LedgerError:  # stopped before it began
        return 0


def test_killed_at_random_many_times(reference, tmp_path):
    folder, rng, kills = tmp_path / "run", np.random.default_rng(0), 0
    begun = time.monotonic()
    while time.monotonic() - begun < 600:  # far more than it takes, on a machine that is busy
        before = done(folder)
        process = start(folder)
        # Let it come to life now and then: it takes a while to load, and then to do a unit.
        while process.is_alive() and kills % 3 == 0 and done(folder) == before:
            time.sleep(0.05)
        process.join(float(rng.uniform(0, 1.5)))
        if not process.is_alive():
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        assert done(folder) >= before
    assert process.exitcode == 0
    assert kills >= 4
    with Ledger(folder, read_only=True) as ledger:
        assert ledger.fingerprint() == reference


def test_killed_with_its_workers_at_random(reference, tmp_path):
    folder, rng = tmp_path / "run", np.random.default_rng(1)
    for kill in range(3):
        before = done(folder)
        process = start(folder, workers=2)
        # The first kill strikes while the folder is made or a little later: its workers have yet to load.
        while not folder.exists() if kill == 0 else done(folder) == before:
            assert process.is_alive()
            time.sleep(0.002)
        time.sleep(float(rng.uniform(0, 0.02 if kill == 0 else 0.3)))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert done(folder) >= before and (kill > 0 or done(folder) == 0)
    process = start(folder, workers=2)
    process.join()
    assert process.exitcode == 0
    with Ledger(folder, read_only=True) as ledger:
        assert ledger.fingerprint() == reference


def descendants(pid):
    children = [int(p) for p in open(f"/proc/{pid}/task/{pid}/children").read().split()]
    return children + [grandchild for child in children for grandchild in descendants(child)]


def test_a_killed_worker_is_replaced(reference, tmp_path):
    folder = tmp_path / "run"
    process = start(folder, workers=2, build=functools.partial(dies_once, tmp_path / "flag"))
    process.join()
    assert process.exitcode == 0
    said = (tmp_path / "run.log").read_text()
    ((worker, unit),) = re.findall(r"worker (\d) died \(exit code -9\); doing unit (apgd-ce-\d+) again", said)
    with Ledger(folder, read_only=True) as ledger:
        assert ledger.fingerprint() == reference
        assert ledger.done()[unit].worker == worker


def test_workers_do_not_outlive_a_killed_run(tmp_path):
    if not os.path.exists(f"/proc/{os.getpid()}/task/{os.getpid()}/children"):
        pytest.skip("needs Linux's /proc to find the worker")
    process = start(tmp_path / "run", workers=2)
    while done(tmp_path / "run") < 1:
        assert process.is_alive()
        time.sleep(0.02)
    orphans = descendants(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    deadline = time.monotonic() + 120
    while any(alive(pid) for pid in orphans):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_unit_that_kills_its_workers_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pools, "ATTEMPTS", 2)
    with pytest.raises(UnitFailed, match="worker of unit clean-0000. died 2 times .last exit code -9.*fewer --workers"):
        run(tmp_path / "run", build=deadly_elsewhere, workers=2)
    with Ledger(tmp_path / "run") as ledger:
        assert ledger.done() == {}


UNGUARDED = """
from evaluation_cases import labelled, plain
from coupfast.evaluation import evaluate

evaluate(plain, *labelled(4), attack="none", shard=2, draws=1, workers=2, out="run")
"""


def test_a_script_that_its_workers_run_again_is_told_so(tmp_path):
    (tmp_path / "script.py").write_text(UNGUARDED)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 1
    last = found.stderr.strip().splitlines()[-1]
    assert "did not begin (exit code 1; what it said stands above): a script that starts workers runs again in" in last
    guarded = UNGUARDED.replace("evaluate(plain", 'if __name__ == "__main__":\n    evaluate(plain').replace('"run"', '"other"')
    (tmp_path / "guarded.py").write_text(guarded)
    subprocess.run([sys.executable, "guarded.py"], cwd=tmp_path, env=environment, check=True, timeout=300)


def test_a_worker_does_not_write_into_what_it_is_given():
    """Ray's arrays are shared, and cannot be written to: attacks that work in place get their own."""

    class InPlace(Attack):
        def run(self, defense, x, y, *, seed):
            return Result(x.add_(0.001).clamp_(0, 1))

        def cost(self):
            return Cost(0, 0)

    x, y = (tensor.numpy() for tensor in labelled(2))
    before = x.copy()
    for array in (x, y):
        array.flags.writeable = False
    described, here = Metered(plain("cpu")).describe(), configuration_module.environment(torch.device("cpu"))
    rules = Rules({"in-place": InPlace()}, 1, False, 1, 0, 1, environment=here, defense=described)
    outcome = Worker(rules, plain, "cpu").execute(Task(Unit("in-place", 0, (0, 1)), {"x": x, "y": y}))
    np.testing.assert_array_equal(x, before)
    np.testing.assert_allclose(outcome.arrays["x_adv"], (before + 0.001).clip(0, 1), rtol=1e-6)


def deadly_elsewhere(device):
    if multiprocessing.parent_process() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(device)


class Broken(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = plain("cpu")

    def forward(self, x):
        if len(x) > 1:
            raise KeyError("no such thing")  # whatever it is
        return self.model(x)


def broken(device):
    return Broken().eval()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_unit_that_raises_is_named_and_tried_again(tmp_path, workers):
    with pytest.raises(UnitFailed, match="unit clean-0000. failed: KeyError: .*no such thing"):
        run(tmp_path / "run", build=broken, workers=workers)
    with sqlite3.connect(tmp_path / "run" / DATABASE) as database:
        assert ("failed",) in database.execute("SELECT state FROM units").fetchall()
    database.close()
    with pytest.raises(UnitFailed, match="no such thing"):
        run(tmp_path / "run", build=broken, resume=True)


# --- what can happen to the files -------------------------------------------------------------------------------------------


def test_a_damaged_file_is_made_again(reference, tmp_path):
    run(tmp_path / "run").close()
    for name in ("apgd-ce-00000", "judge-00001"):
        path = tmp_path / "run" / "units" / f"{name}.safetensors"
        path.write_bytes(path.read_bytes()[:-3] + b"abc")
    with run(tmp_path / "run", resume=True) as ledger:
        assert ledger.fingerprint() == reference
        for record in ledger.done().values():
            ledger.arrays(record)


def test_a_full_disk_stops_the_run_and_loses_nothing(tmp_path):
    spec = SMALL.but(attack="none")

    def unattacked(folder, **options):
        return run(folder, spec, build=plain, count=60, **options)

    with unattacked(tmp_path / "reference") as ledger:
        reference = ledger.fingerprint()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The database, which has some 25,000 bytes to begin with and more than 36,000 in the end, reaches it half way.
    assert (tmp_path / "reference" / DATABASE).stat().st_size > 36_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limit[1]))
    try:
        with pytest.raises(LedgerError, match="is the disk full.* What is recorded is safe"):
            unattacked(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    with Ledger(tmp_path / "run", read_only=True) as ledger:
        recorded = ledger.done()
    assert len(recorded) >= 3
    with unattacked(tmp_path / "run", resume=True) as ledger:
        assert ledger.fingerprint() == reference
        records = ledger.done()
        assert len(records) > len(recorded) and recorded == {name: records[name] for name in recorded}  # their times, too


def test_a_disk_that_fills_up_on_the_way(reference, tmp_path, monkeypatch):
    write, count = ledger_module.write_whole, 0

    def full(path, content):
        nonlocal count
        count += 1
        if count == 4:
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(ledger_module, "write_whole", full)
    with pytest.raises(LedgerError, match="No space left on device.*is the disk full"):
        run(tmp_path / "run")
    with Ledger(tmp_path / "run", read_only=True) as ledger:
        assert len(ledger.done()) == 3
    with run(tmp_path / "run", resume=True) as ledger:
        assert ledger.fingerprint() == reference


def test_a_clock_that_jumps(reference, tmp_path, monkeypatch):
    clock = iter([1e9 * (-1) ** i for i in range(10**6)])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    with run(tmp_path / "run") as ledger:
        assert ledger.fingerprint() == reference
        assert all(0 < record.seconds < 60 for record in ledger.done().values())


def test_two_runs_on_one_ledger(tmp_path):
    folder = tmp_path / "run"
    process = start(folder)
    while done(folder) < 1:
        assert process.is_alive()
        time.sleep(0.02)
    with pytest.raises(LedgerError, match=rf"another process \(pid {process.pid}\) is working"):
        run(folder, resume=True)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    run(folder, resume=True).close()  # the lock died with its owner


# --- the configuration -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"eps": 4 / 255}, r"spec.eps was 0.00196\d+ and is 0.01568\d+; stages.apgd-ce.eps was"),
        ({"seed": 5}, "spec.seed was 121 and is 5$"),
        ({"shard": 3}, "spec.shard was 2 and is 3$"),
    ],
)
def test_another_configuration_is_refused(tmp_path, change, message):
    run(tmp_path / "run", count=2).close()
    with pytest.raises(ValueError, match="started with another configuration: .*" + message):
        run(tmp_path / "run", dataclasses.replace(SMALL, **change), count=2, resume=True)


def test_other_weights_images_or_software_are_refused(tmp_path, monkeypatch):
    def other(device):
        defense = purified(device)
        defense.classifier[3].bias.data += 1e-6
        return defense

    run(tmp_path / "run", count=2).close()
    with pytest.raises(ValueError, match="configuration: defense.classifier_sha256 was .* and is"):
        run(tmp_path / "run", build=other, count=2, resume=True)
    x, y = labelled(2, wrong=[1])
    with pytest.raises(ValueError, match="configuration: images.sha256 was"):
        evaluate(SMALL, x.flip(0), y, defense=purified, out=tmp_path / "run", resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(configuration_module, "sources_sha256", lambda *packages: "other")
        with pytest.raises(ValueError, match='configuration: environment.sources_sha256 was ".*" and is "other"'):
            run(tmp_path / "run", count=2, resume=True)
    monkeypatch.setattr(configuration_module.coupfast, "__version__", "99")
    with pytest.raises(ValueError, match='configuration: environment.coupfast was ".*" and is "99"'):
        run(tmp_path / "run", count=2, resume=True)


def test_a_worker_with_other_software_or_weights_refuses():
    metered, here = Metered(purified("cpu")), configuration_module.environment(torch.device("cpu"))
    metered.settle()  # as a run does before it describes its defense
    described = metered.describe()
    rules = Rules(SMALL.stages(), 1, False, 3, 1, 1, environment=here, defense=described)
    Worker(rules, purified, "cpu")
    older = dataclasses.replace(rules, environment={**rules.environment, "torch": "0.4"})
    with pytest.raises(ValueError, match='would not give the same bits: environment.torch was "0.4" and is'):
        Worker(older, purified, "cpu")
    with pytest.raises(ValueError, match='would not give the same bits: .*defense.gradient.name was "exact" and is "bpda"'):
        Worker(rules, purified_bpda, "cpu")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, y: (x * 2, y), r"values in \[0, 1\], got \[.*, 1.9"),
        (lambda x, y: (x.double(), y), "float32"),
        (lambda x, y: (x, y + 5), r"labels are in \[0, 10\), the classes of the classifier, got \["),
        (lambda x, y: (x, y[:1]), "one per image: 5 images"),
        (lambda x, y: (x[:0], y[:0]), "float32 of shape"),
        (lambda x, y: (x[[0, 1, 0]], torch.tensor([1, 2, 3])), "images 0 and 2 are equal, and their labels are 1 and 3"),
    ],
)
def test_bad_images_are_refused_before_any_work(tmp_path, change, message):
    x, y = labelled(5)
    y[0] = 9
    with pytest.raises(ValueError, match=message):
        evaluate(SMALL, *change(x, y), defense=plain, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "spec, message",
    [
        (
            Spec.of(attack="autoattack-standard", target_classes=10),
            "`target_classes` is at most 9 for a classifier of 10 classes",
        ),
        (Spec(attack="apgd-ce", norm="L2", eps=7.0), "`eps` = 7 reaches every image in .0, 1. of 48 values, .* 6.928 apart"),
    ],
)
def test_an_attack_that_does_not_fit_is_refused_before_any_work(tmp_path, spec, message):
    x, _ = labelled(2)
    small = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 10)).eval()
    images = (x[:, :, :4, :4].contiguous(), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=message):
        evaluate(spec, *images, defense=small, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "attack, classes, least, message",
    [
        ("autoattack-rand", 2, 3, "apgd-dlr needs 3 classes or more, and the classifier has 2"),
        ("autoattack-standard", 3, 4, "apgd-t needs 4 classes or more, and the classifier has 3"),
    ],
)
def test_losses_need_classes(tmp_path, attack, classes, least, message):
    x, _ = labelled(2)
    y = torch.tensor([0, 1])
    cuts = {"iterations": 1} | ({"queries": 2, "target_classes": 1} if attack == "autoattack-standard" else {"eot_iter": 1})
    spec = Spec.of(attack=attack, draws=1, paths=0, **cuts)

    def build(count, device):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, count)).eval()

    with pytest.raises(ValueError, match=message):
        evaluate(spec, x, y, defense=functools.partial(build, classes), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    evaluate(spec, x, y, defense=functools.partial(build, least), out=tmp_path / "run").close()


class Overflowing(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = plain("cpu")

    def forward(self, x):
        return self.model(x) + (math.nan if len(x) > 1 else 0)


def test_a_logit_that_is_no_number_is_no_verdict(tmp_path):
    with pytest.raises(UnitFailed, match="unit clean-00000 failed: FloatingPointError: of 2 images 2 have a logit that is no"):
        run(tmp_path / "run", build=Overflowing().eval())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attack": "apgd"}, "did you mean 'apgd-ce'"),
        ({"eps": 8.0}, "8/255 is"),
        ({"eps": 0.0}, "above 0"),
        ({"method": "cop"}, "`method` is one of"),
        ({"seeding": "time"}, "`seeding` is one of unit, autoattack"),
        ({"shard": 0}, "`shard` is at least 1"),
        ({"limit": 0}, "`limit` is at least 1 and a whole number, got 0"),
        ({"gradient": "none"}, "'autoattack-rand' follows a gradient, and `gradient` is 'none'"),
        ({"attack": "pgd-eot", "drop": "sometimes"}, "`drop` is one of never, any, mean, majority, got 'sometimes'"),
        ({"seed": -1}, "`seed` is an integer"),
        ({"paths": -1}, "`paths` is a number of images or their numbers from 0, got -1"),
        ({"paths": (3, -2)}, "`paths` is a number of images or their numbers"),
        ({"device": "cuda:1"}, "`device` is cpu or cuda, got 'cuda:1': .*CUDA_VISIBLE_DEVICES"),
    ],
)
def test_bad_specs(change, message):
    with pytest.raises(ValueError, match=message):
        SMALL.but(**change)


def test_every_worker_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert launch._devices("cuda", 1) == ["cuda:0"] and launch._devices("cuda", 2) == ["cuda:0", "cuda:1"]
    with pytest.raises(ValueError, match="3 workers need a GPU each, and there are 2; use fewer --workers"):
        launch._devices("cuda", 3)
    assert launch._devices("cpu", 3) == ["cpu"] * 3


@pytest.mark.parametrize(("threads", "shard", "count"), [(1, 2, 3), (2, 2, 2), (5, 2, 1), (1, 6, 1)])
def test_as_many_workers_as_fit(monkeypatch, threads, shard, count):
    monkeypatch.setattr(spec_module, "machine", lambda: {"cores": 4})
    assert SMALL.but(threads=threads, shard=shard).fitting("auto", images=6) == count


def test_workers_that_do_not_fit_are_refused_before_any_work():
    for workers in ("all", 0):
        with pytest.raises(ValueError, match=f"`workers` is at least 1, or 'auto', got {workers!r}"):
            evaluate(SMALL, *labelled(2), defense=pytest.fail, workers=workers)
    with pytest.raises(ValueError, match="`workers` is a number on a cluster"):
        evaluate(SMALL, *labelled(2), defense=pytest.fail, workers="auto", cluster="ray")


def test_too_few_gpus_are_refused_before_any_work(tmp_path, monkeypatch):
    images = labelled(2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="2 workers need a GPU each, and there are 1"):
        evaluate(dataclasses.replace(SMALL, device="cuda"), *images, defense=pytest.fail, out=tmp_path / "run", workers=2)
    assert not (tmp_path / "run").exists()


def test_more_images_than_exist():
    with pytest.raises(ValueError, match="asks for 21 images, and cifar10-20 has 20"):
        dataclasses.replace(SMALL, limit=21).load()


def test_paths_name_images_that_exist(tmp_path):
    with pytest.raises(ValueError, match="`paths` names image 5, and there are 5, numbered from 0"):
        run(tmp_path / "run", dataclasses.replace(SMALL, paths=(0, 5)))


def test_spec_is_json(tmp_path):
    with run(tmp_path / "run", count=2) as ledger:
        stored = ledger.configuration["spec"]
    assert (stored["images"], stored["defense"]) == ("given from Python", "given from Python")
    assert Spec.from_dict({**stored, "images": SMALL.images, "defense": None}) == SMALL
    assert Spec.from_dict(json.loads(json.dumps(SMALL.to_dict()))) == SMALL
    chosen = dataclasses.replace(SMALL, paths=(1, 0))
    with run(tmp_path / "chosen", chosen, count=2) as ledger:
        assert Spec.from_dict({**ledger.configuration["spec"], "images": SMALL.images, "defense": None}) == chosen
    run(tmp_path / "chosen", chosen, count=2, resume=True).close()
