"""What PyTorch's compiler makes of the cuda engine's pieces for a GPU that is not there.

Its code is generated for an H100; every kernel in it is compiled to machine code, and all of it runs on the CPU, kernels in
Triton's interpreter, with every buffer full of NaN before it is written.
"""

import copy
import functools
import os
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import relu_classifier, silu_classifier
from graph_backend import StandIn
from test_cuda_fake_device import bound
from test_noise import run_interpreted

from coupfast.engine import CounterNoise
from coupfast.engine.cuda.calibration import APART
from coupfast.engine.cuda.compiled import WORTH
from coupfast.engine.cuda.launches import launches_of_code, launches_of_operations
from coupfast.engine.cuda.pieces import HALVES
from coupfast.engine.cuda.program import CudaProgram
from coupfast.engine.cuda.substitution import CONTIGUOUS
from coupfast_kernels.convolution.gpu import ALGORITHMS

pytest.importorskip("triton", reason="Triton is not installed: what it would compile is NOT tested here")
from absent_gpu import A100, H100, Interpreted, compiled, generated, kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EPS = torch.finfo(torch.float32).eps


#: (channels in, channels out, height) → the algorithm of a convolution: each is somewhere in a score network and its transpose.
#: A classifier has too few channels for calibration to try its two, which are as right there.
ALGORITHM_OF = {
    (16, 3, 8): "tf32x3-halves",
    (48, 32, 4): "tf32x3-halves-split",
    (32, 16, 8): "winograd-tf32x3-halves",
    (16, 32, 4): "ieee-split",
    (32, 32, 8): "winograd",
    (64, 32, 4): "tf32x3",
    (32, 32, 4): "tf32",
    (3, 8, 8): "winograd-tf32x3-halves",
    (8, 8, 8): "tf32x3-halves-split",
}


def in_turn(batch, in_channels, out_channels, height, width, groups=0):
    """Norms stay apart from convolutions, which are compiled and interpreted with them in a test of their own."""
    return APART if groups else ALGORITHM_OF.get((in_channels, out_channels, height), "ieee")


#: All pieces with a ReLU classifier and this project's kernels; a smooth one's Hessian; those of steps that keep activations;
#: one with the library's convolutions, and two with them on contiguous maps.
PIECES = [(relu_classifier, in_turn, name) for name in ("score", "score vjp", "evaluate", "cotangent", "tangent")]
PIECES += [(silu_classifier, in_turn, "hvp"), *((relu_classifier, in_turn, name) for name in HALVES)]
PIECES += [(relu_classifier, False, "cotangent")]
PIECES += [(relu_classifier, CONTIGUOUS, "score"), (relu_classifier, CONTIGUOUS, "cotangent")]
IDS = [name + {in_turn: "", False: ", library", CONTIGUOUS: ", contiguous"}[ours] for _, ours, name in PIECES]


