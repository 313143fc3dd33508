"""Warm starts: attacks that begin at what an earlier run's attacks made of the same images, whatever its defense and ball."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save

from coupfast.evaluation.configuration import image_keys, images_sha256
from coupfast.evaluation.ledger import Ledger
from coupfast.evaluation.units import JUDGE
from coupfast_kernels.files import write_whole

FILE = "start.safetensors"  # a run keeps what it began with: the earlier one may go


@dataclasses.dataclass(frozen=True)
class Start:
    """Where attacks begin.

    Attributes:
        x: An image for each of the run's, of their shape, not yet in any ball.
        described: What a configuration says of it.
    """

    x: np.ndarray
    described: dict[str, Any]

    def keep(self, folder: Path) -> None:
        """Write them into the run's folder, if they are not there."""
        if not (folder / FILE).is_file():
            write_whole(folder / FILE, save({"x": self.x}))


def start_of(source: str | Path, x: torch.Tensor, y: torch.Tensor, *, resumed: Path | None = None) -> Start:
    """The strongest adversarial forms that a finished run found of these images.

    Args:
        source: Its folder.
        x, y: The images that are to be attacked, in [0, 1], and their labels. All of them are in that run, as their hashes say;
            that run may have others.
        resumed: The folder of a run that began with them and goes on; the earlier run need not be there any more.

    Raises:
        LedgerError: if there is no run.
        ValueError: if it is not finished, has attacked nothing, or images, labels or shapes differ.
    """
    if resumed is not None and (kept := _kept(resumed)) is not None:
        return kept
    with Ledger(source, read_only=True) as ledger:
        check_source(ledger)
        images, count = ledger.configuration["images"], len(x)
        if list(x.shape[1:]) != images["shape"]:
            raise ValueError(
                f"`start_from`: the images of the run in {source} are of shape {tuple(images['shape'])}, and those to be "
                f"attacked of {tuple(x.shape[1:])}"
            )
        theirs = {key: number for number, key in enumerate(image_keys(images["sha256"]))}
        mine = image_keys([images_sha256(image)[:16] for image in x])
        if missing := [number for number, key in enumerate(mine) if key not in theirs]:
            raise ValueError(
                f"`start_from`: {len(missing)} of {count} images are not in the run in {source}, the first of them number "
                f"{missing[0]}: it has to have attacked all of them, by their values"
            )
        numbers = [theirs[key] for key in mine]
        if wrong := [i for i, number in enumerate(numbers) if images["labels"][number] != int(y[i])]:
            raise ValueError(
                f"`start_from`: {len(wrong)} of {count} images have another label in the run in {source}: number {wrong[0]} "
                f"has {images['labels'][numbers[wrong[0]]]} there and {int(y[wrong[0]])} here"
            )
        clean = np.zeros((images["count"], *x.shape[1:]), dtype=np.float32)
        clean[numbers] = x.numpy()
        found = ledger.attacked_images(numbers, clean)
        spec = ledger.configuration["spec"]
        return Start(
            found,
            {
                "run": str(source),
                "attack": spec["attack"],
                "norm": spec["norm"],
                "eps": spec["eps"],
                "fingerprint": ledger.fingerprint(),
                "x_sha256": images_sha256(torch.from_numpy(found)),
            },
        )


def check_source(ledger: Ledger) -> None:
    """ValueError if no attack can begin from a run: it is not finished, or attacked nothing."""
    if not ledger.configuration["stages"]:
        raise ValueError(f"`start_from`: the run in {ledger.folder} had no attack, and its images are clean ones")
    judged = sum(len(record.unit.images) for record in ledger.done().values() if record.unit.stage == JUDGE)
    if judged < ledger.configuration["images"]["count"]:
        raise ValueError(
            f"`start_from`: the run in {ledger.folder} is not finished: continue it with coupfast evaluate --resume "
            f"{ledger.folder}"
        )


def _kept(folder: Path) -> Start | None:
    """What a run has kept of where it began; None if that is not there, or is damaged, which then goes."""
    with Ledger(folder, read_only=True) as ledger:
        described = ledger.configuration.get("start")
    try:
        x = load((folder / FILE).read_bytes())["x"]
        if described is not None and images_sha256(torch.from_numpy(x)) == described["x_sha256"]:
            return Start(x, described)
    except (OSError, SafetensorError, KeyError):
        pass
    (folder / FILE).unlink(missing_ok=True)
    return None
