"""Where a step of the CPU engine spends its time: `python bench/overhead.py --batch 1`.

Three parts of a guided step, and of its transpose, each the sum of timed calls:

* "kernels": the C++ kernels, called for runs of operations at once;
* "PyTorch": the operations that are left to PyTorch (resampling, pools, the last linear layer, softmax);
* "outside": the rest of the step: Python, copies into and out of the arena, time embeddings.

Timing a call takes about a microsecond, which counts as "outside". Shares are of the median step.

`--by-kernel` calls every kernel alone and splits "kernels" by what it is: convolutions by algorithm, group norms, their
transposes, attention, sums, masks, the guided step. The step is a little slower so.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from cases import Case, add_case_options, load_case, write_results

from coupfast import Purifier
from coupfast.engine import CounterNoise, cpu
from coupfast.engine.cpu import program as cpu_program
from coupfast.engine.cpu.regions import Call, Regions
from coupfast.engine.networks import frozen
from coupfast.engine.precision import strict_float32
from coupfast_kernels.convolution import cpu as convolutions
from coupfast_kernels.operations import Conv, Operations

LEFT = ("PyTorch", "outside")
ALGORITHMS = {convolutions.F2: "F(2x2)", convolutions.F4: "F(4x4)"}


class Clock:
    """Seconds inside of wrapped functions, by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def add(self, part: str, seconds: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def timed(self, part: str, function: Callable) -> Callable:
        def run(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.add(part, time.perf_counter() - start)

        return run


def told(kernel: ctypes.Structure) -> str:
    """What a kernel is."""
    if not isinstance(kernel, Conv):
        return type(kernel).__name__
    stride = kernel.stride * kernel.spread  # of which one is 1
    shape = f"{kernel.kernel_height}x{kernel.kernel_width}"
    return ALGORITHMS.get(kernel.tile, f"direct {shape}" if stride == 1 else f"direct {shape}/{stride}")


def instrument(clock: Clock, *, by_kernel: bool) -> None:
    """Let the engine's calls be timed, in this process from now on."""
    run_all = Operations.run

    def run_each(self: Operations, threads: int) -> None:
        if not hasattr(self, "each"):
            self.each = [(told(kernel), Operations([kernel])) for kernel in self.structures]
        for kind, alone in self.each:
            start = time.perf_counter()
            run_all(alone, threads)
            clock.add(kind, time.perf_counter() - start)

    calls = Regions.calls

    def timed_calls(self: Regions, region: Any) -> list[Call]:
        made = calls(self, region)
        for call in made:
            call.target = clock.timed("PyTorch", call.target)
        return made

    Regions.calls = timed_calls  # type: ignore[method-assign]
    Operations.run = run_each if by_kernel else clock.timed("kernels", run_all)  # type: ignore[method-assign]
    if not by_kernel:  # which finds it among the others
        cpu_program.guided_step_cpu = clock.timed("kernels", cpu_program.guided_step_cpu)
    torch.autograd.grad = clock.timed("PyTorch", torch.autograd.grad)
    torch.ops.aten.convolution_backward = clock.timed("PyTorch", torch.ops.aten.convolution_backward)


def rows(case: Case, repeats: int, seed: int, *, by_kernel: bool) -> list[dict[str, Any]]:
    clock = Clock()
    instrument(clock, by_kernel=by_kernel)
    score, classifier, x = frozen(case.networks.score), frozen(case.networks.classifier), case.x
    table = Purifier(score, classifier, engine="cpu", num_steps=10).recipe.table
    program = cpu.prepare(score, classifier, table, x).for_batch(len(x))
    noise = CounterNoise(seed, torch.arange(len(x)), torch.zeros(len(x), dtype=torch.int64))
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    kept: list[Any] = [None]

    def forward() -> None:
        kept[0] = program.step(0, 2 * x - 1, noise, "slopes")[1]

    def backward() -> None:
        program.step_vjp(0, 2 * x - 1, kept[0], v)

    found = []
    with strict_float32("cpu"):
        for name, work in (("forward", forward), ("backward", backward)):
            work()
            samples = []
            for _ in range(repeats):
                clock.seconds = dict.fromkeys(LEFT, 0.0)
                start = time.perf_counter()
                work()
                whole = time.perf_counter() - start
                clock.seconds["outside"] = whole - sum(clock.seconds.values())
                samples.append((whole, dict(clock.seconds)))
            middle = statistics.median_low([whole for whole, _ in samples])
            parts = next(parts for whole, parts in samples if whole == middle)
            shares = {part: parts[part] / middle for part in sorted(parts, key=parts.__getitem__, reverse=True)}
            found.append({"step": name, "batch": len(x), "seconds": middle, "shares": shares})
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_case_options(parser, images="random")
    parser.add_argument("--by-kernel", action="store_true", help="split kernels by what they are")
    options = parser.parse_args(arguments)
    case = load_case(options)
    measured = rows(case, options.repeats, options.seed, by_kernel=options.by_kernel)
    for row in measured:
        shares = "  ".join(f"{part} {100 * share:.1f} %" for part, share in row["shares"].items())
        print(f"{row['step']:<9} B={row['batch']}  {1e3 * row['seconds']:.2f} ms  {shares}")
    if options.json:
        write_results(options.json, measured, case, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
