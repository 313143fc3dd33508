"""What somebody adds from a folder outside of the package, without editing it: each has all that a shipped one has."""

import sys
import textwrap

import pytest
import torch
from conftest import explicit_noise, relu_classifier, small_score, squares_gradient

import coupfast
from coupfast import PurifiedClassifier, Purifier, Settings
from coupfast.engine.memory import AllocationAccount

OUTSIDE = '''
import dataclasses
import numpy as np
import torch
from coupfast import CoefficientTable, StepMethod, TableMethod
from coupfast.methods import Recipe
from coupfast.options import option
from coupfast.solvers import SDEDPMSolverPP2M


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pull(TableMethod):
    """Two noises, the input again, and the step before: every column that a table has."""

    strength: float = option(0.3, help="how far back to the input each step goes, in [0, 1]", parse=float)
    guided = True

    def __post_init__(self):
        if not 0 <= self.strength <= 1:
            raise ValueError(f"`strength` is in [0, 1], got {self.strength}")

    def recipe(self):
        t = np.linspace(0.1, 0.02, 5)
        ones = np.ones(4)
        later = np.array([0.0, 1.0, 1.0, 1.0])
        return Recipe(
            CoefficientTable(
                t, 0.7 * ones, -0.1 * ones, 0.05 * ones, 0.1 * ones,
                e=self.strength * ones, f=0.05 * ones, p=0.1 * later, q=0.03 * later,
            ),
            noising=(0.95, 0.3),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LineSearch(StepMethod):
    """What no table can be: a step whose length depends on the image, and one that stops."""

    num_steps: int = 3
    guided = True

    def start(self, x_in, noise):
        return x_in + 0.2 * noise.z(0, x_in), torch.ones_like(x_in[:, :1, :1, :1])

    def step(self, k, state, noise, networks):
        x, going = state
        direction = networks.guidance(x) - networks.eps_hat(x, 0.05)
        length = 0.1 / (1 + direction.square().mean(dim=(1, 2, 3), keepdim=True))
        x = (x + going * length * direction + 0.01 * noise.z(k, x)).clamp(-1.2, 1.2)
        return x, going * torch.sigmoid(40 * (length - 0.01))

    def finish(self, state):
        return torch.tanh(state[0])


def heun_like(sde, t, guidance_scale):
    """A solver: one function that fills a table."""
    h, beta, sigma = t[:-1] - t[1:], sde.beta((t[:-1] + t[1:]) / 2), sde.sigma(t[:-1])
    return CoefficientTable(t, 1 + beta * h / 2, -beta * h / sigma, guidance_scale * beta * h, np.sqrt(beta * h))


def clipped(sde, t, guidance_scale):
    """The predicted image is clipped, and what a step reads of the one before carries that one's guidance."""
    return SDEDPMSolverPP2M(clip_denoised=True)(sde, t, guidance_scale)


def rising(t):
    return 30 * (0.11 - t)
'''


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """The module `purifiers_from_outside`, which is found by name only."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "purifiers_from_outside.py").write_text(textwrap.dedent(OUTSIDE))
    sys.path.insert(0, str(folder))
    yield "purifiers_from_outside"
    sys.path.remove(str(folder))
    sys.modules.pop("purifiers_from_outside", None)


METHODS = {
    "table": {"method": "purifiers_from_outside:Pull", "strength": 0.25},
    "step function": {"method": "purifiers_from_outside:LineSearch", "num_steps": 4},
    "solver": {"solver": "purifiers_from_outside:heun_like", "num_steps": 3},
    "solver that clips": {"solver": "purifiers_from_outside:clipped", "num_steps": 3, "t": 0.4},
    "schedule": {"guidance_scale": "purifiers_from_outside:rising", "num_steps": 3},
    "grid": {"t": (0.1, 0.05, 0.02, 0.001)},
}


@pytest.fixture(params=METHODS, ids=str)
def options(request, outside):
    return METHODS[request.param]


def test_its_certificate_says_exact(options, images):
    classifier = relu_classifier()
    defense = PurifiedClassifier(Purifier(small_score(), classifier, **options), classifier, seed=5)
    found = coupfast.check_gradient(defense, images, images=2, draws=0, directions=1)
    assert found.verdict == "exact" and found.holds
    assert found.relative_error < 1e-12
    assert found.forward_error < 1e-12
    # Smooth away from kinks: the definition's own differences agree, so it is the gradient of what is computed.
    assert min(abs(row.difference - row.float64) / row.scale for row in found.derivatives) < 1e-4


@pytest.mark.parametrize("batch", [1, 3])
def test_what_is_kept_and_how_it_is_split_changes_nothing(options, images, batch):
    score, classifier, x = small_score(), relu_classifier(), images[:batch]
    whole = Purifier(score, classifier, memory_budget="least", **options)
    expected = squares_gradient(whole, x, seed=3, draw=1)
    auto = squares_gradient(Purifier(score, classifier, **options), x, seed=3, draw=1)
    torch.testing.assert_close(auto, expected, rtol=0, atol=0)
    plan = whole.plan(batch)
    split = Purifier(score, classifier, memory_budget=plan.least_bytes, **options)
    assert split.plan(batch).storage.piece == 1
    # Another batch shape: other kernels, so rounding.
    found = squares_gradient(split, x, seed=3, draw=1)
    assert float((found - expected).norm() / expected.norm()) < 1e-12
    alone = [squares_gradient(whole, x[i : i + 1], seed=3, draw=1, ids=[i]) for i in range(batch)]
    assert float((torch.cat(alone) - expected).norm() / expected.norm()) < 1e-12


def test_gradient_of_explicit_noise(options, images):
    purifier = Purifier(small_score(), relu_classifier(), **options)
    noise = explicit_noise(purifier, images[:2])
    (found,) = torch.autograd.grad(purifier(images[:2], noise=noise).square().sum(), noise)
    direction = torch.randn(noise.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    h = 1e-8
    with torch.no_grad():
        above, below = (purifier(images[:2], noise=noise + s * h * direction).square().sum() for s in (1, -1))
    expected = float((found * direction).sum())
    assert float(above - below) / (2 * h) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert all(float(row.abs().max()) > 0 for row in found), "every row of noise is read"


def test_settings_come_back_from_json(options, images):
    import json

    settings = Purifier(small_score(), relu_classifier(), **options).settings
    again = Settings.from_dict(json.loads(json.dumps(settings.to_dict())))
    assert again.to_dict() == settings.to_dict()
    x = images[:1]
    runs = [Purifier(small_score(), relu_classifier(), settings=each)(x, seed=1) for each in (settings, again)]
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


def test_a_method_that_changed_since_is_noticed(outside):
    fields = Settings.of(method=f"{outside}:Pull").to_dict()
    fields["method"]["strength"] = 0.5
    with pytest.raises(ValueError, match="takes other steps now"):
        Settings.from_dict(fields)


def test_memory_of_a_step_function_is_constant_in_its_steps(outside):
    """States, and one step's graph: from 4 to 64 steps only states are added, as planned."""
    score, classifier = small_score(torch.float32), relu_classifier(torch.float32)
    image = torch.rand(2, 3, 8, 8).requires_grad_()
    peaks = {}
    for steps in (4, 64):
        purifier = Purifier(score, classifier, method=f"{outside}:LineSearch", num_steps=steps, memory_budget="least")
        plan = purifier.plan(2)
        with AllocationAccount([image, *score.parameters(), *classifier.parameters()]) as account:
            purifier(image, seed=0).sum().backward()
        peaks[steps] = account.peak
        assert account.peak == pytest.approx(plan.peak_bytes, rel=0.25)
    state = 2 * (3 * 8 * 8 + 1) * 4
    assert peaks[64] - peaks[4] == pytest.approx(60 * state, rel=0.1)


