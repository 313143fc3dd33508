"""The table of operations a step."""

import itertools

import launches
import pytest
import torch

from coupfast.doctor.gpu import QUICK_CASES, QUICK_CONFIGS
from coupfast_kernels import registry
from coupfast_kernels.convolution.gpu_tuning import trying


def test_fewer_in_every_row(capsys):
    assert launches.main(["--network", "tiny"]) == 0
    printed = capsys.readouterr().out
    assert "counted from graphs, not measured" in printed
    lines = [line.split("|") for line in printed.splitlines() if line.startswith("| ")]
    eager, flat, fused, graph = ((int(line[2]), int(line[3])) for line in lines[1:])
    assert eager[0] > flat[0] > fused[0] > graph[0] == 2
    assert flat[1] > fused[1] > graph[1] == 3
    # Noise by its definition alone is over 400 operations.
    assert eager[0] - fused[0] > 400


def test_norms_that_convolutions_apply_write_nothing(capsys):
    assert launches.main(["--network", "tiny", "--bytes"]) == 0
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    (flat, fused, inside) = ((float(line[2]), float(line[3])) for line in lines[1:])
    assert flat[0] > fused[0] > inside[0] and flat[1] > fused[1] > inside[1]


#: Predicted: what Triton takes for a kernel on a host that has a GPU, one after the other; nobody has measured it there.
KERNEL_SECONDS = 1.5


def test_a_quick_look_of_the_doctors_compiles_for_less_than_two_minutes():
    """By the number of kernels; those of the cases, and those of the engine's step and transpose of the shipped networks."""
    pytest.importorskip("triton", reason="Triton is not installed: what it would compile is NOT counted here")
    from machine_code import MachineCode

    program = launches.program("tiny", 2)
    steps = {
        program.step_index: lambda: program._step(True),
        program.step_back: lambda: program._transpose(True, rebuilds=False),
    }
    for work in steps.values():
        work()  # makes pieces and buffers
    counts = []
    for cases, configs in ((QUICK_CASES, QUICK_CONFIGS), (None, None)):
        with torch.no_grad(), trying(configs), MachineCode() as counted:
            for kernel in (kernel for kernel in registry.kernels() if kernel.device == "cuda"):
                for case in itertools.islice(kernel.checks(), cases):
                    case.make(torch.device("cpu")).run()
            for step, work in steps.items():
                step.zero_()
                work()
        counts.append(len(counted.found))
    quick, full = counts
    assert quick * KERNEL_SECONDS < 120 < full * KERNEL_SECONDS
