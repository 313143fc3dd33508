"""What another busy process costs: `python bench/oversubscribed.py --json bench/results/oversubscribed.json`.

COUP on the shipped pair, forwards and with its exact gradient, in processes of its own: with all cores for threads while
nothing else runs, and while another process keeps one core busy. Where n threads share n cores with it, the work that is left
takes n/(n − ½) times as long; what is more is waiting: a thread whose core is taken holds up the others, and those that spin
while they wait keep the cores from it. The rows:

* `threads`: as many as there are cores; `one less`: a core is left to the other process (where there are two or more);
* `passive`: as many, with `OMP_WAIT_POLICY=passive`, by which PyTorch's own threads sleep as soon as they wait.

Rows take turns, quiet and busy, so that what else changes on the machine meets all. The exit status is 1, and the goal is said
to be missed, where the other process makes `threads` ten times as slow or slower. To be run where nothing else does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import kept
import tables
import torch
from timing import environment, timed

import coupfast
from coupfast.data import load_images

FACTOR = 10.0  # slower than this is a fault
_BUSY = "print(flush=True)\nwhile True: pass"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    if options.alone is not None:
        print(json.dumps(calls(options.alone, options)))
        return 0
    cores = len(os.sched_getaffinity(0))
    contenders = {"threads": (cores, {}), "passive": (cores, {"OMP_WAIT_POLICY": "passive"})}
    if cores > 1:
        contenders["one less"] = (cores - 1, {})
    seconds: dict[tuple[str, bool], list[dict[str, float]]] = {}
    for turn in range(options.turns):
        for busy in (False, True) if turn % 2 == 0 else (True, False):
            with busied() if busy else contextlib.nullcontext():
                for name, (threads, policy) in contenders.items():
                    seconds.setdefault((name, busy), []).append(measured(threads, policy, options))
    rows = [row(name, contenders[name][0], seconds[name, False], seconds[name, True]) for name in contenders]
    settings = {name: getattr(options, name) for name in ("images", "num_steps", "engine", "repeats", "turns")}
    document = {"settings": {**settings, "cores": cores}, "environment": environment(torch.device("cpu")), "rows": rows}
    kept.save(options.json, document)
    header = ("", "threads", "forward, quiet", "busy", "ratio", "gradient, quiet", "busy", "ratio")
    print("\n".join(tables.lines([header, *map(cells, rows)])))
    slowest = max(rows[0][kind]["ratio"] for kind in ("forward", "gradient"))
    said = "met" if slowest < FACTOR else "missed"
    print(f"with another process on a core all threads take {slowest:.3g} times as long; the goal, below {FACTOR:g}, is {said}")
    return int(slowest >= FACTOR)


@contextlib.contextmanager
def busied() -> Iterator[None]:
    """Another process that never waits, on one core."""
    core = str(min(os.sched_getaffinity(0)))
    command = f"import os\nos.sched_setaffinity(0, {{{core}}})\n{_BUSY}"
    with subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it has begun
        try:
            yield
        finally:
            process.kill()


def measured(threads: int, policy: dict[str, str], options: argparse.Namespace) -> dict[str, float]:
    """`calls` in a process of its own, since a policy is read when one begins."""
    # What a user sets is theirs to measure; here only the row says it.
    theirs = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    inherited = {name: value for name, value in os.environ.items() if name not in theirs}
    asked = {"alone": threads, **{name: getattr(options, name) for name in ("images", "num_steps", "repeats", "engine")}}
    words = [word for name, value in asked.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    done = subprocess.run(
        [sys.executable, __file__, *words], env={**inherited, **policy}, check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def calls(threads: int, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a call, forwards and with a gradient."""
    torch.set_num_threads(threads)
    x, _ = load_images("cifar10-20", limit=options.images)
    score, classifier = coupfast.load_score("cifar10-tiny"), coupfast.load_classifier("cifar10-tiny")
    purifier = coupfast.Purifier(score, classifier, t=0.06, num_steps=options.num_steps, engine=options.engine)

    def forward() -> None:
        with torch.no_grad():
            purifier(x, seed=0)

    def gradient() -> None:
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(purifier(leaf, seed=0).square().sum(), leaf)

    found = {}
    for work in (forward, gradient):
        work()
        found[work.__name__] = statistics.median(timed(work, x.device)[0] for _ in range(options.repeats))
    return found


def row(name: str, threads: int, quiet: Sequence[dict[str, float]], busy: Sequence[dict[str, float]]) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "threads": threads}
    for kind in ("forward", "gradient"):
        pairs = [(one[kind], other[kind]) for one, other in zip(quiet, busy, strict=True)]
        found[kind] = {
            "quiet": statistics.median(one for one, _ in pairs),
            "busy": statistics.median(other for _, other in pairs),
            "ratio": statistics.median(other / one for one, other in pairs),
            "ratios": [other / one for one, other in pairs],
        }
    return found


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    def told(found: dict[str, Any]) -> tuple[str, str, str]:
        return f"{1e3 * found['quiet']:.1f} ms", f"{1e3 * found['busy']:.1f} ms", f"{found['ratio']:.2f}"

    return row["name"], str(row["threads"]), *told(row["forward"]), *told(row["gradient"])


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=int, default=4, help="of a batch (default: %(default)s)")
    add("--num-steps", type=int, default=10, help="of the purification (default: %(default)s)")
    add("--engine", choices=("cpu", "eager"), default="cpu", help="(default: %(default)s)")
    add("--repeats", type=int, default=15, help="calls of a process, of which the median counts (default: %(default)s)")
    add("--turns", type=int, default=3, help="of all rows, quiet and busy (default: %(default)s)")
    add("--json", type=Path, help="write everything to this file")
    add("--alone", type=int, help=argparse.SUPPRESS)  # in this process, with so many threads: `calls` as JSON
    options = parser.parse_args(arguments)
    if min(options.images, options.num_steps, options.repeats, options.turns) < 1:
        parser.error("all numbers are at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