@functools.cache
def piece_of(make_classifier, ours, name):
    made, pieces = bound(make_classifier, ours, 2)
    return pieces[name] if name in pieces else made.pieces.make(name, 2)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Generated source of every piece, in files; made once for the tests here and those in the interpreter."""
    if "GENERATED" in os.environ:
        return Path(os.environ["GENERATED"])
    folder = tmp_path_factory.mktemp("generated")
    for (make_classifier, ours, name), id in zip(PIECES, IDS, strict=True):
        graph = piece_of(make_classifier, ours, name)
        (folder / id).write_text(generated(graph.module, graph.example_inputs(), H100))
    return folder


def launches(sources, piece):
    """Kernels that a piece starts, compiled and operation by operation."""
    make_classifier, ours, name = piece
    graph = piece_of(make_classifier, ours, name)
    text = (sources / IDS[PIECES.index(piece)]).read_text()
    return launches_of_code(text), launches_of_operations(graph.module, graph.example_inputs())


if not INTERPRETED:

    def check_machine_code(name, text, folder, capability):
        from kernel_report import _tool

        built = compiled(name, text, folder, capability)
        assert "tf32" not in built.asm["ptx"], name
        usage = _tool("cuobjdump", built.asm["cubin"], "--dump-resource-usage")
        assert sum(map(int, re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage))) == 0, (name, capability, usage)

    def by_code(sources):
        """Kernels by what distinguishes them, which is not their names."""
        found = [item for source in sources for item in kernels(source).items()]
        return {text.replace(name, "").partition("@triton.jit")[2]: (name, text) for name, text in found}

    def test_every_kernel_compiles_without_spills_or_tf32(sources, tmp_path):
        distinct = by_code((sources / id).read_text() for id in IDS)
        assert len(distinct) > 20
        for name, text in distinct.values():
            for capability in (90, 100):
                check_machine_code(name, text, tmp_path, capability)

    def test_no_clock_decides_how_a_sum_is_cut(sources):
        """Each kernel is told so: processes that time its configs could take different ones, and get other bits."""
        told = [(name, text) for id in IDS for name, text in kernels((sources / id).read_text()).items()]
        assert told and not [name for name, text in told if "'deterministic': True" not in text]

    def test_every_kernel_for_an_a100_compiles(tmp_path):
        """Its code is generated for it: the compiler may choose by a device's processors and memory."""
        made = []
        for make_classifier, ours, name in PIECES[:8]:
            graph = piece_of(make_classifier, ours, name)
            made.append(generated(graph.module, graph.example_inputs(), A100))
        distinct = by_code(made)
        assert len(distinct) > 15
        for name, text in distinct.values():
            check_machine_code(name, text, tmp_path, 80)

    @pytest.mark.parametrize("name", ["score", "cotangent"])
    def test_convolutions_are_on_the_maps_that_were_chosen(sources, name):
        """The compiler has a mind of its own about formats, which here would undo what calibration found."""
        text = (sources / f"{name}, contiguous").read_text()
        buffers = re.findall(r"(\w+) = extern_kernels\.convolution\(\w+, \w+, stride=\(1, 1\), padding=\(1, 1\)", text)
        # torch 2.14 has another name for it.
        said = r"assert_(?:size_stride|tensor_metadata)\((\w+), \(([\d, ]+\d)\), \(([\d, ]+\d)\)"
        strides = {
            buffer: [tuple(map(int, numbers.split(", "))) for numbers in (shape, stride)]
            for buffer, shape, stride in re.findall(said, text)
        }
        assert len(buffers) > 1
        for buffer in buffers:
            shape, stride = strides[buffer]
            assert torch.empty(shape).stride() == stride, (buffer, shape, stride)

    @pytest.mark.parametrize(("name", "products"), [("score", {"addmm": 13}), ("score vjp", {"addmm": 13, "mm": 13})])
    def test_1x1_convolutions_are_products_of_maps_as_they_lie(sources, name, products):
        """As convolutions they come with a pass for every bias, and copies into other formats and back: with more launches than
        there are operations (torch 2.13: 105 and 217; as products, as with 2.14.1, 86 and 179)."""
        text = (sources / name).read_text()
        found = Counter(re.findall(r"extern_kernels\.(\w+)\(", text))
        assert "convolution" not in text.partition("def call(")[2]
        assert {operation: found[operation] for operation in found if operation != "bmm"} == products
        compiled, operations = launches(sources, (relu_classifier, in_turn, name))
        assert compiled <= 1.1 * operations

    def test_which_pieces_are_worth_compiling(sources):
        """Most of a classifier's; of a score network with this project's norms, none. Pieces so far from the line that a kernel
        more or less, as another version of the compiler may make, takes none across."""
        worth = {"evaluate": True, "tangent": True, "hvp": True, "score": False, "score vjp": False}
        for piece in PIECES:
            if piece[1] is in_turn and piece[2] in worth:
                compiled, operations = launches(sources, piece)
                found = {made <= WORTH * operations for made in (compiled - 1, compiled, compiled + 1)}
                assert found == {worth[piece[2]]}, piece

    def test_generated_code_in_the_interpreter(sources, monkeypatch):
        monkeypatch.setenv("GENERATED", str(sources))
        run_interpreted("tests/test_cuda_inductor.py")

