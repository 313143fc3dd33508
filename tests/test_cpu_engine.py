"""The CPU engine end to end: parity to rounding, gradients, memory, threads, and what it says when it cannot."""

import copy
import logging
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from conftest import bound_of, relu_classifier, silu_classifier, small_score
from cpu_networks import moved, network
from test_adjoint import plain_autograd, weights
from test_purify import definition
from torch import nn

from coupfast import PurifiedClassifier, Purifier, purify
from coupfast.engine import CounterNoise
from coupfast.engine.cpu import options as cpu_options
from coupfast.engine.cpu.bound import KEPT_BATCHES, BoundCpuEngine
from coupfast.engine.cpu.program import CpuProgram
from coupfast.engine.memory import AllocationAccount
from coupfast.engines import Engine
from coupfast.gradient_check import check_gradient
from coupfast.guidance import Guidance
from coupfast_kernels import native

REASON = native.unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

EPS = torch.finfo(torch.float32).eps
METHODS = ["coup", "reverse-sde", "diffpure"]


@pytest.fixture
def score() -> nn.Module:
    return small_score(torch.float32)


@pytest.fixture
def classifier() -> nn.Module:
    return relu_classifier(torch.float32)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def rows(purifier: Purifier, x: torch.Tensor) -> torch.Tensor:
    """Noise for explicit paths, float32 numbers in the dtype of `x`."""
    return torch.randn(purifier.recipe.num_noises, *x.shape, generator=torch.Generator().manual_seed(0)).to(x.dtype)


def gradient(purifier: Purifier, x: torch.Tensor, **noise) -> torch.Tensor:
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad((purifier(leaf, **noise) * weights(x)).sum(), leaf)
    return found


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def bound(purifier: Purifier, x: torch.Tensor) -> BoundCpuEngine:
    found = bound_of(purifier, x)
    assert isinstance(found, BoundCpuEngine)
    return found


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_classifier", [relu_classifier, silu_classifier])
@pytest.mark.parametrize("solver", ["euler-maruyama", "probability-flow"])
@pytest.mark.parametrize("method", METHODS)
def test_error_is_within_four_times_eagers(images, method, solver, make_classifier):
    options = {"method": method, "solver": solver, "num_steps": 4, "clamp": False}
    options |= {"guidance_scale": 3.0} if method == "coup" else {}
    exact = Purifier(small_score(), make_classifier(), **options)
    noise = rows(exact, images)
    wanted = definition(exact, images.double(), noise.double(), solver)
    wanted_gradient = plain_autograd(exact, images.double(), noise.double())
    errors = {}
    for engine in ("eager", "cpu"):
        single = Purifier(small_score(torch.float32), make_classifier(torch.float32), engine=engine, **options)
        found = single(images, noise=noise), gradient(single, images, noise=noise)
        errors[engine] = relative_error(found[0], wanted), relative_error(found[1], wanted_gradient)
    assert errors["cpu"][0] <= 4 * max(errors["eager"][0], EPS)
    assert errors["cpu"][1] <= 4 * max(errors["eager"][1], EPS)
    assert errors["eager"][1] < 1e-4  # no ReLU of these few flips: the comparison is of rounding


@pytest.mark.parametrize("method", METHODS)
def test_reference_grid(score, classifier, images, method):
    purifier = Purifier(score, classifier, method=method, t=0.012, engine="cpu", clamp=False)
    exact = Purifier(small_score(), relu_classifier(), method=method, t=0.012, clamp=False)
    noise = rows(exact, images)
    found = purifier(images, noise=noise)
    # A dozen roundings a step at most, of states of order one; the networks have derivatives of order ten.
    tolerance = 10 * 12 * purifier.num_steps * EPS
    wanted = definition(exact, images.double(), noise.double(), "euler-maruyama")
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_counted_noise_is_eagers(score, classifier, images, method):
    ids, draw = torch.tensor([4, 0, 2**32 - 1, 77, 5]), torch.tensor([0, 1, 2, 2**32 - 1, 0])
    found, expected = (
        Purifier(score, classifier, method=method, num_steps=3, engine=engine)(images, seed=2**63 + 5, ids=ids, draw=draw)
        for engine in ("cpu", "eager")
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=10 * 12 * 3 * EPS)


