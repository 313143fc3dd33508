"""The attacks: equal to pyautoattack's own, within their budgets, and honest about what they cost."""

import dataclasses
import math

import evaluation_cases
import pytest
import torch
from evaluation_cases import labelled
from torch.nn import functional

from coupfast.evaluation import Spec, evaluate
from coupfast.evaluation.attacks import APGD, PGD
from coupfast.evaluation.attacks.autoattack import OFFERS, Square, _Seen
from coupfast.evaluation.metered import Metered
from coupfast.evaluation.protocols import OFFICIAL, judged, scores
from coupfast.evaluation.suites import RECOMMENDATION, SUITES, find


def plain(device):
    return Metered(evaluation_cases.plain(device))


def purified(device):
    return Metered(evaluation_cases.purified(device))


def purified_bpda(device):
    return Metered(evaluation_cases.purified_bpda(device))


def suite(name, norm, eps, settings=None):
    return find(name).stages(norm, eps, settings)


CUTS = {"iterations": 4, "queries": 12, "target_classes": 3}


@pytest.mark.parametrize("version", ["standard", "rand"])
@pytest.mark.parametrize("norm, eps", [("Linf", 1 / 255), ("L2", 0.1)])
@pytest.mark.parametrize("shard", [12, 5])  # one batch; three, cut anew before every stage
def test_equals_run_standard_evaluation(version, norm, eps, shard, tmp_path):
    autoattack = pytest.importorskip("pyautoattack").AutoAttack
    x, y = labelled(12, wrong=[3])
    # pyautoattack on its own, cut in the same way. Everything else as its `version` sets it.
    reference = autoattack(plain("cpu"), norm=norm, eps=eps, seed=121, version=version)
    reference.verbose = False
    for attack in (reference.apgd, reference.apgd_targeted):
        # Its constructor derives checkpoints from the number of iterations.
        fixed = {"norm": norm, "eps": eps, "eot_iter": attack.eot_iter, "device": "cpu", "logger": reference.logger}
        attack.__init__(plain("cpu"), n_restarts=1, n_iter=4, **fixed)
    reference.fab.n_iter, reference.square.n_queries = 4, 12
    reference.apgd_targeted.n_target_classes = reference.fab.n_target_classes = 3
    with torch.random.fork_rng():
        x_adv, y_adv = reference.run_standard_evaluation(x, y, batch_size=shard)

    name = f"autoattack-{version}"
    cuts = {field: CUTS[field] for field in CUTS if version == "standard" or field == "iterations"}
    spec = Spec.of(attack=name, norm=norm, eps=eps, seed=121, seeding="autoattack", shard=shard, draws=1, **cuts)
    with evaluate(spec, x, y, defense=evaluation_cases.plain, out=tmp_path / "run").ledger as ledger:
        records = ledger.done()
        ours = x.clone()
        standing = set(range(12))
        predictions = y.clone()
        for stage in ("clean", *spec.stages()):
            for record in (record for record in records.values() if record.unit.stage == stage):
                for image, prediction in zip(record.unit.images, record.result["predictions"], strict=True):
                    predictions[image] = prediction
                if stage != "clean":
                    ours[list(record.unit.images)] = torch.from_numpy(ledger.arrays(record)["x_adv"])
                standing &= (standing - set(record.unit.images)) | set(record.result["standing"])
    fallen = [image for image in range(12) if image not in standing]
    assert standing == set(torch.nonzero(y_adv == y).flatten().tolist())
    assert 1 < len(fallen) < 12  # some by the attack, not all: otherwise nothing is compared
    assert torch.equal(predictions, y_adv)
    assert torch.equal(ours[fallen], x_adv[fallen])


def test_every_stage_is_compared(tmp_path):
    """The radii above let every attack of the standard suite have images to work on."""
    spec = Spec.of(attack="autoattack-standard", eps=1 / 255, seed=121, seeding="autoattack", shard=12, draws=1, **CUTS)
    with evaluate(spec, *labelled(12, wrong=[3]), defense=evaluation_cases.plain, out=tmp_path / "run").ledger as ledger:
        assert {record.unit.stage for record in ledger.done().values()} == {"clean", *spec.stages(), "judge"}


SETTINGS = {"eot_iter": 2, "iterations": 3, "queries": 6, "target_classes": 2, "looks": 2, "coarse_steps": 1}


