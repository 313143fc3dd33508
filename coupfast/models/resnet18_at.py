"""The adversarially trained CIFAR-10 ResNet-18 that the `pyautoattack` wheel ships, architecture and weights."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from coupfast.models import registry
from coupfast.models.checkpoints import CheckpointError
from coupfast.models.defaults import plain_defaults
from coupfast.models.from_file import fill_named
from coupfast.models.registry import Config, Family, Named

NAME = "resnet18-at"


def _examples() -> Any:
    if importlib.util.find_spec("pyautoattack") is None:
        raise ImportError(f'`{NAME}` comes with pyautoattack: pip install "coupfast[demo]"')
    return importlib.import_module("pyautoattack.examples.resnet")


def resnet18(num_classes: int = 10) -> nn.Module:
    """The network with initial weights: images in [0, 1] of 32 x 32 pixels → logits.

    Raises:
        ImportError: if pyautoattack, which has its code, is not installed.
    """
    resnet = _examples()
    return resnet.ResNet(resnet.BasicBlock, [2, 2, 2, 2], num_classes=num_classes)


def _recognise(state: Mapping[str, Tensor]) -> Config | None:
    first, last = state.get("layer1.0.conv1.weight"), state.get("linear.weight")
    if first is None or last is None or tuple(first.shape) != (64, 64, 3, 3) or last.ndim != 2 or last.shape[1] != 512:
        return None
    groups = [f"layer{group}" for group in range(1, 5)]
    two_blocks = (f"{group}.1.conv2.weight" in state and f"{group}.2.conv1.weight" not in state for group in groups)
    # Pre-activation ResNets have these names, too, but no batch norm after the first convolution.
    if "bn1.weight" not in state or not all(two_blocks):
        return None
    return {"num_classes": last.shape[0]}


class _Shipped:
    """The name, and the weights in the wheel."""

    kind: registry.Kind = "classifier"
    text = ""

    def listed(self) -> Sequence[str]:
        return [NAME]

    def near(self, options: Mapping[str, Any]) -> Sequence[str]:
        return [NAME]

    def find(self, name: str, options: Mapping[str, Any]) -> Named | None:
        if name != NAME:
            return None
        if options.get("activation") not in (None, "relu"):
            raise CheckpointError(f"`activation` is for other networks; {NAME} has ReLU, got {options['activation']!r}")
        return registry.configured("classifier", name, {"arch": "ResNet18"}, {}, pretrained=_load)


def _load() -> nn.Module:
    with plain_defaults():
        path = Path(_examples().__file__).with_name("model_test.pt")
        return fill_named(Named(NAME, "classifier", lambda seed: resnet18()), path)


registry.register(Family("ResNet18", "classifier", resnet18, recognise=_recognise, fixed={"activation": "relu"}))
registry.register(_Shipped())
