"""Ways of counting, on verdicts that can be counted by hand; intervals and tests against their definitions."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from evaluation_cases import SMALL, run

from coupfast.evaluation import protocols
from coupfast.evaluation.ledger import Ledger
from coupfast.evaluation.protocols import (
    OFFICIAL,
    PROTOCOLS,
    Comparison,
    Judged,
    accuracy,
    compare,
    contradictions,
    describe,
    judged,
    lower,
    mcnemar,
    resubmissions,
    scores,
    survival,
    table,
    wilson_interval,
)

# Predictions of three images in five draws; all labels are 0, of three classes.
PREDICTIONS = np.array([[0, 0, 1], [0, 1, 2], [0, 1, 0], [0, 0, 0], [0, 2, 1]])


def of(predictions, official=None, classes=3):
    predictions = np.asarray(predictions)
    images = predictions.shape[1]
    official = np.ones(images, bool) if official is None else np.asarray(official)
    return Judged(official, np.eye(classes)[predictions], np.zeros(images, int), sha256=tuple(map(str, range(images))))


@pytest.mark.parametrize(
    "protocol, expected",
    [
        ("official", [1, 0, 1]),
        ("single", [1, 1, 0]),
        ("worst", [1, 0, 0]),
        ("majority", [1, 0, 0]),  # 2:2:1 and 2:2:1: ties are wrong
        ("average", [1, 0.4, 0.4]),
    ],
)
def test_counted_by_hand(protocol, expected):
    np.testing.assert_allclose(scores(of(PREDICTIONS, [True, False, True]), protocol), expected)


def test_majority_is_a_plurality():
    np.testing.assert_array_equal(PROTOCOLS["majority"](np.eye(3)[[[0], [0], [1], [2], [0]]], np.array([0])), [1])
    np.testing.assert_array_equal(PROTOCOLS["majority"](np.eye(4)[[[0], [0], [1], [2], [3]]], np.array([0])), [1])


def test_mean_logits_can_be_right_where_the_majority_is_wrong():
    logits = np.array([[[9.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]]])
    assert PROTOCOLS["mean logits"](logits, np.array([0])) == [1]
    assert PROTOCOLS["majority"](logits, np.array([0])) == [0]


def test_accuracy_has_the_intervals_that_it_says():
    verdicts = of(PREDICTIONS, [True, False, True])
    assert accuracy(verdicts, OFFICIAL).wilson == wilson_interval(2, 3)
    assert accuracy(verdicts, OFFICIAL).bootstrap is None
    assert accuracy(verdicts, "average").wilson == wilson_interval(1.8, 3)
    assert accuracy(verdicts, "average").value == pytest.approx(0.6)
    assert describe("worst", 10) == "worst of 10 draws" and describe("mean logits", 3) == "mean logits of 3 draws"


def test_bootstrap_of_the_mean_has_its_spread():
    """Independent images and draws: the variance of the mean is p(1 − p)/(images draws) and the bootstrap's is known."""
    rng = np.random.default_rng(0)
    images, draws = 300, 20
    low, high = accuracy(of((rng.random((draws, images)) > 0.7).astype(int)), "average").bootstrap
    assert low < 0.7 < high
    # Resampling images and draws of independent cells counts each cell's variance three times (once a way, once for both).
    expected = 2 * 1.96 * np.sqrt(3 * 0.7 * 0.3 / (images * draws))
    assert (high - low) == pytest.approx(expected, rel=0.15)


def test_draws_that_agree_widen_nothing_and_draws_that_differ_do():
    rng = np.random.default_rng(1)
    by_image = np.tile((rng.random(200) > 0.7).astype(int), (10, 1))
    by_draw = np.tile((np.arange(10) % 2)[:, None], (1, 200))
    agree, differ = accuracy(of(by_image), "average"), accuracy(of(by_draw), "average")
    assert agree.bootstrap[1] - agree.bootstrap[0] == pytest.approx(2 * 1.96 * np.sqrt(0.7 * 0.3 / 200), rel=0.15)
    assert differ.bootstrap[1] - differ.bootstrap[0] == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 10), rel=0.15)


