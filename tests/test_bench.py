"""The benchmarks run, say what they promise to say, and print no time for an engine that computes something else."""

import copy
import gc
import json
import pathlib
import sys
import types

import pytest
import torch

from coupfast.engines import ENGINES
from coupfast.reference import purify_published, purify_ref
from coupfast_kernels import native

BENCH = str(pathlib.Path(__file__).resolve().parent.parent / "bench")
ULP = torch.finfo(torch.float32).eps

GPU_FIELDS = ("host_seconds_per_image", "kernels_per_step", "launches_per_step", "share_of_matmul")
SPEED_FIELDS = {
    *("method", "engine", "precision", "network", "t", "num_steps", "steps_timed", "scaled", "batch", "seconds_per_image"),
    *("spread", "ratio_to_reference", "ratio_to_eager", "parity_max_abs", "error_float64", "device", "torch", "threads"),
    *GPU_FIELDS,
}
GRADIENT_FIELDS = {
    *("mode", "engine", "network", "t", "num_steps", "steps_timed", "scaled", "batch", "seconds_per_image", "peak_bytes"),
    *("rel_error", "cosine", "sign_agreement", "ratio_to_published", "ratio_to_frozen", "ratio_to_eager"),
    *GPU_FIELDS,
}
LAYER_TIMES = ("seconds", "seconds_median", "spread", "gflops", "share_of_sgemm", "ratio_to_eager", "ratio_to_channels_last")
PEER_TIMES = ("seconds_per_image", "seconds_per_image_best", "spread", "ratio_to_eager", "ratio_to_engine")
SMALL = ["--network", "tiny", "--images", "random", "--repeats", "1"]


@pytest.fixture(autouse=True)
def _as_a_script_sees_it(monkeypatch):
    """`python bench/speed.py` has bench/ as its first place to import from."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(BENCH)
    yield
    for name in ("speed", "gradient", "peers", "layers", "cases", "timing", "attack_gradients", "adjoint_error", "kept"):
        sys.modules.pop(name, None)
    torch.set_num_threads(threads)


@pytest.fixture
def run(tmp_path, capsys):
    """Run a benchmark's command line: (exit code, rows by name, environment, what it printed)."""

    def run(script, *arguments):
        module = __import__(script)
        file = tmp_path / "results.json"
        code = module.main([*SMALL, "--json", str(file), *map(str, arguments)])
        document = json.loads(file.read_text())
        names = {
            "speed": ("method", "engine"),
            "gradient": ("mode", "engine"),
            "layers": ("network", "direction", "layer", "algorithm"),
            "peers": ("runtime", "batch"),
        }[script]
        rows = {tuple(row.get(name) for name in names): row for row in document["rows"]}
        assert len(rows) == len(document["rows"])
        return code, rows, document["environment"], capsys.readouterr().out

    return run


def off_by(error):
    """An engine like eager whose steps are wrong by `error`."""

    def prepare(*args, **kwargs):
        bound = ENGINES["eager"](*args, **kwargs)
        step, step_vjp = bound.step, bound.step_vjp

        def wrong_step(k, x_k, noise, keep="nothing", *, more=None):
            x_next, saved = step(k, x_k, noise, keep, more=more)
            return x_next + error, saved

        bound.step = wrong_step
        bound.step_vjp = lambda k, x_k, saved, v, *, more=None: step_vjp(k, x_k, saved, v, more=more) * (1 + error)
        return bound

    return prepare


def on_cpu():
    return [engine for engine in ENGINES if engine != "cuda"]


