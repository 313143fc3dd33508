"""How a launch of `conv3x3` is cut: what there is to choose from, and the choice by time, once a shape and device."""

from __future__ import annotations

import contextlib
import functools
import logging
import statistics
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import torch

try:
    import triton
except ImportError:  # Triton exists for Linux only
    triton = None

logger = logging.getLogger(__name__)


class Config(NamedTuple):
    """How a launch is cut: a program makes BLOCK_M rows × BLOCK_N channels, BLOCK_K terms a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


#: Of sums that are chains of multiply-adds, for which it does not matter how many terms a pass has.
_OF_CHAINS = (
    Config(128, 128, 16, 8, 4),
    Config(128, 64, 16, 4, 4),
    Config(64, 128, 16, 4, 4),
    Config(128, 32, 16, 4, 4),
    Config(64, 64, 16, 2, 4),  # with four warps ptxas takes 96 registers where 112 are needed
    Config(32, 32, 32, 4, 3),
    Config(128, 16, 32, 4, 3),
    Config(16, 32, 32, 4, 3),
    Config(16, 16, 32, 2, 3),
)

#: Of 32 terms a pass, where the tensor cores read weights as they were packed.
_OF_32_TERMS = (
    Config(128, 128, 32, 8, 3),
    Config(128, 64, 32, 4, 3),
    Config(64, 128, 32, 4, 3),
    Config(128, 32, 32, 4, 3),
    Config(64, 64, 32, 4, 3),
    Config(32, 32, 32, 4, 3),
    Config(128, 16, 32, 4, 3),
    Config(16, 32, 32, 4, 3),
    Config(16, 16, 32, 2, 3),
)


def _narrow(configs: tuple[Config, ...]) -> tuple[Config, ...]:
    """Those for results that are too small for tiles of 128 channels."""
    return tuple(config for config in configs if config.block_n < 128)


#: What the tuner chooses from, by algorithm: large tiles, then one for three channels out, then two for small maps of few
#: images. The tensor cores' sums depend on BLOCK_K, so an algorithm has one there; chains do not depend on it.
CONFIGS: dict[str, tuple[Config, ...]] = {
    "ieee": _OF_CHAINS,
    "ieee-split": _narrow(_OF_CHAINS),
    # Of 32 terms a pass the halves of both factors do not fit into sm_80's registers.
    "tf32x3": (
        Config(128, 128, 16, 8, 4),
        Config(128, 64, 16, 4, 4),
        Config(64, 128, 16, 4, 4),
        Config(128, 32, 16, 4, 4),
        Config(64, 64, 16, 4, 4),
        Config(32, 32, 16, 4, 4),
        Config(128, 16, 16, 2, 4),
        Config(16, 32, 16, 2, 4),
        Config(16, 16, 16, 2, 4),
    ),
    "tf32": _OF_32_TERMS,
    # The largest keeps 56 bytes a thread in memory on sm_80, nothing on the others.
    "tf32x3-halves": _OF_32_TERMS,
    "tf32x3-halves-split": _narrow(_OF_32_TERMS),
    # Rows are tiles of outputs; a run of a sum is two blocks of terms.
    "winograd": (
        Config(128, 128, 16, 8, 3),
        Config(128, 64, 16, 8, 3),
        Config(64, 128, 16, 8, 3),
        Config(64, 64, 16, 4, 3),
        Config(64, 32, 16, 4, 3),
        Config(32, 32, 16, 4, 3),
        Config(128, 16, 16, 4, 3),
        Config(16, 32, 16, 2, 3),
        Config(16, 16, 16, 2, 3),
    ),
    # A run of a sum is one block. The largest keeps 56 bytes a thread in memory on sm_80, nothing on the others.
    "winograd-tf32x3-halves": (
        Config(128, 128, 32, 8, 3),
        Config(128, 64, 32, 8, 3),
        Config(64, 64, 32, 4, 3),
        Config(64, 32, 32, 4, 3),
        Config(32, 32, 32, 4, 3),
        Config(128, 16, 32, 4, 3),
        Config(16, 32, 32, 4, 3),
        Config(16, 16, 32, 2, 3),
    ),
}
LARGEST_BLOCK_M = max(config.block_m for configs in CONFIGS.values() for config in configs)

WARM_UPS, REPEATS, LAUNCHES = 2, 5, 4  # of the tuner: before, medians of, launches between two events

_chosen: dict[Hashable, Config] = {}  # by shape, algorithm and device
_one_tuner = threading.Lock()
_most: int | None = None  # configs that are tried


@contextlib.contextmanager
def trying(most: int | None) -> Iterator[None]:
    """Try that many configs of a shape and no more, where a result counts and not its time; None tries all.

    Each takes seconds to compile. For all threads: a backward pass on a GPU runs in one of its own.
    """
    global _most
    before, _most = _most, most
    try:
        yield
    finally:
        _most = before


def tried() -> int | None:
    """How many configs of a shape are tried now; None: all."""
    return _most


def fastest(
    key: Hashable, rows: int, out_channels: int, algorithm: str, launch: Callable[[Config], None]
) -> Config:
    """The config for a key, of those worth timing on the current device; timed once a process."""
    return tuned((key, _most), candidates(rows, out_channels, algorithm)[:_most], launch, _seconds)


def candidates(rows: int, out_channels: int, algorithm: str) -> tuple[Config, ...]:
    """The configs worth timing: those without a block of twice the whole result's size, or more."""
    return tuple(
        config
        for config in CONFIGS[algorithm]
        if config.block_m < 2 * max(rows, 16) and config.block_n < 2 * max(out_channels, 16)
    )


