"""What can be chosen about the cuda engine beside its precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Options:
    """Parts of the engine that can be switched off, to find out which one is at fault.

    Attributes:
        compile: Compile every piece with PyTorch's compiler.
        graphs: Capture a step as a CUDA graph and replay it.
        triton: Use this project's convolutions and group norms where calibration chooses them.
    """

    compile: bool = True
    graphs: bool = True
    triton: bool = True

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Options:
        """From `engine_options`.

        Raises:
            ValueError: for an option that does not exist, or a value that is no bool.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name, value in (given or {}).items():
            if name not in known:
                raise ValueError(f"`engine_options` of the cuda engine are {', '.join(known)}; got {name!r}")
            if not isinstance(value, bool):
                raise ValueError(f"`engine_options[{name!r}]` is True or False, got {value!r}")
        return cls(**(given or {}))
