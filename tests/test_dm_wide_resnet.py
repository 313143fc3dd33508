import math

import pytest
import torch
import torch.nn.functional as F
from test_wide_resnet import images, trained
from torch.fx.experimental.proxy_tensor import make_fx

from coupfast.models.dm_wide_resnet import CIFAR10_MEAN, CIFAR10_STD, DMWideResNet

EPS64 = torch.finfo(torch.float64).eps


def small_network(**options):
    torch.manual_seed(0)
    return trained(DMWideResNet(**({"depth": 16, "width": 1, "num_classes": 4} | options)).double().eval())


def dm_parameters(depth, width):
    """Names and shapes as RobustBench stores Gowal's, Rebuffi's and Wang's models, written out from the layout."""
    last = 64 * width
    expected = {"init_conv.weight": (16, 3, 3, 3), "logits.weight": (10, last), "logits.bias": (10,)}

    def norm(name, channels):
        for entry in ("weight", "bias", "running_mean", "running_var"):
            expected[f"{name}.{entry}"] = (channels,)
        expected[f"{name}.num_batches_tracked"] = ()

    norm("batchnorm", last)
    before = 16
    for group in range(3):
        channels = 16 * width * 2**group
        for block in range((depth - 4) // 6):
            key, cin = f"layer.{group}.block.{block}", before if block == 0 else channels
            norm(f"{key}.batchnorm_0", cin)
            norm(f"{key}.batchnorm_1", channels)
            expected[f"{key}.conv_0.weight"] = (channels, cin, 3, 3)
            expected[f"{key}.conv_1.weight"] = (channels, channels, 3, 3)
            if block == 0:
                expected[f"{key}.shortcut.weight"] = (channels, cin, 1, 1)
        before = channels
    return expected


@pytest.mark.parametrize(("depth", "width", "millions"), [(28, 10, 36.5), (70, 16, 266.8)])
def test_parameters(depth, width, millions):
    with torch.device("meta"):
        model = DMWideResNet(depth, width)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == dm_parameters(depth, width)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize("activation", ["relu", "silu", torch.nn.Softplus], ids=str)
def test_matches_the_formulas(activation):
    model, x = small_network(activation=activation), images()
    w = model.state_dict()
    act = {"relu": lambda h: h.clamp(min=0), "silu": lambda h: h * torch.sigmoid(h)}.get(activation, F.softplus)

    def norm_act(h, name):
        scale = w[f"{name}.weight"] / (w[f"{name}.running_var"] + 1e-5).sqrt()
        shift = w[f"{name}.bias"] - w[f"{name}.running_mean"] * scale
        return act(h * scale[:, None, None] + shift[:, None, None])

    mean, std = torch.tensor(CIFAR10_MEAN).double(), torch.tensor(CIFAR10_STD).double()
    h = F.conv2d((x - mean[:, None, None]) / std[:, None, None], w["init_conv.weight"], padding=1)
    for group in range(3):
        for block in range(2):
            key = f"layer.{group}.block.{block}"
            a = norm_act(h, f"{key}.batchnorm_0")
            if block == 0 and group > 0:
                # Far-side padding: a window starts at every even pixel, the last one reads a row and column of zeros.
                b = F.conv2d(F.pad(a, (1, 1, 1, 1)), w[f"{key}.conv_0.weight"])[:, :, 1::2, 1::2]
                shortcut = F.conv2d(a[:, :, ::2, ::2], w[f"{key}.shortcut.weight"])
            else:
                b = F.conv2d(a, w[f"{key}.conv_0.weight"], padding=1)
                shortcut = F.conv2d(a, w[f"{key}.shortcut.weight"]) if f"{key}.shortcut.weight" in w else h
            h = shortcut + F.conv2d(norm_act(b, f"{key}.batchnorm_1"), w[f"{key}.conv_1.weight"], padding=1)
    expected = norm_act(h, "batchnorm").flatten(2).mean(2) @ w["logits.weight"].T + w["logits.bias"]

    # 15 layers in a row, sums of up to 9 · 64 terms in another order.
    tol = 15 * math.sqrt(576) * EPS64
    torch.testing.assert_close(model(x), expected, rtol=tol, atol=tol * expected.abs().max().item())


def test_smooth_network_has_second_derivatives():
    model, x = small_network(activation="silu").requires_grad_(False), images(1, 8).requires_grad_()
    assert torch.autograd.gradcheck(model, (x,), fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(model, (x,), fast_mode=True)


def test_traces_without_in_place_operations():
    graph = make_fx(small_network().requires_grad_(False))(images())
    names = {node.target.__name__ for node in graph.graph.nodes if node.op == "call_function"}
    assert not any(name.partition(".")[0].endswith("_") for name in names), names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 12}, "got 12"),
        ({"width": 0}, "width"),
        ({"num_classes": 0}, "num_classes"),
        ({"activation": "swosh"}, "relu.*silu.*'swosh'"),
        ({"std": (1.0,)}, "3 numbers"),
    ],
    ids=str,
)
def test_refuses_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        DMWideResNet(**({"depth": 10, "width": 1} | options))


def test_refuses_shapes():
    with pytest.raises(ValueError, match=r"\(3, 8, 8\)"):
        small_network()(torch.zeros(3, 8, 8, dtype=torch.float64))
