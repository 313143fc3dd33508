"""`pytest bench/kernels` measures, although the project's tests run with benchmarks off."""

import functools
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


@functools.cache
def bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy."""
    return copy_bandwidth(device)


@pytest.fixture
def measure(benchmark) -> Callable[..., None]:
    """`measure(function, device, bytes_moved=…, flop=…)` times a function and states its rates, and the share of a copy's.

    The table's times include starting the kernel and waiting for it; the rates are taken on the device, from 20 launches.
    """

    def run(
        function: Callable[[], object], device: torch.device, *, bytes_moved: int | None = None, flop: int | None = None
    ) -> None:
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
        benchmark.extra_info |= {"microseconds_on_device": 1e6 * seconds}
        if bytes_moved is not None:
            rate = bytes_moved / seconds
            benchmark.extra_info |= {"bytes_per_second": rate, "share_of_copy": rate / bandwidth(device)}
        if flop is not None:
            benchmark.extra_info |= {"flops": flop, "flops_per_second": flop / seconds}

    return run