def tuned(
    key: Hashable, configs: Sequence[Config], launch: Callable[[Config], None], seconds: Callable[[Callable[[], None]], float]
) -> Config:
    """The config for a key: `choose` at the first call, what it gave at later ones.

    Raises:
        RuntimeError: if the key is new while a CUDA graph is captured: nothing can be timed then.
    """
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"conv3x3 has not been tuned for {key}, and a CUDA graph is being captured, in which nothing can be timed; "
                "warm up first: run the same call once before the capture"
            )
        with _one_tuner:
            if key not in _chosen:
                _chosen[key] = choose(configs, launch, seconds)
                logger.info("conv3x3 %s takes %s", key, _chosen[key])
    return _chosen[key]


def choose(
    configs: Sequence[Config], launch: Callable[[Config], None], seconds: Callable[[Callable[[], None]], float]
) -> Config:
    """The config whose launch takes the least time; the first of equals.

    Args:
        configs: To choose from, at least one.
        launch: Launches with a config.
        seconds: Times a call.

    Raises:
        RuntimeError: if no config runs; the message has every reason. One that does not is logged as a warning and left out,
            for instance since it wants more shared memory than the device has. Running out of device memory is no such reason.
    """
    times: dict[Config, float] = {}
    reasons: dict[Config, str] = {}
    for config in configs:
        try:
            times[config] = seconds(functools.partial(launch, config))
        except torch.OutOfMemoryError:
            raise
        # What Triton cannot build or place; from its C++ parts and the driver come RuntimeErrors.
        except (_triton_error(), RuntimeError) as error:
            reasons[config] = f"{type(error).__name__}: {error}"
            logger.warning("conv3x3 leaves out %s: %s", config, reasons[config])
    if not times:
        found = "\n".join(f"  {config}: {reason}" for config, reason in reasons.items())
        raise RuntimeError(f"conv3x3: none of {len(reasons)} configs runs on this device; use another engine. Found:\n{found}")
    return min(times, key=times.__getitem__)


def _triton_error() -> type[Exception]:
    return RuntimeError if triton is None else triton.TritonError


def _seconds(launch: Callable[[], None]) -> float:
    """Median time of a launch on the current device's current stream."""
    for _ in range(WARM_UPS):
        launch()
    times = []
    for _ in range(REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(LAUNCHES):
            launch()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / LAUNCHES)
    return statistics.median(times)
