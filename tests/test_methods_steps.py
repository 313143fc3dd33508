"""Methods that are step functions: each against its definition, its gradient against back-propagation and differences."""

import json
import math

import pytest
import torch
from conftest import explicit_noise, relu_classifier, small_score, squares_gradient
from torch import nn

import coupfast
from coupfast import PurifiedClassifier, Purifier, Settings
from coupfast.cli import main
from coupfast.definition import Definition
from coupfast.engine.memory import AllocationAccount
from coupfast.methods.gdmp_ssim import ssim
from coupfast.noise import CounterNoise, uniform
from coupfast.reference.gdmp_ssim import ssim_ref
from coupfast.sde import VPSDE, DiscreteVPSDE

#: Options that make each method do all that it can in a few steps.
CASES = {
    "lm": {"num_steps": 3},
    "lm-coup": {"num_steps": 3, "guidance_scale": 2.0},
    "gdmp-ssim": {"rounds": 2, "noise_steps": 3, "ssim_window": 2, "guide_scale": 1e6, "guide_batch": 3},
    "adp": {"num_steps": 4, "noise_sigma": 0.1, "score_sigma": 0.3},
}
#: Network evaluations of one image, by step and by step back.
EVALUATIONS = {
    "lm": ({"score forward": 3, "score backward": 3}, {"score forward": 3, "score backward": 6}),
    "lm-coup": ({"classifier forward": 3, "classifier backward": 3}, {"classifier forward": 3, "classifier backward": 6}),
    "gdmp-ssim": ({"score forward": 4}, {"score forward": 4, "score backward": 4}),
    "adp": ({"score forward": 8}, {"score forward": 8, "score backward": 8}),
}


@pytest.fixture(params=CASES, ids=str)
def options(request):
    return {"method": request.param, **CASES[request.param]}


class PixelScore(nn.Module):
    """A smooth predictor for images of four pixels that looks at its labels."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = nn.Parameter(torch.randn(8, 5, generator=generator, dtype=torch.float64))
        self.second = nn.Parameter(0.4 * torch.randn(4, 8, generator=generator, dtype=torch.float64))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        inputs = torch.cat([x.flatten(1), labels.expand(len(x))[:, None] / 100], dim=1)
        return (torch.tanh(inputs @ self.first.T) @ self.second.T).view_as(x) + 0.3 * x


class PixelClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.weight = nn.Parameter(2 * torch.randn(3, 4, generator=generator, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x.flatten(1) @ self.weight.T)


@pytest.mark.parametrize("batch", [1, 3])
def test_its_certificate_says_exact(options, images, batch):
    """Output and gradient are those of the definition, which is differentiated by PyTorch and by differences."""
    classifier = relu_classifier()
    defense = PurifiedClassifier(Purifier(small_score(), classifier, **options), classifier, seed=5)
    found = coupfast.check_gradient(defense, images[:batch], images=batch, draws=0, directions=batch % 3)
    assert found.verdict == "exact" and found.holds
    assert found.relative_error < 1e-11
    assert found.forward_error < 1e-11
    assert all(row.norm_float64 > 0 for row in found.images)


def test_it_changes_images(options, images):
    purified = Purifier(small_score(), relu_classifier(), **options)(images, seed=0)
    assert float((purified - images).abs().mean()) > 1e-2
    assert 0 <= float(purified.min()) and float(purified.max()) <= 1


@pytest.mark.parametrize("batch", [1, 3])
def test_gradcheck_on_four_pixels(options, batch):
    purifier = Purifier(PixelScore().eval(), PixelClassifier().eval(), clamp=False, **options)
    x = 0.35 + 0.3 * torch.rand(batch, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    noise_free = squares_gradient(purifier, x, seed=2)
    assert bool((noise_free != 0).any())
    assert torch.autograd.gradcheck(lambda x: purifier(x, seed=2), x.requires_grad_(), eps=1e-7, atol=1e-6, rtol=1e-4)


def test_an_image_does_not_depend_on_its_batch(options, images):
    purifier, images = Purifier(small_score(), relu_classifier(), **options), images[:3]
    whole, slope = purifier(images, seed=3), squares_gradient(purifier, images, seed=3)
    for i in range(len(images)):
        torch.testing.assert_close(purifier(images[i : i + 1], seed=3, ids=[i])[0], whole[i], rtol=1e-10, atol=1e-10)
        alone = squares_gradient(purifier, images[i : i + 1], seed=3, ids=[i])[0]
        assert float((alone - slope[i]).norm() / slope[i].norm()) < 1e-9


def test_gradient_of_explicit_noise(options, images):
    purifier = Purifier(small_score(), relu_classifier(), **options)
    noise = explicit_noise(purifier, images[:2])
    (found,) = torch.autograd.grad(purifier(images[:2], noise=noise).square().sum(), noise)
    plain = Definition(purifier)
    with torch.enable_grad():
        output = plain.output(images[:2].clone().requires_grad_(), coupfast.noise.ReplayedNoise(noise))
        (expected,) = torch.autograd.grad(output.square().sum(), noise)
    assert float((found - expected).norm() / expected.norm()) < 1e-10
    assert all(float(row.abs().max()) > 0 for row in found), "every row of noise is read"


def test_guidance_that_is_taken_as_a_constant(images):
    """What is left out is the classifier's Hessian, and nothing else."""
    options, networks = {"method": "lm-coup", "num_steps": 2, "guidance_scale": 100.0}, (small_score(), relu_classifier())
    x = images[:2]
    slopes = {}
    for word in ("detached", "exact"):
        purifier = Purifier(*networks, guidance_gradient=word, **options)
        slopes[word] = squares_gradient(purifier, x, seed=1)
        definition = Definition(purifier, detached=word == "detached")
        noise = definition.noise(x, 1, torch.arange(2), 0)
        _, expected = definition.gradient(x, noise, lambda purified: purified.square().flatten(1).sum(1))
        assert float((slopes[word] - expected).norm() / expected.norm()) < 1e-10
    assert float((slopes["detached"] - slopes["exact"]).norm() / slopes["detached"].norm()) > 1e-3


