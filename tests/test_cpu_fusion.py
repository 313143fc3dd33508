"""Fusion: which operations become one, which stay PyTorch's, and what a planner must refuse."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from conftest import relu_classifier, small_score
from cpu_networks import GRAPHS, Net, conv, network
from torch import nn

from coupfast.engine.cpu.fusion import fuse
from coupfast.engine.cpu.parts import Attention, Concatenation, Convolution, FusedNetwork, Region
from coupfast.tracing import trace

aten = torch.ops.aten


def fused(function, *, labels: bool = False) -> FusedNetwork:
    def arguments(batch: int) -> tuple[torch.Tensor, ...]:
        return (torch.zeros(batch, 3, 8, 8), *([torch.full((batch,), 5.0)] if labels else []))

    return fuse(trace(function, arguments))


def convolutions(found: FusedNetwork) -> list[Convolution]:
    return [part for part in found.parts if isinstance(part, Convolution)]


def left(found: FusedNetwork) -> Counter:
    """The operations that PyTorch runs."""
    regions = [part for part in found.parts if isinstance(part, Region)]
    return Counter(str(operation.node.target).removeprefix("aten.") for region in regions for operation in region.operations)


def kinds(found: FusedNetwork) -> str:
    """The parts in order: C(onvolution), A(ttention), R(egion), + for a concatenation."""
    names = {Convolution: "C", Attention: "A", Concatenation: "+", Region: "R"}
    return "".join(names[type(part)] for part in found.parts)


def describe(part: Convolution) -> str:
    words = ["norm" if part.norm and part.norm.activation == "identity" else "norm-silu" if part.norm else ""]
    words += ["bias" if part.bias is not None else "", "time" if part.image_bias is not None else ""]
    words += ["residual" if part.residual is not None else "", "scale" if part.scale != 1.0 else ""]
    words += [
        "y" if part.keeps_y else "",
        ("affine-" if part.z_multiply is not None else "") + "z" if part.z is not None else "",
    ]
    return " ".join(word for word in words if word)


#: name → parts in order, what each convolution takes in, what is left to PyTorch.
EXPECTED = {
    "one convolution": ("C", ["bias y"], {}),
    "without a bias": ("C", ["y"], {}),
    "convolution and relu": ("C", ["bias z"], {}),
    "no convolution": ("R", [], {"sin.default": 1, "view.default": 1, "addmm.default": 1}),
    "only elementwise": ("R", [], {"flip.default": 1, "mul.Tensor": 1}),
    "the image itself": ("", [], {}),
    "batch norm without relu": ("CRC", ["bias y", "bias y"], {"tanh.default": 1}),
    "batch norm and relu": ("CC", ["affine-z", "bias y"], {}),
    "batch norm without parameters": ("CC", ["bias affine-z", "bias y"], {}),
    "batch norm read twice": ("CRC", ["bias y", "bias residual y"], None),
    "value read by several": ("CCCR", ["bias y z", "bias y", "bias scale y"], {"add.Tensor": 2}),
    "concatenations": ("CC++CC", ["bias y", "bias z", "bias y", "bias residual y"], {}),
    "residual first": ("CC", ["bias y z", "bias residual y"], {}),
    "residual last": ("CC", ["bias y z", "bias residual y"], {}),
    "sum with itself": ("CRC", ["bias y", "bias y"], {"add.Tensor": 1, "relu.default": 1}),
    "sum with a constant": ("CRC", ["bias y", "bias y"], {"add.Tensor": 1}),
    "broadcast sum": ("CCR", ["bias y", "bias y"], {"mean.dim": 1, "add.Tensor": 1}),
    "times zero": ("CRCC", None, {"mul.Tensor": 1}),
    "scales": ("CCC", ["bias y", "norm-silu bias residual scale y", "bias residual scale y"], {}),
    "scaled relus": ("CCRC", ["bias scale z", "bias scale y", "bias scale y"], None),
    "group norm before a stride": ("CRCC", ["bias y", "bias y", "norm-silu bias y"], {"native_group_norm.default": 1}),
    "group norm without silu": ("CC", ["bias y", "norm bias y"], {}),
    "attention": ("CARC", ["bias y", "bias y"], {"add.Tensor": 1}),
    "max-pool": ("CRCR", ["bias z", "bias y"], None),
    "group convolution": ("CRC", ["bias z", "bias y"], {"convolution.default": 1, "relu.default": 1}),
    "dilated convolution": ("CRC", ["bias z", "bias y"], {"convolution.default": 1, "relu.default": 1}),
    "transposed convolution": ("CRC", ["bias z", "bias y"], {"convolution.default": 1, "relu.default": 1}),
    "other kernels": ("CCCC", ["bias z", "bias y", "bias z", "bias y"], {}),
    "oblong kernel": ("RC", ["bias y"], {"convolution.default": 1}),
    "a weight in two places": ("CCC", ["bias z", "bias z", "bias y"], {}),
    "dead ends": ("C", ["bias z"], {}),
    "in place": ("CCR", ["bias affine-z", "bias y"], {"add.Tensor": 1, "mul.Tensor": 1, "relu.default": 1}),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_parts(name):
    parts, words, rest = EXPECTED[name]
    found = fused(network(name))
    seen = kinds(found), [describe(part) for part in convolutions(found)], left(found)
    assert seen[0] == parts, seen
    if words is not None:
        assert seen[1] == words, seen
    if rest is not None:
        assert {key: seen[2][key] for key in rest} == rest and (rest or not seen[2]), seen


def test_resnets_keep_only_their_ends_in_pytorch():
    found = fused(network("torchvision"))
    assert kinds(found) == "CRCCCCCR"
    assert [describe(part) for part in convolutions(found)] == [
        "affine-z",  # bn1 stays outside the weights: it costs nothing on the way to the ReLU
        "affine-z",
        "bias residual z",  # bn folded, + identity, ReLU
        "affine-z",
        "bias y",  # its sum waits for the shortcut,
        "bias residual z",  # which takes it
    ]
    assert set(left(found)) == {
        *("max_pool2d_with_indices.default", "<built-in function getitem>"),
        *("mean.dim", "view.default", "addmm.default"),
    }


@pytest.mark.parametrize(
    ("name", "activation"), [("WideResNet", "relu"), ("DMWideResNet relu", "relu"), ("DMWideResNet silu", "silu")]
)
def test_wide_residual_networks(name, activation):
    found = fused(network(name))
    words = [describe(part) for part in convolutions(found)]
    weights = [module for module in network(name).modules() if isinstance(module, nn.Conv2d)]
    assert len(words) == len(weights)
    if activation == "relu":
        assert "relu.default" not in left(found)
        assert sum(word.endswith("z") for word in words) == 7
    else:
        assert left(found)["silu.default"] == 7
    assert sum("residual" in word for word in words) == 3


def test_ddpmpp():
    score = small_score(torch.float32)
    found = fused(score, labels=True)
    words = Counter(describe(part) for part in convolutions(found))
    norms = [module for module in score.modules() if isinstance(module, nn.GroupNorm)]
    assert left(found)["convolution.default"] == 0
    assert sum("norm" in word for word in words.elements()) + left(found)["native_group_norm.default"] == len(norms)
    assert sum("time" in word for word in words.elements()) >= 4
    assert any(isinstance(part, Concatenation) for part in found.parts)
    # The labels' own operations run once a step and never in a part.
    assert found.partition.label is not None and found.partition.label_operations
    timely = {operation.node for operation in found.partition.label_operations}
    inside = {operation.node for part in found.parts if isinstance(part, Region) for operation in part.operations}
    assert not timely & inside
    assert {part.image_bias for part in convolutions(found)} - {None} <= set(found.label_values)


@pytest.mark.parametrize("name", GRAPHS)
def test_parts_are_in_order_and_complete(name):
    """Every value is made before it is read, once, and the output is made."""
    found = fused(network(name))
    made = {found.image}
    for part in found.parts:
        assert set(part.inputs) <= made
        assert not made & set(part.outputs)
        made |= set(part.outputs)
    assert found.output in made
    assert all(found.shapes[value] == tuple(value.meta["val"].shape[1:]) for value in made)


def test_batch_norms_are_folded_in_float64():
    found = fused(network("batch norm without relu"))
    layers = network("batch norm without relu").layers
    a, bn = layers["a"], layers["bn"]
    factor = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    weight = a.weight.double() * factor[:, None, None, None]
    bias = (a.bias.double() - bn.running_mean.double()) * factor + bn.bias.double()
    (first, _) = convolutions(found)
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(first.weight.double(), weight, rtol=eps, atol=0)
    torch.testing.assert_close(first.bias.double(), bias, rtol=eps, atol=0)
    assert torch.equal(a.weight, network("batch norm without relu").layers["a"].weight), "the caller's weights are not touched"


def test_batch_norm_in_training_mode_stays_in_pytorch():
    module = network("batch norm without relu")
    bn = nn.BatchNorm2d(9, track_running_stats=False).eval()  # normalises by the batch's own statistics even so
    module.layers["bn"] = bn
    assert left(fused(module))["native_batch_norm.default"] == 1


def test_a_channelwise_value_of_the_time_is_an_image_bias():
    layers = {"a": conv(3, 6), "b": conv(6, 6), "time": nn.Linear(1, 6)}

    def forward(n, x, labels):
        time = n["time"](labels[:, None])[:, :, None, None]
        return n["b"](F.silu(n["a"](x) + time)) + labels[:, None, None, None]

    module = Net(layers, None).requires_grad_(False)
    found = fused(lambda x, labels: forward(module.layers, x, labels), labels=True)
    assert [describe(part) for part in convolutions(found)] == ["bias time y", "bias y"]
    assert len(found.label_values) == 2  # the second is not one number a channel, and is added in a region
    assert left(found) == {"silu.default": 1, "add.Tensor": 1}


def test_constants_are_found_once():
    table = torch.arange(8.0)

    def function(x):
        return x * (table.sin() + 1).view(1, 1, 1, 8) + torch.ones(len(x), 1, 1, 1).cumsum(0) * 0

    found = fused(function)
    assert left(found) == {"mul.Tensor": 1, "add.Tensor": 1}
    growing = {str(operation.node.target) for operation in found.partition.batch_operations}
    assert growing >= {"aten.ones.default", "aten.cumsum.default"}
    assert not growing & {"aten.arange.default", "aten.sin.default"}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: torch.ones(len(x), 3, 8, 8), "does not depend on the images"),
        (
            lambda n, x: n(torch.cat([x, x.flip(3)])).unflatten(0, (2, -1)).mean(dim=0),
            "of shape \\(4, 3, 8, 8\\) at two images",
        ),
        (lambda n, x: n(x.double().float()) * x.argmax(dim=1, keepdim=True), None),
        (lambda n, x: (lambda order: n(x) * order)(x.argmax(dim=1, keepdim=True)), "is torch.int64"),
        (lambda n, x: (lambda wide: (n(x).double() * wide).float())(x.double()), "is torch.float64"),
        (lambda n, x: n(x) + n(x.mean(dim=0, keepdim=True)), "of shape \\(1, 3, 8, 8\\) at two images"),
    ],
)
def test_values_that_no_program_can_hold(function, message):
    module = conv(3, 3).requires_grad_(False)
    call = function if function.__code__.co_argcount == 1 else lambda x: function(module, x)
    if message is None:  # what stays inside one region may be anything
        fused(call)
        return
    with pytest.raises(ValueError, match=message):
        fused(call)


def test_a_value_of_the_time_with_images_elsewhere_is_refused():
    def function(x, labels):
        return (torch.stack([x, x]) * torch.stack([labels, labels])[..., None, None, None])[0]

    with pytest.raises(ValueError, match="a value of the labels, has its images in another axis"):
        fused(function, labels=True)


def test_a_function_of_images_has_no_time():
    assert fused(relu_classifier(torch.float32)).partition.label is None
