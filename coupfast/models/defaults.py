"""The surroundings in which networks are made: what a process has set as torch's defaults must not change what is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
