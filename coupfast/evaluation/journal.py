"""What the defense has answered in a unit of work that is not done yet, on disk.

A record is a line of JSON and the tensors that it describes, behind its lengths and its CRC-32. It is with the operating
system when `append` returns, so that it outlives its process however that ends, and on the disk some seconds later. What a
machine that fails has left of the last record is cut off when the journal is opened again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import secrets
import struct
import time
import zlib
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from coupfast.evaluation.configuration import difference
from coupfast_kernels.locks import locked

logger = logging.getLogger(__name__)

VERSION = 1
FOLDER, SUFFIX = "journals", ".journal"

SYNC_EVERY = 5.0  # seconds from one write to the disk to the next
_HEAD = struct.Struct("<IIQ")  # CRC-32 of what follows, bytes of JSON, bytes of tensors


class JournalError(OSError):
    """A journal that belongs to something else, or that the work which is done again does not agree with."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One record: what it says, and where its tensors lie."""

    said: dict[str, Any]
    offset: int
    size: int


def path_of(folder: str | Path, unit: str) -> Path:
    """Where the journal of a unit is, in the folder of its run."""
    return Path(folder) / FOLDER / f"{unit}{SUFFIX}"


def steps_path(folder: str | Path, work: str) -> Path:
    """Where the steps are of what a unit, or other work, is at."""
    return path_of(folder, work).with_suffix(".steps")


def remove(folder: str | Path, unit: str) -> None:
    """A unit, or other work, needs its journal no more."""
    path, steps = path_of(folder, unit), steps_path(folder, unit)
    for each in (path, steps, *map(_lock_of, (path, steps))):
        with contextlib.suppress(OSError):  # what is left costs space only
            each.unlink(missing_ok=True)


def remove_of(folder: Path, units: Container[str]) -> None:
    """The same for all of these units that have one."""
    for path in (folder / FOLDER).glob(f"*{SUFFIX}*"):
        if (unit := path.name.partition(".")[0]) in units:
            remove(folder, unit)


def read_about(path: Path) -> dict[str, Any] | None:
    """What a journal is about; None where there is none, or nothing whole in it."""
    try:
        with path.open("rb") as file:
            checksum, text_size, _ = _HEAD.unpack(file.read(_HEAD.size))
            text = file.read(text_size)
        if zlib.crc32(text) != checksum:
            return None
        about: dict[str, Any] = json.loads(text)["said"]["about"]
        return about
    except (OSError, struct.error, ValueError, KeyError, TypeError):
        return None


def digest(tensor: torch.Tensor) -> str:
    """128 bits of BLAKE2b over a tensor's type, shape and values."""
    found = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=16)
    found.update(_bytes(tensor.detach()))
    return found.hexdigest()


