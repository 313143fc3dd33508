"""Warm starts: attacks that begin at the adversarial images of an earlier run, and no others."""

import dataclasses
import shutil

import pytest
import torch
from evaluation_cases import labelled, purified, run
from test_evaluation_journal import asked, check_same, found, stopped

from coupfast.evaluation import Evaluation, Spec, evaluate, report
from coupfast.evaluation import plan as planning
from coupfast.evaluation.attacks import PGD, InBall, ball
from coupfast.evaluation.ledger import Ledger, LedgerError
from coupfast.evaluation.plan import Probe, plan

EARLIER = Spec.of(attack="pgd-eot", iterations=3, eot_iter=2, eps=2 / 255, shard=2, draws=1, paths=0)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """The folder of a run on five images under attack in the Linf ball."""
    folder = tmp_path_factory.mktemp("earlier") / "linf"
    run(folder, EARLIER).close()
    return folder


def warm(earlier, **changed):
    """A run that begins there, in the L2 ball, and hardly moves."""
    still = {"norm": "L2", "eps": 0.05, "iterations": 1, "step_size": 1e-6, "keep": "last"}
    return EARLIER.but(**{**still, "start_from": str(earlier), **changed})


def test_it_begins_at_the_earlier_images_moved_into_the_ball(earlier, tmp_path):
    x, _ = labelled(3)
    with Evaluation(earlier, x=labelled(5)[0]) as before:
        theirs = before.x_adv[:3]
    assert float((theirs - x).flatten(1).norm(dim=1).min()) > 0.05  # outside of the new ball
    with run(tmp_path / "warm", warm(earlier), count=3) as ledger:
        came = torch.from_numpy(ledger.attacked_images(range(3), x.numpy()))
        start = ledger.configuration["start"]
    torch.testing.assert_close(came, ball.project(theirs, x, "L2", 0.05), rtol=0, atol=1e-5)
    with Ledger(earlier, read_only=True) as ledger:
        assert start["fingerprint"] == ledger.fingerprint() and start["run"] == str(earlier)
    assert (start["attack"], start["norm"], start["eps"]) == ("pgd-eot", "Linf", 2 / 255)


def test_every_stage_and_the_first_restart_begin_there(earlier, monkeypatch):
    begun, projected = [], InBall.run

    def spy(self, defense, x, y, *, seed, x_start=None):
        begun.append(None if x_start is None else len(x_start))
        return projected(self, defense, x, y, seed=seed, x_start=x_start)

    monkeypatch.setattr(InBall, "run", spy)
    options = {"attack": "cascade", "iterations": 1, "eot_iter": 1, "coarse_steps": 1, "eps": 1e-4, "draws": 1, "paths": 0}
    with evaluate(purified("cpu"), *labelled(2, wrong=[1]), start_from=earlier, **options):
        assert begun and None not in begun
    x, y = torch.full((1, 3, 4, 4), 0.5), torch.zeros(1, dtype=torch.int64)
    points = []

    @dataclasses.dataclass(frozen=True)
    class Spied(PGD):
        def ask(self, defense, asked):
            points.append(asked.x.clone())
            return super().ask(defense, asked)

    class Right(torch.nn.Module):
        def forward(self, x):
            return torch.tensor([[9.0, 0.0]]) + 0 * x.flatten(1).sum(dim=1, keepdim=True)

    Spied(iterations=1, eot_iter=1, losses="ce,margin").run(planning.Metered(Right().eval()), x, y, seed=0, x_start=x + 0.01)
    torch.testing.assert_close(points[0], x + 0.01)
    torch.testing.assert_close(points[2], x)


def test_a_good_start_is_worth_iterations(earlier, tmp_path):
    """Where the earlier attack has arrived, one step from there finds more than one step from the clean images."""
    losses = []
    for start in (earlier, None):
        spec = EARLIER.but(iterations=1, start_from=start, step_size=0.1 / 255, keep="last")
        with run(tmp_path / str(len(losses)), spec) as ledger:
            arrays = [ledger.arrays(r) for r in ledger.done().values() if r.unit.stage == "pgd-eot"]
            losses.append(sum(float(a["loss"].sum()) for a in arrays))
    assert losses[0] > losses[1] + 0.1


