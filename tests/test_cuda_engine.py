"""The CUDA engine without a GPU: its pieces on the CPU, its graphs by a stand-in that records and replays, its limits."""

import contextlib
import gc
import itertools
import sys
import threading
import types
import weakref

import pytest
import torch
from conftest import allows_tf32, bound_of, relu_classifier, silu_classifier, small_score
from graph_backend import Event, Graph, Ordered, OutOfMemory, Pool, StandIn, Stream, Streams
from test_adjoint import gradient, plain_autograd, relative_error, rows, weights
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from coupfast import Purifier, budget, engines, trials
from coupfast.engine import CounterNoise, cuda
from coupfast.engine.cuda import bound as bound_module
from coupfast.engine.cuda import order as order_module
from coupfast.engine.cuda import pieces as pieces_module
from coupfast.engine.cuda import support
from coupfast.engine.cuda.calibration import Choice
from coupfast.engine.cuda.capture import CudaBackend, Runner
from coupfast.engine.cuda.check import check_piece
from coupfast.engine.cuda.networks import CudaNetworks
from coupfast.engine.cuda.pieces import HALVES, Pieces
from coupfast.engine.cuda.program import CudaProgram
from coupfast.engine.eager import EagerProgram
from coupfast.engine.memory import AllocationAccount
from coupfast.guidance import Guidance, pack_bits
from coupfast.integrate import Storage
from coupfast_kernels.convolution.gpu import most_workspace, pack_weight
from coupfast_kernels.noise import standard_normal_ref

EPS = torch.finfo(torch.float32).eps


class OurKernels:
    """Calibration that takes this project's convolutions wherever they can run."""

    chosen: list = []

    def __init__(self, device, *, precision, compiler):
        self.precision = {"3xtf32": "tf32x3", "tf32": "tf32"}.get(precision, "ieee")

    def choose(self, shape):
        OurKernels.chosen.append(shape)
        return Choice(f"triton-{self.precision}", {}, {}, {})


@pytest.fixture
def backends(monkeypatch):
    """Engine "cuda" on the CPU; yields the stand-ins of its programs."""
    made: list[StandIn] = []

    def backend(device):
        made.append(StandIn())
        return made[-1]

    monkeypatch.setattr(bound_module, "unavailable", lambda dtype, device: None)
    monkeypatch.setattr(bound_module, "CudaBackend", backend)
    monkeypatch.setattr(bound_module, "Calibration", OurKernels)
    monkeypatch.setattr(Pieces, "make", remembered_piece)
    monkeypatch.setattr(Pieces, "kept_bytes", remembered_bytes)
    OurKernels.chosen = []
    return made


PIECE, KEPT_BYTES = Pieces.make, Pieces.kept_bytes
PIECES: dict = {}


def remembered_piece(self, name, bucket, piece=PIECE):
    """Tracing takes a second or two, and the networks of these tests are always the same."""
    activation = None if self.guidance is None else type(self.guidance.classifier.activation)
    products = None if self.choose is None else self.choose(bucket, 3, 8, 8, 8)
    options = (products, self.fuse_norms, self.differentiate_guidance, pieces_module.fuse_kernels)
    key = (name, bucket, activation, *options, tuple(self.labels.tolist()))
    if key not in PIECES:
        PIECES[key] = piece(self, name, bucket)
    return PIECES[key]


def remembered_bytes(self, bucket):
    key = (bucket, self.fuse_norms, tuple(self.example.shape))
    if key not in PIECES:
        PIECES[key] = KEPT_BYTES(self, bucket)
    return PIECES[key]


def stored(monkeypatch, slopes, kept_steps):
    """Plans of runs to come: whether slopes are kept, and of how many of the last steps all activations."""
    monkeypatch.setattr(budget, "choose_storage", lambda need, *_: Storage(need.batch, slopes, kept_steps))


@pytest.fixture
def score():
    return small_score(torch.float32)


@pytest.fixture
def classifier():
    return relu_classifier(torch.float32)


@pytest.fixture
def images():
    return torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def purifier(score, classifier, *, engine="cuda", options=None, **kwargs):
    if engine == "cuda":
        kwargs["engine_options"] = {"compile": False} | (options or {})
    return Purifier(score, classifier, engine=engine, **({"num_steps": 4} | kwargs))


def both_ways(run, x, **noise):
    """Purified images and a gradient."""
    leaf = x.clone().requires_grad_()
    purified = run(leaf, **({"seed": 3} | noise))
    (gradient,) = torch.autograd.grad((purified * weights(x)).sum(), leaf)
    return purified.detach(), gradient


def assert_close(found, expected, roundings):
    torch.testing.assert_close(found, expected, rtol=0, atol=roundings * EPS * float(expected.abs().max()))


# A network of some thirty layers, each rounding sums of a few hundred terms in its own order, over four steps.
ROUNDINGS = 500


@pytest.mark.parametrize("make_classifier", [relu_classifier, silu_classifier])
@pytest.mark.parametrize("method", ["coup", "reverse-sde", "diffpure"])
def test_agrees_with_eager(backends, score, images, method, make_classifier):
    classifier = make_classifier(torch.float32)
    found = both_ways(purifier(score, classifier, method=method), images)
    expected = both_ways(purifier(score, classifier, method=method, engine="eager"), images)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, ROUNDINGS)
    assert OurKernels.chosen
    assert backends and all(graph.replays for backend in backends for graph in backend.graphs)


@pytest.mark.parametrize("make_classifier", [relu_classifier, silu_classifier])
def test_float32_error_is_that_of_plain_autograd(backends, images, make_classifier):
    noise_source = Purifier(small_score(), make_classifier(), num_steps=4, engine="eager")
    noise = rows(noise_source, images.double())
    expected = plain_autograd(noise_source, images.double(), noise)
    single = purifier(small_score(torch.float32), make_classifier(torch.float32))
    ours = relative_error(gradient(single, images, noise.float()).double(), expected)
    theirs = relative_error(plain_autograd(single, images, noise.float()).double(), expected)
    assert ours < 4 * theirs
    assert theirs < 1e-4  # no ReLU of these few flips between the precisions: the comparison is of rounding


@pytest.mark.parametrize("options", [{"graphs": False}, {"triton": False}, {"graphs": False, "triton": False}], ids=str)
def test_every_part_can_be_switched_off(backends, score, classifier, images, options):
    found = both_ways(purifier(score, classifier, options=options), images)
    expected = both_ways(purifier(score, classifier, engine="eager"), images)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, ROUNDINGS)
    assert bool(backends) == options.get("graphs", True)
    assert bool(OurKernels.chosen) == options.get("triton", True)


