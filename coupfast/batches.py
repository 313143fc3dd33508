"""Many images from many places, purified a batch at a time, with a record of each."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coupfast.data import image_files, load_images, part_of
from coupfast.purify import Purifier


@dataclasses.dataclass(frozen=True)
class Images:
    """Images of all inputs, in order.

    Attributes:
        x: In [0, 1], shape (n, channels, height, width).
        stems: What each is called, without its suffix.
        sources: Where each comes from.
        labels: If every input has them.
    """

    x: Tensor
    stems: list[str]
    sources: list[str]
    labels: np.ndarray | None


def gather(inputs: Sequence[str], limit: int | None, channels: int | None = None) -> Images:
    """The images of several inputs; see `load_images`.

    Args:
        inputs: Files, folders, archives or names.
        limit: At most the first ones of each input.
        channels: Of image files; 1 keeps grey ones grey.

    Raises:
        ValueError: if an input is none, or their images are not of one shape.
    """
    parts: list[Tensor] = []
    stems: list[str] = []
    sources: list[str] = []
    labels: list[np.ndarray] = []
    for source in inputs:
        x, y = load_images(source, limit=limit, channels=channels, labels_needed=False)
        if parts and x.shape[1:] != parts[0].shape[1:]:
            found, first = ("x".join(map(str, shape[1:])) for shape in (x.shape, parts[0].shape))
            raise ValueError(f"the images of {source} are {found}, those of {inputs[0]} {first}; purify them separately")
        whole, part = part_of(source)
        path, start = Path(whole).expanduser(), 0 if part is None else part.start
        if path.is_dir():
            files = image_files(path)[start : start + len(x)]
            stems += [file.stem for file in files]
            sources += list(map(str, files))
        elif path.is_file() and path.suffix.lower() != ".npz":
            stems.append(path.stem)
            sources.append(str(path))
        else:
            stems += [path.stem] * len(x)
            sources += [f"{whole}[{start + i}]" for i in range(len(x))]
        parts.append(x)
        if y is not None:
            labels.append(y.numpy())
    return Images(torch.cat(parts), stems, sources, np.concatenate(labels) if len(labels) == len(parts) else None)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Images that were purified together: in draw number `draw` those at `part`; `new` if that was now."""

    draw: int
    part: slice
    purified: Tensor
    new: bool = True


def batches(
    purifier: Purifier,
    x: Tensor,
    *,
    seed: int,
    ids: Tensor,
    draws: Sequence[int],
    size: int,
    device: torch.device,
    progress: bool = False,
    known: Callable[[int, slice], Tensor | None] = lambda draw, part: None,
    skip: Callable[[int, slice], bool] = lambda draw, part: False,
) -> Iterator[Batch]:
    """Purify images, some at a time, once for each draw; the results are on the CPU.

    Args:
        x: In [0, 1].
        seed: Fixes the noise.
        ids: Image ids, in [0, 2**32).
        draws: Draws of the noise.
        size: Images at a time: same noise, another rounding.
        device: The networks'.
        progress: Show a bar for the steps of each batch.
        known: What became of a batch before, from the draw's number and the part; None purifies it.
        skip: Whether a batch is wanted at all.
    """
    x = x.to(device)
    for number, draw in enumerate(draws):
        for start in range(0, len(x), size):
            part = slice(start, min(start + size, len(x)))
            if skip(number, part):
                continue
            if (before := known(number, part)) is not None:
                yield Batch(number, part, before, new=False)
                continue
            with torch.no_grad():
                result = purifier(x[part], seed=seed, ids=ids[part], draw=draw, progress=progress)
            assert isinstance(result, Tensor)
            yield Batch(number, part, result.cpu())


def records(
    images: Images, *, ids: Tensor, draws: Sequence[int], files: Sequence[Sequence[str]] | None
) -> list[dict[str, Any]]:
    """Of each draw and image where it comes from and what it is, a draw after the other.

    Args:
        files: Names of what is written, [draws][images]; None if nothing is.
    """
    hashes = [image_sha256(image) for image in images.x]
    return [
        {
            "id": int(ids[i]),
            "draw": draw,
            "source": images.sources[i],
            "label": None if images.labels is None else int(images.labels[i]),
            "input_sha256": hashes[i],
            "file": None if files is None else files[d][i],
        }
        for d, draw in enumerate(draws)
        for i in range(len(images.x))
    ]


def image_sha256(x: Tensor) -> str:
    """SHA-256 of float32 values, little-endian, (channel, row, column)."""
    return hashlib.sha256(x.contiguous().numpy().astype("<f4").tobytes()).hexdigest()
