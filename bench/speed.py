"""How long a purification takes: `python bench/speed.py --t 0.1`.

Times the reference as published (torchsde's `sdeint_adjoint`, networks whose parameters all require gradients, COUP's
guidance by `.backward(retain_graph=True)`) and every engine of coupfast that runs here, in turns within one run, after a
check that they agree. No gradient of the image is taken (`bench/gradient.py` does that). Purification only: the classifier
alone is the row of `--t 0`, and `--t 0 0.001 0.05 0.1 0.15` gives Table 4 of Zhang et al. 2024, arXiv:2408.05900.

Parity. The published path comes from a Brownian interval in float32 time. Its increments are replayed as explicit noise
(`cases.published_path`), so that the reference, every engine and the float64 definition (`coupfast.reference.purify_ref`)
take the same steps on the same noise. All differences are the largest absolute ones, of images in [0, 1]:

* `parity_max_abs`: an engine's result against the published one; in the reference's row, the published one against eager's.
  In whole runs it is about 1e-5, the published code's own error: it takes σ = sqrt(1 − ᾱ) in float32, which at t = 0.001
  leaves four digits;
* `error_float64`: against the definition in float64; `error_float64_eager` is the eager engine's, beside it;
* `error_coarse`, `error_coarse_eager`: the same for the whole way from t to 1e-5 in as many equal steps as were timed. There
  the networks' outputs enter at order one; in a few steps of 1e-3 they are scaled down to the rounding of the state. None
  where all steps run.

`strict` promises errors of at most 4 times eager's. An engine that breaks this gets a row without times, and the command
exits with 1. One allowance: a ReLU of a trained classifier that lies on its kink to within rounding may fall on either side,
which moves the guidance by up to a percent. Where that can happen, a percent of what the guidance moves the result by
is allowed on top (`allowance`, `allowance_coarse`); unguided methods and random weights, whose ReLUs are kept away from
their kinks, have none.

On a GPU `seconds_per_image` is the device's time, between two events, and `host_seconds_per_image` what the host was busy with
a call (None on a CPU). `kernels_per_step` and `launches_per_step` are a whole call's, over its steps, as PyTorch's profiler
counts them: kernels that ran, and the host's calls that started them, of which a captured graph needs one; None where there is
no GPU. Repeats take other images each. `share_of_matmul` is the FLOP of the purification by direct sums, over its time, over
the rate of a large float32 matrix product in the same run (`matmul_flop_per_second` in the environment): algorithms with fewer
multiplications, and TF32, may exceed 1.

Scaling. Where only the first K of N steps are timed (`scaled`: the default for the paper's networks on a CPU; `--full` runs
all), times are stated for the whole purification: the engines' times N / K, the reference's times (N + 1) / (K + 1), because
torchsde evaluates the drift once more per solve than it takes steps.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from cases import (
    COLUMNS,
    Case,
    Networks,
    Path,
    add_case_options,
    engines_here,
    largest_difference,
    load_case,
    markdown,
    pass_flop,
    published_path,
    purifier_on,
    share_of_matmul,
    steps_to_time,
    write_results,
)
from timing import Summary, interleave, launches, rotated, timed_twice, times_faster
from torch import nn

import coupfast
from coupfast.engine.precision import strict_float32
from coupfast.engines import ENGINES
from coupfast.methods import METHODS
from coupfast.reference import purify_published, purify_ref
from coupfast.sde import parity_grid, time_grid

CONTRACT = 4.0  # `strict`: the error against float64 in units of eager's
FLIPPED_RELU = 0.01  # of the guidance
REFERENCE = "reference"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    case = load_case(options)
    engines, skipped = options.engines, []
    if engines is None:
        here, skipped = engines_here(case)
        engines = [REFERENCE, *here]
    print(case)
    rows = []
    for t in options.t:
        if t == 0:
            new = [_classifier_alone(case, options.repeats)]
        else:
            new = [row for method in options.methods for row in _purifications(case, method, t, engines, options)]
        for row in new:
            print(_line(row), flush=True)
        rows += new
    if options.markdown:
        print(markdown(rows, ("method", *COLUMNS, "error_float64", "error_float64_eager")))
    if len(options.t) > 1:
        print(_table(rows))
    if options.json:
        write_results(options.json, rows, case, options, engines_that_do_not_run_here=skipped)
    broken = sum(not row["within_contract"] for row in rows)
    if broken:
        print(f"{broken} of {len(rows)} rows are over their contract and have no times", file=sys.stderr)
    return 1 if broken else 0


@dataclasses.dataclass(frozen=True, eq=False)
class _Contender:
    """Something to time.

    Attributes:
        call: One purification of the batch, the timed steps only; of other images each time, the case's own first.
        result: What it makes of the common path, as images.
        own: What `call` makes of its own noise, which is every engine's; None for the reference.
        factor: What its time is multiplied by to state that of all steps.
        coarse_error: See `error_coarse`.
    """

    engine: str
    precision: str
    num_steps: int
    call: Callable[[], torch.Tensor]
    result: torch.Tensor
    factor: float
    coarse_error: float | None = None
    own: torch.Tensor | None = None

    @property
    def name(self) -> str:
        return f"{self.engine} ({self.precision})"


@dataclasses.dataclass(frozen=True, eq=False)
class _Coarse:
    """The whole way in a few steps, the definition's result in float64, and what flipped ReLUs may move it by."""

    grid: np.ndarray
    truth: torch.Tensor
    allowance: float


