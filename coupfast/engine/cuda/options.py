"""What can be chosen about the cuda engine beside its precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Options:
    """Parts of the engine that can be switched off, to find out which one is at fault, or on where the engine would not.

    Attributes:
        compile: Compile pieces with PyTorch's compiler. "auto": those of which it starts at most three quarters of the kernels
            that their operations start.
        graphs: Capture a step as a CUDA graph and replay it.
        triton: Use this project's convolutions and group norms where calibration chooses them.
        beside: Run guidance beside the score network, on a second stream of the captured step. "auto": with up to four images
            at a time, which leave most of a GPU idle.
    """

    compile: bool | Literal["auto"] = "auto"
    graphs: bool = True
    triton: bool = True
    beside: bool | Literal["auto"] = "auto"

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Options:
        """From `engine_options`.

        Raises:
            ValueError: for an option that does not exist, a value that it cannot have, or options that contradict each other.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        for name, value in (given or {}).items():
            if name not in defaults:
                raise ValueError(f"`engine_options` of the cuda engine are {', '.join(defaults)}; got {name!r}")
            decides = defaults[name] == "auto"
            if not isinstance(value, bool) and not (decides and value == "auto"):
                values = "True, False or 'auto'" if decides else "True or False"
                raise ValueError(f"`engine_options[{name!r}]` is {values}, got {value!r}")
        options = cls(**(given or {}))
        if options.beside is True and not options.graphs:
            raise ValueError("`engine_options['beside']` is about captured steps: it needs 'graphs', which is False")
        return options
