"""torchsde's reading of the SDE against the equations written out, and the published code's way of running it."""

import numpy as np
import pytest
import torch
import torchsde
from conftest import relu_classifier, small_score

from coupfast.reference import purify_published, purify_ref
from coupfast.sde import VPSDE, parity_grid, time_grid


def by_hand(x, score, classifier, noise, grid, dynamics, scale):
    """Zhang et al. 2024, eq. 5, with nothing shared but the networks."""
    for k in range(len(grid) - 1):
        t, h = grid[k], grid[k] - grid[k + 1]
        beta = 0.1 + t * 19.9
        sigma = np.sqrt(1 - np.exp(-0.5 * 19.9 * t**2 - 0.1 * t))
        s = -score(x, torch.full((len(x),), 999 * t, dtype=x.dtype)) / sigma
        if classifier is not None:
            point = x.detach().requires_grad_()
            confidence = torch.softmax(classifier(point / 2 + 0.5), dim=1).max(dim=1).values.log().sum()
            s = s + scale * torch.autograd.grad(confidence, point)[0]
        if dynamics == "euler-maruyama":
            x = x + h * (0.5 * beta * x + beta * s) + np.sqrt(beta * h) * noise[k]
        else:
            x = x + h * (0.5 * beta * x + 0.5 * beta * s)
    return x


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("dynamics", ["euler-maruyama", "probability-flow"])
def test_definition_is_the_equation(images, guided, dynamics):
    score, classifier = small_score(), relu_classifier() if guided else None
    grid = time_grid(0.1, 6)
    noise = torch.randn(6, *images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = purify_ref(2 * images - 1, score, classifier, noise, grid=grid, dynamics=dynamics, guidance_scale=1.5)
        with torch.enable_grad():
            expected = by_hand(2 * images - 1, score, classifier, noise, grid, dynamics, 1.5).detach()
    # Six steps; each evaluates σ, whose 1 − ᾱ loses up to twenty roundings here, and the networks magnify them.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_forward_noising_is_the_last_row(images):
    score, grid = small_score(), time_grid(0.1, 3)
    noise = torch.randn(4, *images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = 2 * images - 1
        found = purify_ref(x, score, None, noise, grid=grid, forward_noising=True)
        alpha_bar = np.prod(1 - np.linspace(0.1, 20, 1000)[:100] / 1000)
        noised = np.sqrt(alpha_bar) * x + np.sqrt(1 - alpha_bar) * noise[3]
        expected = purify_ref(noised, score, None, noise[:3], grid=grid)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("guided", [True, False])
def test_published_run_is_the_definition_on_its_own_grid_and_path(images, guided):
    """float32, with the increments of the published code's Brownian interval replayed as standard normal noise."""
    x = (2 * images - 1).float()
    score, classifier = small_score(torch.float32), relu_classifier(torch.float32) if guided else None
    t = 0.01
    with torch.no_grad():
        published = purify_published(x, score, classifier, t=t, entropy=5)
    grid = parity_grid(t)
    s = torch.from_numpy(1 - grid).float()
    path = torchsde.BrownianInterval(s[0], s[-1], size=x.flatten(1).shape, dtype=x.dtype, device=x.device, entropy=5)
    h = grid[:-1] - grid[1:]
    noise = torch.stack([path(s[k], s[k + 1]).view(x.shape) / float(np.sqrt(h[k])) for k in range(len(h))])
    with torch.no_grad():
        expected = purify_ref(x, score, classifier, noise, grid=grid)
    # The published code computes t and σ(t) in float32: near t = 1e-3, 1 − ᾱ = 1e-4 keeps three digits fewer than
    # float32 has, so β h/σ ε̂ of order 0.01 is off by up to 1e-3 of itself, in each of ten steps.
    torch.testing.assert_close(published, expected, rtol=0, atol=10 * 0.012 * 1e-3 * 5)
    assert not torch.equal(published, x)


@pytest.mark.parametrize("whole_steps", [True, False])
def test_published_gradient_walks_the_forward_grid_back_only_if_it_ends_on_a_whole_step(images, whole_steps):
    """float64, so that neither time nor σ is rounded: forwards the same either way, backwards its grid is shifted."""
    x = 2 * images[:2] - 1
    score, classifier = (network.requires_grad_(False) for network in (small_score(), relu_classifier()))
    s = [1 - 0.01]
    for _ in range(4):
        s.append(s[-1] + 1e-3)
    if not whole_steps:
        s[-1] -= 5e-4
    grid = 1 - np.asarray(s)
    path = torchsde.BrownianInterval(s[0], s[-1], size=x.flatten(1).shape, dtype=x.dtype, entropy=5)
    noise = torch.stack([path(a, b).view(x.shape) / np.sqrt(b - a) for a, b in zip(s[:-1], s[1:], strict=True)])
    weight = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    published = purify_published(one, score, classifier, t=0.01, t_end=float(grid[-1]), adjoint_params="none", entropy=5)
    definition = purify_ref(other, score, classifier, noise, grid=grid, detached=True, adjoint="frozen")
    # Four steps; 1 − ᾱ is 1e-3 here and loses four digits.
    torch.testing.assert_close(published, definition, rtol=0, atol=1e-11)
    (v,), (w,) = (torch.autograd.grad(end, start, weight) for end, start in ((published, one), (definition, other)))
    difference = float((v - w).norm() / w.norm())
    if whole_steps:
        assert difference < 1e-11
    else:
        assert difference > 1e-4


def test_published_run_costs_what_it_costs(images):
    """One drift call too many, and gradients of every weight of both networks."""
    x = (2 * images[:1] - 1).float()
    score, classifier = small_score(torch.float32), relu_classifier(torch.float32)
    calls = []
    score.register_forward_hook(lambda *_: calls.append(1))
    start = x.clone().requires_grad_()
    end = purify_published(start, score, classifier, t=0.1, t_end=0.1 - 2.5e-3)
    assert len(calls) == 3 + 1  # two steps of 1e-3, one of half that
    assert all(p.grad is not None for p in classifier.parameters())
    assert all(p.grad is None for p in score.parameters())
    end.sum().backward()
    assert all(p.grad is not None for p in score.parameters() if p.requires_grad)


@pytest.mark.parametrize("adjoint", ["frozen", "parameters"])
def test_continuous_adjoint_converges_to_the_discrete_gradient(images, adjoint):
    """The two differ by the step size: first order, so halving the steps halves the difference."""
    x = 2 * images[:2] - 1
    score, classifier = small_score(), relu_classifier()
    if adjoint == "frozen":
        score.requires_grad_(False)
        classifier.requires_grad_(False)
    weight = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    errors = []
    for steps in (10, 20, 40):
        # A smooth stretch of time, away from t = 0; the ODE, so that both step sizes see one path.
        grid = np.linspace(0.1, 0.08, steps + 1)
        noise = torch.zeros(steps, *x.shape, dtype=torch.float64)
        gradients = []
        for kind in ("none", adjoint):
            start = x.clone().requires_grad_()
            end = purify_ref(
                start, score, classifier, noise, grid=grid, dynamics="probability-flow", adjoint=kind, detached=True
            )
            gradients.append(torch.autograd.grad((end * weight).sum(), start)[0])
        errors.append(float((gradients[0] - gradients[1]).norm() / gradients[0].norm()))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.15)


def test_definition_uses_its_own_constants(images):
    """Another schedule changes the result: nothing is hard-wired."""
    score, grid = small_score(), time_grid(0.1, 3)
    noise = torch.zeros(3, *images.shape, dtype=torch.float64)
    with torch.no_grad():
        one = purify_ref(2 * images - 1, score, None, noise, grid=grid)
        other = purify_ref(2 * images - 1, score, None, noise, grid=grid, sde=VPSDE(0.2, 10.0))
    assert float((one - other).abs().max()) > 1e-3
