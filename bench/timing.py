"""How the benchmarks measure: interleaved repeats on one clock, medians with spread, peak memory, and the machine.

Two timings are comparable only if they were taken in one run, turn by turn: the speed of a machine drifts by more than most
differences that are worth measuring. So contenders take turns, each repeat starts with another one, and a ratio is the
median of the repeats' ratios.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import math
import os
import pathlib
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch.autograd.profiler import profile
from tqdm import tqdm

from coupfast.environment import machine_key, processor, version

Result = TypeVar("Result")


def timed(function: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Seconds that one call takes (on CUDA between two events, so without the host's launch-ahead), and its result."""
    times, result = timed_twice(function, device)
    return times.seconds, result


@contextlib.contextmanager
def fastest_algorithms() -> Iterator[None]:
    """cuDNN tries all its algorithms and takes the fastest, also within strict mode, which allows repeatable ones alone: what
    PyTorch can do at best, as an opponent."""
    cudnn: Any = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = True, False
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


@dataclasses.dataclass(frozen=True)
class Times:
    """One call on both clocks.

    Attributes:
        seconds: Until its result is there; on CUDA between two events.
        host: On CUDA, until the call returned, with work still in the queue or not; where it is as much as `seconds`, starting
            kernels is what takes the time. None on a CPU, where it is the same.
    """

    seconds: float
    host: float | None


def timed_twice(function: Callable[[], Result], device: torch.device) -> tuple[Times, Result]:
    """What one call takes on the device and on the host, and its result."""
    if device.type != "cuda":
        start = time.perf_counter()
        result = function()
        return Times(time.perf_counter() - start, None), result
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    first.record()
    result = function()
    last.record()
    host = time.perf_counter() - start
    last.synchronize()
    return Times(first.elapsed_time(last) / 1e3, host), result


def rotated(x: torch.Tensor, count: int = 4) -> Iterator[torch.Tensor]:
    """`x`, then its images moved by some columns, over and over: no call finds in a cache what the last one read."""
    width = x.shape[-1]
    return itertools.cycle([x.roll(step * width // count, dims=-1) if step else x for step in range(count)])


@dataclasses.dataclass(frozen=True)
class Launches:
    """What one call starts: `kernels` that ran on the device, and the host's `calls` that started them (a graph is one)."""

    kernels: int
    calls: int


def launches(function: Callable[[], object], device: torch.device) -> Launches | None:
    """Counted by PyTorch's profiler; None without a CUDA device, where nothing is launched."""
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as record:
        function()
        torch.cuda.synchronize(device)
    return count_launches(record.events())


def count_launches(events: Iterable[Any]) -> Launches:
    """Of a profiler's events, by `name` and `device_type`. Copies and fills of memory are no kernels."""
    kernels = calls = 0
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels += not event.name.startswith(("Memcpy", "Memset"))
        else:
            calls += event.name.startswith(("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cuGraphLaunch"))
    return Launches(kernels, calls)


def interleave(contenders: Mapping[str, Callable[[], Result]], repeats: int) -> dict[str, list[Result]]:
    """Every contender's results, `repeats` of each, taken in turns; the order rotates. Contenders warm up before."""
    names = list(contenders)
    results: dict[str, list[Result]] = {name: [] for name in names}
    with tqdm(total=repeats * len(names), unit="run", leave=False, disable=None) as progress:
        for repeat in range(repeats):
            turn = repeat % len(names) if names else 0
            for name in names[turn:] + names[:turn]:
                progress.set_description(name)
                results[name].append(contenders[name]())
                progress.update()
    return results


@dataclasses.dataclass(frozen=True)
class Summary:
    """Repeated timings: their median and their interquartile range, in the same unit."""

    median: float
    spread: float

    @staticmethod
    def of(samples: Sequence[float]) -> Summary:
        low, median, high = np.percentile(np.asarray(samples, dtype=np.float64), [25, 50, 75])
        return Summary(float(median), float(high - low))


def times_faster(baseline: Sequence[float] | None, samples: Sequence[float] | None) -> float | None:
    """How many times faster than the baseline: the median of the repeats' ratios; None if either was not timed."""
    if not baseline or not samples:
        return None
    return float(np.median(np.asarray(baseline, dtype=np.float64) / np.asarray(samples, dtype=np.float64)))


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that PyTorch's allocator had handed out at once during a call, above what it had handed out before.

    On the CPU from the profiler's record of every allocation, which costs time and memory of its own: take times elsewhere,
    and few steps. What NumPy or an extension allocates for itself is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()  # or what an earlier record saw allocated would be freed, and counted, in this one
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its own start and end otherwise
    record = profile(use_cpu=True, profile_memory=True, acc_events=True)
    # Its table of operations is not wanted, and takes ten times as long to make as the record itself.
    record._parse_kineto_results = lambda *_, **__: []  # type: ignore[method-assign]
    with record:
        function()
    assert record.kineto_results is not None
    changes = [event for event in record.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    running = np.cumsum([event.nbytes() for event in changes if event.device_type() == torch.autograd.DeviceType.CPU])
    return int(running.max(initial=0))


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge a timing, and nothing that names the machine or a place on it."""
    commit = _git("rev-parse", "HEAD")
    return {
        "device": device_name(device),
        "cpu": processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "logical_cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "gpu": machine_key(device) if device.type == "cuda" else None,
        "torchsde": version("torchsde"),
        "numpy": np.__version__,
        "coupfast": version("coupfast"),
        "commit": commit,
        "uncommitted_changes": None if commit is None else bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def finite_or_none(value: Any) -> Any:
    """`value` for JSON, which has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: finite_or_none(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [finite_or_none(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _git(*command: str) -> str | None:
    root = pathlib.Path(__file__).resolve().parent.parent
    try:
        found = subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