def small_suite(name, norm="Linf", eps=8 / 255):
    stages = suite(name, norm, eps)
    fields = {field.name for attack in stages.values() for field in dataclasses.fields(attack)}
    return suite(name, norm, eps, {key: value for key, value in SETTINGS.items() if key in fields})


@pytest.mark.parametrize("name", [name for name in SUITES if name != "none"])
@pytest.mark.parametrize("norm, eps", [("Linf", 8 / 255), ("L2", 0.5)])
def test_stays_within_its_radius_and_counts_at_most_its_cost(name, norm, eps):
    x, y = labelled(3)
    for attack in small_suite(name, norm, eps).values():
        defense = (purified_bpda if "bpda" in name else purified)("cpu")
        with torch.random.fork_rng():
            defense.reseed(3)
            x_adv = attack.run(defense, x, y, seed=5).x_adv
        assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad
        assert float(x_adv.min()) >= 0 and float(x_adv.max()) <= 1
        delta = (x_adv - x).flatten(1)
        size = delta.abs().amax(dim=1) if norm == "Linf" else delta.norm(dim=1)
        # FAB looks beyond eps, too, but returns an image as it came where it found nothing within. Rounding: of each value, at
        # most 1, once when the step is added and once when it is taken off here; of the length that it was scaled by, and of
        # the one here, which are sums.
        ulp, values = torch.finfo(x.dtype).eps, 1 if norm == "Linf" else x[0].numel()
        if name not in ("salt-and-pepper", "stadv"):
            assert float(size.max()) <= eps * (1 + 8 * ulp) + ulp * math.sqrt(values)
        assert defense.forward_images <= 3 * (attack.cost().forward + attack.cost().again)
        assert defense.gradient_images <= 3 * attack.cost().gradient


@pytest.mark.parametrize("name", ["autoattack-rand", "autoattack-standard"])
def test_cost_is_what_an_image_that_survives_takes(name):
    """A constant classifier is never fooled."""
    x, _ = labelled(1)

    class Robust(torch.nn.Module):
        def forward(self, x):
            slopes = torch.arange(10, dtype=x.dtype) * 1e-3
            return torch.eye(10)[:1] * 9 + x.mean(dim=(1, 2, 3), keepdim=False)[:, None] * slopes

    for stage, attack in small_suite(name).items():
        defense = plain("cpu")
        defense.model = Robust()
        with torch.random.fork_rng():
            attack.run(defense, x, torch.zeros(1, dtype=torch.int64), seed=0)
        cost = attack.cost()
        assert defense.gradient_images == cost.gradient, stage
        if stage == "fab-t":  # which looks at its points within the radius only, and these lie far outside
            cost = dataclasses.replace(cost, forward=dataclasses.replace(attack, looks=0).cost().forward)
        assert defense.forward_images == cost.forward, stage


def test_apgd_tells_its_curve():
    x, y = labelled(8, wrong=[0])
    (attack,) = suite("apgd-ce", "Linf", 1 / 255, {"iterations": 6}).values()
    defense = plain("cpu")
    with torch.random.fork_rng():
        result = attack.run(defense, x, y, seed=0)
    with torch.no_grad():
        standing = defense(result.x_adv).argmax(dim=1) == y
    assert len(result.curve) == 7 and result.curve[0] <= 7
    assert list(result.curve) == sorted(result.curve, reverse=True)
    assert result.curve[-1] == int(standing.sum()) < 7  # deterministic: what the attack saw is what a fresh call sees


def test_pgd_raises_the_expected_loss():
    x, y = labelled(4)
    (attack,) = suite("pgd-eot", "Linf", 4 / 255, {"iterations": 6, "eot_iter": 4}).values()
    defense = purified("cpu")

    def losses(images):
        defense.reseed(99)
        draws = [defense(images, draw=draw) for draw in range(20)]
        return torch.stack([functional.cross_entropy(logits, y, reduction="none") for logits in draws]).mean(dim=0)

    with torch.random.fork_rng():
        defense.reseed(1)
        x_adv = attack.run(defense, x, y, seed=1).x_adv
        with torch.no_grad():
            assert bool((losses(x_adv) > losses(x)).all())