def test_graphs_change_no_bit(backends, score, classifier, images):
    with_graphs = both_ways(purifier(score, classifier), images)
    without = both_ways(purifier(score, classifier, options={"graphs": False}), images)
    for ours, theirs in zip(with_graphs, without, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("solver", ["euler-maruyama", "probability-flow"])
def test_explicit_noise(backends, score, classifier, images, solver):
    rows = torch.randn(4, *images.shape, generator=torch.Generator().manual_seed(0))
    found = both_ways(purifier(score, classifier, solver=solver), images, noise=rows, seed=None)
    expected = both_ways(purifier(score, classifier, solver=solver, engine="eager"), images, noise=rows, seed=None)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, ROUNDINGS)


def test_what_is_kept_changes_no_bit(backends, score, classifier, images):
    kept = both_ways(purifier(score, classifier, memory_budget=2**33), images)
    rebuilt = both_ways(purifier(score, classifier, memory_budget="least"), images)
    for ours, theirs in zip(kept, rebuilt, strict=True):
        assert torch.equal(ours, theirs)


def test_detached_guidance(backends, score, classifier, images):
    found = both_ways(purifier(score, classifier, guidance_gradient="detached"), images)
    expected = both_ways(purifier(score, classifier, guidance_gradient="detached", engine="eager"), images)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, ROUNDINGS)


