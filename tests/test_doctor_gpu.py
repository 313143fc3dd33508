"""The checks of a GPU, on a CPU: operators are their definitions there, so a wrong one has to be put in to be found."""

import dataclasses
import importlib
import json
import types

import pytest
import torch
from conftest import relu_classifier, small_score

from coupfast import doctor
from coupfast.doctor import gpu as gpu_checks
from coupfast.doctor import kernels as kernel_checks
from coupfast.doctor.compilations import Compilations
from coupfast.doctor.kernels import check_kernels, is_bad, measure_rates
from coupfast.engines import ENGINES
from coupfast.purify import Purifier
from coupfast_kernels import parity, registry
from coupfast_kernels.convolution.gpu import ALGORITHMS

CPU = torch.device("cpu")
ON_GPUS = [kernel for kernel in registry.kernels() if kernel.device == "cuda"]


def changed(name, change):
    """A kernel that is registered, with what it gives put through `change`."""

    def spoil(case):
        def make(device):
            trial = case.make(device)
            return dataclasses.replace(trial, run=lambda: change(*(result.clone() for result in trial.run())))

        return dataclasses.replace(case, make=make)

    kernel = named(name)
    return [dataclasses.replace(kernel, checks=lambda: map(spoil, kernel.checks()))]


def named(name):
    (kernel,) = (kernel for kernel in registry.kernels() if kernel.name == name)
    return kernel


def one_bit(y):
    y.view(torch.int32)[1, 2, 3, 4] ^= 1
    return (y,)