def test_pgd_noise_does_not_depend_on_who_is_still_attacked():
    x, y = labelled(6)
    (attack,) = suite("pgd-eot", "Linf", 1 / 255, {"iterations": 3, "eot_iter": 2, "drop": "any"}).values()
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x, *, ids, draw, view):
            seen.append((ids.tolist(), draw.tolist()))
            return plain("cpu").model(x)

    defense = purified("cpu")
    spy = Spy()
    defense.forward = spy.forward
    attack.run(defense, x, y, seed=1)
    assert len(seen[-1][0]) < len(seen[0][0])  # somebody left
    for k, (ids, draws) in enumerate(seen):
        n = len(ids) // 2
        assert ids[:n] == ids[n:] and draws == [2 * k] * n + [2 * k + 1] * n


def test_drop_keeps_the_image_that_was_wrong():
    x, y = labelled(6)
    (attack,) = suite("pgd-eot", "Linf", 4 / 255, {"iterations": 5, "eot_iter": 1, "drop": "any"}).values()
    defense = plain("cpu")
    result = attack.run(defense, x, y, seed=1)
    with torch.no_grad():
        wrong = int((defense(result.x_adv).argmax(dim=1) != y).sum())
    assert wrong == 6 - result.curve[-1] > 0


def test_salt_and_pepper_changes_as_many_pixels_as_it_says():
    x = torch.full((4, 3, 32, 32), 0.5)
    (attack,) = suite("salt-and-pepper", "Linf", 0.1, {"amount": 0.2}).values()
    x_adv = attack.run(plain("cpu"), x, torch.zeros(4, dtype=torch.int64), seed=1).x_adv
    changed = (x_adv != x).any(dim=1).float().mean()
    assert set(x_adv.unique().tolist()) == {0.0, 0.5, 1.0}
    # Binomial, 4096 pixels at 0.2: five standard deviations.
    assert abs(float(changed) - 0.2) < 5 * (0.2 * 0.8 / 4096) ** 0.5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("autoatack-rand", "Linf", 0.03), "did you mean 'autoattack-rand'"),
        (("apgd-ce", "L1", 0.03), "`norm` is 'Linf' or 'L2', got 'L1'"),
        (("apgd-ce", "Linf", 0.0), "above 0"),
        (("apgd-ce", "Linf", -0.1), "above 0"),
        (("apgd-ce", "Linf", float("nan")), "above 0"),
        (("apgd-ce", "Linf", 8.0), "8/255 is 0.031"),
        (("apgd-ce", "Linf", math.inf), "finite radius above 0 for images in .0, 1., got inf; 8/255"),
        (("apgd-ce", "L2", math.inf), "finite radius above 0"),
        (("apgd-ce", "L2", 128.0), "published radii are 0.5 to 3; in 0-255 units. 128/255 is 0.50"),
        (("apgd-ce", "L2", 8.0), "in 0-255 units"),
        (("autoattack-standard", "Linf", 0.03, {"target_classes": 0}), "`target_classes` is at least 1, got 0"),
        (("autoattack-standard", "Linf", 0.03, {"queries": 0}), "`queries` is at least 1, got 0"),
        (("apgd-ce", "Linf", 0.03, {"eot_iter": 0}), "`eot_iter` is at least 1, got 0"),
        (("apgd-ce", "Linf", 0.03, {"iterations": -1}), "`iterations` is at least 1, got -1"),
        (("pgd-eot", "Linf", 0.03, {"step_size": 0.0}), "`step_size` is a finite number above 0.*, got 0.0"),
        (("pgd-eot", "Linf", 0.03, {"step_size": math.nan}), "`step_size` is a finite number above 0.*, got nan"),
        (("salt-and-pepper", "Linf", 0.03, {"amount": 0.0}), "`amount` is a share of pixels in .0, 1., got 0.0"),
        (("salt-and-pepper", "Linf", 0.03, {"amount": 5.0}), "`amount` is a share of pixels in .0, 1., got 5.0"),
        (("apgd-ce", "Linf", 0.03, {"queries": 5}), "no queries to set; it has dw_box, eot_iter, iterations, looks, loss"),
    ],
)
def test_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        suite(*arguments)