class TestSpeed:
    def test_every_row_says_what_it_is(self, run):
        code, rows, environment, printed = run("speed", "--t", 0, 0.1, "--steps-timed", 2, "--methods", "coup", "diffpure")
        assert code == 0
        assert set(rows) == {
            ("classifier alone", "eager"),
            *((method, engine) for method in ("coup", "diffpure") for engine in ("reference", *on_cpu())),
        }
        for row in rows.values():
            assert set(row) >= SPEED_FIELDS
            assert row["seconds_per_image"] > 0
        for (method, engine), row in rows.items():
            if method != "classifier alone":
                assert (row["num_steps"], row["steps_timed"], row["scaled"]) == (100, 2, True)
                # Two steps round a state of order one a few times each: increments, times and labels are the same.
                assert row["parity_max_abs"] < 16 * ULP, (method, engine)
                assert row["error_float64"] <= 4 * row["error_float64_eager"] or engine == "reference"
            # Never guessed where there is no GPU.
            assert [row[key] for key in GPU_FIELDS[:3]] == [None] * 3
            assert row["share_of_matmul"] > 0
        assert environment["matmul_flop_per_second"] > 0
        assert "scaled from 2 of 100 steps" in printed
        assert environment["commit"] is None or len(environment["commit"]) == 40
        text = json.dumps(environment)
        assert str(pathlib.Path.home()) not in text
        assert BENCH not in text

    def test_ratios_are_of_the_times_stated(self, run):
        _, rows, _, _ = run("speed", "--steps-timed", 1, "--methods", "reverse-sde", "--engines", "reference", "eager")
        reference, eager = rows["reverse-sde", "reference"], rows["reverse-sde", "eager"]
        # The same work in another time, but for one evaluation more that the reference takes.
        assert eager["share_of_matmul"] / reference["share_of_matmul"] == pytest.approx(
            reference["seconds_per_image"] / eager["seconds_per_image"]
        )
        stated = reference["seconds_per_image"] / eager["seconds_per_image"]  # one repeat: its ratio is the median
        assert eager["ratio_to_reference"] == pytest.approx(stated)
        assert reference["ratio_to_eager"] == pytest.approx(1 / stated)

    def test_all_steps_are_not_scaled(self, run):
        _, rows, _, printed = run("speed", "--t", 0.002, "--methods", "reverse-sde", "--engines", "eager")
        (row,) = rows.values()
        assert (row["num_steps"], row["steps_timed"], row["scaled"]) == (2, 2, False)
        assert row["ratio_to_reference"] is None
        assert "scaled" not in printed

    @pytest.mark.parametrize("error", [1e-4, float("nan")])
    def test_a_wrong_engine_gets_no_time(self, run, monkeypatch, error):
        monkeypatch.setitem(ENGINES, "wrong", off_by(error))
        code, rows, _, printed = run("speed", "--steps-timed", 1, "--methods", "reverse-sde", "--engines", "eager", "wrong")
        assert code == 1
        wrong, eager = rows["reverse-sde", "wrong"], rows["reverse-sde", "eager"]
        assert not wrong["within_contract"]
        assert [wrong[key] for key in ("seconds_per_image", "spread", "ratio_to_eager", "ratio_to_reference")] == [None] * 4
        assert eager["seconds_per_image"] > 0
        (line,) = [line for line in printed.splitlines() if "wrong" in line]
        assert "no times" in line
        assert "s/image" not in line

    def test_an_engine_that_cannot_run_is_named_and_left_out(self, run, monkeypatch):
        def absent(*args, **kwargs):
            raise RuntimeError("no such accelerator")

        monkeypatch.setitem(ENGINES, "absent", absent)
        code, rows, environment, _ = run("speed", "--t", 0.001, "--methods", "reverse-sde")
        assert code == 0
        assert ("reverse-sde", "absent") not in rows
        found = {row["engine"]: row["reason"] for row in environment["engines_that_do_not_run_here"]}
        assert set(found) == {"absent", "cuda"}
        assert found["absent"] == "RuntimeError: no such accelerator"


