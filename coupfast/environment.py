"""What a result was made with and on: the parts that records of it share."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import coupfast_kernels


def version(distribution: str) -> str | None:
    """Version of an installed distribution; None if it is not installed. torch's has the build in it (+cpu, +cu130)."""
    if distribution == "torch":
        return torch.__version__  # its metadata may leave that out
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def sources_sha256(*packages: ModuleType) -> str:
    """SHA-256 of the Python and C++ files of packages, names and contents."""
    digest = hashlib.sha256()
    for package in packages:
        for folder in sorted(map(Path, package.__path__)):
            for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".cpp", ".hpp", ".h")):
                digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def machine() -> dict[str, Any]:
    """`system`, `processor` (its model, where the system tells) and `cores`, those that this process may use."""
    return {
        "system": platform.platform(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def processor() -> str:
    """The processor's model; its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a processor that does not say its name
        return platform.processor() or platform.machine()


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the NVIDIA driver serves, (major, minor); None where there is no driver."""
    version = ctypes.c_int()
    try:
        error = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if error else (version.value // 1000, version.value % 1000 // 10)


def machine_key(device: torch.device | str) -> dict[str, Any]:
    """All that a device's timings and bits may depend on: GPU, compute capability, driver, versions, the kernels' source."""
    device = torch.device(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, capability = properties.name, f"{properties.major}.{properties.minor}"
    else:
        name, capability = platform.processor() or platform.machine(), torch.backends.cpu.get_cpu_capability()
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "device": name,
        "capability": capability,
        "driver": driver() if device.type == "cuda" else None,
        "torch": torch.__version__,
        "triton": triton_version,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "kernels": sources_sha256(coupfast_kernels),
    }


def driver() -> str | None:
    """The kernel driver's version line, else the newest CUDA that the driver serves; None if neither can be read."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0].strip()
    except (OSError, IndexError):
        newest = driver_cuda()
        return None if newest is None else "CUDA {}.{}".format(*newest)


def one_line(error: BaseException) -> str:
    """An exception as a record keeps it: its type and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
