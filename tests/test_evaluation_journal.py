"""Units that are stopped inside: they go on where they were, with the same bits, whatever attack it is."""

import dataclasses
import errno
import functools
import logging
import multiprocessing
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import small_score
from evaluation_cases import SMALL, labelled, pixel_classifier, plain, purified, run

import coupfast
from coupfast import PurifiedClassifier, Purifier, integrate, step_functions, tape
from coupfast.definition import Definition
from coupfast.evaluation import Spec, building, evaluate, notes
from coupfast.evaluation import journal as journal_module
from coupfast.evaluation.attacks import PGD, Attack, Cost, Result, Square
from coupfast.evaluation.journal import Journal, digest, path_of
from coupfast.evaluation.ledger import Ledger
from coupfast.evaluation.metered import Metered
from coupfast.evaluation.pools import UnitFailed
from coupfast.evaluation.units import Unit
from coupfast.evaluation.worker import Rules, Task, Worker

APGD_UNIT = SMALL.but(iterations=4, draws=2)


class Stopped(BaseException):
    pass


def stop():
    raise Stopped


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Counted:
    """A function in the place of `name` of `owner` that counts its calls and ends the process, or the run, at call `at`."""

    def __init__(self, owner, name, at=None, end=stop):
        self.owner, self.name, self.at, self.end, self.calls = owner, name, at, end, 0
        self.function = getattr(owner, name)

    def __enter__(self):
        def counted(*arguments):
            self.calls += 1
            if self.calls == self.at:
                self.end()
            return self.function(*arguments)

        setattr(self.owner, self.name, counted)
        return self

    def __exit__(self, *_):
        setattr(self.owner, self.name, self.function)


asked = functools.partial(Counted, Metered, "ask")


def found(ledger):
    """All that a run has kept, but for times and memory."""
    records = ledger.done()
    numbers = {
        name: (record.forward_images, record.gradient_images, record.gradients, record.zero_gradients)
        for name, record in records.items()
    }
    return ledger.fingerprint(), numbers, {name: ledger.arrays(record) for name, record in records.items()}


def check_same(ledger, whole):
    fingerprint, numbers, arrays = found(ledger)
    assert numbers == whole[1]
    for unit, content in arrays.items():
        for name, array in content.items():
            np.testing.assert_array_equal(array, whole[2][unit][name], err_msg=f"{unit} {name}")
    assert fingerprint == whole[0]


def stopped(folder, at, spec=APGD_UNIT, **options):
    with asked(at), pytest.raises(Stopped):
        run(folder, spec, **options)


def journals(folder):
    return sorted(path.name.removesuffix(".journal") for path in (folder / "journals").glob("*.journal"))


def killed_at(folder, spec, build, at):
    with asked(at, die):
        run(folder, spec, build)


FEW_STEPS = PGD(eps=2 / 255, iterations=6, eot_iter=2, random_start=True)


@pytest.mark.parametrize(
    "spec, build, at, unit, looks",
    [
        (APGD_UNIT, purified, 12, "apgd-ce-00000", 0),
        (Spec.of(attack=FEW_STEPS, shard=3, draws=2), purified, 7, "pgd-00000", 0),
        (Spec.of(attack=Square(eps=1 / 255, queries=40), shard=5, draws=2, paths=0), plain, 20, "square-00000", 3),
        (Spec.of(attack="none", shard=5, draws=12), purified, 9, "judge-00000", 0),
    ],
    ids=["apgd", "pgd", "square", "judge"],
)  # fmt: skip
def test_killed_inside_of_a_unit(tmp_path, spec, build, at, unit, looks):
    with asked() as count, run(tmp_path / "whole", spec, build) as ledger:
        whole = found(ledger)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["evaluation_cases"])
    process = context.Process(target=killed_at, args=(tmp_path / "run", spec, build, at))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert journals(tmp_path / "run") == [unit]
    with asked() as rest, run(tmp_path / "run", spec, build, resume=True) as ledger:
        check_same(ledger, whole)
    # One look at whether it is the same defense, and at most one call again for its gradient; checks of a run come again.
    assert rest.calls <= count.calls - (at - 1) + looks + 2
    assert list((tmp_path / "run" / "journals").iterdir()) == []


