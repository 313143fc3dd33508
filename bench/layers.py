"""How fast the CPU engine's convolutions are, shape by shape: `python bench/layers.py --batch 8`.

Takes every distinct shape of convolution that the engine finds in a network's trace, forward and transposed (the gradient of
its input), in the algorithm that the engine chooses for it (`--all`: in each that can run it), in turns with PyTorch's own
convolution of NCHW and of channels-last tensors. Then whole networks, as `NetworkProgram` runs them.

What a row of a shape says. Both sides take one convolution without bias, norm or activation, weights packed or laid out
beforehand. Short calls are repeated until a sample lasts 5 ms, so weights and maps are as warm in the caches as they get;
inside a network they are colder, and the engine's convolutions also do what stands around them.

* `seconds`: the best of the repeats; `seconds_median`, `spread`: their median and interquartile range;
* `gflops`: 2 · multiplications of the direct sum, taps in the padding included, / `seconds`, in 10⁹ a second: comparable
  between algorithms, and above the machine's limit where Winograd's saves more than it costs;
* `multiplications`: those between weights and data that the algorithm really does, tiles that overhang the map included,
  the transforms and the filling of vectors left out;
* `share_of_sgemm`: `multiplications` / `seconds` as a share of the best rate that `torch.mm` reached on square float32
  matrices in the same run (`sgemm_multiplications_per_second`). That is a measured sgemm on these threads, not the
  theoretical peak of the machine;
* `ratio_to_eager`, `ratio_to_channels_last`: how many times faster than PyTorch's, medians of paired ratios;
* `relative_error`, `relative_error_eager`: |y − y64| / |y64| in the 2-norm, y64 from PyTorch in float64; eager's is of NCHW.

Parity comes first. A row whose error is more than 4 times eager's gets no times, and the command exits with 1 if the engine
would have chosen it. On one image PyTorch takes another algorithm for some transposed layers, of about half the error; the
engine promises one bound for a layer, whatever the batch, so the error that counts (`relative_error_allowed` is 4 times it)
is the larger of eager's on these images and on eight. A ReLU of a trained classifier within rounding of its kink may fall on
either side: its vjp is allowed a percent more (`allowance`). Without a float64 result (`--no-truth`) a whole network has to
agree with eager to a relative 1e-4 (and the allowance) instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tables
import torch
import torch.nn.functional as F
from cases import IMAGE_SHAPE, Case, add_network_options, load_case, positive, write_results
from timing import Summary, interleave, timed, times_faster

from coupfast.engine.cpu.algorithms import WeightStore, tile
from coupfast.engine.cpu.fusion import fuse
from coupfast.engine.cpu.network_program import NetworkProgram
from coupfast.engine.cpu.parts import Convolution, FusedNetwork
from coupfast.engine.cpu.placement import Workspace
from coupfast.guidance import scaled_logits
from coupfast.tracing import trace
from coupfast_kernels import native, operations
from coupfast_kernels.convolution import cpu as kernels

CONTRACT = 4.0  # the error against float64 in units of eager's
COMMON_BATCH = 8  # on so many images, and on more, PyTorch takes the same algorithm for a layer
AGREEMENT = 1e-4  # relative to eager's result, where there is no float64 one
FLIPPED_RELU = 0.01  # of the gradient
LABEL = 99.9  # 999 t at t = 0.1
SAMPLE_SECONDS = 5e-3
ALGORITHMS = {kernels.DIRECT: "direct", kernels.F2: "F2", kernels.F4: "F4"}
CPU = torch.device("cpu")

Function = Callable[[torch.Tensor], torch.Tensor]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    reason = native.unavailable()
    if reason is not None:
        raise SystemExit(f"the CPU engine's kernels cannot be built here: {reason}")
    case = load_case(options)
    print(case)
    limit = sgemm_rate(options.repeats)
    subjects = _subjects(case)
    rows: list[dict[str, Any]] = []
    for subject in subjects:
        for layer, count in distinct_layers(subject.fused).items():
            for transposed in (False, True):
                rows += _layer_rows(subject.name, layer, count, transposed, case, options)
    # Once more: what a shared machine gave at the start it need not give later.
    limit = max(limit, sgemm_rate(options.repeats))
    for row in rows:
        if row["seconds"] is not None:
            row["share_of_sgemm"] = row["multiplications"] / row["seconds"] / limit
    print(f"\nlimit: {limit / 1e9:.1f} G multiplications/s, the best of torch.mm on float32 matrices (measured, not the peak)")
    for line in _table(rows):
        print(line)
    print()
    for subject in subjects:
        for gradient in (False, True):
            row = _network_row(subject, gradient, case, options)
            print(_network_line(row), flush=True)
            rows.append(row)
    if options.json:
        write_results(options.json, rows, case, options, sgemm_multiplications_per_second=limit)
    # What is not chosen may be less accurate: that may be why.
    broken = sum(not row["within_contract"] for row in rows if row.get("chosen", True))
    if broken:
        print(f"{broken} of {len(rows)} rows are over their contract and have no times", file=sys.stderr)
    return 1 if broken else 0


def sgemm_rate(repeats: int) -> float:
    """Multiplications a second of `torch.mm`, the best of some square float32 matrices."""
    best = 0.0
    for size in (1024, 2048):
        a, b = torch.randn(size, size), torch.randn(size, size)
        y = torch.mm(a, b)
        for _ in range(repeats):
            best = max(best, size**3 / timed(lambda a=a, b=b, y=y: torch.mm(a, b, out=y), CPU)[0])  # type: ignore[misc]
    return best


# --- networks ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Subject:
    """A network as a function of states in [-1, 1], in both precisions and as the engine cuts it."""

    name: str
    function: Function
    function64: Function
    fused: FusedNetwork
    weights: WeightStore
    relus_may_flip: bool


def _subjects(case: Case) -> list[_Subject]:
    networks = case.networks
    # Frozen, as a purifier sees them: eager computes no gradients of weights.
    score, classifier = networks.score.requires_grad_(False), networks.classifier.requires_grad_(False)
    logits = trace(lambda x: scaled_logits(classifier, x), lambda batch: (torch.zeros(batch, *IMAGE_SHAPE),))
    return [
        _Subject(
            "score",
            lambda x: score(x, x.new_full((len(x),), LABEL)),
            lambda x: networks.score64(x, torch.full((len(x),), LABEL).double()),  # the label as float32 has it
            fused_score(score),
            WeightStore(tile),
            False,
        ),
        _Subject(
            "classifier",
            lambda x: scaled_logits(classifier, x),
            lambda x: scaled_logits(networks.classifier64, x),
            fuse(logits),
            WeightStore(tile),
            networks.relus_may_flip,
        ),
    ]


def fused_score(score: Callable[..., torch.Tensor]) -> FusedNetwork:
    """A score network as the engine cuts it."""
    return fuse(
        trace(
            lambda x, labels: score(x, labels),
            lambda batch: (torch.zeros(batch, *IMAGE_SHAPE), torch.full((batch,), LABEL)),
        )
    )


def bound_program(fused: FusedNetwork, weights: WeightStore, batch: int, *, backward: bool) -> NetworkProgram:
    """A program in a workspace of its own, ready for `LABEL`; what the label alone decides is found here, as in the engine."""
    program = NetworkProgram(fused, batch, weights, backward=backward, threads=torch.get_num_threads())
    workspace = Workspace()
    workspace.hold(program.arena_floats, program.scratch_floats)
    program.bind(workspace)
    program.set_label(fused.at_label(torch.full((1,), LABEL)))
    return program


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """|found − wanted| / |wanted| in the 2-norm, taken in float64."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def _value_or_vjp(function: Function, x: torch.Tensor, v: torch.Tensor | None) -> torch.Tensor:
    if v is None:
        with torch.no_grad():
            return function(x)
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf, v)[0]


