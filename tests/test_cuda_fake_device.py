"""The steps of the CUDA engine on CUDA tensors that have no data: no host waits, no device is mixed, results stay in place.

Autograd does not run on such tensors without a GPU. So the pieces are traced on the CPU, derivatives and all, the devices in
their graphs are rewritten, and what is left has no autograd in it.
"""

import copy
import functools
import inspect
import logging
import re

import pytest
import torch
from conftest import relu_classifier, silu_classifier, small_score
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from coupfast import Purifier
from coupfast.engine.cuda import capture, order
from coupfast.engine.cuda.flat import VIEWS
from coupfast.engine.cuda.networks import CudaNetworks
from coupfast.engine.cuda.program import CudaProgram
from coupfast.guidance import Guidance

SHAPE = (3, 8, 8)
NOT_LAUNCHED = {torch.ops.prim.device.default, torch.ops.aten.empty_strided.default}


@pytest.fixture(autouse=True)
def no_device_guard(monkeypatch):
    """These two methods look for the device before they dispatch, which a PyTorch without CUDA cannot; operators do not. Nor
    are there streams to be put in order."""

    def contiguous(self, *, memory_format=torch.contiguous_format):
        return torch.ops.aten.contiguous.default(self, memory_format=memory_format)

    monkeypatch.setattr(order, "has_streams", lambda device: False)
    monkeypatch.setattr(torch.Tensor, "contiguous", contiguous)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: torch.ops.aten.copy_.default(self, other))


@functools.cache
def bound(make_classifier, kernels, bucket):
    """Networks on the CPU, and their pieces; `kernels`: whether this project's, or which convolutions, also by shape."""
    score = small_score(torch.float32).requires_grad_(False)
    classifier = None if make_classifier is None else make_classifier(torch.float32).requires_grad_(False)
    method = "reverse-sde" if classifier is None else "coup"
    table = Purifier(score, classifier, method=method, num_steps=4, engine="eager").recipe.table
    example = torch.zeros(1, *SHAPE)
    guidance = None if classifier is None else Guidance(classifier, example)
    everywhere = kernels if isinstance(kernels, str) else "ieee" if kernels else None
    choose = kernels if callable(kernels) else everywhere and (lambda *shape: everywhere)
    made = CudaNetworks(score, guidance, table, example, True, choose=choose, fuse_norms=bool(kernels))
    return made, {name: made.pieces.make(name, bucket) for name in made.pieces.names()}


def on_cuda(graph):
    """A flat graph for CUDA tensors, and its constants there."""
    module = copy.deepcopy(graph.module)
    for node in module.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda")}
    module.recompile()
    constants = [torch.empty_strided(c.shape, c.stride(), dtype=c.dtype, device="cuda") for c in graph.constants]
    return module, constants


class Watch(TorchDispatchMode):
    """Every tensor on CUDA; every operation counted."""

    def __init__(self):
        super().__init__()
        self.launched = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, result))
        wrong = [leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.device.type != "cuda"]
        assert not wrong, f"{func} touches {wrong}"
        if func not in VIEWS | NOT_LAUNCHED:
            self.launched.append(func)
        return result


class FakeProgram(CudaProgram):
    """A program whose buffers and pieces are on a device that is not there."""

    def __init__(self, made, bucket, pieces):
        super().__init__(made, bucket)
        self.pieces = pieces

    def _piece(self, name):
        if name not in self._pieces:
            module, constants = on_cuda(self.pieces[name])
            self._pieces[name] = lambda *inputs: module(*inputs, *constants)
        return self._pieces[name]


def fake_program(make_classifier=relu_classifier, kernels=True, bucket=2):
    """To be used within the mode that comes with it."""
    made, pieces = bound(make_classifier, kernels, bucket)
    made, mode = copy.copy(made), FakeTensorMode()
    with mode:
        made.example = torch.zeros(1, *SHAPE, device="cuda")
        made.coefficients = torch.zeros(made.coefficients.shape, device="cuda")
        return FakeProgram(made, bucket, pieces), mode


