"""The SDE's constants and the time grid, against the values of the literature."""

import numpy as np
import pytest

from coupfast.sde import VPSDE, parity_grid, time_grid


@pytest.mark.parametrize(
    ("t", "beta", "root_alpha_bar", "sigma", "ratio"),
    [
        (0.1, 2.09, 0.94672, 0.32205, 6.49),
        (0.075, 1.5925, 0.96876, 0.24798, 6.42),
        (1e-3, 0.1199, 0.99995, 0.010485, 11.43),
        (1e-5, 0.1002, 1.0, 0.0010005, 100.1),
    ],
)
def test_values(t, beta, root_alpha_bar, sigma, ratio):
    sde = VPSDE()
    # The expected values are rounded to the digits shown.
    assert sde.beta(t) == pytest.approx(beta, abs=5e-5)
    assert np.sqrt(sde.alpha_bar(t)) == pytest.approx(root_alpha_bar, abs=5.1e-6)
    assert sde.sigma(t) == pytest.approx(sigma, rel=1e-4)
    assert sde.beta(t) / sde.sigma(t) == pytest.approx(ratio, rel=1e-3)


def test_alpha_bar_integrates_beta():
    sde, t = VPSDE(), np.linspace(0, 0.1, 100_001)
    integral = np.sum(0.5 * (sde.beta(t)[1:] + sde.beta(t)[:-1]) * np.diff(t))
    assert integral == pytest.approx(0.1095, abs=1e-9)
    # d log ᾱ / dt = −β; the trapezoid is exact for a linear β.
    assert -sde.log_alpha_bar(0.1) == pytest.approx(integral, rel=1e-12)


def test_sigma_keeps_its_digits_near_zero():
    # σ² = 1 − ᾱ = x − x²/2 + …, x = −log ᾱ
    x = -VPSDE().log_alpha_bar(1e-5)
    assert VPSDE().sigma(1e-5) ** 2 == pytest.approx(x - x**2 / 2 + x**3 / 6, rel=1e-14)


def test_discrete_alpha_bar_is_the_product():
    beta_i = np.linspace(0.1, 20, 1000) / 1000
    assert VPSDE().discrete_alpha_bar(0.1) == pytest.approx(np.prod(1 - beta_i[:100]), rel=1e-13)
    assert VPSDE().discrete_alpha_bar(0.1) == pytest.approx(0.897018, abs=5e-7)
    assert VPSDE().alpha_bar(0.1) == pytest.approx(0.896282, abs=5e-7)
    between = VPSDE().discrete_alpha_bar(0.0755)
    assert VPSDE().discrete_alpha_bar(0.076) < between < VPSDE().discrete_alpha_bar(0.075)


def test_reference_grid():
    grid = time_grid(0.1)
    assert len(grid) == 101
    np.testing.assert_allclose(grid[:-1], np.arange(100, 0, -1) / 1000, rtol=0, atol=2e-17)
    assert grid[-1] == 1e-5
    assert grid[-2] - grid[-1] == pytest.approx(9.9e-4)


@pytest.mark.parametrize(
    ("t", "steps"), [(0.1, 100), (0.075, 75), (0.0751, 76), (1e-3, 1), (5e-4, 1), (0.10001, 100), (1.0, 1000)]
)
def test_reference_grid_counts(t, steps):
    grid = time_grid(t)
    assert len(grid) == steps + 1
    assert grid[0] == t
    assert np.all(np.diff(grid) < 0)
    assert np.max(-np.diff(grid)) <= 1e-3 + 1e-15


def test_equal_steps():
    grid = time_grid(0.1, 7)
    assert (grid[0], grid[-1], len(grid)) == (0.1, 1e-5, 8)
    np.testing.assert_allclose(np.diff(grid), -(0.1 - 1e-5) / 7, rtol=1e-12)


@pytest.mark.parametrize("t", [0.1, 0.075, 0.05, 0.15])
def test_parity_grid_is_the_reference_grid_to_float32(t):
    grid, exact = parity_grid(t), time_grid(t)
    # One rounding of s ≤ 1 a step, 150 steps at most, half an ulp of 2⁻²⁴ each.
    steps = min(len(grid), len(exact)) - 1
    np.testing.assert_allclose(grid[:steps], exact[:steps], rtol=0, atol=150 * 2**-24)
    assert grid[-1] == pytest.approx(1e-5, abs=2**-24)


def test_parity_grid_takes_the_reference_grids_steps_at_every_step_of_the_chain():
    for n in range(1, 1001):
        grid, exact = parity_grid(n / 1000), time_grid(n / 1000)
        assert len(grid) == len(exact) == n + 1
        # One rounding of s ≤ 1 a step, half an ulp of 2⁻²⁴ each, and one of the start.
        assert np.abs(grid - exact).max() <= (n + 1) * 2**-25


@pytest.mark.parametrize(("above", "more"), [(-1e-6, 0), (9e-6, 1), (1.1e-5, 0)])
def test_parity_grid_may_take_one_more_step_just_above_one_of_the_chain(above, more):
    t = 0.1 + above
    assert len(parity_grid(t)) == len(time_grid(t)) + more


@pytest.mark.parametrize("t", [0.0, 1e-5, -0.1, 1.5, float("nan"), 100])
def test_t_out_of_range(t):
    with pytest.raises(ValueError, match=r"continuous time in \(1e-5, 1\], got"):
        time_grid(t)


@pytest.mark.parametrize("num_steps", [0, -3])
def test_num_steps_out_of_range(num_steps):
    with pytest.raises(ValueError, match="at least 1, got"):
        time_grid(0.1, num_steps)


@pytest.mark.parametrize("num_steps", [2.5, "ten", True])
def test_num_steps_not_an_integer(num_steps):
    with pytest.raises(TypeError, match="`num_steps`"):
        time_grid(0.1, num_steps)


@pytest.mark.parametrize("schedule", [(-0.1, 20.0), (20.0, 0.1), (0.0, 0.0), (0.1, float("inf"))])
def test_impossible_schedule(schedule):
    with pytest.raises(ValueError, match="beta_min"):
        VPSDE(*schedule)
