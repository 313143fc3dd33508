"""`coupfast certify`: certified radii of denoised smoothing."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from coupfast.batches import gather, image_sha256
from coupfast.cli.arguments import add_command, add_networks, add_noise, add_option, load_given_classifier, load_purifier
from coupfast.cli.reports import command_line, environment, refuse_existing, write_json
from coupfast.cli.stopping import said_how_to_go_on
from coupfast.evaluation.certify import certify
from coupfast.evaluation.journal import read_about
from coupfast.evaluation.purification import describe, settled
from coupfast.methods import DenoisedSmoothing
from coupfast.options import options_of
from coupfast.purify import PurifiedClassifier
from coupfast.settings import options as all_options

REPORT, PLOT, JOURNAL = "certify.json", "certify.png", "certify.journal"


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "certify",
        run,
        "Certify L2 radii of a classifier behind denoised smoothing, by Monte Carlo",
        f"Writes {REPORT}, with a certificate for every image and the certified accuracy over radii, and {PLOT}. The same "
        "command goes on after it was stopped.",
    )
    parser.add_argument("input", metavar="IN", help="labelled images: an .npz archive, cifar10-20, cifar10-512 or cifar10")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to; made if it does not exist")
    parser.add_argument("--force", action="store_true", help="begin again, and replace files that exist")
    parser.add_argument("--limit", type=int, metavar="N", help="take at most the first N images")
    parser.add_argument("--draws", type=int, default=1000, metavar="N", help="draws that count; 100000 are published")
    parser.add_argument("--selection-draws", type=int, default=100, metavar="N", help="draws that choose the class")
    parser.add_argument("--alpha", type=float, default=0.001, metavar="A", help="probability that a certificate is wrong")
    parser.add_argument("--batch", type=int, default=100, metavar="N", help="draws at a time")
    group = parser.add_argument_group("the smoothing")
    for option in [*options_of(DenoisedSmoothing), *all_options()["engine"]]:
        if option.field != "out_of_range":  # of the image before its noise: a certificate is about images in [0, 1]
            add_option(group, option)
    add_networks(group)
    add_noise(parser)


def run(options: argparse.Namespace) -> int:
    started = time.perf_counter()
    out = Path(options.out)
    refuse_existing([out / REPORT, out / PLOT], options.force)
    images = gather([options.input], options.limit)
    if images.labels is None:
        raise ValueError(f"{options.input} has no labels, and a certified accuracy is about true classes")
    purifier, networks = load_purifier(options, method="denoised-smoothing", gradient="none")
    classifier, networks["classifier"] = load_given_classifier(options)
    out.mkdir(parents=True, exist_ok=True)
    journal = out / JOURNAL
    if options.force:
        journal.unlink(missing_ok=True)
    # As it was when the counting began, and as the report says it.
    purifier.settle(settled(purifier, (read_about(journal) or {}).get("settings")))
    with said_how_to_go_on(lambda: command_line([word for word in options.argv if word != "--force"])):
        found = certify(
            PurifiedClassifier(purifier, classifier, seed=options.seed),
            images.x.to(options.device),
            images.labels.tolist(),
            draws=options.draws,
            selection_draws=options.selection_draws,
            alpha=options.alpha,
            batch=options.batch,
            journal=journal,
            progress=sys.stderr.isatty(),
        )
        report = {
            "command": command_line(options.argv),
            "seconds": time.perf_counter() - started,
            "certification": found.to_dict(),
            "settings": describe(purifier),
            "networks": networks,
            "images": [
                {"source": source, "sha256": image_sha256(image)}
                for source, image in zip(images.sources, images.x, strict=True)
            ],
            "environment": environment(options.device),
        }
        try:
            found.plot(out / PLOT)
        except ImportError as error:
            print(f"no {PLOT}: {error}", file=sys.stderr)
        write_json(report, out / REPORT)
        for path in (journal, journal.with_name(f"{JOURNAL}.lock")):
            path.unlink(missing_ok=True)
    print(found)
    return 0
