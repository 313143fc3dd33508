"""Everything that one wants to know of a GPU in so many minutes, in the order of worth: `bench/on_gpu.sh [MINUTES]`.

Each stage is a process of its own with a time limit, and writes JSON as it goes (`bench/gpu_stages.py` says what each finds):

    10 minutes   environment; every kernel beside its definition, and five purifiers with other parts of the engine left on;
                 hashes of a purification in two processes, several streams and threads; convolutions beside cuDNN's
    30 minutes   the kernels of a step of 64 images by name; speed and gradient beside the published code and eager
    60 minutes   the same for one image; without PyTorch's compiler; 3xTF32; kernels' shares of the card's rates; memory checked

A stage that no longer fits into the minutes is left out, and the summary says so. No network is needed, and nothing is
installed but wheels that are given (`--wheels`: torchsde's and trampoline's, where the image has PyTorch alone). What PyTorch's
compiler and calibration make is kept in the user's cache, so a second run begins where the first one ended.

`--device cpu` takes the same way on any machine with stand-ins of the smallest sizes: engine "eager" for "cuda", operators'
definitions for the kernels, wall clocks for events, no limit of a stage but the minutes. Every file says so (`stand_in`); its
times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.machinery
import json
import os
import pathlib
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
NEEDED = ("torch", "numpy", "scipy", "safetensors", "tqdm", "torchsde")
STAND_IN = "on a CPU: eager for the engine, definitions for kernels, wall clocks; its times mean nothing"
GRACE = 10.0  # seconds between the signal after which a stage says where it is, and its end
LEAST = 0.3  # a stage begins if so much of its time is left
CORES_A_PROCESS = 3  # while several compile at once
LINES = 60  # of its output that a stage's file keeps


@dataclasses.dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        name: Of its file, too.
        seconds: Its limit on a GPU.
        command: A script beside this one and its arguments; `--device` and `--json` are added.
        own_cache: Whether it gets an empty cache: what is timed beside other work must not be kept.
    """

    name: str
    seconds: int
    command: tuple[str, ...]
    own_cache: bool = False


