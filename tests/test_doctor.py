import dataclasses
import json
import shutil

import pytest
import torch

from coupfast import doctor
from coupfast.doctor import engines, installed, shipped
from coupfast.engine import eager
from coupfast.engines import ENGINES
from coupfast_kernels import native
from coupfast_kernels.guided_step import guided_step_ref
from coupfast_kernels.parity import relative_error

ONE_CASE = [("reverse-sde", {"method": "reverse-sde"}, "silu")]


@pytest.fixture(scope="module")
def report():
    return doctor.run(device="cpu")


def test_everything_agrees_here(report):
    assert report["problems"] == []
    assert report["ok"]
    eager_rows = [row for row in report["parity"] if row["engine"] == "eager"]
    assert {row["status"] for row in eager_rows} == {"ok"}
    assert {row["dtype"] for row in eager_rows} == {"float32", "float64"}
    cases = {row["case"] for row in eager_rows}
    for method in ("coup", "reverse-sde", "diffpure"):
        for solver in ("euler-maruyama", "probability-flow"):
            assert f"{method}, {solver}" in cases
    assert {"coup, ReLU classifier", "coup, detached guidance", "coup, two steps, clipped image"} <= cases
    assert {"gdmp", "ld-sde", "one-step"} <= cases
    assert [row["problem"] for row in report["weights"]] == [None, None, None]


def test_bounds_are_tight_enough_to_mean_something(report):
    for row in report["parity"]:
        if row["status"] == "ok":
            eps = torch.finfo(getattr(torch, row["dtype"])).eps
            assert row["forward_bound"] < 100 * eps
            assert row["gradient_bound"] < 2000 * eps


def test_guidance_shows_in_the_cases():
    """Leaving out the guidance, or its Hessian, must exceed the float32 bounds a hundredfold."""
    for activation in ("silu", "relu"):
        networks = engines._small_networks(activation, torch.device("cpu"))
        x, direction = engines._example(torch.device("cpu"))
        full, detached, without = (
            engines._definition(networks, options, x.double(), direction)
            for options in ({}, {"guidance_gradient": "detached"}, {"guidance_scale": 0.0})
        )
        assert relative_error(without[0], full[0]) > 1e-4
        assert relative_error(detached[1], full[1]) > 1e-3


def test_report_is_json_and_text(report):
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    text = doctor.text(report)
    for part in ("torch", "Python", "C++ kernels for", "engine eager on cpu, float64", "known answers", "All checks passed"):
        assert part in text
    features = {feature["feature"]: feature for feature in report["features"]}
    assert features["image files in and out"]["installed"]
    for feature in report["features"]:
        assert feature["installed"] == (not feature["missing"])
        assert feature["install"].startswith("pip install")


def test_a_wrong_engine_is_found(monkeypatch):
    def prepare(score, classifier, table, example, **options):
        # One part in 10⁵ of the noise's coefficient: about 100 times the rounding of float32.
        wrong = dataclasses.replace(table, d=table.d * (1 + 1e-5))
        return eager.prepare(score, classifier, wrong, example, **options)

    monkeypatch.setitem(ENGINES, "wrong", prepare)
    found = doctor.run(device="cpu", cases=ONE_CASE)
    assert not found["ok"]
    assert [problem.split(",")[0] for problem in found["problems"]] == ["engine wrong on cpu"] * 2
    assert all("mismatch" in problem and "bounds" in problem for problem in found["problems"])
    assert "2 problems found" in doctor.text(found)


def test_a_wrong_transpose_is_found(monkeypatch):
    class Program(eager.EagerProgram):
        def step_vjp(self, k, x_k, saved, v, *, more=None):
            return guided_step_ref(super().step_vjp(k, x_k, saved, v, more=more), 1e-4 * v, None, (1.0, 1.0, 0.0, 0.0))

    def prepare(score, classifier, table, example, *, differentiate_guidance=True):
        return Program(score, None, table, example, differentiate_guidance)

    monkeypatch.setitem(ENGINES, "wrong", prepare)
    rows = [row for row in doctor.run(device="cpu", cases=ONE_CASE)["parity"] if row["engine"] == "wrong"]
    assert [row["status"] for row in rows] == ["mismatch"] * 2
    assert all(row["forward_error"] <= row["forward_bound"] for row in rows)