class TestGradient:
    def test_every_row_says_what_it_is(self, run):
        code, rows, _, printed = run("gradient", "--steps-timed", 2, "--markdown")
        assert code == 0
        assert len([line for line in printed.splitlines() if line.startswith("| ")]) == 1 + len(rows)
        assert all((row["share_of_matmul"] is None) == (mode not in ("exact", "detached")) for (mode, _), row in rows.items())
        modes = __import__("gradient").MODES
        assert {mode for mode, _ in rows} == set(modes)
        for row in rows.values():
            assert set(row) >= GRADIENT_FIELDS
            assert row["seconds_per_image"] > 0
            assert row["peak_bytes"] > 0
            assert row["scaled"]
        exact, published = rows["exact", "eager"], rows["published", "torchsde"]
        assert exact["rel_error"] < 1e-5 < published["rel_error"]
        assert exact["cosine"] > 1 - 1e-9
        assert rows["detached", "eager"]["rounding"] < 1e-5 < rows["detached", "eager"]["rel_error"]
        # All steps in memory at once against one at a time.
        assert rows["back-propagation", "torchsde"]["peak_bytes"] > 10 * exact["peak_bytes"]
        assert published["ratio_to_published"] == 1.0

    def test_memory_budgets_side_by_side(self, tmp_path, capsys):
        file, gradient = tmp_path / "results.json", __import__("gradient")
        options = ["--steps-timed", "2", "--truth", "exact", "--modes", "exact", "--engines", "eager"]
        assert gradient.main([*SMALL, *options, "--memory-budget", "least", "activations", "--json", str(file)]) == 0
        least, kept = json.loads(file.read_text())["rows"]
        assert (least["memory_budget"], least["kept_steps"]) == ("least", 0)
        assert (kept["memory_budget"], kept["kept_steps"]) == ("activations", 2)
        assert kept["planned_peak_bytes"] > least["planned_peak_bytes"]
        assert least["ratio_to_eager_engine"] == kept["ratio_to_eager_engine"] == 1.0
        assert least["rel_error"] == kept["rel_error"] == 0.0

    def test_a_wrong_engine_gets_no_time(self, run, monkeypatch):
        monkeypatch.setitem(ENGINES, "wrong", off_by(1e-2))
        code, rows, _, printed = run("gradient", "--steps-timed", 2, "--modes", "exact", "--engines", "eager", "wrong")
        assert code == 1
        assert rows["exact", "wrong"]["seconds_per_image"] is None
        assert rows["exact", "wrong"]["peak_bytes"] is None
        assert rows["exact", "eager"]["seconds_per_image"] > 0
        assert "no times" in printed


class TestAdjointError:
    OPTIONS = ["--images", "1", "--t", "0.002", "--num-steps", "1", "2", "--t-end", "1e-3"]

    def test_what_the_error_depends_on(self, tmp_path, capsys):
        file = tmp_path / "results.json"
        adjoint_error = __import__("adjoint_error")
        assert adjoint_error.main([*self.OPTIONS, "--json", str(file)]) == 0
        document = json.loads(file.read_text())
        assert set(document["parity"]) == {"exact", "adjoint", "published"}
        assert all(difference < adjoint_error.PARITY for difference in document["parity"].values())
        rows = document["rows"]
        one, equal, published, cut, float32 = rows.values()
        assert [row["num_steps"] for row in rows.values()] == [1, 2, 2, 1, 2]
        # h β/σ² at t = 1e-5, where σ² is 1.002e-6 and β 0.1002.
        assert one["stiffness"] == pytest.approx(199, rel=1e-3)
        assert equal["stiffness"] == pytest.approx(99.5, rel=1e-3)
        assert published["stiffness"] == pytest.approx(99, rel=1e-3)
        assert cut["stiffness"] == pytest.approx(1.09, rel=1e-2)
        assert "after_first_step" not in one  # nothing is left of it
        for row in (equal, published):
            # The rest starts at t = 1e-3, where h β/σ² is 1.
            assert row["after_first_step"]["rel_error"] < 0.1 * row["rel_error"]
        for row in (published, float32):
            assert 1e-4 < row["shifted"]["rel_difference"] < 0.1
        printed = capsys.readouterr().out
        assert all(name in printed for name in rows)

    def test_nothing_is_printed_without_parity(self, tmp_path, capsys, monkeypatch):
        file = tmp_path / "results.json"
        adjoint_error = __import__("adjoint_error")
        monkeypatch.setattr(adjoint_error, "parity", lambda *_: {"exact": 0.0, "adjoint": 1e-3, "published": float("nan")})
        assert adjoint_error.main([*self.OPTIONS, "--json", str(file)]) == 1
        assert "'adjoint': 0.001" in capsys.readouterr().out
        assert not file.exists()

    def test_a_grid_ends_before_it_starts(self, capsys):
        with pytest.raises(SystemExit):
            __import__("adjoint_error").main(["--t", "0.01", "--t-end", "0.02"])
        assert "ends in [1e-05, 0.01)" in capsys.readouterr().err