class TestGraphs:
    def test_one_graph_serves_every_step_seed_and_image(self, backends, score, classifier, images):
        run = purifier(score, classifier)
        with torch.no_grad():
            first = run(images, seed=1, ids=[5, 6, 7, 8, 9])
            (backend,) = backends
            assert len(backend.graphs) == 1
            assert backend.graphs[0].replays == 1 + 4  # the first is compared with what was captured
            eager = purifier(score, classifier, engine="eager")
            assert_close(first, eager(images, seed=1, ids=[5, 6, 7, 8, 9]), ROUNDINGS)
            again = run(images.flip(0), seed=2, ids=[1, 2, 3, 4, 0], draw=7)
            assert_close(again, eager(images.flip(0), seed=2, ids=[1, 2, 3, 4, 0], draw=7), ROUNDINGS)
        assert len(backend.graphs) == 1 and backend.graphs[0].replays == 1 + 8

    def test_the_host_only_launches_between_replays(self, backends, score, classifier, images, monkeypatch):
        """Two launches a step, the graph and the copy of the state that the caller keeps: nothing is loaded in between."""
        run = purifier(score, classifier)
        with torch.no_grad():
            run(images, seed=1)
            loads = []
            load = CudaProgram._load
            monkeypatch.setattr(CudaProgram, "_load", lambda self, k, *rest: (loads.append(k), load(self, k, *rest)))
            run(images, seed=1)
        assert loads == [0]

    @pytest.mark.parametrize("kept, left", [((False, 0), 0), ((True, 0), 1), ((True, 4), 4)], ids=["rebuilt", "slopes", "all"])
    def test_one_graph_forwards_and_one_backwards(self, backends, score, classifier, images, monkeypatch, kept, left):
        """Whether a step's slopes and activations were kept or are found again within the same graph."""
        stored(monkeypatch, *kept)
        both_ways(purifier(score, classifier), images)
        (backend,) = backends
        forward, backward = backend.graphs
        assert (forward.replays, backward.replays) == (1 + 4, 1 + 4)
        guided = torch.ops.coupfast.guided_step_out.default
        assert [graph.operations.count(guided) for graph in (forward, backward)] == [1, 1]
        # The score net has three softmaxes of its own; slopes that are found again come with one more.
        ours, theirs = (graph.operations.count(torch.ops.aten._softmax.default) for graph in (forward, backward))
        assert (ours, theirs) == (4, 4 - left)

    def test_a_changed_state_is_loaded_again(self, backends, score, classifier, images):
        bound = bound_of(purifier(score, classifier), images)
        noise = CounterNoise(1, torch.arange(5), torch.zeros(5, dtype=torch.int64))
        program = bound.for_batch(5)
        x_1, _ = program.step(0, images, noise)
        x_1.mul_(0.5)
        found, _ = program.step(1, x_1, noise)
        expected, _ = bound.networks.eager.step(1, x_1, noise)
        assert_close(found, expected, ROUNDINGS)
        found, _ = program.step(1, x_1, noise)  # the same once more, not the step after it
        assert_close(found, expected, ROUNDINGS)

    def test_after_an_error_everything_is_loaded_again(self, backends, score, classifier, images, monkeypatch):
        bound = bound_of(purifier(score, classifier), images)
        noise = CounterNoise(1, torch.arange(5), torch.zeros(5, dtype=torch.int64))
        program = bound.for_batch(5)
        x_1, _ = program.step(0, images, noise)
        expected, _ = program.step(1, x_1, noise)
        x_1, _ = program.step(0, images, noise)
        with monkeypatch.context() as patch:
            patch.setattr(program.runner, "run", lambda name, function: {}[name])
            with pytest.raises(KeyError):
                program.step(0, images, noise)
        found, _ = program.step(1, x_1, noise)
        assert torch.equal(found, expected)

    def test_a_partial_batch_needs_no_graph_of_its_own(self, backends, score, classifier, images):
        run = purifier(score, classifier)
        with torch.no_grad():
            whole = run(images, seed=1)  # in a bucket of eight
            part = run(images[:4], seed=1)  # has a bucket of its own
            padded = run(images[:3], seed=1)
        assert len(backends) == 2 and [len(backend.graphs) for backend in backends] == [1, 1]
        assert torch.equal(padded, part[:3])
        assert_close(part, whole[:4], ROUNDINGS)

    def test_padding_reaches_no_image(self, backends, score, classifier, images):
        run = purifier(score, classifier)
        with torch.no_grad():
            run(images, seed=1)
            program = bound_of(run, images).for_batch(5)
            expected = run(images, seed=1)
            put = program._put

            def poisoned(buffer, values):
                put(buffer, values)
                buffer[len(values) :].fill_(float("nan"))

            program._put = poisoned
            assert torch.equal(run(images, seed=1), expected)

    def test_one_step_is_warmed_up_where_it_stands(self, backends, score, classifier, images):
        """A warm-up that moved on would leave the table, which on a GPU nothing survives."""
        found = both_ways(purifier(score, classifier, num_steps=1), images)
        expected = both_ways(purifier(score, classifier, num_steps=1, engine="eager"), images)
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs, ROUNDINGS)

    def test_several_purifiers_alive_at_once(self, backends, score, classifier, images):
        runs = [purifier(score, classifier), purifier(score, classifier, t=0.2), purifier(score, None, method="reverse-sde")]
        with torch.no_grad():
            alone = [run(images, seed=1) for run in runs]
            for _ in range(2):
                together = [run(images, seed=1) for run in runs]
                assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))

    def test_threads_take_turns(self, backends, score, classifier, images):
        run = purifier(score, classifier)
        expected = {seed: both_ways(run, images, seed=seed) for seed in (1, 2)}
        wrong = []

        def work(seed):
            for _ in range(3):
                found = both_ways(run, images, seed=seed)
                if not all(torch.equal(a, b) for a, b in zip(found, expected[seed], strict=True)):
                    wrong.append(seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_a_failed_capture_leaves_everything_usable(self, backends, score, classifier, images, monkeypatch):
        expected = purifier(score, classifier, options={"graphs": False})(images, seed=1)
        run = purifier(score, classifier)
        program = bound_of(run, images).for_batch(5)
        program.runner.backend.fail = RuntimeError("no such stream")
        state = [buffer.clone() for buffer in program.runner.state]
        with pytest.raises(RuntimeError, match=r"captured as a graph \(RuntimeError: no such stream\).*'graphs': False"):
            program.runner.run("step with noise", lambda: program._step(True))
        assert all(torch.equal(a, b) for a, b in zip(state, program.runner.state, strict=True))
        with torch.no_grad():
            assert torch.equal(run(images, seed=1), expected)

    @pytest.mark.parametrize("ends", [True, False], ids=["capture ended", "its end raised"])
    def test_a_capture_that_cannot_be_ended_leaves_the_allocator_usable(self, monkeypatch, ends):
        calls = []

        def end(device, pool):
            calls.append(("end", device, pool))
            if ends:
                raise RuntimeError("not currently recording to this pool")

        graphs = []

        class CudaGraph:
            def __init__(self):
                graphs.append(weakref.ref(self))

        @contextlib.contextmanager
        def graph(*args, **options):
            yield
            raise RuntimeError("operation failed due to a previous error during capture")

        for name, stand_in in {
            "graph_pool_handle": lambda: (0, 7),
            "Stream": lambda device: None,
            "CUDAGraph": CudaGraph,
            "device": lambda device: contextlib.nullcontext(),
            "stream": lambda stream: contextlib.nullcontext(),
            "current_stream": lambda: None,
            "graph": graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        workspaces = lambda: calls.append("workspaces freed")  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", workspaces, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
        release = lambda device, pool: calls.append(("release", device, pool))  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)
        backend = CudaBackend(torch.device("cuda:1"))
        with pytest.raises(RuntimeError, match="previous error"):
            backend.capture(lambda: calls.append("captured"))
        # Its own end gives the pool back, if it comes so far. Workspaces are made inside of the graph's memory.
        given_back = [("end", 1, (0, 7))] + ([] if ends else [("release", 1, (0, 7))])
        assert calls == ["workspaces freed", "captured", *given_back, "workspaces freed"]
        gc.collect()
        assert graphs[0]() is not None  # PyTorch may still point to it

    @pytest.mark.parametrize("target", ["coupfast.guided_step_out.default", "aten.copy_.default", "aten.add_.Tensor"])
    def test_a_replay_that_does_something_else_is_not_used(self, backends, score, classifier, images, monkeypatch, target):
        """Here one that leaves an operation out: the state's own, and the one that keeps slopes for the way back."""
        replay = Graph.replay

        def forgetful(self):
            calls = self.calls
            self.calls = [call for call in calls if str(call[0]) != target]
            assert len(self.calls) < len(calls)
            replay(self)
            self.calls = calls

        monkeypatch.setattr(Graph, "replay", forgetful)
        run = purifier(score, classifier)
        state = bound_of(run, images).for_batch(5).runner.state
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"replaying 'step with noise' gives something else"):
            run(images, seed=1)
        assert int(state[3]) == 0  # the step's index stands where it stood

    @pytest.mark.parametrize("size, fits", [(1e-6, True), (1e-2, False)])
    def test_where_bits_do_not_repeat_rounding_is_allowed(self, size, fits, caplog):
        """As with sums in whatever order a device's atomic additions come."""
        x, turns = torch.ones(1000), itertools.count()

        class Elsewhere(StandIn):
            def capture(self, function):
                return types.SimpleNamespace(replay=lambda: x.add_(1.0 + size * next(turns)))

        runner = Runner([x], Elsewhere(), lambda: "")
        if fits:
            runner.run("sum", lambda: x.add_(1.0 + 1e-7 * next(turns)))
            assert "'sum' gives other bits every time on this device" in caplog.text
        else:
            with pytest.raises(RuntimeError, match="gives something else"):
                runner.run("sum", lambda: x.add_(1.0 + 1e-7 * next(turns)))

    def test_a_dropped_purifier_gives_its_memory_back_at_once(self, backends, score, classifier, images):
        """Without waiting for a collection of cycles, which running out of a GPU's memory does not start."""
        # What PyTorch imports at a process's first trace leaves a cycle with the frames that asked for it; a capture on a GPU
        # collects it.
        both_ways(purifier(score, classifier), images)
        backends.clear()
        run = purifier(score, classifier)
        gc.collect()
        gc.disable()
        try:
            both_ways(run, images)
            program = weakref.ref(bound_of(run, images).for_batch(5))
            recording = weakref.ref(backends[0].graphs.pop())
            del run
            backends.clear()
            assert program() is None and recording() is None
        finally:
            gc.enable()

    def test_out_of_memory_says_what_was_needed(self, backends, score, classifier, images):
        run = purifier(score, classifier)
        program = bound_of(run, images).for_batch(5)
        error = RuntimeError("capture_end: invalidated")
        error.__context__ = OutOfMemory("CUDA out of memory")
        program.runner.backend.fail = error
        with torch.no_grad(), pytest.raises(MemoryError, match=r"8 images is predicted to need up to \d+ MiB.*fewer images"):
            run(images, seed=1)

    @pytest.mark.parametrize("num_steps", [1, 2])
    def test_warm_ups_stay_inside_of_the_table(self, backends, score, classifier, images, num_steps):
        """There are more of them than steps. On a GPU, an index outside of a table is no exception, but the end."""
        found = both_ways(purifier(score, classifier, num_steps=num_steps), images)
        expected = both_ways(purifier(score, classifier, num_steps=num_steps, engine="eager"), images)
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs, ROUNDINGS)

    def test_a_wait_for_the_device_cannot_be_captured(self, backends, score, classifier, images):
        """That the stand-in notices, so that its silence elsewhere means something."""
        backend = StandIn()
        value = torch.zeros(())
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            backend.capture(lambda: value.item())

    def test_old_programs_are_let_go(self, backends, score, images, monkeypatch):
        monkeypatch.setattr(bound_module, "KEPT_PROGRAMS", 2)
        run = purifier(score, None, method="reverse-sde")
        with torch.no_grad():
            for batch in (1, 2, 4, 1):
                run(images[:batch], seed=1)
        assert len(backends) == 4  # one image's had to go

    def test_one_that_is_let_go_has_done_its_work(self, backends, score, images, monkeypatch):
        monkeypatch.setattr(bound_module, "KEPT_PROGRAMS", 1)
        run = purifier(score, None, method="reverse-sde", options={"graphs": False})
        waited = []
        with torch.no_grad():
            run(images[:1], seed=0)
            bound = bound_of(run, images)
            bound.for_batch(1)._order._last = types.SimpleNamespace(synchronize=lambda: waited.append(1))
            run(images[:2], seed=0)
        gc.collect()
        assert waited == [1]

    def test_what_all_programs_share_is_let_go_when_work_on_it_is_done(self, score):
        """Plans, too, fold constants, on whichever stream asks, and no program need ever be made."""
        waited = []
        pieces = Pieces(score, None, torch.zeros(1), torch.zeros(1, 3, 8, 8), False)
        pieces.order._last = types.SimpleNamespace(synchronize=lambda: waited.append(1))
        del pieces
        assert waited == [1]