def stopped_until_done(attempt, most):
    """How often `attempt`, told how often it was stopped, is stopped until it is done."""
    stops = 0
    while True:
        try:
            attempt(stops)
            return stops
        except Stopped:
            stops += 1
            assert stops < most


def stopped_by_turns(ahead, back, at, go_on, most):
    """Stop a run at the same call of `ahead` and of `back`, by turns, until it is done: how often, and calls that ended."""
    ended = 0

    def attempt(stops):
        nonlocal ended
        limits = (None, at[1]) if stops % 2 else (at[0], None)
        with ahead(limits[0]) as there, back(limits[1]) as here:
            try:
                go_on(resume=stops > 0)
            except Stopped:
                ended -= 1
                raise
            finally:
                ended += there.calls + here.calls

    return stopped_until_done(attempt, most), ended


def test_stopped_again_and_again(tmp_path):
    with run(tmp_path / "whole", APGD_UNIT) as ledger:
        whole = found(ledger)

    def attempt(stops):
        with asked(8), run(tmp_path / "run", APGD_UNIT, resume=stops > 0) as ledger:
            check_same(ledger, whole)

    assert stopped_until_done(attempt, most=30) >= 5


def test_a_call_goes_on_inside(tmp_path, monkeypatch):
    """Steps of a purification are kept where it takes minutes: the last call costs no more again than its last step."""
    monkeypatch.setattr(tape, "EVERY", 0.0)
    spec = SMALL.but(attack="apgd-ce", iterations=2, eot_iter=1, draws=2)
    steps = [functools.partial(Counted, integrate, name) for name in ("_step", "_step_vjp")]
    with steps[0]() as forward, steps[1]() as backward, run(tmp_path / "whole", spec, count=2) as ledger:
        whole = found(ledger)

    def go_on(resume):
        with run(tmp_path / "run", spec, count=2, resume=resume) as ledger:
            check_same(ledger, whole)

    # Forwards a look at the defense takes two steps.
    stops, total = stopped_by_turns(*steps, (4, 2), go_on, most=60)
    assert stops >= 6
    assert total <= forward.calls + backward.calls + 2 * (stops + 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shrinking(coupfast.StepMethod):
    """A step function with two tensors of state, one of which is no image."""

    num_steps: int = 3
    guided = True

    def start(self, x_in, noise):
        return x_in + 0.01 * noise.z(0, x_in), torch.ones_like(x_in[:, :1, :1, :1])

    def step(self, k, state, noise, networks):
        x, size = state
        x = x + 0.01 * size * (networks.guidance(x) - networks.eps_hat(x, 0.05) + noise.z(k, x))
        return x, size * torch.sigmoid(x.mean(dim=(1, 2, 3), keepdim=True))


def by_step_functions(device):
    classifier = pixel_classifier()
    return PurifiedClassifier(Purifier(small_score(torch.float32), classifier, method=Shrinking()), classifier)


def test_a_step_function_goes_on_inside(tmp_path, monkeypatch):
    monkeypatch.setattr(tape, "EVERY", 0.0)
    spec = SMALL.but(attack="apgd-ce", iterations=1, eot_iter=1, draws=1, paths=0)
    ahead, back = (functools.partial(Counted, step_functions, name) for name in ("_step", "_pull"))
    with ahead() as forward, back() as backward, run(tmp_path / "whole", spec, by_step_functions, count=2) as ledger:
        whole = found(ledger)

    def go_on(resume):
        with run(tmp_path / "run", spec, by_step_functions, count=2, resume=resume) as ledger:
            check_same(ledger, whole)

    # Forwards a look at the defense takes three steps; backwards there are those of a measurement, too.
    stops, total = stopped_by_turns(ahead, back, (5, 4), go_on, most=40)
    assert stops >= 4
    # What is done again after each: a look at the defense, a measurement of memory, the start's gradient.
    assert total <= forward.calls + backward.calls + 6 * (stops + 1)


def test_a_piece_of_another_size_is_another_one():
    class Memory(tape.Tape):
        def __init__(self):
            super().__init__()
            self.content = {}

        def read(self, key):
            return self.content.get(key)

        def write(self, key, kept):
            self.content[key] = kept

        def name(self, x):
            return digest(x)

        def due(self):
            return True

    x = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    classifier, kept = pixel_classifier(), Memory()

    def purify(budget):
        options = {"t": 0.003, "num_steps": 2, "engine": "eager", "memory_budget": budget}
        purifier, leaf = Purifier(small_score(torch.float32), classifier, **options), x.clone().requires_grad_()
        purified = purifier(leaf, seed=0)
        (gradient,) = torch.autograd.grad(purified.square().sum(), leaf)
        return purifier.plan(5).storage.piece, purified.detach(), gradient

    least = Purifier(small_score(torch.float32), classifier, t=0.003, num_steps=2, engine="eager").plan(5).least_bytes
    (large, *_), (small, *expected) = purify("least"), purify(least + 2**10)
    assert large == 5 > small
    with tape.kept_on(kept):
        purify("least")
        kept._tracks = 0  # as after a stop, now with less memory
        piece, *found = purify(least + 2**10)
    assert piece == small and all(map(torch.equal, found, expected))


def test_torchsdes_adjoint_says_what_a_stop_costs(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tape, "EVERY", 0.0)
    spec = SMALL.but(attack="apgd-ce", iterations=1, eot_iter=1, draws=1, paths=0)
    run(tmp_path / "run", spec, functools.partial(purified, gradient="adjoint"), count=2).close()
    said = "a purification with gradient 'adjoint' took 0 s forwards, and none of its steps are kept: what stops it loses the"
    assert caplog.text.count(said) == 1


def test_the_judges_paths_are_kept(tmp_path, monkeypatch):
    """They are purifications beside the attack's calls, with every state."""
    monkeypatch.setattr(tape, "EVERY", 0.0)
    spec = SMALL.but(attack="none", draws=2, paths=2, shard=5)
    with Counted(integrate, "_step") as steps, run(tmp_path / "whole", spec, count=2) as ledger:
        whole = found(ledger)
    before = steps.calls - 4  # the last four are the paths': with noise and without, two steps each
    with Counted(integrate, "_step", before + 4), pytest.raises(Stopped):
        run(tmp_path / "run", spec, count=2)
    with Counted(integrate, "_step") as rest, run(tmp_path / "run", spec, count=2, resume=True) as ledger:
        check_same(ledger, whole)
    assert rest.calls == 2 + 1  # a look at the defense, and the step that was stopped


def test_a_certificate_goes_on(tmp_path, monkeypatch):
    x, y = labelled(2)
    np.savez(tmp_path / "images.npz", x=x.numpy(), y=y.numpy())
    spec = Spec.of(images=str(tmp_path / "images.npz"), attack="none", t=0.003, num_steps=2, draws=1, paths=0)
    monkeypatch.setattr(building, "load_score", lambda *_, **__: small_score(torch.float32))
    monkeypatch.setattr(building, "load_classifier", lambda *_, **__: pixel_classifier())
    evaluate(spec, out=tmp_path / "run").close()
    counted = functools.partial(Counted, Definition, "output")
    with counted() as passes:
        whole = notes.certificate(spec, 1)
    with counted(6), pytest.raises(Stopped):
        notes.certificate(spec, 1, folder=tmp_path / "run")
    with counted() as rest, Counted(Definition, "gradient") as gradients:
        again = notes.certificate(spec, 1, folder=tmp_path / "run")
    assert rest.calls == passes.calls - 5 and gradients.calls == 0
    moment = dict.fromkeys(["seconds", "memory_limit", "settings"])
    assert again | moment == whole | moment
    assert not list((tmp_path / "run" / "journals").glob("certificate*"))


@pytest.mark.parametrize("harm", ["cut", "garbage", "flipped"])
def test_a_torn_journal(tmp_path, harm):
    with run(tmp_path / "whole", APGD_UNIT) as ledger:
        whole = found(ledger)
    stopped(tmp_path / "run", 12)
    path = path_of(tmp_path / "run", "apgd-ce-00000")
    content = path.read_bytes()
    if harm == "flipped":
        middle = 2 * len(content) // 3
        content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.write_bytes({"cut": content[:-100], "garbage": content + b"\1" * 1000, "flipped": content}[harm])
    with run(tmp_path / "run", APGD_UNIT, resume=True) as ledger:
        check_same(ledger, whole)


def test_a_journal_of_another_configuration_is_refused(tmp_path):
    stopped(tmp_path / "run", 12)
    stopped(tmp_path / "other", 12, APGD_UNIT.but(seed=5))
    shutil.copy(path_of(tmp_path / "other", "apgd-ce-00000"), path_of(tmp_path / "run", "apgd-ce-00000"))
    with pytest.raises(UnitFailed, match="apgd-ce-00000.journal is of another configuration: about.seed was 5 and is 121; rem"):
        run(tmp_path / "run", APGD_UNIT, resume=True)
    path_of(tmp_path / "run", "apgd-ce-00000").unlink()
    run(tmp_path / "run", APGD_UNIT, resume=True).close()


class Scaled(torch.nn.Module):
    """A defense whose configuration does not tell what changes in it."""

    def __init__(self, scale, noise=0.0):
        super().__init__()
        self.model, self.scale, self.noise = pixel_classifier(), scale, noise

    def forward(self, x):
        noise = self.noise * int.from_bytes(os.urandom(2), "little") / 2**16
        return self.scale * self.model(x) + noise


PLAIN = Spec.of(attack="apgd-ce", iterations=5, shard=5, draws=2, paths=0, eps=0.5 / 255)


def test_a_defense_that_has_changed_is_refused(tmp_path):
    stopped(tmp_path / "run", 12, PLAIN, build=Scaled(1.0).eval())
    with pytest.raises(UnitFailed, match="the defense answers otherwise than it did. .*apgd-ce-00000.journal holds what was"):
        run(tmp_path / "run", PLAIN, Scaled(1.25).eval(), resume=True)
    run(tmp_path / "run", PLAIN, Scaled(1.0).eval(), resume=True).close()


def test_a_defense_that_never_repeats_itself_goes_on_with_a_warning(tmp_path, caplog):
    stopped(tmp_path / "run", 12, PLAIN, build=Scaled(1.0, noise=1e-3).eval())
    assert journals(tmp_path / "run") == ["apgd-ce-00000"]
    run(tmp_path / "run", PLAIN, Scaled(1.0, noise=1e-3).eval(), resume=True).close()
    assert "it cannot be known again on resuming" in caplog.text


@dataclasses.dataclass(frozen=True)
class Gradual(Attack):
    """Five steps along the gradient, or of something else."""

    twice = False
    start = 0.0

    def run(self, defense, x, y, *, seed):
        x_k = (x + type(self).start).clamp(0, 1)
        for _ in range(5):
            x_k = x_k.detach().requires_grad_()
            with torch.enable_grad():
                loss = defense(x_k).logsumexp(dim=1).sum()
                (gradient,) = torch.autograd.grad(loss, x_k, create_graph=self.twice)
                if self.twice:
                    (gradient,) = torch.autograd.grad((gradient**2).sum(), x_k)
            x_k = (x_k + 0.001 * gradient.sign()).clamp(0, 1)
        return Result(x_k.detach())

    def cost(self):
        return Cost(0, 5)


class Smooth(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = pixel_classifier()

    def forward(self, x):
        return self.model(x).tanh() + torch.randn(len(x), 1)


def test_an_attack_that_does_not_repeat_itself_is_refused(tmp_path, monkeypatch):
    spec = Spec.of(attack=Gradual(), shard=5, draws=1, paths=0)
    stopped(tmp_path / "run", 9, spec, build=Smooth().eval())
    monkeypatch.setattr(Gradual, "start", 0.5)
    with pytest.raises(UnitFailed, match="call 0 of the attack is another one: x was .* and is "):
        run(tmp_path / "run", spec, Smooth().eval(), resume=True)


def test_noise_of_torch_goes_on(tmp_path):
    spec = Spec.of(attack=Gradual(), shard=5, draws=1, paths=0)
    with run(tmp_path / "whole", spec, Smooth().eval()) as ledger:
        whole = found(ledger)
    stopped(tmp_path / "run", 9, spec, build=Smooth().eval())
    assert journals(tmp_path / "run") == ["gradual-00000"]
    with run(tmp_path / "run", spec, Smooth().eval(), resume=True) as ledger:
        check_same(ledger, whole)


class _NoisyBackwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1.0 + torch.rand(len(gradient), 1))


class NoisyBackwards(Smooth):
    """A defense that draws random numbers in its backward pass, too."""

    def forward(self, x):
        return _NoisyBackwards.apply(super().forward(x))


@dataclasses.dataclass(frozen=True)
class Between(Gradual):
    """Stopped, if so, between an answer and its gradient; its own numbers are from torch's generator as well."""

    at = None

    def run(self, defense, x, y, *, seed):
        x_k = x
        torch.manual_seed(seed)
        for step in range(4):
            x_k = x_k.detach().requires_grad_()
            with torch.enable_grad():
                loss = defense(x_k).logsumexp(dim=1).sum()
                torch.rand(7)
                if step == self.at:
                    stop()
                (gradient,) = torch.autograd.grad(loss, x_k)
            x_k = (x_k + 0.01 * gradient / gradient.abs().amax() + 0.001 * torch.rand(1)).clamp(0, 1)
        return Result(x_k.detach())


@pytest.mark.parametrize("step", [0, 2])
def test_stopped_between_an_answer_and_its_gradient(tmp_path, monkeypatch, step):
    spec = Spec.of(attack=Between(), shard=5, draws=1, paths=0)
    with run(tmp_path / "whole", spec, NoisyBackwards().eval()) as ledger:
        whole = found(ledger)
    with monkeypatch.context() as patch:
        patch.setattr(Between, "at", step)
        with pytest.raises(Stopped):
            run(tmp_path / "run", spec, NoisyBackwards().eval())
        assert journals(tmp_path / "run") == ["between-00000"]
        patch.setattr(Between, "at", step + 1)  # what was made up for is recorded as well
        with pytest.raises(Stopped):
            run(tmp_path / "run", spec, NoisyBackwards().eval(), resume=True)
    with run(tmp_path / "run", spec, NoisyBackwards().eval(), resume=True) as ledger:
        check_same(ledger, whole)


def test_an_attack_that_differentiates_gradients_begins_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Gradual, "twice", True)
    spec = Spec.of(attack=Gradual(), shard=5, draws=1, paths=0)
    with run(tmp_path / "whole", spec, Smooth().eval()) as ledger:
        whole = found(ledger)
    assert caplog.text.count("the attack differentiates gradients: this unit cannot be continued inside") == 1
    stopped(tmp_path / "run", 9, spec, build=Smooth().eval())
    assert journals(tmp_path / "run") == []
    with run(tmp_path / "run", spec, Smooth().eval(), resume=True) as ledger:
        check_same(ledger, whole)


