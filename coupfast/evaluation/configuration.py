"""All that a run's results depend on, as JSON has it: a ledger keeps it, and no run goes on under another."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import coupfast
import coupfast_kernels
from coupfast.environment import machine_key, sources_sha256, version
from coupfast.evaluation.attacks import Attack
from coupfast_kernels import native


def configuration(
    spec: Mapping[str, Any],
    stages: Mapping[str, Attack],
    defense: Mapping[str, Any],
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    device: str,
    start: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A run's.

    Args:
        spec: What was asked for.
        stages: Attacks by name.
        defense: What it is; see `Metered.describe`.
        x: Images in [0, 1].
        y: Labels.
        device: "cpu" or "cuda".
        start: Of which run's images attacks begin, and the images' hash; None: at the clean ones.
    """
    each = [images_sha256(image)[:16] for image in x]
    return {
        "spec": dict(spec),
        "stages": {stage: attack.to_dict() for stage, attack in stages.items()},
        "defense": dict(defense),
        "images": {
            "count": len(x),
            "shape": list(x.shape[1:]),
            "x_sha256": images_sha256(x),
            "sha256": each,
            "labels": y.tolist(),
        },
        **({} if start is None else {"start": dict(start)}),
        "environment": environment(torch.device(device)),
    }


def environment(device: torch.device) -> dict[str, Any]:
    """What can change the bits of a result besides what a user chooses."""
    packages = {name: version(name) for name in ("torch", "numpy", "pyautoattack")}
    return {
        "coupfast": coupfast.__version__,
        "sources_sha256": sources_sha256(coupfast, coupfast_kernels),
        **{name: found for name, found in packages.items() if found is not None},
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernels_isa": os.environ.get("COUPFAST_CPU_ISA") or native.isas()[0],
        "device": device.type,
        **({"gpu": machine_key(device)} if device.type == "cuda" else {}),
    }


class OtherConfiguration(ValueError):
    """A run was started with another configuration.

    Args:
        folder: The run's.
        began, found: The configurations.

    Attributes:
        software: Whether the software is all that differs: what is done of the run is what this one would have begun with.
    """

    def __init__(self, folder: Path, began: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        super().__init__(f"the run in {folder} was started with another configuration: {difference(began, found)}")
        self.software = not difference({**began, "environment": None}, {**found, "environment": None})


def difference(wanted: Any, found: Any, name: str = "") -> str:
    """In words, what two configurations do not have in common; empty if they are equal."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        parts = [
            difference(wanted.get(key), found.get(key), f"{name}.{key}" if name else str(key))
            for key in sorted({*wanted, *found}, key=str)
        ]
        return "; ".join(part for part in parts if part)
    if wanted == found:
        return ""
    was, now = (text if len(text := json.dumps(value)) <= 80 else f"{text[:77]}..." for value in (wanted, found))
    return f"{name} was {was} and is {now}"


def images_sha256(x: torch.Tensor) -> str:
    """SHA-256 of images' values, little-endian, in the order of their axes."""
    array = np.ascontiguousarray(x.cpu().numpy())
    return hashlib.sha256(array.astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()


def image_keys(digests: Sequence[str]) -> list[tuple[str, int]]:
    """What images are known by in every run: the hash of each one's values, and how many equal ones came before."""
    seen: collections.Counter[str] = collections.Counter()
    found = []
    for digest in digests:
        found.append((digest, seen[digest]))
        seen[digest] += 1
    return found
