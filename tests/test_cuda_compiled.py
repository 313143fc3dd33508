"""Pieces compiled and kept: Inductor's code for the CPU here, which is the same way as for a GPU."""

import os
import subprocess
import sys

import pytest
import torch

from coupfast.engine.cuda import compiled as compiled_module
from coupfast.engine.cuda.compiled import Inductor
from coupfast.engine.cuda.flat import flatten

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


@pytest.fixture
def counted(monkeypatch):
    """Stand-ins for the compiler and for what it makes; yields what was compiled."""
    made = []

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
