"""Purification: parity with the definition, whose noise it is, what it refuses."""

import copy
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import relu_classifier, small_score
from torch import nn

import coupfast
from coupfast import PurifiedClassifier, Purifier, purify
from coupfast.methods.base import clip
from coupfast.reference import purify_ref
from coupfast_kernels.noise import standard_normal_ref

METHODS = ["coup", "reverse-sde", "diffpure"]


class BatchInvariantScore(nn.Module):
    """Elementwise, so that an image's result cannot depend on its neighbours through a library's choice of kernel."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        shifted = torch.roll(x, 1, dims=3)
        return x * (0.5 + 0.1 * x * shifted) + 0.001 * labels[:, None, None, None]


class BatchInvariantClassifier(nn.Module):
    """Logits by additions in a fixed order."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        squares = x * x * x
        logits = [squares[:, i % 3, i // 3, 2] * 3.0 + x[:, 1, i % 8, 4] * x[:, 0, 0, i // 4] for i in range(10)]
        return torch.stack(logits, dim=1)


def rows(purifier: Purifier, x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(purifier.recipe.num_noises, *x.shape, dtype=torch.float64, generator=generator).to(x.dtype)


def definition(purifier: Purifier, x: torch.Tensor, noise: torch.Tensor, dynamics: str) -> torch.Tensor:
    with torch.no_grad():
        end = purify_ref(
            2 * x - 1,
            purifier.score,
            purifier.classifier,
            noise,
            grid=purifier.recipe.table.t,
            forward_noising=purifier.settings.method.name == "diffpure",
            dynamics=dynamics,
            guidance_scale=purifier.settings.method.scale,
        )
    return (end + 1) / 2


@pytest.mark.parametrize("solver", ["euler-maruyama", "probability-flow"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_steps", [None, 4])
def test_parity_with_the_definition(score, classifier, images, method, solver, num_steps):
    t = 0.012 if num_steps is None else 0.1
    purifier = Purifier(
        score,
        classifier,
        method=method,
        solver=solver,
        t=t,
        num_steps=num_steps,
        guidance_scale=2.0,
        clamp=False,
        engine="eager",  # the one that runs float64; test_cpu_engine.py has the other's bounds
    )
    noise = rows(purifier, images)
    # A dozen roundings a step at most, of states of order one; the networks have derivatives of order ten.
    tolerance = 10 * 12 * purifier.num_steps * torch.finfo(torch.float64).eps
    expected = definition(purifier, images, noise, solver)
    torch.testing.assert_close(purifier(images, noise=noise), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_float32_is_float64_to_rounding(score, classifier, images, method):
    purifier = Purifier(score, classifier, method=method, num_steps=4)
    single = Purifier(copy.deepcopy(score).float(), copy.deepcopy(classifier).float(), method=method, num_steps=4)
    found = single(images.float(), seed=3)
    assert found.dtype == torch.float32
    # The definition's z is float32: both precisions see one path, and only rounding separates them.
    tolerance = 10 * 12 * 4 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(found.double(), purifier(images, seed=3), rtol=0, atol=tolerance)


def test_all_ways_to_import_give_the_function():
    code = """
import coupfast.purify
from coupfast import purify
from coupfast.purify import purify as same, Purifier
assert callable(coupfast.purify) and coupfast.purify is purify is same and coupfast.Purifier is Purifier
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})


def test_importing_changes_no_setting():
    code = """
import random, numpy, torch
state = torch.get_rng_state(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.backends.cudnn.conv.fp32_precision
import coupfast
after = torch.get_rng_state(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.backends.cudnn.conv.fp32_precision
assert torch.equal(state[0], after[0]) and state[1:] == after[1:]
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})


def test_black_and_white_pixels_have_a_gradient():
    x = torch.tensor([-1.5, -1.0, -0.5, 1.0, math.nextafter(1.0, 2.0), math.inf, math.nan], dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    y = clip(leaf, -1.0, 1.0)
    torch.testing.assert_close(y.detach(), x.clamp(-1.0, 1.0), rtol=0, atol=0, equal_nan=True)
    assert torch.autograd.grad(y.sum(), leaf)[0].tolist() == [0, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("clamp", [True, False])
def test_clip(score, images, clamp):
    x = (images > 0.5).double()
    purified = purify(x, score, method="reverse-sde", num_steps=3, clamp=clamp, seed=0)
    inside = bool(((purified >= 0) & (purified <= 1)).all())
    assert inside == clamp
    if not clamp:
        clipped = purify(x, score, method="reverse-sde", num_steps=3, seed=0)
        torch.testing.assert_close(clipped, purified.clamp(0, 1), rtol=0, atol=2.0**-53)


@pytest.mark.parametrize("method", METHODS)
def test_trajectory(score, classifier, images, method):
    purified, states = purify(images, score, classifier, method=method, num_steps=4, seed=0, return_trajectory=True)
    assert states.shape == (5, *images.shape)
    torch.testing.assert_close(purified, (states[-1].clamp(-1, 1) + 1) / 2, rtol=0, atol=0)
    torch.testing.assert_close(purified, purify(images, score, classifier, method=method, num_steps=4, seed=0), rtol=0, atol=0)
    if method != "diffpure":
        torch.testing.assert_close(states[0], 2 * images - 1, rtol=0, atol=0)


def test_trajectory_with_a_gradient(score, classifier, images):
    x = images.clone().requires_grad_()
    purified, states = purify(x, score, classifier, num_steps=3, seed=0, return_trajectory=True)
    assert purified.requires_grad and not states.requires_grad
    torch.testing.assert_close(states, purify(images, score, classifier, num_steps=3, seed=0, return_trajectory=True)[1])


# --- noise ------------------------------------------------------------------------------------------------------------


def test_noise_is_the_definition_replayed(score, classifier, images):
    for method in METHODS:
        purifier = Purifier(score, classifier, method=method, num_steps=3)
        ids, draw = torch.tensor([4, 0, 2**32 - 1, 77, 5]), torch.tensor([0, 1, 2, 2**32 - 1, 0])
        steps = [0, 1, 2] + ([2**32 - 1] if method == "diffpure" else [])
        noise = torch.stack([standard_normal_ref(images.shape, seed=9, ids=ids, draw=draw, step=k).double() for k in steps])
        torch.testing.assert_close(
            purifier(images, seed=9, ids=ids, draw=draw), purifier(images, noise=noise), rtol=0, atol=0
        )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_bits_in_every_batch(method, dtype):
    score, classifier = BatchInvariantScore().eval(), BatchInvariantClassifier().eval()
    x = torch.rand(20, 3, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(0))
    purifier = Purifier(score, classifier, method=method, num_steps=5)
    together = purifier(x, seed=1)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(purifier(x[order], seed=1, ids=order), together[order], rtol=0, atol=0)
    for size in (1, 3):
        pieces = [purifier(x[i : i + size], seed=1, ids=range(i, min(i + size, 20))) for i in range(0, 20, size)]
        torch.testing.assert_close(torch.cat(pieces), together, rtol=0, atol=0)


def test_deviation_between_batches_of_the_shipped_networks():
    """Convolution libraries choose kernels by batch size: close, not equal. The bound is rounding, magnified by networks."""
    score, classifier = coupfast.load_score("cifar10-tiny"), coupfast.load_classifier("cifar10-tiny")
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    purifier = Purifier(score, classifier, t=0.06, num_steps=6)
    together = purifier(x, seed=1)
    alone = torch.cat([purifier(x[i : i + 1], seed=1, ids=[i]) for i in range(3)])
    torch.testing.assert_close(alone, together, rtol=0, atol=6 * 100 * torch.finfo(torch.float32).eps)


def test_global_generator_is_neither_read_nor_moved(score, classifier, images):
    defense = PurifiedClassifier(Purifier(score, classifier, num_steps=2), classifier, seed=5)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = defense(images, draw=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    torch.testing.assert_close(defense(images, draw=3), first, rtol=0, atol=0)


def test_seeds_draws_and_ids_differ(score, images):
    purifier = Purifier(score, method="reverse-sde", num_steps=2)
    base = purifier(images, seed=0)
    for options in ({"seed": 1}, {"seed": 2**63}, {"seed": 0, "draw": 1}, {"seed": 0, "ids": range(5, 10)}):
        assert float((purifier(images, **options) - base).abs().max()) > 1e-3


def test_seed_none_is_drawn_and_told(score, images):
    purifier = Purifier(score, method="reverse-sde", num_steps=2)
    first = purifier(images)
    seed = purifier.last_seed
    assert isinstance(seed, int)
    assert float((purifier(images) - first).abs().max()) > 1e-3
    torch.testing.assert_close(purifier(images, seed=seed), first, rtol=0, atol=0)


def test_counter_of_the_purified_classifier(score, classifier, images):
    defense = PurifiedClassifier(Purifier(score, classifier, num_steps=2), classifier, seed=5)
    assert defense.next_draw == 0
    outputs = [defense(images) for _ in range(3)]
    assert defense.next_draw == 3
    assert float((outputs[0] - outputs[1]).abs().max()) > 1e-6
    state = copy.deepcopy(defense.state_dict())
    fourth = defense(images)
    other = PurifiedClassifier(Purifier(score, classifier, num_steps=2), classifier, seed=5)
    other.load_state_dict(state)
    assert other.next_draw == 3
    torch.testing.assert_close(other(images), fourth, rtol=0, atol=0)
    defense.next_draw = 1
    torch.testing.assert_close(defense(images), outputs[1], rtol=0, atol=0)
    torch.testing.assert_close(defense(images, draw=0), outputs[0], rtol=0, atol=0)
    assert defense.next_draw == 2
    with pytest.raises(ValueError, match="next_draw"):
        defense.next_draw = -1


def test_purified_classifier_is_the_classifier_of_the_purified(score, classifier, images):
    purifier = Purifier(score, classifier, num_steps=2)
    defense = PurifiedClassifier(purifier, classifier, seed=5)
    purified = purifier(images, seed=5, draw=7)
    torch.testing.assert_close(defense(images, draw=7), classifier(purified), rtol=0, atol=0)


# --- networks and settings --------------------------------------------------------------------------------------------


def test_networks_are_left_as_they_were(score, classifier, images):
    for network in (score, classifier):
        network.requires_grad_(True)
    x = images.clone().requires_grad_()
    other = relu_classifier().requires_grad_(True)
    PurifiedClassifier(Purifier(score, classifier, num_steps=2), other)(x).sum().backward()
    for network in (score, classifier):
        assert all(p.requires_grad and p.grad is None for p in network.parameters())


def test_a_classifier_after_the_purification_gets_its_parameters_gradients(score, classifier, images):
    """Those of what it computes of the purified images; where it also guides, its guiding counts as a constant."""
    classifier.requires_grad_(True)
    classifier.bn1.weight.requires_grad_(False)
    purifier = Purifier(score, classifier, num_steps=2)
    defense = PurifiedClassifier(purifier, classifier, seed=1)
    defense(images, draw=0).square().sum().backward()
    wanted = [p for p in classifier.parameters() if p.requires_grad]
    expected = torch.autograd.grad(classifier(purifier(images, seed=1, draw=0)).square().sum(), wanted)
    for parameter, gradient in zip(wanted, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0)
    assert classifier.bn1.weight.grad is None
    before = [p.grad.clone() for p in wanted]
    x = images.clone().requires_grad_()
    torch.autograd.grad(defense(x, draw=0).sum(), x)  # an attack asks for the image's only
    assert all(torch.equal(p.grad, g) for p, g in zip(wanted, before, strict=True))


def test_changed_weights_are_seen(score, images):
    purifier = Purifier(score, method="reverse-sde", num_steps=2)
    first = purifier(images, seed=0)
    with torch.no_grad():
        score.all_modules[0].bias.add_(0.5)  # in place
    second = purifier(images, seed=0)
    assert float((second - first).abs().max()) > 1e-6
    for parameter in score.parameters():
        parameter.data = parameter.data.clone() * 1.01  # replaced
    assert float((purifier(images, seed=0) - second).abs().max()) > 1e-6


def test_strict_precision_inside_and_the_callers_outside(score, classifier, images):
    seen = []

    class Watching(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args):
            flags = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
            seen.append((torch.is_autocast_enabled("cpu"), *flags, torch.backends.mkldnn.matmul.fp32_precision))
            return self.inner(*args)

    score, classifier = Watching(score.float()), Watching(classifier.float())
    x = images.float().requires_grad_()
    plain = purify(x, score, classifier, num_steps=2, seed=0)
    (gradient,) = torch.autograd.grad(plain.sum(), x)
    before = torch.backends.cudnn.conv.fp32_precision
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = purify(x, score, classifier, num_steps=2, seed=0)
            (found_gradient,) = torch.autograd.grad(found.sum(), x)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.backends.cudnn.conv.fp32_precision == before
    torch.testing.assert_close(found, plain, rtol=0, atol=0)
    torch.testing.assert_close(found_gradient, gradient, rtol=0, atol=0)
    assert set(seen) == {(False, "ieee", "ieee", "ieee")}


def test_settings_are_restored_after_an_error(score, images):
    class Failing(nn.Module):
        calls = 0

        def forward(self, x, labels):
            Failing.calls += 1
            if Failing.calls > 3:
                raise RuntimeError("out of luck")
            return 0 * x

    before = torch.backends.cudnn.conv.fp32_precision
    with pytest.raises(RuntimeError, match="out of luck"):
        purify(images, Failing().eval(), method="reverse-sde", num_steps=4)
    assert torch.backends.cudnn.conv.fp32_precision == before


# --- bad input --------------------------------------------------------------------------------------------------------


def bad(x: torch.Tensor, value: float) -> torch.Tensor:
    x = x.clone()
    x[0, 0, 0, 0] = value
    return x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: bad(x, 1.5), r"values in \[0, 1\], got \[.*, 1.5\]"),
        (lambda x: 255 * x, r"values in \[0, 1\], got"),
        (lambda x: 2 * x - 1, r"values in \[0, 1\], got \[-"),
        (lambda x: bad(x, float("nan")), "1 of 960 image values are not finite"),
        (lambda x: bad(x, float("inf")), "not finite"),
        (lambda x: (255 * x).to(torch.uint8), "float32 or float64, got torch.uint8"),
        (lambda x: x.half(), "float32 or float64, got torch.float16"),
        (lambda x: x.float(), "images are torch.float32, the score net is torch.float64"),
        (lambda x: x[0], r"\(batch, channels, height, width\), got \(3, 8, 8\)"),
        (lambda x: x[:0], "no images in a batch"),
        (lambda x: x[:, :1], "1 channels, the score net takes 3"),
        (lambda x: x[:, :, :6], "6 x 8, the score net is made for 8 x 8"),
    ],
)
def test_bad_images(score, classifier, images, change, message):
    with pytest.raises(ValueError, match=message):
        purify(change(images), score, classifier, num_steps=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t": 0.0}, r"in \(1e-5, 1\], got 0.0"),
        ({"t": 100}, r"step 100 of 1000 is t=0.1"),
        ({"num_steps": 0}, "at least 1, got 0"),
        ({"method": "cuop"}, "did you mean 'coup'"),
        ({"solver": "euler"}, "`solver` is one of"),
        ({"engine": "gpu"}, "`engine` is one of 'auto', 'eager'"),
        ({"precision": "bf16"}, "`precision` is one of 'strict'"),
        ({"gradient": "exakt"}, "did you mean 'exact'"),
        ({"guidance_gradient": "none"}, "`guidance_gradient` is one of"),
        ({"guidance_scale": -1.0}, "`guidance_scale` is a finite number"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` is a finite number"),
        ({"memory_budget": "much"}, "`memory_budget` is one of"),
        ({"memory_budget": -5}, "number of bytes, got -5"),
        ({"gradient": "surrogate", "surrogate_steps": 3, "num_steps": 2}, "between 1 and the run's 2 steps, got 3"),
        ({"seed": -1}, r"integer in \[0, 2\*\*64\), got -1"),
        ({"seed": 2**64}, r"integer in \[0, 2\*\*64\)"),
        ({"seed": 0.5}, "integer in"),
        ({"ids": [0, 1]}, r"must have shape \(5,\), one per image, got \(2,\)"),
        ({"ids": [0, 1, 2, 3, -4]}, r"in \[0, 2\*\*32\), got \[-4, 3\]"),
        ({"draw": 2**64}, r"`draw` are integers in \[0, 2\*\*32\)"),
        ({"draw": 2**32}, r"`draw` are in \[0, 2\*\*32\)"),
        ({"noise": torch.zeros(3, 5, 3, 8, 8, dtype=torch.float64), "num_steps": 2}, r"must have shape \(2, 5, 3, 8, 8\)"),
        ({"noise": torch.zeros(2, 5, 3, 8, 8), "num_steps": 2}, "`noise` is torch.float32"),
        ({"noise": torch.full((2, 5, 3, 8, 8), torch.nan, dtype=torch.float64), "num_steps": 2}, "not finite"),
        ({"method": "diffpure", "noise": torch.zeros(2, 5, 3, 8, 8).double(), "num_steps": 2}, "last row being the forward"),
    ],
)
def test_bad_options(score, classifier, images, options, message):
    with pytest.raises(ValueError, match=message):
        purify(images, score, classifier, **{"num_steps": 2} | options)


@pytest.mark.parametrize("options", [{"ids": [0.0, 1, 2, 3, 4]}, {"t": "0.1"}, {"num_steps": 2.0}])
def test_wrong_types(score, classifier, images, options):
    with pytest.raises(TypeError):
        purify(images, score, classifier, **{"num_steps": 2} | options)


def test_bad_networks(score, classifier, images):
    with pytest.raises(ValueError, match="needs `classifier`"):
        purify(images, score)
    with pytest.raises(ValueError, match=r"score net is in training mode .* `score.eval\(\)` first"):
        purify(images, small_score().train(), classifier)
    with pytest.raises(ValueError, match="classifier is in training mode"):
        purify(images, score, relu_classifier().train())
    with pytest.raises(TypeError, match=r"the score net is an nn.Module, got str; load_score"):
        purify(images, "cifar10-tiny", classifier)
    with pytest.raises(TypeError, match="images are a torch.Tensor, got ndarray"):
        purify(np.zeros((1, 3, 8, 8)), score, classifier)
    with pytest.raises(ValueError, match="the classifier is torch.float32"):
        purify(images, score, classifier.float())


def test_a_network_that_is_not_finite(score, images):
    with torch.no_grad():
        score.all_modules[0].bias.fill_(float("inf"))
    with pytest.raises((ValueError, FloatingPointError), match="finite"):
        purify(images, score, method="reverse-sde", num_steps=2)


def test_an_outer_classifier_that_does_not_fit(score, classifier, images):
    defense = PurifiedClassifier(Purifier(score, classifier, num_steps=2), relu_classifier(torch.float32))
    with pytest.raises(ValueError, match="the classifier is torch.float32"):
        defense(images)
    assert defense.next_draw == 0


def test_numpy_integers_are_integers(score, images):
    purifier = Purifier(score, method="reverse-sde", num_steps=2, guidance_scale=np.float32(1))
    found = purifier(images, seed=np.int64(3), draw=np.int64(2))
    torch.testing.assert_close(found, purifier(images, seed=3, draw=2), rtol=0, atol=0)


def test_a_network_put_back_into_training_is_refused(score, classifier, images):
    defense = PurifiedClassifier(Purifier(score, classifier, num_steps=2), classifier)
    defense(images)
    defense.train()
    with pytest.raises(ValueError, match="training mode"):
        defense(images)
    defense.eval()
    defense(images)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda self, x: self.linear(x.detach().flatten(1)), "does not depend on its input as far as autograd can see"),
        (lambda self, x: torch.zeros(len(x), 10, dtype=x.dtype), "does not depend on its input"),
        (lambda self, x: self.linear(x.flatten(1)).argmax(dim=1), r"logits of shape \(batch, classes >= 2\)"),
        (lambda self, x: self.linear(x.flatten(1))[:, :1], "classes >= 2"),
    ],
)
def test_classifiers_that_cannot_guide(score, images, forward, message):
    network = type("Odd", (nn.Module,), {"forward": forward})()
    network.linear = nn.Linear(192, 4).double()
    with pytest.raises(ValueError, match=message):
        purify(images, score, network.eval(), num_steps=2)


def test_a_score_net_of_another_shape(images):
    class Halving(nn.Module):
        def forward(self, x, labels):
            return x[:, :, ::2, ::2]

    with pytest.raises(ValueError, match=r"eps_hat of shape \(1, 3, 8, 8\), got \(1, 3, 4, 4\)"):
        purify(images, Halving().eval(), method="reverse-sde", num_steps=2)
