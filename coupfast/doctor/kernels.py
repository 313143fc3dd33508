"""Every kernel beside its definition on the same device, and how fast it is there; `coupfast_kernels.registry` has the list.

Sound kernels are timed, and their rates stated as shares of what the same device copies and multiplies.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from coupfast.engine.precision import strict_float32
from coupfast.engine.rates import copy_bandwidth, device_seconds, matmul_rate
from coupfast.environment import one_line
from coupfast_kernels import parity, registry
from coupfast_kernels.registry import Kernel

_REPEATS = 5

Row = dict[str, Any]


def of_device(device: torch.device) -> list[Kernel]:
    """The kernels that are made for devices of this kind and can run here."""
    return [kernel for kernel in registry.kernels() if kernel.device == device.type and kernel.missing() is None]


def check_kernels(
    device: torch.device, kernels: Iterable[Kernel] | None = None, *, most: int | None = None
) -> Iterator[Row]:
    """Kernels (None: all that are made for such a device) against their definitions on the same device.

    Args:
        most: So many cases of each, the first ones; None takes all.

    Yields:
        `kernel`, `device`, `case`, `status` ("ok", "mismatch" or "failed"), `error`, `bound`, `detail`: see `parity.Agreement`.
    """
    with torch.no_grad(), strict_float32(device.type):
        for kernel in of_device(device) if kernels is None else kernels:
            for case in itertools.islice(kernel.checks(), most):
                row: Row = {"kernel": kernel.name, "device": str(device), "case": case.name}
                try:
                    found = parity.compare(case.make(device))
                except Exception as failure:  # whatever a kernel does wrong is what this report is for
                    yield row | {"status": "failed", "error": None, "bound": None, "detail": one_line(failure)}
                else:
                    status = "ok" if found.agrees else "mismatch"
                    yield row | {"status": status, "error": found.error, "bound": found.bound, "detail": str(found)}


def is_bad(row: Row) -> bool:
    return row["status"] in ("mismatch", "failed")


def measure_rates(
    device: torch.device,
    unsound: set[str],
    *,
    kernels: Iterable[Kernel] | None = None,
    images: int = 64,
    megabytes: int = 256,
) -> Row:
    """What the card copies and multiplies, and the kernels' share of it, in one run.

    Args:
        unsound: Kernels that get no time, since they compute something else.
        kernels: Those to time; None takes what runs on such a device.
        images: Of a batch of the paper's networks (the guided step takes 64 times as many).
        megabytes: Of the copy.

    Returns:
        `copy_bytes_per_second`, `matmul_flop_per_second`, `problem` (None, or what stopped the measurement) and `kernels`: rows
        with `kernel`, `shape`, `seconds` (median), `bytes` that have to move and `bytes_per_second`, or `flop` and
        `flop_per_second`, and `share` of the card's rate.
    """
    found: Row = {"copy_bytes_per_second": None, "matmul_flop_per_second": None, "kernels": [], "problem": None}
    try:
        with torch.no_grad(), strict_float32(device.type):
            found["copy_bytes_per_second"] = bandwidth = copy_bandwidth(device, megabytes=megabytes)
            found["matmul_flop_per_second"] = product = matmul_rate(device)
            for kernel in of_device(device) if kernels is None else kernels:
                if kernel.name in unsound:
                    continue
                case = next(iter(kernel.timed(images)))
                trial = case.make(device)
                trial.run()
                seconds = statistics.median(device_seconds(trial.run, device) for _ in range(_REPEATS))
                row = {"kernel": kernel.name, "shape": case.name, "seconds": seconds, "bytes": None, "flop": None}
                row |= dict.fromkeys(("bytes_per_second", "flop_per_second"))
                kind, amount, rate = "flop", trial.flop, product
                if amount is None:
                    kind, amount, rate = "bytes", trial.bytes_moved, bandwidth
                if amount is None:
                    raise ValueError(f"{kernel.name}, {case.name}: a timed case has `bytes_moved` or `flop`")
                row |= {kind: amount, f"{kind}_per_second": amount / seconds, "share": amount / seconds / rate}
                found["kernels"].append(row)
    except Exception as error:  # a card without memory left, or one that a kernel has stopped
        found["problem"] = one_line(error)
    return found
