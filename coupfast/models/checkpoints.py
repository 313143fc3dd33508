"""Weight files in, networks out: nothing in a file is ever executed, nothing in it is taken on trust.

Pickled files go through torch's restricted unpickler (`weights_only=True`). The score_sde checkpoints hold one numpy
number in their optimizer, so numpy's scalar, its dtype and float64 are allowed for the time of a read, and no more.
Whatever is wrong with a file raises `CheckpointError`, which names the key, what was expected and what was found.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from coupfast.models.ddpmpp import DDPMpp
from coupfast.models.dm_wide_resnet import DMWideResNet
from coupfast.models.wide_resnet import WideResNet

StateDict = dict[str, Tensor]

_ARCHITECTURES: dict[str, type[nn.Module]] = {
    "DDPMpp": DDPMpp,
    "WideResNet": WideResNet,
    "DMWideResNet": DMWideResNet,
}

# What training wrappers (DataParallel, Sequential, attribute holders) put before the names of the network itself.
_WRAPPERS = {"module", "model", "0"}
_CONTAINERS = ("state_dict", "model_state_dict")


class CheckpointError(ValueError):
    """A weight file is damaged, not allowed, or does not fit the network."""


def read_torch(path: str | Path) -> Any:
    """Read what `torch.save` wrote, on the CPU, through the restricted unpickler.

    Files in torch's zip format are memory-mapped: entries that are not touched are not read.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is truncated, damaged, or holds anything but tensors and plain values.
    """
    path = _existing(path)
    is_zip = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04" and not is_zip:
            raise CheckpointError(
                f"{path} is truncated: it begins as a torch file of {path.stat().st_size} bytes, but its "
                "directory at the end is missing; fetch or copy it again"
            )
    scalar = np.float64(0.0).__reduce__()[0]  # its home moved between numpy 1 and 2, files name either
    allowed = [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        type(np.dtype(np.float64)),
    ]
    try:
        with torch.serialization.safe_globals(allowed):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:
        # The unpickler raises whatever the bytes lead it to: UnpicklingError, EOFError, KeyError, RuntimeError, …
        # Torch's own text goes on to advise loading the file without the safety that refused it: leave that out.
        text = str(error).partition("WeightsUnpickler error:")[2].strip() or str(error).strip()
        reason = text.splitlines()[0] if text and "weights_only" not in text.splitlines()[0] else type(error).__name__
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is not a torch file of tensors and plain values: {reason} "
            "Nothing in it was executed. If it is damaged, fetch it again; other kinds of pickles are not read."
        ) from error


def read_safetensors(path: str | Path) -> tuple[StateDict, dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is truncated or is not a safetensors file.
    """
    path = _existing(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} ({path.stat().st_size} bytes) is truncated or no safetensors file: {error}") from error