def _purifications(
    case: Case, method: str, t: float, engines: list[str], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row for each contender: parity first, then times for those within their contract."""
    networks, x, noising = case.networks, case.x, (METHODS[method]().recipe().noising is not None)
    num_steps = len(parity_grid(t)) - 1
    steps = steps_to_time(options, num_steps)
    path = published_path(2.0 * x - 1.0, t=t, steps=steps, forward_noising=noising, entropy=options.seed)
    truth, allowance = definition(networks, method, x, path.noise, path.grid)
    coarse: _Coarse | None = None
    if steps < num_steps:
        grid = time_grid(t, steps)
        coarse = _Coarse(grid, *definition(networks, method, x, path.noise, grid))
    # The eager engine's errors are the measure of all others', whether it is timed or not.
    eager, *others = (
        _engine_contender(case, method, t, name, path, coarse)
        for name in dict.fromkeys(["eager", *engines])
        if name != REFERENCE
    )
    contenders = [contender for contender in (eager, *others) if contender.engine in engines]
    references = []
    if REFERENCE in engines:
        references = [_reference_contender(case, method, t, path, strict=False)]
        if x.device.type == "cuda":
            references.append(_reference_contender(case, method, t, path, strict=True))

    eager_error = largest_difference(eager.result, truth)
    rows: dict[str, dict[str, Any]] = {}
    for contender in [*references, *contenders]:
        is_reference = contender.engine == REFERENCE
        opposite = eager if is_reference else references[0] if references else None
        error = largest_difference(contender.result, truth)
        # Written so that NaN does not pass.
        sound = is_reference or error <= CONTRACT * eager_error + allowance
        if contender.own is not None and eager.own is not None:
            # Both within their contracts of the truth, hence of each other.
            sound = sound and largest_difference(contender.own, eager.own) <= (CONTRACT + 1) * eager_error + allowance
        if coarse is not None and not is_reference:
            sound = sound and contender.coarse_error <= CONTRACT * eager.coarse_error + coarse.allowance
        rows[contender.name] = {
            "method": method,
            "engine": contender.engine,
            "precision": contender.precision,
            "network": networks.name,
            "t": t,
            "num_steps": contender.num_steps,
            "steps_timed": steps,
            "scaled": steps < num_steps,
            "batch": len(x),
            "seconds_per_image": None,
            "spread": None,
            "ratio_to_reference": None,
            "ratio_to_eager": None,
            "host_seconds_per_image": None,
            "kernels_per_step": None,
            "launches_per_step": None,
            "share_of_matmul": None,
            "parity_max_abs": largest_difference(contender.result, opposite.result) if opposite else None,
            "error_float64": error,
            "error_float64_eager": eager_error,
            "error_coarse": contender.coarse_error,
            "error_coarse_eager": eager.coarse_error,
            "allowance": allowance,
            "allowance_coarse": coarse.allowance if coarse else None,
            "within_contract": sound,
            **case.machine_fields(),
        }

    timed_ones = [contender for contender in [*references, *contenders] if rows[contender.name]["within_contract"]]
    # The parity runs took the same steps through the same code: everything is warm.
    turns = interleave({c.name: lambda c=c: timed_twice(c.call, x.device)[0] for c in timed_ones}, options.repeats)
    seconds = {c.name: [c.factor / len(x) * sample.seconds for sample in turns[c.name]] for c in timed_ones}
    flop = pass_flop(networks, x)
    step_flop = flop["score"] + (2 * flop["classifier"] if METHODS[method].guided else 0)
    for name, samples in seconds.items():
        summary = Summary.of(samples)
        rows[name] |= {
            "seconds_per_image": summary.median,
            "spread": summary.spread,
            "ratio_to_reference": times_faster(seconds[references[0].name], samples) if references else None,
            "ratio_to_eager": times_faster(seconds.get(eager.name), samples),
            "share_of_matmul": share_of_matmul(step_flop * rows[name]["num_steps"], summary.median, case),
        }
    for contender in timed_ones:
        row = rows[contender.name]
        host = [sample.host for sample in turns[contender.name] if sample.host is not None]
        if host:
            row["host_seconds_per_image"] = contender.factor / len(x) * Summary.of(host).median
        counted = launches(contender.call, x.device)
        if counted is not None:
            row |= {"kernels_per_step": counted.kernels / steps, "launches_per_step": counted.calls / steps}
    return list(rows.values())


def _reference_contender(case: Case, method: str, t: float, path: Path, *, strict: bool) -> _Contender:
    networks, noising = case.networks, (METHODS[method]().recipe().noising is not None)
    classifier = networks.classifier if METHODS[method].guided else None
    images, device = rotated(case.x), case.x.device

    def call() -> torch.Tensor:
        x_0 = 2.0 * next(images) - 1.0
        with torch.no_grad(), strict_float32(device.type) if strict else contextlib.nullcontext(), path.seeded():
            x_k = purify_published(
                x_0, networks.score, classifier, t=t, t_end=path.t_end, forward_noising=noising, entropy=path.entropy
            )
            return (x_k + 1.0) * 0.5

    num_steps, steps = len(parity_grid(t)) - 1, len(path.grid) - 1
    precision = "strict" if strict else _published_precision(device)
    return _Contender(REFERENCE, precision, num_steps, call, call(), (num_steps + 1) / (steps + 1))


def _engine_contender(
    case: Case, method: str, t: float, engine: str, path: Path, coarse: _Coarse | None
) -> _Contender:
    purifier = purifier_on(path.grid, case.networks, method, engine=engine, precision="strict")
    images = rotated(case.x)

    def call() -> torch.Tensor:
        with torch.no_grad():
            return purifier(next(images), seed=0)  # with its own noise, as users call it

    # Also the warm-up of what is timed: with counter noise, where `_replay` has the published path's.
    own = _or_nan(call, case.x)

    coarse_error = None
    if coarse is not None:
        on_coarse = purifier_on(coarse.grid, case.networks, method, engine=engine, precision="strict")
        coarse_error = largest_difference(_replay(on_coarse, case.x, path), coarse.truth)
    num_steps = len(time_grid(t)) - 1
    factor = num_steps / (len(path.grid) - 1)
    return _Contender(engine, "strict", num_steps, call, _replay(purifier, case.x, path), factor, coarse_error, own)


def _replay(purifier: coupfast.Purifier, x: torch.Tensor, path: Path) -> torch.Tensor:
    with torch.no_grad():
        return _or_nan(lambda: purifier(x, noise=path.noise), x)


def _or_nan(purified: Callable[[], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The images, or NaN where a purification that is not finite was refused: the contract then fails in its row."""
    try:
        return purified()
    except FloatingPointError:
        return torch.full_like(x, float("nan"))


def definition(
    networks: Networks, method: str, x: torch.Tensor, noise: torch.Tensor, grid: np.ndarray
) -> tuple[torch.Tensor, float]:
    """The purified images by `purify_ref` in float64, and what flipped ReLUs are allowed to move them by."""

    def purified(classifier: nn.Module | None) -> torch.Tensor:
        with torch.no_grad():
            x_k = purify_ref(
                2.0 * x.double() - 1.0,
                networks.score64,
                classifier,
                noise.double(),
                grid=grid,
                forward_noising=(METHODS[method]().recipe().noising is not None),
            )
        return (x_k + 1.0) * 0.5

    if not METHODS[method].guided:
        return purified(None), 0.0
    truth = purified(networks.classifier64)
    if not networks.relus_may_flip:
        return truth, 0.0
    return truth, FLIPPED_RELU * largest_difference(truth, purified(None))


def _classifier_alone(case: Case, repeats: int) -> dict[str, Any]:
    """The row of t = 0: what every method costs without purification."""

    def classify() -> torch.Tensor:
        with torch.no_grad(), strict_float32(case.x.device.type):
            return case.networks.classifier(case.x)

    with torch.no_grad():
        error = largest_difference(classify(), case.networks.classifier64(case.x.double()))
    turns = interleave({"classifier": lambda: timed_twice(classify, case.x.device)[0]}, repeats)["classifier"]
    summary = Summary.of([sample.seconds / len(case.x) for sample in turns])
    host = [sample.host / len(case.x) for sample in turns if sample.host is not None]
    flop = pass_flop(case.networks, case.x)["classifier"]
    return {
        "method": "classifier alone",
        "engine": "eager",
        "precision": "strict",
        "network": case.networks.name,
        "t": 0.0,
        "num_steps": 0,
        "steps_timed": 0,
        "scaled": False,
        "batch": len(case.x),
        "seconds_per_image": summary.median,
        "spread": summary.spread,
        "ratio_to_reference": None,
        "ratio_to_eager": None,
        "host_seconds_per_image": Summary.of(host).median if host else None,
        "kernels_per_step": None,
        "launches_per_step": None,
        "share_of_matmul": share_of_matmul(flop, summary.median, case),
        "parity_max_abs": None,
        "error_float64": error,
        "error_float64_eager": error,
        "error_coarse": None,
        "error_coarse_eager": None,
        "allowance": 0.0,
        "allowance_coarse": None,
        "within_contract": True,
        **case.machine_fields(),
    }


def _published_precision(device: torch.device) -> str:
    """PyTorch's default, which the published code leaves as it is: on a GPU, convolutions in TF32."""
    return torch.backends.cudnn.conv.fp32_precision if device.type == "cuda" else "fp32"


def _line(row: dict[str, Any]) -> str:
    name = f"{row['engine']} ({row['precision']})"
    head = f"{row['method']:16} t={row['t']:<6g} B={row['batch']} {name:18}"
    errors = f"error {row['error_float64']:.1e} (eager {row['error_float64_eager']:.1e})"
    if row["error_coarse"] is not None:
        errors += f", coarse {row['error_coarse']:.1e} (eager {row['error_coarse_eager']:.1e})"
    if not row["within_contract"]:
        return f"{head} OVER ITS CONTRACT, no times: {errors}"
    seconds = f"{_seconds(row['seconds_per_image'])} ± {_seconds(row['spread'])} s/image"
    ratios = "".join(
        f"  {row[key]:.2f}x {name}"
        for key, name in [("ratio_to_reference", "reference"), ("ratio_to_eager", "eager")]
        if row[key] is not None
    )
    if row["host_seconds_per_image"] is not None:
        seconds += f" (host {_seconds(row['host_seconds_per_image'])})"
    if row["launches_per_step"] is not None:
        seconds += f", {row['launches_per_step']:.0f} launches of {row['kernels_per_step']:.0f} kernels a step"
    share = f"  {row['share_of_matmul']:.0%} of a matrix product's rate"
    scaled = f"  [scaled from {row['steps_timed']} of {row['num_steps']} steps]" if row["scaled"] else ""
    return f"{head} {seconds}{ratios}{share}  {errors}{scaled}"


def _seconds(value: float) -> str:
    return f"{value:.4g}"


def _table(rows: list[dict[str, Any]]) -> str:
    """Seconds per image, one line per method and engine, one column per t; a * marks scaled ones."""
    times = list(dict.fromkeys(row["t"] for row in rows))
    lines = ["", "seconds per image; * scaled from a few steps", "| | " + " | ".join(f"t = {t:g}" for t in times) + " |"]
    lines.append("|---" * (len(times) + 1) + "|")
    for key in dict.fromkeys((row["method"], row["engine"], row["precision"]) for row in rows):
        cells = []
        for t in times:
            found = [row for row in rows if (row["method"], row["engine"], row["precision"]) == key and row["t"] == t]
            timed_here = bool(found) and found[0]["seconds_per_image"] is not None
            cells.append(_seconds(found[0]["seconds_per_image"]) + "*" * found[0]["scaled"] if timed_here else "")
        lines.append(f"| {', '.join(key)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time purification against the reference as published.")
    add_case_options(parser, images="random")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="default: all")
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=[REFERENCE, *ENGINES],
        help="what to time; default: the reference as published and every engine that runs here",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
