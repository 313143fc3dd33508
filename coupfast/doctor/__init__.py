"""What is installed, what runs here, and whether it computes what it should.

`installed` looks around; `shipped` checks noise and weights to the bit; `engines` runs every engine on a small case of every
method and solver, in float64 and float32, forwards and backwards, beside the definition; `kernels` compares every kernel of
`coupfast_kernels.registry` with its definition; `gpu` takes the CUDA engine through the shipped networks; `text` says it in
words.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from coupfast import environment
from coupfast.doctor.engines import EngineCase, by_engine, check_engines
from coupfast.doctor.gpu import check_gpu
from coupfast.doctor.installed import CORE_PACKAGES, FEATURES, cpu_kernels, feature, machine
from coupfast.doctor.kernels import check_kernels, is_bad
from coupfast.doctor.shipped import check_noise, check_weights
from coupfast.doctor.text import text

__all__ = ["run", "text"]


def run(
    *, device: torch.device | str | None = None, cases: Iterable[EngineCase] | None = None, progress: bool = False
) -> dict[str, Any]:
    """Look at the installation and check the noise, the shipped weights, every kernel and every engine.

    On a CPU it takes about 10 s of one core, and as much again at the first call, which compiles the C++ kernels; on a GPU,
    where most of the time goes into compiling, it is meant to take under two minutes.

    Args:
        device: Where engines and kernels are tried; None tries the CPU and every CUDA device.
        cases: On what engines are tried; None takes `engines.cases()`.
        progress: Show a progress bar.

    Returns:
        JSON-ready: `python`, `machine`, `packages`, `features`, `cpu_kernels`, `noise`, `weights`, `kernels`, `engines`,
        `parity`, `gpus`, `ok`, `problems` (one line each; empty if `ok`), `seconds`. Errors in `parity` are relative to the
        definition in float64, in the Euclidean norm. An engine that refuses a device or a dtype is no problem, except
        `eager`, which runs everywhere. `gpus` has a report of `gpu.check_gpu` for each CUDA device; to have none is no problem.
    """
    import coupfast

    started = time.perf_counter()
    if device is None:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(count))]
    else:
        devices = [torch.device(device)]
    noise = [check_noise(each) for each in devices]
    weights = check_weights()
    kernels = [row for each in devices for row in check_kernels(each)]
    parity = [row for each in devices for row in check_engines(each, cases, progress=progress)]
    gpus = [
        check_gpu(each, {row["kernel"] for row in kernels if row["device"] == str(each) and is_bad(row)})
        for each in devices
        if each.type == "cuda"
    ]
    problems = [
        *(f"noise on {row['device']}: {row['problem']}" for row in noise if row["problem"]),
        *(f"shipped weights, {row['file']}: {row['problem']}" for row in weights if row["problem"]),
        *(
            f"{row['kernel']} on {row['device']}, {row['case']}: {row['status']}, {row['detail']}"
            for row in kernels
            if is_bad(row)
        ),
        *(
            f"engine {row['engine']} on {row['device']}, {row['dtype']}, {row['case']}: {row['status']}, {row['detail']}"
            for row in parity
            if is_bad(row) or (row["status"] == "refused" and row["engine"] == "eager")
        ),
        *(problem for gpu in gpus for problem in gpu["problems"]),
    ]
    return {
        "coupfast": {"version": coupfast.__version__, "path": str(Path(coupfast.__file__).parent)},
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "machine": machine(),
        "packages": {name: environment.version(name) for name in CORE_PACKAGES},
        "features": [feature(*each) for each in FEATURES],
        "cpu_kernels": cpu_kernels(),
        "noise": noise,
        "weights": weights,
        "kernels": kernels,
        "engines": by_engine(parity),
        "parity": parity,
        "gpus": gpus,
        "ok": not problems,
        "problems": problems,
        "seconds": time.perf_counter() - started,
    }
