"""How many kernels a piece starts, run operation by operation and compiled: counted, no GPU is asked.

An operation of this project or of the library counts as one, whichever way it is reached; what it starts inside itself is the
same in both. But for a bias: cuDNN leaves it to a pass of its own, which a compiler puts into one of its own kernels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from coupfast.engine.cuda.flat import VIEWS

aten = torch.ops.aten

#: In the compiler's code: its own kernels for GPUs and CPUs, the library's products and convolutions, and other operations.
_LAUNCH = re.compile(r"\b(?:triton_\w+\.run|cpp_\w+|extern_kernels\.\w+|torch\.ops\.[\w.]+)\(")


def launches_of_code(source: str) -> int:
    """Of the compiler's code for a piece."""
    _, call, body = source.partition("def call(")
    if not call:
        raise ValueError("the compiler's code has no function `call`, which this version of coupfast counts launches in")
    return len(_LAUNCH.findall(re.split(r"^(?:def|class|if) ", body, maxsplit=1, flags=re.MULTILINE)[0]))


def launches_of_operations(module: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> int:
    """Of a module's operations one by one, copies into another format included; nothing is computed."""
    with FakeTensorMode() as mode, torch.no_grad(), _Count() as count:
        module(*(mode.from_tensor(tensor) for tensor in inputs))
    return count.launches


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, func: torch._ops.OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in VIEWS and func.namespace != "prim":  # which ask for a tensor's device
            biased = func is aten.convolution.default and args[2] is not None
            self.launches += 2 if biased else 1
        return func(*args, **(kwargs or {}))
