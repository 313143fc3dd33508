"""The score network's forward pass beside other runtimes for CPUs: `python bench/peers.py --batch 1 8`.

Times one evaluation eps_hat = score(x_k, 999 t) in PyTorch (eager, NCHW), by the engine "cpu" (`NetworkProgram`), OpenVINO and
ONNX Runtime, in turns within one run, after a check that each agrees with eager. Everything is float32 on the same number of
threads and starts from tensors in memory.

The label is a constant, t = 0.1: OpenVINO and ONNX Runtime may fold all that follows from it alone when they compile, as the
engine finds it once per step of a grid. That favours them: a purification has another label in every step, and would give it
as an input. Eager takes it as an input and computes the embedding each time. Compiling, packing and converting are not timed.

* OpenVINO: `openvino.convert_model` of the module at the batch's shape, INFERENCE_PRECISION_HINT f32 (its default may be
  bfloat16), INFERENCE_NUM_THREADS, one stream, PERFORMANCE_HINT LATENCY; inputs and outputs shared, not copied;
* ONNX Runtime: `torch.onnx.export` at the batch's shape, the CPU provider, all graph optimizations, `intra_op_num_threads`.

Before every timed call there is a pause of 50 ms, in which the threads of the one before, which wait for work in a loop for a
while, fall asleep.

Fields: `seconds_per_image` (median), `spread` (interquartile range) and `seconds_per_image_best` of the repeats;
`ratio_to_eager`, `ratio_to_engine`: how many times faster, medians of paired ratios; `relative_difference`: |y − y_eager| /
|y_eager| in the 2-norm. A runtime that is not installed, or that fails on the network, has a row with the `reason` and no
times; one that differs from eager by more than 1e-4 has no times either. The command exits with 1 if one differs or fails, not
if it is only not installed: `pip install coupfast[peers]`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import pathlib
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from cases import Case, add_network_options, load_case, positive, write_results
from layers import LABEL, bound_program, fused_score, relative_error
from timing import Summary, interleave, timed, times_faster
from torch import nn

from coupfast.engine.cpu.algorithms import WeightStore, tile
from coupfast.engine.cpu.parts import FusedNetwork
from coupfast.environment import version
from coupfast_kernels import native

AGREEMENT = 1e-4  # relative to eager's result
PAUSE_SECONDS = 0.05
CPU = torch.device("cpu")
EAGER, ENGINE, OPENVINO, ONNX_RUNTIME = "eager", "cpu engine", "OpenVINO", "ONNX Runtime"
#: What each needs beyond the package itself.
MODULES = {EAGER: (), ENGINE: (), OPENVINO: ("openvino",), ONNX_RUNTIME: ("onnx", "onnxscript", "onnxruntime")}

Call = Callable[[], torch.Tensor]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    batches, options.batch = options.batch, max(options.batch)
    case = load_case(options)
    options.batch = batches
    print(case)
    absent = _absent()
    for name, reason in absent.items():
        print(f"{name}: {reason}", file=sys.stderr)
    case.networks.score.requires_grad_(False)
    rows = []
    for batch in batches:
        for row in _rows(case, batch, absent, options):
            print(_line(row), flush=True)
            rows.append(row)
    if options.json:
        versions = {module: version(module) for modules in MODULES.values() for module in modules}
        write_results(options.json, rows, case, options, label=LABEL, versions=versions)
    broken = sum(not row["within_contract"] and row["installed"] for row in rows)
    if broken:
        print(f"{broken} of {len(rows)} rows differ from eager or failed, and have no times", file=sys.stderr)
    return 1 if broken else 0


def _absent() -> dict[str, str]:
    """Why contenders cannot be here at all."""
    absent = {}
    for name, modules in MODULES.items():
        for module in modules:
            try:
                importlib.import_module(module)
            except ImportError as error:
                absent[name] = f"not installed: {error}"
    if (reason := native.unavailable()) is not None:
        absent[ENGINE] = reason
    return absent


class _AtLabel(nn.Module):
    """The score network at one label, which exporters see as a constant."""

    def __init__(self, score: nn.Module, batch: int) -> None:
        super().__init__()
        self.score = score
        self.register_buffer("label", torch.full((batch,), LABEL))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(x, self.label)


def _rows(case: Case, batch: int, absent: dict[str, str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each contender: parity first, then times in one loop."""
    score, x = case.networks.score, 2.0 * case.x[:batch] - 1.0
    makers: dict[str, Callable[[pathlib.Path], Call]] = {
        EAGER: lambda folder: _eager(score, x),
        ENGINE: lambda folder: _engine(fused_score(score), x),
        OPENVINO: lambda folder: _openvino(_AtLabel(score, batch).eval(), x),
        ONNX_RUNTIME: lambda folder: _onnx_runtime(_AtLabel(score, batch).eval(), x, folder),
    }
    calls: dict[str, Call] = {}
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:  # a runtime may read its file for as long as it runs
        wanted = _eager(score, x)().clone()
        for name, make in makers.items():
            difference, reason = None, absent.get(name)
            if reason is None:
                try:
                    with _without_warnings():
                        calls[name] = make(pathlib.Path(folder))
                    difference = relative_error(calls[name](), wanted)
                except Exception as error:  # whatever a runtime says about this network
                    reason = f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]
                else:
                    if not difference <= AGREEMENT:  # NaN does not pass
                        reason = f"differs from eager by {difference:.1e} > {AGREEMENT:.0e}"
            rows[name] = {
                "runtime": name,
                "network": f"{options.network} score",
                "batch": batch,
                "seconds_per_image": None,
                "seconds_per_image_best": None,
                "spread": None,
                "ratio_to_eager": None,
                "ratio_to_engine": None,
                "relative_difference": difference,
                "installed": name not in absent,
                "within_contract": reason is None,
                "reason": reason,
                **case.machine_fields(),
            }
        contenders = {name: _sampler(call) for name, call in calls.items() if rows[name]["within_contract"]}
        turns = interleave(contenders, options.repeats)
        calls.clear()
    for name, samples in turns.items():
        seconds = [sample / batch for sample in samples]
        summary = Summary.of(seconds)
        rows[name] |= {
            "seconds_per_image": summary.median,
            "seconds_per_image_best": min(seconds),
            "spread": summary.spread,
            "ratio_to_eager": times_faster(turns.get(EAGER), samples),
            "ratio_to_engine": times_faster(turns.get(ENGINE), samples),
        }
    return list(rows.values())


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Exporters warn of the network's checks of its arguments, and of packages that it does not use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)