class TestAttackGradients:
    def test_published_is_in_published_steps_only(self, capsys):
        attack_gradients = __import__("attack_gradients")
        with pytest.raises(SystemExit):
            attack_gradients.parse_options(["--num-steps", "20", "--modes", "exact", "published"])
        assert "published code steps by 1e-3" in capsys.readouterr().err
        assert "published" not in attack_gradients.parse_options(["--num-steps", "20"]).modes
        assert tuple(attack_gradients.parse_options([]).modes) == attack_gradients.MODES
        assert "20 steps" in attack_gradients.label("adjoint", 20) and "published" not in attack_gradients.label("adjoint", 20)

    def test_runs_published_code(self, images, score, classifier):
        """Its own steps, its clips, a path a call: what `purify_published` gives."""
        attack_gradients = __import__("attack_gradients")
        x = images.float()
        score, classifier = (copy.deepcopy(network).float().requires_grad_(False) for network in (score, classifier))
        model = attack_gradients.PublishedCode(score, classifier, t=0.002, seed=3)
        with torch.no_grad():
            first, second = model(x), model(x)
            x_k = purify_published(2 * x - 1, score, classifier, t=0.002, entropy=3 * 2**32 + 1)
            assert torch.equal(first, classifier((x_k.clamp(-1, 1) + 1) / 2))
        assert not torch.equal(first, second)

    def test_pairs_verdicts_image_by_image(self):
        attack_gradients = __import__("attack_gradients")
        right = {
            "exact": torch.tensor([[1, 0, 0, 1, 0], [1, 0, 1, 0, 0]]),  # worst of two draws: 1 0 0 0 0
            "bpda": torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 0]]),  # 0 1 1 1 0
        }
        rows = [{"mode": mode, **attack_gradients.judged(each.bool())} for mode, each in right.items()]
        assert [(row["one_draw"], row["worst_of_draws"]) for row in rows] == [(2, 1), (3, 3)]
        assert [row["mean"] for row in rows] == [pytest.approx(0.4), pytest.approx(0.7)]
        (pair,) = attack_gradients.paired(rows)
        assert pair["one_draw"] == {"only_exact": 1, "only_mode": 2, "p": 1.0}
        # Four discordant images, one of them the exact gradient's: p = 2 (1 + 4) / 2⁴.
        assert pair["worst_of_draws"] == {"only_exact": 1, "only_mode": 3, "p": 0.625}

    def test_other_options_are_not_mixed_in(self, tmp_path):
        kept = __import__("kept")
        file = tmp_path / "results.json"
        kept.save(file, {"settings": {"num_steps": 60, "grid": "steps of 1e-3"}, "rows": []})
        with pytest.raises(SystemExit, match="grid, num_steps"):
            kept.load(file, {"num_steps": 20, "grid": "equal steps"})