def test_engines_that_refuse_break_or_give_nan(monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("needs a GPU of compute capability 8.0")

    class Broken(eager.EagerProgram):
        def step(self, k, x_k, noise, keep="nothing", *, more=None):
            if keep == "activations":  # not while memory is accounted
                return super().step(k, x_k, noise, keep, more=more)
            raise IndexError("no such tile")

    def breaks(score, classifier, table, example, **options):
        program = eager.prepare(score, classifier, table, example, **options)
        memory = program.memory(1)
        program.__class__ = Broken
        program.memory = lambda batch: memory
        program.step_vjp = None
        return program

    class Nan(eager.EagerProgram):
        def step(self, *arguments, **options):
            x, saved = super().step(*arguments, **options)
            return x * float("nan"), saved

    def nan(score, classifier, table, example, **options):
        program = eager.prepare(score, classifier, table, example, **options)
        program.__class__ = Nan
        return program

    def stops(score, classifier, table, example, **options):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    for name, prepare in (("refuses", refuse), ("breaks", breaks), ("nan", nan), ("stops", stops)):
        monkeypatch.setitem(ENGINES, name, prepare)
    found = doctor.run(device="cpu", cases=ONE_CASE)
    statuses = {row["engine"]: row["status"] for row in found["parity"]}
    cpu = "refused" if native.unavailable() else "ok"
    refused = {"cpu": cpu, "cuda": "refused", "refuses": "refused"}
    assert statuses == {"eager": "ok", "breaks": "failed", "nan": "failed", "stops": "failed"} | refused
    assert not found["ok"]
    assert not any("refuses" in problem for problem in found["problems"])
    assert "engine refuses on cpu, float64: does not run here (RuntimeError: needs a GPU" in doctor.text(found)


def test_an_engine_of_one_dtype_is_no_fault(monkeypatch):
    def prepare(score, classifier, table, example, **options):
        if example.dtype == torch.float64:
            raise ValueError("it has 32 bits: this many")
        return eager.prepare(score, classifier, table, example, **options)

    monkeypatch.setitem(ENGINES, "single", prepare)
    found = doctor.run(device="cpu", cases=ONE_CASE)
    assert found["ok"]
    text = doctor.text(found)
    assert "engine single on cpu, float64: float32 only, it has 32 bits: this many\n" in text
    assert "engine single on cpu, float32: 1 of 1 cases agree" in text
    if native.unavailable() is None:
        assert "engine cpu on cpu, float64: float32 only, the cpu engine runs float32" in text
        assert "engine cpu on cpu, float64: does not run here" not in text


def test_eager_must_run(monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("no")

    monkeypatch.setitem(ENGINES, "eager", refuse)
    assert not doctor.run(device="cpu", cases=ONE_CASE)["ok"]


def test_other_noise_is_found(monkeypatch):
    assert shipped.check_noise(torch.device("cpu"))["problem"] is None
    monkeypatch.setattr(shipped, "_normals", lambda device: torch.zeros(4))
    assert "SHA-256" in shipped.check_noise(torch.device("cpu"))["problem"]
    monkeypatch.setattr(shipped, "philox_4x32_10_ref", lambda counter, key: counter)
    assert "Random123" in shipped.check_noise(torch.device("cpu"))["problem"]
    assert not doctor.run(device="cpu", cases=ONE_CASE)["ok"]


def test_damaged_weights_are_found(monkeypatch, tmp_path):
    shutil.copytree(shipped.files("coupfast.models") / "weights", tmp_path / "weights")
    monkeypatch.setattr(shipped, "files", lambda package: tmp_path)
    assert [row["problem"] for row in shipped.check_weights()] == [None, None, None]
    classifier, score, _ = sorted((tmp_path / "weights").glob("*.safetensors"))
    content = bytearray(score.read_bytes())
    content[-1] ^= 1
    score.write_bytes(content)
    classifier.rename(classifier.with_name("other.safetensors"))
    found = {row["file"]: row["problem"] for row in shipped.check_weights() if row["problem"]}
    assert {file: problem.split(":")[0].split(";")[0] for file, problem in found.items()} == {
        score.name: "damaged",
        classifier.name: "missing",
        "other.safetensors": "not in SHA256SUMS",
    }
    (tmp_path / "weights" / "SHA256SUMS").unlink()
    assert "cannot be read" in shipped.check_weights()[0]["problem"]


def test_features_that_are_missing():
    feature = installed.feature("nothing", ("no-such-package<3", "torch"), ("no_such_module", "torch"), "demo")
    assert not feature["installed"]
    assert feature["missing"] == ["no-such-package<3"]
    assert feature["versions"]["no-such-package"] is None
    assert feature["install"] == 'pip install "coupfast[demo]"'


def test_kernels_that_cannot_be_built_are_named(monkeypatch):
    monkeypatch.setattr(installed.native, "unavailable", lambda isa=None: "no compiler in this test")
    assert installed.cpu_kernels() == {"problem": "no compiler in this test"}