def test_published_sizes():
    """Of one image that survives everything: twice 20 x 101 gradients; APGD, 9 targets of it, FAB, 5000 queries."""
    rand = [attack.cost() for attack in suite("autoattack-rand", "Linf", 8 / 255).values()]
    standard = [attack.cost() for attack in suite("autoattack-standard", "Linf", 8 / 255).values()]
    assert sum(cost.gradient for cost in rand) == 4040
    assert sum(cost.gradient for cost in standard) == 1910
    assert 5900 < sum(cost.forward for cost in standard) < 6000


class Watched(torch.nn.Module):
    """A defense that notes what it is asked; `wrong_at` are queries in which it is made to misclassify image 0."""

    def __init__(self, model, y, wrong_at=()):
        super().__init__()
        self.model, self.y, self.wrong_at, self.asked = model, y, wrong_at, []

    def forward(self, x):
        logits = self.model(x)
        if len(self.asked) in self.wrong_at:
            logits = logits.clone()
            logits[0] = 5.0 * functional.one_hot((self.y[0] + 1) % 10, 10)
        self.asked.append((x.detach().clone(), logits.detach().clone()))  # Square writes into them
        return logits


@pytest.mark.parametrize("norm, eps", [("Linf", 1 / 255), ("L2", 0.05)])
@pytest.mark.parametrize(
    "name, stage", [("autoattack-rand", "apgd-ce"), *(("autoattack-standard", s) for s in ("apgd-t", "fab-t", "square"))]
)
def test_the_strongest_image_is_a_failure_or_else_of_the_highest_mean_loss_in_the_ball(name, stage, norm, eps):
    x, y = labelled(3)
    eps *= 20 if stage == "fab-t" else 1  # which asks beyond its radius first
    attack = small_suite(name, norm, eps)[stage]
    defense = plain("cpu")
    defense.model = Watched(defense.model, y)
    with torch.random.fork_rng():
        result = attack.run(defense, x, y, seed=2)
    draws = getattr(attack, "eot_iter", 1)
    for image in range(3):
        best, at = (False, -math.inf), x[image]
        points = []  # of this image, in order, with whether they failed and their losses
        for asked, logits in defense.model.asked:
            for row, answer in zip(asked, logits, strict=True):
                nearest = int((row - x).flatten(1).norm(dim=1).argmin())
                if nearest == image:
                    points.append((row, int(answer.argmax()) != y[image], float(functional.cross_entropy(answer, y[image]))))
        at_once = [points[i : i + draws] for i in range(len(points))]
        for group in (g for g in at_once if len(g) == draws and all(torch.equal(p, g[0][0]) for p, *_ in g)):
            delta = (group[0][0] - x[image]).flatten()
            size = float(delta.abs().max() if norm == "Linf" else delta.norm())
            strength = any(failed for _, failed, _ in group), sum(loss for *_, loss in group) / draws
            if 0 < size <= eps + 1e-6 and strength > best:
                best, at = strength, group[0][0]
        assert best[1] > -math.inf and bool(result.failed[image]) == best[0]
        torch.testing.assert_close(float(result.loss[image]), best[1], rtol=1e-6, atol=1e-6)
        assert torch.equal(result.strongest[image], at)


def test_an_attack_that_saw_no_failure_is_judged_by_what_it_tried():
    """AutoAttack returns the image as it came."""
    x, y = labelled(3)
    attack = APGD("Linf", 1e-4, iterations=5)
    defense = plain("cpu")
    with torch.random.fork_rng():
        result = attack.run(defense, x, y, seed=0)
    assert torch.equal(result.x_adv, x)
    before, after = (functional.cross_entropy(defense(t), y, reduction="none") for t in (x, result.strongest))
    assert bool((after > before).all())
    torch.testing.assert_close(result.loss, after.detach())


def test_an_image_misclassified_at_the_first_look_is_offered_again():
    x, y = labelled(3)
    attack = APGD("Linf", 1 / 255, iterations=3)
    defense = plain("cpu")
    defense.model = Watched(defense.model, y, wrong_at={0})
    with torch.random.fork_rng():
        result = attack.run(defense, x, y, seed=0)
    assert torch.equal(result.x_adv[0], x[0])  # the attack's own verdict
    assert not torch.equal(result.strongest[0], x[0]) and float(result.loss[0]) > 0
    assert len(result.curve) == 4  # of the first offer