def test_what_streams_share_is_ready_when_they_read_it(backends, score, classifier, images, monkeypatch):
    """Threads with streams of their own: one makes tables, one a program's buffers, one packs weights and folds constants for
    it, one reads them in a program of another size, and one goes on with that."""
    streams = Streams()
    monkeypatch.setattr(order_module, "has_streams", lambda device: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams.current)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Pieces, "make", PIECE)
    noise, x = CounterNoise(1, torch.arange(2), torch.zeros(2, dtype=torch.int64)), images[:2]
    with Ordered(streams):
        bound = bound_of(purifier(score, classifier, options={"graphs": False}), images)
        with streams.on(Stream()):
            small = bound.for_batch(1)
        with streams.on(Stream()):
            small.step(0, x[:1], CounterNoise(1, noise.ids[:1], noise.draw[:1]))
        with streams.on(Stream()):
            large = bound.for_batch(2)
            found = large.step_vjp(0, x, large.step(0, x, noise, "slopes")[1], x)
        with streams.on(Stream()):
            assert torch.equal(large.step_vjp(0, x, None, x), found)


class TestGuidanceBesideTheScoreNetwork:
    """On a second stream of the captured step. The stand-in refuses work that no event puts after what it depends on."""

    @pytest.mark.parametrize(
        ("make_classifier", "kept"),
        [*((relu_classifier, kept) for kept in ((False, 0), (True, 0), (True, 4))), (silu_classifier, (False, 0))],
    )
    def test_changes_no_bit(self, backends, score, images, monkeypatch, make_classifier, kept):
        stored(monkeypatch, *kept)
        x, classifier = images[:3], make_classifier(torch.float32)
        found, expected = (
            both_ways(purifier(score, classifier, options={"beside": beside}), x) for beside in ("auto", False)
        )
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs)
        beside, alone = backends
        assert [len(graph.begun) for graph in beside.graphs] == [2, 2]  # streams, forwards and backwards
        assert [len(graph.begun) for graph in alone.graphs] == [1, 1]

    @pytest.mark.parametrize(
        ("wait", "message"),
        [("fork", "is on a stream that is not being captured"), ("join", "reads what is still being written")],
    )
    def test_a_wait_that_is_left_out_is_seen(self, backends, score, classifier, images, monkeypatch, wait, message):
        run = purifier(score, classifier)
        backend = bound_of(run, images[:3]).for_batch(3).runner.backend
        wait_stream = Stream.wait_stream

        def wait_or_leave_out(stream, other):
            if (stream is backend.second) != (wait == "fork"):
                wait_stream(stream, other)

        monkeypatch.setattr(Stream, "wait_stream", wait_or_leave_out)
        with torch.no_grad(), pytest.raises(RuntimeError, match=f"cannot be captured as a graph .CaptureError: .*{message}"):
            run(images[:3], seed=1)

    def test_work_that_nobody_waits_for_is_seen(self):
        backend, x, y = StandIn(), torch.zeros(3), torch.zeros(3)

        def function():
            backend.second.wait_stream(backend.streams.current)
            with backend.streams.on(backend.second):
                x.add_(1.0)
            y.add_(1.0)

        with pytest.raises(RuntimeError, match="ended while another stream had work that nobody waited for"):
            backend.capture(function)

    def test_memory_that_goes_from_stream_to_stream_is_seen(self, backends, score, classifier, images, monkeypatch):
        monkeypatch.setattr(Pool, "owner", lambda self: None)
        with torch.no_grad(), pytest.raises(RuntimeError, match="CaptureError: .*writes (what|where)"):
            purifier(score, classifier)(images[:3], seed=1)

    @pytest.mark.parametrize(
        ("batch", "options", "beside", "twice"),
        [
            (4, {}, True, 4),
            (5, {}, False, 4),
            (5, {"beside": True}, True, 8),
            (4, {"beside": False}, False, 0),
            (4, {"graphs": False}, False, 0),
        ],
        ids=str,
    )
    def test_by_the_number_of_images(self, backends, score, classifier, images, batch, options, beside, twice):
        """And memory is counted twice as far as this goes: neither stream gets what the other one let go."""
        bound = bound_of(purifier(score, classifier, options=options), images)
        assert (bound.for_batch(batch)._beside is not None) == beside
        one, planned, images_in_all = bound.networks.eager.memory(1), bound.memory(batch), bound_module.bucket_of(batch) + twice
        workspaces = (2 if twice else 1) * bound.networks.workspace
        assert planned.forward == images_in_all * one.forward + workspaces
        assert planned.transpose == images_in_all * one.transpose + workspaces
        assert bound.memory(1).forward < planned.forward and bound.memory(1).transpose < planned.transpose

    def test_without_guidance_there_is_one_stream(self, backends, score, images):
        bound = bound_of(purifier(score, None, method="reverse-sde"), images)
        assert bound.for_batch(1)._beside is None


