"""How a worker comes by its defense: from networks by name, from a name of somebody else's, or from a module that is there."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import nn

from coupfast.models.zoo import load_classifier, load_score
from coupfast.naming import is_from_file, resolve
from coupfast.purify import PurifiedClassifier, Purifier
from coupfast.settings import Settings

#: A defense as it is given: a module from images in [0, 1] to logits, a function that makes one on a device, or the name of
#: either, "package.module:NAME" or "file.py:NAME".
Given: TypeAlias = nn.Module | Callable[[str], nn.Module] | str
Builder: TypeAlias = Callable[[str], nn.Module]


@dataclasses.dataclass(frozen=True)
class Networks:
    """Builds a classifier behind a purifier, from names of networks; see `load_score` and `load_classifier`.

    Attributes:
        settings: Of the purification; None for the classifier alone.
        guide, guide_weights: The classifier that the method follows; None: the one that classifies.
    """

    score: str
    score_weights: str | None
    classifier: str
    classifier_weights: str | None
    activation: str | None
    settings: Settings | None
    guide: str | None = None
    guide_weights: str | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """With the method's name, where its class is in a file, which no other process could import."""
        if self.settings is None or not is_from_file(type(self.settings.method)):
            return super().__reduce_ex__(protocol)
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return _rebuild, ({**fields, "settings": self.settings.to_dict()},)

    def __call__(self, device: str) -> nn.Module:
        classifier = load_classifier(
            self.classifier, weights=self.classifier_weights, device=device, activation=self.activation
        )
        if self.settings is None:
            return classifier
        score = load_score(self.score, weights=self.score_weights, device=device)
        guide = classifier
        if self.guide is not None:
            guide = load_classifier(self.guide, weights=self.guide_weights, device=device, activation=self.activation)
        return PurifiedClassifier(Purifier(score, guide, settings=self.settings), classifier)


def _rebuild(fields: dict[str, Any]) -> Networks:
    return Networks(**{**fields, "settings": Settings.from_dict(fields["settings"])})


@dataclasses.dataclass(frozen=True)
class Named:
    """Builds what a name stands for: a module, or what makes one, from a device if it asks for one."""

    name: str

    def __call__(self, device: str) -> nn.Module:
        found = resolve(self.name, option="defense")
        if not isinstance(found, nn.Module):
            if not callable(found):
                what = type(found).__name__
                raise ValueError(f"`defense`={self.name!r} is a {what}, and an nn.Module or what makes one is needed")
            found = self._made(found, device)
        if not isinstance(found, nn.Module):
            raise ValueError(f"`defense`={self.name!r} makes a {type(found).__name__}, and an nn.Module is needed")
        return found.to(device)

    def _made(self, make: Callable[..., Any], device: str) -> Any:
        parameters = list(inspect.signature(make).parameters.values())
        first = [p for p in parameters[:1] if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        try:
            if first:
                return make(device)
            return make(device=device) if any(p.name == "device" for p in parameters) else make()
        except Exception as error:  # whatever somebody else's code does
            raise ValueError(f"`defense`={self.name!r} raises {type(error).__name__}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Module:
    """Builds a module that is there, on the device that it is on."""

    module: nn.Module

    def __call__(self, device: str) -> nn.Module:
        return self.module.to(device)


def builder(defense: Given) -> Builder:
    """What makes the given defense on a device.

    Raises:
        TypeError: if it is none.
    """
    if isinstance(defense, nn.Module):
        return Module(defense)
    if isinstance(defense, str):
        return Named(defense)
    if not callable(defense) or isinstance(defense, type):
        what = f"the class {defense.__name__}" if isinstance(defense, type) else f"a {type(defense).__name__}"
        raise TypeError(
            f"`defense` is an nn.Module from images in [0, 1] to logits, a function that makes one on a device, or the name of "
            f"one, file.py:build; got {what}"
        )
    return defense


def check_sendable(make: Any) -> None:
    """ValueError if what makes a worker cannot be sent to another process."""
    try:
        pickle.Pickler(_Nowhere()).dump(make)
    except Exception as error:  # PicklingError, AttributeError, TypeError, or a module's own
        raise ValueError(
            f"several workers are processes of their own, and this defense or attack cannot be sent to one "
            f"({type(error).__name__}: {error}): no lambda, function inside a function or open file can be. Put what builds it "
            f"into a module or a file and name it (file.py:build), or use one worker"
        ) from error


class _Nowhere:
    def write(self, data: Any) -> int:
        return len(data)