def test_an_image_that_is_never_right_is_left_as_it_came():
    x, y = labelled(3, wrong=[1])
    defense = plain("cpu")
    defense.model = Watched(defense.model, y)
    with torch.random.fork_rng():
        result = APGD("Linf", 1 / 255, iterations=3).run(defense, x, y, seed=0)
    assert torch.equal(result.strongest[1], x[1]) and float(result.loss[1]) == -math.inf
    again = [asked for asked, _ in defense.model.asked if len(asked) == 1]
    assert len(again) == OFFERS - 1 and all(torch.equal(asked[0], x[1]) for asked in again)


@pytest.mark.parametrize("seed", range(4))
def test_what_fooled_a_defense_without_noise_is_what_it_is_judged_by(seed, tmp_path):
    """Of the points that an attack tries, one of a higher loss may still be classified correctly."""
    x = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        y = plain("cpu")(x).argmax(dim=1)
    cuts = {"iterations": 10, "queries": 30, "target_classes": 3}
    spec = Spec.of(attack="autoattack-standard", eps=0.7 / 255, seed=121, shard=40, draws=1, paths=0, **cuts)
    with evaluate(spec, x, y, defense=evaluation_cases.plain, out=tmp_path / "run").ledger as ledger:
        attacked = judged(ledger)["attacked"]
    official, single = scores(attacked, OFFICIAL), scores(attacked, "single")
    assert 0 < official.sum() < 40
    assert (single == official).all()


@pytest.mark.parametrize("stage", ["apgd-ce", "apgd-t", "fab-t", "square"])
def test_equal_images_share_what_was_found(stage):
    """Which of them an attack asks about cannot be told when one of them has fallen."""
    x, y = labelled(4)
    x[3], y[3] = x[0], y[0]
    attack = small_suite("autoattack-standard", "Linf", 20 / 255 if stage == "fab-t" else 1 / 255)[stage]
    defense = plain("cpu")
    defense.model = Watched(defense.model, y, wrong_at={0})  # so the first of the two is not attacked at first
    with torch.random.fork_rng():
        result = attack.run(defense, x, y, seed=2)
    assert torch.equal(result.strongest[0], result.strongest[3]) and not torch.equal(result.strongest[3], x[3])
    assert bool(result.loss[0] == result.loss[3]) and float(result.loss[3]) > 0


def test_an_image_that_failed_once_stays_off_the_curve():
    """PGD may come back from where an image was misclassified, as where the defense's noise decides."""
    x, y = labelled(3)
    ask = plain("cpu").model
    # Image 0 is right but in the second of five looks, image 1 in none from the third on, image 2 in all.
    wrong_at = {0: {1}, 1: {2, 3, 4}, 2: set()}
    looks = []

    class Flickering(torch.nn.Module):
        def forward(self, x):
            said = torch.tensor([label + (len(looks) in wrong_at[image]) for image, label in enumerate(y.tolist())]) % 10
            looks.append(len(x))
            return 0 * ask(x) + torch.nn.functional.one_hot(said, 10)

    attack = PGD("Linf", 1 / 255, iterations=4, eot_iter=1, drop="never")
    assert attack.run(Metered(Flickering().eval()), x, y, seed=0).curve == (3, 2, 1, 1, 1)
    assert looks == [3] * 5


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_random_start_is_uniform_in_the_ball(norm):
    n, d, eps = 40000, 4, 0.1
    x = torch.full((n, 1, 2, 2), 0.5)  # nothing is clipped
    start = PGD(norm, eps, random_start=True).start(x, seed=3)
    delta = ((start - x) / eps).flatten(1).double()
    size = delta.abs().amax(dim=1) if norm == "Linf" else delta.norm(dim=1)
    assert float(size.max()) <= 1 + 1e-5
    # In either ball the share r^d lies within r. A step of an empirical distribution of n points deviates by 1.95 / sqrt(n)
    # in one of a thousand samples (Kolmogorov).
    shares = (size**d).sort().values
    assert float((shares - torch.arange(n) / n).abs().max()) < 1.95 / n**0.5
    # No direction is preferred: on the sphere E z_i^4 = 3 / (d (d + 2)), on the faces of the cube (1 + (d - 1) / 5) / d.
    expected = 3 / (d * (d + 2)) if norm == "L2" else (1 + (d - 1) / 5) / d
    direction = delta / size[:, None]
    for moment, values in ((0.0, direction), (expected, direction**4)):
        error = values.mean(dim=0) - moment
        assert float((error / values.std(dim=0)).abs().max()) < 5 / n**0.5  # five standard deviations


