"""Attacks that climb, on defenses where what they can reach is known: each fails here if it is made weaker."""

import dataclasses
import functools
import json
import math

import evaluation_cases
import pytest
import torch
from conftest import small_score
from evaluation_cases import labelled, run
from test_evaluation_journal import Stopped, asked, check_same, found, journals, stopped
from torch import nn
from torch.nn import functional

from coupfast import PurifiedClassifier, Purifier, StepMethod
from coupfast.evaluation import Ledger, Spec, evaluate
from coupfast.evaluation import plan as planning
from coupfast.evaluation.attacks import (
    APGD,
    BPDA,
    PGD,
    Cost,
    DiffHammer,
    FABTargeted,
    Square,
    StAdv,
    TargetedAPGD,
    Transfer,
    ball,
)
from coupfast.evaluation.attacks.iterative import FALLEN, LOOKS, Answer, Asked, InBall, Iterative
from coupfast.evaluation.attacks.losses import LOSSES
from coupfast.evaluation.attacks.stadv import moved, unevenness
from coupfast.evaluation.metered import Metered
from coupfast.evaluation.plan import Plan, Probe, plan
from coupfast.evaluation.purification import coarse_count
from coupfast.evaluation.suites import SUITES, Suite, find
from coupfast.evaluation.units import derive_seed
from coupfast.evaluation.views import Known, View
from coupfast.methods import MultiStage, ReverseSDE
from coupfast.options import option

SHAPE = (3, 4, 4)
EPS = 8 / 255


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sides(StepMethod):
    """Shows a side, 1 or −1, which the noise decides, in the first channel, and lets the others pass."""

    t: float = option(0.1, help="time", parse=float)
    num_steps: int = option(4, help="steps", parse=int)
    guided = False

    def start(self, x_in, noise):
        side = noise.z(0, x_in).sum(dim=(1, 2, 3), keepdim=True).sign()
        return (torch.cat([(side * 0.5).expand_as(x_in[:, :1]), x_in[:, 1:]], dim=1),)

    def step(self, k, state, noise, networks):
        return state

    def finish(self, state):
        return state[0]


class BySide(nn.Module):
    """Two classes, the margin of the wrong one being −threshold + slope · side · u, u the mean of the second channel − ½.

    The draws of either side pull u to opposite ends, and the mean of their margins does not move at all.
    """

    def __init__(self, slope, threshold):
        super().__init__()
        self.slope, self.threshold = slope, threshold

    def forward(self, x):
        side = (x[:, 0].mean(dim=(1, 2)) - 0.5).sign()
        margin = self.slope * side * (x[:, 1].mean(dim=(1, 2)) - 0.5) - self.threshold
        return torch.stack([torch.zeros_like(margin), margin], dim=1)


class NoScore(nn.Module):
    def forward(self, x, labels):
        return torch.zeros_like(x)


def clusters(device="cpu", slope=100.0, threshold=2.0):
    classifier = BySide(slope, threshold).eval()
    return PurifiedClassifier(Purifier(NoScore().eval(), None, method=Sides(), engine="eager"), classifier)


class Linear(nn.Module):
    """Two classes with the margin ⟨w, x − ½⟩ − threshold, plus noise of torch's generator."""

    def __init__(self, threshold=0.0, noise=0.0):
        super().__init__()
        self.register_buffer("w", torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)))
        self.threshold, self.noise = threshold, noise

    def forward(self, x):
        margin = ((x - 0.5) * self.w).flatten(1).sum(dim=1) - self.threshold + self.noise * torch.randn(len(x))
        return torch.stack([torch.zeros_like(margin), margin], dim=1)


def grey(count=3):
    return torch.full((count, *SHAPE), 0.5), torch.zeros(count, dtype=torch.int64)


def attacked(attack, defense, count=3, seed=0):
    metered = Metered(defense)
    with torch.random.fork_rng():
        metered.reseed(5)
        result = attack.run(metered, *grey(count), seed=seed)
    return result, metered


# --- losses ------------------------------------------------------------------------------------------------------------------


def test_losses_are_their_formulas():
    logits = torch.tensor([[1.0, 4.0, 2.0, -1.0], [3.0, 0.5, 2.0, 1.0]])
    y = torch.tensor([2, 0])
    expected = {
        "ce": [math.log(math.exp(-1) + math.exp(2) + 1 + math.exp(-3)), math.log(1 + sum(map(math.exp, (-2.5, -1, -2))))],
        "margin": [2.0, -1.0],
        "cw": [0.0, -1.0],
        "dlr": [2 / 3, -1 / 2],
    }
    assert set(LOSSES) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(LOSSES[name](logits, y), torch.tensor(values), rtol=1e-6, atol=0)


def test_a_draw_that_fails_pulls_no_more_by_cw_and_a_scale_means_nothing_to_dlr():
    logits, y = torch.tensor([[0.0, 2.0, 1.0]], requires_grad=True), torch.tensor([0])
    pull = {name: torch.autograd.grad(loss(logits, y).sum(), logits)[0].abs().sum() for name, loss in LOSSES.items()}
    assert pull["cw"] == 0 < min(pull["ce"], pull["margin"])
    torch.testing.assert_close(LOSSES["dlr"](1e4 * logits, y), LOSSES["dlr"](logits, y))


def test_images_in_different_restarts_climb_each_its_own_loss():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    y, restart = torch.tensor([0, 3, 1]), torch.tensor([2, 0, 1])
    attack = PGD(losses="ce,margin,dlr", eot_iter=2)
    found = attack.climbed(logits, Asked(torch.arange(3), logits, y, restart, restart, True, 2))
    expected = torch.stack([LOSSES[name](logits[:, i], y[[i, i]]) for i, name in enumerate(("dlr", "ce", "margin"))], dim=1)
    torch.testing.assert_close(found, expected)
    later = torch.tensor([0, 2])  # nobody is in the first restart any more
    asked = Asked(later, logits, y[later], restart[later], restart[later], True, 2)
    torch.testing.assert_close(attack.climbed(logits[:, later], asked), expected[:, later])


# --- what is known -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("losses", ["ce", "margin", "cw"])
@pytest.mark.parametrize("norm, eps", [("Linf", EPS), ("L2", 0.5)])
def test_a_linear_classifier_is_taken_to_its_optimum(losses, norm, eps):
    """The margin can rise by eps times the dual norm of w, and no further."""
    model = Linear(threshold=5.0).eval()  # nobody falls: hinges do not bind
    result, _ = attacked(PGD(norm, eps, iterations=12, eot_iter=1, losses=losses), model)
    rise = ((result.x_adv - 0.5) * model.w).flatten(1).sum(dim=1)
    best = eps * (model.w.abs().sum() if norm == "Linf" else model.w.norm())
    torch.testing.assert_close(rise, best.expand(3), rtol=1e-5, atol=0)


def test_eot_finds_the_direction_that_one_draw_does_not():
    """The gradient of one draw is w + 4 times noise of its own: of 64 the mean points along w."""

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Linear()

        def forward(self, x):
            noise = 4 * torch.randn(len(x), *SHAPE)
            return self.inner(x) + torch.stack([torch.zeros(len(x)), ((x - 0.5) * noise).flatten(1).sum(dim=1)], dim=1)

    model = Noisy().eval()
    rises = {}
    for draws in (1, 64):
        result, _ = attacked(PGD("L2", 0.5, iterations=10, eot_iter=draws, step_size=0.05, losses="margin", keep="last"), model)
        rises[draws] = float(((result.x_adv - 0.5) * model.inner.w).flatten(1).sum(dim=1).mean())
    best = 0.5 * float(model.inner.w.norm())
    assert rises[64] > 0.82 * best > 0.6 * best > rises[1]


def test_few_draws_early_and_many_late_are_asked_by_each_images_own_step():
    """Also where images at different steps are attacked together."""
    growing = PGD("L2", 0.5, iterations=10, eot_iter=16, eot_first=1, step_size=0.05, losses="margin", keep="last")
    assert growing.schedule == [1, 1, 2, 2, 3, 4, 5, 7, 9, 12, 16] and growing.cost() == Cost(16, 46)
    asked = []

    @dataclasses.dataclass(frozen=True)
    class Spied(PGD):
        def ask(self, defense, asked_):
            asked.append((asked_.number.tolist(), self.draws(asked_).view(asked_.draws, -1).T.tolist()))
            return super().ask(defense, asked_)

    x, y = grey(4)
    x += torch.linspace(-0.02, 0.02, 4).view(4, 1, 1, 1)
    attack = Spied(iterations=4, eot_iter=6, eot_first=2, drop="any", keep="last", batch=2, eps=0.01, step_size=0.002)
    result = attack.run(Metered(Linear(threshold=0.15).eval()), x, y, seed=0)
    assert 0 < int(result.left.sum()) < 4  # so that images at different steps are attacked together
    assert len({tuple(numbers) for numbers, _ in asked}) > 5 == len(attack.schedule)
    for numbers, draws in asked:
        assert draws == [list(range(6 * k, 6 * k + attack.schedule[k])) for k in numbers]
    assert result.looked is None  # of unequally many


