"""`coupfast check-gradient`: a certificate of the gradient through a purification."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from coupfast.batches import gather
from coupfast.cli.arguments import add_command, add_noise, add_purification, load_given_classifier, load_purifier
from coupfast.cli.reports import command_line, environment, refuse_existing, show
from coupfast.gradient_check import check_gradient
from coupfast.purify import PurifiedClassifier


def add(commands: Any, method: str | None) -> None:
    parser = add_command(
        commands,
        "check-gradient",
        run,
        "Compare the gradient through a purification with float64 back-propagation and finite differences",
        "Float64 passes of whole purifications are slow on a CPU: --num-steps 20 or fewer serves for a first look. Exits with "
        "1 where a gradient claims to be that of the steps that ran, and is not.",
    )
    parser.add_argument("input", nargs="?", default="cifar10-20", metavar="IN", help="images, as for `coupfast purify`")
    parser.add_argument("--limit", dest="images", type=int, default=2, metavar="N", help="the first N images")
    # An older spelling.
    parser.add_argument("--images", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.add_argument(
        "--draws", type=int, default=8, metavar="M", help="noise draws of the signal-to-noise ratio, from 2; 0: leave it out"
    )
    parser.add_argument(
        "--directions",
        type=int,
        default=2,
        metavar="D",
        help="random directions of the finite differences besides the gradient's sign; 0: leave both out",
    )
    parser.add_argument(
        "--memory-limit", type=float, metavar="GIB", help="GiB that float64 back-propagation may take; half of what is free"
    )
    parser.add_argument("--json", metavar="FILE", help="also write everything as JSON; -: to stdout, instead of the text")
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    add_purification(parser, method, gradient=True)
    add_noise(parser)


def run(options: argparse.Namespace) -> int:
    if options.json not in (None, "-"):
        refuse_existing([Path(options.json)], options.force)
    images = gather([options.input], options.images)
    purifier, networks = load_purifier(options)
    classifier = purifier.classifier
    if classifier is None or "classifier" not in networks:
        classifier, networks["classifier"] = load_given_classifier(options)
    certificate = check_gradient(
        PurifiedClassifier(purifier, classifier, seed=options.seed),
        images.x.to(options.device),
        None if images.labels is None else torch.from_numpy(images.labels),
        images=options.images,
        draws=options.draws,
        directions=options.directions,
        memory_limit=None if options.memory_limit is None else int(options.memory_limit * 2**30),
        progress=sys.stderr.isatty(),
    )
    report = {
        "command": command_line(options.argv),
        "certificate": certificate.to_dict(),
        "networks": networks,
        "images": images.sources[: options.images],
        "environment": environment(options.device),
    }
    show(report, str(certificate), options.json)
    return 0 if certificate.holds else 1
