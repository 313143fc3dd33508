"""What the CPU engine's choice of algorithms is fitted to, and the fit: `coupfast.engine.cpu.algorithms.work`.

    python bench/fit_algorithms.py measure --network tiny --batch 1 20 --threads 2 --json FILE   # adds lines to FILE
    python bench/fit_algorithms.py fit FILE

`measure` takes every distinct convolution of a network, forward and transposed, in every algorithm that can run it, in turns
with PyTorch's of NCHW and of channels-last tensors: microseconds, the least of a few samples. Where a layer has more weights
than a core's cache holds, calls take copies of them in turns, as a network's layers do. COUPFAST_CPU_ISA chooses the
instruction set.

`fit` moves the constants at random, keeps what is better, and prints them. Better is a smaller sum of the logarithms of what
is lost by choosing by them, and, with less weight, of errors in the ratio of an algorithm's time to the direct one's. Then the
shapes on which the algorithm that the committed constants choose is slower than the faster of PyTorch's layouts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import pathlib
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import layers
import torch
from cases import load_case

from coupfast.engine.cpu import algorithms
from coupfast_kernels import native
from coupfast_kernels.convolution import cpu as kernels

SAMPLES, SAMPLE_SECONDS = 2, 1.5e-3
COLD_BYTES, COPIES_BYTES = 2 << 20, 48 << 20
LANES = {"avx512": 16, "avx2": 8, "neon": 8, "portable": 8}
NUMBERS = {name: size for size, name in layers.ALGORITHMS.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("measure")
    measure.add_argument("--network", choices=("paper", "tiny"), required=True)
    measure.add_argument("--batch", type=int, nargs="+", required=True)
    measure.add_argument("--threads", type=int, required=True)
    measure.add_argument("--json", type=pathlib.Path, required=True)
    fit = commands.add_parser("fit")
    fit.add_argument("file", type=pathlib.Path)
    fit.add_argument("--tries", type=int, default=5000)
    options = parser.parse_args()
    if options.command == "fit":
        _fit([json.loads(line) for line in options.file.read_text().splitlines()], options.tries)
        return 0
    case = load_case(layers._parse(["--network", options.network, "--threads", str(options.threads)]))
    torch.set_num_threads(options.threads)
    shapes = {layer: None for subject in layers._subjects(case) for layer in layers.distinct_layers(subject.fused)}
    with options.json.open("a") as file, torch.no_grad():
        for batch, layer, transposed in itertools.product(options.batch, shapes, (False, True)):
            row = {
                "isa": native.describe()["isa"],
                "layer": str(layer),
                "direction": "transposed" if transposed else "forward",
                "batch": batch,
                "threads": options.threads,
                "microseconds": _times(dict(_calls(layer, batch, transposed))),
            }
            file.write(json.dumps(row) + "\n")
    return 0


# --- measuring --------------------------------------------------------------------------------------------------------


def _calls(layer: layers.Layer, batch: int, transposed: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    source = layer.source(transposed)
    x = torch.randn(batch, *source)
    last, weights_bytes = x.contiguous(memory_format=torch.channels_last), layer.weight.nbytes
    for name, image, layout in (("eager", x, torch.contiguous_format), ("channels_last", last, torch.channels_last)):

        def library(image: torch.Tensor = image, layout: torch.memory_format = layout) -> Callable[[], Any]:
            return layers._library_call(layer, image, layer.weight.clone(memory_format=layout), transposed)

        yield name, _in_turns(library, weights_bytes)
    fits = (layer.kernel, layer.stride, layer.padding) == (3, 1, 1)
    for size in kernels.TILES if fits else (kernels.DIRECT,):

        def ours(size: int = size) -> Callable[[], Any]:
            return layers._kernel_call(layer, last, size, transposed)

        yield layers.ALGORITHMS[size], _in_turns(ours, int(weights_bytes * algorithms.PACKED[size]))


def _in_turns(make: Callable[[], Callable[[], Any]], weights_bytes: int) -> Callable[[], Any]:
    if weights_bytes < COLD_BYTES:
        return make()
    calls = itertools.cycle([make() for _ in range(max(2, min(8, math.ceil(COPIES_BYTES / weights_bytes))))])
    return lambda: next(calls)()


def _times(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    def seconds(call: Callable[[], Any], count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) / count

    for call in calls.values():
        call()
    counts = {name: max(1, int(SAMPLE_SECONDS / seconds(call, 1))) for name, call in calls.items()}
    turns = [{name: seconds(call, counts[name]) for name, call in calls.items()} for _ in range(SAMPLES)]
    return {name: round(1e6 * min(turn[name] for turn in turns), 2) for name in calls}


# --- fitting ----------------------------------------------------------------------------------------------------------


def work_of(row: dict[str, Any]) -> dict[str, float]:
    """What the choice goes by, of each algorithm."""
    maps = row["layer"].split(",")[0].split(" -> ")  # "32x16x8 -> 64x16x8, 3x3"
    (channels, *_), (out_channels, *size) = ([int(number) for number in shape.split("x")] for shape in maps)
    if row["direction"] == "transposed":
        channels, out_channels = out_channels, channels
    arguments = (channels, out_channels, *size, row["batch"], LANES[row["isa"]])
    return {name: algorithms.work(size, *arguments) for name, size in NUMBERS.items()}


def losses(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Mean logarithms: of the chosen algorithm's time over the best one's; of errors in ratios to the direct one's.

    Args:
        rows: Of convolutions that every algorithm can run.
    """
    lost = wrong = 0.0
    for row in rows:
        times, work = {name: row["microseconds"][name] for name in NUMBERS}, work_of(row)
        lost += math.log(times[min(work, key=work.__getitem__)] / min(times.values()))
        for name in ("F2", "F4"):
            wrong += min(0.3, abs(math.log(work[name] / work["direct"] * times["direct"] / times[name])))
    return lost / len(rows), wrong / len(rows)