CLUSTERED = {"iterations": 20, "eot_iter": 10, "step_size": EPS / 15, "keep": "last"}


def failing(x, draws=60):
    """The share of draws that fail at images, of the two clusters."""
    with torch.no_grad():
        logits = torch.stack([clusters()(x, ids=range(len(x)), draw=1000 + draw) for draw in range(draws)])
    return (logits.argmax(dim=2) == 1).double().mean(dim=0)


def test_diffhammer_takes_one_side_where_the_mean_gradient_vanishes():
    """slope · eps = 3.1 against a threshold of 2: at an end of u one half of the draws fails, and none near its middle."""
    hammered, _ = attacked(DiffHammer(losses="margin", **CLUSTERED), clusters(), count=16)
    stalled, _ = attacked(PGD(losses="margin", **CLUSTERED), clusters(), count=16)
    # With the mean gradient in the place of r it is 0.56, with the gradient of any one draw 0.25.
    assert float((failing(hammered.x_adv) > 0.35).double().mean()) > 0.8
    assert float((failing(stalled.x_adv) > 0.35).double().mean()) < 0.2


@pytest.mark.parametrize("fault", ["r is never updated", "no eps in the weights"])
def test_the_faults_of_the_published_e_m_would_be_seen(fault):
    """Three draws of four pull one way, of which one is out of reach; the fourth, near to failing, pulls the other way."""
    attack = DiffHammer(eps=0.1, sharpness=5.0)
    g = torch.tensor([[4.0, 1.0], [4.0, -1.0], [3.0, 0.5], [-2.0, 6.0]]).view(4, 1, 1, 1, 2)
    losses = torch.tensor([[-0.2], [-0.3], [-3.0], [0.4]])
    chosen, r = attack.grafted(losses, g)
    flat, direction = g.flatten(1), r.sign().flatten()
    weights = torch.sigmoid(5.0 * (losses[:, 0] + 0.1 * flat @ direction))
    gains = [[float(each + 0.1 * a.sign() @ b) for each, b in zip(losses[:, 0], flat, strict=True)] for a in flat]
    reached = [sum(gain if gain > 0 else math.expm1(gain) for gain in row) for row in gains]
    assert int(chosen) == max(range(4), key=reached.__getitem__)
    # A fixed point of E and M, to what settled means.
    torch.testing.assert_close(r.flatten(), (weights[:, None] * flat).sum(dim=0) / weights.sum(), rtol=1e-2, atol=1e-2)
    assert weights[2] < 0.1 < 0.4 < weights[0]
    if fault == "r is never updated":
        first = flat[chosen[0]]
        assert not torch.allclose(r.flatten(), first, rtol=0.05)
    else:
        blind = torch.sigmoid(5.0 * (losses[:, 0] + flat @ direction))
        assert float((blind - weights).abs().max()) > 0.3


def test_the_draw_is_selected_whose_direction_saves_the_most_others():
    """Five draws, of which another one is selected without ELU or with another radius, and by the sum, the sigmoid or the
    largest gain; the third direction's gains are by hand."""
    g = torch.tensor([[-1.0, 2.0], [3.0, -2.0], [4.0, 3.0], [-7.0, -2.0], [-6.0, -2.0]])
    losses = torch.tensor([[1.9], [-0.9], [-0.5], [-1.1], [-2.2]])
    gains = losses[:, 0] + 0.1 * g.sign() @ g.T
    torch.testing.assert_close(gains[2], torch.tensor([2.0, -0.8, 0.2, -2.0, -3.0]))
    elu, far = functional.elu, losses[:, 0] + g.sign() @ g.T
    others = (gains.sum(1), gains.sigmoid().sum(1), elu(far).sum(1), gains.relu().sum(1), gains.amax(1))
    assert int(elu(gains).sum(1).argmax()) == 2 and 2 not in [int(other.argmax()) for other in others]
    chosen, _ = DiffHammer(eps=0.1).grafted(losses, g.view(5, 1, 1, 1, 2))
    assert int(chosen) == 2


def test_the_purification_that_is_pulled_back_is_the_one_that_was_selected(monkeypatch):
    seen = []
    ask = Metered.ask

    def spy(self, x, ids, draw, view=None):
        seen.append((x.requires_grad, view, torch.as_tensor(ids).tolist(), torch.as_tensor(draw).tolist()))
        return ask(self, x, ids, draw, view)

    monkeypatch.setattr(Metered, "ask", spy)
    picked = []
    grafted = DiffHammer.grafted

    def spied(self, losses, g):
        picked.append(grafted(self, losses, g))
        return picked[-1]

    monkeypatch.setattr(DiffHammer, "grafted", spied)
    metered = Metered(evaluation_cases.purified("cpu"))
    metered.reseed(5)
    DiffHammer(losses="margin,ce", iterations=3, eot_iter=4).run(metered, *labelled(2), seed=0)
    back = [call for call in seen if call[0]]
    assert len(back) == len(picked) and all(view == View(classified=False) for _, view, *_ in seen)
    for (_, _, ids, draws), (chosen, _) in zip(back, picked, strict=True):
        assert [draw % 4 for draw in draws] == chosen.tolist() and len(ids) == len(draws)


def test_a_classifier_that_gives_no_number_is_not_taken_for_a_failure():
    metered = Metered(clusters(slope=math.nan))
    metered.reseed(5)
    with pytest.raises(FloatingPointError, match="of 8 images 8 have a logit that is no number"):
        DiffHammer(iterations=1, eot_iter=4, losses="ce").run(metered, *grey(2), seed=0)


def test_momentum_is_the_papers():
    attack = DiffHammer(norm="L2", eps=5.0, step_size=0.2, iterations=9)
    x = torch.full((1, 1, 1, 2), 0.5)
    memory, g = attack.memory(x), torch.zeros(1, 1, 1, 2)
    for i, new in enumerate(([1.0, 0.0], [0.0, 1.0], [0.0, 2.0]), start=1):
        new = torch.tensor(new).view(1, 1, 1, 2)
        zero = torch.zeros(1, dtype=torch.int64)
        came = attack.step(memory, Asked(zero, x, zero, zero + i - 1, zero, True, 10), new, x)
        g = i**-0.5 * new + (1 - i**-0.5) * g
        torch.testing.assert_close(memory["momentum"], g)
        torch.testing.assert_close(came, x + 0.2 * g / g.norm())


