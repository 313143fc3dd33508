"""Several workers of one thread against one worker of several: `python bench/workers.py --json bench/results/workers.json`.

One small evaluation (COUP on the shipped pair, `pgd-eot` cut short) with `--workers N --threads 1` and with `--workers 1
--threads N`, in turns. Every unit is a task for one worker, so several workers need as many units: `--images` over `--shard`.
Printed are the seconds of each, by the clock from start to result and by the units' own (all of them over the workers: without
starting processes and loading networks, which a longer run does once as well), and their ratios, several threads over several
workers: above 1, workers are faster. Memory is a worker's peak, times the workers.

The number of workers changes no bit of a result; that of threads is part of a run's configuration, since it may round sums
otherwise. So all runs of one kind must have one fingerprint (or nothing else is printed, and the exit status is 1), and of the
two kinds it is said how many of the judge's verdicts differ.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kept
import tables
import torch
from timing import environment

from coupfast.evaluation import Spec, evaluate
from coupfast.evaluation import plan as planning


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    layouts = {"workers": (options.count, 1), "threads": (1, options.count)}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in layouts}
    for turn in range(options.turns):
        for name in layouts if turn % 2 == 0 else reversed(layouts):
            turns[name].append(run(*layouts[name], options))
    fingerprints = {name: sorted({each["fingerprint"] for each in found}) for name, found in turns.items()}
    repeatable = all(len(found) == 1 for found in fingerprints.values())
    verdicts = [turns[name][0]["verdicts"] for name in layouts]
    differing = sum(one != other for one, other in zip(*verdicts, strict=True))
    document = {
        "settings": {name: getattr(options, name) for name in SETTINGS},
        "environment": environment(torch.device("cpu")),
        "fingerprints": fingerprints,
        "verdicts": len(verdicts[0]),
        "verdicts_that_differ": differing,
        "rows": [row(name, *layouts[name], turns[name]) for name in layouts],
        "ratio": {clock: ratio(turns, clock) for clock in ("seconds", "work_seconds")},
    }
    kept.save(options.json, document)
    if not repeatable:
        print(f"a run is not repeatable: fingerprints {fingerprints}", file=sys.stderr)
        return 1
    header = ("", "workers", "threads", "from start to result", "units", "memory of all")
    print("\n".join(tables.lines([header, *map(cells, document["rows"])])))
    print(
        f"{options.count} workers of one thread: {document['ratio']['seconds']:.3g} times as fast as one worker of "
        f"{options.count} threads from start to result, {document['ratio']['work_seconds']:.3g} times in the units; of "
        f"{len(verdicts[0])} verdicts {differing} differ"
    )
    return 0


def run(workers: int, threads: int, options: argparse.Namespace) -> dict[str, Any]:
    """One evaluation."""
    spec = Spec.of(
        limit=options.images,
        t=0.06,
        num_steps=options.num_steps,
        engine=options.engine,
        attack="pgd-eot",
        iterations=options.iterations,
        eot_iter=options.eot_iter,
        shard=options.shard,
        draws=2,
        paths=0,
        threads=threads,
        device="cpu",
    )
    with tempfile.TemporaryDirectory(prefix="workers-") as folder:
        started = time.perf_counter()
        with evaluate(spec, out=Path(folder) / "run", workers=workers) as found:
            seconds = time.perf_counter() - started
            stages = planning.happened(found.ledger)
            return {
                "seconds": seconds,
                "work_seconds": sum(stage.seconds for stage in stages) / workers,
                "peak_bytes": workers * max(stage.peak_bytes for stage in stages),
                "fingerprint": found.fingerprint,
                "verdicts": [
                    int(right)
                    for kind in found.verdicts.values()
                    for right in (kind.logits.argmax(axis=2) == kind.labels).flatten().tolist()
                ],
            }


def ratio(turns: dict[str, list[dict[str, Any]]], clock: str) -> float:
    """Of one worker's seconds over those of several, the median of the turns'."""
    return statistics.median(
        one[clock] / several[clock] for one, several in zip(turns["threads"], turns["workers"], strict=True)
    )


def row(name: str, workers: int, threads: int, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    medians = {clock: statistics.median(each[clock] for each in found) for clock in ("seconds", "work_seconds")}
    peak = max(each["peak_bytes"] for each in found)
    return {"name": name, "workers": workers, "threads": threads, **medians, "peak_bytes": peak, "turns": list(found)}


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    times = (f"{row[clock]:.2f} s" for clock in ("seconds", "work_seconds"))
    return row["name"], str(row["workers"]), str(row["threads"]), *times, f"{row['peak_bytes'] / 2**20:.0f} MiB"


SETTINGS = ("count", "images", "shard", "num_steps", "engine", "iterations", "eot_iter", "turns")


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--count", type=int, default=max(2, cores), help="workers, or threads (default: the cores, %(default)s)")
    add("--images", type=int, default=16, help="of the 20 CIFAR-10 test images (default: %(default)s)")
    add("--shard", type=int, default=4, help="images of a unit (default: %(default)s)")
    add("--num-steps", type=int, default=10, help="of the purification (default: %(default)s)")
    add("--engine", choices=("auto", "cpu", "eager"), default="auto", help="(default: %(default)s)")
    add("--iterations", type=int, default=10, help="of the attack (default: %(default)s)")
    add("--eot-iter", type=int, default=4, help="draws of a gradient (default: %(default)s)")
    add("--turns", type=int, default=3, help="of both (default: %(default)s)")
    add("--json", type=Path, help="write everything to this file")
    options = parser.parse_args(arguments)
    if options.count < 2 or options.turns < 1:
        parser.error("--count is at least 2, and --turns at least 1")
    if -(-options.images // options.shard) < options.count:
        parser.error(f"{options.count} workers need as many units: more --images or a smaller --shard")
    return options


if __name__ == "__main__":
    sys.exit(main())
