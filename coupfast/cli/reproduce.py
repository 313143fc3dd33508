"""`coupfast reproduce`: the paper's experiments."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coupfast.cli.arguments import add_command, add_workers, default_device
from coupfast.cli.reports import command_line
from coupfast.cli.stopping import said_how_to_go_on
from coupfast.evaluation.spec import checked_workers
from coupfast.experiments import DEFAULTS, EXPERIMENTS, QUICK, ROLES, SETS, Experiment, Network, Page, Scale, check, make
from coupfast.gradients import GRADIENTS
from coupfast.options import check_name
from coupfast.wording import counted
from coupfast_kernels.files import write_whole

ALL = "all"
_SIZES = ("images", "budget", "steps", "draws", "paths")


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "reproduce",
        run,
        "Run the paper's tables and figures at any size, published beside measured",
        "An experiment is made of runs as `coupfast evaluate` makes them, in folders of --out: one that two experiments need "
        "is made once, and what was stopped goes on with the same command. What came out is printed, and written as a page "
        "with its figures. The published size is --networks paper with everything else left out.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(EXPERIMENTS)}, or {ALL} of the paper's")
    parser.add_argument("--list", action="store_true", help="say which experiments there are, and nothing else")
    parser.add_argument("--out", default="reproduced", metavar="DIR", help="folder of the runs of all experiments")
    parser.add_argument("--page", metavar="DIR", help="folder of the pages, figures and their index (default: pages in --out)")
    parser.add_argument("--json", metavar="FILE", help="what came out, of all named ones; - prints it in the place of the text")
    group = parser.add_argument_group("the size (each option in the place of what --quick or the networks bring)")
    group.add_argument(
        "--networks",
        choices=list(SETS),
        default="tiny",
        help="tiny: those that ship, and images that ship; paper: the paper's, whose weights are yours to give",
    )
    sizes = {name: _told(name) for name in _SIZES}
    group.add_argument("--quick", action="store_true", help=f"minutes on a core: {_words(QUICK)}")
    group.add_argument("--images", type=int, metavar="N", help=f"the first N images ({sizes['images']})")
    group.add_argument(
        "--budget",
        type=float,
        metavar="B",
        help="share of the published work of an attack for an image, above 0 and at most 1: iterations, draws of a gradient "
        f"and target classes are each multiplied by the same root of it, queries by itself ({sizes['budget']})",
    )
    group.add_argument(
        "--steps",
        type=int,
        metavar="K",
        help="steps of a purification from t = 0.1, and from other times in proportion; 100 is published "
        f"({sizes['steps']}). Another number is a coarser solution of the same SDE, and cheaper in proportion",
    )
    group.add_argument("--draws", type=int, metavar="N", help=f"fresh draws that judge each image ({sizes['draws']})")
    group.add_argument("--paths", type=int, metavar="N", help=f"simulated paths of a point, of fig3b ({sizes['paths']})")
    group = parser.add_argument_group("networks and images")
    data = ", ".join(f"{name} {found.data}" for name, found in SETS.items())
    group.add_argument("--data", metavar="IN", help=f"images, as for `coupfast purify` (default: {data})")
    for role, words in ROLES.items():
        names = ", ".join(f"{name} {found.networks[role].name}" for name, found in SETS.items())
        group.add_argument(f"--{role}", metavar="NAME|FILE", help=f"{words} (default: {names})")
        group.add_argument(f"--{role}-weights", metavar="FILE", help="weights for a NAME that does not ship")
    group = parser.add_argument_group("how it is run")
    group.add_argument(
        "--gradient",
        choices=list(GRADIENTS),
        help="that attacks follow, but for those of BPDA (default: the one that each is made for; the paper's is adjoint, with "
        "COUP's guidance taken for a constant)",
    )
    group.add_argument("--seed", type=int, default=121, metavar="S", help="fixes all randomness")
    group.add_argument("--shard", type=int, default=16, metavar="N", help="images of a unit of work, which is a batch")
    add_workers(group, "units at a time, which changes no bit of the result")
    group.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads of a worker")
    group.add_argument("--device", choices=("cpu", "cuda"), default=default_device().type, help="of the networks")


def run(options: argparse.Namespace) -> int:
    if options.list:
        print(listed())
        return 0
    if not options.names:
        raise ValueError(f"say what to reproduce: {', '.join(EXPERIMENTS)}, or {ALL}; --list says what each is")
    of_all = [name for name, found in EXPERIMENTS.items() if not found.alone]
    names = list(dict.fromkeys(name for given in options.names for name in (of_all if given == ALL else [given])))
    for name in names:
        check_name("experiment", name, [*EXPERIMENTS, ALL])
    if options.json not in (None, "-") and Path(options.json).is_dir():
        raise ValueError(f"--json names a file, and {options.json} is a folder")
    checked_workers(options.workers)
    out = Path(options.out)
    scales = _scales(options, names)
    left = _checked(scales, skip=ALL in options.names)
    command = command_line(options.argv)
    found = {}
    with said_how_to_go_on(lambda: command):
        for name in left:
            own = command_line(["reproduce", name, *_without_names(options)])
            results = make(EXPERIMENTS[name], scales[name], out, command=own, workers=options.workers)
            page = Page(EXPERIMENTS[name], results, own)
            path = page.write(Path(options.page) if options.page else out / "pages", EXPERIMENTS.values())
            found[name] = page.to_dict()
            if options.json != "-":
                print(f"{page.text()}\n\nthe page: {path}\n", flush=True)
    if options.json is not None:
        text = json.dumps(found, indent=1) + "\n"
        if options.json == "-":
            print(text, end="")
        else:
            write_whole(Path(options.json), text.encode())
    return 0


def scale_of(options: argparse.Namespace, experiment: Experiment) -> Scale:
    """The size that the options describe; on the paper's networks an experiment has as many images as were published."""
    size = {**DEFAULTS[options.networks], **(QUICK if options.quick else {})}
    if options.networks == "paper" and not options.quick:
        size["images"] = experiment.images
    size |= {name: getattr(options, name) for name in _SIZES if getattr(options, name) is not None}
    roles = {}
    for role in ROLES:
        name, weights = getattr(options, role), getattr(options, f"{role}_weights")
        if name is not None or weights is not None:
            roles[role] = Network(name or SETS[options.networks].networks[role].name, weights)
    if options.data is not None and options.images is None and not options.quick:
        size["images"] = None  # all that are there
    same = {name: getattr(options, name) for name in ("networks", "data", "gradient", "seed", "shard", "threads", "device")}
    return Scale(roles=roles, **same, **size)


