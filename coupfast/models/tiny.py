"""Networks whose weights ship inside the package: the pair "cifar10-tiny", a small score network and a WRN-16-2, and the
classifier "cifar10-tiny-silu", of another architecture."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from torch import nn

from coupfast.models import registry
from coupfast.models.checkpoints import CheckpointError, file_sha256, listed_sha256
from coupfast.models.from_file import network_from_file
from coupfast.models.registry import Config, Kind, Named

_CONFIGS: dict[Kind, dict[str, Config]] = {
    "score": {"cifar10-tiny": {"arch": "DDPMpp", "nf": 32, "ch_mult": [1, 2, 2], "num_res_blocks": 1}},
    "classifier": {
        "cifar10-tiny": {"arch": "WideResNet", "depth": 16, "widen_factor": 2},
        "cifar10-tiny-silu": {"arch": "DMWideResNet", "depth": 10, "width": 2, "activation": "silu"},
    },
}


class _Shipped:
    """The networks of one kind."""

    text = ""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def listed(self) -> Sequence[str]:
        return list(_CONFIGS[self.kind])

    def near(self, options: Mapping[str, Any]) -> Sequence[str]:
        return self.listed()

    def find(self, name: str, options: Mapping[str, Any]) -> Named | None:
        config = _CONFIGS[self.kind].get(name)
        if config is None:
            return None
        load = functools.partial(_load, self.kind, name, config)
        return registry.configured(self.kind, name, config, options, pretrained=load)


def _load(kind: Kind, name: str, config: Config) -> nn.Module:
    with shipped(f"{name}-{kind}.safetensors") as path:
        return network_from_file(path, kind, config=config)[0]


@contextmanager
def shipped(file: str) -> Iterator[Path]:
    """The path of a weight file of the package, after its SHA-256 has been compared with the list beside it."""
    folder = files("coupfast.models") / "weights"
    sums = listed_sha256((folder / "SHA256SUMS").read_text())
    with as_file(folder / file) as path:
        if (found := file_sha256(path)) != sums[file]:
            raise CheckpointError(f"{path} is damaged: SHA-256 {found}, expected {sums[file]}; install coupfast again")
        yield path


for _kind in _CONFIGS:
    registry.register(_Shipped(_kind))
