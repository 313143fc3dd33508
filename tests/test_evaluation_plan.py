"""Plans: counts that a run does not exceed, times that scale, and the plan beside what happened."""

import dataclasses

import pytest
from evaluation_cases import SMALL, run

from coupfast.evaluation import plan as planning
from coupfast.evaluation.plan import Plan, Probe, Stage, beside, duration, happened, plan
from coupfast.evaluation.spec import Spec, paper

TINY = Spec.of(
    attack="apgd-ce", iterations=2, t=0.06, num_steps=4, score_weights="random", classifier_weights="random", limit=3
)


def test_plans_networks_without_weights():
    found = plan(TINY, workers=2, price=3.0, probe_steps=1)
    assert [(stage.name, stage.forward, stage.gradient) for stage in found.stages] == [
        ("clean", 3, 0),
        ("apgd-ce", 27, 9),
        ("judge", 60 + 3 * 4, 0),  # the ways of three images, clean and attacked, with noise and without
    ]
    assert (found.probe.steps, found.probe.of_steps) == (1, 4)
    assert found.probe.gradient > 0 and found.probe.forward > 0
    assert found.seconds == pytest.approx((102 * found.probe.forward + 9 * found.probe.gradient) / 2)
    assert found.probe.memory > 5 * 2**20  # the networks alone are 1.3 and 0.7 million weights
    assert found.probe.memory == max(found.probe.memory_of.values()) == found.probe.memory_of["apgd-ce"]
    assert 5 * 2**20 < found.probe.memory_of["clean"] == found.probe.memory_of["judge"] < found.probe.memory_of["apgd-ce"]
    text = str(found)
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith(tuple(found.probe.memory_of))}
    for stage in found.stages:
        memory, cost = f"{found.probe.memory_of[stage.name] / 2**20:.0f}", f"{3.0 * stage.seconds / 3600:.2f}"
        assert rows[stage.name][-3:] == [memory, "MiB", cost]
    assert "scaled from 1 of 4 steps" in text and "2 workers" in text and "cost: " in text
    assert Plan.from_dict(found.to_dict()) == found


def test_an_attack_that_batches_draws_needs_their_memory():
    def peak(eot_iter, shard):
        spec = TINY.but(attack="pgd-eot", eot_iter=eot_iter, shard=shard, limit=1)
        return plan(spec, probe_steps=1).probe.memory_of["pgd-eot"]

    one = peak(1, 2)
    assert peak(6, 2) == peak(1, 12) > one


def test_the_verdict_of_a_stage_is_on_a_whole_unit():
    spec = TINY.but(attack="pgd-eot", eot_iter=1, batch=1, limit=1, shard=32)
    memory = plan(spec, probe_steps=1).probe.memory_of
    assert memory["pgd-eot"] >= memory["clean"]


def test_the_papers_run_can_be_counted_without_its_images(monkeypatch):
    monkeypatch.setattr(planning, "probe", lambda *_, **__: Probe(1.0, 3.0, 1, 2, 100, None))
    found = plan(Spec.of(**paper("Linf"), score_weights="random", classifier_weights="random"), workers=8)
    assert sum(stage.gradient for stage in found.stages) == 512 * 4040
    assert "1 " not in str(found).splitlines()[-1] and str(found).endswith("8 workers: 9.0 days")


def test_the_papers_run_in_the_fast_mode_stage_by_stage(monkeypatch):
    coarse = {"transfer-3": 3, "transfer-5": 5}
    monkeypatch.setattr(planning, "probe", lambda *_, **__: Probe(1.0, 3.0, 1, 2, 100, None, coarse=coarse))
    found = plan(Spec.of(**paper("Linf"), attack="cascade", mode="fast"))
    stages = {stage.name: stage for stage in found.stages}
    assert list(stages) == ["clean", "transfer-3", "transfer-5", "exact", "judge"]
    assert [stages[name].gradient for name in ("transfer-3", "transfer-5", "exact")] == [512 * 1000, 512 * 1000, 512 * 500]
    # A gradient through 3 of 100 steps takes 3 % of one through all.
    assert stages["transfer-3"].seconds == pytest.approx(stages["transfer-3"].forward + 512 * 1000 * 0.09)
    # One point more than steps, each looked at once more if the test is due, with as many draws as it asks for.
    for name, attack in Spec.of(**paper("Linf"), attack="cascade", mode="fast").stages().items():
        cost = attack.cost()
        assert stages[name].forward == 512 * (cost.forward + cost.again + 1) and cost.again > 0
    assert "over all 3 stages 0.03" in str(found)


def test_named_networks_need_no_weights_and_the_plan_says_that_they_are_random(monkeypatch):
    built = []

    def probe(spec, *_, **__):
        built.append((spec.score_weights, spec.classifier_weights))
        return Probe(1.0, 3.0, 1, 2, 100, None)

    monkeypatch.setattr(planning, "probe", probe)
    found = plan(Spec.of(**paper("L2")))
    assert str(found).startswith("random weights: cifar10-ddpmpp-deep, wrn-28-10 (trained ones take as long)")
    assert Plan.from_dict(found.to_dict()) == found
    assert plan(Spec.of(**paper("L2"), score_weights="a.pth")).random == ("wrn-28-10",)
    assert plan(Spec.of(**paper("L2")).but(method="none")).random == ("wrn-28-10",)
    assert "random" not in str(plan(Spec()))
    assert built == [("random", "random"), ("a.pth", "random"), ("random", "random"), (None, None)]