def test_stopped_and_continued_without_the_earlier_run(earlier, tmp_path):
    """Its own folder has what it began with; and what is damaged there is made again from the earlier run, or not at all."""
    source = shutil.copytree(earlier, tmp_path / "source")
    spec = warm(source, iterations=3, step_size=0.01)
    with asked() as count, run(tmp_path / "whole", spec) as ledger:
        whole = found(ledger)
    folder = tmp_path / "run"
    stopped(folder, count.calls // 3, spec)
    (folder / "start.safetensors").write_bytes(b"damaged")
    stopped(folder, count.calls // 3, spec, resume=True)
    shutil.rmtree(source)
    with run(folder, spec, resume=True) as ledger:
        check_same(ledger, whole)
    with pytest.raises(ValueError, match=r"spec\.start_from was .* and is null"):
        run(folder, dataclasses.replace(spec, start_from=None), resume=True)


def test_plan_report_and_title_say_it(earlier, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "probe", lambda *_, **__: Probe(1.0, 3.0, 1, 2, 20, None))
    folder = tmp_path / "warm"
    run(folder, warm(earlier)).close()
    (summary, *_) = report.sections([report.read(folder)])
    attack = dict(row[:2] for row in summary.rows)["attack"]
    assert attack == "pgd-eot L2 0.05, begun from the adversarial images of linf (pgd-eot Linf 2/255, projected)"
    with Evaluation(folder) as evaluation:
        assert evaluation.title.endswith(f", begun from the adversarial images of {earlier}, 5 images")
    found = plan(Spec.of(attack="pgd-eot", start_from=str(earlier), limit=1))
    assert f"attacks begin from the adversarial images of {earlier}" in str(found)
    assert planning.Plan.from_dict(found.to_dict()) == found


def other(*, shape=None, label=False, unseen=False):
    x, y = labelled(5, wrong=[1])
    if shape:
        x = torch.rand(5, *shape)
    if unseen:
        x = x.clone()
        x[3, 0, 0, 0] = 1 - x[3, 0, 0, 0]
    return x, (y + 1) % 10 if label else y


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"unseen": True}, "1 of 5 images are not in the run in .*, the first of them number 3"),
        ({"label": True}, "5 of 5 images have another label in the run in .*: number 0 has"),
        ({"shape": (3, 8, 9)}, r"are of shape \(3, 8, 8\), and those to be attacked of \(3, 8, 9\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_images_are_refused_before_any_work(earlier, tmp_path, changed, message):
    class Any(torch.nn.Module):
        def forward(self, x):
            return x.flatten(2).mean(dim=2).repeat(1, 4)[:, :10]

    with asked() as count, pytest.raises(ValueError, match=message):
        evaluate(Any().eval(), *other(**changed), attack="pgd-eot", start_from=earlier, out=tmp_path / "run")
    assert count.calls <= 5 and not (tmp_path / "run").exists()  # looks at a defense that is somebody else's


@pytest.mark.parametrize(
    "options, message",
    [
        ({"attack": "autoattack-rand"}, "is for attacks of this project in a ball .*, and apgd-ce is APGD, which begins"),
        ({"attack": "stadv"}, "stadv is StAdv"),
        ({"attack": "none"}, "`start_from` is where an attack begins, and there is none"),
        ({"attack": "pgd-eot", "random_start": True}, "`random_start` of pgd-eot and `start_from` both say where it begins"),
    ],
)
def test_attacks_that_begin_by_themselves_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Spec.of(start_from="anywhere", **options)


def test_runs_that_nothing_can_begin_from_are_refused(earlier, tmp_path):
    with pytest.raises(LedgerError, match="holds no run"):
        run(tmp_path / "run", warm(tmp_path / "nowhere"))
    clean = EARLIER.but(attack="none")
    run(tmp_path / "clean", clean).close()
    stopped(tmp_path / "half", 9, EARLIER)
    for source, message in (("clean", "had no attack, and its images are clean ones"), ("half", "is not finished: continue")):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "run", warm(tmp_path / source))
        with pytest.raises(ValueError, match=message):
            plan(Spec.of(attack="pgd-eot", start_from=str(tmp_path / source), limit=1))
    assert not (tmp_path / "run").exists()
