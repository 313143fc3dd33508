"""Every kernel that is registered agrees with its definition; one from elsewhere is known to all that goes through the list."""

import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from test_noise import INTERPRETED, ROOT, run_interpreted

from coupfast_kernels import native, parity, registry

KERNELS = registry.kernels()


@pytest.mark.parametrize(
    ("kernel", "case"),
    [pytest.param(kernel, case, id=f"{kernel.name}, {case.name}") for kernel in KERNELS for case in kernel.checks()],
)
def test_agrees_with_its_definition_on_the_cpu(kernel, case):
    """The CPU's kernels themselves; of the GPU's the operators, which are their definitions here."""
    if kernel.device == "cpu" and (reason := kernel.missing()) is not None:
        pytest.skip(reason)
    comparison = parity.compare(case.make(torch.device("cpu")))
    assert comparison.agrees, str(comparison)


def test_every_folder_has_its_kernels():
    folders = {path.parent.name for path in Path(registry.__file__).parent.glob("*/definition.py")}
    known = {case.make.__module__.split(".")[1] for kernel in KERNELS for case in kernel.checks()}
    assert folders == known


def test_every_gpu_kernel_can_be_interpreted_and_compiled():
    assert all(kernel.interpret is not None and kernel.launches() for kernel in KERNELS if kernel.device == "cuda")


def test_timed_cases_say_what_they_move_or_multiply():
    for kernel in KERNELS:
        first = next(iter(kernel.timed(1)))
        if kernel.device == "cpu" and native.unavailable() is not None:
            continue
        trial = first.make(torch.device("cpu"))
        assert (trial.bytes_moved is None) != (trial.flop is None), kernel.name
        assert set(first.others) <= set(trial.others)


def test_names_and_devices_are_checked():
    with pytest.raises(ValueError, match="there is a kernel 'guided_step' already"):
        registry.register(registry.Kernel("guided_step", "cuda", lambda: [], lambda images: []))
    with pytest.raises(ValueError, match="runs on 'cpu' or 'cuda', 'mine' says 'tpu'"):
        registry.register(registry.Kernel("mine", "tpu", lambda: [], lambda images: []))


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_kernels_in_the_interpreter():
    run_interpreted("tests/test_kernels.py")


if INTERPRETED:

    class TestInterpreted:
        @pytest.mark.parametrize("kernel", [k for k in KERNELS if k.interpret is not None], ids=lambda kernel: kernel.name)
        def test_agrees_with_its_definition(self, kernel):
            """On two of its cases, since the interpreter is slow: what else can be interpreted has files of its own."""
            kernel.interpret()
            first, *_, last = kernel.checks()
            for case in (first, last):
                comparison = parity.compare(case.make(torch.device("cpu")))
                assert comparison.agrees, f"{case.name}: {comparison}"


# A kernel as somebody adds one, in a folder of their own: definition, kernel, cases.
DOUBLED = """
import torch
from coupfast_kernels.inputs import by, normals
from coupfast_kernels.parity import BITS
from coupfast_kernels.registry import Case, Kernel, Trial, register

FACTOR = 2.0

def doubled_ref(x):
    return 2.0 * x

def doubled(x):
    return x + (FACTOR - 1.0) * x

def case(shape):
    def make(device):
        (x,) = normals(device, shape, 1)
        return Trial(
            lambda: (doubled(x),), lambda dtype: (doubled_ref(x.to(dtype)),), (BITS,), bytes_moved=2 * x.nbytes
        )
    return Case(by(shape), make)

register(Kernel("doubled", "cpu", lambda: [case((2, 3)), case((5,))], lambda images: [case((images, 3))]))
"""


def test_cudnn_may_take_its_fastest_beside_ours(monkeypatch):
    """In float32 all the same: strict mode, which allows repeatable algorithms alone, is what kernels are compared under."""
    from bench.kernels.test_kernels import KERNEL, test_kernel

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    cudnn, seen = torch.backends.cudnn, []

    def measure(function, device, **more):
        seen.append((cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision))

    (kernel,) = (kernel for kernel in registry.kernels() if kernel.name == "conv3x3 ieee")
    case = next(iter(kernel.checks()))
    on_cpu = dataclasses.replace(kernel, device="cpu", missing=lambda: None)
    test_kernel(on_cpu, case, KERNEL, torch.device("cpu"), measure, types.SimpleNamespace())
    assert seen == [(True, False, "ieee")]
    assert not cudnn.benchmark


def test_cudnn_is_an_opponent_in_both_formats():
    """Some of its algorithms exist in one of them alone."""
    (kernel,) = (kernel for kernel in registry.kernels() if kernel.name == "conv3x3 winograd")
    assert all(set(case.others) == {"pytorch, channels last", "pytorch, contiguous"} for case in kernel.timed(1))
    trial = next(iter(kernel.checks())).make(torch.device("cpu"))
    (wanted,) = trial.definition(torch.float64)
    for name, layout in (("channels last", torch.channels_last), ("contiguous", torch.contiguous_format)):
        found = trial.others[f"pytorch, {name}"]()
        assert found.is_contiguous(memory_format=layout)
        assert parity.relative_error(found, wanted) < 1e-6


class TestFromElsewhere:
    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "doubled.py").write_text(DOUBLED)
        return tmp_path

    def run(self, folder, *command):
        paths = os.pathsep.join((str(folder), str(ROOT), str(ROOT / "kernels")))
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def test_the_doctor_knows_it(self, folder):
        program = """
import json, doubled
from coupfast import doctor
cases = [("reverse-sde", {"method": "reverse-sde"}, "silu")]
report = doctor.run(device="cpu", cases=cases)
assert "doubled on cpu: 2 of 2 cases agree, bit for bit" in doctor.text(report)
doubled.FACTOR = 3.0
print(json.dumps(doctor.run(device="cpu", cases=cases)["problems"]))
"""
        code, output = self.run(folder, "-c", program)
        assert code == 0, output
        assert json.loads(output.splitlines()[-1]) == [
            "doubled on cpu, 2x3: mismatch, 6 elements with other bits",
            "doubled on cpu, 5: mismatch, 5 elements with other bits",
        ]

    def test_the_benchmarks_and_this_file_know_it(self, folder):
        pytest_ = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "doubled", "-k", "doubled")
        code, output = self.run(folder, *pytest_, "bench/kernels", "--benchmark-disable")
        assert code == 0, output
        assert "4 passed" in output  # definition and kernel, for one image and for eight
        code, output = self.run(folder, *pytest_, "tests/test_kernels.py")
        assert code == 0, output
        assert "2 passed" in output
