"""The surroundings in which networks are made: torch's defaults and modes in a process must not change what is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def plain_defaults() -> Iterator[None]:
    """float32 on the CPU, outside of inference mode, whatever `set_default_dtype`, `set_default_device` and callers say."""
    dtype = torch.get_default_dtype()
    # Tensors made in inference mode can never take part in a gradient, not even as constants.
    with torch.inference_mode(False), torch.device("cpu"):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def without_inference_tensors(model: nn.Module) -> nn.Module:
    """The module, with ordinary tensors in the place of weights that were made in inference mode: those allow no gradient."""
    made: dict[int, Tensor] = {}  # tied weights stay tied

    def ordinary(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            value = tensor.clone()
            made[id(tensor)] = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
        return made[id(tensor)]

    with torch.inference_mode(False), torch.no_grad():
        for module in model.modules():
            both: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in both:
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.is_inference():
                        tensors[name] = ordinary(tensor)
    return model
