"""Kept activations on the CPU engine: no bit of a gradient depends on them, nothing is recomputed, memory is as planned."""

import functools
import weakref

import pytest
import torch
from conftest import relu_classifier, silu_classifier, small_score
from cpu_networks import GRAPHS, network
from test_cpu_engine import AsDiffusers, Reading
from test_cpu_program import fused, poison
from test_engine_columns import noises, normal, table
from torch import nn

from coupfast import Purifier
from coupfast.engine import cpu
from coupfast.engine.cpu.algorithms import WeightStore, tile
from coupfast.engine.cpu.bound import BoundCpuEngine
from coupfast.engine.cpu.network_program import Activations, NetworkProgram
from coupfast.engine.cpu.placement import Workspace
from coupfast.integrate import Run, Storage, integrate
from coupfast_kernels import native

REASON = native.unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

STEPS = 4


def assert_equal(found, expected) -> None:
    """To the bit; None where nothing flows."""
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# --- programs ---------------------------------------------------------------------------------------------------------------


@functools.cache
def program_and_twin(name: str, threads: int) -> tuple[NetworkProgram, NetworkProgram, Workspace]:
    """One that keeps and one that does not, of three images, in one workspace."""
    graph = fused(network(name))
    weights, workspace = WeightStore(tile), Workspace()
    made = [NetworkProgram(graph, 3, weights, backward=True, keeps=keeps, threads=threads) for keeps in (True, False)]
    for program in made:
        workspace.hold(program.arena_floats, program.scratch_floats)
    for program in made:
        program.bind(workspace)
    return made[0], made[1], workspace