class TestKernels:
    """Where no GPU is, the operators of its kernels are their definitions."""

    def test_the_definitions_pass(self):
        rows = list(check_kernels(CPU, [kernel for kernel in registry.kernels() if kernel.device == "cuda"]))
        assert {row["status"] for row in rows} == {"ok"}
        assert {
            *("guided_step", "standard_normal", "group_norm_silu", "group_norm_silu_vjp"),
            *(f"conv3x3 {algorithm}" for algorithm in ALGORITHMS),
        } <= {row["kernel"] for row in rows}
        assert len({(row["kernel"], row["case"]) for row in rows}) == len(rows)
        for row in rows:
            # Less than a hundred roundings: TF32's 3e-4 would not pass for float32.
            assert row["bound"] < 100 * parity.U or "tf32" in row["kernel"]
        assert json.loads(json.dumps(rows, allow_nan=False)) == rows

    @pytest.mark.parametrize(
        ("name", "change", "status", "detail"),
        [
            ("guided_step", one_bit, "mismatch", "1 elements with other bits"),
            ("guided_step", lambda y: (y.fill_(float("nan")),), "failed", "not finite"),
            ("group_norm_silu", lambda h, y: (h, y * (1 + 1e-5)), "mismatch", "error"),
            ("group_norm_silu", lambda h, y: (h, y * float("nan")), "failed", "not finite"),
            ("group_norm_silu", lambda h, y: (h * (1 + 2.0**-22), y), "mismatch", "elements with other bits"),
            ("group_norm_silu", lambda h, y: (h, y[:, :1]), "failed", "gives torch.float32 of shape"),
            ("group_norm_silu", lambda h, y: (h, y.double()), "failed", "gives torch.float64 of shape"),
            ("group_norm_silu", lambda h, y: (h,), "failed", "gives 1 results, its definition 2"),
            ("group_norm_silu_vjp", lambda gx: (gx * (1 + 1e-5),), "mismatch", "error"),
            ("conv3x3 ieee", lambda y: (y * (1 + 1e-5),), "mismatch", "error"),
            ("conv3x3 tf32", lambda y: (y * (1 + 1e-5),), "ok", "error"),
            ("conv3x3 tf32", lambda y: (y * (1 + 1e-2),), "mismatch", "error"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_is_wrong_is_found(self, name, change, status, detail):
        rows = list(check_kernels(CPU, changed(name, change)))
        assert {row["status"] for row in rows} == {status}
        assert all(detail in row["detail"] for row in rows)

    def test_a_step_without_its_noise(self, monkeypatch):
        module = importlib.import_module("coupfast_kernels.guided_step.cases")
        right = module.guided_step
        monkeypatch.setattr(
            module, "guided_step", lambda *a, noise, second_noise, **o: right(*a, noise=None, second_noise=False, **o)
        )
        rows = list(check_kernels(CPU, [named("guided_step")]))
        assert all((row["status"] == "ok") == ("without" in row["case"]) for row in rows)

    def test_a_convolution_in_tf32_is_not_float32(self, monkeypatch):
        module = importlib.import_module("coupfast_kernels.convolution.cases")
        right = module.conv3x3

        def to_tf32(t):
            return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

        monkeypatch.setattr(module, "conv3x3", lambda x, packed, *a, **o: right(to_tf32(x), to_tf32(packed), *a, **o))
        kernels = [named(f"conv3x3 {precision}") for precision in ("ieee", "tf32x3", "tf32")]
        rows = [row for row in check_kernels(CPU, kernels) if "forward" in row["case"]]
        assert {(row["kernel"], row["status"]) for row in rows} == {
            *(("conv3x3 ieee", "mismatch"), ("conv3x3 tf32x3", "mismatch"), ("conv3x3 tf32", "ok"))
        }

    def test_a_kernel_that_raises_stops_nothing(self):
        def broken(y):
            raise RuntimeError("CUDA error: an illegal memory access\nmore")

        rows = list(check_kernels(CPU, [*changed("conv3x3 ieee", broken), named("guided_step")]))
        assert {row["status"] for row in rows if row["kernel"] == "guided_step"} == {"ok"}
        details = {row["detail"] for row in rows if row["kernel"] == "conv3x3 ieee"}
        assert details == {"RuntimeError: CUDA error: an illegal memory access"}

    def test_definitions_that_are_not_finite(self):
        trial = registry.Trial(
            lambda: (torch.ones(3),), lambda dtype: (torch.full((3,), float("nan"), dtype=dtype),), (parity.Agreement(4),)
        )
        case = registry.Case("3", lambda device: trial)
        (row,) = check_kernels(CPU, [registry.Kernel("broken", "cpu", lambda: [case], lambda images: [case])])
        assert (row["status"], row["error"]) == ("failed", None)


class Stub:
    """Something to call like a purifier that costs nothing."""

    def __init__(self, function):
        self.function = function

    def plan(self, batch, *, image_shape):
        assert (batch, image_shape) == (2, (3, 8, 8))

    def __call__(self, x, *, seed):
        return self.function(x)


def right(x):
    return torch.sin(3 * x)


class TestEngine:
    @pytest.fixture(autouse=True)
    def _small_networks(self, monkeypatch):
        monkeypatch.setattr(gpu_checks, "load_score", lambda name, device: small_score(torch.float32))
        monkeypatch.setattr(gpu_checks, "load_classifier", lambda name, device: relu_classifier(torch.float32))

    def rows(self, wrong, *culprits):
        """With an engine that computes `wrong` while all of these options are on."""

        def build(score, classifier, *, method, engine, num_steps, engine_options=None):
            on = all((engine_options or {}).get(name, True) for name in culprits)
            return Stub(wrong if engine == "broken" and on else right)

        return list(gpu_checks.check_engine(CPU, engine="broken", build=build))

    def test_a_sound_engine(self):
        def build(score, classifier, *, engine, **options):
            return Purifier(score, classifier, engine="eager", **options)

        rows = list(gpu_checks.check_engine(CPU, engine="sound", build=build))
        assert [(row["status"], row["culprit"], row["trials"]) for row in rows] == [("ok", "", [])] * 2
        assert [row["case"].split(",")[0] for row in rows] == ["reverse-sde", "coup"]
        # Unguided there is no ReLU that could flip.
        assert rows[0]["forward_bound"] < 1e-5
        assert rows[0]["gradient_bound"] < 1e-4

    @pytest.mark.parametrize("option", gpu_checks.ENGINE_OPTIONS)
    def test_the_part_that_is_wrong_is_named(self, option):
        row, _ = self.rows(lambda x: right(x) * (1 + 1e-5), option)
        assert row["status"] == "mismatch"
        assert row["culprit"] == f"it agrees without {option!r}: that part is wrong here"
        assert [trial["status"] == "ok" for trial in row["trials"]] == [
            *(name == option for name in gpu_checks.ENGINE_OPTIONS),
            True,
        ]
        assert [sorted(trial["options"]) for trial in row["trials"]] == [
            *([name] for name in gpu_checks.ENGINE_OPTIONS),
            sorted(gpu_checks.ENGINE_OPTIONS),
        ]

    def test_a_wrong_gradient_alone(self):
        class Wrong(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, gx):
                return gx * (1 + 1e-5)

        row, _ = self.rows(lambda x: right(Wrong.apply(x)), "triton")
        assert row["forward_error"] <= row["forward_bound"]
        assert row["gradient_error"] > row["gradient_bound"]
        assert row["status"] == "mismatch"
        assert "without 'triton'" in row["culprit"]

    def test_two_parts_or_none(self):
        row, _ = self.rows(lambda x: right(x) + 1, "graphs", "triton")
        assert "without 'graphs' or without 'triton'" in row["culprit"]
        row, _ = self.rows(lambda x: right(x) + 1)
        assert row["culprit"].startswith("it is wrong without graphs, compile, triton, beside, too")
        ok, mismatch = {"status": "ok", "detail": ""}, {"status": "mismatch", "detail": ""}
        assert "only without all of" in gpu_checks._culprit([mismatch] * len(gpu_checks.ENGINE_OPTIONS) + [ok])

    def test_one_that_raises_or_gives_nan(self):
        def raises(x):
            raise IndexError("no such buffer")

        nan = lambda x: x * float("nan")  # noqa: E731
        for wrong, detail in ((raises, "IndexError: no such buffer"), (nan, "values that are not finite")):
            rows = self.rows(wrong, "triton")
            assert [(row["status"], row["detail"]) for row in rows] == [("failed", detail)] * 2
            assert all("without 'triton'" in row["culprit"] for row in rows)

    def test_nothing_agrees_with_a_definition_that_is_not_finite(self):
        def build(score, classifier, *, engine, **options):
            rounded = engine == "eager" and next(score.parameters()).dtype == torch.float32
            return Stub((lambda x: x * float("nan")) if rounded else right)

        rows = list(gpu_checks.check_engine(CPU, engine="stub", build=build))
        assert [row["status"] for row in rows] == ["failed"] * 2

    def test_a_device_that_fails_has_not_refused(self):
        def stops(score, classifier, *, engine, **options):
            if engine != "eager":
                raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
            return Stub(right)

        rows = list(gpu_checks.check_engine(CPU, engine="stops", build=stops))
        assert [row["status"] for row in rows] == ["failed"] * 2
        assert all(map(is_bad, rows))

    def test_one_that_refuses_is_no_problem(self):
        def refuse(score, classifier, *, engine, **options):
            if engine != "eager":
                raise RuntimeError("needs a GPU")
            return Stub(right)

        rows = list(gpu_checks.check_engine(CPU, engine="refuses", build=refuse))
        assert [(row["status"], row["detail"]) for row in rows] == [("refused", "RuntimeError: needs a GPU")] * 2
        assert not any(map(is_bad, rows))
        assert rows[0]["trials"] == []

    def test_results_that_a_later_call_overwrites(self):
        """As from a captured graph without a copy."""
        memory = torch.zeros(2, 3, 8, 8)

        def shared(x):
            y = right(x)
            memory.copy_(y.detach())
            y.data = memory
            return y

        row, _ = self.rows(shared, "graphs")
        assert row["status"] == "mismatch"
        assert "without 'graphs'" in row["culprit"]

    def test_one_that_is_right_only_once(self):
        calls = []

        def once(x):
            calls.append(1)
            return right(x) * (1 if len(calls) % 3 else 1 + 1e-5)

        assert {row["status"] for row in self.rows(once)} == {"mismatch"}


class TestRates:
    @pytest.fixture
    def seconds(self, monkeypatch):
        """Every call takes 1 ms; a copy moves 1 GB/s, a product 1 GFLOP/s."""

        def seconds(call, device):
            assert call() is not None
            return 1e-3

        monkeypatch.setattr(kernel_checks, "device_seconds", seconds)
        monkeypatch.setattr(kernel_checks, "copy_bandwidth", lambda device, megabytes: 1e9)
        monkeypatch.setattr(kernel_checks, "matmul_rate", lambda device: 1e9)

    def test_shares_of_what_has_to_move_or_be_multiplied(self, seconds):
        found = measure_rates(CPU, set(), kernels=ON_GPUS, images=1)
        assert found["problem"] is None
        rows = {row["kernel"]: row for row in found["kernels"]}
        state, features = 64 * 3 * 32 * 32 * 4, 256 * 16 * 16 * 4  # bytes
        assert {name: row["bytes"] for name, row in rows.items() if row["bytes"]} == {
            "standard_normal": state,
            "guided_step": 4 * state,
            "group_norm_silu": 2 * features,
            "group_norm_silu_vjp": 3 * features,
        }
        assert {name: row["flop"] for name, row in rows.items() if row["flop"]} == {
            name: 2 * 9 * 256 * 256 * 16 * 16 for name in (*(f"conv3x3 {each}" for each in ALGORITHMS), "conv3x3_normed")
        }
        for row in rows.values():
            per_second = (row["bytes"] or row["flop"]) / 1e-3
            assert row["share"] == pytest.approx(per_second / 1e9)
            assert (row["bytes_per_second"] or row["flop_per_second"]) == pytest.approx(per_second)

    def test_what_is_wrong_gets_no_time(self, seconds):
        found = measure_rates(CPU, {"guided_step", "conv3x3 ieee"}, kernels=ON_GPUS, images=1)
        assert [row["kernel"] for row in found["kernels"]] == [
            *("group_norm_silu", "group_norm_silu_vjp"),
            *(f"conv3x3 {algorithm}" for algorithm in ALGORITHMS if algorithm != "ieee"),
            *("conv3x3_normed", "standard_normal"),
        ]

    def test_a_card_without_memory_says_so(self, seconds, monkeypatch):
        def full(device, megabytes):
            raise torch.cuda.OutOfMemoryError("tried to allocate 256 MiB")

        monkeypatch.setattr(kernel_checks, "copy_bandwidth", full)
        found = measure_rates(CPU, set(), kernels=ON_GPUS, images=1)
        assert "256 MiB" in found["problem"]
        assert found["kernels"] == []


class TestReport:
    @pytest.fixture
    def gpu(self, monkeypatch):
        """A report on the CPU taken for a GPU, with few checks and no engine."""
        engine = {"engine": "cuda", "case": "coup", "status": "ok", "detail": "errors", "culprit": "", "trials": []}
        monkeypatch.setattr(gpu_checks, "check_engine", lambda device: iter([dict(engine)]))
        monkeypatch.setattr(
            gpu_checks,
            "measure_rates",
            lambda device, unsound, kernels: measure_rates(device, unsound, kernels=ON_GPUS, images=1, megabytes=1),
        )
        return gpu_checks.check_gpu(CPU, set())

    @pytest.fixture
    def report(self):
        return doctor.run(device="cpu", cases=[("reverse-sde", {"method": "reverse-sde"}, "silu")])

    def test_is_json_and_text(self, gpu, report):
        assert gpu["problems"] == []
        assert json.loads(json.dumps(gpu, allow_nan=False)) == gpu
        kernel = {"device": "cuda:0", "case": "5x3", "status": "ok", "detail": ""}
        close = kernel | {"kernel": "conv3x3 ieee", "error": 1e-7, "bound": 4e-7}
        kernels = [kernel | {"kernel": "guided_step", "error": 0.0, "bound": 0.0}, close]
        text = doctor.text(report | {"gpus": [gpu], "kernels": kernels})
        assert "guided_step on cuda:0: 1 of 1 cases agree, bit for bit" in text
        for part in ("largest error 0.25 of its bound", "GB/s", "TFLOP/s"):
            assert part in text
        assert text.count("of the copy") == 4
        assert text.count("of the matrix product") == len(ALGORITHMS) + 1  # and the one that norms what it reads

    def test_a_mismatch_is_a_problem_of_the_doctors(self, gpu, report, monkeypatch):
        bad = gpu | {"problems": ["engine cuda on cuda:0: mismatch"]}
        seen = []
        monkeypatch.setattr(doctor, "check_gpu", lambda device, unsound, full: seen.append((str(device), unsound, full)) or bad)
        monkeypatch.setattr(doctor, "machine", lambda: report["machine"])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        # No GPU here to try the noise, the kernels and the other engines on.
        monkeypatch.setattr(doctor, "check_noise", lambda device: {"device": str(device), "problem": None})
        tried = {}
        monkeypatch.setattr(
            doctor, "check_engines", lambda device, cases, engines, progress: iter(tried.update({device.type: engines}) or [])
        )
        wrong = {"kernel": "conv3x3 ieee", "case": "2x3", "status": "failed", "error": None, "bound": None, "detail": "raised"}
        rows = {"cuda": [wrong | {"device": "cuda:0"}], "cpu": []}
        monkeypatch.setattr(doctor, "check_kernels", lambda device, most: iter(rows[device.type]))
        found = doctor.run(full=True)
        assert "quick look" not in doctor.text(found) and tried["cuda"] == list(ENGINES)
        found = doctor.run()
        assert seen == [("cuda:0", {"conv3x3 ieee"}, True), ("cuda:0", {"conv3x3 ieee"}, False)]
        assert tried == {"cpu": list(ENGINES), "cuda": ["eager", "cpu"]}  # cuda is compiled for the shipped networks alone
        assert "A quick look" in doctor.text(found) and "`coupfast doctor --full` takes" in doctor.text(found)
        assert found["gpus"] == [bad]
        assert found["problems"] == ["conv3x3 ieee on cuda:0, 2x3: failed, raised", *bad["problems"]]
        text = doctor.text(found)
        assert "PROBLEM  engine cuda on cuda:0: mismatch" in text
        assert "conv3x3 ieee on cuda:0: 0 of 1 cases agree" in text

    def test_problems_name_the_part(self, monkeypatch):
        bad = {"engine": "cuda", "case": "coup", "status": "mismatch", "detail": "errors", "culprit": "without 'graphs'"}
        monkeypatch.setattr(gpu_checks, "check_engine", lambda device: iter([bad | {"trials": []}]))
        monkeypatch.setattr(kernel_checks, "copy_bandwidth", lambda device, megabytes: 1 / 0)
        assert gpu_checks.check_gpu(CPU, set())["problems"] == [
            "engine cuda on cpu, coup: mismatch, errors; without 'graphs'",
            "rates on cpu: ZeroDivisionError: division by zero",
        ]

    def test_what_triton_compiles_is_counted(self, report):
        knobs = pytest.importorskip("triton").knobs.compilation
        before, took = knobs.listener, types.SimpleNamespace(total=1_500_000)
        with Compilations() as found:
            for cache_hit in (False, True, False):
                knobs.listener(src=None, metadata={}, metadata_group={}, times=took, cache_hit=cache_hit)
        assert (found.count, found.seconds) == (2, 3.0) and knobs.listener is before
        text = doctor.text(report | {"compilations": {"kernels": 2, "seconds": 3.0}})
        assert "2 kernels had to be compiled, which took Triton 3 s" in text

    def test_no_gpu_is_a_fact(self, report):
        assert report["gpus"] == []
        assert report["ok"]
        assert "not checked, since no CUDA device was looked at" in doctor.text(report)
