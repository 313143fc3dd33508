"""Every kernel of `coupfast_kernels.registry` beside its definition, and what else its cases name: parity first, then times.

    python -m pytest bench/kernels -k "guided_step_cpu and kernel"     one of them, and the kernel alone
    python -m pytest bench/kernels -p my_module                        with the kernels that `my_module` registers

Bytes moved are the least possible, so that the share of copy bandwidth says what a perfect kernel could still gain.
"""

import pytest
import torch

from bench.timing import fastest_algorithms
from coupfast.engine.precision import strict_float32
from coupfast_kernels import parity, registry

BATCHES = {"cpu": (1, 8), "cuda": (1, 64)}  # images of the paper's networks
DEFINITION, KERNEL = "definition", "kernel"


def _measurements():
    """Kernel, case, implementation and device of each; a GPU's definitions on one image on the CPU, too."""
    for kernel in registry.kernels():
        for device in dict.fromkeys(("cpu", kernel.device)):
            for images in BATCHES[device] if device == kernel.device else (1,):
                for case in kernel.timed(images):
                    there = (KERNEL, *case.others) if device == kernel.device else ()
                    for implementation in (DEFINITION, *there):
                        name = f"{kernel.name}, {case.name}, {implementation}, {device}"
                        yield pytest.param(kernel, case, implementation, torch.device(device), id=name)


@pytest.mark.parametrize(("kernel", "case", "implementation", "device"), list(_measurements()))
def test_kernel(kernel, case, implementation, device, measure, benchmark):
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if device.type == kernel.device and (reason := kernel.missing()) is not None:
        pytest.skip(reason)
    # PyTorch's fastest is the opponent: of what float32 allows, which strict mode sees to.
    with torch.no_grad(), strict_float32(device.type), fastest_algorithms():
        trial = case.make(device)
        comparison = parity.compare(trial)
        assert comparison.agrees, f"{kernel.name}, {case.name}: {comparison}"
        own = {DEFINITION: lambda: trial.definition(torch.float32), KERNEL: trial.run}
        function = own.get(implementation) or trial.others[implementation]
        benchmark.group = f"{kernel.name}, {case.name}, {device.type}"
        measure(function, device, bytes_moved=trial.bytes_moved, flop=trial.flop)
