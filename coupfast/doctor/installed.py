"""What is installed: the machine, packages, optional features, and whether the C++ kernels can be built."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from coupfast import environment
from coupfast.engine.memory import available_bytes
from coupfast_kernels import native

CORE_PACKAGES = ("torch", "numpy", "safetensors", "torchsde", "tqdm", "triton")

#: What optional packages are for: (what one can do with them, distributions, importable modules, the extra they come with).
FEATURES: tuple[tuple[str, tuple[str, ...], tuple[str, ...], str], ...] = (
    ("image files in and out", ("pillow",), ("PIL",), "demo"),
    ("the 20 test images 'cifar10-20'", ("foolbox",), ("foolbox",), "demo"),
    ("attacks; the classifier 'resnet18-at'", ("pyautoattack",), ("pyautoattack",), "demo"),
    ("the demo's picture", ("matplotlib",), ("matplotlib",), "demo"),
    ("torchvision's CIFAR-10: 'cifar10', 'cifar10-512'", ("torchvision",), ("torchvision",), "zoo"),
    (
        "RobustBench classifiers by name",
        ("robustbench", "pyautoattack", "torchvision", "timm", "setuptools<81"),
        ("robustbench", "pyautoattack", "torchvision", "timm", "pkg_resources"),
        "zoo",
    ),
    ("diffusers score networks", ("diffusers",), ("diffusers",), "zoo"),
    ("kernel benchmarks", ("pytest", "pytest-benchmark"), ("pytest", "pytest_benchmark"), "bench"),
)


def machine() -> dict[str, Any]:
    return {
        **environment.machine(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "free_bytes": available_bytes(torch.device("cpu")),
        "torch_threads": torch.get_num_threads(),
        "torch_cuda": torch.version.cuda,
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
    }


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
    }


def feature(name: str, distributions: tuple[str, ...], modules: tuple[str, ...], extra: str) -> dict[str, Any]:
    # find_spec does not run a package: some of these import for seconds.
    missing = [name for name, module in zip(distributions, modules, strict=True) if importlib.util.find_spec(module) is None]
    versions = {name.partition("<")[0]: environment.version(name.partition("<")[0]) for name in distributions}
    return {
        "feature": name,
        "installed": not missing,
        "missing": missing,
        "versions": versions,
        "install": f'pip install "coupfast[{extra}]"',
    }


def cpu_kernels() -> dict[str, Any]:
    """The C++ kernels as built for this CPU; or why there are none."""
    reason = native.unavailable()
    return {"problem": reason} if reason else {"problem": None, **native.describe()}