def test_shipped_networks_on_photo_sized_images():
    import coupfast

    score, classifier = coupfast.load_score("cifar10-tiny"), coupfast.load_classifier("cifar10-tiny")
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    found, expected = (
        gradient(Purifier(score, classifier, t=0.03, num_steps=3, engine=engine), x, seed=0) for engine in ("cpu", "eager")
    )
    assert relative_error(found, expected) < 1e-3  # a ReLU within rounding of its kink may flip


def test_auto_takes_it_for_float32_only(score, classifier, images, caplog):
    with caplog.at_level(logging.INFO, logger="coupfast"):
        single = Purifier(score, classifier, num_steps=2)
        assert single.engine == "cpu"
    assert "engine='auto' chose 'cpu'" in caplog.text
    assert single.plan(2).engine == "cpu"
    assert_equal(single(images, seed=0), Purifier(score, classifier, num_steps=2, engine="cpu")(images, seed=0))
    double = Purifier(small_score(), relu_classifier(), num_steps=2)
    assert double.engine == "eager"
    eager = Purifier(small_score(), relu_classifier(), num_steps=2, engine="eager")
    assert_equal(double(images.double(), seed=0), eager(images.double(), seed=0))


def test_float64_is_refused_clearly(images):
    purifier = Purifier(small_score(), relu_classifier(), num_steps=2, engine="cpu")
    with pytest.raises(
        ValueError, match=r"the cpu engine runs float32 on a CPU, not torch.float64 on cpu; engine='eager' does"
    ):
        purifier(images.double(), seed=0)


def test_without_a_compiler(tmp_path):
    code = """
import logging, sys, torch
sys.path.insert(0, "tests")
from conftest import small_score
from coupfast import Purifier
from coupfast_kernels.native import NativeUnavailable
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
score, x = small_score(torch.float32), torch.rand(1, 3, 8, 8)
auto = Purifier(score, method="reverse-sde", num_steps=1)
assert auto.engine == "eager"
auto(x.requires_grad_(), seed=0).sum().backward()
try:
    Purifier(score, method="reverse-sde", num_steps=1, engine="cpu")(x, seed=0)
except NativeUnavailable as error:
    assert "install a C++17 compiler, e.g. g++" in str(error), error
else:
    raise AssertionError("there is a compiler")
"""
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["PYTHONPATH"] += os.pathsep + os.path.dirname(__file__)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "engine='auto' chose 'eager': the C++ kernels need a compiler" in done.stdout


# --- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_classifier", [relu_classifier, silu_classifier])
@pytest.mark.parametrize(
    "options",
    [
        {"gradient": "exact", "guidance_gradient": "detached"},
        {"gradient": "surrogate", "surrogate_steps": 2},
        {"gradient": "surrogate", "surrogate_steps": 4, "guidance_gradient": "detached"},
        {"gradient": "adjoint", "guidance_gradient": "detached"},
        {"gradient": "bpda"},
    ],
    ids=str,
)
def test_gradient_modes(images, make_classifier, options):
    options = options | {"num_steps": 4, "guidance_scale": 10.0}
    exact = Purifier(small_score(), make_classifier(), **options)
    noise = rows(exact, images)
    wanted = gradient(exact, images.double(), noise=noise.double())
    found, theirs = (
        gradient(
            Purifier(small_score(torch.float32), make_classifier(torch.float32), engine=engine, **options), images, noise=noise
        )
        for engine in ("cpu", "eager")
    )
    assert relative_error(found, wanted) <= 4 * max(relative_error(theirs, wanted), EPS)


def test_none_has_no_gradient(score, classifier, images):
    x = images.clone().requires_grad_()
    found = purify(x, score, classifier, num_steps=2, seed=0, engine="cpu", gradient="none")
    assert not found.requires_grad
    assert_equal(found, purify(images, score, classifier, num_steps=2, seed=0, engine="cpu"))


