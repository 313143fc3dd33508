"""Tables of coefficients against the drift and diffusion that they discretise."""

import numpy as np
import pytest
import torch

from coupfast.defenses import METHODS, recipe
from coupfast.sde import VPSDE, time_grid
from coupfast.solvers import SOLVERS


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("guidance_scale", [0.0, 0.7])
def test_rows_are_one_euler_step(solver, guidance_scale):
    sde, t = VPSDE(), time_grid(0.1, 9)
    table = SOLVERS[solver](sde, t, guidance_scale)
    generator = np.random.default_rng(0)
    x, eps_hat, g, z = generator.standard_normal((4, 50))
    for k in range(9):
        h, beta = t[k] - t[k + 1], sde.beta(t[k])
        score = -eps_hat / sde.sigma(t[k]) + guidance_scale * g
        if solver == "euler-maruyama":
            expected = x + h * (0.5 * beta * x + beta * score) + np.sqrt(beta * h) * z
        else:
            expected = x + h * (0.5 * beta * x + 0.5 * beta * score)
        a, b, c, d = table.row(k)
        # Ten operations on terms of order ten at most.
        np.testing.assert_allclose(a * x + b * eps_hat + c * g + d * z, expected, rtol=0, atol=10 * 10 * 2.0**-52)


def test_table_properties():
    table = SOLVERS["euler-maruyama"](VPSDE(), time_grid(0.1), 1.0)
    assert table.num_steps == 100
    assert table.guided
    np.testing.assert_allclose(table.labels[[0, -1]], [99.9, 0.999], rtol=1e-12)
    rows = table.tensor(dtype=torch.float32, device="cpu")
    assert rows.shape == (100, 4)
    assert tuple(rows[3].tolist()) == tuple(np.float32(v) for v in table.row(3))
    assert not SOLVERS["euler-maruyama"](VPSDE(), time_grid(0.1), 0.0).guided


def test_variance_of_the_noise_is_the_integral_of_beta():
    table = SOLVERS["euler-maruyama"](VPSDE(), time_grid(0.1), 1.0)
    # Left Riemann sum of the linear β: too large by half a step of the total rise of β.
    assert np.sum(table.d**2) == pytest.approx(0.1095, rel=0.02)


@pytest.mark.parametrize("name", METHODS)
def test_recipes(name):
    made = recipe(METHODS[name], sde=VPSDE(), t=0.1, guidance_scale=2.0)
    assert made.table.guided == (name == "coup")
    assert made.num_noises == (101 if name == "diffpure" else 100)
    if made.noising is not None:
        a, d = made.noising
        assert a**2 == pytest.approx(0.897018, abs=5e-7)
        assert a**2 + d**2 == pytest.approx(1.0, abs=1e-15)


def test_a_recipe_on_a_given_grid():
    grid = time_grid(0.1, 12)[::3]
    made = recipe(METHODS["reverse-sde"], sde=VPSDE(), t=grid)
    np.testing.assert_array_equal(made.table.t, grid)
