"""The checks of a GPU, on a CPU: operators are their definitions there, so a wrong one has to be put in to be found."""

import json

import pytest
import torch
from conftest import relu_classifier, small_score

from coupfast import device_checks, doctor
from coupfast.purify import Purifier

CPU = torch.device("cpu")


def statuses(kernel):
    return {row["case"]: row["status"] for row in device_checks.check_kernels(CPU) if row["kernel"].startswith(kernel)}


@pytest.fixture
def only(monkeypatch):
    """Checks of one kernel alone."""
    real = device_checks._row

    def only(name):
        monkeypatch.setattr(
            device_checks,
            "_row",
            lambda kernel, *rest: real(kernel, *rest) if kernel.startswith(name) else {"kernel": "", "case": "", "status": ""},
        )

    return only


class TestKernels:
    def test_the_definitions_pass(self):
        rows = list(device_checks.check_kernels(CPU))
        assert {row["status"] for row in rows} == {"ok"}
        assert {row["kernel"] for row in rows} == {
            *("guided_step", "group_norm_silu", "group_norm_silu_vjp", "conv3x3 ieee", "conv3x3 tf32x3", "conv3x3 tf32")
        }
        assert len({(row["kernel"], row["case"]) for row in rows}) == len(rows)
        for row in rows:
            # Less than a hundred roundings: TF32's 3e-4 would not pass for float32.
            assert row["bound"] < 100 * device_checks.U or "tf32" in row["kernel"]
        assert json.loads(json.dumps(rows, allow_nan=False)) == rows

    def test_one_bit_of_a_guided_step(self, monkeypatch, only):
        only("guided_step")

        def wrong(*arguments, out, **options):
            right(*arguments, out=out, **options)
            out.view(torch.int32)[1, 2, 3, 4] ^= 1

        right = device_checks.guided_step
        monkeypatch.setattr(device_checks, "guided_step", wrong)
        rows = [row for row in device_checks.check_kernels(CPU) if row["kernel"]]
        assert {(row["status"], row["detail"]) for row in rows} == {("mismatch", "1 elements with other bits")}

    def test_a_guided_step_that_writes_nothing_or_ignores_its_noise(self, monkeypatch, only):
        only("guided_step")
        monkeypatch.setattr(device_checks, "guided_step", lambda *arguments, **options: None)
        assert set(statuses("guided_step").values()) == {"mismatch"}
        monkeypatch.undo()
        only("guided_step")
        right = device_checks.guided_step
        monkeypatch.setattr(
            device_checks, "guided_step", lambda *arguments, noise, **options: right(*arguments, noise=None, **options)
        )
        assert {case: status == "ok" for case, status in statuses("guided_step").items()} == {
            case: "without" in case for case in statuses("guided_step")
        }

    @pytest.mark.parametrize(
        ("wrong", "status", "detail"),
        [
            (lambda h, y: (h, y * (1 + 1e-5)), "mismatch", "error"),
            (lambda h, y: (h, y * float("nan")), "failed", "not finite"),
            (lambda h, y: (h * (1 + 2.0**-22), y), "failed", "h has other bits"),
            (lambda h, y: (h, y[:, :1]), "failed", "gives torch.float32 of shape"),
        ],
        ids=["wrong", "nan", "h", "shape"],
    )
    def test_a_wrong_group_norm(self, monkeypatch, only, wrong, status, detail):
        only("group_norm_silu")
        right = device_checks.group_norm_silu
        monkeypatch.setattr(device_checks, "group_norm_silu", lambda *a, **o: wrong(*right(*a, **o)))
        rows = [row for row in device_checks.check_kernels(CPU) if row["kernel"] == "group_norm_silu"]
        assert {row["status"] for row in rows} == {status}
        assert all(detail in row["detail"] for row in rows)

    def test_a_wrong_transpose_of_a_group_norm(self, monkeypatch, only):
        only("group_norm_silu")

        class Wrong(torch.autograd.Function):
            @staticmethod
            def forward(ctx, y):
                return y.clone()

            @staticmethod
            def backward(ctx, gy):
                return gy * (1 + 1e-5)

        right = device_checks.group_norm_silu

        def wrong(*arguments, **options):
            h, y = right(*arguments, **options)
            return h, Wrong.apply(y)

        monkeypatch.setattr(device_checks, "group_norm_silu", wrong)
        rows = [row for row in device_checks.check_kernels(CPU) if row["kernel"]]
        assert {row["kernel"]: row["status"] for row in rows} == {"group_norm_silu": "ok", "group_norm_silu_vjp": "mismatch"}

    def test_a_convolution_in_tf32_is_not_float32(self, monkeypatch, only):
        only("conv3x3")
        right = device_checks.conv3x3

        def to_tf32(t):
            return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

        def wrong(x, packed, *rest, **options):
            return right(to_tf32(x), to_tf32(packed), *rest, **options)

        monkeypatch.setattr(device_checks, "conv3x3", wrong)
        rows = [row for row in device_checks.check_kernels(CPU) if "forward" in row["case"]]
        assert {(row["kernel"], row["status"]) for row in rows} == {
            *(("conv3x3 ieee", "mismatch"), ("conv3x3 tf32x3", "mismatch"), ("conv3x3 tf32", "ok"))
        }

    def test_a_kernel_that_raises_stops_nothing(self, monkeypatch, only):
        only("conv3x3")

        def broken(*arguments, precision, **options):
            if precision == "ieee":
                raise RuntimeError("CUDA error: an illegal memory access\nmore")
            return right(*arguments, precision=precision, **options)

        right = device_checks.conv3x3
        monkeypatch.setattr(device_checks, "conv3x3", broken)
        rows = {row["kernel"]: row for row in device_checks.check_kernels(CPU) if row["kernel"]}
        assert rows["conv3x3 tf32"]["status"] == "ok"
        assert rows["conv3x3 ieee"]["detail"] == "RuntimeError: CUDA error: an illegal memory access"


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
        monkeypatch.setattr(device_checks, "load_score", lambda name, device: small_score(torch.float32))
        monkeypatch.setattr(device_checks, "load_classifier", lambda name, device: relu_classifier(torch.float32))

    def rows(self, wrong, *culprits):
        """With an engine that computes `wrong` while all of these options are on."""

        def build(score, classifier, *, method, engine, num_steps, engine_options=None):
            on = all((engine_options or {}).get(name, True) for name in culprits)
            return Stub(wrong if engine == "broken" and on else right)

        return list(device_checks.check_engine(CPU, engine="broken", build=build))

    def test_a_sound_engine(self):
        def build(score, classifier, *, engine, **options):
            return Purifier(score, classifier, engine="eager", **options)

        rows = list(device_checks.check_engine(CPU, engine="sound", build=build))
        assert [(row["status"], row["culprit"], row["trials"]) for row in rows] == [("ok", "", [])] * 2
        assert [row["case"].split(",")[0] for row in rows] == ["reverse-sde", "coup"]
        # Unguided there is no ReLU that could flip.
        assert rows[0]["forward_bound"] < 1e-5
        assert rows[0]["gradient_bound"] < 1e-4

    @pytest.mark.parametrize("option", device_checks.ENGINE_OPTIONS)
    def test_the_part_that_is_wrong_is_named(self, option):
        row, _ = self.rows(lambda x: right(x) * (1 + 1e-5), option)
        assert row["status"] == "mismatch"
        assert row["culprit"] == f"it agrees without {option!r}: that part is wrong here"
        assert [trial["status"] == "ok" for trial in row["trials"]] == [
            *(name == option for name in device_checks.ENGINE_OPTIONS),
            True,
        ]
        assert [sorted(trial["options"]) for trial in row["trials"]] == [
            *([name] for name in device_checks.ENGINE_OPTIONS),
            sorted(device_checks.ENGINE_OPTIONS),
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
        assert row["culprit"].startswith("it is wrong without graphs, compile, triton, too")
        ok, mismatch = {"status": "ok", "detail": ""}, {"status": "mismatch", "detail": ""}
        assert "only without all of" in device_checks._culprit([mismatch] * 3 + [ok])

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

        rows = list(device_checks.check_engine(CPU, engine="stub", build=build))
        assert [row["status"] for row in rows] == ["failed"] * 2

    def test_a_device_that_fails_has_not_refused(self):
        def stops(score, classifier, *, engine, **options):
            if engine != "eager":
                raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
            return Stub(right)

        rows = list(device_checks.check_engine(CPU, engine="stops", build=stops))
        assert [row["status"] for row in rows] == ["failed"] * 2
        assert all(map(device_checks._bad, rows))

    def test_one_that_refuses_is_no_problem(self):
        def refuse(score, classifier, *, engine, **options):
            if engine != "eager":
                raise RuntimeError("needs a GPU")
            return Stub(right)

        rows = list(device_checks.check_engine(CPU, engine="refuses", build=refuse))
        assert [(row["status"], row["detail"]) for row in rows] == [("refused", "RuntimeError: needs a GPU")] * 2
        assert not any(map(device_checks._bad, rows))
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

        monkeypatch.setattr(device_checks, "device_seconds", seconds)
        monkeypatch.setattr(device_checks, "copy_bandwidth", lambda device, megabytes: 1e9)
        monkeypatch.setattr(device_checks, "matmul_rate", lambda device: 1e9)

    def test_shares_of_what_has_to_move_or_be_multiplied(self, seconds):
        found = device_checks.measure_rates(CPU, set(), images=1)
        assert found["problem"] is None
        rows = {row["kernel"]: row for row in found["kernels"]}
        state, features = 64 * 3 * 32 * 32 * 4, 256 * 16 * 16 * 4  # bytes
        assert {name: row["bytes"] for name, row in rows.items() if row["bytes"]} == {
            "guided_step": 4 * state,
            "group_norm_silu": 2 * features,
            "group_norm_silu_vjp": 3 * features,
        }
        assert {name: row["flop"] for name, row in rows.items() if row["flop"]} == {
            f"conv3x3 {precision}": 2 * 9 * 256 * 256 * 16 * 16 for precision in ("ieee", "tf32x3", "tf32")
        }
        for row in rows.values():
            per_second = (row["bytes"] or row["flop"]) / 1e-3
            assert row["share"] == pytest.approx(per_second / 1e9)
            assert (row["bytes_per_second"] or row["flop_per_second"]) == pytest.approx(per_second)

    def test_what_is_wrong_gets_no_time(self, seconds):
        found = device_checks.measure_rates(CPU, {"guided_step", "conv3x3 ieee"}, images=1)
        assert [row["kernel"] for row in found["kernels"]] == [
            *("group_norm_silu", "group_norm_silu_vjp", "conv3x3 tf32x3", "conv3x3 tf32")
        ]

    def test_a_card_without_memory_says_so(self, seconds, monkeypatch):
        def full(device, megabytes):
            raise torch.cuda.OutOfMemoryError("tried to allocate 256 MiB")

        monkeypatch.setattr(device_checks, "copy_bandwidth", full)
        found = device_checks.measure_rates(CPU, set(), images=1)
        assert "256 MiB" in found["problem"]
        assert found["kernels"] == []


class TestReport:
    @pytest.fixture
    def gpu(self, monkeypatch):
        """A doctor that takes the CPU for a GPU, with few checks and no engine."""
        monkeypatch.setattr(doctor, "_cases", lambda: iter([("reverse-sde", {"method": "reverse-sde"}, "silu")]))
        engine = {"engine": "cuda", "case": "coup", "status": "ok", "detail": "errors", "culprit": "", "trials": []}
        monkeypatch.setattr(device_checks, "check_engine", lambda device: iter([dict(engine)]))
        kernel = {"kernel": "guided_step", "case": "5x3", "status": "ok", "error": 0.0, "bound": 0.0, "detail": ""}
        close = kernel | {"kernel": "conv3x3 ieee", "error": 1e-7, "bound": 4e-7}
        monkeypatch.setattr(device_checks, "check_kernels", lambda device: iter([kernel, close]))
        real = device_checks.measure_rates
        monkeypatch.setattr(device_checks, "measure_rates", lambda device, bad: real(device, bad, images=1, megabytes=1))
        return device_checks.check_device(CPU)

    def test_is_json_and_text(self, gpu):
        assert gpu["problems"] == []
        assert json.loads(json.dumps(gpu, allow_nan=False)) == gpu
        text = "\n".join(device_checks.text(gpu))
        assert "guided_step on cpu: 1 of 1 cases agree, bit for bit" in text
        for part in ("largest error 0.25 of its bound", "GB/s", "TFLOP/s"):
            assert part in text
        assert text.count("of the copy") == 3
        assert text.count("of the matrix product") == 3

    def test_a_mismatch_is_a_problem_of_the_doctors(self, gpu, monkeypatch):
        bad = gpu | {"problems": ["conv3x3 ieee on cuda:0: mismatch"]}
        monkeypatch.setattr(device_checks, "check_device", lambda device: bad)
        machine = doctor._machine()
        monkeypatch.setattr(doctor, "_machine", lambda: machine)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        # No GPU here to try the noise and the other engines on.
        noise, engines = doctor._check_noise, doctor._check_engines
        monkeypatch.setattr(doctor, "_check_noise", lambda device: noise(CPU))
        monkeypatch.setattr(doctor, "_check_engines", lambda device, progress: engines(CPU, progress))
        report = doctor.run()
        assert report["gpus"] == [bad]
        assert report["problems"] == bad["problems"]
        assert "PROBLEM  conv3x3 ieee on cuda:0: mismatch" in doctor.text(report)

    def test_problems_name_the_part(self, monkeypatch):
        bad = {"engine": "cuda", "case": "coup", "status": "mismatch", "detail": "errors", "culprit": "without 'graphs'"}
        wrong = {"kernel": "conv3x3 ieee", "case": "2x3", "status": "failed", "error": None, "bound": None, "detail": "raised"}
        monkeypatch.setattr(device_checks, "check_engine", lambda device: iter([bad | {"trials": []}]))
        monkeypatch.setattr(device_checks, "check_kernels", lambda device: iter([wrong]))
        monkeypatch.setattr(device_checks, "copy_bandwidth", lambda device, megabytes: 1 / 0)
        report = device_checks.check_device(CPU)
        assert report["problems"] == [
            "conv3x3 ieee on cpu, 2x3: failed, raised",
            "engine cuda on cpu, coup: mismatch, errors; without 'graphs'",
            "rates on cpu: ZeroDivisionError: division by zero",
        ]
        assert device_checks.text(report)

    def test_no_gpu_is_a_fact(self, monkeypatch):
        monkeypatch.setattr(doctor, "_cases", lambda: iter([("reverse-sde", {"method": "reverse-sde"}, "silu")]))
        report = doctor.run(device="cpu")
        assert report["gpus"] == []
        assert report["ok"]
        assert "not checked, since no CUDA device was looked at" in doctor.text(report)
