"""Networks by name, file or module: frozen, in eval mode, ready for a purifier.

Which names and files there are, the families say (`registry.py`). Small CIFAR-10 weights ship inside the package. Nothing is
downloaded, except by RobustBench for its own names.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coupfast.models import registry
from coupfast.models.adapters import NoiseFrom, NoiseFromEDM
from coupfast.models.checkpoints import existing
from coupfast.models.defaults import plain_defaults, without_inference_tensors
from coupfast.models.from_file import fill_named, network_from_file
from coupfast.models.imported import import_named_module, split_reference
from coupfast.models.registry import KINDS, Kind, Named

_OTHER: dict[Kind, Kind] = {"score": "classifier", "classifier": "score"}
_CALLS: dict[Kind, tuple[int, str]] = {
    "score": (2, "a score network has forward(x, labels)"),
    "classifier": (1, "a classifier has forward(x)"),
}
_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".pkl", ".ckpt", ".bin", ".tar", ".t7", ".model")


class WrongNetwork(TypeError, ValueError):
    """What was given is no network of the kind that is wanted. A TypeError, and of a name also a wrong value."""


def choices(kind: Kind) -> str:
    """What `load_score` or `load_classifier` takes beside modules, for a line of help."""
    return f"{registry.described(kind)}, a weight file, or package.module:NAME"


def needs_weights(name: str) -> bool:
    """Whether `load_score` or `load_classifier` knows an architecture by this name and has no weights for it.

    For names that other packages serve, which may have to be imported and fetched, the answer is False.
    """
    if (reference := split_reference(name)) is not None:
        module, name = import_named_module(reference[0]), reference[1]
        if _is_class(getattr(module, name, None)):
            return True
    known = (registry.find_known(kind, name) for kind in KINDS)
    return any(named is not None and named.pretrained is None for named in known)


def import_references(arguments: Sequence[str], options: Iterable[str] = ("--score", "--classifier", "--network")) -> None:
    """Import the modules that a command line names networks in, so that its help lists what they register.

    A module that does not import is left for the loader, whose message says why.
    """
    flags = tuple(options)
    words = [after for before, after in zip(arguments, arguments[1:], strict=False) if before in flags]
    words += [word.partition("=")[2] for word in arguments if word.partition("=")[0] in flags]
    for word in words:
        if (reference := split_reference(word)) is not None:
            try:
                import_named_module(reference[0])
            except ImportError:
                continue


def load_score(
    source: str | Path | nn.Module | object,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    weights: str | Path | None = None,
    prediction: str | None = None,
    whole_labels: bool = False,
    labels: str | None = None,
    learned_variance: bool = False,
    image_size: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """A score network: (x_k, 999 t) → eps_hat, frozen and in eval mode.

    Args:
        source: One of

            * ``"cifar10-tiny"``: 1.3 M parameters, shipped with the package;
            * ``"cifar10-ddpmpp-deep"``: `cifar10_ddpmpp_deep_continuous` of Score SDE, which needs `weights`;
            * the path of a safetensors file of `coupfast convert`, or of a checkpoint that a registered family recognises,
              such as score_sde's of `cifar10_ddpmpp_deep_continuous`, or of a `DDPMpp` of another size (with `image_size`);
            * a `diffusers.UNet2DModel` (wrapped in `DiffusersScore`), a pipeline with one, or the folder of either; where there
              is a scheduler, what it says of prediction and noise schedule is heeded;
            * ``"package.module:NAME"`` or ``"folder/file.py:NAME"``: a name that this module registers (`registry.py`), a
              network in it, or a function without arguments that makes one;
            * any other module with ``forward(x, labels)``. A module is frozen as it is, not copied (only weights that were made
              in inference mode are replaced by ordinary ones).
        device: Where the network goes; None leaves modules, and puts new networks on the CPU, whatever torch's default device.
        dtype: What its weights are cast to; None leaves modules, and makes new networks float32, whatever torch's default is.
        weights: For a name: the path of its weights, or ``"random"``. None takes those that come with the name.
        prediction: What the network predicts, where it is not the noise: ``"v_prediction"`` or ``"sample"`` (x₀), as diffusers'
            schedulers spell it, or ``"edm"``: F of EDM's preconditioning. `NoiseFrom` or `NoiseFromEDM` makes the noise of it.
        whole_labels: The network has a table of time steps: labels are rounded to the nearest integer.
        labels: How a network of whole steps is told the time: ``"rounded"``, ``"index"`` or ``"floor"`` (`adapters`).
        learned_variance: The network also predicts a variance, in channels after those of its prediction.
        image_size: Height and width of its images in pixels, for the path of a file of a `DDPMpp` that does not say: everything
            else follows from the names and shapes of its weights.
        seed: Fixes random weights. They are drawn at ordinary scale, so that eps_hat is of order one.

    Returns:
        The network in eval mode, no parameter requiring a gradient.

    Raises:
        ValueError: if a name is unknown (the message gives the nearest ones), is a classifier's, or needs `weights`; if a
            scheduler says that the network belongs to another noise schedule.
        FileNotFoundError: if a file is missing.
        ImportError: if the module of a reference, or a package that the network needs, does not import.
        CheckpointError: if a file is damaged or does not fit.
        TypeError: if a module cannot be called as a score network, or is a classifier.

    Example:
        >>> import coupfast
        >>> score = coupfast.load_score("cifar10-tiny")
        >>> score.image_size, any(parameter.requires_grad for parameter in score.parameters())
        (32, False)
    """
    known = isinstance(source, (str, Path)) and registry.find_known("score", str(source)) is not None
    if image_size is not None and (known or not isinstance(source, (str, Path)) or Path(source).is_dir()):
        raise ValueError("`image_size` is for the path of a weight file that does not say it; a name, module or folder does")
    model = _loaded("score", source, weights, {"image_size": image_size}, seed)
    if prediction is not None or whole_labels or labels is not None or learned_variance:
        if isinstance(model, NoiseFrom):
            raise ValueError(
                f"the network's own scheduler says {model.prediction!r}, and it is adapted already; leave out `prediction`"
            )
        if getattr(model, "is_adapted", False):
            raise ValueError(f"a {type(model).__name__} knows what it predicts and how it is told the time; leave that out")
        if prediction == "edm":
            if whole_labels or labels is not None or learned_variance:
                raise ValueError("prediction='edm' says how the network is told the time; leave out what else was said of that")
            model = NoiseFromEDM(model)
        else:
            model = NoiseFrom(
                model,
                prediction=prediction or "epsilon",
                whole_labels=whole_labels,
                labels=labels,
                learned_variance=learned_variance,
            )
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

            * ``"cifar10-tiny"``: a WRN-16-2, ``"cifar10-tiny-silu"``: a DMWideResNet of depth 10 and width 2, both shipped with
              the package;
            * ``"resnet18-at"``: the adversarially trained CIFAR-10 ResNet-18 inside the `pyautoattack` wheel;
            * ``"wrn-28-10"``, ``"wrn-D-W"``: a `WideResNet` without normalisation (RobustBench's `Standard` is
              wrn-28-10); ``"dm-wrn-28-10"``, ``"dm-wrn-D-W"``: a `DMWideResNet`. These need `weights`;
            * ``"wrn-70-16-dropout"``, ``"wideresnet-70-16"``: the architectures of DiffPure's checkpoints of these
              names, which need `weights`;
            * the path of a weight file that a registered family recognises, whose architecture is read from it;
            * the name of a RobustBench CIFAR-10 model. RobustBench downloads its weights, unless `weights` is given;
            * ``"package.module:NAME"`` or ``"folder/file.py:NAME"``: as for `load_score`;
            * any module. It is frozen as it is, not copied.
        device: Where the network goes; None leaves modules, and puts new networks on the CPU, whatever torch's default device.
        dtype: What its weights are cast to; None leaves modules, and makes new networks float32, whatever torch's default is.
        weights: For a name: the path of its weights, or ``"random"``. None takes those that come with the name.
        activation: ``"relu"`` or ``"silu"`` of a `DMWideResNet`, which weights do not tell: required for the path of
            one that does not say; "silu" where a ``dm-wrn`` name is given alone.
        threat_model: ``"Linf"``, ``"L2"`` or ``"corruptions"``, of a RobustBench name.
        seed: Fixes random weights.

    Returns:
        The network in eval mode, no parameter requiring a gradient.

    Raises:
        ValueError: if a name is unknown (the message gives the nearest ones, and why RobustBench's are not available
            where it is missing), is a score network's, or needs `weights`.
        FileNotFoundError: if a file is missing.
        ImportError: if pyautoattack is missing for its own network, or the module of a reference does not import.
        OSError: if RobustBench cannot download what its name needs; says which file to put where.
        CheckpointError: if a file is damaged or does not fit.
        TypeError: if a module cannot be called with images alone, or is a score network.

    Example:
        >>> import torch, coupfast
        >>> classifier = coupfast.load_classifier(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10)).eval())
        >>> classifier(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    options = {"activation": activation, "threat_model": threat_model}
    return _frozen(_loaded("classifier", source, weights, options, seed), device, dtype)


def is_adoptable(kind: Kind, value: object) -> bool:
    """Whether `as_network` would make a network of another library's object."""
    return registry.adopted(kind, value) is not None


