"""Networks and images that cannot serve say so before any work; those that can are served."""

import copy
import warnings

import pytest
import torch
from conftest import relu_classifier, small_score
from torch import nn

import coupfast
import coupfast.data
from coupfast import PurifiedClassifier, Purifier

X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def score():
    return small_score(torch.float32)


def classifier():
    return relu_classifier(torch.float32)


class BatchStatistics(nn.Module):
    """What it says of an image depends on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm2d(3, track_running_stats=False), nn.Linear(192, 10)

    def forward(self, x):
        return self.linear(self.norm(x).flatten(1))


class MixingScore(nn.Module):
    def forward(self, x, labels):
        return 0.5 * x + 0.1 * x.mean(dim=0, keepdim=True)


class OneImage(nn.Module):
    """Loses a batch's second image."""

    def forward(self, x):
        return x[:1, :, 0, :5].flatten(1)


class IntegerLabels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 1)

    def forward(self, x, labels):
        return x + self.embedding(labels)[:, :, None, None]


class WithOutput(nn.Module):
    """As diffusers models answer."""

    def forward(self, x, labels):
        return type("Output", (), {"sample": x})()


class Half(nn.Module):
    """A network in bfloat16 behind a float32 door."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = classifier().bfloat16()

    def forward(self, x):
        return self.inner(x.bfloat16()).float()


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest = nn.Conv2d(3, 3, 1), nn.Linear(192, 10).half()

    def forward(self, x):
        return self.rest(self.first(x).flatten(1).half()).float()


@pytest.mark.parametrize(
    ("networks", "message"),
    [
        ((score(), BatchStatistics()), "the classifier's result for an image depends on the other images of its batch"),
        ((MixingScore(), None), "the score net's result for an image depends on the other images of its batch"),
        ((score(), OneImage()), r"the classifier returns \(1, 15\) for two images, and \(1, 15\) for one"),
        ((IntegerLabels(), None), "labels are floats, 999 t: a network of integer labels needs an adapter"),
        ((WithOutput(), None), "got Output; coupfast.load_score wraps a diffusers model"),
        ((classifier(), score()), "takes 2 positional arguments.*: are the networks swapped"),
        ((score(), Half()), "the classifier is torch.bfloat16.*precision='fast'"),
        ((score(), Mixed()), "weights of torch.float16, torch.float32, and precision='strict' computes in the images'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_networks_that_cannot_serve(networks, message):
    first, second = networks
    method = "reverse-sde" if second is None else "coup"
    with pytest.raises(ValueError, match=message):
        Purifier(first.eval(), None if second is None else second.eval(), method=method, num_steps=2)(X, seed=0)


def test_the_classifier_behind_a_purifier_is_tried_too():
    purifier = Purifier(score(), method="reverse-sde", num_steps=2)
    with pytest.raises(ValueError, match="depends on the other images of its batch"):
        PurifiedClassifier(purifier, BatchStatistics().eval())(X)


def test_a_random_classifier_behind_a_purifier_may_be_random():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = classifier()

        def forward(self, x):
            return self.inner(x + 0.1 * torch.randn_like(x))

    defense = PurifiedClassifier(Purifier(score(), method="reverse-sde", num_steps=2), Noisy().eval())
    torch.manual_seed(5)
    first = defense(X, draw=0)
    torch.manual_seed(5)
    torch.testing.assert_close(defense(X, draw=0), first, rtol=0, atol=0)  # a trial takes nothing of the generator


@pytest.mark.parametrize("make", [Half, Mixed])
def test_other_precisions_inside_are_served_where_they_are_asked_for(make):
    purifier = Purifier(score(), make().eval(), num_steps=2, precision="fast", engine="eager")
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(purifier(x, seed=0).sum(), x)
    assert bool(gradient.isfinite().all())


def test_other_peoples_attributes_mean_what_they_mean():
    network = classifier()
    network.channels, network.image_size = 64, 224
    expected = Purifier(score(), classifier(), num_steps=2)(X, seed=0)
    torch.testing.assert_close(Purifier(score(), network, num_steps=2)(X, seed=0), expected, rtol=0, atol=0)


@pytest.mark.parametrize("engine", ["eager", "cpu"])
def test_networks_from_inference_mode(engine):
    with torch.inference_mode():
        first, second = score(), classifier()
    options = {"num_steps": 2, "engine": engine}
    expected = PurifiedClassifier(Purifier(score(), classifier(), **options), classifier(), seed=1)
    found = PurifiedClassifier(Purifier(first, second, **options), second, seed=1)
    gradients = []
    for defense in (expected, found):
        x = X.clone().requires_grad_()
        gradients.append(torch.autograd.grad(defense(x, draw=0).square().sum(), x)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_old_weight_norm():
    """It keeps a result as an attribute, which has no deepcopy."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval()
    purifier = Purifier(score(), network, num_steps=2)
    before = purifier(X, seed=0)
    with torch.no_grad():
        network[0].weight_g.mul_(3.0)
    after = purifier(X, seed=0)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, Purifier(score(), network, num_steps=2)(X, seed=0), rtol=0, atol=0)