def test_gradient_of_the_noise(score, classifier, images):
    found, expected = (Purifier(score, classifier, num_steps=3, engine=engine, clamp=False) for engine in ("cpu", "eager"))
    noise = rows(found, images).requires_grad_()
    grads = [torch.autograd.grad((p(images, noise=noise) * weights(images)).sum(), noise)[0] for p in (found, expected)]
    assert relative_error(*grads) < 100 * EPS


@pytest.mark.parametrize("make_classifier", [relu_classifier, silu_classifier])
def test_certificate(make_classifier, images):
    network = make_classifier(torch.float32)
    defense = PurifiedClassifier(Purifier(small_score(torch.float32), network, num_steps=4, engine="cpu"), network, seed=5)
    found = check_gradient(defense, images, draws=0, directions=1)
    assert found.has_gradient and found.dtype == "float32"
    assert found.relative_error < 1e-4
    assert found.cosine > 1 - 1e-8
    detached = PurifiedClassifier(
        Purifier(
            small_score(torch.float32), network, num_steps=4, engine="cpu", guidance_gradient="detached", guidance_scale=10.0
        ),
        network,
    )
    assert check_gradient(detached, images, draws=0, directions=0).relative_error > 1e-3


def test_under_other_peoples_autograd(score, classifier, images):
    purifier = Purifier(score, classifier, num_steps=3, engine="cpu")
    expected, wanted = purifier(images, seed=0), gradient(purifier, images, seed=0)
    out, vjp = torch.func.vjp(lambda image: purifier(image, seed=0), images)
    assert_equal(out, expected)
    assert_equal(vjp(weights(images))[0], wanted)
    with torch.inference_mode():
        assert_equal(purifier(images, seed=0).clone(), expected)
        assert_equal(purifier(images.clone(), seed=0).clone(), expected)
    assert_equal(gradient(purifier, images, seed=0), wanted)
    x = images.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = purifier(x, seed=0)
        assert_equal(torch.autograd.grad((found * weights(x)).sum(), x)[0], wanted)
    assert_equal(found.detach(), expected)
    (first,) = torch.autograd.grad((purifier(x, seed=0) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        first.sum().backward()
    out = (purifier(x, seed=0) * weights(x)).sum()
    for keep in (True, False):
        assert_equal(torch.autograd.grad(out, x, retain_graph=keep)[0], wanted)


def test_two_runs_alive_at_once(score, classifier, images):
    """Between a run's forward and backward pass the same programs serve another."""
    for options in ({}, {"memory_budget": "least"}):
        purifier = Purifier(score, classifier, num_steps=3, engine="cpu", **options)
        expected = [gradient(purifier, x, seed=seed) for x, seed in ((images, 0), (images.flip(0), 1), (images[:2], 2))]
        inputs = [images.clone(), images.flip(0).clone(), images[:2].clone()]
        outputs = [(purifier(x.requires_grad_(), seed=seed) * weights(x)).sum() for seed, x in enumerate(inputs)]
        for out, x, wanted in zip(outputs, inputs, expected, strict=True):
            assert_equal(torch.autograd.grad(out, x)[0], wanted)


@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_formats(score, classifier, images, channels_last):
    purifier = Purifier(score, classifier, num_steps=2, engine="cpu")
    x = images.to(memory_format=torch.channels_last) if channels_last else images.transpose(2, 3).contiguous().transpose(2, 3)
    for noise in ({"seed": 0}, {"noise": rows(purifier, images)}):
        torch.testing.assert_close(purifier(x, **noise), purifier(images, **noise), rtol=0, atol=4 * EPS)
        assert relative_error(gradient(purifier, x, **noise), gradient(purifier, images, **noise)) < 100 * EPS


# --- memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_classifier", [relu_classifier, silu_classifier])
def test_what_is_kept_does_not_change_a_bit(images, make_classifier):
    score, classifier = small_score(torch.float32), make_classifier(torch.float32)
    least = Purifier(score, classifier, num_steps=5, memory_budget="least", engine="cpu")
    expected, plan = gradient(least, images, seed=0), least.plan(5)
    assert (plan.storage.piece, plan.storage.slopes, plan.storage.kept_steps) == (5, False, 0)
    for budget in (plan.peak_bytes + 5 * plan.step.slopes, "auto"):
        purifier = Purifier(score, classifier, num_steps=5, memory_budget=budget, engine="cpu")
        assert purifier.plan(5).storage.slopes == (plan.step.slopes > 0)
        assert_equal(gradient(purifier, images, seed=0), expected)
    assert (plan.step.slopes > 0) == (make_classifier is relu_classifier)


def test_a_batch_that_does_not_fit_is_split(score, classifier, images):
    whole = Purifier(score, classifier, num_steps=3, memory_budget="least", engine="cpu")
    plan = whole.plan(5)
    expected, wanted = whole(images, seed=0), gradient(whole, images, seed=0)
    for budget, pieces in ((plan.least_bytes, {1}), ((plan.least_bytes + plan.peak_bytes) // 2, {2, 3})):
        purifier = Purifier(score, classifier, num_steps=3, memory_budget=budget, engine="cpu")
        assert purifier.plan(5).storage.piece in pieces
        # Another batch: other algorithms, so rounding.
        assert relative_error(gradient(purifier, images, seed=0), wanted) < 1e-4
        found = purifier(images.clone().requires_grad_(), seed=0).detach()
        torch.testing.assert_close(found, expected, rtol=0, atol=10 * 12 * 3 * EPS)
    purifier = Purifier(score, classifier, num_steps=3, memory_budget=plan.least_bytes - 1, engine="cpu")
    with pytest.raises(ValueError, match=f"need at least {plan.least_bytes} "):
        purifier.plan(5)


def pooling_classifier(dtype: torch.dtype) -> nn.Module:
    return network("torchvision").to(dtype)


def hvp_peak(images: torch.Tensor, classifier: nn.Module) -> int:
    """Of one image, in PyTorch."""
    classifier.requires_grad_(False)
    x = 2 * images[:1] - 1
    guidance = Guidance(classifier, x)
    assert guidance.route == "forward-over-reverse"
    with torch.no_grad(), AllocationAccount([x, *classifier.parameters(), *classifier.buffers()]) as account:
        guidance.hvp(x, x)
    return account.peak


def of_regions(program: CpuProgram, *kinds: str) -> int:
    """What the plan has for PyTorch's operations beside the workspace."""
    return max(program._plan(kind).region_bytes() for kind in kinds if program._has(kind))


@pytest.mark.parametrize("make_classifier", [relu_classifier, pooling_classifier, silu_classifier])
def test_planned_memory_is_what_programs_take(images, make_classifier):
    score, classifier = small_score(torch.float32), make_classifier(torch.float32)
    purifier = Purifier(score, classifier, num_steps=2, engine="cpu")
    program = bound(purifier, images).for_batch(5)
    workspace, step = program.networks.workspace, purifier.plan(5).step
    assert program.memory() == step and step.forward > 0
    assert workspace.bytes() <= 8  # planned, and not taken
    purifier(images, seed=0)
    assert workspace.bytes() == program.bytes("forward") - of_regions(program, "score", "guidance") <= step.forward
    gradient(purifier, images, seed=0)
    assert workspace.bytes() == program.bytes("kept") - of_regions(program, "score, keeping", "guidance", "hvp")
    hvp = step.transpose_kept - (step.forward_keeping - step.activations)
    assert workspace.bytes() <= step.transpose_kept - hvp
    if make_classifier is silu_classifier:  # what PyTorch takes for it beside the programs
        assert hvp == 5 * hvp_peak(images, classifier) > 0
    else:
        assert hvp == 0
    least = Purifier(score, classifier, num_steps=2, engine="cpu", memory_budget="least")
    gradient(least, images, seed=0)
    program = bound(least, images).for_batch(5)
    workspace = program.networks.workspace
    assert workspace.bytes() == program.bytes("rebuilt") - of_regions(program, "score transpose", "guidance", "hvp")
    assert workspace.bytes() <= step.transpose
    noise = CounterNoise(0, torch.arange(5), torch.zeros(5, dtype=torch.int64))
    _, kept = program.step(0, 2 * images - 1, noise, "slopes")
    if make_classifier is not silu_classifier:
        assert kept.slopes is not None
        in_regions = sum(slope.data.nbytes for slope in kept.region_slopes)
        # An index of 8 bytes for each of 5 images' 8 x 4 x 4 maxima.
        assert in_regions == (8 * 5 * 8 * 4 * 4 if make_classifier is pooling_classifier else 0)
        assert kept.slopes.nbytes + in_regions == step.slopes
    else:
        assert kept.slopes is None and step.slopes == 0


def test_programs_of_old_batch_sizes_are_dropped(score, images):
    purifier = Purifier(score, method="reverse-sde", num_steps=1, engine="cpu")
    x = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    expected = purifier(x[:1], seed=0)
    for batch in range(1, 13):
        purifier(x[:batch], seed=0)
    assert len(bound(purifier, x)._programs) == KEPT_BATCHES
    assert_equal(purifier(x[:1], seed=0), expected)


# --- networks ---------------------------------------------------------------------------------------------------------------


def test_changed_weights_are_seen(score, classifier, images):
    purifier = Purifier(score, classifier, num_steps=2, engine="cpu", guidance_scale=30.0)
    for change in (
        lambda: score.all_modules[0].bias.add_(0.5),
        lambda: classifier.conv.weight.mul_(1.5),
        lambda: classifier.bn1.running_mean.add_(0.3),
    ):
        before = purifier(images, seed=0)
        with torch.no_grad():
            change()
        after = purifier(images, seed=0)
        assert float((after - before).abs().max()) > 1e-6
        fresh = Purifier(score, classifier, num_steps=2, engine="cpu", guidance_scale=30.0)
        assert_equal(after, fresh(images, seed=0))


class Reading(nn.Module):
    """A score net that reads its label as a number."""

    def forward(self, x, labels):
        return x * (0.5 + 0.001 * float(labels[0]))


class ReadingThroughNumpy(nn.Module):
    """The same in a way that no trace shows."""

    def forward(self, x, labels):
        return x * (0.5 + 0.001 * float(labels.numpy()[0]))


class Folding(nn.Module):
    """A score net that runs two copies of each image as one batch."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, labels):
        return self.conv(torch.cat([x, x.flip(3)])).unflatten(0, (2, -1)).mean(dim=0) + 0.001 * labels[:, None, None, None]


class OfTheTimeAlone(nn.Module):
    def forward(self, x, labels):
        return 0.01 * labels[:, None, None, None] * torch.ones(len(x), 3, 8, 8)


class NoGradInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, labels):
        with torch.no_grad():
            gate = torch.sigmoid(self.conv(x))
        return gate * self.conv(x)


@pytest.mark.parametrize("network", [Reading, ReadingThroughNumpy, Folding, OfTheTimeAlone, NoGradInside])
def test_score_nets_that_cannot_be_planned(images, network, caplog):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        score = network().eval()
    found, expected = (Purifier(score, method="reverse-sde", num_steps=3, engine=engine) for engine in ("cpu", "eager"))
    with caplog.at_level(logging.WARNING, logger="coupfast"):
        assert_equal(found(images, seed=0), expected(images, seed=0))
    assert caplog.text.count("score net") == caplog.text.count("runs in PyTorch") == 1
    assert_equal(gradient(found, images, seed=0), gradient(expected, images, seed=0))
    assert found.plan(3, image_shape=(3, 8, 8)).step.forward > 0


class AsDiffusers(nn.Module):
    """As `UNet2DModel` treats its label, expanded to the batch by ones, and its maps: rows of tokens in a group norm."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.norm, self.time, self.query = nn.GroupNorm(2, 8), nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, x, labels):
        labels = labels * torch.ones(len(x), dtype=labels.dtype, device=labels.device)
        angles = labels[:, None].float() * torch.exp(-torch.arange(8.0) / 2)[None]
        h = self.first(x) + self.time(torch.cat([angles.sin(), angles.cos()], dim=1))[:, :, None, None]
        tokens = self.norm(h.view(len(h), 8, -1)).transpose(1, 2)
        tokens = F.scaled_dot_product_attention(self.query(tokens), tokens, tokens).transpose(1, 2)
        return self.last(F.silu(tokens.reshape(h.shape) + h))


def test_a_score_net_as_those_of_diffusers_is_planned(images, caplog):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        score = AsDiffusers().eval()
    found, expected = (Purifier(score, method="reverse-sde", num_steps=3, engine=engine) for engine in ("cpu", "eager"))
    with caplog.at_level(logging.WARNING, logger="coupfast"):
        torch.testing.assert_close(found(images, seed=0), expected(images, seed=0), rtol=0, atol=10 * 12 * 3 * EPS)
    assert not caplog.text
    assert bound(found, images).networks.score is not None
    assert relative_error(gradient(found, images, seed=0), gradient(expected, images, seed=0)) < 100 * EPS


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx, grad):
        return grad


def _classifier(forward) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Module()
        network.conv, network.other = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        network.linear = nn.Linear(8, 10)
    type_ = type("Odd", (nn.Module,), {"forward": forward})
    network.__class__ = type_
    return network.eval()


def _pooled(self, h):
    return 4 * self.linear(h.mean(dim=(2, 3)))


def _detached(self, x):
    h = F.silu(self.conv(x))
    with torch.no_grad():
        gate = torch.sigmoid(self.other(x))
    return _pooled(self, h * gate)


def _straight_through(self, x):
    return _pooled(self, torch.tanh(self.conv(Straight.apply(x))))


def _two_views(self, x):
    return _pooled(self, F.silu(self.conv(torch.cat([x, x.flip(3)])))).unflatten(0, (2, -1)).mean(dim=0)


def _reading(self, x):
    return _pooled(self, F.relu(self.conv(x))) * (2.0 if float(x.detach().sum()) > -1e9 else 1.0)


@pytest.mark.parametrize("forward", [_detached, _straight_through, _two_views, _reading])
def test_classifiers_that_cannot_be_planned(score, images, forward, caplog):
    """What a trace does not show, such as a gradient that is stopped, must not get lost."""
    network = _classifier(forward)
    options = {"num_steps": 2, "guidance_scale": 10.0, "guidance_gradient": "detached"}
    with caplog.at_level(logging.WARNING, logger="coupfast"):
        found = Purifier(score, network, engine="cpu", **options)(images, seed=0)
    assert "the classifier" in caplog.text and "runs in PyTorch" in caplog.text
    eager = Purifier(score, network, engine="eager", **options)
    torch.testing.assert_close(found, eager(images, seed=0), rtol=0, atol=10 * 12 * 2 * EPS)
    grads = [gradient(Purifier(score, network, engine=engine, **options), images, seed=0) for engine in ("cpu", "eager")]
    assert relative_error(*grads) < 1e-4


def test_a_classifier_with_detach_is_planned_right(score, images):
    """A `detach` is an operation that a trace shows."""
    network = _classifier(lambda self, x: _pooled(self, F.silu(self.conv(x)) * torch.sigmoid(self.other(x)).detach()))
    found, expected = (Purifier(score, network, num_steps=2, guidance_scale=10.0, engine=engine) for engine in ("cpu", "eager"))
    torch.testing.assert_close(found(images, seed=0), expected(images, seed=0), rtol=0, atol=10 * 12 * 2 * EPS)
    assert bound(found, images).networks.classifier is not None
    assert relative_error(gradient(found, images, seed=0), gradient(expected, images, seed=0)) < 1e-4


def test_a_gradient_hook_is_respected(score, classifier, images):
    """A hook on a module's gradient is no operation of the forward pass."""
    handle = score.all_modules[-1].register_full_backward_hook(lambda module, grads, _: tuple(0.5 * g for g in grads))
    found, expected = (
        gradient(Purifier(score, method="reverse-sde", num_steps=2, engine=engine), images, seed=0)
        for engine in ("cpu", "eager")
    )
    handle.remove()
    assert relative_error(found, expected) < 1e-5


# --- sharing ------------------------------------------------------------------------------------------------------------------


def test_two_purifiers_at_once(score, classifier, images):
    first = Purifier(score, classifier, num_steps=3, engine="cpu")
    second = Purifier(score, silu_classifier(torch.float32), num_steps=2, engine="cpu", guidance_scale=20.0)
    expected = gradient(first, images, seed=0), gradient(second, images, seed=0)
    a, b = images.clone().requires_grad_(), images.clone().requires_grad_()
    out_a, out_b = first(a, seed=0), second(b, seed=0)
    (grad_a,) = torch.autograd.grad((out_a * weights(a)).sum(), a)
    (grad_b,) = torch.autograd.grad((out_b * weights(b)).sum(), b)
    assert_equal(grad_a, expected[0])
    assert_equal(grad_b, expected[1])


@pytest.mark.parametrize("shared", [False, True])
def test_python_threads(score, classifier, images, shared):
    """Each with a purifier of its own, and all with the same: everybody gets what it gets alone."""
    purifiers = [Purifier(score, classifier, num_steps=4, engine="cpu") for _ in range(1 if shared else 4)] * (
        4 if shared else 1
    )
    expected = [(purifiers[0](images, seed=seed), gradient(purifiers[0], images, seed=seed)) for seed in range(4)]
    results: dict[int, list] = {}

    def work(seed: int) -> None:
        torch.set_num_threads(1)
        results[seed] = [(purifiers[seed](images, seed=seed), gradient(purifiers[seed], images, seed=seed)) for _ in range(3)]

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for seed in range(4):
        for found in results[seed]:
            assert_equal(found[0], expected[seed][0])
            assert_equal(found[1], expected[seed][1])


def test_number_of_threads_may_change(score, classifier, images):
    purifier = Purifier(score, classifier, num_steps=3, engine="cpu")
    expected, wanted = purifier(images, seed=0), gradient(purifier, images, seed=0)
    x = images.clone().requires_grad_()
    out = (purifier(x, seed=0) * weights(x)).sum()
    try:
        for threads in (2, 3, 1):
            torch.set_num_threads(threads)
            # PyTorch's own operations may share sums out among threads; the kernels do not.
            torch.testing.assert_close(purifier(images, seed=0), expected, rtol=0, atol=100 * EPS)
            assert relative_error(gradient(purifier, images, seed=0), wanted) < 1e-4
        torch.set_num_threads(2)
        assert relative_error(torch.autograd.grad(out, x)[0], wanted) < 1e-4  # forwards on one, backwards on two
    finally:
        torch.set_num_threads(1)
    assert_equal(purifier(images, seed=0), expected)


def test_copies(score, classifier, images):
    purifier = Purifier(score, classifier, num_steps=2, engine="cpu")
    expected, wanted = purifier(images, seed=0), gradient(purifier, images, seed=0)
    defense = PurifiedClassifier(purifier, classifier, seed=3)
    logits = defense(images, draw=0)
    for other in (copy.deepcopy(purifier), pickle.loads(pickle.dumps(purifier))):
        assert_equal(other(images, seed=0), expected)
        assert_equal(gradient(other, images, seed=0), wanted)
        with torch.no_grad():
            other.score.all_modules[0].bias.add_(0.5)
        assert float((other(images, seed=0) - expected).abs().max()) > 1e-6
        assert_equal(purifier(images, seed=0), expected)
    for other in (copy.deepcopy(defense), pickle.loads(pickle.dumps(defense))):
        assert_equal(other(images, draw=0), logits)


@pytest.mark.parametrize("make_classifier", [relu_classifier, silu_classifier, None])
def test_bits_do_not_depend_on_addresses(make_classifier):
    """`deepcopy`, pickle, `.double().float()` and loading put weights elsewhere. (Shipped networks show it, being larger.)"""
    import coupfast

    results = []
    for offset in (0, 12):
        if make_classifier is None:
            score, classifier, size = coupfast.load_score("cifar10-tiny"), coupfast.load_classifier("cifar10-tiny"), 32
        else:
            score, classifier, size = small_score(torch.float32), make_classifier(torch.float32), 8
        networks = moved(score, offset), moved(classifier, offset)
        x = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(2))
        purifier = Purifier(*networks, num_steps=2, engine="cpu")
        results.append((purifier(x, seed=0), gradient(purifier, x, seed=0)))
    for found, expected in zip(*results, strict=True):
        assert_equal(found, expected)


@pytest.mark.parametrize("largest", [4, 2, 1])
def test_the_choice_of_algorithms_can_be_kept(monkeypatch, caplog, largest):
    """Left open it follows from the memory that is free; what it came to gives the same bits with any other memory free."""
    import coupfast

    networks = coupfast.load_score("cifar10-tiny"), coupfast.load_classifier("cifar10-tiny")
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    weights = sum(w.nbytes for network in networks for w in network.parameters() if w.dim() == 4)
    # Twice what all that are allowed take packed, for a convolution and for its transpose.
    needed = {4: 4 * weights * (1 + 16 / 9 + 4), 2: 4 * weights * (1 + 16 / 9), 1: 0}

    def run(free: float, **options) -> tuple[torch.Tensor, torch.Tensor]:
        monkeypatch.setattr(cpu_options, "available_bytes", lambda device: int(free) + 2)
        purifier = Purifier(*networks, num_steps=2, engine="cpu", memory_budget="least", **options)
        return purifier(x, seed=0), gradient(purifier, x, seed=0)

    expected = run(needed[largest])
    assert ("F(4x4)" in caplog.text) == (largest < 4) and ("F(2x2)" in caplog.text) == (largest < 2)
    decided = Engine(name="cpu").decided("cpu", *networks)
    assert decided.options == {"largest_tile": largest}
    assert decided.decided("cpu", *networks) == decided
    caplog.clear()
    for free in (needed[4], 0):
        for found, wanted in zip(run(free, engine_options=decided.options), expected, strict=True):
            assert_equal(found, wanted)
    assert not caplog.text
    others = run(needed[4], engine_options={"largest_tile": 1 if largest > 1 else 4})
    assert not torch.equal(others[0], expected[0])  # the choice is one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"largest_tile": 3}, r"`engine_options\['largest_tile'\]` is 1, 2 or 4, got 3"),
        ({"largest_tile": True}, "is 1, 2 or 4, got True"),
        ({"largest": 2}, "got 'largest'"),
    ],
)
def test_options_that_do_not_exist(score, options, message):
    with pytest.raises(ValueError, match=message):
        Purifier(score, method="reverse-sde", engine="cpu", engine_options=options)


