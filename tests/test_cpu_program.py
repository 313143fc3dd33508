"""Programs of the CPU engine: values, transposes and linear parts of every graph, in memory that held anything."""

import copy
import os

import pytest
import torch
from conftest import small_score
from cpu_networks import GRAPHS, moved, network
from torch import nn

from coupfast.engine.cpu.algorithms import WeightStore, tile
from coupfast.engine.cpu.fusion import fuse
from coupfast.engine.cpu.network_program import NetworkProgram
from coupfast.engine.cpu.parts import FusedNetwork
from coupfast.engine.cpu.placement import Workspace
from coupfast.guidance import PiecewiseLinearGraph, scaled_logits
from coupfast.tracing import trace
from coupfast_kernels import native
from coupfast_kernels.convolution import cpu as kernels

REASON = native.unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

EPS = torch.finfo(torch.float32).eps
PIECEWISE_LINEAR = [
    "one convolution",
    "convolution and relu",
    "batch norm and relu",
    "batch norm without parameters",
    "batch norm read twice",
    "value read by several",
    "concatenations",
    "residual first",
    "residual last",
    "sum with itself",
    "sum with a constant",
    "times zero",
    "scaled relus",
    "relu before a stride",
    "group convolution",
    "dilated convolution",
    "other kernels",
    "a weight in two places",
    "in place",
    "torchvision",
    "WideResNet",
    "DMWideResNet relu",
]


def images(batch: int, size: int = 8) -> torch.Tensor:
    return 2.0 * torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(batch)) - 1.0


def like(tensor: torch.Tensor, seed: int = 5) -> torch.Tensor:
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))


def fused(module: nn.Module) -> FusedNetwork:
    return fuse(trace(module, lambda batch: (torch.zeros(batch, 3, 8, 8),)))


def forced(size: int):
    """A choice of algorithms: this one wherever it can run."""

    def choose(conv, shape, batch, transposed):
        fits = conv.weight.shape[2:] == (3, 3) and (conv.stride, conv.padding) == (1, 1)
        return size if fits else kernels.DIRECT

    return choose


def poison(workspace: Workspace) -> None:
    workspace.arena.fill(float("nan"))
    workspace.scratch.fill(float("nan"))


def bound(*programs: NetworkProgram) -> Workspace:
    """The programs in one workspace full of NaN."""
    workspace = Workspace()
    for program in programs:
        workspace.hold(program.arena_floats, program.scratch_floats)
    for program in programs:
        program.bind(workspace)
        program.slopes.fill_(0xFF)
    poison(workspace)
    return workspace