def test_scaling_of_a_probe_is_that_of_its_steps(monkeypatch):
    """A clock that counts steps: a classifier takes 1 s, a step 10 s; with gradients three times that."""

    def seconds(defense, x, gradient):
        steps = 0 if defense.purified is None else defense.purified.purifier.num_steps
        return (1 + 10 * steps) * (3 if gradient else 1)

    monkeypatch.setattr(planning, "_seconds", seconds)
    found = planning.probe(TINY, (3, 32, 32), images=2, steps=2)
    assert (found.forward, found.gradient) == (41 / 2, 123 / 2)


def test_a_probe_takes_steps_of_the_run(monkeypatch):
    """A solver that refuses longer steps is planned, too."""
    timed = []

    def seconds(defense, x, gradient):
        if defense.purified is not None:
            timed.append(defense.purified.purifier.settings.method)
        return 1.0

    monkeypatch.setattr(planning, "_seconds", seconds)
    spec = TINY.but(method="diffpure", solver="reverse-diffusion", t=0.6, num_steps=300)
    found = planning.probe(spec, (3, 32, 32), images=1, steps=2)
    assert (found.steps, found.of_steps) == (2, 300)
    assert [method.times.tolist() for method in timed] == 2 * [pytest.approx([0.6, 0.598, 0.596], abs=1e-6)]


def test_a_run_takes_at_most_what_was_planned(tmp_path):
    spec = dataclasses.replace(SMALL, paths=3)
    per_image = {name: (forward / 5, gradient / 5) for name, forward, gradient in planning._counts(spec, 5)}
    with run(tmp_path / "run", spec) as ledger:
        found, several = happened(ledger), ledger.forms(range(5)).values()
    assert [stage.name for stage in found] == ["clean", "apgd-ce", "apgd-dlr", "judge"]
    for stage in found:
        forward, gradient = per_image[stage.name]
        assert stage.forward <= stage.images * forward and stage.gradient <= stage.images * gradient
        assert stage.seconds > 0 and 2**25 < stage.peak_bytes < 2**40
    assert found[0].images == found[1].images == found[-1].images == 5 > found[2].images
    # The image whose label is wrong is looked at as often as it is offered, and spared its gradients.
    assert found[1].gradient == 4 * per_image["apgd-ce"][1]
    # Of the judge all is known: three draws of all images, clean and attacked, and the ways of the first three; and three of
    # each form of an image that both stages changed.
    chosen = sum(len(forms) for forms in several if len(forms) > 1)
    assert found[-1].forward == 2 * (3 * 5 + 2 * 3) + 3 * chosen and chosen
    assert 5 * per_image["judge"][0] == 2 * (3 * 5 + 2 * 3) + 3 * 2 * 5


def test_beside_says_cost_and_memory():
    predicted = Plan((Stage("clean", 4, 4, 0, 7200.0),), 1, Probe(1.0, 2.0, 1, 1, 1, 3 * 2**20), 5.0)
    text = beside(predicted, [Stage("clean", 4, 4, 0, 1800.0, 200 * 2**20), Stage("a", 4, 4, 0, 1800.0, 100 * 2**20)])
    assert "cost at 5 a worker and hour: at most 10.00 predicted, 5.00 happened" in text
    assert "memory of a worker: 3 MiB, besides Python and torch, predicted, 200 MiB happened" in text


def test_beside():
    predicted = Plan((Stage("clean", 4, 4, 0, 4.0), Stage("a", 4, 8, 40, 88.0)), 1, Probe(1.0, 2.0, 1, 1, 1, None))
    text = beside(predicted, [Stage("clean", 4, 4, 0, 5.0), Stage("a", 2, 4, 20, 50.0)])
    assert "what happened, at the probe's speed: 48.0 s; it took 55.0 s" in text
    assert text.splitlines()[3].split() == ["a", "8", "40", "88.0", "s", "4", "20", "50.0", "s"]


@pytest.mark.parametrize("options", [{"workers": 0}, {"probe_images": 0}, {"probe_steps": 0}])
def test_impossible_plans(options):
    with pytest.raises(ValueError, match="at least 1"):
        plan(TINY, **options)


def test_more_images_than_exist():
    with pytest.raises(ValueError, match="asks for 21 images, and cifar10-20 has 20"):
        plan(dataclasses.replace(TINY, limit=21))
    with pytest.raises(ValueError, match=r"asks for 5 images, and cifar10-20\[16:20\] has 4"):
        plan(dataclasses.replace(TINY, images="cifar10-20[16:20]", limit=5))


def test_no_memory_is_claimed_for_what_cannot_be_told():
    assert plan(TINY.but(gradient="adjoint"), probe_steps=1).probe.memory is None
    assert plan(TINY.but(method="none")).probe.of_steps == 1


@pytest.mark.parametrize("seconds, text", [(119, "119.0 s"), (120, "2.0 min"), (7200, "2.0 h"), (172800, "2.0 days")])
def test_durations(seconds, text):
    assert duration(seconds) == text
