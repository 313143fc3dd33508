"""The guidance gradient and three routes to its Hessian-vector product."""

import copy
import logging

import pytest
import torch
from conftest import SmallResidual, randomize_batch_norms, relu_classifier, silu_classifier
from torch import nn

from coupfast.engine.networks import frozen
from coupfast.guidance import (
    Guidance,
    PiecewiseLinearGraph,
    guidance_gradient,
    log_confidence,
    pack_bits,
    scaled_logits,
    unpack_bits,
)
from coupfast.models.dm_wide_resnet import DMWideResNet
from coupfast.models.wide_resnet import WideResNet

ULP = torch.finfo(torch.float64).eps


def states(batch: int, size: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Kinks(nn.Module):
    """Every piecewise-linear operation that is known, and the linear ones around them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.pool, self.linear = nn.MaxPool2d(2, padding=1), nn.Linear(32, 5)
        self.leaky, self.relu6 = nn.LeakyReLU(0.2), nn.ReLU6()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.nn.functional.pad(2.0 - (x - self.mean) / 0.25, (1, 0, 1, 0), value=0.3)
        h = self.leaky(self.bn(self.conv1(h)))
        h = torch.cat([self.pool(h), -torch.nn.functional.avg_pool2d(h, 3, 2, padding=1)], dim=1)[:, :8]
        h = self.relu6(3 * self.conv2(h) + 0.1).clamp_min(0.05)
        h = torch.nn.functional.adaptive_avg_pool2d(h, 2)
        return self.linear(h.flatten(1)) * 2 - torch.arange(5, dtype=x.dtype)


def dm_relu() -> nn.Module:
    network = DMWideResNet(10, 1, 10, "relu", (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
    randomize_batch_norms(network, torch.Generator().manual_seed(3))
    return network


def wrn() -> nn.Module:
    network = WideResNet(10, 1, 10)
    randomize_batch_norms(network, torch.Generator().manual_seed(3))
    return network


class Attention(nn.Module):
    """Softmax attention over pixels, through PyTorch's fused operator."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Conv2d(3, 12, 2, stride=2), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x).flatten(2).transpose(1, 2)
        h = h + torch.nn.functional.scaled_dot_product_attention(h, h, h)
        return self.out(torch.nn.functional.gelu(h).mean(dim=1))


class _NoForwardMode(torch.autograd.Function):
    """x³ with a backward pass only."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class Cubed(SmallResidual):
    def __init__(self) -> None:
        super().__init__(nn.SiLU)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(_NoForwardMode.apply(x))


def by_double_backward(network: nn.Module, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return Guidance(network, x, route="double-backward").hvp(x, v)


def assert_equal_to_rounding(found: torch.Tensor, expected: torch.Tensor, roundings: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=roundings * ULP * float(expected.abs().max()))


def test_gradient_is_that_of_the_log_confidence():
    network, x = frozen(relu_classifier()), states(4)
    g, label = guidance_gradient(network, x)
    point = x.clone().requires_grad_()
    # The ½ of the rescaling, once.
    log_p = torch.log_softmax(network((point + 1) / 2), dim=1)
    torch.testing.assert_close(label, log_p.argmax(dim=1))
    (expected,) = torch.autograd.grad(log_p.max(dim=1).values.sum(), point)
    torch.testing.assert_close(g, expected, rtol=0, atol=0)


def test_gradient_is_per_sample():
    network, x = frozen(relu_classifier()), states(5)
    together, _ = guidance_gradient(network, x)
    for i in range(5):
        alone, _ = guidance_gradient(network, x[i : i + 1])
        # Averaging over the batch would make these five times different.
        assert_equal_to_rounding(together[i : i + 1], alone, 1000)


@pytest.mark.parametrize(("make", "size"), [(relu_classifier, 8), (Kinks, 8), (dm_relu, 32), (wrn, 32)])
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_piecewise_linear_networks_are_found_and_agree(make, size, batch):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = frozen(make().eval().double())
    x, v = states(batch, size), states(batch, size, seed=1)
    guidance = Guidance(network, x[:1])
    assert guidance.route == "piecewise-linear"
    expected = by_double_backward(network, x, v)
    assert float(expected.abs().max()) > 1e-6
    # Some hundred products are summed in another order.
    assert_equal_to_rounding(guidance.hvp(x, v), expected, 2000)
    forward_over_reverse = Guidance(network, x, route="forward-over-reverse").hvp(x, v)
    assert_equal_to_rounding(forward_over_reverse, expected, 2000)


@pytest.mark.parametrize(("make", "route"), [(silu_classifier, "forward-over-reverse"), (Attention, "forward-over-reverse")])
def test_smooth_networks(make, route):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = frozen(make().eval().double())
    x, v = states(3), states(3, seed=1)
    guidance = Guidance(network, x)
    assert guidance.route == route
    assert_equal_to_rounding(guidance.hvp(x, v), by_double_backward(network, x, v), 2000)


def test_what_has_no_forward_mode_goes_by_double_backward_and_says_so(caplog):
    network = Cubed()
    network.load_state_dict(relu_classifier().state_dict())
    network = frozen(network.eval().double())
    x, v = states(2), states(2, seed=1)
    with caplog.at_level(logging.WARNING):
        guidance = Guidance(network, x)
        assert guidance.route == "double-backward"
    assert "double backward" in caplog.text
    h = 1e-6
    label = log_confidence(network, x)[1]

    def gradient(point: torch.Tensor) -> torch.Tensor:
        point = point.detach().requires_grad_()
        return torch.autograd.grad(log_confidence(network, point, label)[0].sum(), point)[0]

    difference = (gradient(x + h * v) - gradient(x - h * v)) / (2 * h)
    # Central differences: truncation h² ≈ 1e-12 and rounding 1e-16/h ≈ 1e-10, relative to a gradient of order ten.
    torch.testing.assert_close(guidance.hvp(x, v), difference, rtol=0, atol=1e-7 * float(difference.abs().max()))


@pytest.mark.parametrize("make", [silu_classifier, Attention])
def test_smooth_networks_are_not_taken_for_piecewise_linear(make):
    assert PiecewiseLinearGraph.trace(frozen(make().eval().double()), states(1)) is None
    with pytest.raises(ValueError, match="not piecewise linear"):
        Guidance(frozen(make().eval().double()), states(1), route="piecewise-linear")


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.linear(torch.relu(x).flatten(1)) * x.mean(),
        lambda self, x: self.linear((x * x).flatten(1)),
        lambda self, x: self.linear(x.abs().sqrt().flatten(1)),
        lambda self, x: self.linear(x.flatten(1)) / (1 + x.flatten(1)[:, :1]),
        lambda self, x: self.linear(torch.where(x > 0.5, x * x, x).flatten(1)),
        lambda self, x: self.linear(torch.softmax(x.flatten(1), dim=1)),
        lambda self, x: self.linear(torch.nn.functional.layer_norm(x.flatten(1), (192,))),
        lambda self, x: self.linear(x.flatten(1)) if float(x.sum()) > 0 else self.linear(-x.flatten(1)),
        lambda self, x: self.linear(x.flatten(1)).to(torch.float32).to(x.dtype),
    ],
)
def test_other_operations_are_refused(forward):
    network = type("Odd", (nn.Module,), {"forward": forward})()
    network.linear = nn.Linear(192, 4)
    assert PiecewiseLinearGraph.trace(frozen(network.eval().double()), states(1)) is None


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.linear(torch.relu(x.flatten(1) + x.data.flatten(1))),
        lambda self, x: self.linear(x.flatten(1)) * torch.tensor(float(len(x)), dtype=x.dtype),
        lambda self, x: self.linear(x.flatten(1)) * (len(x) // 2 + 1),
        lambda self, x: self.linear(torch.nn.functional.dropout(x.flatten(1), 0.5, True)),
        lambda self, x: self.linear(x.flatten(1) + torch.randn(x.flatten(1).shape, dtype=x.dtype)),
    ],
)
def test_traces_that_are_not_the_network_are_refused(forward):
    """Every operation is known, and still J is another: detached parts, numbers baked in at the traced batch, randomness."""
    network = type("Odd", (nn.Module,), {"forward": forward})()
    network.linear = nn.Linear(192, 4)
    assert PiecewiseLinearGraph.trace(frozen(network.eval().double()), states(1)) is None


def test_reversed_subtraction_keeps_its_factor():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(192, 4)

        def forward(self, x):
            return 5 * self.linear(torch.relu(torch.rsub(x, 0.6, alpha=3)).flatten(1))

    network, x, v = frozen(Reversed().eval().double()), states(2), states(2, seed=1)
    guidance = Guidance(network, x)
    assert guidance.route == "piecewise-linear"
    assert_equal_to_rounding(guidance.hvp(x, v), by_double_backward(network, x, v), 2000)


def test_batch_norm_in_training_mode_is_refused():
    assert PiecewiseLinearGraph.trace(frozen(relu_classifier().train()), states(1)) is None


def test_the_pyautoattack_resnet_is_piecewise_linear():
    pytest.importorskip("pyautoattack")
    from coupfast.models.zoo import load_classifier

    network = load_classifier("resnet18-at").double()
    x, v = 0.5 * states(1, 32), states(1, 32, seed=1)
    guidance = Guidance(network, x)
    assert guidance.route == "piecewise-linear"
    assert_equal_to_rounding(guidance.hvp(x, v), by_double_backward(network, x, v), 20000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kept_slopes_are_those_that_are_found_again(dtype):
    network = frozen(relu_classifier(dtype))
    x, v = states(3, dtype=dtype), states(3, seed=1, dtype=dtype)
    guidance = Guidance(network, x)
    g, kept = guidance.gradient(x, keep_slopes=True)
    plain, _ = guidance.gradient(x)
    # The same kernels in the same order: no rounding apart.
    torch.testing.assert_close(g, plain, rtol=0, atol=0)
    torch.testing.assert_close(guidance.hvp(x, v, kept), guidance.hvp(x, v), rtol=0, atol=0)


def test_hessian_is_symmetric():
    network = frozen(relu_classifier())
    x, u, v = states(2), states(2, seed=1), states(2, seed=2)
    guidance = Guidance(network, x)
    left, right = (u * guidance.hvp(x, v)).sum(), (v * guidance.hvp(x, u)).sum()
    torch.testing.assert_close(left, right, rtol=1e-11, atol=0)


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (3, 5, 11), (2, 3, 4, 4)], ids=str)
def test_bits_round_trip(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) > 0.5
    bits = pack_bits(mask)
    assert bits.dtype == torch.uint8
    assert len(bits) == -(-mask.numel() // 8)
    torch.testing.assert_close(unpack_bits(bits, mask.shape), mask)


def test_float32_under_imposed_slopes():
    """Same slopes, one rounding after the other: the explicit product errs no more than double back-propagation does."""
    classifier = relu_classifier(torch.float32)
    exact = copy.deepcopy(classifier).double()
    generator = torch.Generator().manual_seed(torch.seed() % 2**63)  # fresh inputs: a flipped slope would be a percent
    x, v = (torch.randn(4, 3, 8, 8, generator=generator) for _ in range(2))
    guidance = Guidance(classifier, x, route="piecewise-linear")
    _, kept = guidance.gradient(x, keep_slopes=True)
    graph = Guidance(exact, x.double(), route="piecewise-linear").graph
    assert graph is not None and kept.slopes and kept.p is not None
    tangent = v.double().requires_grad_()
    jv = graph.linear(tangent, kept.slopes)  # the float32 run's slopes, in float64
    p = torch.softmax(scaled_logits(exact, x.double()), dim=1)
    q = jv.detach()
    (wanted,) = torch.autograd.grad(jv, tangent, p * ((p * q).sum(dim=1, keepdim=True) - q))
    ours = (guidance.hvp(x, v, kept) - wanted).norm()
    autograd = (Guidance(classifier, x, route="double-backward").hvp(x, v) - wanted).norm()
    assert ours <= 4 * autograd + 4 * torch.finfo(torch.float32).eps * wanted.norm()
