"""Networks from weight files, and conversion: the registered families say which are theirs, no family is known here."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coupfast.models import registry
from coupfast.models.adapters import Normalized
from coupfast.models.checkpoints import (
    CheckpointError,
    file_sha256,
    load_state,
    read_weights,
    some,
    write_safetensors,
)
from coupfast.models.defaults import plain_defaults
from coupfast.models.imported import import_named_module, split_reference
from coupfast.models.registry import KINDS, Config, Family, Kind, Named
from coupfast.models.wrappers import averaging_counts, find_weights, normalisation, state_dicts

#: Where functions that load one or the other are named in messages.
_LOADERS: dict[Kind, str] = {"score": "load_score", "classifier": "load_classifier"}


def score_from_file(path: str | Path, *, config: Config | None = None) -> nn.Module:
    """The score network of a weight file, with its weights in float32.

    Args:
        path: A safetensors file, or one of `torch.save` in a layout that a registered family recognises, such as a score_sde
            checkpoint. The file may hold more than the weights (`wrappers.py`).
        config: The configuration; its `arch` may be missing where only one family takes such arguments. None takes that of
            the file, or infers it.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged, is of a classifier or does not fit the network.
    """
    return network_from_file(path, "score", config=config)[0]


def classifier_from_file(
    path: str | Path,
    *,
    config: Config | None = None,
    activation: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """The classifier of a weight file, with its weights in float32.

    Args:
        path: A file as for `score_from_file`. A normalisation layer that it has in front of the network is kept.
        config: The configuration; its `arch` may be missing where only one family takes such arguments. None takes that of
            the file, or infers it.
        activation: "relu" or "silu" where weights do not tell.
        mean, std: Normalisation inside the network, which weights do not tell either. None is what the file has, or the
            family's usual: none for `WideResNet`, CIFAR-10's for `DMWideResNet`.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged, is of a score network or does not fit the network.
    """
    options = {"activation": activation}
    return network_from_file(path, "classifier", config=config, options=options, mean=mean, std=std)[0]


def network_from_file(
    path: str | Path,
    kind: Kind | None,
    *,
    config: Config | None = None,
    options: Mapping[str, Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """A network with the weights of a file, and its configuration.

    Args:
        kind: What the network must be; None takes either.
        options: What the caller says that weights do not tell, by name; None values say nothing.

    Raises:
        FileNotFoundError, CheckpointError: as `score_from_file`.
    """
    with plain_defaults(), _naming(path):
        content, stored = read_weights(path)
        if config is None and stored is not None:
            config = _agreed(stored, options or {})
        if config is None:
            layout = _recognised(content, kind)
            config = layout.family.configured(layout.config, options or {}, by_weights=True)
        else:
            layout, config = None, registry.with_arch(config)
            if kind not in (None, (family := registry.family_of(config.get("arch"))).kind):
                raise _other_kind(family, kind)
        if mean is not None or std is not None:
            config = {**config, "mean": mean, "std": std}
        model, full = _filled(content, layout, config, path)
        for name, given in (("mean", mean), ("std", std)):
            if given is not None and list(given) != list(full[name]):
                raise CheckpointError(f"the file normalises with {name}={full[name]}, the caller says {list(given)}")
        return model, full


def fill_named(named: Named, path: str | Path) -> nn.Module:
    """The network of a name with the weights of a file, which may hold more than them.

    Raises:
        FileNotFoundError, CheckpointError: as `score_from_file`.
    """
    if named.config is not None:
        return network_from_file(path, named.kind, config=named.config)[0]
    with plain_defaults(), _naming(path):
        content, _ = read_weights(path)
        model = named.build(0)
        state, front = _beside(*_fitting(content, model), model)
        load_state(model, state, path, may_lack=named.may_lack)
    return model if front is None else Normalized(model, *front)


def convert_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    config: Config | None = None,
    name: str | None = None,
    kind: Kind | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the weights that a checkpoint is for as safetensors: of the public 1.7 GB score_sde checkpoint 427 MB.

    Args:
        src: A checkpoint of a registered family, of a score network or a classifier.
        dst: The safetensors file. Its metadata hold `config`, `source` (file name) and `source_sha256`. It is written whole or
            not at all.
        config: The configuration; its `arch` may be missing where only one family takes such arguments. None takes that of
            the file, or infers it.
        name: In the place of `config`: the name whose network it is, as `load_score` and `load_classifier` have it.
        kind: ``"score"`` or ``"classifier"``; None takes either.
        options: What weights do not tell, by name, e.g. ``{"activation": "silu"}``.

    Returns:
        The configuration that was written.

    Raises:
        FileNotFoundError, CheckpointError: as `score_from_file`.
        ValueError: if the name is unknown, or has no configuration that a file could keep.
        OSError: if `dst` cannot be written.
    """
    if name is not None:
        if config is not None:
            raise ValueError(f"give `name` or `config`, not both; got {name!r} and {dict(config)}")
        config = _config_of(("score", "classifier") if kind is None else (kind,), name, options or {})
    model, full = network_from_file(src, kind, config=config, options=options)
    write_safetensors(dst, model.state_dict(), full, metadata={"source": Path(src).name, "source_sha256": file_sha256(src)})
    return full


