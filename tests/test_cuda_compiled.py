"""Pieces compiled and kept: Inductor's code for the CPU here, which is the same way as for a GPU."""

import json
import os
import subprocess
import sys
import threading

import pytest
import torch

from coupfast.engine.cuda import compiled as compiled_module
from coupfast.engine.cuda.compiled import Inductor
from coupfast.engine.cuda.flat import flatten
from coupfast.engine.cuda.launches import launches_of_code, launches_of_operations

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a C++ compiler that Inductor knows")


def piece(factor=2.0):
    """Sums whose order a compiler chooses, in few enough operations to be compiled in seconds."""

    def function(x, weight):
        return (torch.softmax(factor * x @ weight, dim=1).sum(dim=0),)

    generator = torch.Generator().manual_seed(0)
    return flatten(function, (torch.zeros(7, 33),), (torch.randn(33, 65, generator=generator),))


def run(inductor, graph, x):
    return inductor(graph.module, graph.example_inputs())(x, *graph.constants)[0]


@pytest.fixture(scope="module")
def x():
    return torch.randn(7, 33, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, x):
    """Where a piece is kept, with what it gave."""
    place = tmp_path_factory.mktemp("kept")
    found = run(Inductor("cpu", place), piece(), x)
    torch.testing.assert_close(found, piece()(x)[0])
    torch.save(found, place / "found.pt")
    return place


AGAIN = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_cuda_compiled import piece, run
from coupfast.engine.cuda import compiled
x = torch.randn(7, 33, generator=torch.Generator().manual_seed(1))
def refuse(*args): raise AssertionError("compiled anew")
compiled._compile = refuse
torch.set_num_threads(1)  # as in the tests: what the library multiplies depends on it on a CPU
torch.use_deterministic_algorithms(True)
found = run(compiled.Inductor("cpu", {folder!r}), piece(), x)
assert torch.equal(found, torch.load({folder!r} + "/found.pt")), "other bits"
"""


def test_another_process_gets_the_same_bits_without_compiling(folder, tmp_path):
    """Also one with other flags, and with the compiler's own cache empty."""
    code = AGAIN.format(tests=os.path.dirname(__file__), folder=str(folder))
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "empty")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_launches_are_counted_of_what_is_kept(folder):
    """The operations are a product by a number, one of matrices, a softmax and a sum."""
    graph = piece()
    before = str(graph.module.graph)
    chosen = Inductor("cpu", folder, always=False)(graph.module, graph.example_inputs())
    (file,) = folder.glob("*.json")
    compiled, operations = json.loads(file.read_text())
    assert operations == 4 and 1 < compiled <= 4
    assert (chosen is graph.module) == (compiled > 3) and str(graph.module.graph) == before


CODE = """
def triton_poi_fused_0(in_ptr0):
    pass
triton_poi_fused_0.run(nothing)
class Runner:
    def call(self, args):
        {}
def benchmark_compiled_module():
    extern_kernels.mm(nothing)
"""


def test_launches_in_code():
    calls = ["triton_poi_fused_0.run(x)", "extern_kernels.mm(x)", "torch.ops.coupfast.conv3x3.default(x)", "cpp_fused_add_1(x)"]
    others = ["assert_size_stride(x)", "empty_strided_cuda(x)", "reinterpret_tensor(x)", "del x"]
    assert launches_of_code(CODE.format("\n        ".join([*calls, *others]))) == len(calls)
    with pytest.raises(ValueError, match="no function `call`"):
        launches_of_code("def run(): pass")


def test_launches_of_operations():
    """A bias is a pass of its own after a convolution and none after a product; a format is a copy where it is another."""

    def launches(function, *tensors):
        graph = flatten(function, tensors[:1], tensors[1:])
        return launches_of_operations(graph.module, graph.example_inputs())

    x, bias = torch.zeros(2, 3, 4, 4), torch.zeros(5)
    convolution, product = torch.nn.functional.conv2d, torch.nn.functional.linear
    assert launches(lambda x, w: (convolution(x, w),), x, torch.zeros(5, 3, 3, 3)) == 1
    assert launches(lambda x, w, b: (convolution(x, w, b),), x, torch.zeros(5, 3, 3, 3), bias) == 2
    assert launches(lambda x, w, b: (product(x, w, b),), x[:, :, 0, 0], torch.zeros(5, 3), bias) == 1
    for given, copies in ((x, 1), (x.contiguous(memory_format=torch.channels_last), 0)):
        assert launches(lambda x: (x.contiguous(memory_format=torch.channels_last),), given) == copies


