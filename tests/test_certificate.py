import json
import math

import pytest
import torch
from conftest import relu_classifier, silu_classifier, small_score
from torch import nn

import coupfast
from coupfast.definition import Definition
from coupfast.engine.memory import AllocationAccount
from coupfast.gradient_check import check_gradient, signal_to_noise
from coupfast.purify import PurifiedClassifier, Purifier
from coupfast_kernels.noise import standard_normal_ref

EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
FEW = {"images": 2, "draws": 2, "directions": 1}
PLAIN = {"images": 2, "draws": 0, "directions": 0}
STEPS = 3


class SmallScore(nn.Module):
    """A smooth network of three layers, for tests of the bookkeeping: a fiftieth of DDPM++'s time."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        for parameter in self.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)

    def forward(self, x, labels):
        return self.second(torch.tanh(self.first(x) + 0.01 * labels[:, None, None, None]))


def defense(dtype=torch.float64, *, network=None, seed=5, **options):
    options = {"num_steps": STEPS} | options
    score = (SmallScore() if network is None else network).to(dtype).eval()
    classifier = silu_classifier(dtype)
    return PurifiedClassifier(Purifier(score, classifier, **options), classifier, seed=seed)


def photos(dtype=torch.float64, batch=3):
    """Images that touch 0 and 1, where the first clip has its edges."""
    x = torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return ((1.4 * x - 0.2).clamp(0.0, 1.0)).to(dtype)


@pytest.mark.parametrize("method", ["coup", "reverse-sde", "diffpure"])
@pytest.mark.parametrize("solver", ["euler-maruyama", "probability-flow"])
def test_exact_in_float64(method, solver):
    network = small_score() if (method, solver) == ("coup", "euler-maruyama") else None
    found = check_gradient(defense(network=network, method=method, solver=solver), photos(), **PLAIN)
    # One part in eps for each of a step's few hundred operations in a row, both ways, at most.
    bound = 1000 * STEPS * EPS64
    assert found.relative_error < bound
    assert found.forward_error < bound
    assert 1.0 - found.cosine < bound
    assert found.sign_agreement == 1.0
    assert [image.sign_agreement for image in found.images] == [1.0, 1.0]


def test_float32_adds_rounding_only():
    small = defense(torch.float32, network=small_score())
    x = photos(torch.float32)
    found = check_gradient(small, x, **PLAIN)
    # The yardstick is float32 back-propagation through the plain loop.
    definition, plain = (Definition(small.purifier, small.classifier, dtype=dtype) for dtype in (torch.float64, torch.float32))
    noise = definition.noise(x[:2], 5, torch.arange(2), 0)
    labels = torch.tensor(found.labels)

    def losses(logits):
        return nn.functional.cross_entropy(logits.double(), labels, reduction="none")

    exact = definition.gradient(x[:2].double(), noise, losses)[1]
    same = plain.noise(x[:2], 5, torch.arange(2), 0)
    yardstick = float((plain.gradient(x[:2], same, losses)[1] - exact).norm() / exact.norm())
    assert EPS32 / 8 < found.relative_error < 4 * yardstick
    assert found.dtype == "float32"


def test_detached_guidance_is_compared_with_the_exact_gradient():
    exact, detached = (check_gradient(defense(guidance_gradient=mode), photos(), **FEW) for mode in ("exact", "detached"))
    assert detached.relative_error > 1e-4 > 1e6 * exact.relative_error
    assert detached.settings["gradient"]["guidance"] == "detached"
    assert [r.float64 for r in detached.derivatives if r.direction != "sign"] == [
        r.float64 for r in exact.derivatives if r.direction != "sign"
    ]


def test_bpda_of_a_bare_purifier_is_the_functional_itself():
    found = check_gradient(defense(gradient="bpda").purifier, photos(), **FEW, seed=9)
    functional = standard_normal_ref((2, 3, 8, 8), seed=9, ids=torch.arange(2), draw=0, step=2**32 - 2).double()
    torch.testing.assert_close(found.overall.norm, float(functional.norm()), rtol=8 * EPS64, atol=0.0)
    assert found.relative_error > 0.05
    assert found.labels is None
    assert "linear functional" in found.loss
    # Central differences know it, too: this gradient is far from them, the float64 gradient is not.
    assert max(abs(r.difference - r.mode) / r.scale for r in found.derivatives) > 0.05
    assert found.signal_to_noise.noise == 0.0  # the identity's gradient of a linear loss has no noise
    assert math.isinf(found.signal_to_noise.ratio)
    assert found.to_dict()["signal_to_noise"]["ratio"] is None
    assert "no noise to average" in str(found)


def test_no_gradient():
    found = check_gradient(defense(gradient="none"), photos(), **FEW)
    assert not found.has_gradient
    assert found.overall is None
    assert math.isnan(found.cosine)
    assert found.images == ()
    assert found.signal_to_noise is None
    assert found.draws == 0
    assert {r.mode for r in found.derivatives} == {None}
    assert "gives no gradient" in str(found)
    assert json.loads(found.to_json())["overall"] is None


@pytest.mark.parametrize("clamp", [True, False])
def test_central_differences(clamp):
    found = check_gradient(defense(clamp=clamp), photos(), images=2, draws=0, directions=2)
    assert [(r.image, r.direction) for r in found.derivatives] == [
        (image, name) for name in ("random 0", "random 1", "sign") for image in (0, 1)
    ]
    for row in found.derivatives:
        assert len(row.estimates) == len(found.steps)
        assert row.difference in row.estimates
        # Losses of order 10 carry some tens of eps, divided by the step of 1e-6, relative to gradients of order 1; the
        # truncation, 1e-12, is less.
        assert abs(row.difference - row.float64) < 1e5 * EPS64 / 1e-6 * row.scale
        assert row.uncertainty < 1e-4 * row.scale
    assert found.signal_to_noise is None


def test_labels():
    small, x = defense(), photos()
    predicted = check_gradient(small, x, **PLAIN)
    assert predicted.labels == tuple(small(x[:2], draw=0).argmax(dim=1).tolist())
    assert "predicted" in predicted.loss
    y = (torch.tensor(predicted.labels + (0,)) + 1) % 10
    true = check_gradient(small, x, y, **PLAIN)
    assert true.labels == tuple(y[:2].tolist())
    assert "true" in true.loss
    assert true.overall.norm_float64 > predicted.overall.norm_float64  # a wrong label leaves more to gain


def test_signal_to_noise():
    small, x, draws = defense(), photos(batch=2), 5
    found = check_gradient(small, x, images=2, draws=draws, directions=0)
    gradients = []
    for draw in range(draws):
        image = x.clone().requires_grad_()
        loss = nn.functional.cross_entropy(small(image, draw=draw), torch.tensor(found.labels), reduction="sum")
        gradients.append(torch.autograd.grad(loss, image)[0].flatten(1))
    g = torch.stack(gradients)  # [draws, batch, elements]
    noise = g.var(dim=0, correction=1).sum(dim=1) / draws
    signal = g.mean(dim=0).square().sum(dim=1) - noise
    tol = 1e-12  # differences of gradients that agree in a digit or two
    for image in range(2):
        torch.testing.assert_close(found.images_signal_to_noise[image].noise, float(noise[image]), rtol=tol, atol=0.0)
        torch.testing.assert_close(found.images_signal_to_noise[image].signal, float(signal[image]), rtol=tol, atol=0.0)
    torch.testing.assert_close(found.signal_to_noise.ratio, float(signal.sum() / noise.sum()), rtol=tol, atol=0.0)
    assert found.derivatives == ()


def test_signal_is_unbiased():
    """Of pure noise, the signal is zero on average; ‖ḡ‖² alone would be S²/m."""
    generator = torch.Generator().manual_seed(0)
    trials, draws = 400, 3
    gradients = torch.randn(draws, trials, 20, generator=generator, dtype=torch.float64)
    signals = torch.tensor([image.signal for image in signal_to_noise(gradients)[1]])
    # Var(‖ḡ‖² − S²/m) is about 2 n / m² + 2 n / (m² (m − 1)) = 6.7 for n = 20, m = 3: five standard errors of the mean.
    assert abs(float(signals.mean())) < 5 * math.sqrt(6.7 / trials)


def test_leaves_the_defense_as_it_was():
    small, x = defense(), photos()
    for parameter in small.purifier.score.parameters():
        parameter.requires_grad_(True)
    small.next_draw = 17
    small.purifier.last_seed = 99
    state, weights = torch.get_rng_state(), {name: p.clone() for name, p in small.named_parameters()}
    x.requires_grad_(True)
    with torch.no_grad():
        first = check_gradient(small, x, **FEW)
    with torch.inference_mode():
        second = check_gradient(small, photos(), **FEW)
    assert small.next_draw == 17
    assert small.purifier.last_seed == 99
    assert torch.equal(torch.get_rng_state(), state)
    assert x.grad is None
    assert all(parameter.grad is None and parameter.dtype == torch.float64 for parameter in small.parameters())
    for name, parameter in small.named_parameters():
        torch.testing.assert_close(parameter, weights[name], rtol=0.0, atol=0.0)
    apart = {key for key, value in first.to_dict().items() if value != second.to_dict()[key]}
    assert apart <= {"seconds", "memory_limit"}


def test_float32_networks_are_not_converted():
    small = defense(torch.float32)
    check_gradient(small, photos(torch.float32), images=1, draws=0, directions=0)
    assert {parameter.dtype for parameter in small.parameters()} == {torch.float32}
    assert small(photos(torch.float32)).dtype == torch.float32


@pytest.mark.parametrize("method", ["coup", "diffpure"])
def test_cut_into_pieces_it_is_the_same_gradient(method):
    small, x = defense(method=method, num_steps=5), photos(batch=2)
    definition = Definition(small.purifier, small.classifier)
    noise = definition.noise(x, 0, torch.arange(2), 0)
    whole, *cut = (definition.gradient(x, noise, lambda y: y.logsumexp(1), steps_at_once=n) for n in (None, 1, 2, 4))
    for output, gradient in cut:
        torch.testing.assert_close(output, whole[0], rtol=4 * EPS64, atol=0.0)
        torch.testing.assert_close(gradient, whole[1], rtol=0.0, atol=64 * EPS64 * float(whole[1].abs().max()))


def test_predicted_memory_and_its_limit():
    small = defense(network=small_score(), num_steps=6)
    x = photos(batch=2)
    full = check_gradient(small, x, **PLAIN)
    assert full.steps_at_once == 6
    # The definition's copies of float64 weights are the caller's own here, but counted: they are on the safe side.
    weights = sum(t.nbytes for t in [*small.parameters(), *small.buffers()])
    definition = Definition(small.purifier, small.classifier)
    noise = definition.noise(x, 0, torch.arange(2), 0)
    with AllocationAccount() as account:
        definition.gradient(x, noise, lambda y: y.logsumexp(1))
    assert 0.9 * account.peak < full.predicted_bytes - weights < 1.25 * account.peak
    less = check_gradient(small, x, **PLAIN, memory_limit=full.predicted_bytes // 2)
    assert 1 <= less.steps_at_once < 6
    assert less.predicted_bytes <= full.predicted_bytes // 2
    torch.testing.assert_close(less.overall.norm_float64, full.overall.norm_float64, rtol=64 * EPS64, atol=0.0)
    with pytest.raises(MemoryError, match="one step of 2 images needs .* MiB"):
        check_gradient(small, x, images=2, memory_limit=10_000)


def test_json_and_text():
    found = check_gradient(defense(), photos(), **FEW)
    read = json.loads(found.to_json())
    assert read == found.to_dict()
    assert read["overall"]["cosine"] == found.cosine
    assert read["derivatives"][0]["estimates"] == list(found.derivatives[0].estimates)
    text = str(found)
    for part in ("coup", "cosine", "central differences", "signal to noise", "draw 0", f"{STEPS} at once"):
        assert part in text
    assert coupfast.check_gradient is check_gradient
    assert isinstance(found, coupfast.GradientCertificate)


def test_ids_name_the_noise():
    small, x = defense(), photos()
    swapped = check_gradient(small, x[[1, 0]], ids=[1, 0], **PLAIN)
    found = check_gradient(small, x, **PLAIN)
    assert swapped.ids == (1, 0)
    torch.testing.assert_close(swapped.images[0].norm, found.images[1].norm, rtol=64 * EPS64, atol=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 0}, "`images` is an integer of at least 1, got 0"),
        ({"draws": 1}, "`draws` is at least 2"),
        ({"draws": 2.5}, "`draws` is an integer"),
        ({"directions": -1}, "`directions` is an integer of at least 0"),
        ({"steps": (1e-6,)}, "at least two falling sizes"),
        ({"steps": (1e-8, 1e-6)}, "at least two falling sizes"),
        ({"steps": (0.5, 1e-6)}, "sizes in \\(0, 0.1\\]"),
        ({"memory_limit": 0}, "`memory_limit` is a number of bytes"),
        ({"seed": 6}, "this defense has its own, 5"),
        ({"ids": [1]}, "`ids` must have shape \\(3,\\)"),
        ({"y": torch.tensor([0, 1, 10])[[2, 0, 1]]}, "labels in \\[0, 10\\)"),
        ({"y": torch.tensor([0])}, "one per image"),
        ({"y": torch.tensor([0.0, 1.0, 2.0])}, "integer labels"),
        ({"x": torch.rand(3, 8, 8)}, "at least one, got \\(3, 8, 8\\)"),
        ({"x": torch.rand(0, 3, 8, 8)}, "at least one"),
        ({"x": None}, "got NoneType"),
        ({"x": 2.0 * photos()}, "values in \\[0, 1\\]"),
        ({"x": photos(torch.float32)}, "float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_bad_input(options, message):
    arguments = {"x": photos(), "y": None} | options
    with pytest.raises(ValueError, match=message):
        check_gradient(defense(), **arguments)


def test_bad_defense():
    with pytest.raises(TypeError, match="PurifiedClassifier or coupfast.Purifier, got SmallResidual"):
        check_gradient(relu_classifier(), photos())
    with pytest.raises(ValueError, match="a bare Purifier has no logits"):
        check_gradient(defense().purifier, photos(), torch.tensor([0, 0, 0]))


class RoundingScore(SmallScore):
    def forward(self, x, labels):
        return super().forward(x, labels).float()


class FixedScore(SmallScore):
    def forward(self, x, labels):
        return super().forward(x.float(), labels)


@pytest.mark.parametrize(("network", "problem"), [(RoundingScore, "returns torch.float32"), (FixedScore, "fails")])
def test_networks_that_fix_their_dtype(network, problem):
    """In float32 nothing shows; a float64 copy would round inside and be called exact."""
    small = defense(torch.float32, network=network())
    with pytest.raises(ValueError, match=f"score net with torch.float64 weights {problem}.* dtype"):
        check_gradient(small, photos(torch.float32), images=1, draws=0, directions=0)


class Attending(nn.Module):
    """A classifier with fused attention, which has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Conv2d(3, 8, 2, stride=2), nn.Linear(8, 10)

    def forward(self, x):
        tokens = self.inner(x).flatten(2).transpose(1, 2)[:, None]
        attended = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return self.out(attended.mean(dim=(1, 2)))


def test_attention_has_a_certificate():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = Attending().double().eval()
    found = check_gradient(
        PurifiedClassifier(Purifier(SmallScore().double().eval(), classifier, num_steps=2), classifier), photos(), **PLAIN
    )
    assert found.verdict == "exact" and found.relative_error < 1e-10