def launched(program, mode, curved):
    """Operations of a step with noise, of one without, and of a transpose."""
    watches = []
    with mode, torch.no_grad():
        backwards = functools.partial(program._transpose, curved, rebuilds=curved and program.networks.pieces.piecewise_linear)
        for work in (lambda: program._step(True), lambda: program._step(False), backwards):
            work()  # makes buffers
            with Watch() as watch:
                work()
            watches.append(watch.launched)
    return watches


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "library"])
@pytest.mark.parametrize("make_classifier", [relu_classifier, silu_classifier, None], ids=["relu", "silu", "unguided"])
def test_steps_stay_on_the_device(make_classifier, kernels):
    program, mode = fake_program(make_classifier, kernels)
    state = [(buffer, buffer.untyped_storage()._cdata) for buffer in program.runner.state]
    operations = launched(program, mode, make_classifier is not None)
    for buffer, storage in state:
        assert isinstance(buffer, FakeTensor) and buffer.device.type == "cuda"
        assert buffer.untyped_storage()._cdata == storage
    for piece in operations:
        assert piece.count(torch.ops.coupfast.guided_step_out.default) == 1
    # Noise is made in the step's own kernel.
    assert len(operations[0]) == len(operations[1])


def test_waits_and_shapes_of_values_would_show():
    with FakeTensorMode(), torch.no_grad():
        x = torch.zeros(3, device="cuda")
        with pytest.raises(DataDependentOutputException):
            x.sum().item()
        with pytest.raises(DynamicOutputShapeException):
            torch.ops.aten.nonzero.default(x)
        with pytest.raises(AssertionError, match="touches"), Watch():
            torch.ops.aten._to_copy.default(x, device=torch.device("cpu"))


def test_kernels_launched_per_step():
    """Counted from graphs, operation by operation; a compiler fuses what is left of PyTorch's, and a graph launches all."""
    (fused, _, fused_back), (plain, _, plain_back) = (
        launched(*fake_program(kernels=kernels), curved=True) for kernels in (True, False)
    )
    assert len(fused) < len(plain)
    assert len(fused_back) < len(plain_back)
    norms = torch.ops.aten.native_group_norm.default
    assert plain.count(norms) == fused.count(torch.ops.coupfast.group_norm_silu.default) > 0
    assert norms not in fused and norms not in fused_back
    # 172 and 301 before what weights alone decide was found once, and all time projections in one gather.
    assert len(fused) <= 145 and len(fused_back) <= 268
    assert [piece.count(torch.ops.aten.index_select.default) for piece in (fused, fused_back)] == [1, 1]


@pytest.mark.parametrize("name", ["score", "score vjp", "evaluate", "cotangent", "tangent"])
def test_pieces_compile_whole(name):
    """`fullgraph=True` raises at a graph break; the compiler's own front end runs, its code generator needs the device."""
    graph = bound(relu_classifier, True, 2)[1][name]
    torch._dynamo.reset()
    compiled = torch.compile(graph.module, fullgraph=True, dynamic=False, backend="aot_eager")
    generator = torch.Generator().manual_seed(0)

    def example(node):
        value = node.meta["val"]
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
        return made.normal_(generator=generator) if value.is_floating_point() else made.zero_()

    inputs = [example(node) for node in graph.placeholders()[: graph.varying]]
    logging.getLogger("torch").setLevel(logging.WARNING)
    for found, expected in zip(compiled(*inputs, *graph.constants), graph(*inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch without CUDA: what captures call is NOT looked up")
def test_what_captures_call_of_pytorchs_own_is_there():
    """Undocumented, so that another version may lack it, which else shows on a GPU alone."""
    names = set(re.findall(r"torch\._C\.(\w+)\(", inspect.getsource(capture)))
    assert len(names) == 3
    assert not {name for name in names if not hasattr(torch._C, name)}
