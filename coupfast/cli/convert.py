"""`coupfast convert`: a checkpoint to safetensors."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from coupfast.cli.arguments import add_command
from coupfast.cli.reports import refuse_existing
from coupfast.models.checkpoints import file_sha256
from coupfast.models.from_file import convert_checkpoint
from coupfast.models.registry import described


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "convert",
        run,
        "Convert a checkpoint to safetensors with the weights in use only (of score_sde's checkpoint_8.pth the averaged ones)",
    )
    parser.add_argument("source", metavar="SRC", help="the checkpoint; nothing in it is executed")
    parser.add_argument("target", metavar="DST", help="the .safetensors file to write")
    parser.add_argument(
        "--config", metavar="FILE", help="JSON with the network's configuration; without it the checkpoint tells, or --network"
    )
    parser.add_argument(
        "--network",
        metavar="NAME",
        help=f"whose weights they are: {described('score')}, {described('classifier')}, or package.module:NAME",
    )
    parser.add_argument("--activation", choices=["relu", "silu"], help="of a DMWideResNet, whose weights do not tell it")
    parser.add_argument("--image-size", type=int, metavar="N", help="of a DDPMpp, whose weights do not tell it: N x N pixels")
    parser.add_argument("--force", action="store_true", help="replace DST if it exists")


def run(options: argparse.Namespace) -> int:
    source, target = Path(options.source), Path(options.target)
    if target.suffix != ".safetensors":
        raise ValueError(f"{target} is written as safetensors: give it that suffix, so that it is read as such")
    refuse_existing([target], options.force)
    config = None if options.config is None else json.loads(Path(options.config).read_text())
    untold = {"activation": options.activation, "image_size": options.image_size}
    written = convert_checkpoint(source, target, config=config, name=options.network, options=untold)
    print(
        f"{file_sha256(target)}  {target}\n"
        f"{target.stat().st_size / 1e6:.0f} MB of weights of a {written['arch']}, of {source.stat().st_size / 1e6:.0f} MB in "
        f"{source}"
    )
    return 0