@pytest.mark.parametrize(
    "candidate, ours, copied", [("library", 0, 0), ("library-contiguous", 0, 1), ("compiled", 0, 0), ("triton-ieee", 1, 0)]
)
def test_convolutions_are_those_that_calibration_chose(backends, score, images, monkeypatch, candidate, ours, copied):
    monkeypatch.setattr(OurKernels, "choose", lambda self, shape: Choice(candidate, {}, {}, {}))
    monkeypatch.setattr(Pieces, "make", PIECE)
    run = purifier(score, None, method="reverse-sde")
    pieces = bound_of(run, images).networks.pieces
    found = {node.target for node in pieces.make("score", 1).operations()}
    assert (torch.ops.coupfast.conv3x3.default in found) == ours
    assert bool([name for *_, name, _ in pieces.packed if name == "contiguous"]) == copied


def test_norms_are_applied_where_calibration_chose_so(backends, score, images, monkeypatch):
    asked = []

    def choose(self, shape):
        asked.append(shape)
        return Choice("inside" if shape.groups == 4 else "apart" if shape.groups else "triton-winograd", {}, {}, {})

    monkeypatch.setattr(OurKernels, "choose", choose)
    monkeypatch.setattr(Pieces, "make", PIECE)
    run = purifier(score, None, method="reverse-sde")
    found = [node.target for node in bound_of(run, images).networks.pieces.make("score", 1).operations()]
    inside = [shape for shape in asked if shape.groups == 4]
    assert inside and found.count(torch.ops.coupfast.conv3x3_normed.default) == len(inside)


def test_the_plan_counts_what_convolutions_take_beside_their_results(backends, score, images):
    with_ours, without = (
        bound_of(purifier(score, None, method="reverse-sde", options={"triton": triton}), images).memory(4)
        for triton in (True, False)
    )
    workspace = most_workspace(images.device)
    assert workspace > 0
    assert with_ours.forward - without.forward == with_ours.transpose - without.transpose == workspace
    assert with_ours.slopes == without.slopes


@pytest.mark.parametrize("name", ["score", "score vjp", "cotangent"])
def test_a_check_takes_the_memory_of_a_step(score, classifier, images, name):
    """Of what is compared with: a graph of activations that nobody goes back through would be many times as much."""
    table = purifier(score, classifier, engine="eager").recipe.table
    eager = EagerProgram(score.requires_grad_(False), Guidance(classifier.requires_grad_(False), images), table, images, True)
    planned, bucket = eager.memory(8), 8
    found = torch.zeros(bucket, *images.shape[1:])
    _, slopes = eager.guidance.graph.evaluate(found, keep_slopes=True)
    sides = [slope.side() for slope in slopes]
    networks = [*score.parameters(), *classifier.parameters(), eager.labels]
    with AllocationAccount([*networks, found, *sides]) as account, torch.no_grad():
        with pytest.raises(RuntimeError, match="differs from PyTorch's"):
            check_piece(name, lambda *inputs: (found,), eager, bucket, sides, tf32=False)
    # Its two states, each in two formats, and what they are made of; then the comparison in float64.
    assert account.peak <= (planned.transpose if name == "score vjp" else planned.forward) + 10 * found.nbytes


class TestActivations:
    @pytest.mark.parametrize("make_classifier", [relu_classifier, silu_classifier, None])
    def test_kept_in_the_last_steps_they_change_no_bit(self, backends, score, images, monkeypatch, make_classifier):
        """Operation by operation; a compiler may round another way where a piece ends elsewhere."""
        classifier = None if make_classifier is None else make_classifier(torch.float32)
        method, results = "reverse-sde" if classifier is None else "coup", []
        for slopes, kept_steps in ((False, 0), (True, 2), (False, 4)):
            stored(monkeypatch, slopes, kept_steps)
            results.append(both_ways(purifier(score, classifier, method=method), images))
        for found in results[1:]:
            for ours, theirs in zip(found, results[0], strict=True):
                assert torch.equal(ours, theirs)
        assert [len(backend.graphs) for backend in backends] == [2, 4, 2]

    def test_nothing_is_computed_again(self, backends, score, classifier, images, monkeypatch):
        stored(monkeypatch, True, 4)
        both_ways(purifier(score, classifier), images)
        (forward, backward), ours = backends[0].graphs, torch.ops.coupfast
        assert backward.operations.count(ours.group_norm_silu.default) == 0
        norms = forward.operations.count(ours.group_norm_silu.default)
        assert norms == backward.operations.count(ours.group_norm_silu_vjp.default) > 0
        # Of the score network's, one each way; the classifier's two go forwards, backwards, and both for the Hessian.
        convolutions = [graph.operations.count(ours.conv3x3.default) for graph in (forward, backward)]
        assert convolutions[0] == convolutions[1]

    @pytest.mark.parametrize("make_classifier", [relu_classifier, None])
    def test_the_plan_knows_what_they_take(self, backends, score, images, make_classifier):
        classifier = None if make_classifier is None else make_classifier(torch.float32)
        run = purifier(score, classifier, method="reverse-sde" if classifier is None else "coup")
        bound = bound_of(run, images)
        noise = CounterNoise(1, torch.arange(5), torch.zeros(5, dtype=torch.int64))
        program, planned = bound.for_batch(5), bound.memory(5)
        _, kept = program.step(0, images, noise, "activations")
        size = sum({tensor.data_ptr(): tensor.nbytes for tensor in kept.activations}.values())
        assert size == sum(tensor.nbytes for tensor in kept.activations)
        assert planned.activations - planned.slopes == size
        # As many again where all steps leave them, and where the way back finds them.
        assert planned.forward_keeping == planned.forward + size + planned.activations
        assert planned.transpose_kept >= size
        # A norm's and an attention's inputs, where autograd keeps their results, too.
        eager = bound.networks.eager.memory(8)
        assert size < (eager.activations - eager.slopes) / 2

    def test_without_graphs_nothing_is_copied(self, backends, score, classifier, images, monkeypatch):
        """Nor does a program hold what the next step makes anew: then three steps' would be there, and the plan has two's."""
        stored(monkeypatch, True, 4)
        alone, captured = (purifier(score, classifier, options={"graphs": graphs}) for graphs in (False, True))
        for ours, theirs in zip(both_ways(alone, images), both_ways(captured, images), strict=True):
            assert torch.equal(ours, theirs)
        program = bound_of(alone, images).for_batch(5)
        noise = CounterNoise(1, torch.arange(5), torch.zeros(5, dtype=torch.int64))
        x, kept = program.step(0, images, noise, "activations")
        assert kept.activations and not program._left
        program.step_vjp(0, images, kept, x)
        assert program._found is kept.activations

    def test_as_many_steps_as_fit(self, backends, score, classifier, images):
        seen = []
        for memory in ("least", None, 2**33):
            run = purifier(score, classifier, memory_budget=memory or plan.peak_bytes + 2 * plan.step.activations)  # noqa: F821
            plan = run.plan(5, image_shape=(3, 8, 8))
            seen.append(plan.storage.kept_steps)
            assert plan.evaluations["score forward"] == 8 - seen[-1]
        assert seen[0] == 0 < seen[1] <= seen[2] == 4

    def test_found_by_another_program(self, backends, score, classifier, images):
        """One that was made anew in between has none of its own."""
        bound = bound_of(purifier(score, classifier), images)
        noise = CounterNoise(1, torch.arange(5), torch.zeros(5, dtype=torch.int64))
        first, second = CudaProgram(bound.networks, 8), CudaProgram(bound.networks, 8)
        _, kept = first.step(0, images, noise, "activations")
        assert torch.equal(second.step_vjp(0, images, kept, images), first.step_vjp(0, images, kept, images))
        assert torch.equal(first.step_vjp(0, images, None, images), second.step_vjp(0, images, None, images))

    def test_an_interrupted_step_can_be_run_again(self, backends, score, classifier, images, monkeypatch):
        bound = bound_of(purifier(score, classifier), images)
        noise = CounterNoise(1, torch.arange(5), torch.zeros(5, dtype=torch.int64))
        program = bound.for_batch(5)
        _, before = program.step(0, images, noise, "activations")

        def interrupted(self):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(Graph, "replay", interrupted)
            with pytest.raises(KeyboardInterrupt):
                program.step(0, images, noise, "activations")
        _, after = program.step(0, images, noise, "activations")
        assert len(after.activations) == len(before.activations) > 0
        assert all(map(torch.equal, after.activations, before.activations))

    def test_a_replay_that_leaves_others_is_not_used(self, backends, score, classifier, images, monkeypatch):
        stored(monkeypatch, True, 4)
        replay = Graph.replay

        def careless(self):
            replay(self)
            program._left["step with noise, keeping activations"][3].mul_(1.001)

        monkeypatch.setattr(Graph, "replay", careless)
        run = purifier(score, classifier)
        program = bound_of(run, images).for_batch(5)
        with pytest.raises(RuntimeError, match="replaying 'step with noise, keeping activations' gives something else"):
            both_ways(run, images)
        assert not program._left


