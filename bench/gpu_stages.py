"""One stage of `bench/on_gpu.sh`: `python bench/gpu_stages.py NAME [ARGUMENTS] --device cuda --json FILE`.

Every stage stands alone and writes its JSON again after each row. On a CPU each takes a stand-in of the smallest sizes: what it
finds there says only that the stage runs.

    check         whether there is a device, and the cuda engine's reason not to run on it
    environment   device, versions, clocks; rates of a copy, of matrix products, and the gap between two kernels of a graph
    kernels       every kernel beside its definition
    trial PARTS   the engine with these parts alone on, on the shipped networks, both ways, beside eager in float64
    bits          hashes of a purification and its gradient, on other streams, in other threads, under other settings
    convolutions BATCHES   seconds and errors of every way to a 3x3 convolution, and of cuDNN's fastest in both formats
    profile BATCH          seconds of a step and of its transpose, with graphs and without, and their kernels by name
    rates         kernels' shares of what the card copies and multiplies
    memcheck      the kernels once more, under compute-sanitizer
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cases import load_networks
from timing import environment, fastest_algorithms, finite_or_none, timed_twice

from coupfast import Purifier
from coupfast.doctor.gpu import ENGINE_OPTIONS, check_engine
from coupfast.doctor.kernels import check_kernels, is_bad, measure_rates, of_device
from coupfast.engine import CounterNoise
from coupfast.engine.cuda.calibration import Calibration, ConvolutionShape
from coupfast.engine.cuda.capture import CudaBackend, seconds_in_graph
from coupfast.engine.cuda.support import unavailable
from coupfast.engine.networks import frozen
from coupfast.engine.precision import float32_precision
from coupfast.engine.rates import copy_bandwidth, device_seconds, matmul_rate
from coupfast.engines import ENGINES
from coupfast.models.zoo import load_classifier, load_score
from coupfast_kernels import registry
from coupfast_kernels.files import write_whole

STAGES = ("check", "environment", "kernels", "trial", "bits", "convolutions", "profile", "rates", "memcheck")
REPEATS = 5
STEPS = 3  # of the tables, as the benchmarks beside them time: compiled pieces are for one length of a table
SANITIZER_SECONDS = 240

#: Channels in and out, and width: DDPM++ deep's most frequent, then a WRN-28-10's.
LAYERS = [(128, 128, 32), (384, 128, 32), (256, 256, 32), (256, 256, 16), (512, 256, 16), (256, 256, 8), (256, 256, 4)]
LAYERS += [(160, 160, 32), (320, 320, 16), (640, 640, 8)]


class Record:
    """A stage's file, written anew whenever something is known."""

    def __init__(self, file: Path) -> None:
        self.file, self.found = file, dict[str, Any]()

    def save(self, **more: Any) -> None:
        self.found |= more
        write_whole(self.file, (json.dumps(finite_or_none(self.found), indent=1) + "\n").encode())