def stages(small: bool) -> list[tuple[Stage, ...]]:
    """All of them in the order of worth, in groups that may run at once; `small` is for a stand-in."""
    many = "2" if small else "64"
    parts = {"none": (), "triton": ("triton",), "graphs": ("graphs",), "compile": ("compile",)}
    parts["all"] = ("triton", "graphs", "compile")

    def stage(name: str, seconds: int, kind: str, *arguments: str, **more: Any) -> Stage:
        return Stage(name, seconds, ("gpu_stages.py", kind, *arguments), **more)

    def bench(script: str, batch: str, seconds: int, *arguments: str) -> Stage:
        less = ("--network", "tiny", "--images", "random", "--repeats", "1", "--steps-timed", "1", "--threads", "1")
        more = less if small else ("--steps-timed", "3", "--repeats", "3")
        return Stage(f"{script}-{batch}", seconds, (f"{script}.py", "--t", "0.1", "--batch", batch, *more, *arguments))

    engines = ("eager",) if small else ("eager", "cuda")
    speed = ("--methods", "coup", "--engines", "reference", *engines)
    gradient = ("--modes", "frozen", "exact", "detached", "--engines", *engines, "--truth", "exact")
    trials = (stage(f"trial-{name}", 200, "trial", *on, own_cache=True) for name, on in parts.items())
    return [
        (stage("environment", 60, "environment"),),
        (stage("kernels", 200, "kernels", own_cache=True), *trials),
        (stage("bits-1", 100, "bits"),),
        (stage("bits-2", 60, "bits"),),
        (stage("convolutions", 120, "convolutions", *(("1",) if small else ("64", "8", "1"))),),
        (stage(f"profile-{many}", 360, "profile", many),),
        (bench("speed", many, 270, *speed),),
        (bench("gradient", many, 300, *gradient),),
        (stage("profile-1", 330, "profile", "1"),),
        (bench("speed", "1", 200, *speed),),
        (bench("gradient", "1", 240, *gradient),),
        (stage(f"profile-{many}-3xtf32", 240, "profile", many, "--precision", "3xtf32"),),
        (stage(f"profile-{many}-without-compile", 150, "profile", many, "--without", "compile"),),
        (stage("rates", 120, "rates"),),
        (stage("memcheck", 300, "memcheck"),),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    deadline = time.monotonic() + 60.0 * options.minutes
    small = options.device == "cpu"
    _chosen(stages(small), options.stages)  # names that do not exist
    with tempfile.TemporaryDirectory(prefix="on-gpu-") as scratch_name:
        scratch = pathlib.Path(scratch_name)
        paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench")]
        if options.wheels is not None:
            paths.insert(0, str(_unpacked(options.wheels, scratch / "site")))
        missing = [name for name in NEEDED if _is_missing(name, paths)]
        if missing:
            raise SystemExit(
                f"error: {sys.executable} lacks {', '.join(missing)}: install them, name another Python (PYTHON=...), or give "
                f"a folder with their wheels (--wheels FOLDER; `pip download --no-deps {' '.join(missing)}` makes one)"
            )
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYTHONFAULTHANDLER": "1",
            "PYTHONUNBUFFERED": "1",
        }
        run = _Run(options.device, scratch, environment)
        card = run.card()
        out = options.out or ROOT / "bench" / "results" / f"gpu-{card}"
        if any(out.glob("*.json")) and not options.force:
            raise SystemExit(f"error: {out} has results already; --out names another folder, --force replaces them")
        out.mkdir(parents=True, exist_ok=True)
        # Only what this program writes: a folder may have other results beside.
        for name in [*(stage.name for group in stages(small) for stage in group), "summary"]:
            (out / f"{name}.json").unlink(missing_ok=True)
        print(f"{card}: {options.minutes:g} minutes, results in {out}" + (f"; {STAND_IN}" if small else ""), flush=True)
        summary: dict[str, Any] = {"card": card, "minutes": options.minutes, "stand_in": STAND_IN if small else None}
        summary["stages"] = []
        at_once = 2 if small else max(1, _cores() // CORES_A_PROCESS)
        groups = _chosen(stages(small), options.stages)
        if small:  # no time is worth a quiet machine
            groups = [tuple(stage for group in groups for stage in group)]
        for group in groups:
            with ThreadPoolExecutor(at_once) as pool:
                for row in pool.map(lambda stage: run.stage(stage, out, deadline), group):
                    summary["stages"].append(row)
                    took = "" if row["seconds"] is None else f" ({row['seconds']:.0f} s)"
                    print(f"{row['stage']:<28}{row['status']}{took}  {row['detail']}", flush=True)
            summary["same_bits_in_two_processes"] = _same_bits(out)
            _write(out / "summary.json", summary)
    print(f"same bits in two processes: {summary['same_bits_in_two_processes']}")
    if small:
        print(f"Nothing to send: {STAND_IN}.")
    else:
        count = len(list(out.glob("*.json")))
        print(
            f"To send them: open a pull request that adds {out} ({count} JSON files, which name no machine and no place on "
            "it), with the lines above in its description."
        )
    return 0 if all(row["status"] in ("ok", "left out") for row in summary["stages"]) else 1


class _Run:
    """Runs stages on a device."""

    def __init__(self, device: str, scratch: pathlib.Path, environment: dict[str, str]) -> None:
        self.device, self.scratch, self.environment = device, scratch, environment

    def card(self) -> str:
        """The device's name as part of a file's; SystemExit where it cannot serve."""
        if self.device == "cpu":
            return "stand-in"
        file = self.scratch / "check.json"
        status, _, output = self._process(Stage("check", 240, ("gpu_stages.py", "check")), file, 240.0)
        found = _read(file)
        if status != "ok" or found.get("problem"):
            reason = found.get("problem") or f"a look at the device {status}:\n{output}"
            raise SystemExit(f"error: {reason}\n(--device cpu runs the same stages with stand-ins)")
        name = re.sub(r"[^a-z0-9]+", "-", found["name"].lower().removeprefix("nvidia ").removeprefix("geforce "))
        return name.strip("-")

    def stage(self, stage: Stage, out: pathlib.Path, deadline: float) -> dict[str, Any]:
        """Run one and complete its file; a row for the summary."""
        left = deadline - time.monotonic() - GRACE
        if left < LEAST * stage.seconds:
            return {"stage": stage.name, "status": "left out", "seconds": None, "detail": f"{max(left, 0):.0f} s were left"}
        # Another program may have a stand-in's core, and its times mean nothing: it ends with the minutes alone.
        limit = left if self.device == "cpu" else min(float(stage.seconds), left)
        file = out / f"{stage.name}.json"
        status, seconds, output = self._process(stage, file, limit)
        found = _read(file)
        script, *rest = stage.command
        about = {"name": stage.name, "command": [script, *rest], "limit_seconds": limit, "seconds": seconds, "status": status}
        about |= {"device": self.device, "stand_in": STAND_IN if self.device == "cpu" else None}
        if status != "ok":
            about["output"] = output.splitlines()[-LINES:]
        _write(file, {"about": about, **found})
        lines = [line for line in output.splitlines() if line.strip()] or [""]
        detail = found.get("detail") or (lines[-1] if status != "ok" else "")
        return {"stage": stage.name, "status": status, "seconds": round(seconds, 1), "detail": detail[:160]}

    def _process(self, stage: Stage, file: pathlib.Path, limit: float) -> tuple[str, float, str]:
        """("ok", "failed" or "out of time", seconds, what it printed)."""
        script, *rest = stage.command
        command = [sys.executable, str(ROOT / "bench" / script), *rest, "--device", self.device, "--json", str(file)]
        environment = dict(self.environment)
        if stage.own_cache:
            environment["XDG_CACHE_HOME"] = str(self.scratch / stage.name)
        log = self.scratch / f"{stage.name}.log"
        began = time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(limit)
                status = "ok" if code == 0 else "failed"
            except subprocess.TimeoutExpired:
                status = "out of time"
                process.send_signal(signal.SIGABRT)  # it prints where it is
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # and what it started
                process.wait()
        return status, time.monotonic() - began, _without_places(log.read_text(errors="replace"), self.scratch)


def _chosen(groups: list[tuple[Stage, ...]], names: Sequence[str] | None) -> list[tuple[Stage, ...]]:
    """Those of these names; None takes all."""
    if names is None:
        return groups
    known = [stage.name for group in groups for stage in group]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"error: --stages are {', '.join(known)}; got {', '.join(unknown)}")
    return [tuple(stage for stage in group if stage.name in names) for group in groups]