class Flickering(torch.nn.Module):
    """Two clusters of answers: each copy of an image in a call gets noise of its own, and one draw says little."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(x))
        margin = x.mean(dim=(1, 2, 3)) - 0.48 + 0.2 * torch.randn(len(x))
        return torch.stack([margin, -margin], dim=1)


def test_square_asks_several_draws_a_query():
    model = Flickering().eval()
    seen = []

    class Spy(Metered):
        def forward(self, x, **options):
            logits = super().forward(x, **options)
            seen.append(logits)
            return logits

    x, y = torch.full((3, 3, 8, 8), 0.5), torch.zeros(3, dtype=torch.int64)
    attack = Square(queries=5, eot_iter=64)
    torch.manual_seed(0)

    def asked(defense, draws):
        return _Seen(defense, x, y, "Linf", 8 / 255, copies=draws)

    answers = asked(Spy(model), 64)(x)
    assert model.calls == [3 * 64]
    torch.testing.assert_close(answers, seen[0].view(64, 3, 2).mean(dim=0), rtol=0, atol=0)
    # The margin is 0.02 and a draw's noise ten times as large: one draw is wrong almost every other time, the mean hardly is.
    single, mean = (asked(Metered(model), draws) for draws in (1, 64))
    wrong = [torch.stack([answer(x).argmax(dim=1) for _ in range(200)]).double().mean() for answer in (single, mean)]
    assert float(wrong[0]) > 0.35 > 0.3 > float(wrong[1])
    metered = Metered(model)
    attack.run(metered, x, y, seed=0)
    assert 3 * 64 <= metered.forward_images <= 3 * (attack.cost().forward + attack.cost().again)
    assert attack.replicas == 64


def test_a_keyword_of_the_attack_that_another_method_has_is_the_attacks(recwarn):
    said = Spec.of(attack="pgd-eot", step_size=0.01, t=0.05)
    assert said.attack_options == {"step_size": 0.01} and said.purifier == {"t": 0.05} and not recwarn
    hammer = Spec.of(attack="diffhammer", rounds=3)
    assert hammer.stages()["diffhammer"].rounds == 3 and hammer.but(rounds=4).stages()["diffhammer"].rounds == 4
    # Where the method has one, too, it is the method's.
    both = Spec.of(attack="pgd-eot", method="ld-sde", step_size=0.02, attack_options={"step_size": 0.01})
    assert both.settings().method.step_size == 0.02 and both.stages()["pgd-eot"].step_size == 0.01
    assert Spec.of(attack="apgd-ce", method="gdmp", rounds=2).settings().method.rounds == 2


def test_what_is_recommended_is_kept_as_what_it_is():
    asked, options = Spec.of(attack="recommended"), dict(RECOMMENDATION.options)
    assert (asked.attack, asked.mode, asked.attack_options) == (RECOMMENDATION.attack, RECOMMENDATION.mode, options)
    assert asked == Spec.of(attack=RECOMMENDATION.attack, mode=RECOMMENDATION.mode, **options)
    kept = asked.to_dict()
    assert (kept["attack"], kept["mode"]) == (RECOMMENDATION.attack, RECOMMENDATION.mode) and Spec.from_dict(kept) == asked
    # Unless the spec says otherwise; also of one that has begun as another.
    assert Spec.of(attack="recommended", mode="full", iterations=3).attack_options == {**options, "iterations": 3}
    assert Spec.of(attack="recommended", mode="full").mode == "full"
    assert Spec().but(attack="recommended", draws=3) == Spec.of(attack="recommended", draws=3)
    assert (Spec().mode, Spec().but(attack="recommended", mode="full").mode) == ("full", "full")
    assert find("recommended") is SUITES[RECOMMENDATION.attack] and len(RECOMMENDATION.reasons) > 40
    with pytest.raises(ValueError, match="did you mean 'recommended'"):
        find("recomended")


@pytest.mark.parametrize("options", [{"draws": 0}, {"draws": 2.5}, {"shard": 0}, {"limit": 0}, {"threads": True}])
def test_ensembles_and_units_of_none_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"`{name}` is at least 1 and a whole number, got"):
        Spec.of(**options)