class TestPrecision:
    def test_no_tf32_on_the_strict_path(self, backends, score, classifier, images):
        """Flags when graphs are captured, and the arguments of every convolution of ours."""
        torch.set_float32_matmul_precision("medium")
        try:
            run = purifier(score, classifier)
            flags = []
            program = bound_of(run, images).for_batch(5)
            program.runner.backend.while_capturing = lambda: flags.append(allows_tf32())
            both_ways(run, images)
            assert flags and not any(flags)
            for name in program.networks.pieces.names():
                for node in program.networks.pieces.make(name, 2).operations():
                    if node.target is torch.ops.coupfast.conv3x3.default:
                        assert node.args[-1] == "ieee"
        finally:
            torch.set_float32_matmul_precision("highest")

    @pytest.mark.parametrize(("precision", "inside", "flag"), [("3xtf32", "tf32x3", False), ("tf32", "tf32", True)])
    def test_named_precisions(self, backends, score, classifier, images, precision, inside, flag):
        run = purifier(score, classifier, precision=precision)
        program = bound_of(run, images).for_batch(5)
        before, flags = allows_tf32(), []
        program.runner.backend.while_capturing = lambda: flags.append(allows_tf32())
        with torch.no_grad():
            run(images, seed=1)
        assert flags == [flag]
        operations = program.networks.pieces.make("score", 2).operations()
        assert {node.args[-1] for node in operations if node.target is torch.ops.coupfast.conv3x3.default} == {inside}
        assert allows_tf32() == before

    @pytest.mark.parametrize("graphs", [True, False])
    def test_a_piece_that_is_wrong_is_not_used(self, backends, score, classifier, images, monkeypatch, graphs):
        fuse = pieces_module.fuse_kernels

        def wrong(graph, *args, **kwargs):
            fuse(graph, *args, **kwargs)
            node = next(node for node in graph.operations() if node.target is torch.ops.coupfast.conv3x3.default)
            node.args = (*node.args[:-2], 1.01, node.args[-1])
            graph.module.recompile()

        monkeypatch.setattr(pieces_module, "fuse_kernels", wrong)
        with torch.no_grad(), pytest.raises(RuntimeError, match="^the cuda engine's 'score' differs from PyTorch's.*doctor"):
            purifier(score, classifier, options={"graphs": graphs})(images, seed=1)

    def test_slopes_that_are_wrong_are_not_used(self, backends, score, classifier, images, monkeypatch):
        def compiled(module, inputs):
            def run(*inputs):
                results = module(*inputs)
                masks = [result.clone() if result.dtype == torch.bool else result for result in results]
                if masks[-1].dtype == torch.bool:
                    masks[-1][0, 0] = ~masks[-1][0, 0]  # one channel of one image
                return tuple(masks)

            return run

        monkeypatch.setattr(bound_module, "Inductor", lambda device, **_: compiled)
        with torch.no_grad(), pytest.raises(RuntimeError, match="'slopes' differs from PyTorch's on this device"):
            purifier(score, classifier, options={"compile": True, "graphs": False})(images, seed=1)


