"""`coupfast purify`: images in, images and a record of the run out."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from coupfast.batches import batches, gather, image_sha256, records
from coupfast.cli.arguments import add_command, add_noise, add_purification, load_purifier
from coupfast.cli.kept import Kept
from coupfast.cli.reports import command_line, environment, write_json
from coupfast.cli.stopping import said_how_to_go_on
from coupfast.data import save_images
from coupfast.evaluation.purification import describe, settled, short
from coupfast.wording import counted
from coupfast_kernels.files import write_whole

REPORT = "purify.json"
ARCHIVE = "purified.npz"


def add(commands: Any, method: str | None) -> None:
    parser = add_command(
        commands,
        "purify",
        run,
        "Purify images and write them as files",
        f"Writes one PNG an image (ID-NAME.png) and {REPORT}, which holds all that is needed to repeat the run: settings, "
        "seed, SHA-256 of weights, inputs and outputs, versions. An image's noise depends on the seed, its id and the draw, "
        "not on the batch it stands in. The same command goes on after it was stopped, and skips what is there; other files "
        "are not replaced without --force.",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="IN",
        help="image files (PNG, JPEG), folders of them, .npz archives, or the names cifar10-20, cifar10-512, cifar10",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to; made if it does not exist")
    parser.add_argument(
        "--format",
        nargs="+",
        choices=("png", "npz"),
        default=["png"],
        help=f"png: 8 bits, to look at; npz: the exact float32 values, all in {ARCHIVE}; or both",
    )
    parser.add_argument("--force", action="store_true", help="begin again, and replace files that exist")
    parser.add_argument("--limit", type=int, metavar="N", help="take at most the first N images of each input")
    parser.add_argument(
        "--channels", type=int, choices=(1, 3), help="1 keeps grey image files grey; 3: RGB, of grey ones three equal channels"
    )
    parser.add_argument("--batch", type=int, default=20, metavar="N", help="images at a time; same noise, another rounding")
    parser.add_argument("--first-id", type=int, default=0, metavar="ID", help="id of the first image; the others count on")
    parser.add_argument(
        "--draw", type=int, nargs="+", default=[0], metavar="D", help="noise draws, in [0, 2**32): one purified image for each"
    )
    add_purification(parser, method, gradient=False)
    add_noise(parser)


def run(options: argparse.Namespace) -> int:
    started = time.perf_counter()
    if options.batch < 1:
        raise ValueError(f"`--batch` is a number of images, at least 1, got {options.batch}")
    if len(set(options.draw)) != len(options.draw):
        raise ValueError(f"`--draw` has an index twice: {' '.join(map(str, options.draw))}")
    images = gather(options.inputs, options.limit, options.channels)
    count = len(images.x)
    ids = torch.arange(options.first_id, options.first_id + count)
    if options.first_id < 0 or int(ids[-1]) >= 2**32:
        raise ValueError(f"`--first-id` and the ids after it are in [0, 2**32), got {options.first_id}")
    names = []  # [draws][images]
    for draw in options.draw:
        suffix = f"-draw{draw}" if len(options.draw) > 1 else ""
        names.append([f"{i:05d}-{stem}{suffix}" for i, stem in zip(ids.tolist(), images.stems, strict=True)])
    out, png, npz = Path(options.out), "png" in options.format, "npz" in options.format
    targets = [REPORT]
    targets += [f"{name}.png" for row in names for name in row] if png else []
    targets += [ARCHIVE] if npz else []
    kept = Kept(out, REPORT, ARCHIVE, targets, force=options.force)

    purifier, networks = load_purifier(options, gradient="none")
    purifier.settle(settled(purifier, kept.settings()))  # what follows from free memory, as it was when this was begun
    files = [[f"{name}.png" for name in row] for row in names] if png else None
    rows = records(images, ids=ids, draws=options.draw, files=files)
    about = {
        "settings": describe(purifier) | {"seed": options.seed, "draws": options.draw, "batch": options.batch},
        "networks": networks,
        "environment": environment(options.device),
    }
    values: list[torch.Tensor] = []

    def of(draw: int, part: slice) -> list[dict[str, Any]]:
        return rows[draw * count + part.start : draw * count + part.stop]

    def skip(draw: int, part: slice) -> bool:
        """Files that are there need their hashes only."""
        hashes = None if npz else kept.hashes(of(draw, part))
        for row, sha256 in zip(of(draw, part), hashes or [], strict=False):
            row["output_sha256"] = sha256
        bar.update(0 if hashes is None else part.stop - part.start)
        return hashes is not None

    with (
        said_how_to_go_on(lambda: command_line([word for word in options.argv if word != "--force"])),
        contextlib.closing(kept),
        tqdm(total=count * len(options.draw), desc="purify", unit="image", disable=None) as bar,
    ):
        kept.open(about, rows)
        for batch in batches(
            purifier,
            images.x,
            seed=options.seed,
            ids=ids,
            draws=options.draw,
            size=options.batch,
            device=options.device,
            progress=sys.stderr.isatty(),
            known=lambda draw, part: kept.values(of(draw, part)),
            skip=skip,
        ):
            here = of(batch.draw, batch.part)
            for row, image in zip(here, batch.purified, strict=True):
                row["output_sha256"] = image_sha256(image)
            if batch.new:
                kept.keep(here, batch.purified)
            if npz:
                values.append(batch.purified)
            if png:
                # With --no-clamp the last step may leave the range by a little: an image file cannot.
                save_images(batch.purified.clamp(0.0, 1.0), out, names[batch.draw][batch.part], overwrite=True)
            bar.update(len(batch.purified))
        if npz:
            fields: dict[str, Any] = {
                "images": torch.cat(values).numpy(),
                "names": np.array([name for row in names for name in row]),
            }
            if images.labels is not None:
                fields["labels"] = np.tile(images.labels, len(options.draw))
            content = io.BytesIO()
            np.savez_compressed(content, **fields)
            write_whole(out / ARCHIVE, content.getvalue())
        seconds = time.perf_counter() - started
        report = {
            "command": command_line(options.argv),
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "seconds": seconds,
            "settings": about["settings"],
            "networks": networks,
            "inputs": options.inputs,
            "limit": options.limit,
            "archive": ARCHIVE if npz else None,
            "hashes": "input_sha256 and output_sha256 are of the float32 values, little-endian, (channel, row, column)",
            "images": rows,
            "environment": about["environment"],
        }
        write_json(report, out / REPORT)
        kept.close(done=True)
    each = f", {len(options.draw)} draws each," if len(options.draw) > 1 else ""
    print(
        f"Purified {counted(count, 'image')}{each} by {short(purifier)} in {counted(purifier.num_steps, 'step')}, engine "
        f"{purifier.engine} on {options.device}, in {seconds:.1f} s: {out}"
    )
    return 0