@pytest.mark.parametrize(
    ("name", "threads"), [*((name, 1) for name in GRAPHS), ("WideResNet", 2), ("DMWideResNet silu", 2)]
)
def test_passes_may_wait_for_their_transposes(name, threads):
    """Four forward passes, then their transposes in another order, in memory that is full of NaN in between."""
    keeping, twin, workspace = program_and_twin(name, threads)
    x = torch.randn(4, 3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    expected, waiting = [], []
    for image in x:
        value = twin.forward(image).clone()
        v = torch.randn(value.shape, generator=torch.Generator().manual_seed(2))
        expected.append((value, twin.backward(v)))
    for image, (value, _) in zip(x, expected, strict=True):
        poison(workspace)
        assert_equal([keeping.forward(image)], [value])
        waiting.append(keeping.activations())
    twin.slopes.fill_(0xFF)
    for i in (2, 3, 0, 1):
        poison(workspace)
        assert_equal([keeping.backward(v, waiting[i])], [expected[i][1]])
    # Moved in between, as a larger batch moves it.
    keeping.forward(x[0])
    last = keeping.activations()
    workspace.hold(len(workspace.arena) + 1, len(workspace.scratch) + 1)
    for program in (keeping, twin):
        program.bind(workspace)
    poison(workspace)
    assert_equal([keeping.backward(v, last)], [expected[0][1]])


def test_what_is_kept_is_what_the_transpose_reads():
    """Two images of three kernels' inputs, counted by hand: of a GroupNorm its input and four numbers a channel."""
    graph = fused(network("group norm without silu"))
    program = NetworkProgram(graph, 2, WeightStore(tile), backward=True, keeps=True, threads=1)
    assert program.kept_floats == 2 * (8 * 8 * 8 + 4 * 8)
    assert program.activations_bytes() == 4 * program.kept_floats  # nothing here is PyTorch's
    relu = fused(network("convolution and relu"))
    program = NetworkProgram(relu, 2, WeightStore(tile), backward=True, keeps=True, threads=1)
    bits = 2 * 8 * 8 * 1  # five channels in a byte, two images
    assert bits <= 4 * program.kept_floats <= bits + 64 + 16


@pytest.mark.parametrize("name", ["attention", "max-pool", "torchvision", "DMWideResNet silu", "no convolution"])
def test_bytes_of_activations(name):
    """Of the memory for kernels, and of what autograd saves in the operations between them, which is in no other's way."""
    graph = fused(network(name))
    program = NetworkProgram(graph, 5, WeightStore(tile), backward=True, keeps=True, threads=1)
    workspace = Workspace()
    program.bind(workspace)
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        program.forward(torch.randn(5, 3, 8, 8))
    kept = program.activations()

    def lies_in(memory, address: int) -> bool:
        return memory.ctypes.data <= address < memory.ctypes.data + memory.nbytes

    assert not any(lies_in(workspace.arena, address) for address in saved)
    constants = {value.data_ptr() for value in program._regions._constants.values() if isinstance(value, torch.Tensor)}
    of_graphs = sum(size for at, size in saved.items() if at not in constants and not lies_in(kept.memory, at))
    assert program.activations_bytes() == 4 * program.kept_floats + of_graphs
    assert kept.memory.nbytes == 4 * max(1, program.kept_floats)
    # The sine's cosine is made when it is wanted; attention is a kernel's, and autograd's a sum that saves nothing.
    assert (of_graphs > 0) == (name not in ("no convolution", "attention"))
    program.forward(torch.randn(5, 3, 8, 8))
    kept = program.activations()
    memory = weakref.ref(kept.memory)
    del kept
    assert memory() is None  # at once, without the garbage collector


# --- steps ------------------------------------------------------------------------------------------------------------------


def networks(smooth: bool) -> tuple[nn.Module, nn.Module]:
    make = silu_classifier if smooth else relu_classifier
    return small_score(torch.float32).requires_grad_(False), make(torch.float32).requires_grad_(False)


@functools.cache
def bound(columns: str, smooth: bool) -> BoundCpuEngine:
    """`DDPMpp` with attention, and a classifier whose Hessian-vector product the engine takes itself unless it is smooth."""
    found = cpu.prepare(*networks(smooth), table(columns), torch.zeros(1, 3, 8, 8))
    assert found.networks.score is not None and (found.networks.linear is None) == smooth
    return found


def leaves(columns: str, batch: int, counted: bool, seed: int = 1):
    """x_0, x_in and the noise, as far as a gradient can be asked for."""
    x, x_in = (normal(batch, 3, 8, 8, seed=s).float().requires_grad_() for s in (seed, 2))
    noise, *_ = noises(batch, counted)
    found = [x, *([x_in] if "e" in columns else [])]
    if not counted:
        rows = [noise.rows.float().requires_grad_(), *([noise.second.float().requires_grad_()] if "f" in columns else [])]
        noise, found = type(noise)(*rows), [*found, *rows]
    return x, x_in if "e" in columns else None, noise, found


def start(engine: BoundCpuEngine, columns: str, batch: int, counted: bool, storage: Storage, seed: int = 1):
    """A run whose backward pass is still to come."""
    x, x_in, noise, wanted = leaves(columns, batch, counted, seed)
    run = Run(engine, noise, storage)
    end = integrate(x, run, gradient=True, x_in=x_in)
    loss = (end * normal(*end.shape, seed=6).float()).sum()
    return run, lambda: [end.detach(), *torch.autograd.grad(loss, wanted)]


@pytest.mark.parametrize(
    ("columns", "smooth"), [*((c, False) for c in ("", "e", "f", "p", "q", "efpq")), ("", True), ("efpq", True)]
)
def test_no_bit_depends_on_what_is_kept(columns, smooth):
    engine = bound(columns, smooth)
    for batch, counted in ((1, True), (3, False)) if len(columns) == 1 else ((1, False), (3, False), (5, True)):
        _, back = start(engine, columns, batch, counted, Storage(batch))
        expected = back()
        for kept, slopes in ((1, True), (2, False), (STEPS, True)):
            run, back = start(engine, columns, batch, counted, Storage(batch, slopes, kept))
            held = [saved is not None and isinstance(saved.score, Activations) for saved in run.saved[0]]
            assert held == [k >= STEPS - kept for k in range(STEPS)]
            poison(engine.networks.workspace)
            assert_equal(back(), expected)
            assert run.saved == [[None] * STEPS]  # used up, and let go


@pytest.mark.parametrize("smooth", [False, True], ids=["relu", "smooth"])
def test_runs_may_be_interleaved(smooth):
    """Three runs of two batch sizes forwards, then backwards in the other order, one of them on two threads meanwhile."""
    engine, columns = bound("", smooth), ""
    cases = [(3, Storage(3, True, STEPS), 1), (3, Storage(3, True, 2), 7), (2, Storage(2, True, STEPS), 8)]
    expected = []
    for batch, _, seed in cases:
        _, back = start(engine, columns, batch, True, Storage(batch), seed)
        expected.append(back())
    backs = [start(engine, columns, batch, True, storage, seed)[1] for batch, storage, seed in cases]
    for back, wanted in zip(reversed(backs), reversed(expected), strict=True):
        poison(engine.networks.workspace)
        assert_equal(back(), wanted)
    _, back = start(engine, columns, 3, True, Storage(3, True, STEPS))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = back()
    finally:
        torch.set_num_threads(threads)
    for ours, theirs in zip(found, expected[0], strict=True):  # PyTorch's own operations may share out a sum
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_two_threads():
    engine = bound("", False)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        _, back = start(engine, "", 2, True, Storage(2))
        expected = back()
        _, back = start(engine, "", 2, True, Storage(2, True, 2))
        assert_equal(back(), expected)
    finally:
        torch.set_num_threads(threads)


def test_nothing_is_computed_again(monkeypatch):
    """Passes through programs are those that the plan counts."""
    counts = dict.fromkeys(("score forward", "score backward", "classifier forward", "classifier backward"), 0)
    score, classifier = networks(smooth=False)
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    keeping = Purifier(score, classifier, num_steps=STEPS, engine="cpu")
    plan = keeping.plan(2, image_shape=(3, 8, 8))
    assert plan.storage == Storage(2, True, STEPS) and plan.engine == "cpu"
    half = plan.peak_bytes - 2 * plan.step.activations
    seen = []
    for budget in ("auto", half, "least"):
        purifier = Purifier(score, classifier, num_steps=STEPS, engine="cpu", memory_budget=budget)
        purifier(x[:, :, :8], seed=0)
        for direction in ("forward", "backward"):
            original = getattr(NetworkProgram, direction)

            def counting(program, *args, original=original, direction=direction, counts=counts, **keywords):
                of_score = len(program.network.shapes[program.network.output]) == 3
                counts[f"{'score' if of_score else 'classifier'} {direction}"] += 1
                return original(program, *args, **keywords)

            monkeypatch.setattr(NetworkProgram, direction, counting)
        counts.update(dict.fromkeys(counts, 0))
        purifier(x.clone().requires_grad_(), seed=0).sum().backward()
        monkeypatch.undo()
        plan = purifier.plan(2)
        kept, planned = plan.storage.kept_steps, plan.evaluations
        seen.append(kept)
        assert counts["score forward"] == planned["score forward"] == 2 * STEPS - kept
        assert counts["score backward"] == planned["score backward"] == STEPS
        # The program of the linear part goes forwards where the plan says forward mode.
        assert counts["classifier forward"] == planned["classifier forward"] + planned["classifier forward-mode"]
        assert counts["classifier backward"] == planned["classifier backward"] + planned["classifier reverse-mode"]
    assert seen[0] == STEPS > seen[1] > seen[2] == 0


@pytest.mark.parametrize("make", [Reading, AsDiffusers])
def test_score_nets_beside_the_engines_own(make):
    """One that PyTorch runs, whose graph is kept as the eager engine keeps it, and one whose attention lies in between."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        score = make().eval()
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    found = []
    for budget in ("least", "auto"):
        purifier = Purifier(score, method="reverse-sde", num_steps=STEPS, engine="cpu", memory_budget=budget)
        leaf = x.clone().requires_grad_()
        purifier(leaf, seed=0).square().sum().backward()
        found.append(leaf.grad)
    assert purifier.plan(3, image_shape=(3, 8, 8)).storage.kept_steps == STEPS
    assert_equal(found[:1], found[1:])
    step, eager = (
        Purifier(score, method="reverse-sde", num_steps=STEPS, engine=engine).plan(3, image_shape=(3, 8, 8)).step
        for engine in ("cpu", "eager")
    )
    if make is Reading:
        assert step == eager
    assert 0 < step.activations < step.forward_keeping


def test_a_classifier_that_pytorch_runs():
    """Its slopes are counted as the eager engine leaves them, the score network's activations as the program does."""
    score, classifier = networks(smooth=False)
    ours = bound("", False).memory(3)

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = classifier

        def forward(self, x):
            return self.inner(x) * (1.0 if float(x.detach().sum()) > -1e9 else 2.0)

    mixed = cpu.prepare(score, Counted(), table(""), torch.zeros(1, 3, 8, 8))
    assert mixed.networks.classifier is None and mixed.networks.score is not None
    found = mixed.memory(3)
    assert found.activations - found.slopes == ours.activations - ours.slopes
    assert found.forward_keeping >= found.activations + mixed.for_batch(3).bytes("kept")
    expected = None
    for storage in (Storage(3), Storage(3, False, 2)):
        _, back = start(mixed, "", 3, True, storage)
        result = back()
        expected = expected or result
        assert_equal(result, expected)


def test_memory_that_larger_steps_took_is_given_back():
    """Steps that keep nothing leave their pages to those that do: the plan has one or the other."""
    engine = bound("", False)
    workspace = engine.networks.workspace
    _, back = start(engine, "", 5, True, Storage(5))
    back()
    poison(workspace)
    kept = [engine.for_batch(5)._plan(kind) for kind in ("score, keeping", "guidance", "hvp")]
    end = max(program.arena_floats for program in kept)
    assert len(workspace.arena) > end + 4096
    moves = workspace.moves
    start(engine, "", 5, True, Storage(5, True, 1))
    assert workspace.moves == moves
    assert not workspace.arena[end + 1024 :].any()  # pages of 4 KiB, zero when they are taken again
