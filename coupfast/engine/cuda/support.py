"""Whether a GPU, its driver, PyTorch and Triton are up to the cuda engine."""

from __future__ import annotations

import functools
import re

import torch

from coupfast.environment import driver_cuda, one_line
from coupfast_kernels.noise import seed_tensor, standard_normal, standard_normal_ref

LEAST_CAPABILITY = (8, 0)  # what the kernels are compiled for in the tests begins here
LEAST_TRITON = (3, 5)


def unavailable(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why this engine cannot run networks of this kind here, or None."""
    if device.type != "cuda" or dtype != torch.float32:
        return f"the cuda engine runs float32 on a GPU, not {dtype} on {device.type}"
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA (for ROCm?), which the cuda engine's graphs and kernels are made for"
    driver = driver_cuda()
    if driver is not None and driver[0] < int(torch.version.cuda.split(".")[0]):
        return (
            f"the NVIDIA driver serves CUDA {driver[0]}.{driver[1]}, and this PyTorch is built with {torch.version.cuda}: "
            f"update the driver, or install a PyTorch for CUDA {driver[0]}"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}; the cuda engine's "
            f"kernels are made and checked for {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} and later"
        )
    return _triton_unavailable() or _kernels_unavailable(device.index)


def launch_device(index: int | None) -> torch.device:
    return torch.device("cuda") if index is None else torch.device("cuda", index)


@functools.cache
def _kernels_unavailable(index: int | None) -> str | None:
    """Whether one kernel of Triton's can be built and launched: where there is no C compiler (as in images that only run
    programs), its launcher cannot."""
    device = launch_device(index)
    ids = torch.zeros(1, dtype=torch.int64, device=device)
    try:
        found = standard_normal((1, 4), seed=seed_tensor(0, device), ids=ids, draw=ids, step=ids[0]).cpu()
    except Exception as error:
        return (
            f"a Triton kernel cannot be built or launched here ({one_line(error)}); it needs a C compiler (gcc) and Python's "
            f"headers beside a working driver"
        )
    ids = ids.cpu()
    if not torch.equal(found, standard_normal_ref((1, 4), seed=0, ids=ids, draw=ids, step=0)):
        return "a Triton kernel gives wrong numbers here; `coupfast doctor` compares them all"
    return None


def _triton_unavailable() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"the cuda engine needs Triton ({error}); PyTorch's builds for CUDA on Linux bring it"
    version = triton.__version__
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < LEAST_TRITON:
        return f"the cuda engine needs Triton {LEAST_TRITON[0]}.{LEAST_TRITON[1]} or later, found {version}"
    return None