class Journal:
    """A unit's, opened where it was left, or begun.

    Args:
        path: The file; its folder is made.
        about: Of which unit of which run, as JSON has it.
        patience: Seconds to wait at most for another process that writes to it.

    Attributes:
        name: Its own, drawn when it was begun.
        seconds_before: That the unit had taken when the last record was made that was found.

    Raises:
        JournalError: if the file is about something else.
        OSError: if it cannot be opened, or another process is writing to it.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], *, patience: float = 0.0) -> None:
        self.path, self.seconds_before = path, 0.0
        self._entries: dict[tuple[Any, ...], Entry] = {}
        self._begun = self._synced = time.monotonic()
        self._whole = True
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stack = contextlib.ExitStack()
        try:
            self._stack.enter_context(locked(_lock_of(path), work=f"writes {path}", patience=patience))
        except TimeoutError as error:
            raise TimeoutError(f"another process is writing {path}; wait for it to end") from error
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._stack.callback(os.close, self._file)
        try:
            self._read()
            wanted = {"version": VERSION, "about": json.loads(json.dumps(dict(about)))}
            first = self._entries.get(("about",))
            found = {**wanted, "name": secrets.token_hex(16)} if first is None else first.said
            if first is None:
                self.append(("about",), found)
            self.name: str = found["name"]
            if changed := difference(found, {**wanted, "name": self.name}):
                raise JournalError(f"{path} is of another configuration: {changed}; remove it to begin again")
        except BaseException:
            self._stack.close()
            raise

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: tuple[Any, ...]) -> Entry | None:
        """The record of that key."""
        return self._entries.get(key)

    def tensors(self, entry: Entry, device: torch.device) -> list[torch.Tensor]:
        """A record's, laid out in memory as they were."""
        content, found = os.pread(self._file, entry.size, entry.offset), []
        for layout in entry.said["tensors"]:
            size = layout["bytes"]
            found.append(_tensor(layout, content[:size], device))
            content = content[size:]
        return found

    def append(self, key: tuple[Any, ...], said: Mapping[str, Any], tensors: Sequence[torch.Tensor] = ()) -> None:
        """Add a record. Where that fails, a warning says so once, and nothing more is added: the work does not depend on it."""
        if not self._whole:
            return
        layouts, parts = [], []
        for tensor in tensors:
            layout, content = _laid_out(tensor.detach())
            layouts.append(layout)
            parts.append(content)
        now = time.monotonic()
        seconds = self.seconds_before + now - self._begun
        text = json.dumps({"key": key, "at": round(seconds, 3), "said": dict(said), "tensors": layouts}).encode()
        payload = b"".join(parts)
        body = text + payload
        record = _HEAD.pack(zlib.crc32(body), len(text), len(payload)) + body
        try:
            left = memoryview(record)
            while left:
                left = left[os.write(self._file, left) :]
            if now - self._synced >= SYNC_EVERY:
                self.sync()
        except OSError as error:
            self._whole = False
            logger.warning("%s cannot be written to (%s): what is done from here on is lost if it is stopped", self.path, error)

    def sync(self) -> None:
        """See that all of it is on the disk."""
        os.fsync(self._file)
        self._synced = time.monotonic()

    def close(self) -> None:
        if self._whole:
            with contextlib.suppress(OSError):  # as good as it gets
                self.sync()
        self._stack.close()

    def _read(self) -> None:
        """All records that are whole; what comes after the last of them goes."""
        end, size = 0, os.fstat(self._file).st_size
        while end + _HEAD.size <= size:
            checksum, text_size, payload_size = _HEAD.unpack(os.pread(self._file, _HEAD.size, end))
            start = end + _HEAD.size
            if start + text_size + payload_size > size:
                break
            body = os.pread(self._file, text_size + payload_size, start)
            if zlib.crc32(body) != checksum:
                break
            record = json.loads(body[:text_size])
            said = {**record["said"], "tensors": record["tensors"]} if record["tensors"] else record["said"]
            self._entries[tuple(record["key"])] = Entry(said, start + text_size, payload_size)
            self.seconds_before = record["at"]
            end = start + text_size + payload_size
        if end < size:
            os.ftruncate(self._file, end)
        os.lseek(self._file, end, os.SEEK_SET)


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _laid_out(tensor: torch.Tensor) -> tuple[dict[str, Any], bytes]:
    """A tensor's layout in memory, and its values: a sum over its axes in another order may round otherwise."""
    if not _separate(tensor):
        tensor = tensor.contiguous()
    content, dtype = _bytes(_once(tensor)), str(tensor.dtype).removeprefix("torch.")
    layout = {"dtype": dtype, "shape": list(tensor.shape), "strides": list(tensor.stride()), "bytes": len(content)}
    return layout, content


def _tensor(layout: Mapping[str, Any], content: bytes, device: torch.device) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, layout["dtype"])
    tensor = torch.empty_strided(layout["shape"], layout["strides"], dtype=dtype, device=device)
    if content:
        places = _once(tensor)
        places.copy_(torch.frombuffer(bytearray(content), dtype=dtype).view(places.shape))
    return tensor


def _once(tensor: torch.Tensor) -> torch.Tensor:
    """Every element of memory once, whatever axes it is repeated along."""
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


def _separate(tensor: torch.Tensor) -> bool:
    """Whether elements are apart in memory, but for repeated ones."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if stride == 0 or size <= 1:
            continue
        if stride <= reach:
            return False
        reach += stride * (size - 1)
    return True


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