def test_replicas_of_data_parallel():
    defense = PurifiedClassifier(Purifier(score(), classifier(), num_steps=2), classifier(), seed=1)
    replica = defense._replicate_for_data_parallel()
    # What torch's own replicate() puts into a replica.
    replica.purifier, replica.classifier = defense.purifier, defense.classifier
    for given in ({}, {"draw": 0}, {"ids": torch.arange(2)}):
        with pytest.raises(RuntimeError, match="give `ids` and `draw` as tensors"):
            replica(X, **given)
    found = replica(X, ids=torch.tensor([4, 7]), draw=torch.tensor([1, 2]))
    torch.testing.assert_close(found, defense(X, ids=[4, 7], draw=torch.tensor([1, 2])), rtol=0, atol=0)


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rounding_beyond_the_range_is_rounding(dtype):
    """A few ulps above white and below black: clipped, and their gradient is that of white and black."""
    eps = torch.finfo(dtype).eps
    purifier = Purifier(small_score(dtype), relu_classifier(dtype), num_steps=2)
    exact = (X > 0.5).to(dtype)
    gradients = []
    for x in (exact, exact + eps * (2 * exact - 1)):
        x = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(purifier(x, seed=0).square().sum(), x)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"got \[-?0(\.\d+)?(e-\d+)?, 1\.0000\d+\]"):
        purifier((exact * (1 + 100 * eps)).clamp(min=0), seed=0)


def test_images_that_leave_the_range_on_purpose():
    x = (X + 0.25 * torch.randn(X.shape, generator=torch.Generator().manual_seed(1))).requires_grad_()
    options = {"num_steps": 2, "method": "reverse-sde"}
    with pytest.raises(ValueError, match="out_of_range='clip' or 'allow'"):
        Purifier(score(), **options)(x, seed=0)
    clipped = Purifier(score(), out_of_range="clip", clamp=False, **options)(x, seed=0)
    expected = Purifier(score(), clamp=False, **options)(x.detach().clamp(0, 1), seed=0)
    torch.testing.assert_close(clipped, expected, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(clipped.sum(), x)
    outside = (x < 0) | (x > 1)
    assert float(gradient[outside].abs().max()) == 0.0 < float(gradient[~outside].abs().min())
    allowed = Purifier(score(), out_of_range="allow", clamp=False, **options)
    assert not torch.equal(allowed(x, seed=0), clipped)
    (gradient,) = torch.autograd.grad(allowed(x, seed=0).sum(), x)
    assert float(gradient[outside].abs().min()) > 0.0


# --- other people's transforms and defaults ---------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["eager", "cpu"])
def test_functional_gradients(engine):
    defense = PurifiedClassifier(Purifier(score(), classifier(), num_steps=2, engine=engine), classifier(), seed=1)
    found = torch.func.grad(lambda image: defense(image, draw=0).square().sum())(X)  # all that is kept is made in here
    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(defense(x, draw=0).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(defense(X, draw=0), defense(x, draw=0).detach(), rtol=0, atol=0)  # nothing of it stays


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: torch.func.vmap(lambda image: f(image[None])[0])(X),
        lambda f: torch.func.jvp(f, (X,), (X,)),
        lambda f: torch.func.jacrev(f)(X),
        lambda f: torch.func.jacfwd(f)(X),
    ],
    ids=["vmap", "jvp", "jacrev", "jacfwd"],
)
def test_transforms_that_cannot_be(transform):
    defense = PurifiedClassifier(Purifier(score(), classifier(), num_steps=2), classifier(), seed=1)
    with pytest.raises(RuntimeError, match="cannot run inside of torch.func"):
        transform(lambda x: defense(x, draw=0))


def test_default_dtype_and_device_are_the_callers():
    networks = score(), classifier()
    purifier = Purifier(*networks, num_steps=2)
    expected = purifier(X, seed=0, draw=3)
    try:
        torch.set_default_dtype(torch.float64)
        torch.testing.assert_close(Purifier(*networks, num_steps=2)(X, seed=0, draw=3), expected, rtol=0, atol=0)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        torch.testing.assert_close(copy.copy(purifier)(X, seed=0, draw=3), expected, rtol=0, atol=0)


def test_a_plan_makes_nothing_of_the_batchs_size():
    plan = Purifier(score(), classifier(), num_steps=4).plan(10**6)
    assert plan.states_bytes == 10**6 * 5 * 3 * 8 * 8 * 4
    assert plan.batch == 10**6
    assert ("does not fit" in str(plan)) != plan.fits
    with pytest.raises(ValueError, match="`batch` is a number of images, at least 1, got 0"):
        Purifier(score(), classifier(), num_steps=4).plan(0)


class Reparameterised(nn.Module):
    """The shipped score network as one that predicts something else."""

    def __init__(self, inner, kind):
        super().__init__()
        self.inner, self.kind = inner, kind

    def forward(self, x, labels):
        t = float(labels[0]) / 999
        alpha, sigma = float(coupfast.VPSDE().alpha_bar(t)) ** 0.5, float(coupfast.VPSDE().sigma(t))
        eps_hat = self.inner(x, labels)
        x_0 = (x - sigma * eps_hat) / alpha
        return {"noise": eps_hat, "v": alpha * eps_hat - sigma * x_0, "x0": x_0, "score": -eps_hat / sigma}[self.kind]


@pytest.mark.parametrize(
    ("kind", "message"), [("v", "but v = "), ("x0", "but the image"), ("score", "other sign"), ("noise", None)]
)
def test_a_network_that_predicts_something_else_is_noticed(kind, message):
    score = Reparameterised(coupfast.load_score("cifar10-tiny"), kind).eval()
    x, _ = coupfast.data.load_images("cifar10-20", limit=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Purifier(score, method="reverse-sde", t=0.01, num_steps=1, engine="eager")(x, seed=0)
    said = [str(each.message) for each in caught if "does not predict the noise" in str(each.message)]
    assert bool(said) == (message is not None)
    assert message is None or message in said[0]


def test_replicas_of_a_bare_purifier():
    replica = Purifier(score(), method="reverse-sde", num_steps=2)._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="give `ids` as tensors"):
        replica(X, seed=0)