def test_worst_of_n_lies_in_its_interval():
    rng = np.random.default_rng(2)
    found = accuracy(of((rng.random((10, 100)) > 0.9).astype(int)), "worst")
    assert found.bootstrap[0] <= found.value <= found.bootstrap[1] < 0.6


def test_intervals_repeat():
    assert accuracy(of(PREDICTIONS), "average") == accuracy(of(PREDICTIONS), "average")


@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (5, 5), (10, 2), (3, 17), (40, 61)])
def test_mcnemar_is_a_binomial_test(counts):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(counts[0], sum(counts), 0.5).pvalue if sum(counts) else 1.0
    assert mcnemar(*counts) == pytest.approx(expected, rel=1e-12)


def test_paired_comparison():
    better = of(np.zeros((5, 20), int))
    worse = of(np.tile(np.repeat([0, 1], 10), (5, 1)))
    found = compare(better, worse, "single")
    assert (found.difference, found.only_first, found.only_second) == (0.5, 10, 0)
    assert found.p == pytest.approx(2 / 2**10) and found.conclusion == 1
    assert compare(worse, better, "single").conclusion == -1
    assert compare(better, better, "single").conclusion == 0
    assert compare(better, worse, "average").p is None and compare(better, worse, "average").conclusion == 1
    assert (found.images, found.draws) == (20, 5)


def test_what_two_runs_have_in_common_is_compared():
    """The first images of one set, in whatever order, and the first draws."""
    wrong = np.zeros((5, 6), int)
    wrong[:, 4:] = 1
    more = of(wrong)
    fewer = dataclasses.replace(of(np.zeros((3, 4), int)), sha256=("3", "1", "5", "9"))
    found = compare(more, fewer, "single")
    assert (found.images, found.draws) == (3, 3) and found.difference == pytest.approx(-1 / 3)
    assert compare(fewer, more, "single").difference == pytest.approx(1 / 3)
    assert compare(more, fewer, "official").difference == 0
    other = dataclasses.replace(fewer, labels=np.ones(4, int))
    with pytest.raises(ValueError, match="needs the same labels, and 3 of 3 images have others"):
        compare(more, other, "single")


def test_equal_images_are_compared_one_by_one():
    twice = dataclasses.replace(of(np.array([[0, 1, 0]])), sha256=("a", "a", "b"))
    assert (compare(twice, twice, "single").images, compare(twice, twice, "single").difference) == (3, 0.0)


def test_other_images_with_equal_labels_are_not_compared():
    first, second = (dataclasses.replace(of(PREDICTIONS), sha256=(f"{letter}1", f"{letter}2", f"{letter}3")) for letter in "ab")
    assert compare(first, first, "single").difference == 0
    with pytest.raises(ValueError, match="needs the same images, and of 3 and 3 images none is in both runs"):
        compare(first, second, "single")


def test_pairing_removes_what_is_common():
    """Two defenses that differ on few images: the interval of the difference is narrower than that of either."""
    rng = np.random.default_rng(3)
    first = (rng.random((4, 200)) > 0.6).astype(int)
    second = first.copy()
    second[:, :4] = 1
    found, alone = compare(of(first), of(second), "average"), accuracy(of(first), "average")
    assert found.interval[1] - found.interval[0] < (alone.bootstrap[1] - alone.bootstrap[0]) / 2


# --- M-resubmission ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 5])
def test_survival_is_the_share_of_subsets_without_a_failure(m):
    for n in range(6):
        wrong = [True] * n + [False] * (5 - n)
        subsets = list(itertools.combinations(wrong, m))
        expected = sum(not any(subset) for subset in subsets) / len(subsets)
        assert survival(np.array([n]), 5, m)[0] == pytest.approx(expected, abs=1e-15)


def test_survival_is_unbiased_where_the_plug_in_is_not():
    """Exactly: the expectation over all numbers of failures in ten draws, each failing with probability p."""
    for p, m in ((0.1, 3), (0.5, 2), (0.3, 10)):
        chance = np.array([math.comb(10, n) * p**n * (1 - p) ** (10 - n) for n in range(11)])
        failures = np.arange(11)
        assert float(chance @ survival(failures, 10, m)) == pytest.approx((1 - p) ** m, rel=1e-12)
        assert float(chance @ (1 - failures / 10) ** m) > (1 - p) ** m * 1.01
    with pytest.raises(ValueError, match=r"estimated for M in \[1, 10\], the judge's draws, got 11"):
        survival(np.array([0]), 10, 11)


def test_the_curve_begins_at_the_average_and_ends_at_the_worst():
    verdicts = of(PREDICTIONS)
    curve = resubmissions(verdicts)
    assert len(curve) == 5 and [one.value for one in curve] == sorted((one.value for one in curve), reverse=True)
    assert curve[0].value == pytest.approx(accuracy(verdicts, "average").value)
    assert (curve[-1].value, curve[-1].wilson) == (accuracy(verdicts, "worst").value, accuracy(verdicts, "worst").wilson)
    # Three of five draws fail on images 1 and 2: of 10 pairs one has no failure.
    assert curve[1].value == pytest.approx((1 + 0.1 + 0.1) / 3)


def test_the_interval_of_the_curve_covers():
    """Of 60 samples of 100 images, whose probabilities differ, at most 9 may miss at 95 % (binomial: 1 in 1000 has more)."""
    rng = np.random.default_rng(5)
    truth, missed = 0.5 * sum((1 - p) ** 3 for p in (0.05, 0.6)), 0
    for _ in range(60):
        p = np.where(rng.random(100) < 0.5, 0.05, 0.6)
        low, high = resubmissions(of((rng.random((8, 100)) < p).astype(int)))[2].bootstrap
        missed += not low <= truth <= high
    assert missed <= 9


# --- the lower of two attacks ------------------------------------------------------------------------------------------------


def test_the_lower_of_two_attacks_is_not_what_stands_under_both():
    first = of([[0, 0, 0, 1]], official=[True, True, True, False])
    second = of([[1, 0, 1, 0]], official=[False, True, False, True])
    for protocol in (OFFICIAL, "single", "average"):
        one, both = lower(first, second, protocol)
        assert (one.value, both.value) == (0.5, 0.25) and one.wilson == wilson_interval(2, 4)
        assert one.bootstrap[0] <= one.value <= one.bootstrap[1]
        swapped = lower(second, first, protocol)
        assert (swapped[0].value, swapped[1].value) == (0.5, 0.25)


def test_verdicts_inside_of_an_attack_are_those_of_its_worst_point():
    verdicts = dataclasses.replace(of(PREDICTIONS), inside=np.array([0.0, 0.25, 1.0]), inside_draws=4)
    np.testing.assert_allclose(scores(verdicts, "inside average"), [1, 0.75, 0])
    np.testing.assert_allclose(scores(verdicts, "inside worst"), [1, 0, 0])
    lines = table({"clean": of(PREDICTIONS), "attacked": verdicts}).splitlines()
    (average,) = [line for line in lines if line.startswith("inside the attack, average of 4")]
    assert average[34:72].strip() == "" and average[72:].split()[:3] == ["58.3", "%", "(1.8/3)"]
    with pytest.raises(ValueError, match="is a verdict of attacks that look at their own points"):
        scores(of(PREDICTIONS), "inside worst")


def conclusion(sign):
    return Comparison(0.1 * (sign or 1), (0, 1), None, None, 0.01 if sign else 0.5)