class Stages:
    """The stages of a device; `small` where it is a stand-in."""

    def __init__(self, device: torch.device, record: Record, options: argparse.Namespace) -> None:
        self.device, self.save, self.options = device, record.save, options
        self.small = device.type == "cpu"
        self.engine = "eager" if self.small else "cuda"

    def check(self) -> None:
        device = self.device
        if not torch.cuda.is_available():
            built = "a build without CUDA" if torch.version.cuda is None else f"built with CUDA {torch.version.cuda}"
            self.save(problem=f"PyTorch {torch.__version__} ({built}) sees no GPU; `nvidia-smi` says whether the driver does")
        elif (device.index or 0) >= torch.cuda.device_count():
            self.save(problem=f"there is no {device}: PyTorch sees {torch.cuda.device_count()} GPU(s), counted from 0")
        else:
            self.save(name=torch.cuda.get_device_name(device), problem=unavailable(torch.float32, device))

    def environment(self) -> None:
        found = environment(self.device)
        self.save(environment=found)
        if not self.small:
            properties = torch.cuda.get_device_properties(self.device)
            self.save(
                memory_bytes=properties.total_memory,
                processors=properties.multi_processor_count,
                cudnn=torch.backends.cudnn.version(),
                nvidia_smi=_output("nvidia-smi", "-q", "-d", "CLOCK,POWER,PERFORMANCE"),
                compiler=_output("gcc", "--version")[:1],
            )
        x = torch.zeros(32, device=self.device)
        self.save(gap_in_a_graph_seconds=self.seconds(lambda: x.add_(1.0), calls=2 if self.small else 500))
        copied = copy_bandwidth(self.device, megabytes=1 if self.small else 256)
        product = matmul_rate(self.device, size=64 if self.small else None)
        self.save(copy_bytes_per_second=copied, matmul_flop_per_second=product)
        # The products of a Winograd convolution, 36 at once, and of one by its taps.
        sizes = ((64, 16, 16),) if self.small else ((4096, 128, 128), (16384, 256, 256), (1024, 256, 2304), (64, 256, 2304))
        rates = {}
        for precision in ("strict", "tf32"):
            with float32_precision(self.device.type, precision), torch.no_grad():
                for m, n, k in sizes:
                    a, b = torch.randn(36, m, k, device=self.device), torch.randn(36, k, n, device=self.device)
                    seconds = self.seconds(functools.partial(torch.bmm, a, b), calls=3)
                    rates[f"{precision} 36 x {m} x {n} x {k}"] = 2 * 36 * m * n * k / seconds
                    self.save(bmm_flop_per_second=rates)
        self.save(detail=f"copy {copied / 1e12:.2f} TB/s, product {product / 1e12:.1f} TFLOP/s, torch {torch.__version__}")

    def kernels(self) -> None:
        rows = []
        for row in check_kernels(self.device, self.of_gpus()):
            rows.append(row)
            self.save(rows=rows, wrong=[row for row in rows if is_bad(row)])
        self.conclude(rows)

    def trial(self) -> None:
        # On the stand-in, which has no such parts, one method says that the stage runs.
        parts = {name: name in self.options.arguments for name in ENGINE_OPTIONS}
        methods = ("reverse-sde",) if self.small else ("reverse-sde", "coup")
        rows = []
        checked = check_engine(
            self.device, engine=self.engine, options={} if self.small else parts, methods=methods, take_apart=False
        )
        for row in checked:
            rows.append(row)
            self.save(parts=parts, rows=rows)
        self.conclude(rows)

    def bits(self) -> None:
        networks = [load("cifar10-tiny", device=self.device) for load in (load_score, load_classifier)]
        purifier = Purifier(*networks, num_steps=1 if self.small else 5, engine=self.engine)
        x = torch.rand(1 if self.small else 6, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(self.device)

        def once() -> str:
            leaf = x.clone().requires_grad_()
            y = purifier(leaf, seed=7)
            (g,) = torch.autograd.grad(y.square().sum(), leaf)
            return hashlib.sha256(y.detach().cpu().numpy().tobytes() + g.cpu().numpy().tobytes()).hexdigest()

        hashes = {"first": once(), "again": once()}
        self.save(hashes=hashes)
        if not self.small:
            with torch.cuda.stream(torch.cuda.Stream(self.device)):
                hashes["another stream"] = once()
        thread = threading.Thread(target=lambda: hashes.update({"another thread": once()}))
        thread.start()
        thread.join()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            hashes["TF32 and autocast around it"] = once()
        equal = len(set(hashes.values())) == 1
        self.save(hashes=hashes, equal=equal, detail="all equal" if equal else f"{len(set(hashes.values()))} different ones")
        if not equal:
            sys.exit(1)

    def convolutions(self) -> None:
        rows = []
        layers = [(4, 4, 8)] if self.small else LAYERS
        with tempfile.TemporaryDirectory() as folder:  # not the user's: these choices know nothing of compiled pieces
            precisions = ("strict",) if self.small else ("strict", "fast", "3xtf32")
            calibrations = [Calibration(self.device, precision=each, folder=folder) for each in precisions]
            for batch in map(int, self.options.arguments):
                for in_channels, out_channels, size in layers:
                    shape = ConvolutionShape(batch, in_channels, out_channels, size, size)
                    flop = 18 * in_channels * out_channels * batch * size * size
                    row: dict[str, Any] = {"shape": str(shape), "flop": flop, "cudnn_seconds": self._of_library(shape)}
                    for calibration in calibrations:
                        choice = calibration.choose(shape)
                        row[calibration.precision] = {
                            "chosen": choice.candidate,
                            "seconds": choice.seconds,
                            "errors": choice.errors,
                            "refused": choice.refused,
                            "flop_per_second": flop / choice.seconds[choice.candidate],
                        }
                        # What there is to choose where a norm like DDPM++'s stands in front.
                        normed = calibration.choose(dataclasses.replace(shape, groups=min(in_channels // 4, 32)))
                        row[calibration.precision]["norm"] = {"chosen": normed.candidate, "seconds": normed.seconds}
                    rows.append(row)
                    self.save(rows=rows)
        ours = sum("library" not in row["strict"]["chosen"] for row in rows)
        self.save(detail=f"strict takes this project's kernels for {ours} of {len(rows)} shapes")

    def _of_library(self, shape: ConvolutionShape) -> dict[str, float | str]:
        """What the library takes for a shape in both formats: its first choice, or the fastest of a trial of all."""
        x = torch.randn(shape.batch, shape.in_channels, shape.height, shape.width, device=self.device)
        weight = torch.randn(shape.out_channels, shape.in_channels, 3, 3, device=self.device)
        found: dict[str, float | str] = {}
        with torch.no_grad(), float32_precision(self.device.type, "strict"):
            for name, layout in (("contiguous", torch.contiguous_format), ("channels last", torch.channels_last)):
                a, b = x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)
                for kind, free in (("repeatable", False), ("fastest", True)):
                    with fastest_algorithms() if free else contextlib.nullcontext():
                        try:
                            found[f"{name}, {kind}"] = self.seconds(functools.partial(F.conv2d, a, b, padding=1))
                        except RuntimeError as error:
                            found[f"{name}, {kind}"] = str(error).splitlines()[0]
        return found

    def profile(self) -> None:
        (batch,) = map(int, self.options.arguments)
        networks = load_networks("tiny" if self.small else "paper", device=self.device, score=None, classifier=None, seed=0)
        score, classifier = frozen(networks.score), frozen(networks.classifier)
        table = Purifier(score, classifier, engine="eager", num_steps=STEPS).recipe.table
        x = 2.0 * torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(self.device) - 1.0
        zeros = torch.zeros(batch, dtype=torch.int64, device=self.device)
        noise = CounterNoise(1, torch.arange(batch, device=self.device), zeros)
        precision = "strict" if self.small else self.options.precision
        eager = ENGINES["eager"](score, classifier, table, x).for_batch(batch)
        with float32_precision(self.device.type, "strict"):
            wanted = eager.step(0, x, noise)[0].clone()
        for graphs in (False,) if self.small else (True, False):
            began, name = time.perf_counter(), f"graphs {'on' if graphs else 'off'}"
            options: dict[str, bool] = dict.fromkeys(self.options.without or (), False) | {"graphs": graphs}
            more: dict[str, Any] = {} if self.small else {"precision": precision, "options": options}
            program = ENGINES[self.engine](score, classifier, table, x, **more).for_batch(batch)
            found, kept = program.step(0, x, noise, "slopes")
            program.step_vjp(0, x, kept, x)
            row: dict[str, Any] = {"made_in_seconds": time.perf_counter() - began}
            row["difference_from_eager"] = float((found - wanted).abs().max() / wanted.abs().max())
            if not self.small:
                row["most_memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
            self.save(**{name: row})
            for way, call in (
                ("step", lambda program=program: program.step(0, x, noise)),
                ("transpose", lambda program=program, kept=kept: program.step_vjp(0, x, kept, x)),
            ):
                row[way] = self._profiled(call)
                self.save(**{name: row})
            del program
        last = self.options.without or []
        self.save(detail=f"{precision}{', without ' + ', '.join(last) if last else ''}: {_in_ms(row)}")

    def _profiled(self, call: Callable[[], object]) -> dict[str, Any]:
        """Median seconds of calls on both clocks, and the kernels of one."""
        with torch.no_grad():
            call()
            times = [timed_twice(call, self.device)[0] for _ in range(1 if self.small else REPEATS)]
            kinds = torch.profiler.ProfilerActivity
            with torch.profiler.profile(activities=[kinds.CPU if self.small else kinds.CUDA]) as record:
                call()
                if not self.small:
                    torch.cuda.synchronize(self.device)
        spent: dict[str, list[float]] = {}
        for event in record.events():
            if self.small or event.device_type == torch.autograd.DeviceType.CUDA:
                entry = spent.setdefault(event.name, [0, 0.0])
                entry[0] += 1
                entry[1] += (event.self_cpu_time_total if self.small else event.device_time_total) / 1e6
        table = sorted(([name, *entry] for name, entry in spent.items()), key=lambda row: -row[2])
        host = [each.host for each in times if each.host is not None]
        return {
            "seconds": statistics.median(each.seconds for each in times),
            "host_seconds": statistics.median(host) if host else None,
            "kernels": sum(int(row[1]) for row in table),
            "busy_seconds": sum(row[2] for row in table),
            "name, times, seconds": table[:40],
        }

    def rates(self) -> None:
        images, megabytes = (1, 1) if self.small else (64, 256)
        found = measure_rates(self.device, set(), kernels=self.of_gpus(), images=images, megabytes=megabytes)
        self.save(**found, detail=found["problem"] or f"{len(found['kernels'])} kernels timed")
        if found["problem"]:
            sys.exit(1)

    def memcheck(self) -> None:
        tool = shutil.which("compute-sanitizer")
        inside = [sys.executable, __file__, "kernels", "--device", str(self.device)]
        if self.small:
            return self.save(detail="nothing to check on a CPU")
        if tool is None:
            return self.save(detail="compute-sanitizer is not installed here (it comes with the CUDA toolkit): nothing checked")
        with tempfile.TemporaryDirectory() as folder:
            command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *inside, "--json", f"{folder}/kernels.json"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=SANITIZER_SECONDS)
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("=========")]
            self.save(exit_status=done.returncode, report=lines[:200], detail=(lines or ["no report"])[-1])
        if done.returncode:
            sys.exit(1)

    # --- what they share --------------------------------------------------------------------------------------------------

    def seconds(self, function: Callable[[], object], calls: int = 10) -> float:
        """Median seconds of a call; on a GPU within a graph."""
        clock = functools.partial(device_seconds, device=self.device)
        if self.small:
            return statistics.median(clock(function) for _ in range(calls))
        backend = CudaBackend(self.device)

        def median(replay: Callable[[], object]) -> float:
            return statistics.median(clock(replay) for _ in range(REPEATS))

        return seconds_in_graph(function, backend, median, calls=calls)

    def of_gpus(self) -> list[registry.Kernel]:
        """The kernels for GPUs; on a CPU their operators are their definitions."""
        return [each for each in registry.kernels() if each.device == "cuda"] if self.small else of_device(self.device)

    def conclude(self, rows: list[dict[str, Any]]) -> None:
        bad = [row for row in rows if row["status"] != "ok"]
        self.save(detail=f"{len(rows) - len(bad)} of {len(rows)} agree" + "".join(f"; {row['detail']}" for row in bad[:2]))
        if bad or not rows:
            sys.exit(1)


def _in_ms(row: dict[str, Any]) -> str:
    return ", ".join(f"{way} {1e3 * row[way]['seconds']:.2f} ms" for way in ("step", "transpose"))


def _output(*command: str) -> list[str]:
    """What a program prints; nothing where it is not installed."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()
    return []


def _device(text: str) -> torch.device:
    return torch.device("cuda", 0) if text == "cuda" else torch.device(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES, metavar="NAME", help=", ".join(STAGES))
    parser.add_argument("arguments", nargs="*", metavar="ARGUMENTS", help="of a trial the parts, else batch sizes")
    parser.add_argument("--precision", default="strict", help="of a profile (default strict)")
    parser.add_argument("--without", nargs="+", choices=ENGINE_OPTIONS, help="parts of the engine to leave out of a profile")
    parser.add_argument("--device", type=_device, default="cuda", help="cuda:0 (default), or cpu for a stand-in")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1 if options.device.type == "cpu" else torch.get_num_threads())
    record = Record(options.json)
    record.save(stage=options.stage)
    try:
        there = options.device.type == "cuda" and options.stage != "check"
        with torch.cuda.device(options.device) if there else contextlib.nullcontext():
            getattr(Stages(options.device, record, options), options.stage)()
    except Exception as error:
        record.save(detail=f"{type(error).__name__}: {error}".splitlines()[0])
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