def test_a_full_disk_costs_the_journal_only(tmp_path, monkeypatch, caplog):
    with run(tmp_path / "whole", PLAIN, plain) as ledger:
        whole = found(ledger)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(journal_module.os, "write", full)
    with run(tmp_path / "run", PLAIN, plain) as ledger:
        check_same(ledger, whole)
    assert "apgd-ce-00000.journal cannot be written to" in caplog.text and "No space left" in caplog.text


def test_a_worker_that_cannot_reach_the_run_says_so(tmp_path, caplog):
    from coupfast.evaluation.configuration import environment

    described, here = Metered(plain("cpu")).describe(), environment(torch.device("cpu"))
    rules = Rules({}, 1, False, 1, 0, 1, environment=here, defense=described, folder=str(tmp_path / "elsewhere"))
    x, y = (tensor.numpy() for tensor in labelled(2))
    outcome = Worker(rules, plain, "cpu").execute(Task(Unit("judge", 0, (0, 1)), {"x": x, "y": y}))
    assert outcome.forward_images == 2
    assert f"cannot reach {tmp_path / 'elsewhere'} from where it runs" in caplog.text
    assert not (tmp_path / "elsewhere").exists()


def test_a_unit_that_is_done_leaves_no_journal(tmp_path):
    with run(tmp_path / "run", PLAIN, plain):
        pass
    left = path_of(tmp_path / "run", "judge-00000")
    left.write_bytes(b"of a process that was killed in between")
    Ledger(tmp_path / "run").close()
    assert not left.exists()


