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
from coupfast.doctor.compilations import Compilations
from coupfast.doctor.engines import EngineCase, by_engine, check_engines
from coupfast.doctor.gpu import QUICK_CASES, check_gpu
from coupfast.doctor.installed import CORE_PACKAGES, FEATURES, cpu_kernels, feature, machine
from coupfast.doctor.kernels import check_kernels, is_bad
from coupfast.doctor.shipped import check_noise, check_weights
from coupfast.doctor.text import text
from coupfast.engines import ENGINES

__all__ = ["run", "text"]


def run(
    *,
    device: torch.device | str | None = None,
    full: bool = False,
    cases: Iterable[EngineCase] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Look at the installation and check the noise, the shipped weights, every kernel and every engine.

    On a CPU it takes about 10 s of one core, and as much again at the first call, which compiles the C++ kernels. On a GPU most
    of the time goes into compiling. A quick look takes one case of each kernel, and engine "cuda" on the shipped networks
    without PyTorch's compiler: less than two minutes where nothing is compiled yet, by the number of kernels that it compiles
    (a prediction). A full one takes every case and method, with the compiler, and kernels' rates: several times as long.

    Args:
        device: Where engines and kernels are tried; None tries the CPU and every CUDA device.
        full: On a GPU everything; a CPU always gets it.
        cases: On what engines are tried; None takes `engines.cases()`.
        progress: Show a progress bar.

    Returns:
        JSON-ready: `python`, `machine`, `packages`, `features`, `cpu_kernels`, `noise`, `weights`, `kernels`, `engines`,
        `parity`, `gpus`, `full`, `compilations` (kernels that Triton had to compile, and their seconds), `ok`, `problems`
        (one line each; empty if `ok`), `seconds`. Errors in `parity` are relative to the
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
    weights = check_weights()
    with Compilations() as compilations:
        noise = [check_noise(each) for each in devices]
        kernels: list[dict[str, Any]] = []
        parity: list[dict[str, Any]] = []
        gpus: list[dict[str, Any]] = []
        for each in devices:
            quick = each.type == "cuda" and not full
            kernels += check_kernels(each, most=QUICK_CASES if quick else None)
            # Engine "cuda" is then tried on the shipped networks alone: each shape has kernels to compile.
            engines = [engine for engine in ENGINES if not (quick and engine == "cuda")]
            parity += check_engines(each, cases, engines=engines, progress=progress)
            if each.type == "cuda":
                unsound = {row["kernel"] for row in kernels if row["device"] == str(each) and is_bad(row)}
                gpus.append(check_gpu(each, unsound, full=full))
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
        "full": full,
        "compilations": {"kernels": compilations.count, "seconds": compilations.seconds},
        "ok": not problems,
        "problems": problems,
        "seconds": time.perf_counter() - started,
    }