def value_and_vjp(function, x: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        value = function(leaf)
        (gradient,) = torch.autograd.grad(value, leaf, v.to(value))
    return value.detach(), gradient


def assert_as_good_as(found, single, exact) -> None:
    """The contract of strict precision: an error within four times that of PyTorch's float32, or a few roundings."""
    for ours, theirs, wanted in zip(found, single, exact, strict=True):
        allowed = max(float((theirs.double() - wanted).norm()), 4 * EPS * float(wanted.norm()))
        error = float((ours.double() - wanted).norm())
        assert error <= 4 * allowed, f"{error} > 4 x {allowed}"


def checked(program: NetworkProgram, module: nn.Module, x: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A bound program's value and transpose, against PyTorch's in float64."""
    found = program.forward(x).clone(), program.backward(v)
    exact = value_and_vjp(copy.deepcopy(module).double(), x.double(), v.double())
    assert_as_good_as(found, value_and_vjp(module, x, v), exact)
    return found


@pytest.mark.parametrize(
    ("batch", "choose"), [(1, tile), (2, forced(kernels.F4)), (5, forced(kernels.F2))], ids=["1", "2", "5"]
)
@pytest.mark.parametrize("name", GRAPHS)
def test_values_and_transposes(name, batch, choose):
    module, x = network(name), images(batch)
    v = like(module(x))
    program = NetworkProgram(fused(module), batch, WeightStore(choose), backward=True, threads=1)
    workspace = bound(program)
    found = checked(program, module, x, v)
    # Again, backwards after forwards, in memory that holds other things: the same bits.
    poison(workspace)
    program.slopes.fill_(0xFF)
    other = like(v, seed=6)
    program.forward(x.flip(0))
    program.backward(other)
    torch.testing.assert_close(program.forward(x), found[0], rtol=0, atol=0)
    torch.testing.assert_close(program.backward(v), found[1], rtol=0, atol=0)
    # A program that only goes forwards uses its memory again earlier.
    forwards = NetworkProgram(program.network, batch, program.weights, backward=False, threads=2)
    bound(forwards)
    torch.testing.assert_close(forwards.forward(x), found[0], rtol=0, atol=0)
    assert forwards.arena_floats <= program.arena_floats


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_linear_parts(name, batch):
    """J v and its transpose at the slopes that the ordinary program found."""
    module, x = network(name), images(batch)
    graph = PiecewiseLinearGraph.trace(module, x)
    double = PiecewiseLinearGraph.trace(copy.deepcopy(module).double(), x.double())
    assert graph is not None and double is not None
    traced, weights = fuse(graph.traced), WeightStore(tile)
    ordinary = NetworkProgram(traced, batch, weights, backward=True, threads=1)
    linear = NetworkProgram(traced, batch, weights, backward=True, linear=graph, threads=1)
    bound(ordinary, linear)
    logits = ordinary.forward(x).clone()
    linear.slopes.copy_(ordinary.slopes)
    linear.region_slopes = ordinary.region_slopes
    v, u = like(x), like(logits, seed=6)
    found = linear.forward(v).clone(), linear.backward(u)

    def parts(graph, x, v, u):
        _, slopes = graph.evaluate(x, keep_slopes=True)
        return value_and_vjp(lambda v: graph.linear(v, slopes), v, u)

    assert_as_good_as(found, parts(graph, x, v, u), parts(double, x.double(), v.double(), u.double()))
    # Its transpose is that of the network itself, by the same kernels.
    ordinary.forward(x)
    torch.testing.assert_close(ordinary.backward(u), found[1], rtol=0, atol=16 * EPS * float(found[1].abs().max()))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_score_network(batch):
    double = small_score()
    single = small_score(torch.float32)
    labels = torch.tensor([37.5])
    x = images(batch)
    v = like(x)
    for function in (double, single):
        function.requires_grad_(False)
    traced = fuse(trace(lambda x, labels: single(x, labels), lambda n: (torch.zeros(n, 3, 8, 8), torch.full((n,), 10.0))))
    program = NetworkProgram(traced, batch, WeightStore(forced(kernels.F4)), backward=True, threads=1)
    bound(program)
    program.set_label(traced.at_label(labels))
    found = program.forward(x).clone(), program.backward(v)
    exact = value_and_vjp(lambda x: double(x, labels.double().expand(batch)), x.double(), v.double())
    assert_as_good_as(found, value_and_vjp(lambda x: single(x, labels.expand(batch)), x, v), exact)
    # Other labels, and back: the labels are no part of the program.
    program.set_label(traced.at_label(torch.tensor([3.0])))
    assert float((program.forward(x) - found[0]).norm()) > 1e-3 * float(found[0].norm())
    program.set_label(traced.at_label(labels))
    torch.testing.assert_close(program.forward(x), found[0], rtol=0, atol=0)


def test_programs_take_turns_in_one_workspace():
    modules = [network("DMWideResNet silu"), network("concatenations"), network("attention")]
    graphs = [fused(module) for module in modules]
    stores = [WeightStore(tile) for _ in modules]
    programs = [
        NetworkProgram(graph, batch, store, backward=True, threads=1)
        for graph, store in zip(graphs, stores, strict=True)
        for batch in (3, 1)
    ]
    inputs = [images(program.batch) for program in programs]
    cotangents = [like(torch.empty(program.batch, *program.network.shapes[program.network.output])) for program in programs]

    def run(program, x, v):
        return program.forward(x).clone(), program.backward(v)

    alone = []
    for program, x, v in zip(programs, inputs, cotangents, strict=True):
        bound(program)
        alone.append(run(program, x, v))
    workspace = bound(*programs)
    moves = workspace.moves
    workspace.hold(1, 1)
    assert workspace.moves == moves
    for _ in range(2):
        for program, x, v, expected in zip(programs, inputs, cotangents, alone, strict=True):
            for found, wanted in zip(run(program, x, v), expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    # More room than before: everything moves.
    workspace.hold(len(workspace.arena) + 1, len(workspace.scratch) + 1)
    assert workspace.moves == moves + 1
    for program in programs:
        program.bind(workspace)
    for found, wanted in zip(run(programs[0], inputs[0], cotangents[0]), alone[0], strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", GRAPHS)
def test_addresses_change_no_bit(name):
    """Weights of a mapped file lie anywhere, those of a copy at a cache line."""
    x = images(3, size=8)
    v, results = like(network(name)(x)), []
    for offset in (0, 4, 12, 52):
        module = moved(network(name), offset)
        program = NetworkProgram(fused(module), 3, WeightStore(tile), backward=True, threads=1)
        bound(program)
        results.append((program.forward(x).clone(), program.backward(v)))
    for result in results[1:]:
        for found, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["DMWideResNet silu", "torchvision", "concatenations"])
def test_threads_change_no_bit(name):
    module, x = network(name), images(3)
    v, graph, store = like(module(x)), fused(module), WeightStore(forced(kernels.F4))
    results = []
    for threads in (1, 2, 3):
        program = NetworkProgram(graph, 3, store, backward=True, threads=threads)
        bound(program)
        results.append((program.forward(x).clone(), program.backward(v)))
    for result in results[1:]:
        for found, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_has_memory_of_its_own():
    workspace = Workspace()
    workspace.hold(1000, 1000)
    workspace.arena[:], workspace.scratch[:] = 1.0, 2.0
    child = os.fork()
    if child == 0:
        poison(workspace)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert set(workspace.arena) == {1.0} and set(workspace.scratch) == {2.0}


def test_inputs_of_any_layout():
    module, x = network("WideResNet"), images(2)
    program = NetworkProgram(fused(module), 2, WeightStore(tile), backward=True, threads=1)
    bound(program)
    v = like(module(x))
    expected = program.forward(x).clone(), program.backward(v)
    for other in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        torch.testing.assert_close(program.forward(other), expected[0], rtol=0, atol=0)
        found = program.backward(v.flip(1).flip(1).t().contiguous().t())
        torch.testing.assert_close(found, expected[1], rtol=0, atol=0)
        assert found.is_contiguous()


def test_results_are_the_callers_own():
    """What `backward` returns outlives the next run."""
    module, x = network("WideResNet"), images(2)
    program = NetworkProgram(fused(module), 2, WeightStore(tile), backward=True, threads=1)
    workspace = bound(program)
    program.forward(x)
    gradient = program.backward(like(module(x)))
    before = gradient.clone()
    poison(workspace)
    torch.testing.assert_close(gradient, before, rtol=0, atol=0)


def test_images_do_not_mix():
    """Each image gets from the transpose what it gets alone, other images being not finite at all."""
    module, x = network("torchvision"), images(3)
    x[1] = float("inf")
    program = NetworkProgram(fused(module), 3, WeightStore(forced(kernels.F2)), backward=True, threads=1)
    alone = NetworkProgram(program.network, 1, program.weights, backward=True, threads=1)
    bound(program), bound(alone)
    v = like(torch.empty(3, 10))
    found, gradient = program.forward(x).clone(), program.backward(v)
    for image in (0, 2):
        expected = alone.forward(x[image : image + 1]).clone(), alone.backward(v[image : image + 1])
        # PyTorch's own operations choose their kernels by the batch.
        torch.testing.assert_close(found[image], expected[0][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient[image], expected[1][0], rtol=1e-5, atol=1e-5)


def test_weights_are_packed_once():
    module = network("WideResNet")
    graph, store = fused(module), WeightStore(tile)
    first = NetworkProgram(graph, 2, store, backward=True, threads=1)
    packed = dict(store._packed)
    assert packed
    NetworkProgram(graph, 2, store, backward=True, threads=2)
    assert store._packed.keys() == packed.keys()
    assert all(store._packed[key] is tensor for key, tensor in packed.items())
    assert first.network is graph


def test_scaled_logits_are_the_classifiers():
    module, x = network("WideResNet"), images(2)
    graph = fuse(trace(lambda x: scaled_logits(module, x), lambda n: (torch.zeros(n, 3, 8, 8),)))
    program = NetworkProgram(graph, 2, WeightStore(tile), backward=False, threads=1)
    bound(program)
    torch.testing.assert_close(program.forward(x), module((x + 1) / 2), rtol=1e-4, atol=1e-5)


def test_memory_of_operations_between_kernels():
    """Results of a max-pool, (8, 4, 4), and of the upsampling, (3, 8, 8), at once where the transpose needs both."""
    for backward, floats in ((False, max(8 * 4 * 4, 3 * 8 * 8)), (True, 8 * 4 * 4 + 3 * 8 * 8)):
        program = NetworkProgram(fused(network("max-pool")), 5, WeightStore(tile), backward=backward, threads=1)
        assert program.region_bytes() == 4 * 5 * floats