def test_options_of_another_engine(score, images):
    with pytest.raises(ValueError, match="{'largest_tile': 2} is for the cpu engine; this purifier runs on 'eager'"):
        Purifier(score, method="reverse-sde", engine="eager", engine_options={"largest_tile": 2})(images)
    with pytest.raises(ValueError, match="{'graphs': False} is for the cuda engine; this purifier runs on 'cpu'"):
        Purifier(score, method="reverse-sde", engine="cpu", engine_options={"graphs": False})(images)


def test_another_default_dtype(score, classifier, images):
    purifier = Purifier(score, classifier, num_steps=2, engine="cpu", guidance_scale=10.0)
    expected, wanted = purifier(images, seed=0), gradient(purifier, images, seed=0)
    torch.set_default_dtype(torch.float64)
    try:
        fresh = Purifier(score, classifier, num_steps=2, engine="cpu", guidance_scale=10.0)
        found = fresh(images, seed=0), gradient(fresh, images, seed=0)
        assert bound(fresh, images).networks.score is not None
        assert bound(fresh, images).networks.classifier is not None
    finally:
        torch.set_default_dtype(torch.float32)
    assert_equal(found[0], expected)
    assert_equal(found[1], wanted)


def test_runs_repeat_to_the_bit(score, classifier, images):
    first, second = (Purifier(score, classifier, num_steps=3, engine="cpu") for _ in range(2))
    expected = gradient(first, images, seed=0)
    for purifier in (first, second):
        assert_equal(gradient(purifier, images, seed=0), expected)


def test_images_that_make_no_number(score, classifier, images):
    with torch.no_grad():
        score.all_modules[0].bias.fill_(float("inf"))
    with pytest.raises((ValueError, FloatingPointError), match="finite"):
        purify(images, score, classifier, num_steps=2, engine="cpu")


def test_fast_is_within_its_bound(score, classifier, images):
    purifiers = [Purifier(score, classifier, num_steps=3, engine="cpu", precision=p) for p in ("strict", "fast")]
    strict, fast = (gradient(purifier, images, seed=0) for purifier in purifiers)
    assert relative_error(fast, strict) <= 1e-4