def _fit(rows: list[dict[str, Any]], tries: int) -> None:
    rows = [row for row in rows if "F4" in row["microseconds"]]
    f2, f4 = (algorithms._EFFORT[size] for size in (kernels.F2, kernels.F4))
    committed = [f2.product, f2.input, f2.output, f4.product, f4.input, f4.output, algorithms._FEW, algorithms._BYTE]
    committed.append(algorithms._RESIDENT)

    def score(constants: list[float]) -> float:
        with _taking(constants):
            lost, wrong = losses(rows)
        return 4 * lost + 0.3 * wrong

    rng = random.Random(1)
    best, least = committed, score(committed)
    for _ in range(tries):
        moved = [value * math.exp(rng.gauss(0, 0.2)) if rng.random() < 0.4 else value for value in best]
        found = score(moved)
        if found <= least:
            best, least = moved, found
    for name, constants in (("committed", committed), ("fitted", best)):
        with _taking(constants):
            lost, wrong = losses(rows)
        print(f"{name}: {[float(f'{value:.3g}') for value in constants]}, lost {100 * lost:.2f} %, ratios off by {wrong:.3f}")
    for row in rows:
        work, times = work_of(row), row["microseconds"]
        ratio = min(times["eager"], times["channels_last"]) / times[min(work, key=work.__getitem__)]
        if ratio < 1:
            print(f"{row['isa']} {row['layer']} {row['direction']} batch {row['batch']}: {ratio:.2f} x PyTorch")


def _taking(constants: list[float]) -> Any:
    """`work` by these constants."""
    effort = {
        kernels.F2: algorithms._Effort(*constants[:3]),
        kernels.F4: algorithms._Effort(*constants[3:6]),
    }
    names = ("_FEW", "_BYTE", "_RESIDENT")
    return mock.patch.multiple(algorithms, _EFFORT=effort, **dict(zip(names, constants[6:], strict=True)))


if __name__ == "__main__":
    sys.exit(main())
