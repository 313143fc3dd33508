"""Tables of coefficients against the drift and diffusion that they discretise."""

import dataclasses

import numpy as np
import pytest
import torch

from coupfast.methods import COUP, METHODS, ReverseSDE
from coupfast.sde import VPSDE, time_grid
from coupfast.solvers import SOLVERS, CoefficientTable


@pytest.mark.parametrize("solver", ["euler-maruyama", "probability-flow"])
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


@pytest.mark.parametrize("name", ["coup", "reverse-sde", "diffpure"])
def test_recipes(name):
    made = METHODS[name](t=0.1, **({"guidance_scale": 2.0} if name == "coup" else {})).recipe()
    assert made.table.guided == (name == "coup")
    assert made.num_noises == (101 if name == "diffpure" else 100)
    if made.noising is not None:
        a, d = made.noising
        assert a**2 == pytest.approx(0.897018, abs=5e-7)
        assert a**2 + d**2 == pytest.approx(1.0, abs=1e-15)


def test_a_recipe_on_a_given_grid():
    grid = time_grid(0.1, 12)[::3]
    made = ReverseSDE(t=grid).recipe()
    np.testing.assert_array_equal(made.table.t, grid)


def test_guidance_as_a_function_of_time():
    """Each row has the scale of its own time; a constant function is the number."""
    grid = time_grid(0.1, 5)
    table = COUP(t=0.1, num_steps=5, guidance_scale=lambda t: 3.0 * t).recipe().table
    h, beta = grid[:-1] - grid[1:], VPSDE().beta(grid[:-1])
    np.testing.assert_allclose(table.c, 3.0 * grid[:-1] * beta * h, rtol=4 * 2.0**-52)
    constant = COUP(t=0.1, num_steps=5, guidance_scale=lambda t: 2.0).recipe().table
    assert constant.sha256() == COUP(t=0.1, num_steps=5, guidance_scale=2.0).recipe().table.sha256() != table.sha256()


EXTRA = {name: np.full(3, 0.5) for name in "ef"} | {name: np.array([0.0, 0.5, 0.5]) for name in "pq"}


@pytest.mark.parametrize("columns", [(), ("e",), ("f",), ("p",), ("q",), ("e", "f", "p", "q")], ids="".join)
def test_extended_tables(columns):
    table = CoefficientTable(np.linspace(0.1, 0.01, 4), *np.ones((4, 3)), **{name: EXTRA[name] for name in columns})
    assert table.extended == bool(columns)
    assert table.two_step == bool(set(columns) & {"p", "q"})
    assert len(table.row(1)) == (8 if columns else 4)
    assert table.row(2)[4:] == tuple(EXTRA[name][2] if name in columns else 0.0 for name in "efpq" if columns)
    assert tuple(table.tensor(dtype=torch.float64, device="cpu")[1].tolist()) == table.row(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": np.ones(2)}, r"column a has shape \(2,\), and 4 times make 3 steps"),
        ({"e": np.ones(4)}, "column e has shape"),
        ({"b": np.array([1.0, np.nan, 1.0])}, "column b .* not finite, the first in step 1"),
        ({"p": np.ones(3)}, "column p of step 0 asks for the step before it"),
        ({"t": np.ones(1)}, "K \\+ 1 times"),
    ],
)
def test_tables_that_make_no_sense(change, message):
    columns = {"t": np.linspace(0.1, 0.01, 4), **{name: np.ones(3) for name in "abcd"}} | change
    with pytest.raises(ValueError, match=message):
        CoefficientTable(**columns)


def test_a_row_that_only_mixes_asks_no_network():
    table = CoefficientTable(np.linspace(0.1, 0.01, 4), np.ones(3), np.array([1.0, 0.0, 0.0]), np.zeros(3), np.ones(3))
    assert [table.evaluates(k) for k in range(3)] == [True, False, False]
    later = dataclasses.replace(table, q=np.array([0.0, 0.0, 1.0]))  # step 2 reads what the network said in step 1
    assert [later.evaluates(k) for k in range(3)] == [True, True, False]