def test_settings_come_back_from_json(options, images):
    settings = Purifier(small_score(), relu_classifier(), **options).settings
    again = Settings.from_dict(json.loads(json.dumps(settings.to_dict())))
    assert again == settings and again.to_dict() == settings.to_dict()


def test_memory_is_states_and_one_steps_graph(options):
    """From a few to many steps only states are added, as planned."""
    score, classifier = small_score(torch.float32), relu_classifier(torch.float32)
    image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    word = "rounds" if "rounds" in options else "num_steps"
    peaks, steps = {}, {}
    for count in (2, 5):
        purifier = Purifier(score, classifier, memory_budget="least", **{**options, word: count})
        plan = purifier.plan(2)
        noise = [*score.parameters(), *classifier.parameters(), *score.buffers(), *classifier.buffers()]
        with AllocationAccount([image, *noise]) as account:
            purifier(image, seed=0).sum().backward()
        peaks[count], steps[count] = account.peak, purifier.num_steps
        assert account.peak == pytest.approx(plan.peak_bytes, rel=0.25)
    state = 2 * purifier._prepare(image.detach()).bound.state_bytes()
    grown = (peaks[5] - peaks[2]) / ((steps[5] - steps[2]) * state)
    # GDMP's states share the image; of an image that stopped there is one state, however many steps are left.
    least, most = {"gdmp-ssim": (0.45, 0.55), "adp": (0.0, 1.1)}.get(options["method"], (0.9, 1.1))
    assert least <= grown < most


def test_evaluations_are_planned(options):
    plan = Purifier(small_score(), relu_classifier(), **options).plan(3)
    forward, back = EVALUATIONS[options["method"]]
    for name in {*forward, *back}:
        assert plan.evaluations[name] == forward.get(name, 0) + back.get(name, 0), name


def test_evaluations_are_told(options):
    """What `coupfast methods` lists is what an image's run counts."""
    purifier = Purifier(small_score(), relu_classifier(), **options)
    calls = []
    purifier.score.register_forward_hook(lambda *_: calls.append(1))
    image = torch.full((1, 3, 8, 8), 0.5, dtype=torch.float64)
    purifier(image, seed=0)  # looks at the networks first
    calls.clear()
    purifier(image, seed=0)
    told = purifier.settings.method.score_evaluations
    assert 2 <= len(calls) <= told if options["method"] == "adp" else len(calls) == told  # an image may stop early


