"""`coupfast convert`: a checkpoint to safetensors."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from coupfast.cli.arguments import add_command
from coupfast.cli.reports import refuse_existing
from coupfast.models.checkpoints import convert_score_checkpoint, file_sha256


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "convert",
        run,
        "Convert a score_sde checkpoint (checkpoint_8.pth) to safetensors with the averaged weights only",
    )
    parser.add_argument("source", metavar="SRC", help="the checkpoint; nothing in it is executed")
    parser.add_argument("target", metavar="DST", help="the .safetensors file to write")
    parser.add_argument(
        "--config", metavar="FILE", help="JSON with the arguments of DDPMpp; without it cifar10_ddpmpp_deep_continuous"
    )
    parser.add_argument("--force", action="store_true", help="replace DST if it exists")


def run(options: argparse.Namespace) -> int:
    source, target = Path(options.source), Path(options.target)
    if target.suffix != ".safetensors":
        raise ValueError(f"{target} is written as safetensors: give it that suffix, so that it is read as such")
    refuse_existing([target], options.force)
    config = None if options.config is None else json.loads(Path(options.config).read_text())
    convert_score_checkpoint(source, target, config=config)
    print(
        f"{file_sha256(target)}  {target}\n"
        f"{target.stat().st_size / 1e6:.0f} MB of averaged weights, of {source.stat().st_size / 1e6:.0f} MB in {source}"
    )
    return 0
