"""What a long benchmark has found so far, in a JSON file that it goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from timing import environment

from coupfast_kernels.files import write_whole


def load(path: Path | None, settings: dict[str, Any], **empty: Any) -> dict[str, Any]:
    """What is in the file; of a run that has found nothing yet, `empty`.

    Raises:
        SystemExit: if it was made with other settings.
    """
    if path is None or not path.exists():
        return {"settings": settings, "environment": environment(torch.device("cpu")), **empty}
    results = json.loads(path.read_text())
    if results["settings"] != settings:
        differing = {name for name in settings if results["settings"].get(name) != settings[name]}
        raise SystemExit(f"{path} was made with other options ({', '.join(sorted(differing))}): name another file")
    return results


def save(path: Path | None, results: dict[str, Any]) -> None:
    """Write all of it, if there is a file to write."""
    if path is not None:
        write_whole(path, (json.dumps(results, indent=1) + "\n").encode())
