"""Intervals against their defining equation."""

import math

import pytest

from coupfast.evaluation.protocols import wilson_interval


@pytest.mark.parametrize(("successes", "trials"), [(0, 20), (7, 20), (20, 20), (361, 512), (1, 1)])
def test_wilson_ends_solve_the_score_equation(successes, trials):
    z, found = 1.959964, successes / trials
    for end in wilson_interval(successes, trials):
        assert 0.0 <= end <= 1.0
        # (p̂ − p)² = z² p (1 − p) / n, or the end is a corner.
        assert (found - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / trials, abs=1e-14)


def test_512_images_give_four_points():
    low, high = wilson_interval(361, 512)
    assert (high - low) / 2 == pytest.approx(0.04, abs=0.002)


@pytest.mark.parametrize(("successes", "trials"), [(-1, 5), (6, 5), (0, 0)])
def test_impossible_counts(successes, trials):
    with pytest.raises(ValueError, match="0 <= successes <= trials"):
        wilson_interval(successes, trials)


def test_width_shrinks_with_the_root_of_the_count():
    widths = [wilson_interval(n // 2, n)[1] - wilson_interval(n // 2, n)[0] for n in (1000, 4000)]
    assert math.isclose(widths[0] / widths[1], 2, rel_tol=0.01)