@pytest.mark.parametrize(
    "attack, length",
    [
        (PGD(), 2 / 255),
        (PGD("L2", 0.5), 0.1),
        (PGD(step_size=0.01), 0.01),
        (find("pgd-eot").stages()["pgd-eot"], 0.007),
        (find("transfer").stages("L2", 1.0)["transfer"], 0.2),
        (DiffHammer(), 0.007),
        (DiffHammer("L2", 0.5), 0.1),
        (StAdv(), 0.05),  # Adam's first step is its rate in every value that has a slope
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, float) else str(value),
)
def test_a_step_is_as_long_as_it_says_and_uphill_in_every_restart(attack, length):
    x, y = grey(2)
    if isinstance(attack, StAdv):
        x = torch.linspace(0.2, 0.8, 4).expand(2, *SHAPE).clone()
    gradient = torch.ones_like(x)
    for restart in (0, 1):
        memory, images = attack.memory(x), torch.arange(2)
        number = torch.full((2,), restart * (attack.iterations + 1))
        came = attack.step(memory, Asked(images, x, y, number, number // (attack.iterations + 1), True, 1), gradient, x)
        change = (came - x) if not isinstance(attack, StAdv) else memory["flow"][:, :1, :, :-1]  # on the ramp, to the right
        size = change.flatten(1).norm(dim=1) if getattr(attack, "norm", "Linf") == "L2" else change.flatten(1).amax(dim=1)
        torch.testing.assert_close(size, torch.full((2,), length), rtol=1e-4, atol=0)
        assert bool(((came - x) * gradient > 0).flatten(1).any(dim=1).all())


def test_restarts_take_the_next_loss_and_only_where_half_the_draws_stand():
    """Of four draws as many fail on an image as its third channel says, in fifths, and others do nowhere."""

    class SoMany(nn.Module):
        def forward(self, x):
            draw = torch.arange(len(x)) // (len(x) // 4)
            margin = torch.where(5 * x[:, 2, 0, 0] > draw + 0.5, 5.0, -5.0) + 0 * x.flatten(1).sum(dim=1)
            return torch.stack([torch.zeros_like(margin), margin], dim=1)

    used = []

    @dataclasses.dataclass(frozen=True)
    class Spied(PGD):
        def ask(self, defense, asked):
            used.append((asked.restart.tolist(), asked.images.tolist(), asked.number.tolist()))
            return super().ask(defense, asked)

    x, y = grey(4)
    x[:, 2] = torch.tensor([4, 3, 2, 0]).view(4, 1, 1) / 5
    Spied(iterations=2, eot_iter=4, losses="ce,margin", eps=0.01).run(Metered(SoMany().eval()), x, y, seed=0)
    assert used == [([0] * 4, [0, 1, 2, 3], [i] * 4) for i in range(3)] + [([1] * 2, [2, 3], [i] * 2) for i in range(3, 6)]


@pytest.mark.parametrize("worse", [0, 1])
def test_of_the_last_points_of_restarts_the_better_one_is_kept(worse):
    @dataclasses.dataclass(frozen=True)
    class BackOnce(PGD):
        def step(self, memory, asked, gradient, x):
            return super().step(memory, asked, torch.where(asked.restart == worse, -1, 1).view(-1, 1, 1, 1) * gradient, x)

    model = Linear(threshold=5.0).eval()  # nobody falls
    result, _ = attacked(BackOnce(iterations=8, eot_iter=1, losses="margin,margin", keep="last"), model)
    rise = ((result.x_adv - 0.5) * model.w).flatten(1).sum(dim=1)
    torch.testing.assert_close(rise, (EPS * model.w.abs().sum()).expand(3), rtol=1e-5, atol=0)


# --- transfer ----------------------------------------------------------------------------------------------------------------


def test_transfer_climbs_the_coarse_defense_and_is_judged_by_the_real_one(monkeypatch):
    defense = evaluation_cases.purified("cpu")
    calls = []
    forward = Metered.forward

    def spy(self, x, *, ids=None, draw=None, view=None):
        calls.append((x.requires_grad, view))
        return forward(self, x, ids=ids, draw=draw, view=view)

    monkeypatch.setattr(Metered, "forward", spy)
    x, y = labelled(3)
    metered = Metered(defense)
    metered.reseed(5)
    attack = Transfer(eps=4 / 255, coarse_steps=1, iterations=6, eot_iter=4)
    result = attack.run(metered, x, y, seed=0)
    assert calls == [(True, View(steps=1))] * 6 + [(False, None)]

    def losses(images):
        with torch.no_grad():
            draws = [defense(images, ids=range(3), draw=draw) for draw in range(900, 910)]
        return torch.stack([functional.cross_entropy(logits, y, reduction="none") for logits in draws]).mean(dim=0)

    metered.reseed(6)
    exact = PGD(eps=4 / 255, iterations=6, eot_iter=4, keep="last").run(metered, x, y, seed=0)
    assert bool((losses(result.x_adv) - losses(x) > 0.8 * (losses(exact.x_adv) - losses(x))).all())
    metered.reseed(5)
    again = [defense(result.x_adv, ids=range(3), draw=torch.full((3,), 6 * 4 + draw)) for draw in range(4)]
    torch.testing.assert_close(result.failed, (torch.stack(again).argmax(dim=2) != y).float().mean(dim=0))


@pytest.mark.parametrize("drop", ["majority", "any", "mean"])
def test_who_leaves_a_coarse_attack_has_fallen_by_the_attacks_own_verdict(drop):
    x, y = labelled(3)
    metered = Metered(evaluation_cases.purified("cpu"))
    metered.reseed(5)
    attack = Transfer(eps=4 / 255, coarse_steps=1, iterations=2, eot_iter=4, drop=drop)
    result = attack.run(metered, x, (y + 1) % 10, seed=0)
    assert result.left.tolist() == [True] * 3 and result.failed.tolist() == [1.0] * 3
    assert result.looked.tolist() == [result.looks] * 3


def test_a_coarser_defense_is_the_same_in_fewer_steps():
    defense, (x, _) = evaluation_cases.purified("cpu"), labelled(2)
    metered = Metered(defense)
    metered.reseed(11)
    got = metered(x, ids=[3, 4], draw=7, view=View(steps=1))
    purifier = Purifier(defense.purifier.score, defense.classifier, t=0.003, num_steps=1, engine="eager")
    torch.testing.assert_close(got, PurifiedClassifier(purifier, defense.classifier, seed=11)(x, ids=[3, 4], draw=7))
    assert not torch.equal(got, metered(x, ids=[3, 4], draw=7))
    pure = metered(x, ids=[3, 4], draw=7, view=View(classified=False))
    torch.testing.assert_close(metered.classify(pure), metered(x, ids=[3, 4], draw=7), rtol=0, atol=0)
    with pytest.raises(ValueError, match="`ids` and `draw` are to be given"):
        metered(x, view=View(steps=1))


# --- stadv -------------------------------------------------------------------------------------------------------------------


def ramp():
    """Brightness rises from left to right: half a pixel to the right is 0.05 brighter."""
    return torch.linspace(0.2, 0.8, 7).expand(1, 3, 6, 7).clone()


class Brightness(nn.Module):
    """The margin is the brightness of the image, or of one half minus the other's, without the borders."""

    def __init__(self, halves=False):
        super().__init__()
        self.halves = halves

    def forward(self, x):
        inner = x[:, :, 1:-1, 1:-1]
        up, down = inner[:, :, :2].mean(dim=(1, 2, 3)), inner[:, :, 2:].mean(dim=(1, 2, 3))
        margin = (up - down if self.halves else up + down) - 5
        return torch.stack([torch.zeros_like(margin), margin], dim=1)


def flowed(attack, model):
    with torch.random.fork_rng():
        return attack.run(Metered(model.eval()), ramp(), torch.zeros(1, dtype=torch.int64), seed=0).x_adv


def test_stadv_moves_a_ramp_as_far_as_it_reaches():
    result = flowed(StAdv(iterations=20, eot_iter=1, losses="margin", smoothness=0.0, reach=0.5), Brightness())
    torch.testing.assert_close(result[:, :, 1:-1, 1:-1], ramp()[:, :, 1:-1, 1:-1] + 0.05)
    assert float(result.max()) <= 0.8 + 1e-6  # there is nothing brighter to be moved


def test_stadv_is_held_back_by_the_unevenness_of_its_flow_and_not_by_its_length():
    def rise(smoothness, halves):
        before = float(ramp()[:, :, 1:3, 1:-1].mean())
        attack = StAdv(iterations=60, eot_iter=1, losses="margin", smoothness=smoothness, keep="last")
        result = flowed(attack, Brightness(halves))
        return float(result[:, :, 1:3, 1:-1].mean()) - before

    assert rise(1.0, halves=True) < 0.2 * rise(0.0, halves=True)  # the halves would go apart
    assert rise(1e-4, halves=False) > 0.1


def test_a_flow_moves_pixels_by_whole_and_by_half_places():
    x = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    flow = torch.zeros(2, 2, 5, 6)
    torch.testing.assert_close(moved(x, flow), x)
    flow[:, 0] = 1.0
    torch.testing.assert_close(moved(x, flow)[..., :-1], x[..., 1:])
    flow[:, 0], flow[:, 1] = 0.0, -0.5
    torch.testing.assert_close(moved(x, flow)[:, :, 1:], (x[:, :, 1:] + x[:, :, :-1]) / 2)
    # One pixel displaced by (3, 4) differs by 5 from each of its four neighbours, and each of them from it.
    flow = torch.zeros(1, 2, 5, 6)
    flow[0, :, 2, 2] = torch.tensor([3.0, 4.0])
    torch.testing.assert_close(unevenness(flow), torch.tensor([40.0]), rtol=1e-3, atol=0)


# --- who leaves, who comes ---------------------------------------------------------------------------------------------------


def test_draws_of_an_image_do_not_depend_on_who_is_attacked_with_it():
    """With room for two of six images the same draws are asked of each as with room for all; only batches differ."""
    seen = {}

    class Spy(nn.Module):
        def forward(self, x):
            return Linear(threshold=0.15)(x)

    for batch in (None, 2):
        seen[batch] = {}

        @dataclasses.dataclass(frozen=True)
        class Spied(PGD):
            into = seen[batch]

            def ask(self, defense, asked):
                for image, draws in zip(asked.images.tolist(), self.draws(asked).view(3, -1).T.tolist(), strict=True):
                    self.into.setdefault(image, []).append(draws)
                return super().ask(defense, asked)

        x, y = grey(6)
        x += torch.linspace(-0.02, 0.02, 6).view(6, 1, 1, 1)
        attack = Spied(iterations=4, eot_iter=3, drop="any", batch=batch, eps=0.01, step_size=0.002)
        result = attack.run(Metered(Spy().eval()), x, y, seed=0)
        seen[batch]["result"] = [result.x_adv.tolist(), result.curve, result.left.tolist()]
    assert seen[None] == seen[2]
    assert 0 < sum(seen[2]["result"][2]) < 6  # somebody left, and not everybody


@pytest.mark.parametrize("attack", [PGD, DiffHammer, Transfer], ids=lambda kind: kind.__name__)
def test_no_draw_of_an_image_is_asked_twice(attack):
    """Neither for gradients, nor for looks, nor for tests: all are fresh. (A draw that is pulled back was asked before.)"""
    asked = []

    class Named(Metered):
        def forward(self, x, *, ids=None, draw=None, view=None):
            if attack is not DiffHammer or not x.requires_grad:
                asked.extend(zip(ids.tolist(), draw.tolist(), strict=True))
            return super().forward(x, ids=ids, draw=draw, view=view)

    x, y = labelled(3)
    y[0] = (y[0] + 1) % 10  # all draws fail there, so that it is tested
    options = {"coarse_steps": 1} if attack is Transfer else {}
    climbing = attack(eps=1 / 255, iterations=3, eot_iter=2, losses="ce,margin", looks=3, drop="majority", batch=2, **options)
    metered = Named(evaluation_cases.purified("cpu"))
    metered.reseed(5)
    result = climbing.run(metered, x, y, seed=0)
    assert result.left.tolist()[0] and not result.left.tolist()[2]
    assert len(set(asked)) == len(asked) > 60


def test_no_draw_is_looked_at_twice_where_draws_grow():
    """The fewer draws a gradient has, the more looks confirm a failure: each point's are named apart from the next one's."""
    looked = []

    class Named(Tossed):
        def forward(self, x, *, ids=None, draw=None, view=None):
            looked.extend(zip(ids.tolist(), draw.tolist(), strict=True))
            return super().forward(x)

    attack = PGD(iterations=10, eot_iter=20, eot_first=1, keep="last", drop="majority")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        attack.run(Named(0.9), *grey(40), seed=0)
    assert len(set(looked)) == len(looked)
    tests = [(image, draw - FALLEN) for image, draw in looked if FALLEN <= draw < FALLEN + LOOKS]
    assert len(tests) > len({image for image, _ in tests}) > 30  # many images are tested at several points


def test_the_mean_of_losses_and_the_loss_of_mean_logits_have_other_gradients():
    """Each is what autograd makes of its formula; BPDA takes the latter, as the field's does."""
    x, y = grey(2)
    x[:, 1] += 0.01  # where the draws of one side are nearer to failing than those of the other
    metered = Metered(clusters())
    metered.reseed(3)
    zero, leaf, defense = torch.zeros(2, dtype=torch.int64), x.clone().requires_grad_(), clusters()
    defense.seed = 3
    logits = torch.stack([defense(leaf, ids=range(2), draw=draw) for draw in range(8)])
    losses = {
        "losses": torch.stack([functional.cross_entropy(each, y, reduction="sum") for each in logits]).mean(),
        "logits": functional.cross_entropy(logits.mean(dim=0), y, reduction="sum"),
    }
    found = {}
    for mean, loss in losses.items():
        found[mean] = PGD(mean=mean, eot_iter=8).ask(metered, Asked(torch.arange(2), x, y, zero, zero, True, 8)).gradient
        scale = float(found["losses"].abs().max())
        (expected,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        # A mean of 16 values, a softmax, a mean of 8 draws: a few dozen roundings of the largest.
        torch.testing.assert_close(found[mean], expected, rtol=0, atol=64 * torch.finfo(torch.float32).eps * scale)
    assert float((found["losses"] - found["logits"]).abs().max()) > 0.1 * scale
    assert (BPDA().mean, BPDA().drop, PGD().mean) == ("logits", "mean", "losses")


@pytest.mark.parametrize("keep", ["loss", "last", "accuracy"])
def test_what_is_kept_of_a_way_that_overshoots(keep):
    """The margin peaks at the second of five points; steps go on up, whatever it says."""

    @dataclasses.dataclass(frozen=True)
    class Up(PGD):
        def step(self, memory, asked, gradient, x):
            return asked.x + self.step_size

    class Peak(nn.Module):
        def forward(self, x):
            margin = 1 - 100 * (x.mean(dim=(1, 2, 3)) - 0.51).abs()
            return torch.stack([0.5 + torch.zeros_like(margin), margin], dim=1)

    result, _ = attacked(Up(iterations=4, eot_iter=1, step_size=0.01, keep=keep), Peak().eval(), count=1)
    torch.testing.assert_close(float(result.x_adv.mean()), 0.54 if keep == "last" else 0.51)
    assert result.failed.tolist() == [0.0 if keep == "last" else 1.0] and result.curve == (1, 0, 0, 0, 0)


def test_room_is_taken_by_who_waits():
    sizes = []

    @dataclasses.dataclass(frozen=True)
    class Spied(PGD):
        def ask(self, defense, asked):
            sizes.append(len(asked.images))
            return super().ask(defense, asked)

    x, y = grey(7)
    attack = Spied(iterations=3, eot_iter=1, drop="any", batch=3)
    attack.run(Metered(Linear(threshold=-5.0).eval()), x, y, seed=0)  # all fall at the first look
    assert sizes == [3, 3, 1]
    assert attack.at_once(7) == 3 and attack.at_once(2) == 2


class Coins(nn.Module):
    """Wrong with a probability, whatever the image."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        wrong = (torch.rand(len(x)) < self.p).float() + 0 * x.flatten(1).sum(dim=1)
        return torch.stack([0.5 - wrong, wrong - 0.5], dim=1)


class Tossed(Metered):
    """Every draw is wrong with a probability, in few steps as in many."""

    def __init__(self, p):
        super().__init__(Coins(p).eval())

    def forward(self, x, *, ids=None, draw=None, view=None):
        return super().forward(x)


def leaving(attack, p):
    """The probability that an image leaves, all of whose draws fail with probability p: at a point all draws of the gradient,
    then the further looks; and each time that these show it standing, twice as many points pass before they are asked again."""

    @functools.cache
    def from_point(number, due, pause):
        if number == attack.points:
            return 0.0
        draws = attack.schedule[number]
        fresh = attack.needed if isinstance(attack, Transfer) else attack.needed - draws  # its own are of fewer steps
        suspect, fallen = p**draws, p**fresh
        if number < due:
            return from_point(number + 1, due, pause)
        again = from_point(number + 1, number + pause, 2 * pause)
        return suspect * (fallen + (1 - fallen) * again) + (1 - suspect) * from_point(number + 1, due, pause)

    return from_point(0, 0, 1)


@pytest.mark.parametrize(
    "attack, needed",
    [
        (PGD(iterations=20, eot_iter=2, drop="majority", error=0.2), 7),  # 2^-7 at each of 21 points
        (PGD(iterations=20, eot_iter=4, eot_first=1, keep="last", drop="majority", error=0.2), 7),
        (Transfer(iterations=20, eot_iter=2, coarse_steps=1, drop="majority", error=0.2), 5),  # at 5 of them at most
    ],
    ids=["PGD", "growing", "Transfer"],
)
def test_the_test_of_a_majority_keeps_to_its_error(attack, needed):
    """As many leave as the rule lets go, which is fewer than it states, where exactly half of the draws fail."""
    assert attack.needed == needed and leaving(attack, 0.5) < 0.2
    x, y = grey(4000)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for p in (0.5, 0.8):
            expected = leaving(attack, p)
            left = float(attack.run(Tossed(p), x, y, seed=0).left.double().mean())
            assert abs(left - expected) < 5 * (expected * (1 - expected) / 4000) ** 0.5, (p, left, expected)
        strict, x, y = dataclasses.replace(attack, error=0.01), x[:400], y[:400]
        assert leaving(strict, 0.3) < 1e-4 and not bool(strict.run(Tossed(0.3), x, y, seed=0).left.any())
        assert bool(attack.run(Tossed(1.1), x, y, seed=0).left.all())


def test_a_test_that_fails_is_not_repeated_at_every_point():
    """All draws of the gradient fail, and the look after them never does."""
    calls = []

    @dataclasses.dataclass(frozen=True)
    class Fooled(InBall):
        def ask(self, defense, asked):
            n = len(asked.images)
            bad = torch.ones(self.eot_iter, n, dtype=torch.bool)
            return Answer(bad, bad[0], torch.zeros(n), torch.ones_like(asked.x))

        def cost(self):
            return Cost(0, 0)

    class Right(nn.Module):
        def forward(self, x):
            calls.append(len(x))
            return torch.tensor([[1.0, 0.0]]).repeat(len(x), 1)

    x, y = grey(2)
    attack = Fooled(iterations=63, eot_iter=2, drop="majority")
    assert not bool(attack.run(Metered(Right().eval()), x, y, seed=0).left.any())
    assert calls == [2] * 7  # of 64 points at 0, 1, 3, 7, ... 63
    assert attack.points.bit_length() == 7


def test_looks_decide_what_is_kept_and_are_told():
    """The loss is highest where draws agree least: by accuracy another point is kept."""

    class Trap(nn.Module):
        def forward(self, x):
            u = x[:, 0].mean(dim=(1, 2)) - 0.5  # rises step by step
            late = (u > 0.02).float()
            # Near the middle all draws fail by a little; at the end one in ten does, by far.
            some = (torch.rand(len(x)) < 0.1).float()
            margin = (1 - late) * 0.1 * (u > 0.008) + late * (200 * some - 0.1 * (1 - some)) - 0.01 + u
            return torch.stack([torch.zeros_like(margin), margin], dim=1)

    common = {"iterations": 8, "eot_iter": 20, "step_size": EPS / 8}
    by_loss, _ = attacked(PGD(keep="loss", **common), Trap().eval())
    by_looks, metered = attacked(PGD(keep="accuracy", looks=20, **common), Trap().eval())
    assert bool((by_loss.failed < 0.5).all()) and bool((by_looks.failed == 1).all())
    assert by_looks.looks == 20 and by_looks.looked.tolist() == [20] * 3
    assert metered.forward_images == 3 * PGD(keep="accuracy", looks=20, **common).cost().forward == 3 * (20 + 20 * 9)
    fixed, _ = attacked(APGD(iterations=8, eot_iter=1, looks=20), Trap().eval())
    assert bool((fixed.failed == 1).all()) and torch.equal(fixed.x_adv, fixed.strongest)


class FourClasses(nn.Module):
    """The linear one, and two classes that nobody takes for an image's."""

    def __init__(self, threshold):
        super().__init__()
        self.inner = Linear(threshold)

    def forward(self, x):
        return torch.cat([self.inner(x), torch.tensor([[-50.0, -60.0]]).expand(len(x), 2)], dim=1)


@pytest.mark.parametrize("kind", [Square, FABTargeted, TargetedAPGD], ids=lambda kind: kind.__name__)
def test_looks_choose_among_the_points_of_autoattacks_attacks(kind):
    """How many looks fail at a point follows from it and has nothing to do with what the attack is answered."""
    seen = {}

    def failures(x):
        return (1e3 * x[:, 2].mean(dim=(1, 2)) + 1e5 * (x - 0.5).square().mean(dim=(1, 2, 3))).long() % 6

    class Apart(Metered):
        def forward(self, x, *, ids=None, draw=None, view=None):
            logits = super().forward(x)
            if draw is None:
                return logits
            for image, count in zip(ids.tolist(), failures(x).tolist(), strict=True):
                seen.setdefault(image, []).append(count)
            wrong = (draw % 5 < failures(x)).float()
            return torch.stack([0.5 - wrong, wrong - 0.5], dim=1)

    # Square goes on until something falls; FAB goes where it does, which is to be in the ball.
    options, threshold = ({"queries": 30}, 20.0) if kind is Square else ({"iterations": 5, "target_classes": 1}, 2.0)
    attack, metered, (x, y) = kind(eps=0.3, looks=5, **options), Apart(FourClasses(threshold).eval()), grey(3)
    with torch.random.fork_rng():
        result = attack.run(metered, x, y, seed=0)
    most = max(max(counts) for counts in seen.values())  # the images are equal, and share what was found
    assert min(min(counts) for counts in seen.values()) < most and most == int(result.looked.max()) and result.looks == 5
    assert failures(result.x_adv).tolist() == [most] * 3 and result.failed.tolist() == pytest.approx([most / 5] * 3)
    assert torch.equal(result.strongest, result.x_adv)
    assert 0 < metered.forward_images <= 3 * (attack.cost().forward + attack.cost().again)


def test_who_is_misclassified_before_any_attack_has_fallen_inside_of_it():
    x, y = grey()
    model = Linear(threshold=2.0).eval()
    for attack in (APGD(iterations=2, looks=4), PGD(iterations=2, looks=4, eot_iter=1)):
        result = attack.run(Metered(model), x, torch.tensor([0, 1, 0]), seed=0)
        assert result.looks == 4 and result.looked.tolist() == [0, 4, 0]


def test_who_is_right_and_cannot_be_moved_has_not_fallen_inside_of_it():
    """FAB does not leave an image of black and white where the gradient is 0: it is attacked once all the same."""

    class Flat(nn.Module):
        def forward(self, x):
            return torch.tensor([2.0, 1.0, 0.0]) + 0 * x.flatten(1).sum(dim=1, keepdim=True)

    attack, metered = FABTargeted(iterations=2, target_classes=2, looks=2), Metered(Flat().eval())
    result = attack.run(metered, torch.ones(2, *SHAPE), torch.zeros(2, dtype=torch.int64), seed=0)
    assert result.looked.tolist() == [0, 0] and metered.gradient_images == 2 * attack.cost().gradient


@pytest.mark.parametrize(
    "attack",
    [
        PGD(iterations=2, eot_iter=3, dw_box=True),
        DiffHammer(iterations=2, eot_iter=3, losses="ce", dw_box=True),
        StAdv(iterations=2, eot_iter=3, dw_box=True),
        APGD(iterations=2, eot_iter=2, dw_box=True),
        TargetedAPGD(iterations=2, eot_iter=2, target_classes=1, dw_box=True),
        Square(queries=3, eot_iter=2, looks=2, dw_box=True),
        FABTargeted(iterations=2, target_classes=1, dw_box=True),
    ],
    ids=lambda attack: type(attack).__name__,
)
def test_an_attack_that_knows_the_judges_noise_asks_for_no_other(attack):
    """Of each image its own: the first one is not attacked by AutoAttack's attacks, which see it misclassified at once."""
    seen = []

    class Spy(PurifiedClassifier):
        def purify(self, x, *, ids=None, draw=None):
            if ids is not None:
                nearest = torch.cdist(x.detach().flatten(1), images.flatten(1)).argmin(dim=1)
                assert nearest.tolist() == torch.as_tensor(ids).tolist()
                seen.append((self.seed, set(nearest.tolist()), set(torch.as_tensor(draw).flatten().tolist())))
            return super().purify(x, ids=ids, draw=draw)

    inner = evaluation_cases.purified("cpu")
    defense = Spy(inner.purifier, inner.classifier)
    images, y = labelled(6, wrong=[0, 4])
    with evaluate(defense, images, y, attack=attack, shard=3, draws=3, seed=9, paths=0) as result:
        assert {seed for seed, *_ in seen} == {derive_seed(9, "judge")}
        assert set.union(*(ids for _, ids, _ in seen)) == set(range(6))
        assert set.union(*(draws for *_, draws in seen)) == {0, 1, 2}
        attacked = result.verdicts["attacked"]
        # The stage's own verdict is the judge's first draw, at what the stage returned.
        if not isinstance(attack, (APGD, TargetedAPGD, Square, FABTargeted)):
            assert attacked.official.tolist() == (attacked.logits[0].argmax(axis=1) == attacked.labels).tolist()


def test_who_knows_the_judges_draw_makes_it_fail():
    """One side decides, and each half of all draws is of either: who knows it climbs that one alone."""
    options = {"attack": "pgd-eot", "iterations": 10, "eot_iter": 8, "losses": "margin", "draws": 1, "paths": 0}
    standing = {}
    for known in (False, True):
        with evaluate(clusters(), *grey(16), dw_box=known, **options) as result:
            standing[known] = [result.accuracies["attacked"][by].value for by in ("single", "official")]
    assert standing[True] == [0.0, 0.0] and min(standing[False]) > 0.2


def test_known_noise_is_the_judges():
    defense, (x, _) = evaluation_cases.purified("cpu"), labelled(2)
    metered = Metered(defense)
    metered.reseed(77)
    metered.known = Known(77, (40, 41), 5)
    got = metered(x, ids=torch.tensor([1, 0]), draw=torch.tensor([7, 2]))
    torch.testing.assert_close(got, defense(x, ids=[41, 40], draw=2), rtol=0, atol=0)
    with pytest.raises(ValueError, match="names its draws"):
        metered(x)


def test_known_noise_is_not_tested_as_if_it_were_fresh(tmp_path):
    with pytest.raises(ValueError, match="`drop` = 'majority' is a test on fresh draws, and with `dw_box` there are none"):
        PGD(dw_box=True, drop="majority")
    stages = Spec.of(attack="pgd-eot", mode="fast", dw_box=True).stages()
    assert {(attack.drop, attack.batch) for attack in stages.values()} == {("never", None)}
    with pytest.raises(ValueError, match="`dw_box` is knowledge of the noise in the defense's own steps, and `coarse_steps`"):
        Spec.of(attack="cascade", dw_box=True)
    stages = Spec.of(attack="cascade", **{"exact.dw_box": True}).stages()
    assert [attack.dw_box for attack in stages.values()] == [False, False, True]
    options = {"iterations": 1, "eot_iter": 2, "looks": 2, "draws": 1, "paths": 0}
    for known in (False, True):
        with evaluate(
            evaluation_cases.purified("cpu"), *labelled(2), attack="pgd-eot", dw_box=known, out=tmp_path / str(known), **options
        ) as result:
            assert bool(result.inside) != known


# --- cost --------------------------------------------------------------------------------------------------------------------

OWN = [
    PGD(iterations=3, eot_iter=2, losses="ce,margin", looks=2),
    BPDA(iterations=3, eot_iter=2),
    Transfer(iterations=3, eot_iter=2, coarse_steps=1, looks=2),
    DiffHammer(iterations=3, eot_iter=4),
    StAdv(iterations=3, eot_iter=2, losses="ce"),
    DiffHammer(iterations=3, eot_iter=4, looks=3, losses="ce"),
    DiffHammer(iterations=4, eot_iter=6, eot_first=2, keep="last"),
    Transfer(iterations=5, eot_iter=4, eot_first=1, coarse_steps=1),
    APGD(iterations=3, eot_iter=2, looks=3),
]


@pytest.mark.parametrize("attack", OWN, ids=lambda a: f"{type(a).__name__}-{getattr(a, 'looks', '')}-{a.eot_iter}")
def test_cost_is_what_an_image_that_survives_takes(attack):
    class Sure(nn.Module):
        def forward(self, x):
            slopes = 1e-3 * x.mean(dim=(1, 2, 3))[:, None] * torch.arange(10)
            return 9 * torch.eye(10)[:1] + slopes

    inner = evaluation_cases.purified("cpu", "bpda" if isinstance(attack, BPDA) else "exact")
    defense = PurifiedClassifier(inner.purifier, Sure().eval())
    metered = Metered(defense)
    x, _ = labelled(2)
    with torch.random.fork_rng():
        attack.run(metered, x, torch.zeros(2, dtype=torch.int64), seed=0)
    cost = attack.cost()
    assert (metered.forward_images, metered.gradient_images) == (2 * cost.forward, 2 * cost.gradient)
    assert cost.again == (7 if isinstance(attack, APGD) else 0)


def test_looks_at_who_seems_to_have_fallen_are_at_most_what_is_said():
    """Every second draw of a call fails: no test lets anybody go, and each costs."""
    x, y = grey(4)
    for attack in (
        PGD(iterations=30, eot_iter=1, drop="majority"),
        PGD(iterations=30, eot_iter=3, eot_first=1, drop="majority", keep="last"),
        dataclasses.replace(PGD(iterations=7, eot_iter=1, drop="majority", losses="ce,margin"), error=0.5),
    ):
        metered = Metered(Coins(0.7).eval())
        with torch.random.fork_rng():
            torch.manual_seed(1)
            attack.run(metered, x, y, seed=0)
        cost = attack.cost()
        assert 4 * cost.forward < metered.forward_images <= 4 * (cost.forward + cost.again)


def test_published_sizes():
    pgd = find("pgd-eot").stages()["pgd-eot"]
    assert (pgd.iterations, pgd.eot_iter, pgd.step_size, pgd.random_start, pgd.keep) == (200, 20, 0.007, False, "last")
    assert pgd.cost().gradient == 4000
    hammer = find("diffhammer").stages()["diffhammer"]
    assert (hammer.iterations, hammer.eot_iter, hammer.losses, hammer.sharpness) == (50, 10, "margin,ce,dlr", 5.0)
    assert hammer.cost() == Cost(10 * 3 * 51, 3 * 50)
    fixed = find("fixed-autoattack").stages()
    assert [(a.loss, a.eot_iter, a.looks) for a in fixed.values()] == [("ce", 20, 20), ("dlr", 20, 20)]
    cascade = find("cascade").stages()
    assert [getattr(a, "coarse_steps", None) for a in cascade.values()] == [3, 5, None]
    assert [(a.iterations, a.eot_iter, a.keep) for a in cascade.values()] == [(100, 10, "last")] * 2 + [(50, 10, "accuracy")]
    assert [a.step_size for a in [*cascade.values(), find("transfer").stages()["transfer"]]] == [0.007] * 4
    in_l2 = [*find("cascade").stages("L2", 0.5).values(), find("transfer").stages("L2", 0.5)["transfer"]]
    assert [a.step_size for a in in_l2] == [None] * 4  # eps/5
    bent = find("stadv").stages()["stadv"]
    assert (bent.iterations, bent.eot_iter, bent.losses, bent.mean) == (100, 15, "cw", "losses")
    assert (bent.smoothness, bent.rate, bent.reach) == (0.05, 0.05, None)
    bpda = [find(name).stages()[name] for name in ("bpda-eot", "bpda-eot-20")]
    assert [(a.iterations, a.eot_iter, a.mean) for a in bpda] == [(40, 15, "logits"), (20, 15, "logits")]


# --- stopped and continued ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attack",
    [
        DiffHammer(eps=1 / 255, iterations=3, eot_iter=2, losses="margin,ce"),
        DiffHammer(eps=1 / 255, iterations=4, eot_iter=2, drop="majority", error=0.5, batch=2),
        Transfer(eps=1 / 255, coarse_steps=(1,), iterations=4, eot_iter=2, drop="majority", error=0.5),
        PGD(eps=1 / 255, iterations=3, eot_iter=2, drop="majority", error=0.5, batch=2, looks=2, losses="ce,dlr"),
        PGD(eps=1 / 255, iterations=3, eot_iter=4, eot_first=1, keep="last", drop="majority", error=0.5, batch=2),
        PGD(eps=1 / 255, iterations=3, eot_iter=2, drop="any", batch=1, losses="ce,dlr"),
        APGD(eps=1 / 255, iterations=2, eot_iter=1, looks=2, dw_box=True),
        Square(eps=1 / 255, queries=6, eot_iter=2, looks=2),
        FABTargeted(eps=1 / 255, iterations=2, target_classes=2, looks=2),
        TargetedAPGD(eps=1 / 255, iterations=2, target_classes=2, looks=2),
        StAdv(iterations=4, eot_iter=2, batch=2),
    ],
    ids=lambda attack: type(attack).__name__,
)
def test_stopped_inside_it_goes_on_with_the_same_bits(tmp_path, attack):
    """Also in the middle of a batch that is refilled, of a test, and between the two calls of one step."""
    spec = Spec.of(attack=attack, shard=3, draws=1, paths=0)
    with asked() as count, run(tmp_path / "whole", spec, count=3) as ledger:
        whole = found(ledger)
    (stage,) = spec.stages()
    folder, done = tmp_path / "run", 0
    for at in (count.calls // 3, count.calls // 3):
        stopped(folder, at, spec, count=3, resume=done > 0)
        done += at - 1
        assert journals(folder) == [f"{stage}-00000"]
    with asked() as rest, run(folder, spec, count=3, resume=True) as ledger:
        check_same(ledger, whole)
    assert rest.calls <= count.calls - done + 6  # looks at whether it is the same defense, and a gradient's call again


# --- the fast mode -----------------------------------------------------------------------------------------------------------

SMALL_CASCADE = {"iterations": 3, "eot_iter": 2, "coarse_steps": 1, "eps": 1 / 255, "shard": 5, "draws": 1, "paths": 0}


def test_the_fast_mode_sets_what_is_not_set():
    stages = Spec.of(attack="cascade", mode="fast", shard=16).stages()
    assert {(attack.drop, attack.batch) for attack in stages.values()} == {("majority", 4)}
    assert Spec.of(attack="cascade", mode="fast", batch=7).stages()["exact"].batch == 7
    stage = Spec.of(attack="cascade", mode="fast", drop="any").stages()["exact"]
    assert (stage.drop, stage.batch) == ("any", 4)  # who leaves is replaced by whatever rule
    stages = Spec.of(attack="cascade", mode="fast", attack_options={"exact.drop": "never"}).stages()
    assert [(attack.drop, attack.batch) for attack in stages.values()] == [("majority", 4)] * 2 + [("never", None)]
    assert Spec.of(attack=PGD(), mode="fast").stages()["pgd"] == PGD()
    assert Spec.of(attack="autoattack-rand", mode="fast").stages() == Spec.of(attack="autoattack-rand").stages()
    assert Spec.of(attack="cascade").stages()["exact"].drop == "never"
    with pytest.raises(ValueError, match="`mode` is one of 'full', 'fast', got 'quick'"):
        Spec.of(mode="quick")
    with pytest.raises(ValueError, match="`seeding` 'autoattack' attacks what AutoAttack would, and `mode` 'fast' does not"):
        Spec.of(mode="fast", seeding="autoattack")


def test_in_the_fast_mode_those_go_on_that_have_not_fallen(tmp_path):
    """Whatever one fresh draw says; and killed anywhere in the cascade it goes on with the same bits."""
    spec = Spec.of(attack="cascade", mode="fast", error=0.5, **SMALL_CASCADE)
    with asked() as count, run(tmp_path / "whole", spec) as ledger:
        whole, records = found(ledger), ledger.done()
    entered = {record.unit.stage: set(record.unit.images) for record in records.values()}
    first = records["transfer-3-00000"]
    assert entered["transfer-3"] == {0, 1, 2, 3, 4}
    assert set(first.result["onward"]) == set(first.onward) == entered.get("transfer-5", set())
    assert set(first.onward) < entered["transfer-3"]  # somebody left
    assert entered.get("exact", set()) <= entered["transfer-5"]
    folder, stops = tmp_path / "run", 0
    for at in (count.calls // 3, count.calls // 4):
        stopped(folder, at, spec, resume=stops > 0)
        stops += 1
    with run(folder, spec, resume=True) as ledger:
        check_same(ledger, whole)


@pytest.fixture(scope="module")
def cascaded(tmp_path_factory):
    """A fast cascade that nobody stopped, all of whose stages have images and whose batches are refilled."""
    spec = Spec.of(attack="cascade", mode="fast", error=0.5, batch=2, **SMALL_CASCADE)
    with run(tmp_path_factory.mktemp("cascade") / "whole", spec) as ledger:
        return spec, found(ledger)


@pytest.mark.parametrize("where", ["in a test", "after a refill", "in the last stage"])
def test_stopped_there_a_fast_cascade_goes_on_with_the_same_bits(tmp_path, monkeypatch, cascaded, where):
    spec, whole = cascaded
    look, ask, struck = Iterative._look, PGD.ask, []

    def strike():
        if not struck:
            struck.append(where)
            raise Stopped

    def looked(self, defense, asked, base, draws, *, apart):
        answer = look(self, defense, asked, base, draws, apart=apart)
        if where == "in a test" and base >= FALLEN:
            strike()
        return answer

    def climbed(self, defense, asked):
        answer = ask(self, defense, asked)
        refilled = self.batch == 2 and int(asked.images.max()) >= 2
        if where == "after a refill" and refilled or where == "in the last stage" and self.keep == "accuracy":
            strike()
        return answer

    monkeypatch.setattr(Iterative, "_look", looked)
    monkeypatch.setattr(PGD, "ask", climbed)
    with pytest.raises(Stopped):
        run(tmp_path / "run", spec)
    monkeypatch.undo()
    assert struck and len(journals(tmp_path / "run")) == 1
    with run(tmp_path / "run", spec, resume=True) as ledger:
        check_same(ledger, whole)


@pytest.mark.parametrize("mode", ["full", "fast"])
def test_all_and_only_those_go_on_that_the_attack_has_not_fooled(mode):
    """Without noise all draws agree: which they are is known beforehand."""
    x, y = grey(8)
    x += torch.linspace(-0.02, 0.02, 8).view(8, 1, 1, 1)
    model, stage = Linear(threshold=0.35).eval(), PGD(eps=0.01, iterations=4, eot_iter=2, step_size=0.005)
    with torch.no_grad():
        standing = (model(stage.run(Metered(model), x, y, seed=0).x_adv).argmax(dim=1) == y).nonzero()[:, 0].tolist()
    assert 1 < len(standing) < 8
    suite = Suite("twice", lambda norm, eps: dict.fromkeys("ab", stage))
    with evaluate(model, x, y, attack=suite, mode=mode, shard=8, draws=1, paths=0) as result:
        entered = {record.unit.stage: record.unit.images for record in result.ledger.done().values()}
    assert sorted(entered["a"]) == list(range(8)) or mode == "full"
    assert sorted(entered["b"]) == standing


def test_a_mode_in_which_nobody_leaves_is_not_called_fast():
    """AutoAttack's attacks have no test, nor has one that knows the judge's noise: the verdict says who goes on."""
    with pytest.raises(ValueError, match="is of a test by which images leave, and no stage has it: set `mode` to 'fast'"):
        Spec.of(attack="pgd-eot", error=0.1)
    with pytest.raises(ValueError, match="`error` is of a test by which images leave"):
        Spec.of(attack="cascade", mode="fast", drop="any", error=0.1)
    x, y = labelled(4)
    y[1] = (y[1] + 1) % 10
    options = {"mode": "fast", "iterations": 1, "eot_iter": 1, "draws": 1, "paths": 0, "shard": 4}
    known = Suite("known", lambda norm, eps: dict.fromkeys("ab", PGD(norm, eps, dw_box=True)))
    for attack in ("autoattack-rand", known):
        with evaluate(evaluation_cases.purified("cpu"), x, y, attack=attack, **options) as result:
            assert "in fast mode" not in result.title
            first, second = list(result.ledger.configuration["stages"])
            done = {record.unit.stage: record for record in result.ledger.done().values()}
        assert set(done[first].result["standing"]) == set(done[second].unit.images if second in done else ())
        assert 1 not in done[first].result["standing"]


@pytest.mark.parametrize("mode", ["full", "fast"])
def test_a_further_stage_lets_no_image_stand_that_had_fallen(mode):
    """By the official verdict: the suites' first stages are the same to the bit."""
    stage = PGD(eps=0.02, iterations=2, eot_iter=2, error=0.5)
    standing = []
    for names in ("a", "ab", "abc"):
        suite = Suite(names, lambda norm, eps, names=names: dict.fromkeys(names, stage))
        options = {"mode": mode, "shard": 8, "draws": 3, "paths": 0, "seed": 2}
        with evaluate(Linear(threshold=1.0, noise=1.0).eval(), *grey(24), attack=suite, **options) as result:
            official = result.verdicts["attacked"].official
            standing.append({image for image, stands in enumerate(official) if stands})
            told = {record.unit.stage for record in result.ledger.done().values()}
        assert told == {"clean", *names, "judge"}
    assert standing[0] > standing[1] > standing[2]


def test_who_left_in_the_fast_mode_and_stands_officially_is_told():
    """Two draws in three fail: most leave at the first stage, and one draw afterwards may be right all the same."""
    stage = PGD(iterations=1, eot_iter=2, error=0.5)
    for mode, names in (("fast", "ab"), ("fast", "a"), ("full", "ab")):
        suite = Suite("noisy", lambda norm, eps, names=names: dict.fromkeys(names, stage))
        options = {"mode": mode, "shard": 24, "draws": 3, "paths": 0, "drop": None, "seed": 2}
        with evaluate(Linear(threshold=-0.5, noise=1.0).eval(), *grey(24), attack=suite, **options) as result:
            left, official, text = result.verdicts["attacked"].left, result.verdicts["attacked"].official, result.table()
            assert ("noisy in fast mode, Linf" in result.title) == (mode == "fast")
            if (mode, names) != ("fast", "ab"):
                assert left == 0 and "had fallen by the test" not in text
                continue
            done = result.ledger.done()
            first, second = (next(record for record in done.values() if record.unit.stage == name) for name in names)
        cut = set(first.unit.images) - set(second.unit.images)
        assert cut == set(first.unit.images) - set(first.onward) and left == sum(official[image] for image in cut) > 0
        assert f"({left} image" in text


def test_a_plan_knows_what_coarse_steps_and_a_pilot_save(tmp_path, monkeypatch):
    coarse = {"transfer-3": 3, "transfer-5": 5}
    monkeypatch.setattr(planning, "probe", lambda *_, **__: Probe(1.0, 3.0, 1, 2, 20, None, coarse=coarse))
    spec = Spec.of(attack="cascade", t=0.06, num_steps=20, limit=10, draws=2, paths=0)
    found = plan(spec)
    stages = {stage.name: stage for stage in found.stages}
    assert [stages[name].steps for name in ("transfer-3", "transfer-5", "exact")] == [3, 5, None]
    gradients = 10 * 100 * 10
    assert stages["transfer-3"].seconds == pytest.approx(stages["transfer-3"].forward + gradients * 3.0 * 3 / 20)
    assert stages["exact"].seconds == pytest.approx(stages["exact"].forward + stages["exact"].gradient * 3.0)
    assert "gradient through 3 steps" in str(found) and not found.expected
    assert not found.errors and "stated error" not in str(found)
    pilot = Spec.of(attack="cascade", mode="fast", error=0.5, **SMALL_CASCADE)
    run(tmp_path / "pilot", pilot).close()
    small = plan(spec.but(mode="fast"), pilot=tmp_path / "pilot")
    assert Plan.from_dict(json.loads(json.dumps(small.to_dict()))) == small
    assert small.errors == dict.fromkeys(("transfer-3", "transfer-5", "exact"), 0.01)
    assert "with a probability of at most 0.01 and over all 3 stages 0.03; it is judged" in str(small)
    with Ledger(tmp_path / "pilot", read_only=True) as ledger:
        took = {stage.name: stage for stage in planning.happened(ledger)}
    for stage, most in zip(small.expected, small.stages, strict=True):
        assert stage.images == 2 * took[stage.name].images if stage.name in took else stage.images == 0
        assert stage.seconds <= most.seconds and stage.gradient <= most.gradient
    otherwise = "(there iterations 3, 3, 3; eot_iter 2, 2, 2; ball Linf 1/255; error 0.5)"
    assert small.expected[2].images < 10 and f"with the survival of {tmp_path / 'pilot'} {otherwise}:" in str(small)
    with pytest.raises(ValueError, match="has no stage diffhammer; it has clean, transfer-3, transfer-5, exact, judge"):
        plan(spec.but(attack="diffhammer"), pilot=tmp_path / "pilot")
    monkeypatch.setattr(planning, "probe", lambda *_, **__: pytest.fail("probed for a pilot that is no pilot of this"))
    with pytest.raises(ValueError, match="images left transfer-3 otherwise: `drop` was 'majority' there and is 'never' here"):
        plan(spec, pilot=tmp_path / "pilot")
    with pytest.raises(ValueError, match="has no stage"):
        plan(spec.but(attack="diffhammer"), pilot=tmp_path / "pilot")


# --- refused before any work -------------------------------------------------------------------------------------------------


def test_knobs_of_one_stage_come_before_those_of_all():
    made = {stage: attack.iterations for stage, attack in find("cascade").stages().items()}
    told = find("cascade").stages(settings={"exact.iterations": 7, "iterations": 9})
    assert made == {"transfer-3": 100, "transfer-5": 100, "exact": 50}
    assert {stage: attack.iterations for stage, attack in told.items()} == {"transfer-3": 9, "transfer-5": 9, "exact": 7}
    assert Spec.of(attack="cascade", **{"exact.iterations": 7}).stages()["exact"].iterations == 7
    for wrong in ("exact.coarse_steps", "third.iterations", "exact.", "iterations.exact"):
        with pytest.raises(ValueError, match="to set; it has .*STAGE.KNOB sets one stage's, of transfer-3, transfer-5, exact"):
            find("cascade").stages(settings={wrong: 2})


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("pgd-eot", {"losses": "ce,hinge"}, "`losses` is one or several of ce, margin, cw, dlr, with commas between, got"),
        ("pgd-eot", {"losses": ""}, "`losses` is one or several of"),
        ("pgd-eot", {"looks": -1}, "`looks` is at least 0, got -1"),
        ("pgd-eot", {"keep": "best"}, "`keep` is one of loss, last, accuracy, got 'best'"),
        ("pgd-eot", {"error": 1.0}, r"`error` is a probability in \(0, 1\), got 1.0"),
        ("pgd-eot", {"batch": 0}, "`batch` is at least 1, got 0"),
        ("pgd-eot", {"eot_first": 0}, "`eot_first` is at least 1, got 0"),
        ("pgd-eot", {"eot_first": 21}, "`eot_first` is at most `eot_iter` = 20, to which draws grow, got 21"),
        ("cascade", {"eot_first": 1}, "`keep` = 'accuracy' compares points by equally many draws, and with `eot_first`"),
        ("diffhammer", {"eot_first": 1}, "`keep` = 'loss' compares points by equally many draws, and with `eot_first`"),
        ("pgd-eot", {"iterations": 10**8}, "take more draws than there are"),
        ("diffhammer", {"sharpness": 0.0}, "`sharpness` is a finite number above 0, got 0.0"),
        ("diffhammer", {"rounds": 0}, "`rounds` is at least 1, got 0"),
        ("transfer", {"keep": "accuracy"}, "`keep` = 'accuracy' goes by looks at the real defense, and `looks` is 0"),
        ("transfer", {"keep": "loss"}, "`keep` is one of last, accuracy, got 'loss'"),
        ("transfer", {"coarse_steps": 0}, "`coarse_steps` is at least 1, got 0"),
        ("transfer", {"coarse_steps": 1.5}, "`coarse_steps` is an integer, or one for each level .*, got 1.5"),
        ("transfer", {"coarse_steps": [2, None]}, r"is an integer, or one for each level .*, got \[2, None\]"),
        ("stadv", {"smoothness": -1.0}, "`smoothness` is a finite number from 0, got -1.0"),
        ("stadv", {"reach": 0.0}, "`reach` is a finite number above 0, got 0.0"),
    ],
)
def test_bad_knobs_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        find(name).stages("Linf", EPS, settings)


@pytest.mark.parametrize(
    "attack, build, message",
    [
        (DiffHammer(), evaluation_cases.plain, "diffhammer needs gradients at purified images, and Sequential is no coupf"),
        (Transfer(coarse_steps=2), evaluation_cases.purified, "takes fewer than the defense's 2 steps, got 2"),
        (Transfer(), evaluation_cases.plain, "a Sequential is no coupfast.PurifiedClassifier"),
        (PGD(dw_box=True), evaluation_cases.plain, "`dw_box` is knowledge of a purification's noise, and Sequential is no"),
        (APGD(dw_box=True), evaluation_cases.plain, "`dw_box` is knowledge"),
    ],
    ids=["diffhammer", "transfer-steps", "transfer", "dw-box", "dw-box-apgd"],
)
def test_a_defense_that_an_attack_cannot_ask_is_refused_before_any_work(attack, build, message, tmp_path):
    with pytest.raises(ValueError, match=message) as refused:
        evaluate(build("cpu"), *labelled(2), attack=attack, out=tmp_path / "run")
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


def test_a_plan_refuses_what_a_run_would(tmp_path):
    with pytest.raises(ValueError, match="fewer than the defense's 4 steps, got 5"):
        plan(Spec.of(attack="transfer", t=0.06, num_steps=4, limit=1), probe_steps=1)


def test_copies_in_one_batch_are_those_of_looks_too():
    looking = PGD(eot_iter=3, looks=8)
    assert (PGD(eot_iter=3).replicas, looking.replicas, looking.gradient_replicas) == (3, 8, 3)
    assert (DiffHammer().replicas, DiffHammer().gradient_replicas) == (10, 1)
    assert (APGD(eot_iter=20, looks=20).replicas, APGD(eot_iter=20, looks=20).gradient_replicas) == (20, 1)
    tested = Transfer(eot_iter=2, drop="majority", error=0.01)
    assert tested.replicas == tested.more(2) == tested.needed == math.ceil(math.log2(7 / 0.01))  # 101 points, 7 tests at most


def test_a_method_without_steps_has_no_coarser_form():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Fixed(StepMethod):
        guided = False
        num_steps = 3

        def step(self, k, state, noise, networks):
            return state

    inner = evaluation_cases.purified("cpu")
    for method, message in (
        (Fixed(), "has no `num_steps` by which it could be made coarser"),
        (ReverseSDE(t=(0.1, 0.05, 0.01)), "'reverse-sde' has a whole grid as `t`, .*: set `t` to a number"),
    ):
        purifier = Purifier(inner.purifier.score, None, method=method, engine="eager")
        with pytest.raises(ValueError, match=message):
            Transfer(coarse_steps=1).check(Metered(PurifiedClassifier(purifier, inner.classifier)))


def multi_stage(device, num_steps=(3, 4), kind=MultiStage):
    """A defense of two levels, three rounds in all."""
    classifier = evaluation_cases.pixel_classifier()
    method = kind(levels=(0.003, 0.006), repeats=(2, 1), num_steps=num_steps)
    return PurifiedClassifier(Purifier(small_score(torch.float32), method=method, engine="eager"), classifier)


def test_rounds_are_attacked_through_few_steps_of_each(tmp_path):
    """As Lee and Kim say them, level by level; noising is one more of each round."""
    x, _ = labelled(3)
    metered, ids, draw = Metered(multi_stage("cpu")), torch.arange(3), torch.zeros(3, dtype=torch.int64)
    for said, each, count in ((1, (1, 1), 6), ((1, 2), (1, 2), 7)):
        assert torch.equal(metered.ask(x, ids, draw, View(steps=said)), multi_stage("cpu", each)(x, ids=ids, draw=draw))
        assert metered.coarser(said).purifier.num_steps == count
    spec = Spec.of(attack="transfer", coarse_steps=(1, 2), iterations=2, eot_iter=1, draws=1, paths=0, shard=5, limit=5)
    ledger = run(tmp_path / "run", spec, build=multi_stage)
    assert Spec.from_dict(json.loads(json.dumps(spec.to_dict()))).stages() == spec.stages()
    assert planning.probe(spec, x.shape[1:], defense=multi_stage, images=1, steps=1).coarse == {"transfer": 7}
    assert {stage.name: stage.steps for stage in planning.happened(ledger)} == {"clean": None, "transfer": 7, "judge": None}
    own = type("Own", (MultiStage,), {"name": "own"})  # of somebody else's
    rounds = Metered(multi_stage("cpu", kind=own))
    assert coarse_count(rounds.describe(), [1, 2]) == rounds.coarser((1, 2)).purifier.num_steps == 7
    for steps, message in (((1, 2, 3), "has 2 levels, got 3 numbers of steps"), ((3, 4), "fewer than the defense's 13 steps")):
        with pytest.raises(ValueError, match=message):
            Transfer(coarse_steps=steps).check(metered)
    with pytest.raises(ValueError, match=r"'coup' has 1 level, got 2 numbers of steps: \(1, 2\)"):
        Transfer(coarse_steps=(1, 2)).check(Metered(evaluation_cases.purified("cpu")))


def test_every_suite_stays_in_its_ball_from_anywhere():
    for norm, eps in (("Linf", 0.1), ("L2", 1.0)):
        x = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(3))
        far = ball.project(x + torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(4)), x, norm, eps)
        delta = (far - x).flatten(1)
        assert float((delta.abs().amax(dim=1) if norm == "Linf" else delta.norm(dim=1)).max()) <= eps + 1e-6
        assert float(far.min()) >= 0 and float(far.max()) <= 1
    assert {"diffhammer", "transfer", "cascade", "fixed-autoattack", "pgd-eot"} <= set(SUITES)
    assert Spec.of(attack="cascade", coarse_steps=2).stages()["transfer-3"].coarse_steps == 2