@pytest.mark.skipif(native.unavailable() is not None, reason=native.unavailable() or "")
class TestLayers:
    @pytest.fixture
    def layers(self, monkeypatch):
        layers = __import__("layers")
        monkeypatch.setattr(layers, "SAMPLE_SECONDS", 0.0)  # one call each
        return layers

    def test_every_shape_has_its_rows(self, run, layers):
        code, rows, environment, printed = run("layers", "--batch", 2, "--threads", 1)
        whole = {key: row for key, row in rows.items() if row["kind"] == "network"}
        shapes = {key: row for key, row in rows.items() if row["kind"] == "layer"}
        assert {key[:2] for key in whole} == {
            (f"tiny {name}", direction) for name in ("score", "classifier") for direction in ("forward", "forward + vjp")
        }
        directions = [{key[::2] for key in shapes if key[1] == direction} for direction in ("forward", "transposed")]
        assert directions[0] == directions[1]
        assert any("/2" in key[2] and key[1] == "transposed" for key in shapes)
        assert all(row["chosen"] for row in shapes.values())
        over = [row for row in rows.values() if not row["within_contract"]]
        assert code == bool(over)
        assert printed.count("no times") == len(over)
        for row in shapes.values():
            assert row["within_contract"] == (row["relative_error"] <= row["relative_error_allowed"])
            assert 4 * row["relative_error_eager"] <= row["relative_error_allowed"] < 2e-6
            assert row["relative_error"] < 1e-5
            assert all((row[key] is None) != row["within_contract"] for key in LAYER_TIMES)
        for row in whole.values():
            assert row["within_contract"]
            assert row["ratio_to_eager"] > 0
        assert environment["sgemm_multiplications_per_second"] > 0

    def test_all_algorithms_in_their_own_multiplications(self, run, layers):
        _, rows, _, _ = run("layers", "--all", "--no-truth", "--threads", 1)
        found = {key[3]: row for key, row in rows.items() if key[:3] == ("tiny score", "forward", "64x8x8 -> 64x8x8, 3x3")}
        counted = {name: row["multiplications"] / (64 * 64 * 8 * 8) for name, row in found.items()}
        assert counted == {"direct": 9, "F2": 4, "F4": 36 / 16}
        assert sum(row["chosen"] for row in found.values()) == 1
        whole = [row for row in rows.values() if row["kind"] == "network"]
        assert all(row["relative_error"] is None and row["relative_difference"] < 1e-2 for row in whole)

    def test_a_wrong_kernel_gets_no_time(self, run, layers, monkeypatch):
        right = layers._kernel_call

        def wrong(*arguments):
            call = right(*arguments)
            return lambda: call() * float("nan")

        monkeypatch.setattr(layers, "_kernel_call", wrong)
        code, rows, _, _ = run("layers", "--no-truth", "--threads", 1)
        assert code == 1
        shapes = [row for row in rows.values() if row["kind"] == "layer"]
        assert not any(row["within_contract"] for row in shapes)
        assert all(row[key] is None for row in shapes for key in LAYER_TIMES)


class TestPeers:
    @pytest.fixture
    def peers(self, monkeypatch):
        """With runtimes that are installed, as far as one can see."""
        peers = __import__("peers")
        for module in ("openvino", "onnx", "onnxscript", "onnxruntime"):
            monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
        monkeypatch.setattr(peers, "_openvino", lambda module, x: lambda: module(x))
        monkeypatch.setattr(peers, "_onnx_runtime", lambda module, x, folder: lambda: module(x))
        return peers

    def test_one_row_each(self, run, peers):
        code, rows, environment, _ = run("peers", "--batch", 1, 2, "--threads", 1)
        assert set(rows) == {(name, batch) for name in peers.MODULES for batch in (1, 2)}
        assert environment["label"] == pytest.approx(999 * 0.1)
        expected = {name for name, _ in rows} - ({peers.ENGINE} if native.unavailable() else set())
        for (name, _), row in rows.items():
            if name in expected:
                assert row["relative_difference"] < 1e-5
                assert row["seconds_per_image"] > 0
                assert (row["ratio_to_engine"] is None) == (peers.ENGINE not in expected)
        assert code == 0

    def test_one_that_is_not_installed_is_named(self, run, peers, monkeypatch):
        monkeypatch.setitem(sys.modules, "openvino", None)
        code, rows, _, printed = run("peers", "--threads", 1)
        row = rows[peers.OPENVINO, 1]
        assert code == 0
        assert row["reason"].startswith("not installed")
        assert [row[key] for key in PEER_TIMES] == [None] * 5
        assert "OpenVINO      no times: not installed" in printed

    def test_one_that_differs_or_fails_gets_no_time(self, run, peers, monkeypatch):
        def fails(module, x, folder):
            raise RuntimeError("no such operator")

        monkeypatch.setattr(peers, "_openvino", lambda module, x: lambda: module(x) * 1.001)
        monkeypatch.setattr(peers, "_onnx_runtime", fails)
        code, rows, _, _ = run("peers", "--threads", 1)
        assert code == 1
        differs, failed = rows[peers.OPENVINO, 1], rows[peers.ONNX_RUNTIME, 1]
        assert "differs from eager by 1.0e-03" in differs["reason"]
        assert failed["reason"] == "RuntimeError: no such operator"
        assert [row[key] for row in (differs, failed) for key in PEER_TIMES] == [None] * 10
        assert rows[peers.EAGER, 1]["seconds_per_image"] > 0


