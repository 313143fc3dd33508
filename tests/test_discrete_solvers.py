"""Solvers of samplers: their tables against loops over the papers' equations, each other, and a law that is known."""

import itertools

import numpy as np
import pytest
import torch
from conftest import silu_classifier
from gaussian_law import exact_law, law_after
from torch import nn

from coupfast import Purifier, check_gradient
from coupfast.definition import Definition
from coupfast.methods import COUP, DiffPure
from coupfast.sde import VPSDE, DiscreteVPSDE, time_grid
from coupfast.solvers import (
    DDIM,
    SOLVERS,
    Ancestral,
    CoefficientTable,
    DPMSolverPP2M,
    SDEDPMSolver1,
    SDEDPMSolverPP2M,
    exponential,
    probability_flow,
)

F64 = torch.finfo(torch.float64).eps


class Score(nn.Module):
    """Two convolutions around a SiLU, with the label in between; predictions of order one, so that x̂0 leaves [-1, 1]."""

    def __init__(self, channels: int = 3, seed: int = 3) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(channels, 6, 3, padding=1), nn.Conv2d(6, channels, 3, padding=1)
        generator = torch.Generator().manual_seed(seed)
        for weight in self.parameters():
            weight.data = torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 0.3
        self.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.last(torch.nn.functional.silu(self.first(x) + labels[:, None, None, None] / 500))


def images(batch: int, channels: int = 3, size: int = 8) -> torch.Tensor:
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


SOLVED = [
    *("reverse-diffusion", "exponential"),
    *(DDIM(), DDIM(eta=0.6, clip_denoised=True), Ancestral(clip_denoised=True), Ancestral(variance="large")),
    *(SDEDPMSolver1(), SDEDPMSolver1(clip_denoised=True), DPMSolverPP2M(), DPMSolverPP2M(clip_denoised=True)),
    *(SDEDPMSolverPP2M(), SDEDPMSolverPP2M(clip_denoised=True, lower_order_final=False)),
]
GRIDDED = [(solver, "time") for solver in SOLVED] + [(SOLVED[3], "quadratic")]
GRIDDED += [(solver, "log-snr") for solver in SOLVED[1::2]]


def methods(solver, grid):
    said = {"t": 0.4, "num_steps": 6, "grid": grid, "solver": solver}
    return [COUP(guidance_scale=lambda t: 1.0 + 5.0 * t, **said), DiffPure(clamp=False, **said)]