else:

    @pytest.mark.parametrize(("make_classifier", "ours", "name"), PIECES, ids=IDS)
    def test_interpreted(sources, tmp_path, make_classifier, ours, name):
        id = IDS[PIECES.index((make_classifier, ours, name))]
        graph = piece_of(make_classifier, ours, name)
        generator = torch.Generator().manual_seed(0)
        inputs = graph.example_inputs()
        for tensor in inputs[: graph.varying]:
            if tensor.is_floating_point():
                tensor.normal_(generator=generator)
            elif tensor.dtype == torch.bool:
                tensor.random_(0, 2, generator=generator)
        if name == HALVES[1]:  # in the formats that the other half leaves them in, which the code asks for
            with torch.no_grad():
                inputs[3 : graph.varying] = piece_of(make_classifier, ours, HALVES[0])(*inputs[:2])[1:]
        # Each algorithm, and transposes; more of them would take more seconds.
        run = Interpreted((sources / id).read_text(), tmp_path, convolutions=name in ("score", "evaluate", "cotangent"))
        with torch.no_grad():
            results, expected = run(*inputs), graph.module(*inputs)
        for found, wanted in zip(results, expected, strict=True):
            assert found.stride() == wanted.stride() and found.dtype == wanted.dtype
            if wanted.is_floating_point():
                # Sums of a few hundred terms in another order, thirty layers of them.
                torch.testing.assert_close(found, wanted, rtol=0, atol=300 * EPS * float(wanted.abs().max()))
            else:
                assert torch.equal(found, wanted)
        assert run.launches
        if id == "score":
            assert set(run.launches) >= set(ALGORITHMS)
        if name == "evaluate":
            backend, again = StandIn(), [torch.empty_like(result) for result in results]
            backend.capture(lambda: torch._foreach_copy_(again, run(*inputs))).replay()
            assert all(map(torch.equal, again, results))

    def test_interpreted_steps_and_a_transpose(sources, tmp_path, monkeypatch):
        """All pieces of COUP as a program has them: recorded into a pool that hands out again what was let go, and replayed
        from NaN into the same memory. Convolutions are their definitions: those of one piece are recorded above."""
        made, pieces = bound(relu_classifier, in_turn, 2)
        names = {graph.module: name for name, graph in pieces.items()}
        monkeypatch.setattr(made.pieces, "make", lambda name, bucket: pieces[name])
        backend, runs = StandIn(), {}

        def compiler(module, inputs):
            name = names[module]
            runs[name] = Interpreted((sources / name).read_text(), tmp_path)
            return runs[name]

        def program(**changes):
            networks = copy.copy(made)
            for name, value in changes.items():
                setattr(networks, name, value)
            return CudaProgram(networks, 2)

        generator = torch.Generator().manual_seed(0)
        x, v = (torch.randn(2, 3, 8, 8, generator=generator) for _ in range(2))
        noise = CounterNoise(1, torch.arange(2), torch.zeros(2, dtype=torch.int64))
        results = []
        for made_so in (program(), program(backend=lambda: backend, compiler=compiler)):
            x_1, kept = made_so.step(0, x, noise, "slopes")
            x_2, _ = made_so.step(1, x_1, noise)
            results.append([x_1, x_2, made_so.step_vjp(0, x, kept, v)])
        for found, wanted in zip(*reversed(results), strict=True):
            # Two steps and a transpose, each as far from the other order of sums as a piece is.
            torch.testing.assert_close(found, wanted, rtol=0, atol=3 * 300 * EPS * float(wanted.abs().max()))
        assert set(runs) == set(pieces) and all(run.launches for run in runs.values())
        assert [graph.replays for graph in backend.graphs] == [1 + 2, 1 + 1]
        for graph in backend.graphs:
            assert graph.pool.handed_out > 2 * len(graph.pool.blocks)