class TestCases:
    @pytest.fixture
    def networks(self):
        cases = __import__("cases")
        return cases.load_networks("tiny", device=torch.device("cpu"), score=None, classifier=None, seed=0)

    @pytest.mark.parametrize("forward_noising", [False, True])
    def test_path_is_the_published_runs(self, networks, forward_noising):
        cases = __import__("cases")
        x_0 = 2 * cases.benchmark_images("random", 2, device=torch.device("cpu"), seed=1) - 1
        path = cases.published_path(x_0, t=0.1, steps=3, forward_noising=forward_noising, entropy=5)
        with path.seeded(), torch.no_grad():
            published = purify_published(
                x_0, networks.score, None, t=0.1, t_end=path.t_end, forward_noising=forward_noising, entropy=5
            )
        replayed = purify_ref(
            x_0.double(), networks.score64, None, path.noise.double(), grid=path.grid, forward_noising=forward_noising
        )
        # Each step rounds a state of up to 4 a few times; another path would differ by 0.06.
        torch.testing.assert_close(published.double(), replayed, rtol=0, atol=3 * 4 * 4 * ULP)

    def test_truth_is_back_propagation_through_the_definition(self, networks):
        cases, gradient = __import__("cases"), __import__("gradient")
        x = cases.benchmark_images("random", 1, device=torch.device("cpu"), seed=1).double().requires_grad_()
        path = cases.published_path(2 * x.detach().float() - 1, t=0.1, steps=2, forward_noising=False, entropy=5)
        purified = gradient.discrete_adjoint(x, networks.score64, networks.classifier64, path)
        w = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        (v,) = torch.autograd.grad(purified, x, w)
        x_k = purify_ref(2 * x - 1, networks.score64, networks.classifier64, path.noise.double(), grid=path.grid)
        (v_ref,) = torch.autograd.grad((x_k + 1) / 2, x, w)
        # Two steps through some hundred operations, each with sums of up to some thousand terms.
        torch.testing.assert_close(v, v_ref, rtol=0, atol=1e-12 * float(v_ref.abs().max()))

    def test_random_classifiers_guide_with_order_one_and_flip_no_relu(self):
        cases = __import__("cases")
        from coupfast.guidance import guidance_gradient
        from coupfast.models.wide_resnet import WideResNet

        torch.manual_seed(0)
        classifier = WideResNet(10, 1).eval()
        cases.scale_random_classifier(classifier, seed=3)
        assert not any(module.training for module in classifier.modules())
        x_k = 2 * torch.rand(8, 3, 32, 32) - 1
        g, _ = guidance_gradient(classifier, x_k)
        norms = g.flatten(1).norm(dim=1)
        assert 0.1 < float(norms.min())
        assert float(norms.max()) < 10
        g64, _ = guidance_gradient(copy.deepcopy(classifier).double(), x_k.double())
        # A dozen layers of sums whose terms are some ten times as large as what remains of them; a flip would be 1e-3 or more.
        assert float(((g - g64).flatten(1).norm(dim=1) / norms).max()) < 2e-4

    def test_too_few_images_are_refused(self):
        pytest.importorskip("foolbox")
        with pytest.raises(ValueError, match="20 images"):
            __import__("cases").benchmark_images("cifar10-20", 21, device=torch.device("cpu"), seed=0)