def write_safetensors(
    path: str | Path,
    state: Mapping[str, Tensor],
    config: Mapping[str, object],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write weights with the configuration of their network; the file appears whole or not at all.

    Args:
        path: Where to write; an existing file is replaced.
        state: A state dict.
        config: The network's `config`, JSON-ready, kept in the metadata under "config".
        metadata: Further entries.
    """
    path = Path(path)
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    os.close(handle)
    try:
        save_file(tensors, partial, metadata={**(metadata or {}), "config": json.dumps(config)})
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes private files; give this one what any new file would have had.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(partial, 0o666 & ~umask)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


# --- score networks ---------------------------------------------------------------------------------------------------


def read_score_checkpoint(path: str | Path, *, config: Mapping[str, Any] | None = None) -> StateDict:
    """The averaged weights of a score_sde checkpoint, by name.

    Such a file is `{optimizer, model, ema: {decay, num_updates, shadow_params}, step}`. The weights in use everywhere are
    `shadow_params`, a list without names in the order in which the network registers its parameters.

    Args:
        path: The checkpoint, e.g. `checkpoint_8.pth` (1.7 GB, of which the 427 MB of averaged weights are read).
        config: `DDPMpp` arguments; None is `cifar10_ddpmpp_deep_continuous`.

    Returns:
        A float32 state dict of `DDPMpp(**config)`, in memory of its own.

    Raises:
        CheckpointError: if the file is damaged, is not such a checkpoint, or its list does not fit the network.
    """
    checkpoint = read_torch(path)
    ema = checkpoint.get("ema") if isinstance(checkpoint, dict) else None
    shadow = ema.get("shadow_params") if isinstance(ema, dict) else None
    if not isinstance(shadow, (list, tuple)):
        found = f"keys {_some(list(checkpoint))}" if isinstance(checkpoint, dict) else f"a {type(checkpoint).__name__}"
        raise CheckpointError(f"{path} is no score_sde checkpoint: expected ema → shadow_params, found {found}")
    with torch.device("meta"):
        expected = list(_build("DDPMpp", config or {}).named_parameters())
    if len(shadow) != len(expected):
        raise CheckpointError(
            f"{path}: the network has {len(expected)} tensors, ema.shadow_params has {len(shadow)}; "
            "is it the checkpoint of another architecture (give its `config`)?"
        )
    state = {}
    for number, ((key, parameter), found) in enumerate(zip(expected, shadow, strict=True)):
        _check_tensor(f"{path}: ema.shadow_params[{number}]", key, parameter, found)
        # A copy: the read is memory-mapped, and the network must outlive the file.
        state[key] = found.detach().to(torch.float32, copy=True)
    return state


def convert_score_checkpoint(src: str | Path, dst: str | Path, *, config: Mapping[str, Any] | None = None) -> None:
    """Write the averaged weights of a score_sde checkpoint as safetensors (427 MB for the public one, instead of 1.7 GB).

    Args:
        src: A score_sde checkpoint, as for `read_score_checkpoint`.
        dst: The safetensors file. Its metadata hold `config`, `source` (file name) and `source_sha256`. It is written
            whole or not at all.
        config: `DDPMpp` arguments; None is `cifar10_ddpmpp_deep_continuous`.

    Raises:
        CheckpointError: as `read_score_checkpoint`.
    """
    state = read_score_checkpoint(src, config=config)
    with torch.device("meta"):
        full_config = _build("DDPMpp", config or {}).config
    source = {"source": Path(src).name, "source_sha256": file_sha256(src)}
    write_safetensors(dst, state, full_config, metadata=source)  # type: ignore[arg-type]


def score_from_file(path: str | Path, *, config: Mapping[str, Any] | None = None) -> DDPMpp:
    """A `DDPMpp` with the weights of a safetensors file or of a score_sde checkpoint.

    Args:
        path: `*.safetensors`, or anything else as a score_sde checkpoint.
        config: `DDPMpp` arguments. None takes those in the safetensors metadata, or, for a score_sde checkpoint,
            `cifar10_ddpmpp_deep_continuous`.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged or does not fit the network.
    """
    path = _existing(path)
    if _is_safetensors(path):
        state, metadata = read_safetensors(path)
        if config is None:
            config = _config(path, metadata)
            if config is None:
                raise CheckpointError(f"{path} does not name its architecture (no `config` in the metadata); give `config`")
            if config.get("arch") != "DDPMpp":
                raise CheckpointError(f"{path} holds a {config.get('arch')}, not a score network (DDPMpp)")
        state.pop("sigmas", None)  # a buffer of score_sde that no VP network uses
    else:
        state = read_score_checkpoint(path, config=config)
    # On "meta" nothing is allocated or drawn; the tensors of the file become the parameters.
    with torch.device("meta"):
        model = _build("DDPMpp", config or {})
    _load(model, state, path, assign=True)
    assert isinstance(model, DDPMpp)
    return model


# --- classifiers ------------------------------------------------------------------------------------------------------


def read_classifier_state(path: str | Path) -> tuple[StateDict, dict[str, Any] | None]:
    """The state dict of a classifier file without wrappers, and its configuration if the file has one.

    Understood are safetensors, a pickled state dict, one under "state_dict" (RobustBench) or "model_state_dict"
    (DiffPure's wideresnet-70-16), with "module.", "model." or "module.0." before every name.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged or holds no state dict.
    """
    path = _existing(path)
    config = None
    if _is_safetensors(path):
        state, metadata = read_safetensors(path)
        config = _config(path, metadata)
    else:
        content = read_torch(path)
        for container in _CONTAINERS:
            if isinstance(content, dict) and isinstance(content.get(container), dict):
                content = content[container]
                break
        if not isinstance(content, dict) or not content or not all(
            isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
        ):
            found = f"keys {_some(list(content))}" if isinstance(content, dict) else f"a {type(content).__name__}"
            raise CheckpointError(f"{path} holds no state dict: expected names of tensors, found {found}")
        state = content
    return _unwrapped(state), config


def classifier_config(
    state: Mapping[str, Tensor],
    *,
    activation: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Infer the architecture of a wide residual network from the names and shapes of its weights.

    Args:
        state: State dict without wrappers.
        activation: "relu" or "silu". Weights do not tell; `DMWideResNet` weights need it, `WideResNet` is ReLU.
        mean, std: Normalisation inside the network, which weights do not tell either. None is the family's usual:
            none for `WideResNet`, CIFAR-10's for `DMWideResNet`.

    Returns:
        A configuration as in `WideResNet.config` and `DMWideResNet.config`.

    Raises:
        CheckpointError: if the names are of neither family, or the activation is needed and missing.
    """
    families = {
        "WideResNet": ("block1.layer.{}.conv1.weight", "fc.weight", "widen_factor"),
        "DMWideResNet": ("layer.0.block.{}.conv_0.weight", "logits.weight", "width"),
    }
    for arch, (block, head, width) in families.items():
        first, last = state.get(block.format(0)), state.get(head)
        if first is None or last is None:
            continue
        if first.ndim != 4 or last.ndim != 2 or first.shape[0] % 16:
            raise CheckpointError(
                f"{block.format(0)} {tuple(first.shape)} and {head} {tuple(last.shape)} are not the shapes of a {arch}: "
                "expected (16 · width, 16, 3, 3) and (classes, features)"
            )
        num_blocks = 0
        while block.format(num_blocks) in state:
            num_blocks += 1
        config: dict[str, Any] = {
            "arch": arch,
            "depth": 6 * num_blocks + 4,
            width: first.shape[0] // 16,
            "num_classes": last.shape[0],
        }
        if arch == "DMWideResNet":
            if activation is None:
                raise CheckpointError(
                    "weights of a DMWideResNet do not tell its activation: give activation='silu' (the published Gowal, "
                    "Rebuffi and Wang models) or 'relu'"
                )
            config["activation"] = activation
        elif activation not in (None, "relu"):
            raise CheckpointError(f"a WideResNet has ReLU; activation={activation!r} is for DMWideResNet weights")
        if mean is not None or std is not None:
            config |= {"mean": mean, "std": std}
        return config
    raise CheckpointError(
        f"unknown architecture: expected the names of WideResNet (block1.layer.…, fc) or DMWideResNet (layer.0.block.…, "
        f"logits), found {_some(list(state))}; build the network yourself and pass the module"
    )


def classifier_from_file(
    path: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    activation: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """A wide residual network with the weights of a file.

    Args:
        path: A file as for `read_classifier_state`.
        config: The architecture, with `arch`. None takes that of the file, or infers it (`classifier_config`).
        activation, mean, std: For `classifier_config`.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged or does not fit the network.
    """
    state, file_config = read_classifier_state(path)
    if config is None:
        config = file_config
    if config is None:
        try:
            config = classifier_config(state, activation=activation, mean=mean, std=std)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
    model = build(config)
    if isinstance(model, DDPMpp):
        raise CheckpointError(f"{path} holds a score network, not a classifier")
    load_state(model, state, path)
    return model


def load_state(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """`model.load_state_dict`, strictly, with errors that say which file and key differ, and how.

    Batch-norm counters (`num_batches_tracked`) may be missing: old files have none and evaluation does not use them.
    """
    _load(model, dict(state), path, assign=False)


# --- hashes -----------------------------------------------------------------------------------------------------------


def state_dict_sha256(module: nn.Module) -> str:
    """SHA-256 of a network's parameters and buffers, equal on every device, in any memory format.

    Hashed are, in the order of names, name, dtype, shape and little-endian values of every parameter and buffer
    (normalisation constants included, batch-norm counters not: evaluation does not use them).
    """
    digest = hashlib.sha256()
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    for name in sorted(tensors):
        if name.endswith("num_batches_tracked"):
            continue
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def listed_sha256(text: str) -> dict[str, str]:
    """SHA-256 by file name, of a list as `sha256sum` prints it.

    Raises:
        ValueError: if a line is not a sum and a name.
    """
    return {name: digest for digest, name in map(str.split, text.splitlines())}


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


# --- shared -----------------------------------------------------------------------------------------------------------


def build(config: Mapping[str, Any]) -> nn.Module:
    """The network of a configuration, as `network.config` has it, with initial weights.

    Raises:
        CheckpointError: if `arch` is unknown or its constructor refuses the arguments.
    """
    arch = config.get("arch")
    if arch not in _ARCHITECTURES:
        raise CheckpointError(f"unknown architecture {arch!r}; known are {sorted(_ARCHITECTURES)}")
    return _build(arch, config)


def _build(arch: str, config: Mapping[str, Any]) -> Any:
    arguments = {key: value for key, value in config.items() if key != "arch"}
    try:
        return _ARCHITECTURES[arch](**arguments)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{arch} does not take the configuration {arguments}: {error}") from error


def _existing(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no weight file {str(path)!r}")
    return path


def _is_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors"


def _config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    if "config" not in metadata:
        return None
    try:
        config = json.loads(metadata["config"])
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: `config` in the metadata is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: `config` in the metadata is no JSON object: {metadata['config']!r}")
    return config


def _unwrapped(state: StateDict) -> StateDict:
    """Drop leading name parts that all keys share and that only wrappers have."""
    while state:
        heads = {key.partition(".")[0] for key in state}
        if len(heads) != 1 or not heads <= _WRAPPERS or not all("." in key for key in state):
            break
        state = {key.partition(".")[2]: value for key, value in state.items()}
    return state


def _some(names: Sequence[object]) -> str:
    shown = ", ".join(repr(name) for name in names[:4])
    return shown + (f", … ({len(names)})" if len(names) > 4 else "")


def _check_tensor(where: str, key: str, expected: Tensor, found: object) -> None:
    if not isinstance(found, Tensor):
        raise CheckpointError(f"{where}: {key} is a tensor of shape {tuple(expected.shape)}, found {type(found).__name__}")
    if found.shape != expected.shape:
        raise CheckpointError(f"{where}: {key} has shape {tuple(expected.shape)}, found {tuple(found.shape)}")
    if found.is_floating_point() != expected.is_floating_point():
        raise CheckpointError(f"{where}: {key} has dtype {expected.dtype}, found {found.dtype}")


def _load(model: nn.Module, state: StateDict, path: str | Path, *, assign: bool) -> None:
    expected = model.state_dict()
    for key in expected.keys() - state.keys():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros((), dtype=torch.long)
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    if missing or unexpected:
        parts = [f"missing {_some(missing)}"] if missing else []
        parts += [f"unexpected {_some(unexpected)}"] if unexpected else []
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {'; '.join(parts)}")
    for key, value in expected.items():
        _check_tensor(str(path), key, value, state[key])
    model.load_state_dict(state, assign=assign)