# --- the file ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).view(2, 3, 2, 2),
        torch.arange(24.0).view(2, 3, 2, 2).to(memory_format=torch.channels_last),
        torch.arange(24.0).view(4, 6).t(),
        torch.arange(24.0).view(4, 6)[::2, 1::2],
        torch.arange(3.0).view(3, 1).expand(3, 5),
        torch.arange(6).unfold(0, 3, 1),  # values that lie over each other
        torch.tensor([1.5, -0.0, float("nan"), float("inf")], dtype=torch.bfloat16),
        torch.tensor(3.0, dtype=torch.float64),
        torch.zeros(0, 4),
        torch.tensor([True, False]),
    ],
    ids=["plain", "channels-last", "transposed", "strided", "expanded", "unfolded", "bfloat16", "scalar", "empty", "bool"],
)
def test_tensors_come_back_as_they_were(tmp_path, tensor):
    journal = Journal(tmp_path / "j", {})
    journal.append(("a", 1), {"b": [2]}, [tensor, torch.ones(2)])
    journal.close()
    journal = Journal(tmp_path / "j", {})
    entry = journal.get(("a", 1))
    first, second = journal.tensors(entry, torch.device("cpu"))
    assert first.dtype == tensor.dtype and first.shape == tensor.shape and entry.said["b"] == [2]
    assert first.stride() == (tensor.stride() if tensor.stride() != (1, 1) else (3, 1))
    assert digest(first) == digest(tensor) and torch.equal(second, torch.ones(2))
    journal.close()


