"""`coupfast evaluate`: start or continue a run."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coupfast.cli.arguments import add_command, add_workers
from coupfast.cli.reports import command_line
from coupfast.cli.spec import add_spec, spec_of
from coupfast.cli.stopping import said_how_to_go_on
from coupfast.evaluation import notes, plan
from coupfast.evaluation.launch import CLUSTERS, evaluate
from coupfast.evaluation.ledger import DATABASE, Ledger


def add(commands: Any, method: str | None, attack: str | None) -> None:
    parser = add_command(
        commands,
        "evaluate",
        run,
        "Attack a defense and say how sure the result is; can be killed and continued at any moment",
        "The run's folder holds a ledger and the attacked images. The result depends on the options here, not on the number of "
        "workers or on interruptions.",
    )
    parser.add_argument("--out", metavar="RUN", help="folder of a new run")
    parser.add_argument("--resume", metavar="RUN", help="continue the run in this folder, with its own options")
    add_workers(parser, "units at a time, which changes no bit of the result")
    parser.add_argument("--plan", action="store_true", help="probe first; keep what it will take beside the run, once")
    parser.add_argument("--price", type=float, metavar="P", help="with --plan: of a worker and hour, in any currency")
    parser.add_argument(
        "--certify",
        type=int,
        metavar="N",
        help="keep a certificate of the gradient that the attack follows, from N images, with the run (default 1 where it "
        "follows one through a purification that is built here, else 0; a few dozen purifications in float64)",
    )
    parser.add_argument("--cluster", choices=CLUSTERS, default="none", help="none: processes here; ray: on a Ray cluster")
    add_spec(parser, method, attack)


def _resume(options: argparse.Namespace, folder: Path) -> str | None:
    """What to type to go on, if the run has begun. All else its folder knows."""
    if not (folder / DATABASE).is_file():
        return None
    words = ["--resume", str(folder)]
    if options.workers != 1:
        words += ["--workers", str(options.workers)]
    if options.cluster != "none":
        words += ["--cluster", options.cluster]
    if options.certify is not None:
        words += ["--certify", str(options.certify)]
    return command_line(["evaluate", *words])


def _check_kept(options: argparse.Namespace, folder: Path) -> None:
    """ValueError if a certificate or a plan is asked for that is not the one that the run has: there is one of each."""
    with Ledger(folder, read_only=True) as ledger:
        kept, count = ledger.notes(), ledger.configuration["images"]["count"]
    pairs = []
    if options.certify and "certificate" in kept:
        pairs.append(("--certify", min(options.certify, count), "a certificate of images", len(kept["certificate"]["ids"])))
    if options.price is not None and "plan" in kept:
        pairs.append(("--price", options.price, "a plan at a price", kept["plan"]["price"]))
    for flag, asked, what, has in pairs:
        if asked != has:
            raise ValueError(f"{flag} is {asked}, and the run in {folder} has {what}: {has}; a run has one of it: leave it out")


def run(options: argparse.Namespace) -> int:
    if (options.out is None) == (options.resume is None):
        raise ValueError("say where the run is kept: --out RUN starts one, --resume RUN continues one")
    folder, spec = Path(options.resume or options.out), spec_of(options)
    if options.price is not None and not options.plan:
        raise ValueError("`--price` is for --plan, which says what the run will cost")
    if options.resume:
        _check_kept(options, folder)
    certified = notes.certified_by_default(spec) if options.certify is None else options.certify
    notes.check_certified(spec, certified)

    def certify() -> dict[str, Any]:
        count = min(certified, len(spec.load()[0]))
        print(f"certifying the gradient that the attack follows, on {count} of the images", file=sys.stderr, flush=True)
        return notes.certificate(spec, certified, folder=folder, progress=sys.stderr.isatty())

    beside: dict[str, Callable[[], Any]] = {}
    if options.plan:
        beside["plan"] = functools.partial(
            notes.predict,
            spec,
            workers=options.workers,
            price=options.price,
            resumed=folder if options.resume else None,
            say=functools.partial(print, flush=True),
        )
    if certified:
        beside["certificate"] = certify
    with (
        said_how_to_go_on(lambda: _resume(options, folder)),
        evaluate(
            spec,
            out=folder,
            resume=options.resume is not None,
            workers=options.workers,
            cluster=options.cluster,
            command=command_line(options.argv),
            notes=beside,
            progress=True,
        ) as found,
    ):
        if options.plan:
            print(plan.beside(plan.Plan.from_dict(found.ledger.notes()["plan"]), plan.happened(found.ledger)))
        print(f"{found.title}; 95 % intervals")
        print(found.table())
        print(f"everything is in {folder}: coupfast report {folder}; fingerprint of the results {found.fingerprint[:16]}")
    return 0
