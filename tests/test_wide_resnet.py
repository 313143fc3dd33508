import math

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from coupfast.models.wide_resnet import WideResNet

EPS64 = torch.finfo(torch.float64).eps


def small_network(**options):
    """Every kind of block, batch norm away from the identity."""
    torch.manual_seed(0)
    return trained(WideResNet(**({"depth": 16, "widen_factor": 1, "num_classes": 4} | options)).double().eval())


def trained(model):
    """The network with batch norms as after training."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def images(batch=2, size=16):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def standard_parameters():
    """Names and shapes of RobustBench's `Standard`, written out from its layout."""
    expected = {"conv1.weight": (16, 3, 3, 3), "fc.weight": (10, 640), "fc.bias": (10,)}

    def norm(name, channels):
        for entry in ("weight", "bias", "running_mean", "running_var"):
            expected[f"{name}.{entry}"] = (channels,)
        expected[f"{name}.num_batches_tracked"] = ()

    norm("bn1", 640)
    for group, (before, width) in enumerate([(16, 160), (160, 320), (320, 640)], start=1):
        for layer in range(4):
            key, cin = f"block{group}.layer.{layer}", before if layer == 0 else width
            norm(f"{key}.bn1", cin)
            norm(f"{key}.bn2", width)
            expected[f"{key}.conv1.weight"] = (width, cin, 3, 3)
            expected[f"{key}.conv2.weight"] = (width, width, 3, 3)
            if layer == 0:
                expected[f"{key}.convShortcut.weight"] = (width, cin, 1, 1)
    return expected


def test_parameters_of_wrn_28_10(monkeypatch):
    monkeypatch.setattr(torch.nn.init, "normal_", None)  # shapes alone need none, for which PyTorch imports its compiler
    with torch.device("meta"):
        model = WideResNet(28, 10, 10)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == standard_parameters()
    assert sum(parameter.numel() for parameter in model.parameters()) == 36_479_194


@pytest.mark.parametrize("normalised", [False, True])
def test_matches_the_formulas(normalised):
    constants = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)} if normalised else {}
    model, x = small_network(**constants), images()
    w = model.state_dict()

    def norm_relu(h, name):
        scale = w[f"{name}.weight"] / (w[f"{name}.running_var"] + 1e-5).sqrt()
        shift = w[f"{name}.bias"] - w[f"{name}.running_mean"] * scale
        return (h * scale[:, None, None] + shift[:, None, None]).clamp(min=0)

    h = x
    if normalised:
        # The constants are float32 numbers, whatever the dtype they are kept in.
        mean, std = torch.tensor(constants["mean"]).double(), torch.tensor(constants["std"]).double()
        h = (x - mean[:, None, None]) / std[:, None, None]
    h = F.conv2d(h, w["conv1.weight"], padding=1)
    for group in (1, 2, 3):
        for layer in (0, 1):
            key = f"block{group}.layer.{layer}"
            stride = 2 if layer == 0 and group > 1 else 1
            a = norm_relu(h, f"{key}.bn1")
            b = norm_relu(F.conv2d(a, w[f"{key}.conv1.weight"], stride=stride, padding=1), f"{key}.bn2")
            b = F.conv2d(b, w[f"{key}.conv2.weight"], padding=1)
            shortcut = w.get(f"{key}.convShortcut.weight")
            h = b + (h if shortcut is None else F.conv2d(a, shortcut, stride=stride))
    expected = norm_relu(h, "bn1").flatten(2).mean(2) @ w["fc.weight"].T + w["fc.bias"]

    # 15 layers in a row, sums of up to 9 · 64 terms in another order.
    tol = 15 * math.sqrt(576) * EPS64
    torch.testing.assert_close(model(x), expected, rtol=tol, atol=tol * expected.abs().max().item())


def test_is_piecewise_linear_in_eval_mode():
    model, x = small_network().requires_grad_(False), images().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    assert gradient.requires_grad
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    # No second derivative at all: inside a linear region the gradient is a constant.
    second = torch.autograd.grad(gradient.sum(), x, allow_unused=True, materialize_grads=True)[0]
    torch.testing.assert_close(second, torch.zeros_like(x), rtol=0, atol=0)


def test_forward_and_reverse_mode_agree():
    model, x = small_network().requires_grad_(False), images()
    u = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    logits, jvp = torch.func.jvp(model, (x,), (u,))
    v = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    _, vjp = torch.func.vjp(model, x)
    tol = 30 * math.sqrt(576) * EPS64
    torch.testing.assert_close((v * jvp).sum(), (vjp(v)[0] * u).sum(), rtol=tol, atol=tol * (v.norm() * jvp.norm()).item())


def test_traces_without_in_place_operations():
    graph = make_fx(small_network().requires_grad_(False))(images())
    names = {node.target.__name__ for node in graph.graph.nodes if node.op == "call_function"}
    assert not any(name.partition(".")[0].endswith("_") for name in names), names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 27}, "6 n \\+ 4.*got 27"),
        ({"depth": 4}, "got 4"),
        ({"widen_factor": 0}, "widen_factor"),
        ({"num_classes": 0}, "num_classes"),
        ({"mean": (0.5, 0.5, 0.5)}, "both"),
        ({"mean": (0.5,), "std": (0.5,)}, "3 numbers"),
    ],
    ids=str,
)
def test_refuses_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        WideResNet(**({"depth": 10, "widen_factor": 1, "num_classes": 2} | options))


def test_refuses_shapes():
    with pytest.raises(ValueError, match=r"\(2, 1, 8, 8\)"):
        small_network()(torch.zeros(2, 1, 8, 8, dtype=torch.float64))