def test_one_process_writes_a_journal(tmp_path):
    journal = Journal(tmp_path / "j", {})
    with pytest.raises(TimeoutError, match="another process is writing"):
        Journal(tmp_path / "j", {})
    journal.close()
    Journal(tmp_path / "j", {}).close()


def test_seconds_before_are_counted(tmp_path, monkeypatch):
    clock = iter(np.arange(0.0, 100.0, 2.0))
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: float(next(clock)))
    journal = Journal(tmp_path / "j", {})
    journal.append(("a",), {})
    journal.close()
    assert Journal(tmp_path / "j", {}).seconds_before >= 4.0


# --- gradients that lead nowhere ---------------------------------------------------------------------------------------------


def test_saturated_logits_are_noticed(tmp_path, caplog):
    from coupfast.evaluation import Evaluation, report

    with caplog.at_level(logging.WARNING):
        run(tmp_path / "run", PLAIN, Scaled(1e5).eval()).close()
    said = "of the 24 gradients that apgd-ce followed, 24 (100 %) are exactly 0"
    assert said in caplog.text
    with Evaluation(tmp_path / "run") as evaluation:
        assert evaluation.to_dict()["gradients"] == [{"stage": "apgd-ce", "asked": 24, "zero": 24, "nonfinite": 0}]
        assert f"Warning: {said}" in evaluation.table()
    report.write([tmp_path / "run"], tmp_path / "report.html")
    for suffix in (".html", ".md"):
        assert f"Warning: {said}" in (tmp_path / "report").with_suffix(suffix).read_text()