def _config_of(kinds: Sequence[Kind], name: str, options: Mapping[str, Any]) -> Config:
    if (reference := split_reference(name)) is not None:
        import_named_module(reference[0])
        name = reference[1]
    for kind in kinds:
        named = registry.find_known(kind, name, options)
        if named is not None and named.config is not None:
            return named.config
    raise ValueError(f"{name!r} names no network with a configuration; such are {', '.join(map(registry.described, kinds))}")


def _agreed(stored: Config, options: Mapping[str, Any]) -> Config:
    """The configuration that a file has, with the caller's options, which may not contradict it."""
    for name, value in options.items():
        if value is not None and stored.get(name, value) != value:
            raise CheckpointError(f"the file says {name}={stored[name]!r}, the caller {value!r}")
    family = registry.family_of(stored.get("arch"))
    return family.configured(stored, options, by_weights=False)


def _filled(content: Any, layout: _Layout | None, config: Config, path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a configuration with its weights of a file's content, which are those of `layout` if given."""
    family = registry.family_of(config["arch"])
    model = _empty(family, config)
    if layout is None and family.extract is not None:
        arguments = {key: value for key, value in config.items() if key != "arch"}
        if (extracted := family.extract(content, arguments)) is not None:
            layout = _Layout(family, *extracted, {})
    state, rest = (layout.state, layout.rest) if layout is not None else _fitting(content, model)[:2]
    state, front = _beside(state, rest, model, ignored=family.ignored)
    if front is not None:
        config = {**config, "mean": front[0], "std": front[1]}
        model = _empty(family, config)
    if front is not None and isinstance(model, Normalized):  # a family that does not normalise by itself
        load_state(model.network, state, path, assign=family.weights_only)
    else:
        load_state(model, state, path, assign=family.weights_only)
    full = getattr(model, "config", None)
    return model, dict(full) if isinstance(full, dict) and "arch" in full else dict(config)


def _empty(family: Family, config: Config) -> nn.Module:
    # On "meta" nothing is allocated or drawn; the tensors of the file become the parameters.
    with torch.device("meta" if family.weights_only else "cpu"):
        return registry.build(config)


class _Layout(NamedTuple):
    """What was recognised in a file."""

    family: Family
    config: Config
    state: dict[str, Tensor]
    rest: dict[str, Tensor]


def _recognised(content: Any, kind: Kind | None) -> _Layout:
    layout = _layout(content)
    if layout is None:
        raise _unknown(content, kind)
    if kind not in (None, layout.family.kind):
        raise _other_kind(layout.family, kind)
    return layout


def _layout(content: Any) -> _Layout | None:
    for family in registry.families():
        if family.extract is not None and (extracted := family.extract(content, None)) is not None:
            return _Layout(family, *extracted, {})
    weights = find_weights(content, registry.recognised)
    return None if weights is None else _Layout(*weights.found, weights.state, weights.rest)


def _other_kind(family: Family, kind: Kind | None) -> CheckpointError:
    return CheckpointError(
        f"these are weights of a {KINDS[family.kind]} ({family.arch})"
        + (f", not of a {KINDS[kind]}" if kind else "")
        + f": that is for {_LOADERS[family.kind]}"
    )


def _no_state_dict(content: Any) -> CheckpointError:
    found = f"keys {some(list(content))}" if isinstance(content, dict) and content else f"a {type(content).__name__}"
    return CheckpointError(f"there is no state dict: expected names of tensors, found {found}")


def _unknown(content: Any, kind: Kind | None) -> CheckpointError:
    dictionaries = state_dicts(content)
    if not dictionaries:
        return _no_state_dict(content)
    _, state = max(dictionaries, key=lambda found: len(found[1]))
    build = "build the network yourself and pass the module (on the command line: --defense FILE.py:FUNCTION)"
    if (near := _nearly_named(state, kind)) is not None:
        return CheckpointError(f"the weights are {near}: is the file whole? If they are of another network, {build}")
    known = ", ".join(family.arch for family in registry.families(kind) if family.recognise is not None)
    return CheckpointError(
        f"unknown architecture: expected the names and shapes of {known}, found {some(list(state))}; give `config` where it is "
        f"one of these in another size, or {build}"
    )


def _nearly_named(state: Mapping[str, Tensor], kind: Kind | None) -> str | None:
    """What keeps weights from being those of a network that has a name, where it is one tensor in ten at most."""
    for each in ("score", "classifier") if kind is None else (kind,):
        for name in registry.listed(each):
            named = registry.find_known(each, name)
            if named is None or named.config is None:
                continue
            try:
                expected = _shapes(each, name, repr(named.config))
            except Exception:  # somebody else's network may need real numbers to be made, and is not what was asked about
                continue
            wrong = [key for key, shape in expected.items() if key not in state or tuple(state[key].shape) != shape]
            if not 0 < 10 * len(wrong) <= len(expected):
                continue
            first = wrong[0]
            found = f"is {tuple(state[first].shape)}, not {expected[first]}" if first in state else "is missing"
            others = f" ({len(wrong)} tensors differ)" if len(wrong) > 1 else ""
            return f"nearly {name!r}, of which {first!r} {found}{others}"
    return None


@functools.cache
def _shapes(kind: Kind, name: str, config: str) -> dict[str, tuple[int, ...]]:
    """Of the weights of a named network; `config` only tells apart what a name may stand for."""
    return {key: tuple(value.shape) for key, value in registry.skeleton(kind, name).state_dict().items()}


def _fitting(content: Any, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights that have the names of a network, or most of them, and the tensors beside them."""
    expected = set(model.state_dict())

    def recognise(state: dict[str, Tensor]) -> bool | None:
        return True if 2 * len(expected & state.keys()) > len(expected) else None

    if (weights := find_weights(content, recognise)) is not None:
        return weights.state, weights.rest
    dictionaries = state_dicts(content)
    if not dictionaries:
        raise _no_state_dict(content)
    if (other := _layout(content)) is not None and other.family.arch != type(model).__name__:
        raise CheckpointError(f"the file does not fit {type(model).__name__}: these are weights of a {other.family.arch}")
    return max((state for _, state in dictionaries), key=len), {}


def _beside(
    state: Mapping[str, Tensor], rest: Mapping[str, Tensor], model: nn.Module, *, ignored: frozenset[str] = frozenset()
) -> tuple[dict[str, Tensor], tuple[list[float], list[float]] | None]:
    """Weights without what stands beside them and is understood, counters and a normalisation in front, which is returned, too.

    What is not understood is left among the weights, so that loading them names it.
    """
    expected = model.state_dict()
    extra = {key: value for key, value in state.items() if key not in expected and key not in ignored}
    extra |= rest
    extra = {key: value for key, value in extra.items() if key not in averaging_counts(extra)}
    front = normalisation(extra)
    if front is not None:
        extra = {key: value for key, value in extra.items() if key not in front[2]}
    weights = {key: value for key, value in state.items() if key in expected}
    return weights | extra, None if front is None else front[:2]


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Says in every CheckpointError which file it is about."""
    try:
        yield
    except CheckpointError as error:
        if str(error).startswith(str(path)):
            raise
        raise CheckpointError(f"{path}: {error}") from error