@pytest.fixture
def counted(monkeypatch):
    """Stand-ins for the compiler and for what it makes; yields what was compiled. What is made has four operations."""
    from torch._inductor.graph import GraphLowering

    class Made(list):
        launches = 3  # of the code that is shown
        code = CODE  # None: none is shown

    made = Made()

    class Artifact:
        def __init__(self, name):
            self.name = name

        def save(self, *, path, format):
            with open(path, "w") as file:
                file.write(self.name)

        @staticmethod
        def load(*, path, format):
            name = open(path).read()
            if not name.startswith("piece"):
                raise RuntimeError("Invalid header")
            return Artifact(name)

    def compile(module, inputs):
        made.append(module)
        if GraphLowering.save_output_code is not None and made.code is not None:
            GraphLowering.save_output_code(made.code.format("\n        ".join(["triton_poi_fused_0.run(x)"] * made.launches)))
        return Artifact(f"piece {len(made)}")

    monkeypatch.setattr(compiled_module, "_compile", compile)
    monkeypatch.setattr(torch._inductor, "CompiledArtifact", Artifact)
    return made


def test_other_operations_formats_and_devices_are_other_pieces(counted, tmp_path, monkeypatch):
    inductor, graph = Inductor("cpu", tmp_path), piece()
    assert inductor(graph.module, graph.example_inputs()).name == "piece 1"
    assert Inductor("cpu", tmp_path)(piece().module, piece().example_inputs()).name == "piece 1"
    assert inductor(piece(3.0).module, graph.example_inputs()).name == "piece 2"
    x, weight = graph.example_inputs()
    assert inductor(graph.module, [x, weight.t().contiguous().t()]).name == "piece 3"
    monkeypatch.setattr(compiled_module, "machine_key", lambda device: {"device": "another"})
    assert inductor(graph.module, graph.example_inputs()).name == "piece 4"


def test_half_a_file_is_compiled_anew(counted, tmp_path, caplog):
    inductor, graph = Inductor("cpu", tmp_path), piece()
    inductor(graph.module, graph.example_inputs())
    (file,) = tmp_path.glob("*.bin")
    file.write_text("half")
    assert inductor(graph.module, graph.example_inputs()).name == "piece 2"
    assert "cannot be used (RuntimeError: Invalid header); the piece is compiled anew" in caplog.text
    assert Inductor("cpu", tmp_path)(graph.module, graph.example_inputs()).name == "piece 2"


def test_where_nothing_can_be_kept_it_compiles_and_says_so(counted, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    graph = piece()
    assert Inductor("cpu", tmp_path / "file")(graph.module, graph.example_inputs()).name == "piece 1"
    assert "set XDG_CACHE_HOME to a folder that can be written" in caplog.text


class TestWorthIt:
    @pytest.mark.parametrize(("launches", "worth"), [(3, True), (4, False)])
    def test_by_launches_before_and_after(self, counted, tmp_path, launches, worth):
        """Decided once, for all processes that come after; and not where all pieces are to be compiled."""
        graph, counted.launches = piece(), launches
        for _ in range(2):
            chosen = Inductor("cpu", tmp_path, always=False)(graph.module, graph.example_inputs())
            assert (chosen is not graph.module) == worth
            counted.launches = 0
        assert len(counted) == 1
        assert Inductor("cpu", tmp_path, always=True)(graph.module, graph.example_inputs()).name == "piece 1"

    @pytest.mark.parametrize("launches", [3, 4])
    def test_where_nothing_can_be_kept(self, counted, tmp_path, launches):
        (tmp_path / "file").write_text("in the way")
        graph, counted.launches = piece(), launches
        chosen = Inductor("cpu", tmp_path / "file", always=False)(graph.module, graph.example_inputs())
        assert (chosen is graph.module) == (launches == 4)

    def test_a_count_that_is_damaged_is_counted_anew(self, counted, tmp_path, caplog):
        graph, counted.launches = piece(), 4
        for damage in ("half", "null"):
            Inductor("cpu", tmp_path, always=False)(graph.module, graph.example_inputs())
            (kept,), (file,) = tmp_path.glob("*.bin"), tmp_path.glob("*.json")
            kept.unlink()
            file.write_text(damage)
            caplog.clear()
            assert Inductor("cpu", tmp_path, always=False)(graph.module, graph.example_inputs()) is graph.module
            assert "is damaged" in caplog.text and json.loads(file.read_text()) == [4, 4]

    @pytest.mark.parametrize(("code", "reason"), [(None, "does not show"), ("def run(): pass", "no function `call`")])
    def test_what_cannot_be_counted_is_taken(self, counted, tmp_path, caplog, code, reason):
        graph, counted.code = piece(), code
        assert Inductor("cpu", tmp_path, always=False)(graph.module, graph.example_inputs()).name == "piece 1"
        assert reason in caplog.text and "launches are not counted" in caplog.text and not list(tmp_path.glob("*.json"))

    def test_what_another_thread_compiles_meanwhile_is_not_counted(self, counted, tmp_path, monkeypatch):
        graph, counted.launches = piece(), 3
        others = (piece().module, graph.example_inputs())
        compile = compiled_module._compile

        def beside(module, inputs):
            thread = threading.Thread(target=compile, args=others)
            thread.start()
            thread.join()
            return compile(module, inputs)

        monkeypatch.setattr(compiled_module, "_compile", beside)
        assert Inductor("cpu", tmp_path, always=False)(graph.module, graph.example_inputs()) is not graph.module
        assert len(counted) == 2