def as_network(kind: Kind, value: object) -> nn.Module:
    """A module as it is, or the network made of another library's object; what `load_*` do with a module, less the freezing.

    Raises:
        TypeError: if it is neither, or a network of the other kind.
        ValueError: if it is one that cannot serve.
    """
    if (model := registry.adopted(kind, value)) is not None:
        return model
    if registry.adopted(other := _OTHER[kind], value) is not None:
        raise WrongNetwork(f"a {type(value).__name__} is a {KINDS[other]}, not a {KINDS[kind]}: are the two swapped?")
    if not isinstance(value, nn.Module):
        raise WrongNetwork(f"a {KINDS[kind]} is a name, the path of a file or an nn.Module, got {type(value).__name__}")
    _check_kind(kind, value)
    return value


def _loaded(kind: Kind, source: object, weights: str | Path | None, options: Mapping[str, Any], seed: int) -> nn.Module:
    if not isinstance(source, (str, Path)):
        _refuse_weights(weights, "a module has its own")
        model = as_network(kind, source)
        _check_result(kind, model)
        return model
    name, path = str(source), Path(source).expanduser()
    if not path.exists() and (reference := split_reference(name)) is not None:
        return _by_reference(kind, *reference, weights, options, seed)
    if (known := registry.find_known(kind, name, options)) is not None:
        return _by_name(known, weights, seed)
    if name and path.is_dir() and (network := registry.from_folder(kind, path)) is not None:
        _refuse_weights(weights, "the folder has them")
        return network
    if name and (path.exists() or _is_path(source)):
        path = existing(path)
        _refuse_weights(weights, "the file has them")
        given = {option: value for option, value in options.items() if option != "threat_model"}
        return network_from_file(path, kind, options=given)[0]
    missing: ImportError | None = None
    try:
        named = registry.find(kind, name, options)
    except ImportError as error:
        named, missing = None, error
    if named is not None:
        return _by_name(named, weights, seed)
    if isinstance(source, Path):
        existing(path)  # says what is there instead
    raise ValueError(_unknown(kind, name, options, missing))


