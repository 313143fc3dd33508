"""`coupfast plan`: what an evaluation would take, or took."""

from __future__ import annotations

import argparse
from typing import Any

from coupfast.cli.arguments import add_command, add_workers
from coupfast.cli.spec import add_spec, flag, said, spec_of
from coupfast.evaluation import plan
from coupfast.evaluation.ledger import Ledger

DEFAULTS = {"workers": 1, "probe_images": 1, "probe_steps": 2, "price": None, "pilot": None}


def add(commands: Any, method: str | None, attack: str | None) -> None:
    parser = add_command(
        commands,
        "plan",
        run,
        "Say what an evaluation would take, from a short probe on this machine; or, of a run, the plan beside what happened",
        "Of networks that do not ship with the package no weights are needed: random ones take as long, and the plan says so.",
    )
    parser.add_argument("--run", dest="run_", metavar="RUN", help="compare this run with the plan that it was started with")
    add_workers(parser, "that share the work")
    parser.add_argument("--probe-images", type=int, metavar="N", help="batch of the probe; a run has --shard of them")
    parser.add_argument("--probe-steps", type=int, metavar="K", help="steps of the probe's purification")
    parser.add_argument(
        "--pilot",
        metavar="RUN",
        help="a finished run of stages of the same names, on fewer images or of another size: say what to expect if as many "
        "images survive as there",
    )
    parser.add_argument("--price", type=float, metavar="P", help="of a worker and hour, in any currency")
    parser.set_defaults(**DEFAULTS)
    add_spec(parser, method, attack)


def run(options: argparse.Namespace) -> int:
    if options.run_ is not None:
        given, knobs = said(options)
        words = [*map(flag, given), *map(flag, knobs), *(["--paper"] if options.paper else [])]
        words += [flag(name) for name, default in DEFAULTS.items() if getattr(options, name) != default]
        if words:
            raise ValueError(f"--run tells of a run as it was planned and as it went: leave out {', '.join(words)}")
        with Ledger(options.run_, read_only=True) as ledger:
            notes, found = ledger.notes(), plan.happened(ledger)
        if "plan" not in notes:
            raise ValueError(f"the run in {options.run_} was started without a plan: coupfast evaluate --plan makes one first")
        print(plan.beside(plan.Plan.from_dict(notes["plan"]), found))
        return 0
    print(
        plan.plan(
            spec_of(options),
            workers=options.workers,
            probe_images=options.probe_images,
            probe_steps=options.probe_steps,
            price=options.price,
            pilot=options.pilot,
        )
    )
    return 0