def test_ordinary_gradients_are_no_warning(tmp_path, caplog):
    from coupfast.evaluation import Evaluation, report

    run(tmp_path / "run", PLAIN, plain).close()
    with Evaluation(tmp_path / "run") as evaluation:
        (gradients,) = evaluation.to_dict()["gradients"]
        assert gradients["asked"] == 24 and gradients["zero"] == gradients["nonfinite"] == 0
        assert "Warning" not in evaluation.table() and caplog.text == ""
    report.write([tmp_path / "run"], tmp_path / "report.html")
    assert "Of the 24 gradients that apgd-ce followed, none is 0." in (tmp_path / "report.md").read_text()


def test_gradients_are_counted_by_image():
    class Partly(torch.nn.Module):
        def forward(self, x):
            weight = torch.tensor([0.0, 1.0, float("inf"), float("nan")]).view(4, 1, 1, 1)
            logits = (x[:, :, :1, :2] * weight.nan_to_num(nan=0.0, posinf=0.0)).flatten(1)
            logits.register_hook(lambda gradient: gradient * weight.flatten(1))
            return logits

    metered = Metered(Partly().eval())
    x = torch.rand(4, 1, 2, 2, requires_grad=True)
    with torch.enable_grad():
        metered(x).sum().backward()
    assert (metered.gradients, metered.gradient_images, metered.zero_gradients, metered.nonfinite_gradients) == (4, 4, 1, 2)
    assert torch.equal(x.grad.flatten(1).count_nonzero(dim=1).bool(), torch.tensor([False, True, True, True]))