def test_contradictions():
    names = ("A", "B")
    assert contradictions(names, {"single": conclusion(1), "worst": conclusion(1)}) == []
    assert contradictions(names, {"single": conclusion(0), "worst": conclusion(0)}) == []
    assert contradictions(names, {"single": conclusion(1), "worst": conclusion(-1)}) == [
        "A is better by 'single', B by 'worst'"
    ]
    assert contradictions(names, {"single": conclusion(-1), "worst": conclusion(0)}) == [
        "B is better by 'single', which 'worst' cannot confirm"
    ]


def test_columns_hold_averages_and_many_images(monkeypatch):
    monkeypatch.setattr(protocols, "RESAMPLES", 20)  # the bootstrap is not in this table
    for verdicts in (of(PREDICTIONS), of(np.zeros((2, 10000), int))):
        lines = table({"clean": verdicts, "attacked": verdicts}).splitlines()
        assert len({line.rindex("[") for line in lines[1:-1]}) == 1
        assert "2-resubmission, all 2 right" in lines[7] or len(verdicts.logits) == 2
        assert lines[-1].startswith("official: 1 draws")
    assert "(1.8/3)" in table({"clean": of(PREDICTIONS)}) and "(1/3)" in table({"clean": of(PREDICTIONS)})


def test_reads_a_run(tmp_path):
    with run(tmp_path / "run") as ledger:
        found = judged(ledger)
        standing = {image for name, r in ledger.done().items() if name.startswith("clean") for image in r.result["standing"]}
    assert set(found) == {"clean", "attacked"}
    assert found["clean"].logits.shape == (3, 5, 10)
    assert set(np.flatnonzero(found["clean"].official)) == standing
    assert found["attacked"].official.sum() < found["clean"].official.sum()
    assert not (found["attacked"].official & ~found["clean"].official).any()
    assert scores(found["attacked"], "average").mean() < scores(found["clean"], "average").mean()


def test_the_official_verdict_has_a_baseline_of_as_many_draws():
    clean, attacked = of(PREDICTIONS), dataclasses.replace(of(PREDICTIONS), looks=3)
    *_, line = table({"clean": clean, "attacked": attacked}).splitlines()
    assert line.startswith("official: 3 draws must all be right where there was an attack, one where there was none; of clean")
    low, high = wilson_interval(1, 3)  # of the first three draws all are right about image 0 only
    assert line.endswith(f"images 33.3 % (1/3) [{100 * low:.1f}, {100 * high:.1f}] are right in 3 of the judge's draws")
    many = dataclasses.replace(attacked, looks=6)
    assert "what 6 draws alone cost, 6 or more of the judge's would tell" in table({"clean": clean, "attacked": many})
    cut = dataclasses.replace(attacked, left=1)
    said = "(1 image that stands here had fallen by the test of an attack: fewer draws, and no later attack); of clean"
    assert said in table({"clean": clean, "attacked": cut})


def test_an_attack_that_changes_nothing_meets_its_baseline(tmp_path):
    """With as many judge's draws as the official verdict looks, a tiny radius leaves the baseline and no attack."""
    spec = dataclasses.replace(SMALL, eps=1e-9, draws=3)
    with run(tmp_path / "run", spec) as ledger:
        found = judged(ledger)
    assert found["attacked"].looks == 3 and found["clean"].looks == 1
    np.testing.assert_array_equal(scores(found["attacked"], "worst"), scores(found["clean"], "worst"))


def test_without_an_attack_there_is_nothing_attacked(tmp_path):
    spec = SMALL.but(attack="none")
    with run(tmp_path / "run", spec) as ledger:
        assert set(judged(ledger)) == {"clean"}


def test_an_unfinished_run_says_so(tmp_path):
    run(tmp_path / "run").close()
    (tmp_path / "run" / "units" / "judge-00001.safetensors").unlink()
    with Ledger(tmp_path / "run") as ledger:
        ledger.forget_damaged()
        with pytest.raises(ValueError, match="not finished: 3 of 5 images are judged; .*coupfast evaluate --resume"):
            judged(ledger)