def _same_bits(out: pathlib.Path) -> bool | None:
    """None where not both have run."""
    found = [_read(out / f"bits-{number}.json").get("hashes") for number in (1, 2)]
    return None if None in found else found[0] == found[1]


def _read(file: pathlib.Path) -> dict[str, Any]:
    """A stage's file as far as it came."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def _write(file: pathlib.Path, document: dict[str, Any]) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(file)


def _without_places(text: str, scratch: pathlib.Path) -> str:
    """What a traceback says of folders and of the machine is nobody's business."""
    for place, name in ((scratch, "scratch"), (ROOT, "."), (sys.prefix, "python"), (pathlib.Path.home(), "~")):
        text = text.replace(str(place), name)
    node = platform.node()
    return text.replace(node, "host") if len(node) > 3 else text


def _is_missing(module: str, paths: list[str]) -> bool:
    finder = importlib.machinery.PathFinder
    return finder.find_spec(module, [*paths, *sys.path]) is None


def _unpacked(wheels: pathlib.Path, site: pathlib.Path) -> pathlib.Path:
    """Wheels installed into a folder of their own, without an index."""
    files = sorted(map(str, wheels.glob("*.whl"))) if wheels.is_dir() else []
    if not files:
        raise SystemExit(f"error: --wheels {wheels}: there are no wheels (*.whl) in it")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site), *files]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: the wheels of {wheels} cannot be installed:\n{done.stderr.strip()}")
    return site


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/on_gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("minutes", nargs="?", type=_minutes, default=10.0, metavar="MINUTES", help="1 to 600 (default 10)")
    parser.add_argument("--device", type=_device, default="cuda", help="cuda (default), cuda:1, ..., or cpu for stand-ins")
    parser.add_argument("--wheels", type=pathlib.Path, metavar="FOLDER", help="wheels to use, of what this Python lacks")
    parser.add_argument("--out", type=pathlib.Path, metavar="FOLDER", help="default: bench/results/gpu-CARD")
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="only these, by the names of their files")
    parser.add_argument("--force", action="store_true", help="replace results that are there")
    options = parser.parse_args(arguments)
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out} is a file; name a folder")
    return options


def _minutes(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 1.0 <= found <= 600.0:
        raise argparse.ArgumentTypeError(f"a number of minutes from 1 to 600, got {text!r}")
    return found


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"cuda, cuda:N or cpu, got {text!r}")
    return text


if __name__ == "__main__":
    sys.exit(main())
