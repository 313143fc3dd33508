"""`pytest bench/kernels` measures, although the project's tests run with benchmarks off."""

from collections.abc import Callable

import pytest
import torch

from bench.timing import device_name, timed
from coupfast.engine.rates import copy_bandwidth

LAUNCHES = 20  # between two events, so that a short kernel's time is not that of starting it


def pytest_configure(config: pytest.Config) -> None:
    asked = config.invocation_params.args
    if "--benchmark-disable" not in asked and hasattr(config.option, "benchmark_disable"):
        config.option.benchmark_disable = False


@pytest.fixture(params=["cpu", "cuda"], scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy."""
    return copy_bandwidth(device)


@pytest.fixture
def measure(benchmark, device: torch.device, bandwidth: float) -> Callable[..., None]:
    """`measure(function, bytes_moved=…)` times a function and states its rate as a share of a copy's, and of `flops` if given.

    The table's times include starting the kernel and waiting for it; the rate is taken on the device, from 20 launches.
    """

    def run(function: Callable[[], object], *, bytes_moved: int, flops: int | None = None) -> None:
        def and_wait() -> None:
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        benchmark.extra_info |= {
            "device": device_name(device),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "bytes_moved": bytes_moved,
        }
        benchmark(and_wait)
        if benchmark.disabled:
            return
        seconds = benchmark.stats.stats.median
        if device.type == "cuda":
            seconds = min(timed(lambda: [function() for _ in range(LAUNCHES)], device)[0] for _ in range(5)) / LAUNCHES
        benchmark.extra_info |= {
            "microseconds_on_device": 1e6 * seconds,
            "bytes_per_second": bytes_moved / seconds,
            "share_of_copy": bytes_moved / seconds / bandwidth,
        }
        if flops is not None:
            benchmark.extra_info |= {"flops": flops, "flops_per_second": flops / seconds}

    return run
