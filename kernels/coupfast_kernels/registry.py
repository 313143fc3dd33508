"""Which kernels there are, each with the cases on which it is compared with its definition, and timed.

A kernel is a folder of this package with a `cases.py`, or one file of it, that calls `register`: `kernels` finds both. One from
elsewhere calls `register` when it is imported. `coupfast doctor`, `bench/kernels`, `bench/kernel_report.py` and
`tests/test_kernels.py` go through `kernels()` and spell none.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import pkgutil
from collections.abc import Callable, Iterable, Mapping

import torch

import coupfast_kernels
from coupfast_kernels.parity import Agreement

Results = tuple[torch.Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One case on one device: inputs are made, nothing has run.

    Attributes:
        run: The kernel's results, float32.
        definition: (dtype) → what they should be, computed in float32 or in float64.
        agreements: For each result, how near it has to be.
        bytes_moved: The least that have to move, for what memory bounds.
        flop: 2 a multiply-add, for what arithmetic bounds.
        others: What else is worth timing beside the definition and the kernel, by name; `Case.others` has the names.
    """

    run: Callable[[], Results]
    definition: Callable[[torch.dtype], Results]
    agreements: tuple[Agreement, ...]
    bytes_moved: int | None = None
    flop: int | None = None
    others: Mapping[str, Callable[[], object]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and inputs with a name, to be made on any device."""

    name: str
    make: Callable[[torch.device], Trial]
    others: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What is compared and timed under one name.

    Attributes:
        name: Unique.
        device: "cpu" or "cuda", where the kernel runs. Elsewhere its operator is its definition, if it has one.
        checks: Cases for a comparison: small, and every path of the kernel among them.
        timed: (images) → cases for a measurement on a batch of so many; the first is one that fills a device of its kind.
        missing: Why the kernel cannot run on this machine; None if it can.
        interpret: Lets the CPU's operator run the kernel in Triton's interpreter from now on, for a process of its own.
        launches: What becomes machine code of its own, by name: each launches the kernel once, on CPU tensors of which only
            shapes and formats count. For who records a launch and compiles it, without a GPU; nothing can run like this.
    """

    name: str
    device: str
    checks: Callable[[], Iterable[Case]]
    timed: Callable[[int], Iterable[Case]]
    missing: Callable[[], str | None] = lambda: None
    interpret: Callable[[], None] | None = None
    launches: Callable[[], Mapping[str, Callable[[], object]]] = dict


_kernels: dict[str, Kernel] = {}


def register(kernel: Kernel) -> Kernel:
    """Let everything that goes through `kernels()` know this one.

    Raises:
        ValueError: for a name that another one has, or a device that is neither "cpu" nor "cuda".
    """
    if kernel.device not in ("cpu", "cuda"):
        raise ValueError(f"a kernel runs on 'cpu' or 'cuda', {kernel.name!r} says {kernel.device!r}")
    if _kernels.setdefault(kernel.name, kernel) is not kernel:
        raise ValueError(f"there is a kernel {kernel.name!r} already; names are unique, choose another")
    return kernel


def kernels() -> tuple[Kernel, ...]:
    """All of this package, and those that were registered from elsewhere."""
    _import_package()
    return tuple(_kernels.values())


@functools.cache
def _import_package() -> None:
    for module in pkgutil.iter_modules(coupfast_kernels.__path__):
        path = f"{coupfast_kernels.__name__}.{module.name}"
        if not module.ispkg:
            importlib.import_module(path)
        elif importlib.util.find_spec(f"{path}.cases") is not None:
            importlib.import_module(f"{path}.cases")