def _network_row(subject: _Subject, gradient: bool, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    x = 2.0 * case.x - 1.0
    v: torch.Tensor | None = None
    if gradient:
        shape = (len(x), *subject.fused.shapes[subject.fused.output])
        v = torch.randn(shape, generator=torch.Generator().manual_seed(options.seed))
    program = bound_program(subject.fused, subject.weights, len(x), backward=gradient)

    def engine() -> torch.Tensor:
        with torch.no_grad():
            y = program.forward(x)
            return y if v is None else program.backward(v)

    def eager() -> torch.Tensor:
        return _value_or_vjp(subject.function, x, v)

    found, eagers = engine().clone(), eager()
    difference = relative_error(found, eagers)
    allowance = FLIPPED_RELU if gradient and subject.relus_may_flip else 0.0
    error = eager_error = None
    # Written so that NaN does not pass.
    if options.no_truth:
        sound = difference <= AGREEMENT + allowance
    else:
        truth = _value_or_vjp(subject.function64, x.double(), None if v is None else v.double())
        error, eager_error = relative_error(found, truth), relative_error(eagers, truth)
        sound = error <= CONTRACT * eager_error + allowance
    row: dict[str, Any] = {
        "kind": "network",
        "network": f"{options.network} {subject.name}",
        "direction": "forward + vjp" if gradient else "forward",
        "batch": len(x),
        "seconds": None,
        "seconds_median": None,
        "spread": None,
        "seconds_eager": None,
        "ratio_to_eager": None,
        "relative_error": error,
        "relative_error_eager": eager_error,
        "relative_difference": difference,
        "allowance": allowance,
        "within_contract": sound,
        **case.machine_fields(),
    }
    if sound:
        turns = interleave({"engine": lambda: timed(engine, CPU)[0], "eager": lambda: timed(eager, CPU)[0]}, options.repeats)
        row |= _times(turns["engine"]) | {
            "seconds_eager": min(turns["eager"]),
            "ratio_to_eager": times_faster(turns["eager"], turns["engine"]),
        }
    return row


# --- layers -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layer:
    """What decides how long a convolution takes; `weight` is that of the first one of this shape."""

    channels: int
    height: int
    width: int
    out_channels: int
    kernel: int
    stride: int
    padding: int
    convolution: Convolution = dataclasses.field(compare=False)

    @property
    def weight(self) -> torch.Tensor:
        return self.convolution.weight

    @property
    def out_size(self) -> tuple[int, int]:
        height, width = ((axis + 2 * self.padding - self.kernel) // self.stride + 1 for axis in (self.height, self.width))
        return height, width

    def source(self, transposed: bool) -> tuple[int, int, int]:
        """(channels, height, width) of what the convolution, or its transpose, is applied to."""
        return (self.out_channels, *self.out_size) if transposed else (self.channels, self.height, self.width)

    def output(self, transposed: bool) -> tuple[int, int, int]:
        """(channels, height, width) of the result."""
        return (self.channels, self.height, self.width) if transposed else (self.out_channels, *self.out_size)

    def multiplications(self, size: int, batch: int, transposed: bool) -> int:
        """Products of weights and data in tiles of this size; in tiles of 1 those of the direct sum."""
        # The transpose of a strided convolution multiplies what the convolution does, however it is arranged.
        _, height, width = self.output(transposed and self.stride == 1)
        products = self.kernel**2 if size == kernels.DIRECT else (size + 2) ** 2
        tiles = batch * math.ceil(height / size) * math.ceil(width / size)
        return tiles * products * self.channels * self.out_channels

    def __str__(self) -> str:
        source, target = f"{self.channels}x{self.height}x{self.width}", "x".join(map(str, (self.out_channels, *self.out_size)))
        return f"{source} -> {target}, {self.kernel}x{self.kernel}" + (f"/{self.stride}" if self.stride != 1 else "")


def distinct_layers(fused: FusedNetwork) -> dict[Layer, int]:
    """The shapes of a network's convolutions in order of first use, and how often each occurs."""
    found: dict[Layer, int] = {}
    for part in fused.parts:
        if isinstance(part, Convolution):
            weight = part.weight
            channels, height, width = fused.shapes[part.x]
            layer = Layer(channels, height, width, weight.shape[0], weight.shape[2], part.stride, part.padding, part)
            found[layer] = found.get(layer, 0) + 1
    return found


def _layer_rows(
    network: str, layer: Layer, count: int, transposed: bool, case: Case, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for every algorithm asked for: parity first, then times in one loop."""
    batch, source = options.batch, layer.source(transposed)
    x = _images(batch, source, options.seed)
    last = x.contiguous(memory_format=torch.channels_last)
    eager = _library_call(layer, x, layer.weight, transposed)
    channels_last = _library_call(layer, last, layer.weight.contiguous(memory_format=torch.channels_last), transposed)
    truth = _library_call(layer, x.double(), layer.weight.double(), transposed)()
    eager_error = relative_error(eager(), truth)
    common_error = _error_on(layer, COMMON_BATCH, transposed, options.seed) if batch < COMMON_BATCH else eager_error
    allowed = CONTRACT * max(eager_error, common_error)

    sizes = [chosen := tile(layer.convolution, layer.output(transposed), batch, transposed)]
    if options.all:
        fits = (layer.kernel, layer.stride, layer.padding) == (3, 1, 1)
        sizes = [kernels.DIRECT, kernels.F2, kernels.F4] if fits else [kernels.DIRECT]
    calls = {ALGORITHMS[size]: _kernel_call(layer, last, size, transposed) for size in sizes}

    rows: dict[str, dict[str, Any]] = {}
    numbers = {name: size for size, name in ALGORITHMS.items()}
    for name, call in calls.items():
        error = relative_error(call(), truth)
        rows[name] = {
            "kind": "layer",
            "network": f"{options.network} {network}",
            "direction": "transposed" if transposed else "forward",
            "layer": str(layer),
            "count": count,
            "batch": batch,
            "algorithm": name,
            "chosen": name == ALGORITHMS[chosen],
            "seconds": None,
            "seconds_median": None,
            "spread": None,
            "gflops": None,
            "multiplications": layer.multiplications(numbers[name], batch, transposed),
            "share_of_sgemm": None,
            "seconds_eager": None,
            "seconds_channels_last": None,
            "ratio_to_eager": None,
            "ratio_to_channels_last": None,
            "relative_error": error,
            "relative_error_eager": eager_error,
            "relative_error_allowed": allowed,
            "within_contract": error <= allowed,  # NaN does not pass
            **case.machine_fields(),
        }
    sound = {name: call for name, call in calls.items() if rows[name]["within_contract"]}
    contenders = {"eager": eager, "channels_last": channels_last} | sound
    turns = interleave({name: _sampler(call) for name, call in contenders.items()}, options.repeats)
    direct = layer.multiplications(kernels.DIRECT, batch, transposed)
    for name, row in rows.items():
        if not row["within_contract"]:
            continue
        samples = turns[name]
        row |= _times(samples) | {
            "gflops": 2e-9 * direct / min(samples),
            "seconds_eager": min(turns["eager"]),
            "seconds_channels_last": min(turns["channels_last"]),
            "ratio_to_eager": times_faster(turns["eager"], samples),
            "ratio_to_channels_last": times_faster(turns["channels_last"], samples),
        }
    return list(rows.values())


def _images(batch: int, shape: tuple[int, int, int], seed: int) -> torch.Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


def _error_on(layer: Layer, batch: int, transposed: bool, seed: int) -> float:
    """Eager's relative error on so many images."""
    x = _images(batch, layer.source(transposed), seed)
    truth = _library_call(layer, x.double(), layer.weight.double(), transposed)()
    return relative_error(_library_call(layer, x, layer.weight, transposed)(), truth)


def _library_call(layer: Layer, x: torch.Tensor, weight: torch.Tensor, transposed: bool) -> Callable[[], torch.Tensor]:
    """PyTorch's convolution, or what its autograd calls for the gradient of the input."""
    if not transposed:
        return lambda: F.conv2d(x, weight, stride=layer.stride, padding=layer.padding)
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    shaped = torch.empty(len(x), *layer.output(True), dtype=x.dtype).contiguous(memory_format=layout)
    geometry = ([layer.stride] * 2, [layer.padding] * 2, [1, 1], False, [0, 0], 1)
    wanted = [True, False, False]
    return lambda: torch.ops.aten.convolution_backward(x, shaped, weight, None, *geometry, wanted)[0]


def _kernel_call(layer: Layer, x: torch.Tensor, size: int, transposed: bool) -> Callable[[], torch.Tensor]:
    """The engine's kernel on channels-last `x`, as a program calls it: packed weights, its own output and scratch memory."""
    stride, spread = (1, layer.stride) if transposed else (layer.stride, 1)
    packed = kernels.pack_weights(layer.weight, size, transposed=transposed, stride=spread, padding=layer.padding)
    y = torch.empty(len(x), *layer.output(transposed)).contiguous(memory_format=torch.channels_last)
    pad = layer.kernel - 1 - layer.padding if transposed else layer.padding
    threads = torch.get_num_threads()
    conv = kernels.plain_conv(
        size, x.shape, y.shape, packed, kernel=layer.kernel, stride=stride, pad=pad, spread=spread, threads=threads
    )
    scratch = torch.empty(kernels.scratch_floats(conv, threads))
    conv.x, conv.y, conv.scratch = x.data_ptr(), y.data_ptr(), scratch.data_ptr()
    kernel, alive = operations.Operations([conv]), (x, packed, scratch)

    def call() -> torch.Tensor:
        kernel.run(threads)
        assert alive
        return y

    return call


def _sampler(call: Callable[[], torch.Tensor]) -> Callable[[], float]:
    """Seconds of one call, over as many calls as a sample takes; warms up."""
    call()
    calls = max(1, math.ceil(SAMPLE_SECONDS / max(timed(call, CPU)[0], 1e-7)))

    def several() -> None:
        for _ in range(calls):
            call()

    return lambda: timed(several, CPU)[0] / calls


def _times(samples: Sequence[float]) -> dict[str, float]:
    summary = Summary.of(samples)
    return {"seconds": min(samples), "seconds_median": summary.median, "spread": summary.spread}


# --- printing ---------------------------------------------------------------------------------------------------------


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of aligned columns; * marks the algorithm that the engine chooses."""
    header = "network, direction, times, shape, algorithm, best µs, GFLOP/s, of sgemm, x eager, x ch.last, error (eager)"
    table = [header.split(", ")]
    for row in rows:
        head = [row["network"], row["direction"], str(row["count"]), row["layer"], row["algorithm"] + "*" * row["chosen"]]
        errors = f"{row['relative_error']:.1e} ({row['relative_error_eager']:.1e})"
        if not row["within_contract"]:
            table.append([*head, "-", "-", "-", "-", "-", f"{errors} OVER ITS CONTRACT, no times"])
            continue
        share = "" if row["share_of_sgemm"] is None else f"{100 * row['share_of_sgemm']:.0f} %"
        ratios = [f"{row[key]:.2f}" for key in ("ratio_to_eager", "ratio_to_channels_last")]
        table.append([*head, f"{1e6 * row['seconds']:.1f}", f"{row['gflops']:.1f}", share, *ratios, errors])
    return tables.lines(table)


def _network_line(row: dict[str, Any]) -> str:
    head = f"{row['network']:16} {row['direction']:13} B={row['batch']}"
    errors = f"difference from eager {row['relative_difference']:.1e}"
    if row["relative_error"] is not None:
        errors = f"error {row['relative_error']:.1e} (eager {row['relative_error_eager']:.1e})"
    if not row["within_contract"]:
        return f"{head} OVER ITS CONTRACT, no times: {errors}"
    times = f"best {1e3 * row['seconds']:.4g} ms (median {1e3 * row['seconds_median']:.4g} ± {1e3 * row['spread']:.4g})"
    return f"{head} {times}  eager {1e3 * row['seconds_eager']:.4g} ms  {row['ratio_to_eager']:.2f}x eager  {errors}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--batch", type=positive, default=1, help="images at a time (default 1)")
    add_network_options(parser, images="random")
    add("--classifier", metavar="FILE", help="weights of the classifier (default: the shipped ones, or random)")
    add("--all", action="store_true", help="time every algorithm that can run a shape, not only the one chosen")
    add("--no-truth", action="store_true", help="compare whole networks with eager alone; float64 is slow for the paper's")
    parser.set_defaults(device="cpu")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
