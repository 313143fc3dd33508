"""Flat graphs of networks, forward and transpose, to be compared with what autograd finds."""

import contextlib
import copy
from collections import Counter

import torch
from torch import nn
from torch.func import functional_call

from coupfast.engine.cuda.flat import FlatGraph, flatten

EPS = torch.finfo(torch.float32).eps
# A dozen layers, each a sum of a few hundred terms taken in another order, on values of a few times the result's size.
ROUNDINGS = 300


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def images(batch, channels=3, size=8, seed=1):
    shape = (batch, channels, size, size) if isinstance(size, int) else (batch, channels, *size)
    return channels_last(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


class Functions:
    """`forward(x, *constants)` and `vjp(x, v, *constants)` of a network, and what autograd makes of them."""

    def __init__(self, network):
        self.network = network
        values = dict([*network.named_parameters(), *network.named_buffers()])
        self.names, self.constants = list(values), [channels_last(value.detach()) for value in values.values()]

    def _call(self, x, constants):
        return functional_call(self.network, dict(zip(self.names, constants, strict=True)), (x,))

    def forward(self, x, *constants):
        with torch.no_grad():
            return (self._call(x, constants),)

    def vjp(self, x, v, *constants):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(self._call(leaf, constants), leaf, v)

    def both(self, x, on="cpu"):
        """Flat graphs of both, and the arguments to call them with."""
        v = torch.randn(self.network(x).shape, generator=torch.Generator().manual_seed(2))
        arguments = {"forward": (x,), "vjp": (x, channels_last(v))}
        return {name: (flat(getattr(self, name), given, self.constants, on), given) for name, given in arguments.items()}


def flat(function, varying, constants, on="cpu"):
    """A flat graph of tensors on the CPU, traced there or as on a GPU."""
    if on == "cpu":
        return flatten(function, varying, constants)
    with as_on_a_gpu():
        traced = flatten(function, [t.to("meta") for t in varying], [t.to("meta") for t in constants])
    for node in traced.module.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = node.kwargs | {"device": torch.device("cpu")}
    traced.module.recompile()
    return FlatGraph(traced.module, traced.varying, list(constants))


@contextlib.contextmanager
def as_on_a_gpu():
    """PyTorch's formulas ask whether a tensor is on the CPU, which tensors without a device are not; its convolutions on GPUs
    return channels last."""
    name, fake = "_conv_determine_backend_memory_format", torch._subclasses.fake_tensor.FakeTensorMode
    before = getattr(torch._C, name)
    fake.cache_clear()  # it remembers strides
    setattr(torch._C, name, lambda *_: torch.channels_last)
    try:
        yield
    finally:
        setattr(torch._C, name, before)
        fake.cache_clear()


def copied(graph):
    return FlatGraph(copy.deepcopy(graph.module), graph.varying, list(graph.constants))


def counts(graph):
    """Operations by their names without library and overload."""
    return Counter(str(node.target).split(".")[-2] for node in graph.operations())


def dead(graph):
    return [node for node in graph.module.graph.nodes if node.op == "call_function" and not node.users]


def assert_close(found, expected, roundings=ROUNDINGS):
    torch.testing.assert_close(found, expected, rtol=0, atol=roundings * EPS * max(float(expected.abs().max()), EPS))


def frozen(network):
    """Weights of ordinary size, none of them special."""
    generator = torch.Generator().manual_seed(5)
    for module in network.modules():
        if isinstance(module, nn.GroupNorm) and module.affine:
            module.weight.data.copy_(1.0 + 0.3 * torch.randn(module.weight.shape, generator=generator))
            module.bias.data.copy_(0.3 * torch.randn(module.bias.shape, generator=generator))
    return network.eval().requires_grad_(False)
