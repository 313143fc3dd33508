"""Traces: what a function of tensors did, for any number of images, or a refusal that says why."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import relu_classifier, silu_classifier, small_score
from cpu_networks import GRAPHS, network
from torch import fx, nn

from coupfast.tracing import PerImage, Trace, trace

aten = torch.ops.aten
IMAGE = (3, 8, 8)


def traced(function, dtype: torch.dtype = torch.float32) -> Trace:
    return trace(function, lambda batch: (torch.zeros(batch, *IMAGE, dtype=dtype),))


def run(found: Trace, *arguments: torch.Tensor) -> torch.Tensor:
    """The operations as they stand, dropping values when they are said to be dead."""
    values: dict[fx.Node, object] = {}
    waiting = list(arguments)
    for operation in found.operations:
        node = operation.node
        if node.op == "placeholder":
            values[node] = waiting.pop(0)
        elif node.op == "get_attr":
            values[node] = found.constants[node]
        elif node.op == "output":
            return values[node.all_input_nodes[0]]
        else:
            args, kwargs = operation.arguments(values, len(arguments[0]))
            values[node] = node.target(*args, **kwargs)
        for dead in operation.dead:
            del values[dead]
    raise AssertionError("a trace has an output")


def images(batch: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, *IMAGE, dtype=dtype, generator=torch.Generator().manual_seed(batch))


def targets(found: Trace) -> list:
    return [operation.node.target for operation in found.operations if operation.node.op == "call_function"]


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("name", GRAPHS)
def test_a_trace_does_what_the_network_does(name, batch):
    module = network(name)
    found = traced(module)
    assert all(
        torch.ops.aten == aten and not target._schema.is_mutable for target in targets(found) if hasattr(target, "_schema")
    )
    with torch.no_grad():
        torch.testing.assert_close(run(found, images(batch)), module(images(batch)), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("make", [relu_classifier, silu_classifier])
def test_dtype_is_the_networks(make, dtype):
    module = make(dtype)
    found = traced(module, dtype)
    assert {node.meta["val"].dtype for node in (operation.node for operation in found.operations) if "val" in node.meta} == {
        dtype
    }
    with torch.no_grad():
        torch.testing.assert_close(run(found, images(4, dtype)), module(images(4, dtype)), rtol=0, atol=0)


def test_images_and_labels():
    score = small_score(torch.float32)
    found = trace(lambda x, labels: score(x, labels), lambda batch: (torch.zeros(batch, *IMAGE), torch.zeros(batch)))
    for batch in (1, 4):
        labels = torch.linspace(1.0, 90.0, batch)
        with torch.no_grad():
            torch.testing.assert_close(run(found, images(batch), labels), score(images(batch), labels), rtol=0, atol=0)


def test_it_is_differentiable_and_keeps_no_graph():
    module = relu_classifier(torch.float32).requires_grad_(True)
    found = traced(module)
    assert not any(constant.requires_grad for constant in found.constants.values())
    x = images(2).requires_grad_()
    (expected,) = torch.autograd.grad(module(x).sum(), x)
    torch.testing.assert_close(torch.autograd.grad(run(found, x).sum(), x)[0], expected, rtol=0, atol=0)


def test_constants_are_the_weights_themselves():
    module = relu_classifier(torch.float32)
    found = traced(module)
    pointers = {constant.data_ptr() for constant in found.constants.values()}
    assert {parameter.data_ptr() for parameter in module.parameters()} <= pointers
    with torch.no_grad():
        module.linear.bias.add_(1.0)
        torch.testing.assert_close(run(found, images(2)), module(images(2)), rtol=0, atol=0)


def test_where_images_are():
    def function(x):
        h = x.flatten(1)  # first
        t = h.t()  # elsewhere
        return t.t() + torch.arange(192).view(1, 192) * 1.0  # absent

    found = traced(function)
    where = {operation.node.target: operation.node.meta.get("images") for operation in found.operations}
    assert where["argument_0"] == "first"
    assert where[aten.arange.default] == "absent"
    nodes = [operation.node for operation in found.operations if operation.node.target is aten.t.default]
    assert [node.meta["images"] for node in nodes] == ["elsewhere", "first"]
    folded = traced(lambda x: x.view(-1, 8, 8).sum(dim=0))
    assert [operation.node.meta["images"] for operation in folded.operations if operation.node.op == "call_function"] == [
        "elsewhere",
        "absent",
    ]


def test_arguments_that_grow_with_the_batch():
    def function(x):
        padding = torch.zeros(len(x), 1, 8, 8)
        folded = torch.cat([x, padding], dim=1).view(len(x) * 4, 8, 8).tanh().view(len(x), 4, 64)
        return folded.expand(len(x), 4, 64) * torch.arange(len(x) * 2).view(len(x), 2)[:, :1, None]

    found = traced(function)
    grown = [leaf for operation in found.operations for leaf in operation.leaves if isinstance(leaf, PerImage)]
    assert sorted(set(grown)) == [1, 2, 4]
    for batch in (1, 2, 7):
        torch.testing.assert_close(run(found, images(batch)), function(images(batch)), rtol=0, atol=0)


def test_outputs_that_nothing_reads_are_left_out():
    found = traced(lambda x: (x.sin().sum(), x + 1)[1])
    assert targets(found) == [aten.add.Tensor]


def test_in_place_operations_become_their_results():
    def function(x):
        h = x * 2
        before = h + 1  # what was read earlier keeps its value
        h.relu_().mul_(3).clamp_(max=2.0)
        return h + before

    found = traced(function)
    assert targets(found) == [
        aten.mul.Tensor,
        aten.add.Tensor,
        aten.relu.default,
        aten.mul.Tensor,
        aten.clamp.default,
        aten.add.Tensor,
    ]
    torch.testing.assert_close(run(found, images(3)), function(images(3)), rtol=0, atol=0)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1.0)
        return x


def writes_into_its_input(x):
    return x.mul_(2)


def writes_into_a_view(x):
    h = x * 2
    h[:, 0] = 0.0
    return h


def writes_under_a_view(x):
    h = x * 2
    flat = h.view(-1)
    h.relu_()
    return flat.sum() + h


def writes_to_an_out_argument(x):
    return torch.add(x, x, out=torch.empty_like(x))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x * float(x.sum()), "makes a number of a tensor"),
        (lambda x: x * x.sum().item(), "makes a number of a tensor"),
        (lambda x: x if bool((x == 0).all()) else -x, "makes a number of a tensor"),
        (lambda x: x.sin() if len(x) == 2 else x.cos(), "different things at different batch sizes"),
        (lambda x: x.sin() if len(x) == 2 else x.sin().cos(), "different things at different batch sizes"),
        (lambda x: x * len(x) ** 2, "different things at different batch sizes"),
        (lambda x: x / (1.0 / len(x)), "different things at different batch sizes"),
        (lambda x: [x.sin(), x.sin()][len(x) == 2] + (x.sin() if len(x) == 2 else x), "different things"),
        (lambda x: x + torch.ones(2 * (len(x) == 2) + 1).sum(), "different things"),
        (writes_into_its_input, "memory that other values share"),
        (writes_into_a_view, "memory that other values share"),
        (writes_under_a_view, "memory that other values share"),
        (writes_to_an_out_argument, "in a way that is not followed"),
        (lambda x: (x, x), "returns tuple, not a tensor"),
        (lambda x: None, "returns NoneType, not a tensor"),
        (Counting(), "memory that other values share"),
    ],
)
def test_refusals(function, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        traced(function)


def test_the_functions_own_error_comes_through():
    def function(x):
        raise KeyError("no such layer")

    with pytest.raises(KeyError, match="no such layer"):
        traced(function)


def test_parts_without_gradient_are_operations_like_others():
    found = traced(lambda x: x * F.softmax(x, dim=1).detach())
    assert aten.detach.default in targets(found)


def test_nothing_is_left_behind():
    module = relu_classifier(torch.float32)
    before = copy.deepcopy(module.state_dict())
    grad_enabled, state = torch.is_grad_enabled(), torch.get_rng_state()
    traced(module)
    assert torch.is_grad_enabled() == grad_enabled and torch.equal(torch.get_rng_state(), state)
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_tracing_does_not_import_the_compiler():
    code = """
import sys, torch
from coupfast.tracing import trace
trace(lambda x: torch.relu(x @ x), lambda n: (torch.zeros(n, 4, 4),))
assert "torch._dynamo" not in sys.modules and "sympy" not in sys.modules, "seconds of imports"
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"})