def listed() -> str:
    """All experiments: name, place, what they ask, and what they take."""
    lines = []
    for name, found in EXPERIMENTS.items():
        networks = ", ".join(ROLES[role] for role in found.needs) or "no networks"
        runs = counted(len(found.cases), "run") if found.cases else "no runs"
        runs += ", and more that follow from them" if found.then else ""
        lines.append(f"{name:14s}{found.place:16s}{found.title}\n{'':30s}{runs}; {networks}")
    return "\n".join(lines)


def _scales(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Scale]:
    """By experiment; those of one size share one, which loads networks once for all."""
    by_images: dict[int, Scale] = {}
    return {name: by_images.setdefault(EXPERIMENTS[name].images, scale_of(options, EXPERIMENTS[name])) for name in names}


def _checked(scales: Mapping[str, Scale], *, skip: bool) -> list[str]:
    """Those that can run; of `all` the others are said to be left out."""
    left = []
    for name, scale in scales.items():
        try:
            check(EXPERIMENTS[name], scale)
        except (ImportError, ValueError, OSError) as error:
            if not skip:
                raise
            print(f"left out: {error}", file=sys.stderr, flush=True)
            continue
        left.append(name)
    return left


def _without_names(options: argparse.Namespace) -> list[str]:
    """What was typed beside the names of experiments."""
    words = list(options.argv[1:])
    for name in options.names:
        with contextlib.suppress(ValueError):
            words.remove(name)
    return words


def _told(name: str) -> str:
    found = [f"{key} {_value(values[name])}" for key, values in DEFAULTS.items()]
    return "default: " + (_value(DEFAULTS["tiny"][name]) if len({f.split()[1] for f in found}) == 1 else ", ".join(found))


def _value(value: Any) -> str:
    return "100" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _words(size: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_value(value)}" for name, value in size.items())