def test_the_command_line_knows_it(options, tmp_path, capsys):
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    assert main(["purify", "cifar10-20", "--limit=1", f"--out={tmp_path}", "--seed=1", *words]) == 0
    said = json.loads((tmp_path / "purify.json").read_text())["settings"]
    assert said["method"]["name"] == options["method"]
    assert all(said["method"][name] == value for name, value in options.items() if name != "method")
    with pytest.raises(SystemExit):
        main(["purify", "--help"])
    assert options["method"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lm", "num_steps": 0}, "`num_steps` is at least 1, got 0"),
        ({"method": "lm", "learning_rate": 0.0}, "`learning_rate` is finite and above 0, got 0"),
        ({"method": "lm", "sigma_min": 0.7}, "`sigma_min` is at most `sigma_max`, got 0.7 and 0.6"),
        ({"method": "lm", "sigma_max": 1e4}, "`sigma_max` is 10000, and the schedule is so noisy at t = 1.*above 1"),
        ({"method": "lm", "sigma_min": -0.1}, "`sigma_min` is finite and above 0, got -0.1"),
        ({"method": "lm", "fixed_seed": -1}, "`fixed_seed` is at least 0 and at most"),
        ({"method": "lm", "sde": (0.1, 20)}, "`sde` is a coupfast.VPSDE"),
        ({"method": "lm", "sde": DiscreteVPSDE()}, "`sde` is a coupfast.VPSDE in continuous time.*got DiscreteVPSDE"),
        ({"method": "adp", "num_steps": 1.5}, "`num_steps` is an int, got 1.5"),
        ({"method": "adp", "noise_sigma": -1}, "`noise_sigma` is finite and at least 0, got -1"),
        ({"method": "adp", "score_sigma": 1e3}, "`score_sigma` is 1000, and the schedule is so noisy at t = 1.*above 1"),
        ({"method": "adp", "step_share": 1.5}, "`step_share` is above 0 and at most 1, got 1.5"),
        ({"method": "adp", "step_min": 0.2}, "`step_min` is at most `step_max`, got 0.2 and 0.1"),
        ({"method": "adp", "stop_below": 0.1}, "every image would stop at once"),
        ({"method": "gdmp-ssim", "rounds": 0}, "`rounds` is at least 1, got 0"),
        ({"method": "gdmp-ssim", "noise_steps": 1}, "`noise_steps` is at least 2 and at most 1000, got 1"),
        ({"method": "gdmp-ssim", "guide_scale": -1.0}, "`guide_scale` is finite and at least 0, got -1"),
        ({"method": "gdmp-ssim", "guide_batch": 0}, "`guide_batch` is at least 1, got 0"),
        ({"method": "lm-coup", "guidance_scale": math.nan}, "`guidance_scale` is finite and at least 0, got nan"),
    ],
)
def test_knobs_out_of_range(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Purifier(small_score(), relu_classifier(), **options)


def test_uniform_numbers_are_counted():
    """Φ of the row's first element: in (0, 1), one an image whatever its size, and spread evenly."""
    source = CounterNoise(7, torch.arange(4000), torch.zeros(4000, dtype=torch.int64))
    small, large = torch.zeros(4000, 1, 1, 1, dtype=torch.float64), torch.zeros(4000, 3, 4, 4, dtype=torch.float64)
    u = uniform(source, 2, large)
    assert u.shape == (4000, 1, 1, 1)
    torch.testing.assert_close(u, uniform(source, 2, small), rtol=0, atol=0)
    first = source.z(2, large)[:, 0, 0, 0]
    torch.testing.assert_close(u.flatten(), 0.5 * (1 + torch.erf(first / math.sqrt(2))), rtol=1e-12, atol=0)
    # Kolmogorov's distance of 4000 uniform numbers is below 1.95/sqrt(4000) but once in a thousand; the numbers are fixed.
    steps = torch.arange(1, 4001, dtype=torch.float64) / 4000
    assert float((u.flatten().sort().values - steps).abs().max()) < 1.95 / math.sqrt(4000)


@pytest.mark.parametrize("sde", [VPSDE(), VPSDE(0.5, 0.5), VPSDE(0.0, 12.0)], ids=str)
def test_the_time_of_a_noise_level(sde):
    for t in (1e-4, 0.05, 0.7):
        noise = float(sde.sigma(t)) / math.sqrt(float(sde.alpha_bar(t)))
        assert sde.time_of(noise) == pytest.approx(t, rel=1e-9)
    assert sde.time_of(0.0) == 0.0


class TestLM:
    def test_fixed_seed_leaves_no_randomness(self, images):
        purifier = Purifier(small_score(), method="lm", num_steps=2, fixed_seed=9)
        first = purifier(images[:2], seed=0, draw=0)
        torch.testing.assert_close(purifier(images[:2], seed=1, draw=5, ids=[7, 8]), first, rtol=0, atol=0)
        free = Purifier(small_score(), method="lm", num_steps=2)
        assert not torch.equal(free(images[:2], seed=0), free(images[:2], seed=1))
        # What is fixed is the noise of that seed, image 0, draw 0.
        torch.testing.assert_close(free(images[:1], seed=9, ids=[0], draw=0), first[:1], rtol=1e-12, atol=1e-12)
        found = coupfast.check_gradient(purifier, images, images=2, draws=0, directions=0)
        assert found.verdict == "exact"
        with pytest.raises(ValueError, match=r"`noise` must have shape \(0, 1, 3, 8, 8\)"):
            purifier(images[:1], noise=torch.zeros(4, 1, 3, 8, 8, dtype=torch.float64))

    def test_the_first_step_is_the_learning_rate(self, images):
        """Adam's first step is lr g/(|g| + eps): of every element, whatever its gradient's size."""
        purifier = Purifier(small_score(), method="lm", num_steps=1, learning_rate=0.02, clamp=False)
        moved = (purifier(images, seed=0) - images).abs()  # half of what it is in [-1, 1]
        torch.testing.assert_close(moved, torch.full_like(moved, 0.01), rtol=1e-4, atol=0)  # |g| > 1e-4

    def test_an_element_without_gradient_stays(self):
        """Where the denoiser returns the image, Adam's averages are zero, and the gradient is that of the identity."""

        class Nothing(nn.Module):
            def forward(self, x, labels):
                return x * torch.tensor([0.0], dtype=x.dtype)

        x = torch.rand(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        noise = torch.zeros(4, 2, 1, 4, 4, dtype=torch.float64)
        purified = Purifier(Nothing().eval(), method="lm", num_steps=2)(x, noise=noise)
        torch.testing.assert_close(purified, x, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(torch.autograd.grad(purified.sum(), x)[0], torch.ones_like(x), rtol=0, atol=0)

    def test_a_gaussian_goes_uphill(self):
        """Of data N(0, s²) the optimal ε̂ is known, and the loss falls towards the mean, where the likelihood is largest."""

        class Gaussian(nn.Module):
            def forward(self, x, labels):
                alpha_bar = torch.from_numpy(VPSDE().alpha_bar(labels.numpy() / 999)).to(x)[:, None, None, None]
                return torch.sqrt(1 - alpha_bar) / (alpha_bar * 0.04 + 1 - alpha_bar) * x

        x = 0.5 + 0.5 * torch.sign(torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
        purified = Purifier(Gaussian().eval(), method="lm")(x, seed=0)
        assert float((purified - 0.5).abs().mean()) < 0.7 * float((x - 0.5).abs().mean())


class Pointed(nn.Module):
    """The exact ε̂ of images around ½ with standard deviation `spread`[i] in [0, 1] for the image of that sign."""

    def __init__(self, below: float, above: float) -> None:
        super().__init__()
        self.below, self.above = below, above

    def forward(self, x, labels):
        alpha_bar = torch.from_numpy(VPSDE().alpha_bar(labels.numpy() / 999)).to(x)[:, None, None, None]
        spread = torch.where(x.mean(dim=(1, 2, 3), keepdim=True) > 0, self.above, self.below)
        return torch.sqrt(1 - alpha_bar) / (alpha_bar * 4 * spread**2 + 1 - alpha_bar) * x


class TestADP:
    def test_of_a_gaussian_each_step_goes_its_share(self):
        """s(u) = (½ − u)/(spread² + σ²) has 1 − ρ = δ/(spread² + σ²): α s is λ of the way to ½, whatever the spread."""
        x = 0.3 + 0.4 * torch.rand(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        purifier = Purifier(Pointed(0.2, 0.5).eval(), method="adp", num_steps=5, noise_sigma=0.0)
        torch.testing.assert_close(purifier(x, seed=0) - 0.5, 0.95**5 * (x - 0.5), rtol=1e-9, atol=0)

    def test_each_image_stops_for_itself(self):
        """α = λ (spread² + σ²) is 5e-3 above ½ and 2.5e-4 below."""
        x = torch.stack([torch.full((1, 4, 4), value, dtype=torch.float64) for value in (0.8, 0.2, 0.7)])
        options = {"method": "adp", "noise_sigma": 0.0, "score_sigma": 0.05}
        purifier = Purifier(Pointed(0.05, 0.312).eval(), num_steps=3, **options)
        moved, states = purifier(x, seed=0, return_trajectory=True)
        torch.testing.assert_close(moved[[0, 2]] - 0.5, 0.95**3 * (x[[0, 2]] - 0.5), rtol=1e-9, atol=0)
        torch.testing.assert_close(moved[1], x[1], rtol=1e-14, atol=1e-14)
        assert torch.equal(states[0][1], states[-1][1])
        slope = squares_gradient(purifier, x, seed=0)
        torch.testing.assert_close(slope[1], 2 * x[1], rtol=1e-9, atol=0)

    def test_a_step_has_a_largest_size(self):
        """Far from all data a step is `step_max` of the score, here a hundredth of what its share would be."""
        x = torch.full((1, 1, 4, 4), 0.9, dtype=torch.float64)
        purifier = Purifier(Pointed(14.1, 14.1).eval(), method="adp", num_steps=1, noise_sigma=0.0, step_max=0.1)
        spread = 14.1**2 + 0.25**2
        torch.testing.assert_close(purifier(x, seed=0) - 0.5, (1 - 0.1 / spread) * (x - 0.5), rtol=1e-9, atol=0)

    def test_where_the_score_is_zero_or_constant(self, images):
        class Constant(nn.Module):
            def forward(self, x, labels):
                return x * torch.tensor(0.0, dtype=x.dtype) + (x.mean(dim=(1, 2, 3), keepdim=True) > 0)

        x = torch.stack([torch.full((1, 4, 4), value, dtype=torch.float64) for value in (0.9, 0.1)]).requires_grad_()
        purifier = Purifier(Constant().eval(), method="adp", num_steps=2, noise_sigma=0.0, stop_below=0.0)
        purified = purifier(x, seed=0)
        # ε̂ = 1 above: the score is −1/σ everywhere near, each step is 0.1 of it; ε̂ = 0 below: nothing moves.
        torch.testing.assert_close(purified[1], x[1], rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(purified[0], x[0] - 0.1 / 0.25, rtol=1e-12, atol=0)
        assert bool(torch.isfinite(torch.autograd.grad(purified.sum(), x)[0]).all())


class TestGDMPSSIM:
    def test_similarity(self, images):
        """1 of equal images, and the definition's otherwise; symmetric, and its gradient pulls an image towards the other."""
        x, y = images[:2], images[2:4]
        torch.testing.assert_close(ssim(x, x, 5), torch.ones(2, dtype=torch.float64), rtol=1e-12, atol=0)
        torch.testing.assert_close(ssim(x, y, 5), ssim_ref(x, y, 5), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(ssim(x, y, 5), ssim(y, x, 5), rtol=1e-12, atol=1e-14)
        flat = torch.full_like(x, 0.25), torch.full_like(x, 0.75)
        # No structure: what is left is the luminance, (2 · 3/16 + 1e-4)/(10/16 + 1e-4).
        torch.testing.assert_close(ssim(*flat, 3), torch.full((2,), 0.3751 / 0.6251, dtype=torch.float64), rtol=1e-12, atol=0)

    def test_the_guide_keeps_the_image_similar(self, images):
        x = images[:2]
        kept = [
            ssim(Purifier(small_score(), method="gdmp-ssim", rounds=1, ssim_window=5, guide_scale=g)(x, seed=0), x, 5).mean()
            for g in (0.0, 70000.0, 700000.0)
        ]
        assert float(kept[0]) < float(kept[1]) < float(kept[2])

    def test_the_batch_of_the_guide_is_a_number(self, images):
        """Twice the scale of a mean over twice the images is the same."""
        options = {"method": "gdmp-ssim", "rounds": 1, "noise_steps": 3, "ssim_window": 5}
        first = Purifier(small_score(), guide_scale=2e4, guide_batch=50, **options)(images[:2], seed=0)
        second = Purifier(small_score(), guide_scale=4e4, guide_batch=100, **options)(images[:2], seed=0)
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)

    def test_images_smaller_than_the_window(self, images):
        with pytest.raises(ValueError, match="window is 11 pixels wide and images are 8 x 8; give a smaller `ssim_window`"):
            Purifier(small_score(), method="gdmp-ssim")(images, seed=0)
