"""The exact discrete gradient: against autograd through the definition, in the memory it promises."""

import gc

import pytest
import torch
from conftest import bound_of, relu_classifier, silu_classifier, small_score
from torch import nn
from torch.profiler import ProfilerActivity, profile

from coupfast import PurifiedClassifier, Purifier, purify
from coupfast.engine.eager import EagerProgram
from coupfast.engine.memory import AllocationAccount
from coupfast.engines import ENGINES
from coupfast.guidance import Slope
from coupfast.reference import purify_ref

METHODS = ["coup", "reverse-sde", "diffpure"]


def rows(purifier: Purifier, x: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(purifier.recipe.num_noises, *x.shape, dtype=torch.float64, generator=generator).to(x.dtype)


def weights(x: torch.Tensor) -> torch.Tensor:
    return torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6)).to(x.dtype)


def gradient(purifier: Purifier, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad((purifier(x, noise=noise) * weights(x)).sum(), x)
    return found


def plain_autograd(purifier: Purifier, x: torch.Tensor, noise: torch.Tensor, *, detached: bool = False) -> torch.Tensor:
    """Back-propagation through every step of the definition, all activations kept."""
    x = x.clone().requires_grad_()
    x_0 = (2 * x - 1).clamp(-1, 1) if purifier.settings.method.clamp else 2 * x - 1
    end = purify_ref(
        x_0,
        purifier.score,
        purifier.classifier,
        noise,
        grid=purifier.recipe.table.t,
        forward_noising=purifier.settings.method.name == "diffpure",
        dynamics=purifier.settings.method.solver,
        guidance_scale=purifier.settings.method.scale,
        detached=detached,
    )
    end = end.clamp(-1, 1) if purifier.settings.method.clamp else end
    (found,) = torch.autograd.grad((((end + 1) / 2) * weights(x)).sum(), x)
    return found


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("make_classifier", [relu_classifier, silu_classifier])
@pytest.mark.parametrize("solver", ["euler-maruyama", "probability-flow"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("clamp", [True, False])
def test_equal_to_plain_autograd(images, make_classifier, solver, method, clamp):
    options = {"method": method, "solver": solver, "clamp": clamp, "guidance_scale": 3.0, "num_steps": 4, "engine": "eager"}
    purifier = Purifier(small_score(), make_classifier(), **options)
    noise = rows(purifier, images)
    # A few ulps, magnified by four steps of networks with derivatives of order ten.
    assert relative_error(gradient(purifier, images, noise), plain_autograd(purifier, images, noise)) < 200 * 2.0**-52


def test_the_guidance_matters_and_can_be_detached(images, score, classifier):
    exact = Purifier(score, classifier, num_steps=4, guidance_scale=30.0)
    detached = Purifier(score, classifier, num_steps=4, guidance_scale=30.0, guidance_gradient="detached")
    noise = rows(exact, images)
    found = gradient(detached, images, noise)
    assert relative_error(found, plain_autograd(exact, images, noise, detached=True)) < 200 * 2.0**-52
    assert relative_error(found, gradient(exact, images, noise)) > 1e-3


class Pixels(nn.Module):
    """A smooth score net for images of any size."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x + 0.3 * x.flip(3)) * (0.5 + 0.01 * labels[:, None, None, None])


class PixelClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * torch.tanh(self.linear(torch.sin(3 * x).flatten(1)))


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck_on_four_pixels(method):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        purifier = Purifier(Pixels().eval(), PixelClassifier().eval(), method=method, num_steps=3, clamp=False)
    x = torch.rand(2, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    noise = rows(purifier, x).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, noise: purifier(x, noise=noise), (x, noise))


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "cuda"])  # which test_cuda_engine.py runs
@pytest.mark.parametrize("make_classifier", [relu_classifier, silu_classifier])
def test_float32_error_is_that_of_plain_autograd(images, engine, make_classifier):
    noise_source = Purifier(small_score(), make_classifier(), num_steps=4)
    noise = rows(noise_source, images)
    expected = plain_autograd(noise_source, images, noise)
    single = Purifier(small_score(torch.float32), make_classifier(torch.float32), num_steps=4, engine=engine)
    x, z = images.float(), noise.float()
    ours = relative_error(gradient(single, x, z).double(), expected)
    theirs = relative_error(plain_autograd(single, x, z).double(), expected)
    assert ours < 4 * theirs
    assert theirs < 1e-4  # no ReLU of these few flips between the precisions: the comparison is of rounding


def test_gradient_of_the_noise(images, score, classifier):
    for method in METHODS:
        purifier = Purifier(score, classifier, method=method, num_steps=3, clamp=False)
        noise = rows(purifier, images).requires_grad_()
        (found,) = torch.autograd.grad((purifier(images, noise=noise) * weights(images)).sum(), noise)
        end = purify_ref(
            2 * images - 1,
            score,
            purifier.classifier,
            noise,
            grid=purifier.recipe.table.t,
            forward_noising=method == "diffpure",
        )
        (expected,) = torch.autograd.grad((((end + 1) / 2) * weights(images)).sum(), noise)
        assert relative_error(found, expected) < 200 * 2.0**-52


# --- storage changes nothing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("make_classifier", [relu_classifier, silu_classifier])
def test_what_is_kept_does_not_change_a_bit(images, dtype, make_classifier):
    score, classifier = small_score(dtype), make_classifier(dtype)
    x = images.to(dtype)
    least = Purifier(score, classifier, num_steps=5, memory_budget="least", engine="eager")
    noise = rows(least, x)
    expected = gradient(least, x, noise)
    plan = least.plan(len(x))
    assert (plan.storage.piece, plan.storage.slopes, plan.storage.kept_steps) == (5, False, 0)
    seen = set()
    for extra in (0, 1, 2, 3, 6):
        budget = plan.peak_bytes + extra * plan.step.activations + 5 * plan.step.slopes
        purifier = Purifier(score, classifier, num_steps=5, memory_budget=budget, engine="eager")
        storage = purifier.plan(len(x)).storage
        seen.add((storage.slopes, storage.kept_steps))
        # Rebuilt steps and masks are those of the forward pass, bit for bit, so the storage is invisible.
        torch.testing.assert_close(gradient(purifier, x, noise), expected, rtol=0, atol=0)
    assert len(seen) >= 3
    assert max(kept for _, kept in seen) == 5
    auto = Purifier(score, classifier, num_steps=5, engine="eager")
    torch.testing.assert_close(gradient(auto, x, noise), expected, rtol=0, atol=0)


def test_masks_of_the_backward_pass_are_those_of_the_forward_pass(images):
    """A rebuilt step's masks equal the stored ones bit for bit, in float32, where one flip would show."""
    score, classifier = small_score(torch.float32), relu_classifier(torch.float32)
    x = images.float()
    purifier = Purifier(score, classifier, num_steps=3, memory_budget="least", engine="eager")
    program = bound_of(purifier, x).for_batch(len(x))
    assert isinstance(program, EagerProgram) and program.guidance is not None and program.guidance.graph is not None
    x_k = 2 * x - 1
    _, kept = program.guidance.gradient(x_k, keep_slopes=True)
    with torch.no_grad():
        _, found = program.guidance.graph.evaluate(x_k, keep_slopes=True)
    assert len(found) == 3
    for a, b in zip(found, kept.slopes, strict=True):
        assert isinstance(a, Slope)
        torch.testing.assert_close(a.data, b.data, rtol=0, atol=0)


def test_a_batch_that_does_not_fit_is_split(images, score, classifier):
    whole = Purifier(score, classifier, num_steps=3, memory_budget="least")
    noise = rows(whole, images)
    one = Purifier(score, classifier, num_steps=3, memory_budget=whole.plan(5).least_bytes)
    assert one.plan(5).storage.piece == 1
    two = Purifier(score, classifier, num_steps=3, memory_budget=(whole.plan(5).least_bytes + whole.plan(5).peak_bytes) // 2)
    assert 1 < two.plan(5).storage.piece < 5
    expected = gradient(whole, images, noise)
    for purifier in (one, two):
        # Another batch shape: other kernels, so rounding.
        assert relative_error(gradient(purifier, images, noise), expected) < 200 * 2.0**-52
        purified, states = purifier(images.clone().requires_grad_(), noise=noise, return_trajectory=True)
        reference, reference_states = whole(images, noise=noise, return_trajectory=True)
        torch.testing.assert_close(purified.detach(), reference, rtol=0, atol=200 * 2.0**-52)
        torch.testing.assert_close(states, reference_states, rtol=0, atol=200 * 2.0**-52)
        ids = torch.tensor([9, 3, 5, 7, 1])
        x = images.clone().requires_grad_()
        torch.testing.assert_close(
            purifier(x, seed=2, ids=ids, draw=ids).detach(), whole(images, seed=2, ids=ids, draw=ids), rtol=0, atol=1e-13
        )


def test_a_budget_below_the_least_says_the_least(images, score, classifier):
    least = Purifier(score, classifier, num_steps=3).plan(5).least_bytes
    purifier = Purifier(score, classifier, num_steps=3, memory_budget=least - 1)
    with pytest.raises(ValueError, match=f"need at least {least} "):
        purifier.plan(5)
    with pytest.raises(ValueError, match=f"need at least {least} "):
        purifier(images.clone().requires_grad_(), seed=0)


def peak_bytes(call) -> int:
    """Peak of the CPU allocator above what was allocated before."""
    call()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    live = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("budget", ["least", "auto"])
@pytest.mark.parametrize(("method", "batch", "steps"), [("coup", 2, 4), ("reverse-sde", 3, 3), ("coup", 1, 12)])
def test_predicted_peak_is_the_measured_one(budget, method, batch, steps):
    import coupfast

    score, classifier = coupfast.load_score("cifar10-tiny"), coupfast.load_classifier("cifar10-tiny")
    purifier = Purifier(score, classifier, method=method, num_steps=steps, memory_budget=budget, engine="eager")
    x = torch.rand(batch, 3, 32, 32)
    noise = torch.randn(purifier.recipe.num_noises, *x.shape)

    def call() -> None:
        image = x.clone().requires_grad_()
        purifier(image, noise=noise).sum().backward()

    assert purifier.plan(batch).peak_bytes == pytest.approx(peak_bytes(call), rel=0.15)


def test_memory_is_constant_to_a_thousand_steps():
    """The tiny network: from 10 to 1000 steps only the states are added, 12 KiB per image and step."""
    import coupfast

    score = coupfast.load_score("cifar10-tiny")
    x = torch.rand(1, 3, 32, 32)
    peaks = {}
    for steps in (10, 1000):
        # Without noise, only to save the time of making it.
        options = {"method": "reverse-sde", "solver": "probability-flow", "memory_budget": "least", "engine": "eager"}
        purifier = Purifier(score, num_steps=steps, **options)
        step = purifier.plan(1).step
        image = x.clone().requires_grad_()
        # Every result's storage while it lives; the profiler's account of a thousand steps would take minutes more.
        with AllocationAccount([image, *score.parameters()]) as account:
            purifier(image, seed=0).sum().backward()
        peaks[steps] = account.peak
        assert account.peak <= 1.15 * (step.activations + steps * 12 * 1024)
    assert peaks[1000] - peaks[10] == pytest.approx(990 * 12 * 1024, rel=0.02)


def test_predicted_evaluations_are_the_counted_ones(images):
    score, classifier = small_score(), relu_classifier()
    calls = {"forward": 0}
    score.register_forward_hook(lambda *_: calls.__setitem__("forward", calls["forward"] + 1))
    for budget, kept in (("least", 0), ("auto", 4)):
        purifier = Purifier(score, classifier, num_steps=4, memory_budget=budget)
        plan = purifier.plan(len(images))
        assert plan.storage.kept_steps == kept
        calls["forward"] = 0
        purifier(images.clone().requires_grad_(), seed=0).sum().backward()
        assert calls["forward"] == plan.evaluations["score forward"] == 4 + (4 - kept)
        assert plan.evaluations["score backward"] == 4
        assert plan.evaluations["classifier forward-mode"] == plan.evaluations["classifier reverse-mode"] == 4
        assert str(plan.peak_bytes >> 20) in str(plan)


# --- under other people's autograd ------------------------------------------------------------------------------------


def test_first_order_only(images, score, classifier):
    x = images.clone().requires_grad_()
    for loss in (lambda purified: purified.sum(), lambda purified: (purified**2).sum()):
        (first,) = torch.autograd.grad(loss(purify(x, score, classifier, num_steps=2, seed=0)), x, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            first.sum().backward()


def test_backward_twice(images, score, classifier):
    for budget in ("least", "auto"):
        x = images.clone().requires_grad_()
        out = purify(x, score, classifier, num_steps=3, seed=0, memory_budget=budget).sum()
        (first,) = torch.autograd.grad(out, x, retain_graph=True)
        (second,) = torch.autograd.grad(out, x)
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_functional_vjp(images, score, classifier):
    purifier = Purifier(score, classifier, num_steps=3)
    x = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad((purifier(x, seed=0) * weights(x)).sum(), x)
    out, vjp = torch.func.vjp(lambda image: purifier(image, seed=0), images)
    torch.testing.assert_close(out, purifier(images, seed=0), rtol=0, atol=0)
    torch.testing.assert_close(vjp(weights(images))[0], expected, rtol=0, atol=0)


def test_no_grad_keeps_nothing(images, score, classifier):
    purifier = Purifier(score, classifier, num_steps=3)
    x = images.clone().requires_grad_()
    expected = purifier(x, seed=0)
    with torch.no_grad():
        found = purifier(x, seed=0)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(purifier(images, seed=0), expected.detach(), rtol=0, atol=0)


def test_a_frozen_image_needs_no_gradient(images, score, classifier):
    assert not purify(images, score, classifier, num_steps=2, seed=0).requires_grad


@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_formats(images, score, classifier, channels_last):
    purifier = Purifier(score, classifier, num_steps=2)
    expected = gradient(purifier, images, rows(purifier, images))
    x = images.to(memory_format=torch.channels_last) if channels_last else images.transpose(2, 3).contiguous().transpose(2, 3)
    assert relative_error(gradient(purifier, x, rows(purifier, images)), expected) < 200 * 2.0**-52


def test_two_runs_alive_at_once(images, score, classifier):
    purifier = Purifier(score, classifier, num_steps=3)
    a, b = images.clone().requires_grad_(), images.flip(0).clone().requires_grad_()
    out_a, out_b = purifier(a, seed=0), purifier(b, seed=1)
    (grad_a,) = torch.autograd.grad(out_a.sum(), a)
    (grad_b,) = torch.autograd.grad(out_b.sum(), b)
    alone = images.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(purifier(alone, seed=0).sum(), alone)[0], grad_a, rtol=0, atol=0)
    assert relative_error(grad_b, grad_a) > 1e-3


# --- gradient modes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["exact", "adjoint", "adjoint-parameters", "bpda", "surrogate", "none"])
def test_modes_share_the_forward_pass(images, score, classifier, mode):
    expected = purify(images, score, classifier, num_steps=3, seed=0)
    x = images.clone().requires_grad_()
    found = purify(x, score, classifier, num_steps=3, seed=0, gradient=mode, surrogate_steps=2)
    # The continuous adjoint's forward pass is torchsde's: equal to rounding.
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-13 if mode.startswith("adjoint") else 0)
    assert found.requires_grad == (mode != "none")


def test_bpda_is_the_identity(images, score, classifier):
    x = images.clone().requires_grad_()
    found = purify(x, score, classifier, num_steps=3, seed=0, gradient="bpda")
    (g,) = torch.autograd.grad((found * weights(x)).sum(), x)
    torch.testing.assert_close(g, weights(x), rtol=0, atol=0)


def test_surrogate_with_every_step_is_exact(images, score, classifier):
    purifier = Purifier(score, classifier, num_steps=4)
    noise = rows(purifier, images)
    exact = gradient(purifier, images, noise)
    every = Purifier(score, classifier, num_steps=4, gradient="surrogate", surrogate_steps=4)
    torch.testing.assert_close(gradient(every, images, noise), exact, rtol=0, atol=0)


def test_surrogate_is_the_coarse_steps_gradient_at_the_fine_states(images, score, classifier):
    fine = Purifier(score, classifier, num_steps=6, clamp=False)
    noise = rows(fine, images)
    _, states = fine(images, noise=noise, return_trajectory=True)
    surrogate = Purifier(score, classifier, num_steps=6, gradient="surrogate", surrogate_steps=3, clamp=False)
    found = gradient(surrogate, images, noise)
    v = weights(images) / 2
    times = fine.recipe.table.t[::2]
    for k in reversed(range(3)):
        start = states[2 * k].clone().requires_grad_()
        end = purify_ref(start, score, classifier, torch.zeros(1, *images.shape).double(), grid=times[k : k + 2])
        (v,) = torch.autograd.grad(end, start, v)
    assert relative_error(found, 2 * v) < 200 * 2.0**-52


@pytest.mark.parametrize("mode", ["adjoint", "adjoint-parameters"])
def test_continuous_adjoint_is_torchsdes(images, score, classifier, mode):
    purifier = Purifier(score, classifier, num_steps=4, gradient=mode, guidance_gradient="detached")
    noise = rows(purifier, images)
    score.requires_grad_(mode == "adjoint-parameters")
    found = gradient(purifier, images, noise)
    x = images.clone().requires_grad_()
    kind = "frozen" if mode == "adjoint" else "parameters"
    end = purify_ref(2 * x - 1, score, classifier, noise, grid=purifier.recipe.table.t, detached=True, adjoint=kind)
    (expected,) = torch.autograd.grad((((end.clamp(-1, 1) + 1) / 2) * weights(x)).sum(), x)
    assert relative_error(found, expected) < 200 * 2.0**-52
    exact = gradient(Purifier(score, classifier, num_steps=4, guidance_gradient="detached"), images, noise)
    # It is another gradient: that is why "exact" is the default.
    assert relative_error(found, exact) > 1e-2


def test_adjoint_has_no_trajectory(images, score, classifier):
    purifier = Purifier(score, classifier, num_steps=2, gradient="adjoint")
    with pytest.raises(ValueError, match="do not go together"):
        purifier(images.clone().requires_grad_(), seed=0, return_trajectory=True)


# --- what goes wrong is said ------------------------------------------------------------------------------------------


class Bursting(nn.Module):
    """A score net with finite values whose derivative is infinite at labels above 70."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.sqrt((x - x.detach()) ** 2) if float(labels[0]) > 70 else 0.1 * x


@pytest.mark.parametrize("budget", ["least", "auto"])
def test_a_gradient_that_is_not_finite_names_its_step(images, budget):
    x = images.clone().requires_grad_()
    out = purify(x, Bursting().eval(), method="reverse-sde", num_steps=5, seed=0, memory_budget=budget)
    # t = 0.1, 0.08, 0.06, 0.04, 0.02: labels are above 70 in steps 0 and 1, and the backward pass meets 1 first.
    with pytest.raises(FloatingPointError, match=r"stopped being finite in step 1 \(t = 0.08"):
        out.sum().backward()


def test_an_incoming_gradient_that_is_not_finite(images, score, classifier):
    x = images.clone().requires_grad_()
    out = purify(x, score, classifier, num_steps=2, seed=0)
    with pytest.raises(FloatingPointError, match="came into the purification"):
        (out.sum() * float("nan")).backward()


def test_networks_that_cannot_be_rebuilt_are_refused(images, classifier):
    class Writing(nn.Module):
        def forward(self, x, labels):
            return x.clamp_(-1, 1) * 0.5

    class Relabelling(nn.Module):
        def forward(self, x, labels):
            return x * labels.mul_(0.5)[:, None, None, None]

    class Counting(nn.Module):
        calls = 0

        def forward(self, x, labels):
            self.calls += 1
            return x / self.calls

    class Dropping(nn.Module):
        def forward(self, x, labels):
            return torch.nn.functional.dropout(x, 0.5, training=True)

    for network, message in (
        (Writing(), "writes into its input"),
        (Relabelling(), "writes into its input"),
        (Counting(), "gives different results for the same input"),
        (Dropping(), "gives different results for the same input"),
    ):
        with pytest.raises(ValueError, match=f"the score net {message}"):
            purify(images, network.eval(), method="reverse-sde", num_steps=2)


def test_a_constant_score_net_has_a_gradient(images):
    class Constant(nn.Module):
        def forward(self, x, labels):
            return torch.zeros_like(x)

    purifier = Purifier(Constant().eval(), method="reverse-sde", num_steps=3, clamp=False)
    x = images.clone().requires_grad_()
    (g,) = torch.autograd.grad(purifier(x, seed=0).sum(), x)
    expected = float(purifier.recipe.table.a.prod())
    torch.testing.assert_close(g, torch.full_like(g, expected), rtol=1e-15, atol=0)


@pytest.mark.parametrize("mode", ["surrogate", "adjoint", "bpda"])
def test_no_gradient_of_the_noise_but_the_exact_one(images, score, classifier, mode):
    purifier = Purifier(score, classifier, num_steps=3, gradient=mode, surrogate_steps=2)
    noise = rows(purifier, images).requires_grad_()
    with pytest.raises(ValueError, match="exists with gradient='exact' only"):
        purifier(images, noise=noise)


def test_second_derivatives_by_the_noise_are_refused_too(images, score, classifier):
    purifier = Purifier(score, classifier, num_steps=2)
    noise = rows(purifier, images).requires_grad_()
    (first,) = torch.autograd.grad((purifier(images, noise=noise) ** 2).sum(), noise, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        first.sum().backward()


@pytest.mark.parametrize("mode", ["exact", "adjoint", "adjoint-parameters"])
def test_strict_in_the_backward_pass_of_the_whole_defense(mode):
    score, classifier = small_score(torch.float32), relu_classifier(torch.float32)
    score.requires_grad_(True)
    classifier.requires_grad_(True)
    defense = PurifiedClassifier(Purifier(score, classifier, num_steps=2, gradient=mode), classifier, seed=1)
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)).requires_grad_()
    defense(x, draw=0).square().sum().backward()
    expected = x.grad.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = torch.autograd.grad(defense(x, draw=0).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(p.grad is None for p in score.parameters())


def test_memory_of_a_split_batch():
    """The pieces' states go to one place: a peak as planned, and not the states twice."""
    score, classifier = small_score(torch.float32), relu_classifier(torch.float32)
    x = torch.rand(4, 3, 8, 8)
    whole = Purifier(score, classifier, num_steps=40, memory_budget="least", engine="eager")
    split = Purifier(score, classifier, num_steps=40, memory_budget=whole.plan(4).least_bytes, engine="eager")
    plan = split.plan(4)
    assert plan.storage.piece == 1
    noise, image = torch.randn(40, *x.shape), x.clone().requires_grad_()
    with AllocationAccount([image, noise, *score.parameters(), *classifier.parameters()]) as account:
        split(image, noise=noise).sum().backward()
    assert account.peak == pytest.approx(plan.peak_bytes, rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("free", [0, 1 << 40])
def test_a_whole_batch_keeps_what_fits_and_is_never_split(free, dtype, monkeypatch):
    """What is kept changes no bit: results do not follow from the memory that was free."""
    monkeypatch.setattr("coupfast.prepared.available_bytes", lambda device: free)
    score, classifier, x = small_score(dtype), relu_classifier(dtype), torch.rand(4, 3, 8, 8, dtype=dtype)
    least, whole = (Purifier(score, classifier, num_steps=3, memory_budget=budget) for budget in ("least", "whole"))
    assert whole.plan(4).storage.piece == 4
    assert whole.plan(4).storage.kept_steps == (3 if free else 0)
    noise = torch.randn(3, *x.shape, dtype=dtype)
    torch.testing.assert_close(*(gradient(purifier, x, noise) for purifier in (least, whole)), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "forward", "backward"),
    [({"gradient": "surrogate", "surrogate_steps": 2}, 6 + 2, 2), ({"gradient": "bpda"}, 6, 0), ({"gradient": "none"}, 6, 0)],
    ids=str,
)
def test_plan_follows_the_gradient_mode(score, classifier, options, forward, backward):
    plan = Purifier(score, classifier, num_steps=6, **options).plan(3)
    assert plan.evaluations["score forward"] == forward
    assert plan.evaluations.get("score backward", 0) == backward
    assert not plan.storage.slopes and plan.storage.kept_steps == 0


def test_no_plan_of_torchsdes_memory(score, classifier):
    with pytest.raises(ValueError, match="cannot be planned"):
        Purifier(score, classifier, num_steps=2, gradient="adjoint").plan(1)


def test_attack_through_the_defense(images, score):
    """A small signed step against a fixed draw raises the loss by what the gradient says (smooth: no kink is in the way)."""
    classifier = silu_classifier()
    defense = PurifiedClassifier(Purifier(score, classifier, num_steps=3, clamp=False), classifier, seed=3)
    labels = defense(images, draw=0).argmax(dim=1)
    x = images.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(defense(x, draw=0), labels, reduction="none")
    (g,) = torch.autograd.grad(loss.sum(), x)
    moved = (images + 1e-6 * g.sign()).clamp(0, 1)
    after = torch.nn.functional.cross_entropy(defense(moved, draw=0), labels, reduction="none")
    expected = (g * (moved - images)).flatten(1).sum(dim=1)
    assert bool((expected > 0).all())
    # Curvature: a millionth of the step's own size, magnified by networks of order a thousand.
    torch.testing.assert_close(after - loss, expected, rtol=1e-2, atol=0)
