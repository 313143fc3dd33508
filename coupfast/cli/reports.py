"""Files that commands write beside what they do."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import coupfast
from coupfast.environment import machine, version
from coupfast_kernels.files import write_whole


def refuse_existing(paths: Sequence[Path], force: bool) -> None:
    """Before any work: what would be lost, and what could not be written."""
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{path} is a folder, not a file that could be written")
        if not force and path.exists():
            others = sum(other.exists() for other in paths) - 1
            more = f" (and {others} more)" if others else ""
            raise FileExistsError(f"{path} exists{more}; choose another place, or --force to replace")


def write_json(report: dict[str, Any], path: Path) -> None:
    write_whole(path, (json.dumps(report, indent=2) + "\n").encode())


def show(report: dict[str, Any], text: str, target: str | None) -> None:
    """A report as text, and as JSON in a file; with "-" as JSON only."""
    print(json.dumps(report, indent=2) if target == "-" else text)
    if target not in (None, "-"):
        write_json(report, Path(str(target)))


def command_line(argv: Sequence[str]) -> str:
    """What to type to do it again."""
    return shlex.join(["coupfast", *argv])


def environment(device: torch.device) -> dict[str, Any]:
    return {
        "coupfast": coupfast.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numpy", "torchsde", "safetensors")},
        **machine(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }
