"""`coupfast doctor`: what is installed, and whether it computes what it should."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from coupfast import doctor
from coupfast.cli.arguments import add_command, parse_device
from coupfast.cli.reports import refuse_existing, show


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "doctor",
        run,
        "Say what is installed, which engines run here, and whether they compute what they should",
        "Takes 10 to 20 seconds on two cores. On a GPU its kernels and the CUDA engine are checked, too: a quick look by "
        "default, under two minutes where nothing is compiled yet (a prediction); --full takes every case, with PyTorch's "
        "compiler, and times them.",
    )
    parser.add_argument("--strict", action="store_true", help="exit with status 1 if there is any problem")
    parser.add_argument("--full", action="store_true", help="on a GPU everything, in several times as long")
    parser.add_argument("--json", metavar="FILE", help="also write the report as JSON; -: to stdout, instead of the text")
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    parser.add_argument("--device", type=parse_device, metavar="DEVICE", help="where to try the engines; the CPU and every GPU")


def run(options: argparse.Namespace) -> int:
    if options.json not in (None, "-"):
        refuse_existing([Path(options.json)], options.force)
    report = doctor.run(device=options.device, full=options.full, progress=sys.stderr.isatty())
    show(report, doctor.text(report), options.json)
    return 1 if options.strict and not report["ok"] else 0