def _by_name(named: Named, weights: str | Path | None, seed: int) -> nn.Module:
    if weights == "random":
        return named.build(seed)
    if weights is not None:
        return fill_named(named, weights)
    if named.pretrained is None:
        raise ValueError(f"`{named.name}` does not ship with the package: {named.needs}")
    return named.pretrained()


def _by_reference(
    kind: Kind, module: str, name: str, weights: str | Path | None, options: Mapping[str, Any], seed: int
) -> nn.Module:
    imported = import_named_module(module)
    if (named := registry.find_known(kind, name, options)) is not None:
        return _by_name(named, weights, seed)
    value = getattr(imported, name, None)
    if value is None:
        public = sorted(key for key in vars(imported) if not key.startswith("_"))
        raise ValueError(
            f"{module} registers no {KINDS[kind]} named {name!r} and has no such attribute; it has "
            f"{', '.join(public) or 'none'}, and known names are {', '.join(registry.listed(kind))}"
        )
    if isinstance(value, nn.Module) or not callable(value):
        _refuse_weights(weights, "a module has its own")
        return as_network(kind, value)
    if _is_class(value) and weights is None:
        raise ValueError(f"`{module}:{name}` is a class of networks, without weights: give `weights=` a file, or 'random'")
    with plain_defaults(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            made = value()
        except TypeError as error:
            raise WrongNetwork(f"{module}:{name} is called without arguments and should return a network: {error}") from error
    model = as_network(kind, made)
    if weights not in (None, "random"):
        assert weights is not None
        return fill_named(Named(name, kind, lambda seed: model), weights)
    return model


def _is_class(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, nn.Module)


def _is_path(source: object) -> bool:
    """Whether a source can only be meant as a file, there or not."""
    text = str(source)
    return "/" in text or "\\" in text or text.startswith("~") or Path(text).suffix.lower() in _WEIGHT_SUFFIXES


def _check_kind(kind: Kind, module: nn.Module) -> None:
    other = registry.kind_of(module)
    if other is not None and other != kind:
        raise WrongNetwork(
            f"{_CALLS[kind][1]}; {type(module).__name__} is a {KINDS[other]}: are score network and classifier swapped?"
        )
    count, expected = _CALLS[kind]
    try:
        inspect.signature(module.forward).bind(*[None] * count)
    except TypeError as error:
        swapped = _takes(module, _CALLS[_OTHER[kind]][0])
        hint = f" (as a {KINDS[_OTHER[kind]]} does; are the two swapped?)" if swapped else ""
        raise WrongNetwork(f"{expected}; {type(module).__name__}.forward does not take that: {error}{hint}") from error
    except ValueError:
        return  # a callable that tells no signature


def _takes(module: nn.Module, count: int) -> bool:
    try:
        inspect.signature(module.forward).bind(*[None] * count)
    except (TypeError, ValueError):
        return False
    return True


def _check_result(kind: Kind, model: nn.Module) -> None:
    """One image through a module that could be called as either kind: the shape of its result tells which it is."""
    if not (_takes(model, 1) and _takes(model, 2)):
        return
    weight = next((value for value in model.parameters() if value.is_floating_point()), None)
    channels, size = getattr(model, "channels", 3), getattr(model, "image_size", 32)
    if weight is None or not isinstance(channels, int) or not isinstance(size, int):
        return
    x = torch.zeros(1, channels, size, size, dtype=weight.dtype, device=weight.device)
    inputs = (x, torch.ones(1, dtype=weight.dtype, device=weight.device))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            result = model.eval()(*inputs[: _CALLS[kind][0]])
    except Exception:  # images of another size, say: the purifier tries with the very images
        return
    if not isinstance(result, torch.Tensor):
        return
    found: Kind | None = "score" if result.shape == x.shape else "classifier" if result.ndim == 2 else None
    if found == _OTHER[kind]:
        raise WrongNetwork(
            f"{_CALLS[kind][1]} that returns {'a tensor of the shape of x' if kind == 'score' else 'logits'}; of an image "
            f"{tuple(x.shape)} {type(model).__name__} makes {tuple(result.shape)}: are score network and classifier swapped?"
        )


def _refuse_weights(weights: str | Path | None, reason: str) -> None:
    if weights is not None:
        raise ValueError(f"`weights` is for networks given by name ({reason}), got {str(weights)!r}")


def _unknown(kind: Kind, name: str, options: Mapping[str, Any], missing: ImportError | None) -> str:
    if registry.find_known(_OTHER[kind], name) is not None:
        return f"{name!r} is a {KINDS[_OTHER[kind]]}, not a {KINDS[kind]}: it is for load_{_OTHER[kind]}"
    known = registry.listed(kind)
    for source in registry.sources(kind):
        try:
            known = [*known, *source.near(options)]
        except ImportError as error:
            missing = missing or error
    known = list(dict.fromkeys(known))
    by_lower = {entry.lower(): entry for entry in known}
    near = [by_lower[entry] for entry in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.4)]
    hint = f"nearest: {', '.join(near)}" if near else f"known: {', '.join(known[:12])}"
    threat = f" ({options['threat_model']})" if options.get("threat_model") else ""
    message = f"unknown {KINDS[kind]}{threat} {name!r}: no such name or file ({hint})."
    return message if missing is None else f"{message} More names are not available here: {missing}"


def _frozen(model: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Module:
    with torch.inference_mode(False):
        return without_inference_tensors(model).to(device=device, dtype=dtype).eval().requires_grad_(False)