class TestGpu:
    """What is read off a GPU, without one."""

    def test_launches_are_the_profilers_own(self):
        timing = __import__("timing")
        cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
        events = [
            *((cpu, "cudaLaunchKernel"), (cuda, "void cutlass::Kernel<…>"), (cpu, "aten::conv2d"), (cpu, "cuLaunchKernelEx")),
            *((cuda, "_guided_step_kernel"), (cpu, "cudaGraphLaunch"), (cuda, "a"), (cuda, "b"), (cuda, "c")),
            *((cpu, "cudaMemcpyAsync"), (cuda, "Memcpy DtoD (Device -> Device)"), (cuda, "Memset (Device)")),
            *((cpu, "cudaDeviceSynchronize"), (cpu, "cudaLaunchKernelExC")),
        ]
        found = timing.count_launches(types.SimpleNamespace(device_type=kind, name=name) for kind, name in events)
        assert found == timing.Launches(kernels=5, calls=4)
        assert timing.launches(lambda: None, torch.device("cpu")) is None

    def test_both_clocks(self, monkeypatch):
        """The host returns at once from work that takes the device 3 ms."""
        timing = __import__("timing")

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                order.append("event")

            def synchronize(self):
                order.append("wait")

            def elapsed_time(self, last):
                return 3.0

        order = []
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))
        clock = iter([10.0, 10.5])
        monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
        times, result = timing.timed_twice(lambda: order.append("call") or 7, torch.device("cuda"))
        assert (times, result) == (timing.Times(3e-3, 0.5), 7)
        assert order == ["wait", "event", "call", "event", "wait"]

    def test_rotated_images_are_others_of_the_same_kind(self):
        timing = __import__("timing")
        x = torch.rand(2, 3, 4, 8)
        images = timing.rotated(x)
        first = [next(images) for _ in range(5)]
        assert first[0] is x is first[4]
        assert not any(torch.equal(a, b) for a, b in zip(first, first[1:], strict=False))
        assert all(torch.equal(image.sort(dim=-1).values, x.sort(dim=-1).values) for image in first)

    def test_flop_of_a_pass_and_its_share(self):
        cases = __import__("cases")
        networks = types.SimpleNamespace(
            score=lambda x, label: torch.nn.functional.conv2d(x, torch.ones(5, 3, 3, 3), padding=1),
            classifier=lambda x: x.flatten(1) @ torch.ones(48, 10),
        )
        assert cases.pass_flop(networks, torch.ones(2, 3, 4, 4)) == {"score": 2 * 9 * 3 * 5 * 16, "classifier": 2 * 48 * 10}
        case = types.SimpleNamespace(machine={"matmul_flop_per_second": 100.0})
        assert cases.share_of_matmul(300.0, 6.0, case) == 0.5
        assert cases.share_of_matmul(300.0, None, case) is cases.share_of_matmul(None, 6.0, case) is None

    def test_a_table_leaves_out_what_was_not_measured(self):
        table = __import__("cases").markdown([{"a": 0.123456, "b": None}, {"b": "x", "a": 7}], ("a", "b", "c"))
        assert table.splitlines() == ["", "| a | b | c |", "|---|---|---|", "| 0.1235 |  |  |", "| 7 | x |  |"]


class TestTiming:
    def test_contenders_take_turns(self):
        order = []
        contenders = {name: lambda name=name: order.append(name) for name in "abc"}
        results = __import__("timing").interleave(contenders, 3)
        assert "".join(order) == "abc" "bca" "cab"
        assert {name: len(found) for name, found in results.items()} == {"a": 3, "b": 3, "c": 3}

    def test_ratio_is_the_median_of_paired_ratios(self):
        timing = __import__("timing")
        assert timing.times_faster([2.0, 20.0, 6.0], [1.0, 5.0, 1.0]) == 4.0
        assert timing.times_faster(None, [1.0]) is None
        assert timing.Summary.of([1.0, 2.0, 3.0, 4.0, 5.0]) == timing.Summary(3.0, 2.0)

    def test_peak_counts_what_lives_at_once(self):
        def allocate():
            torch.ones(2**20)
            a = torch.ones(2**20)
            b = torch.ones(2**20)
            return a, b

        peak = __import__("timing").peak_bytes(allocate, torch.device("cpu"))
        assert 2 * 2**22 <= peak < 2 * 2**22 + 2**16

    def test_garbage_of_one_record_is_not_freed_in_the_next(self):
        timing = __import__("timing")

        def allocate():
            cycle = [torch.ones(2**20)]
            cycle.append(cycle)

        def free():
            gc.collect()
            return torch.ones(2**20)

        gc.disable()
        try:
            timing.peak_bytes(allocate, torch.device("cpu"))
            peak = timing.peak_bytes(free, torch.device("cpu"))
        finally:
            gc.enable()
        assert 2**22 <= peak < 2**22 + 2**16

    def test_json_has_no_nan(self):
        assert __import__("timing").finite_or_none({"a": [float("nan"), 1.0]}) == {"a": [None, 1.0]}
