"""Classifiers by their RobustBench names: RobustBench has their code and fetches their weights."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from coupfast.cache import cache_directory
from coupfast.models import robustbench_import
from coupfast.models.defaults import plain_defaults
from coupfast.models.registry import Kind, Named, register

#: Constants of normalisation that its models build in and its own files lack for some.
_MAY_LACK = frozenset(f"{parent}{name}" for parent in ("", "normalize.") for name in ("mu", "sigma", "mean", "std"))


class RobustBenchNames:
    """CIFAR-10 models; the option `threat_model` chooses among "Linf" (if not given), "L2" and "corruptions"."""

    kind: Kind = "classifier"
    text = "a RobustBench name"

    def listed(self) -> Sequence[str]:
        return []

    def near(self, options: Mapping[str, Any]) -> Sequence[str]:
        return list(self._models(options.get("threat_model") or "Linf"))

    def find(self, name: str, options: Mapping[str, Any]) -> Named | None:
        """The model of a name.

        Raises:
            ImportError: if RobustBench, or what it needs, is missing.
            ValueError: if the threat model is unknown.
        """
        threat_model = options.get("threat_model") or "Linf"
        models = self._models(threat_model)
        if name not in models:
            return None
        if options.get("activation") is not None:
            raise ValueError(f"`activation` is for DMWideResNet files; RobustBench's {name} has its own")

        def build(seed: int) -> nn.Module:
            with plain_defaults(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return models[name]["model"]()

        return Named(name, "classifier", build, pretrained=lambda: _download(name, threat_model), may_lack=_MAY_LACK)

    def _models(self, threat_model: str) -> Mapping[str, Any]:
        robustbench_import.import_robustbench()
        enums = importlib.import_module("robustbench.model_zoo.enums")
        dicts = importlib.import_module("robustbench.model_zoo").model_dicts
        threats = {threat.value: threat for threat in enums.ThreatModel}
        if threat_model not in threats:
            raise ValueError(f"`threat_model` is one of {sorted(threats)}, got {threat_model!r}")
        return dicts[enums.BenchmarkDataset.cifar_10].get(threats[threat_model], {})


def _download(name: str, threat_model: str) -> nn.Module:
    load_model = importlib.import_module("robustbench.utils").load_model
    folder = cache_directory("robustbench")  # its own default is ./models of the current folder
    try:
        with plain_defaults():
            return load_model(name, model_dir=str(folder), dataset="cifar10", threat_model=threat_model)
    except Exception as error:
        path = folder / "cifar10" / threat_model / f"{name}.pt"
        if path.exists():
            raise
        # What its downloaders raise has many types, and names neither the model nor the place.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(
            f"RobustBench could not download the weights of {name!r} ({reason}); put its file at {path}, or give `weights=` "
            "the file"
        ) from error


register(RobustBenchNames())