def _sampler(call: Call) -> Callable[[], float]:
    call()

    def sample() -> float:
        time.sleep(PAUSE_SECONDS)
        return timed(call, CPU)[0]

    return sample


# --- the contenders ---------------------------------------------------------------------------------------------------


def _eager(score: nn.Module, x: torch.Tensor) -> Call:
    labels = torch.full((len(x),), LABEL)

    def call() -> torch.Tensor:
        with torch.no_grad():
            return score(x, labels)

    return call


def _engine(fused: FusedNetwork, x: torch.Tensor) -> Call:
    program = bound_program(fused, WeightStore(tile), len(x), backward=False)

    def call() -> torch.Tensor:
        with torch.no_grad():
            return program.forward(x)

    return call


def _openvino(module: nn.Module, x: torch.Tensor) -> Call:
    import openvino

    with torch.no_grad():
        model = openvino.convert_model(module, example_input=x, input=[list(x.shape)])
    compiled = openvino.compile_model(
        model,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    threads = compiled.get_property("INFERENCE_NUM_THREADS")
    if threads != torch.get_num_threads():  # it takes no more than there are physical cores
        raise RuntimeError(f"runs on {threads} threads, {torch.get_num_threads()} were asked for; see `--threads`")
    request, array = compiled.create_infer_request(), x.numpy()

    def call() -> torch.Tensor:
        return torch.from_numpy(request.infer({0: array}, share_inputs=True, share_outputs=True)[0])

    return call


def _onnx_runtime(module: nn.Module, x: torch.Tensor, folder: pathlib.Path) -> Call:
    import onnxruntime

    file = folder / "score.onnx"
    with torch.no_grad():
        torch.onnx.export(module, (x,), file, input_names=["x"], dynamo=True, verbose=False)
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = torch.get_num_threads()
    session_options.inter_op_num_threads = 1
    session_options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(str(file), session_options, providers=["CPUExecutionProvider"])
    array = x.numpy()
    return lambda: torch.from_numpy(session.run(None, {"x": array})[0])


# --- printing ---------------------------------------------------------------------------------------------------------


def _line(row: dict[str, Any]) -> str:
    head = f"{row['network']:12} B={row['batch']:<3} {row['runtime']:13}"
    if row["reason"] is not None:
        return f"{head} no times: {row['reason']}"
    ratios = "".join(
        f"  {row[key]:.2f}x {name}"
        for key, name in [("ratio_to_eager", "eager"), ("ratio_to_engine", ENGINE)]
        if row[key] is not None
    )
    times = f"{row['seconds_per_image']:.4g} ± {row['spread']:.2g} s/image (best {row['seconds_per_image_best']:.4g})"
    return f"{head} {times}{ratios}  difference from eager {row['relative_difference']:.1e}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = "images at a time, one or several sizes (default 1)"
    parser.add_argument("--batch", type=positive, nargs="+", default=[1], help=sizes)
    add_network_options(parser, images="random")
    parser.set_defaults(device="cpu", classifier=None)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
