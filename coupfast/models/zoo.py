"""Networks by name, file or module: frozen, in eval mode, ready for a purifier.

Small CIFAR-10 weights ship inside the package. Nothing is downloaded, except by RobustBench for its own names.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coupfast.cache import cache_directory
from coupfast.models.checkpoints import (
    CheckpointError,
    build,
    classifier_from_file,
    file_sha256,
    listed_sha256,
    load_state,
    read_classifier_state,
    read_torch,
    score_from_file,
)
from coupfast.models.ddpmpp import DDPMpp
from coupfast.models.diffusers_unet import DiffusersScore
from coupfast.models.dm_wide_resnet import CIFAR10_MEAN, CIFAR10_STD

_TINY_SCORE = {"arch": "DDPMpp", "nf": 32, "ch_mult": [1, 2, 2], "num_res_blocks": 1}
_SCORES: dict[str, dict[str, Any]] = {"cifar10-tiny": _TINY_SCORE, "cifar10-ddpmpp-deep": {"arch": "DDPMpp"}}

_CLASSIFIERS: dict[str, dict[str, Any]] = {
    "cifar10-tiny": {"arch": "WideResNet", "depth": 16, "widen_factor": 2},
    "wrn-28-10": {"arch": "WideResNet", "depth": 28, "widen_factor": 10},
    "wrn-70-16": {"arch": "WideResNet", "depth": 70, "widen_factor": 16},
    "dm-wrn-28-10": {"arch": "DMWideResNet", "depth": 28, "width": 10},
    "dm-wrn-70-16": {"arch": "DMWideResNet", "depth": 70, "width": 16},
    # DiffPure's own two checkpoints, under DiffPure's names.
    "wrn-70-16-dropout": {
        "arch": "WideResNet",
        "depth": 70,
        "widen_factor": 16,
        "mean": CIFAR10_MEAN,
        "std": CIFAR10_STD,
    },
    "wideresnet-70-16": {"arch": "DMWideResNet", "depth": 70, "width": 16, "activation": "silu"},
}
_RESNET18_AT = "resnet18-at"
_WRN_NAME = re.compile(r"(dm-)?wrn-(\d+)-(\d+)")

_SHIPPED_SCORE = {"cifar10-tiny": "cifar10-tiny-score.safetensors"}
_SHIPPED_CLASSIFIER = {"cifar10-tiny": "cifar10-tiny-classifier.safetensors"}


def score_names() -> list[str]:
    """The names that `load_score` knows."""
    return sorted(_SCORES)


def classifier_names() -> list[str]:
    """The names that `load_classifier` knows by itself; wrn-D-W and dm-wrn-D-W exist for other depths and widths too."""
    return sorted([*_CLASSIFIERS, _RESNET18_AT])


def needs_weights(name: str) -> bool:
    """Whether `load_score` or `load_classifier` knows an architecture by this name and the package has no weights for it."""
    known = name in _SCORES or _classifier_config(name, None) is not None
    return known and name not in _SHIPPED_SCORE and name not in _SHIPPED_CLASSIFIER


def load_score(
    source: str | Path | nn.Module,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    weights: str | Path | None = None,
    seed: int = 0,
) -> nn.Module:
    """A score network: (x_k, 999 t) → eps_hat, frozen and in eval mode.

    Args:
        source: One of

            * ``"cifar10-tiny"``: 1.3 M parameters, shipped with the package;
            * ``"cifar10-ddpmpp-deep"``: `cifar10_ddpmpp_deep_continuous` of Score SDE, which needs `weights`;
            * the path of a safetensors file of `convert_score_checkpoint`, or of a score_sde checkpoint of
              `cifar10_ddpmpp_deep_continuous`;
            * a `diffusers.UNet2DModel` (wrapped in `DiffusersScore`);
            * any other module with ``forward(x, labels)``. A module is frozen as it is, not copied.
        device: Where the network goes; None leaves it (new networks: the CPU).
        dtype: What its weights are cast to; None leaves them.
        weights: For a name: the path of its weights, or ``"random"``. None takes those of the package.
        seed: Fixes random weights. They are drawn at ordinary scale, so that eps_hat is of order one.

    Returns:
        The network in eval mode, no parameter requiring a gradient.

    Raises:
        ValueError: if a name is unknown (the message gives the nearest ones), or needs `weights`.
        FileNotFoundError: if `weights` is no file.
        CheckpointError: if a file is damaged or does not fit.
        TypeError: if a module cannot be called as a score network.
    """
    if isinstance(source, nn.Module):
        _refuse_weights(weights, "a module has its own")
        model = DiffusersScore(source) if _is_diffusers_unet(source) else source
        _check_call(model, 2, "a score network has forward(x, labels)")
    elif str(source) in _SCORES:
        name = str(source)
        config = _SCORES[name]
        if weights == "random":
            model = _random(config, seed)
            assert isinstance(model, DDPMpp)
            model.redraw_small_layers(torch.Generator().manual_seed(seed))
        elif weights is not None:
            model = score_from_file(weights, config=config)
        elif name in _SHIPPED_SCORE:
            with _shipped(_SHIPPED_SCORE[name]) as path:
                model = score_from_file(path, config=config)
        else:
            raise ValueError(
                f"`{name}` does not ship with the package: give `weights=` the public checkpoint_8.pth, a converted "
                "safetensors file, or 'random'"
            )
    elif Path(source).expanduser().is_file():
        _refuse_weights(weights, "the file has them")
        model = score_from_file(source)
    else:
        raise ValueError(_unknown("score network", str(source), score_names()))
    return _frozen(model, device, dtype)


def load_classifier(
    source: str | Path | nn.Module,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    weights: str | Path | None = None,
    activation: str | None = None,
    threat_model: str = "Linf",
    seed: int = 0,
) -> nn.Module:
    """A classifier: images in [0, 1] → logits, frozen and in eval mode.

    Args:
        source: One of

            * ``"cifar10-tiny"``: a WRN-16-2, shipped with the package;
            * ``"resnet18-at"``: the adversarially trained CIFAR-10 ResNet-18 inside the `pyautoattack` wheel;
            * ``"wrn-28-10"``, ``"wrn-D-W"``: a `WideResNet` without normalisation (RobustBench's `Standard` is
              wrn-28-10); ``"dm-wrn-28-10"``, ``"dm-wrn-D-W"``: a `DMWideResNet`. These need `weights`;
            * ``"wrn-70-16-dropout"``, ``"wideresnet-70-16"``: the architectures of DiffPure's checkpoints of these
              names, which need `weights`;
            * the path of a weight file of one of these families, whose architecture is read from it;
            * the name of a RobustBench CIFAR-10 model. RobustBench downloads its weights, unless `weights` is given;
            * any module. It is frozen as it is, not copied.
        device: Where the network goes; None leaves it (new networks: the CPU).
        dtype: What its weights are cast to; None leaves them.
        weights: For a name: the path of its weights, or ``"random"``. None takes those that come with the name.
        activation: ``"relu"`` or ``"silu"`` of a `DMWideResNet`, which weights do not tell: required for the path of
            one that does not say; "silu" where a ``dm-wrn`` name is given alone.
        threat_model: ``"Linf"``, ``"L2"`` or ``"corruptions"``, of a RobustBench name.
        seed: Fixes random weights.

    Returns:
        The network in eval mode, no parameter requiring a gradient.

    Raises:
        ValueError: if a name is unknown (the message gives the nearest ones, and why RobustBench's are not available
            where it is missing), or needs `weights`.
        FileNotFoundError: if `weights` is no file.
        ImportError: if pyautoattack is missing for its own network.
        CheckpointError: if a file is damaged or does not fit.
        TypeError: if a module cannot be called with images alone.
    """
    if isinstance(source, nn.Module):
        _refuse_weights(weights, "a module has its own")
        _check_call(source, 1, "a classifier has forward(x)")
        return _frozen(source, device, dtype)
    name = str(source)
    config = _classifier_config(name, activation)
    if config is not None:
        if weights == "random":
            model = _random(config, seed)
        elif weights is not None:
            model = classifier_from_file(weights, config=config)
        elif name in _SHIPPED_CLASSIFIER:
            with _shipped(_SHIPPED_CLASSIFIER[name]) as path:
                model = classifier_from_file(path, config=config)
        else:
            raise ValueError(f"`{name}` does not ship with the package: give `weights=` a file, or 'random'")
    elif name == _RESNET18_AT:
        _refuse_weights(weights, "the pyautoattack package has them")
        model = _resnet18_at()
    elif Path(name).expanduser().is_file():
        _refuse_weights(weights, "the file has them")
        model = classifier_from_file(name, activation=activation)
    else:
        model = _robustbench(name, threat_model, weights, seed)
    return _frozen(model, device, dtype)


def _classifier_config(name: str, activation: str | None) -> dict[str, Any] | None:
    config = _CLASSIFIERS.get(name)
    if config is None and (match := _WRN_NAME.fullmatch(name)):
        depth, width = int(match[2]), int(match[3])
        if match[1]:
            config = {"arch": "DMWideResNet", "depth": depth, "width": width}
        else:
            config = {"arch": "WideResNet", "depth": depth, "widen_factor": width}
    if config is None:
        return None
    if activation is not None:
        if config["arch"] != "DMWideResNet":
            raise ValueError(f"`activation` is for DMWideResNet; `{name}` is a WideResNet, which has ReLU")
        config = {**config, "activation": activation}
    return config


def _random(config: Mapping[str, Any], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(config)


@contextmanager
def _shipped(file: str) -> Iterator[Path]:
    """The path of a weight file of the package, after its SHA-256 has been compared with the list beside it."""
    folder = files("coupfast.models") / "weights"
    sums = listed_sha256((folder / "SHA256SUMS").read_text())
    with as_file(folder / file) as path:
        if (found := file_sha256(path)) != sums[file]:
            raise CheckpointError(f"{path} is damaged: SHA-256 {found}, expected {sums[file]}; install coupfast again")
        yield path


def _resnet18_at() -> nn.Module:
    if importlib.util.find_spec("pyautoattack") is None:
        raise ImportError(f'`{_RESNET18_AT}` comes with pyautoattack: pip install "coupfast[demo]"')
    resnet: Any = importlib.import_module("pyautoattack.examples.resnet")
    model: nn.Module = resnet.ResNet18()
    path = Path(resnet.__file__).with_name("model_test.pt")
    load_state(model, read_torch(path), path)
    return model


def _robustbench(name: str, threat_model: str, weights: str | Path | None, seed: int) -> nn.Module:
    from coupfast.compat import import_robustbench

    try:
        import_robustbench()
    except ImportError as error:
        message = _unknown("classifier", name, classifier_names())
        raise ValueError(f"{message} RobustBench's names are not available here: {error}") from error
    enums = importlib.import_module("robustbench.model_zoo.enums")
    dicts = importlib.import_module("robustbench.model_zoo").model_dicts
    threats = {threat.value: threat for threat in enums.ThreatModel}
    if threat_model not in threats:
        raise ValueError(f"`threat_model` is one of {sorted(threats)}, got {threat_model!r}")
    models = dicts[enums.BenchmarkDataset.cifar_10].get(threats[threat_model], {})
    if name not in models:
        raise ValueError(_unknown(f"classifier ({threat_model})", name, [*classifier_names(), *models]))
    if weights is None:
        load_model = importlib.import_module("robustbench.utils").load_model
        folder = str(cache_directory("robustbench"))  # its own default is ./models of the current folder
        return load_model(name, model_dir=folder, dataset="cifar10", threat_model=threat_model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = models[name]["model"]()
    if weights != "random":
        state, _ = read_classifier_state(weights)
        load_state(model, state, weights)
    return model


def _is_diffusers_unet(module: nn.Module) -> bool:
    # By name, so that diffusers is never imported by somebody who does not use it.
    return any(c.__name__ == "UNet2DModel" and c.__module__.startswith("diffusers.") for c in type(module).__mro__)


def _check_call(module: nn.Module, count: int, expected: str) -> None:
    try:
        inspect.signature(module.forward).bind(*[None] * count)
    except TypeError as error:
        raise TypeError(f"{expected}; {type(module).__name__}.forward does not take that: {error}") from error


def _refuse_weights(weights: str | Path | None, reason: str) -> None:
    if weights is not None:
        raise ValueError(f"`weights` is for networks given by name ({reason}), got {str(weights)!r}")


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    known = list(known)
    by_lower = {entry.lower(): entry for entry in known}
    near = [by_lower[entry] for entry in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.4)]
    hint = f"nearest: {', '.join(near)}" if near else f"known: {', '.join(known[:12])}"
    return f"unknown {kind} {name!r}: no such name or file ({hint})."


def _frozen(model: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Module:
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)
