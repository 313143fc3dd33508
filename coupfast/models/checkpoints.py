"""Weight files in and out: nothing in a file is ever executed, nothing in it is taken on trust.

Pickled files go through torch's restricted unpickler (`weights_only=True`). Checkpoints keep NumPy numbers beside their weights
(a learning rate, an accuracy), so NumPy's scalar, its dtype and its types of numbers are allowed for the time of a read, and no
more. Whatever is wrong with a file raises `CheckpointError`. What the tensors mean is said elsewhere: `wrappers.py` finds the
weights among what a file holds, the families (`registry.py`) recognise theirs.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from coupfast.models.registry import CheckpointError
from coupfast_kernels.files import written_whole

__all__ = [
    "CheckpointError",
    "file_sha256",
    "listed_sha256",
    "load_state",
    "read_safetensors",
    "read_torch",
    "read_weights",
    "state_dict_sha256",
    "write_safetensors",
]

StateDict = dict[str, Tensor]

_NUMBERS: tuple[type[np.generic], ...] = (
    *(np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
    *(np.float16, np.float32, np.float64),
)


def read_torch(path: str | Path) -> Any:
    """Read what `torch.save` wrote, on the CPU, through the restricted unpickler.

    Files in torch's zip format are memory-mapped: entries that are not touched are not read.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is truncated, damaged, or holds anything but tensors and plain values.
    """
    path = existing(path)
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
        *(type(np.dtype(number)) for number in _NUMBERS),
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
            f"{path} ({path.stat().st_size} bytes) is not a torch file of tensors and plain values: {reason.rstrip('.')}. "
            "Nothing in it was executed. If it is damaged, fetch it again; other kinds of pickles are not read."
        ) from error


def read_safetensors(path: str | Path) -> tuple[StateDict, dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is truncated or is not a safetensors file.
    """
    path = existing(path)
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

    Raises:
        OSError: if the file cannot be written, as on a full disk; nothing is left behind then.
    """
    path = Path(path)
    tensors = _apart({key: value.detach().cpu().contiguous() for key, value in state.items()})
    try:
        with written_whole(path) as partial:
            save_file(tensors, partial, metadata={**(metadata or {}), "config": json.dumps(config)})
    except SafetensorError as error:  # the library's own name for what the operating system refused
        size = sum(tensor.nbytes for tensor in tensors.values())
        raise OSError(f"{path} could not be written ({size / 1e6:.0f} MB of weights): {error}") from error


def _apart(tensors: StateDict) -> StateDict:
    """Tied weights in memory of their own: the format has no tensors that share theirs."""
    seen: set[int] = set()
    for key, value in tensors.items():
        storage = value.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != value.nbytes:
            tensors[key] = value.clone()
        seen.add(storage.data_ptr())
    return tensors


def read_weights(path: str | Path) -> tuple[Any, dict[str, Any] | None]:
    """All that a weight file holds, and the configuration of its network if the file has one.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged or holds anything but tensors and plain values.
    """
    path = existing(path)
    if path.suffix == ".safetensors":
        state, metadata = read_safetensors(path)
        return state, _config(path, metadata)
    return read_torch(path), None


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


def existing(path: str | Path) -> Path:
    """The path of a weight file that is there.

    Raises:
        FileNotFoundError: if it is not; the message says what is there instead.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.is_file())
        raise FileNotFoundError(f"no weight file {str(path)!r}: that is a folder, with {some(files) if files else 'no files'}")
    if not path.is_file():
        raise FileNotFoundError(f"no weight file {str(path)!r}{_beside(path)}")
    return path


def _beside(path: Path) -> str:
    if not path.parent.is_dir():
        return f": there is no folder {str(path.parent)!r}"
    if not path.suffix:
        return ""
    files = sorted(file.name for file in path.parent.iterdir() if file.suffix == path.suffix and file.is_file())
    return f": {str(path.parent)!r} has {some(files)}" if files else ""


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


def some(names: Sequence[object]) -> str:
    """The first few names of many, for a message."""
    shown = ", ".join(repr(name) for name in names[:4])
    return shown + (f", … ({len(names)})" if len(names) > 4 else "")


def check_tensor(where: str, key: str, expected: Tensor, found: object) -> None:
    """CheckpointError unless `found` can be the weight `expected`, named `key`."""
    if not isinstance(found, Tensor):
        raise CheckpointError(f"{where}: {key} is a tensor of shape {tuple(expected.shape)}, found {type(found).__name__}")
    if found.shape != expected.shape:
        raise CheckpointError(f"{where}: {key} has shape {tuple(expected.shape)}, found {tuple(found.shape)}")
    if found.is_floating_point() != expected.is_floating_point():
        raise CheckpointError(f"{where}: {key} has dtype {expected.dtype}, found {found.dtype}")


def load_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    path: str | Path,
    *,
    may_lack: frozenset[str] = frozenset(),
    assign: bool = False,
) -> None:
    """`model.load_state_dict`, strictly, with errors that say which file and key differ, and how.

    Args:
        may_lack: Constants that the model has by itself. Batch-norm counters (`num_batches_tracked`) may be missing, too: old
            files have none and evaluation does not use them.
        assign: The tensors become the model's own, which may be on the meta device; floating-point ones in its dtype.
    """
    state, expected = dict(state), model.state_dict()
    for key in expected.keys() - state.keys():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros((), dtype=torch.long, device="cpu")
        elif key in may_lack:
            state[key] = expected[key]
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    if missing or unexpected:
        parts = [f"missing {some(missing)}"] if missing else []
        parts += [f"unexpected {some(unexpected)}"] if unexpected else []
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {'; '.join(parts)}")
    for key, value in expected.items():
        check_tensor(str(path), key, value, state[key])
        if assign:
            state[key] = state[key].to(value.dtype)
    model.load_state_dict(state, assign=assign)