class TestRefuses:
    def test_a_cpu_tensor(self, score, classifier, images):
        with pytest.raises(ValueError, match="runs float32 on a GPU, not torch.float32 on cpu; engine='eager' does"):
            purifier(score, classifier)(images)

    @pytest.mark.parametrize(
        ("setup", "message"),
        [
            (dict(cuda=None), "built without CUDA"),
            (dict(capability=(7, 5)), "Tesla T4 has compute capability 7.5.*8.0 and later"),
            (dict(driver=(11, 8)), "driver serves CUDA 11.8, and this PyTorch is built with 12.8: update the driver"),
            (dict(triton=None), "needs Triton .*triton.*; PyTorch's builds for CUDA"),
            (dict(triton="3.1.0"), "needs Triton 3.5 or later, found 3.1.0"),
            (dict(launch="fails"), "cannot be built or launched here .RuntimeError: Failed to find C compiler"),
            (dict(launch="is wrong"), "gives wrong numbers"),
            (dict(), None),
        ],
        ids=str,
    )
    def test_what_is_too_old_or_does_not_run(self, monkeypatch, setup, message):
        setup = {"cuda": "12.8", "driver": (12, 2), "capability": (9, 0), "triton": "3.8.1+git", "launch": "works"} | setup

        def launched(shape, *, seed, ids, draw, step):
            if setup["launch"] == "fails":
                raise RuntimeError("Failed to find C compiler")
            z = standard_normal_ref(shape, seed=int(seed), ids=ids, draw=draw, step=int(step))
            return z if setup["launch"] == "works" else z + 1

        # One launch a process and device; here on the CPU.
        support._kernels_unavailable.cache_clear()
        monkeypatch.setattr(support, "standard_normal", launched)
        monkeypatch.setattr(support, "launch_device", lambda index: torch.device("cpu"))
        monkeypatch.setattr(torch.version, "cuda", setup["cuda"])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: setup["capability"])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")

        monkeypatch.setattr(support, "driver_cuda", lambda: setup["driver"])
        triton = None if setup["triton"] is None else types.SimpleNamespace(__version__=setup["triton"])
        monkeypatch.setitem(sys.modules, "triton", triton)
        found = cuda.unavailable(torch.float32, torch.device("cuda"))
        if message is None:
            assert found is None
        else:
            with pytest.raises(RuntimeError, match=message):
                raise RuntimeError(found)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"graph": False}, "are compile, graphs, triton, beside; got 'graph'"),
            ({"graphs": 1}, r"is True or False, got 1"),
            ({"compile": "sometimes"}, r"is True, False or 'auto', got 'sometimes'"),
            ({"beside": 4}, r"is True, False or 'auto', got 4"),
            ({"beside": True, "graphs": False}, "is about captured steps: it needs 'graphs', which is False"),
        ],
    )
    def test_options_that_do_not_exist(self, score, classifier, options, message):
        with pytest.raises(ValueError, match=message):
            Purifier(score, classifier, engine_options=options)

    def test_precisions_and_options_of_other_engines(self, score, classifier, images):
        with pytest.raises(ValueError, match="'3xtf32' is for the cuda engine; this purifier runs on 'eager'"):
            Purifier(score, classifier, engine="eager", precision="3xtf32")(images)
        with pytest.raises(ValueError, match="engine_options=.* is for the cuda engine"):
            Purifier(score, classifier, engine="eager", engine_options={"graphs": False})(images)

    def test_3xtf32_without_the_kernels_that_have_it(self, backends, score, classifier, images):
        with pytest.raises(ValueError, match="precision='3xtf32' is a precision of this project's convolutions"):
            purifier(score, classifier, precision="3xtf32", options={"triton": False})(images)

    def test_more_images_than_the_largest_bucket(self, backends, score, images, monkeypatch):
        monkeypatch.setattr(bound_module, "BUCKETS", (1, 2))
        run = purifier(score, None, method="reverse-sde")
        bound = bound_of(run, images)
        with pytest.raises(ValueError, match="up to 2 images at a time, got 5"):
            bound.for_batch(5)

    @pytest.mark.parametrize("batch, bucket", [(3, 4), (17, 24), (33, 48), (65, 96), (97, 128)])
    def test_buckets_waste_a_third_at_most_where_images_cost_time(self, batch, bucket):
        assert bound_module.bucket_of(batch) == bucket

    def test_states_of_another_kind(self, backends, score, images):
        program = bound_of(purifier(score, None, method="reverse-sde"), images).for_batch(1)
        noise = CounterNoise(1, torch.arange(1), torch.zeros(1, dtype=torch.int64))
        with pytest.raises(ValueError, match="runs torch.float32 states of shape"):
            program.step(0, images[:1].double(), noise)
        with pytest.raises(ValueError, match=r"states of shape \(3, 8, 8\) on cpu, got .* meta"):
            program.step(0, images[:1].to("meta"), noise)
        with pytest.raises(ValueError, match="up to 1 images, got 2"):
            program.step(0, images[:2], noise)

    def test_tensors_on_two_gpus(self, backends, score, classifier, images, monkeypatch):
        places = iter([torch.device("cpu"), torch.device("cuda:1")])
        monkeypatch.setattr(trials, "dtype_and_device", lambda network: (torch.float32, next(places)))
        with pytest.raises(ValueError, match=r"images are on cpu, the classifier is on cuda:1; move one of them"):
            purifier(score, classifier)(images)


def test_large_batches_go_in_pieces(backends, score, images, monkeypatch):
    monkeypatch.setattr(bound_module, "BUCKETS", (1, 2))
    monkeypatch.setattr(cuda.BoundCudaEngine, "largest_batch", 2)
    run = purifier(score, None, method="reverse-sde")
    found = both_ways(run, images)
    expected = both_ways(purifier(score, None, method="reverse-sde", engine="eager"), images)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, ROUNDINGS)


def test_keeps_slopes_as_bits(backends, score, classifier, images):
    bound = bound_of(purifier(score, classifier), images)
    program = bound.for_batch(5)
    noise = CounterNoise(1, torch.arange(5), torch.zeros(5, dtype=torch.int64))
    _, kept = program.step(0, images, noise, "slopes")
    masks = [slope for slope in program._slopes if slope.dtype == torch.bool]
    assert torch.equal(kept.bits, pack_bits(torch.cat([mask.reshape(-1) for mask in masks])))
    before = [slope.clone() for slope in program._slopes]
    for slope in program._slopes:
        slope.zero_()
    program._restore(kept)
    assert all(torch.equal(a, b) for a, b in zip(before, program._slopes, strict=True))
    _, kept = program.step(0, images, noise, "nothing")
    assert kept is None


class Flattening(torch.nn.Module):
    """As VGG ends: maps of several pixels in a row, in the order of contiguous memory; and with a tensor of its own making."""

    def __init__(self, activation):
        super().__init__()
        self.activation = activation
        self.conv, self.linear = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Linear(4 * 16, 10)

    def forward(self, x):
        h = torch.nn.functional.max_pool2d(self.activation(self.conv(x)), 2)
        h = h * torch.tensor([0.5, 1.0, 1.5, 2.0]).view(1, 4, 1, 1)
        return self.linear(h.view(len(h), -1))


class Attending(Flattening):
    """Smooth, with attention over the pixels, which PyTorch has fused operations for."""

    def forward(self, x):
        tokens = self.activation(self.conv(x)).view(len(x), 4, -1).transpose(1, 2)
        tokens = torch.nn.functional.scaled_dot_product_attention(tokens, 0.5 * tokens, tokens)
        return self.linear(tokens.transpose(1, 2).reshape(len(x), 64, -1).mean(2))