@pytest.mark.parametrize(("solver", "grid"), GRIDDED, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_runs_are_the_papers_loops(solver, grid, batch):
    """Images and gradients, guided and noised, in float64, in one piece and from a state in the middle."""
    for method in methods(solver, grid):
        purifier = Purifier(Score(), silu_classifier(torch.float64), method=method, engine="eager", memory_budget="least")
        definition, ids, x = Definition(purifier), torch.arange(batch) + 4, images(batch)
        noise, weights = definition.noise(x, 7, ids, 1), torch.randn_like(x)
        losses = lambda purified: (purified * weights).flatten(1).sum(1)  # noqa: B023, E731
        expected, gradient = definition.gradient(x, noise, losses)
        leaf = x.clone().requires_grad_()
        found = purifier(leaf, seed=7, ids=ids, draw=1)
        (ours,) = torch.autograd.grad(losses(found).sum(), leaf)
        # Six steps of some ten operations each around a network of sums of 54 terms; log-SNR takes logarithms of small numbers.
        bound = 1000 * F64
        torch.testing.assert_close(found.detach(), expected, rtol=0, atol=bound * float(expected.abs().max()))
        torch.testing.assert_close(ours, gradient, rtol=0, atol=bound * float(gradient.abs().max()))
        if batch == 1:
            continue
        pieces, in_pieces = definition.gradient(x, noise, losses, steps_at_once=4)
        torch.testing.assert_close(pieces, expected, rtol=0, atol=bound * float(expected.abs().max()))
        torch.testing.assert_close(in_pieces, gradient, rtol=0, atol=bound * float(gradient.abs().max()))


@pytest.mark.parametrize("solver", SOLVED, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_certificate(solver, batch):
    method = methods(solver, "time")[(SOLVED.index(solver) + batch // 2) % 2]
    purifier = Purifier(Score(), silu_classifier(torch.float64), method=method, engine="eager")
    certificate = check_gradient(purifier, images(batch), images=batch, draws=0, directions=1)
    assert certificate.verdict == "exact" and certificate.relative_error < 1e-11
    # Central differences of smooth networks: no kink within their steps but the masks'.
    assert min(abs(row.difference - row.float64) / row.scale for row in certificate.derivatives) < 1e-6
    assert f"solver {solver if isinstance(solver, str) else solver.name}" in str(certificate)


@pytest.mark.parametrize("solver", SOLVED, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_gradcheck(solver, batch):
    """Four pixels, derivatives by differences."""
    for method in (DiffPure, COUP):
        made = method(t=0.3, num_steps=3, solver=solver, clamp=False, out_of_range="allow")
        classifier = nn.Sequential(nn.Flatten(), nn.Linear(4, 5, dtype=torch.float64), nn.SiLU())
        with torch.no_grad():
            classifier[1].weight.copy_(torch.linspace(-1, 1, 20, dtype=torch.float64).sin().view(5, 4) * 3)
        purifier = Purifier(Score(1), classifier.eval().requires_grad_(False), method=made, engine="eager")
        x = (0.3 + 0.4 * images(batch, 1, 2)).requires_grad_()
        # Every derivative of one image; of three along one direction, which takes a twelfth of the runs.
        told = {"eps": 1e-7, "atol": 1e-6, "rtol": 1e-5, "fast_mode": batch > 1}
        assert torch.autograd.gradcheck(lambda x, run=purifier: run(x, seed=2), x, **told)


# --- what the tables have in common -----------------------------------------------------------------------------------------


def assert_same_rows(a: CoefficientTable, b: CoefficientTable, rows=slice(None)) -> None:
    for name in "abcd":
        # A difference of square roots of numbers near each other, in a dozen roundings.
        np.testing.assert_allclose(getattr(a, name)[rows], getattr(b, name)[rows], rtol=1e-9, atol=1e-14, err_msg=name)


GRIDS = [time_grid(0.1, 9), time_grid(0.6, 5, grid="log-snr"), np.array([0.9, 0.5, 0.2, 0.15])]


@pytest.mark.parametrize("t", GRIDS, ids=len)
@pytest.mark.parametrize("sde", [VPSDE(), DiscreteVPSDE(), VPSDE(0.2, 12.0)], ids=str)
def test_identities(t, sde):
    ancestral = Ancestral()(sde, t, 2.0)
    assert_same_rows(ancestral, DDIM(eta=1.0)(sde, t, 2.0))
    # SDE-DPM-Solver++(1), the first step of the second order: x' = (σ_t/σ_s) e^{−h} x + α_t (1 − e^{−2h}) x̂0 + …
    assert_same_rows(ancestral, SDEDPMSolverPP2M()(sde, t, 2.0), slice(0, 1))
    alpha, sigma = np.sqrt(sde.alpha_bar(t)), sde.sigma(t)
    h = np.diff(np.log(alpha / sigma))
    weight = alpha[1:] * -np.expm1(-2.0 * h)
    np.testing.assert_allclose(ancestral.a, sigma[1:] / sigma[:-1] * np.exp(-h) + weight / alpha[:-1], rtol=1e-9)
    np.testing.assert_allclose(ancestral.b, -weight * sigma[:-1] / alpha[:-1], rtol=1e-9)
    # DDIM without noise is DPM-Solver-1, and what DPM-Solver++(2M) begins and ends with.
    ode = DDIM()(sde, t, 2.0)
    np.testing.assert_allclose(ode.b, -sigma[1:] * np.expm1(h), rtol=1e-9)
    second = DPMSolverPP2M()(sde, t, 2.0)
    assert_same_rows(ode, second, slice(0, 1))
    assert_same_rows(ode, second, slice(-1, None))
    assert not ode.d.any() and not second.d.any()
    # Variance β of "large" in all steps but the last.
    large = Ancestral(variance="large")(sde, t, 2.0)
    np.testing.assert_allclose(large.d[:-1] ** 2, 1.0 - (alpha[:-1] / alpha[1:])[:-1] ** 2, rtol=1e-9)
    assert large.d[-1] == ancestral.d[-1] and np.all(large.d >= ancestral.d)
    for table in (ancestral, ode, large, exponential(sde, t, 2.0), probability_flow(sde, t, 2.0)):
        np.testing.assert_allclose(table.c, -2.0 * sigma[:-1] * table.b, rtol=1e-12)  # guidance shifts the score


def test_ddim_of_the_chain_is_ho():
    """On Ho's 1000 steps, ancestral sampling has the coefficients that DDPM's paper writes."""
    index = np.arange(99, 0, -1)
    table = Ancestral(variance="large", clip_denoised=True)(DiscreteVPSDE(), (index + 1) / 1000, 0.0)
    beta = 1e-4 + (0.02 - 1e-4) * np.arange(1000) / 999
    alpha_bar = np.cumprod(1.0 - beta)
    index = index[:-1]
    np.testing.assert_allclose(table.a, 1.0 / np.sqrt(1.0 - beta[index]), rtol=1e-12)
    np.testing.assert_allclose(table.b, -beta[index] / np.sqrt((1.0 - alpha_bar[index]) * (1.0 - beta[index])), rtol=1e-10)
    np.testing.assert_allclose(table.d[:-1], np.sqrt(beta[index])[:-1], rtol=1e-10)
    np.testing.assert_allclose(table.m * np.sqrt(alpha_bar[index]), 1.0, rtol=1e-12)


@pytest.mark.parametrize("grid", ["log-snr", "quadratic"])
def test_grids(grid):
    sde = VPSDE()
    t = time_grid(0.3, 7, grid=grid, sde=sde)
    even = np.sqrt(t) if grid == "quadratic" else 0.5 * np.log(sde.alpha_bar(t) / sde.sigma(t) ** 2)
    assert t[0] == 0.3 and t[-1] == 1e-5 and np.all(np.diff(t) < 0)
    np.testing.assert_allclose(np.diff(even), np.diff(even).mean(), rtol=1e-9)
    assert len(time_grid(0.1, grid=grid)) == len(time_grid(0.1))
    np.testing.assert_array_equal(DiffPure(t=0.3, num_steps=7, grid=grid).times, t)


# --- convergence ------------------------------------------------------------------------------------------------------------

FIRST = ["euler-maruyama", "probability-flow", "reverse-diffusion", "exponential", DDIM(), DDIM(eta=0.5), Ancestral()]
FIRST += [Ancestral(variance="large"), SDEDPMSolver1()]
SHARES = {"probability-flow": 0.0, DDIM(): 0.0, DDIM(eta=0.5): 0.25}
ORDERS = [(solver, 1, SHARES.get(solver, 1.0)) for solver in FIRST]
ORDERS += [(DPMSolverPP2M(), 2, 0.0), (SDEDPMSolverPP2M(), 2, 1.0), (DPMSolverPP2M(lower_order_final=False), 2, 0.0)]


@pytest.mark.parametrize(("solver", "order", "share"), ORDERS, ids=str)
def test_order_of_convergence(solver, order, share):
    """Twice the steps, half the error of the law (a quarter for second order): weak order, on a Gaussian."""
    sde, fill = VPSDE(), SOLVERS.get(solver, solver) if isinstance(solver, str) else solver
    errors = []
    for steps in (200, 400):
        found = law_after(fill(sde, np.linspace(0.5, 0.05, steps + 1), 0.0), sde)
        errors.append([abs(a - b) for a, b in zip(found, exact_law(0.5, 0.05, sde, share), strict=True)])
    for moment, (coarse, fine) in enumerate(zip(*errors, strict=True)):
        measured = np.log2(coarse / fine)
        if max(coarse, fine) < 1e-13:  # ancestral steps and their like keep a Gaussian's mean to rounding, in any number
            assert moment == 0 and share == 1.0
            continue
        said = f"moment {moment + 1}: order {measured:.3f}, errors {coarse:.2e}, {fine:.2e}"
        assert order - 0.15 < measured < order + 0.6, said
        assert coarse < 0.01


def test_few_steps_of_second_order_are_nearer():
    """Ten steps in log-SNR: the law's error is a fraction of first order's, and SDE-DPM-Solver-1 leaves noise, as it says."""
    sde, t = VPSDE(), time_grid(0.1, 10, grid="log-snr")

    def error(solver):
        share = 0.0 if type(solver) in (DDIM, DPMSolverPP2M) else 1.0
        found, exact = law_after(solver(sde, t, 0.0), sde), exact_law(0.1, 1e-5, sde, share)
        return max(abs(a - b) for a, b in zip(found, exact, strict=True))

    assert error(DPMSolverPP2M()) < 0.3 * error(DDIM())
    assert error(SDEDPMSolverPP2M()) < 0.5 * error(Ancestral())
    table = SDEDPMSolver1()(sde, np.array([0.1, 1e-5]), 0.0)
    assert table.d[-1] == pytest.approx(float(sde.sigma(0.1) / np.sqrt(sde.alpha_bar(0.1))), rel=1e-4)


# --- clipping ---------------------------------------------------------------------------------------------------------------


def test_clipping_changes_what_leaves_the_range_only():
    score = Score()
    x = images(2)
    runs = [Purifier(score, method=DiffPure(t=0.4, num_steps=4, solver=DDIM(clip_denoised=clip))) for clip in (False, True)]
    plain, clipped = (run(x, seed=1, return_trajectory=True)[1] for run in runs)
    alpha, sigma = float(VPSDE().alpha_bar(0.4)) ** 0.5, float(VPSDE().sigma(0.4))
    image = (plain[0] - sigma * score(plain[0], torch.full((2,), 399.6, dtype=torch.float64))) / alpha
    inside = image.abs() <= 1.0
    assert 0.05 < inside.double().mean() < 0.95
    torch.testing.assert_close(plain[1][inside], clipped[1][inside], rtol=0, atol=0)
    assert (plain[1] - clipped[1])[~inside].abs().min() > 0.0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": "ddim", "eta": -0.1}, ValueError, "`eta` is finite and at least 0, got -0.1"),
        ({"solver": "ddim", "eta": float("nan")}, ValueError, "`eta` is finite"),
        ({"solver": "ddim", "eta": "much"}, TypeError, "`eta` is a number"),
        ({"eta": 0.5}, ValueError, "solver 'euler-maruyama' has no option `eta`; 'ddim' has it"),
        ({"solver": "dpm-solver\\+\\+-2m".replace("\\", ""), "eta": 0.5}, ValueError, "has no option `eta`"),
        ({"solver": "exponential", "clip_denoised": True}, ValueError, "has no option `clip_denoised`; 'ddim', "),
        ({"solver": "ddim", "clip_denoised": 1}, TypeError, "`clip_denoised` is True or False, got 1"),
        ({"solver": "ancestral", "variance": "huge"}, ValueError, "`variance` is one of 'small', 'large', got 'huge'"),
        ({"solver": "ddim", "eta": 2.0, "num_steps": 5}, ValueError, "take eta <= 1"),
        ({"solver": "reverse-diffusion", "t": 1.0, "num_steps": 5}, ValueError, r"step 0 \(t = 1 to 0.800002\) is one of 4"),
        ({"solver": "ddmi"}, ValueError, "did you mean 'ddim'"),
        ({"grid": "lambda"}, ValueError, "`grid` is one of 'time', 'log-snr', 'quadratic'"),
        ({"t": (0.1, 0.05), "grid": "quadratic"}, ValueError, "leave `grid` out"),
        ({"solver": "ddim", "gradient": "adjoint"}, ValueError, "is none that torchsde steps through"),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        Purifier(Score(), method=DiffPure, **options)


def test_solvers_are_told_apart_by_name():
    assert {name: solver().name for name, solver in SOLVERS.items() if isinstance(solver, type)} == {
        name: name for name, solver in SOLVERS.items() if isinstance(solver, type)
    }
    made = [solver() if isinstance(solver, type) else solver for solver in SOLVERS.values()]
    tables = [solver(VPSDE(), GRIDS[0], 0.0) for solver in made]
    assert all(a.sha256() != b.sha256() for a, b in itertools.combinations(tables, 2))