def test_a_trajectory_of_a_step_function(outside, images):
    purifier = Purifier(small_score(), relu_classifier(), method=f"{outside}:LineSearch", num_steps=4)
    purified, states = purifier(images, seed=0, return_trajectory=True)
    assert states.shape == (5, *images.shape)
    torch.testing.assert_close(purified, (torch.tanh(states[-1]) + 1) / 2, rtol=0, atol=0)
    assert purifier.engine == "eager"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.at_all:X", "importing nowhere.at_all gives ModuleNotFoundError.*sys.path"),
        ("purifiers_from_outside:Push", "has no 'Push'; it has "),
        ("purifiers_from_outside:heun_like", "is a function, and a coupfast.methods.base.Method is wanted"),
        ("purifiers_from_outside:", "`method` is one of 'coup'"),
    ],
)
def test_names_that_name_nothing(outside, name, message):
    with pytest.raises(ValueError, match=message):
        Purifier(small_score(), relu_classifier(), method=name)


def test_its_own_checks_are_heard(outside):
    with pytest.raises(ValueError, match=r"`strength` is in \[0, 1\], got 2"):
        Purifier(small_score(), relu_classifier(), method=f"{outside}:Pull", strength=2)
    with pytest.raises(TypeError, match="no option `strenght`; did you mean 'strength'"):
        Purifier(small_score(), relu_classifier(), method=f"{outside}:Pull", strenght=0.2)
    with pytest.raises(ValueError, match="has no coarser grid"):
        Purifier(small_score(), relu_classifier(), method=f"{outside}:Pull", gradient="surrogate", surrogate_steps=2)
    with pytest.raises(ValueError, match="is none that torchsde steps through"):
        Purifier(small_score(), relu_classifier(), method=f"{outside}:LineSearch", gradient="adjoint")
    with pytest.raises(ValueError, match="engine 'eager' or 'auto', got 'cpu'"):
        Purifier(small_score(), relu_classifier(), method=f"{outside}:LineSearch", engine="cpu")


class Forgetful(coupfast.StepMethod):
    num_steps = 2

    def step(self, k, state, noise, networks):
        return state[0].mul_(0.9), state[0]


class Writing(coupfast.StepMethod):
    num_steps = 2

    def step(self, k, state, noise, networks):
        return (state[0].mul_(0.9),)


class WritingNoise(coupfast.StepMethod):
    num_steps = 2

    def step(self, k, state, noise, networks):
        return (state[0] + noise.z(k, state[0]).mul_(0.1),)


def test_a_step_that_writes_into_explicit_noise(images):
    noise = torch.randn(2, *images.shape, dtype=torch.float64)
    with pytest.raises(ValueError, match="writes into its state or noise"):
        Purifier(small_score(), method=WritingNoise)(images, noise=noise)


class Threshold(coupfast.StepMethod):
    """No gradient flows through it at all."""

    num_steps = 2

    def step(self, k, state, noise, networks):
        return ((state[0] > 0).to(state[0]),)


def test_a_step_without_a_gradient_has_a_certificate(images):
    found = coupfast.check_gradient(Purifier(small_score(), method=Threshold), images, images=1, draws=0, directions=0)
    assert found.verdict == "zero gradient" and not found.holds


class Listing(coupfast.StepMethod):
    num_steps = 2

    def step(self, k, state, noise, networks):
        return [0.9 * state[0]]


@pytest.mark.parametrize(
    ("method", "message"),
    [(Forgetful, "returns a state like the one that it got"), (Writing, "writes into its state"), (Listing, "returns a tuple")],
)
def test_step_functions_that_break_their_word(images, method, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Purifier(small_score(), method=method)(images, seed=0)