@pytest.fixture(params=[(Flattening, torch.nn.ReLU), (Flattening, torch.nn.SiLU), (Attending, torch.nn.GELU)], ids=str)
def awkward(request, monkeypatch):
    """A classifier that other formats of memory, tensors of nowhere and fused operations are awkward for."""
    monkeypatch.setattr(Pieces, "make", PIECE)
    network, activation = request.param
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return network(activation()).eval()


@pytest.fixture
def flattening(monkeypatch):
    monkeypatch.setattr(Pieces, "make", PIECE)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return Flattening(torch.nn.ReLU()).eval()


def test_awkward_classifiers(backends, score, awkward, images):
    found = both_ways(purifier(score, awkward), images)
    expected = both_ways(purifier(score, awkward, engine="eager"), images)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, ROUNDINGS)


@pytest.mark.parametrize("network", ["score net", "classifier"])
def test_what_cannot_be_a_graph_is_named(backends, score, classifier, images, monkeypatch, network):
    class Deciding(torch.nn.Module):
        def __init__(self, inner, activation=None):
            super().__init__()
            self.inner, self.activation = inner, activation

        def forward(self, *inputs):
            out = self.inner(*inputs)
            return out if float(out.detach().mean()) > 1e9 else 2.0 * out

    monkeypatch.setattr(Pieces, "make", PIECE)
    networks = {"score net": score, "classifier": classifier}
    networks[network] = Deciding(networks[network], torch.nn.ReLU()).eval()
    with torch.no_grad(), pytest.raises(ValueError, match=f"the {network} cannot be made a graph .* engine='eager'"):
        purifier(*networks.values())(images, seed=1)


@pytest.mark.parametrize("kept_steps", [0, 4])
def test_every_piece_is_compiled_for_what_it_is_called_with(backends, score, flattening, images, monkeypatch, kept_steps):
    """Formats of its check and of its use: what is compiled serves no others. Activations that are kept come from one piece
    and go into another."""
    stored(monkeypatch, True, kept_steps)
    strides = {}

    def formats(inputs):
        return tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in inputs)

    def compiled(module, inputs):
        strides[module] = {formats(inputs)}

        def run(*inputs):
            strides[module].add(formats(inputs))
            return module(*inputs)

        return run

    monkeypatch.setattr(bound_module, "Inductor", lambda device, **_: compiled)
    both_ways(purifier(score, flattening, options={"compile": True}), images)
    assert len(strides) == 5 and all(len(seen) == 1 for seen in strides.values())


@pytest.mark.parametrize("make_classifier", [relu_classifier, silu_classifier])
def test_making_a_piece_computes_nothing_on_its_bucket(score, make_classifier):
    """It would take the memory of all activations at once, which nobody counts on."""

    class Convolutions(TorchDispatchMode):
        batches: list = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution.default and not isinstance(args[0], FakeTensor):
                self.batches.append(len(args[0]))
            return func(*args, **(kwargs or {}))

    classifier = make_classifier(torch.float32).requires_grad_(False)
    example = torch.zeros(1, 3, 8, 8)
    table = purifier(score, classifier, engine="eager").recipe.table
    networks = CudaNetworks(score.requires_grad_(False), Guidance(classifier, example), table, example, True)
    with Convolutions():
        for name in [*networks.pieces.names(), *HALVES]:
            networks.pieces.make(name, 64)
    assert set(Convolutions.batches) <= {1, 2, 3}  # traces


def test_attention_in_a_score_net_is_plain_operations(backends, classifier, images, monkeypatch):
    """Fused ones have no transpose that a trace without a gradient could be of, and are not IEEE float32 everywhere."""

    class Attending(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_score(torch.float32)

        def forward(self, x, labels):
            h = self.inner(x, labels)
            tokens = h.flatten(2).transpose(1, 2).contiguous()
            tokens = torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
            return h + tokens.transpose(1, 2).reshape(h.shape)

    monkeypatch.setattr(Pieces, "make", PIECE)
    score = Attending().eval()
    run = purifier(score, classifier)
    found, expected = both_ways(run, images), both_ways(purifier(score, classifier, engine="eager"), images)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, ROUNDINGS)
    bound = bound_of(run, images)
    pieces = [bound.networks.pieces.make(name, 8) for name in ("score", "score vjp")]
    names = [str(node.target) for piece in pieces for node in piece.operations()]
    assert names and not [name for name in names if "scaled_dot_product" in name]


def test_graphs_share_their_weights(backends, score, classifier, images, monkeypatch):
    """Pieces and buckets have the same copies, which stay when a bucket's graphs are let go: a weight's address names it."""
    monkeypatch.setattr(bound_module, "KEPT_PROGRAMS", 1)
    monkeypatch.setattr(Pieces, "make", PIECE)
    run = purifier(score, classifier, options={"graphs": False})
    both_ways(run, images[:2])
    bound = bound_of(run, images)
    before, pairs = bound.weights_bytes(1, gradient=True), len(bound.networks.pieces.packed)
    weights = sum(p.nbytes for network in (score, classifier) for p in network.parameters() if p.dim() == 4)
    # All but the few that are not 3 x 3: once in channels last, twice packed (as they are, and for the transpose).
    assert 2 * weights < before < 4 * weights
    found = both_ways(run, images[:4])
    assert bound.weights_bytes(1, gradient=True) == before and len(bound.networks.pieces.packed) == pairs
    for ours, theirs in zip(found, both_ways(purifier(score, classifier, engine="eager"), images[:4]), strict=True):
        assert_close(ours, theirs, ROUNDINGS)
    for weight, packed in bound.networks.pieces.packed.values():
        forward, transposed = pack_weight(weight), pack_weight(weight.flip(2, 3).transpose(0, 1))
        assert any(packed.shape == right.shape and torch.equal(packed, right) for right in (forward, transposed))


def test_auto_takes_it_on_a_gpu(score, monkeypatch):
    """Nothing runs: only the choice."""
    monkeypatch.setattr(engines, "dtype_and_device", lambda network: (torch.float32, torch.device("cuda")))
    monkeypatch.setattr(cuda, "unavailable", lambda dtype, device: None)
    assert engines.fastest_engine(score) == ("cuda", None)
    monkeypatch.setattr(cuda, "unavailable", lambda dtype, device: "no Triton")
    assert engines.fastest_engine(score) == ("eager", "no Triton")
    monkeypatch.setattr(engines, "dtype_and_device", lambda network: (torch.float64, torch.device("cuda")))
    reason = "the others run float32 on cpu or cuda, not torch.float64 on cuda"
    assert engines.fastest_engine(score.double()) == ("eager", reason)
