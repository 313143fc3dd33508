"""A GPU's kernels and engine against their definitions on that GPU, and how fast they are there.

The checks are functions of a device. On a CPU the operators are their definitions, so that what is left to check is the checks.
Sound kernels are then timed, and their rates stated as shares of what the same card copies and multiplies.
"""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from coupfast.engine.cuda.calibration import FLOAT32_LIMIT, STRICT_FACTOR, TF32_LIMIT
from coupfast.engine.precision import strict_float32
from coupfast.engine.rates import copy_bandwidth, device_seconds, matmul_rate
from coupfast.environment import one_line
from coupfast.models.zoo import load_classifier, load_score
from coupfast.purify import Purifier
from coupfast_kernels.conv3x3 import conv3x3, conv3x3_ref, pack_weight, trying
from coupfast_kernels.group_norm import group_norm_silu, group_norm_silu_ref, group_norm_silu_vjp_ref
from coupfast_kernels.guided_step import guided_step, guided_step_ref
from coupfast_kernels.noise import SECOND_NOISE_STEP, seed_tensor, standard_normal_ref

#: Roundings that an element of GroupNorm and SiLU goes through besides its sums, the polynomials' counted in halves of an ulp:
#: h − mean, rsqrt (4), product, weight, bias, exp of |a| ≤ 4 (14), addition, division (4), product.
GROUP_NORM_ROUNDINGS = 28
#: The same again, the slope (6), and what is subtracted, multiplied, added and scaled around two means (14).
GROUP_NORM_VJP_ROUNDINGS = 48
#: A ReLU of a trained network that lies on its kink to within rounding may fall on either side: a percent of what the guidance
#: moves the images by, and of the gradient this much.
FLIPPED_RELU, FLIPPED_RELU_GRADIENT = 1e-2, 1e-3

#: What engine "cuda" can run without, one by one where it is wrong.
ENGINE_OPTIONS = ("graphs", "compile", "triton")

U = 2.0**-24  # one rounding
_SEED, _STEP, _STEPS, _SCALE = 2**63 + 5, 7, 3, 0.5**0.5
_LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
_REPEATS = 5

Row = dict[str, Any]


def check_device(device: torch.device) -> Row:
    """Everything here on one device. Most of the time goes into compiling, and more where the engine has to be taken apart.

    Returns:
        JSON-ready: `device`, `kernels` (rows of `check_kernels`), `engine` (of `check_engine`), `rates` (`measure_rates`), and
        `problems` (one line each).
    """
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernels, engine = list(check_kernels(device)), list(check_engine(device))
        rates = measure_rates(device, {row["kernel"] for row in kernels if row["status"] != "ok"})
    problems = [
        *(f"{row['kernel']} on {device}, {row['case']}: {row['status']}, {row['detail']}" for row in kernels if _bad(row)),
        *(
            f"engine {row['engine']} on {device}, {row['case']}: {row['status']}, {row['detail']}; {row['culprit']}"
            for row in engine
            if _bad(row)
        ),
        *([f"rates on {device}: {rates['problem']}"] if rates["problem"] else []),
    ]
    return {"device": str(device), "kernels": kernels, "engine": engine, "rates": rates, "problems": problems}


def text(report: Row) -> list[str]:
    """Lines for people of a report of `check_device`."""
    lines = []
    for name in dict.fromkeys(row["kernel"] for row in report["kernels"]):
        rows = [row for row in report["kernels"] if row["kernel"] == name]
        worst = max((row["error"] / row["bound"] for row in rows if row.get("bound")), default=0.0)
        line = f"  {name} on {report['device']}: {sum(row['status'] == 'ok' for row in rows)} of {len(rows)} cases agree"
        lines.append(line + (f"; largest error {worst:.2f} of its bound" if worst else ", bit for bit"))
    for row in report["engine"]:
        line = f"  engine {row['engine']} on {report['device']}, {row['case']}: {row['status']}, {row['detail']}"
        lines.append(line + (f"; {row['culprit']}" if row["culprit"] else ""))
    rates = report["rates"]
    if rates["copy_bytes_per_second"]:
        lines.append(
            f"  {report['device']} copies {rates['copy_bytes_per_second'] / 1e9:.0f} GB/s and multiplies float32 matrices at "
            f"{rates['matmul_flop_per_second'] / 1e12:.2f} TFLOP/s"
        )
    for row in rates["kernels"]:
        per_second, of = (row["bytes_per_second"] / 1e9, "GB/s") if row["bytes"] else (row["flop_per_second"] / 1e12, "TFLOP/s")
        share = f"{row['share']:.0%} of {'the copy' if row['bytes'] else 'the matrix product'}"
        lines.append(f"  {row['kernel']}: {row['seconds'] * 1e6:.1f} us, {per_second:.2f} {of}, {share}")
    return lines


def _bad(row: Row) -> bool:
    return row["status"] in ("mismatch", "failed")


# --- kernels ----------------------------------------------------------------------------------------------------------


def check_kernels(device: torch.device) -> Iterator[Row]:
    """Every kernel against its definition on the same device, on numbers drawn here.

    Yields:
        `kernel`, `case`, `status` ("ok", "mismatch" or "failed"), `error`, `bound`, `detail`. For `guided_step` the error
        counts elements with other bits, and the bound is 0; elsewhere it is relative to float64, in the Euclidean norm. A bound
        is STRICT_FACTOR times the definition's own error in float32, which has the same sums, and at least the roundings that
        are counted besides them; reduced precisions have limits of their own (`coupfast.engine.cuda.calibration`).
    """
    with torch.no_grad(), strict_float32(device.type):
        for shape in ((5, 3, 32, 32), (3, 3, 17, 19)):
            for name, layout in _LAYOUTS.items():
                for noisy in (True, False):
                    for columns in (4, 8):
                        case = f"{_by(shape)}, {name}, {columns} columns, {'with' if noisy else 'without'} noise"
                        yield _row("guided_step", case, _guided_step, device, shape, layout, noisy, columns)
        # One pass, several groups a program; a group too large for registers; odd maps and channels.
        for channels, size, groups in ((128, 16, 32), (64, 48, 2), (30, 7, 3)):
            for name, layout in _LAYOUTS.items():
                for vjp in (False, True):
                    case = f"{_by((2, channels, size, size))}, {groups} groups, {name}"
                    kernel = "group_norm_silu_vjp" if vjp else "group_norm_silu"
                    yield _row(kernel, case, _group_norm, device, (2, channels, size, size), groups, layout, vjp)
        # Of a network's shapes calibration compares the config that it chooses. Here two a shape are tried: all would take
        # minutes to compile.
        with trying(2):
            for precision in ("ieee", "tf32x3", "tf32"):
                # Border tiles in both directions; three channels in and out, as at the ends of a network.
                for shape, out_channels in (((2, 64, 16, 16), 96), ((3, 3, 9, 11), 20), ((2, 40, 8, 8), 3)):
                    for vjp in (False, True):
                        case = f"{_by(shape)} -> {out_channels}, {'vjp' if vjp else 'forward'}"
                        yield _row(f"conv3x3 {precision}", case, _conv3x3, device, shape, out_channels, precision, vjp)


def _row(kernel: str, case: str, check: Callable[..., tuple[float, float]], *arguments: Any) -> Row:
    row: Row = {"kernel": kernel, "case": case}
    try:
        error, bound = check(*arguments)
    except Exception as failure:  # whatever a kernel does wrong is what this report is for
        return row | {"status": "failed", "error": None, "bound": None, "detail": one_line(failure)}
    if not math.isfinite(error) or not math.isfinite(bound):
        return row | {"status": "failed", "error": None, "bound": None, "detail": "values that are not finite"}
    detail = f"error {error:.2e}, bound {bound:.2e}" if bound else f"{error:.0f} elements with other bits"
    return row | {"status": "ok" if error <= bound else "mismatch", "error": error, "bound": bound, "detail": detail}


def _guided_step(
    device: torch.device, shape: tuple[int, ...], layout: torch.memory_format, noisy: bool, columns: int
) -> tuple[float, float]:
    x, eps_hat, g, *more = (t.contiguous(memory_format=layout) for t in _normals(device, shape, 6))
    terms = dict(zip(("x_in", "x_before", "eps_before"), more, strict=True)) if columns == 8 else {}
    (table,) = _normals(device, (_STEP + 1, columns), 1)
    ids, draw = torch.arange(len(x), device=device) + 2**31, torch.arange(len(x), device=device)
    noise, second = (seed_tensor(_SEED, device), ids, draw) if noisy else None, noisy and columns == 8
    y, step = torch.full_like(x, math.nan), torch.tensor(_STEP, device=device)  # what is left out shows
    guided_step(x, eps_hat, g, table, step, noise=noise, second_noise=second, out=y, **terms)
    z, z2 = (
        standard_normal_ref(shape, seed=_SEED, ids=ids, draw=draw, step=word) if wanted else None
        for word, wanted in ((_STEP, noisy), (SECOND_NOISE_STEP + _STEP, second))
    )
    wanted = guided_step_ref(x, eps_hat, g, tuple(table[_STEP].tolist()), z, z2=z2, **terms)
    return float((y.view(torch.int32) != wanted.view(torch.int32)).sum()), 0.0


def _group_norm(
    device: torch.device, shape: tuple[int, ...], groups: int, layout: torch.memory_format, vjp: bool
) -> tuple[float, float]:
    x, residual, gy, gh = (t.contiguous(memory_format=layout) for t in _normals(device, shape, 4))
    scales, bias, image_bias = _normals(device, (shape[1],), 2) + _normals(device, shape[:2], 1)
    weight, bias = 1.0 + 0.3 * torch.tanh(scales), 0.3 * torch.tanh(bias)
    options: Any = dict(groups=groups, eps=1e-6, image_bias=image_bias, residual=residual, scale=_SCALE)
    _poison(x, 2)
    with torch.enable_grad():
        leaf = x.clone().requires_grad_(vjp)
        h, y = group_norm_silu(leaf, weight, bias, **options)
        if vjp:
            _poison(x, 1)
            (gx,) = torch.autograd.grad((h, y), leaf, (gh, gy))
    right_h, rounded_y = group_norm_silu_ref(x, weight, bias, **options)
    if not torch.equal(h, right_h):
        raise ValueError(f"h has other bits than its definition in {int((h != right_h).sum())} of {h.numel()} elements")
    # The same h for both, which float32 has rounded once and for all.
    exact: Any = dict(groups=groups, eps=1e-6)
    if not vjp:
        _, truth = group_norm_silu_ref(right_h.double(), weight.double(), bias.double(), **exact)
        return _against(y, rounded_y, truth, GROUP_NORM_ROUNDINGS * U)
    exact |= dict(scale=_SCALE)
    rounded = group_norm_silu_vjp_ref(right_h, gy, gh, weight, bias, **exact)
    truth = group_norm_silu_vjp_ref(*(t.double() for t in (right_h, gy, gh, weight, bias)), **exact)
    return _against(gx, rounded, truth, GROUP_NORM_VJP_ROUNDINGS * U)


def _conv3x3(
    device: torch.device, shape: tuple[int, ...], out_channels: int, precision: str, vjp: bool
) -> tuple[float, float]:
    (x,), (weight,) = _normals(device, shape, 1), _normals(device, (out_channels, shape[1], 3, 3), 1)
    x, weight = x.contiguous(memory_format=torch.channels_last), weight / math.sqrt(9 * shape[1])
    packed, packed_vjp = pack_weight(weight), pack_weight(weight.flip(2, 3).transpose(0, 1))
    y_shape = (shape[0], out_channels, *shape[2:])
    residual, v = (t.contiguous(memory_format=torch.channels_last) for t in _normals(device, y_shape, 2))
    (bias,), (image_bias,) = _normals(device, (out_channels,), 1), _normals(device, y_shape[:2], 1)
    options: Any = dict(image_bias=image_bias, residual=residual, scale=_SCALE)
    _poison(v, 1)
    with torch.enable_grad():
        leaf = x.clone().requires_grad_(vjp)
        found = conv3x3(leaf, packed, packed_vjp, bias, precision=precision, **options)
        if vjp:
            _poison(x, 1)
            (found,) = torch.autograd.grad(found, leaf, v)

    def definition(dtype: torch.dtype) -> torch.Tensor:
        if vjp:
            return F.conv_transpose2d(v.to(dtype), weight.to(dtype), padding=1) * _SCALE
        more: Any = {name: t.to(dtype) if isinstance(t, torch.Tensor) else t for name, t in options.items()}
        return conv3x3_ref(x.to(dtype), weight.to(dtype), bias.to(dtype), **more)

    # Chains of K additions of random signs round by about sqrt(K) / 2 in all; and there are five roundings behind them.
    terms = 9 * (out_channels if vjp else shape[1])
    error, bound = _against(found, definition(torch.float32), definition(torch.float64), (math.sqrt(terms) + 5) * U)
    return error, {"ieee": bound, "tf32x3": FLOAT32_LIMIT, "tf32": TF32_LIMIT}[precision]


def _against(
    found: torch.Tensor, rounded: torch.Tensor, truth: torch.Tensor, least: float
) -> tuple[float, float]:
    if found.shape != truth.shape or found.dtype != torch.float32:
        raise ValueError(f"gives {found.dtype} of shape {tuple(found.shape)}, not float32 of {tuple(truth.shape)}")
    return _relative_error(found, truth), max(STRICT_FACTOR * _relative_error(rounded, truth), least)


def _normals(device: torch.device, shape: tuple[int, ...], count: int) -> list[torch.Tensor]:
    """Float32, the same on every device."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    return [torch.randn(shape, generator=generator).to(device) for _ in range(count)]


def _poison(like: torch.Tensor, count: int) -> None:
    """NaN where the allocator is about to put results like this one: what a kernel leaves out must not look right."""
    pieces = [torch.full_like(like, math.nan) for _ in range(count)]
    del pieces


# --- the engine ---------------------------------------------------------------------------------------------------------


def check_engine(
    device: torch.device, *, engine: str = "cuda", build: Callable[..., Any] | None = None
) -> Iterator[Row]:
    """The engine on the shipped networks, forwards and backwards, against eager in float64.

    Args:
        engine: Its name.
        build: (score, classifier, method=…, engine=…, num_steps=…, engine_options=…) → purifier; None takes `Purifier`.

    Yields:
        `engine`, `case`, `status` ("ok", "mismatch", "failed", "refused"), errors and bounds (relative, Euclidean norm;
        STRICT_FACTOR times eager's own in float32, and what flipped ReLUs may add), `detail`; and where it is wrong, `trials`:
        the same with its options off one by one, and `culprit`, which says in words what they tell.
    """
    construct: Callable[..., Any] = build or Purifier
    score, classifier = (load("cifar10-tiny", device=device) for load in (load_score, load_classifier))
    size = int(getattr(score, "image_size", 32))
    x, other, direction = _normals(device, (2, 3, size, size), 3)
    x, other, direction = torch.sigmoid(x), torch.sigmoid(other), direction.double()
    unguided: torch.Tensor | None = None
    for method in ("reverse-sde", "coup"):
        row: Row = {"engine": engine, "case": f"{method}, shipped networks", "trials": [], "culprit": ""}

        def run(name: str, x: torch.Tensor, options: dict[str, bool], method: str = method) -> list[torch.Tensor]:
            networks = [copy.deepcopy(network).to(x.dtype) for network in (score, classifier)]
            more = {"engine_options": options} if options else {}
            try:
                purifier = construct(*networks, method=method, engine=name, num_steps=_STEPS, **more)
                purifier.plan(len(x), image_shape=tuple(x.shape[1:]))
            except torch.AcceleratorError:  # a device that fails has refused nothing
                raise
            except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
                raise _Refused(one_line(error)) from error
            found = _both(purifier, x, direction)
            if name != "eager":
                # A program that is run again may write where it wrote before: the first results must survive, and be repeated.
                _both(purifier, other, direction)
                found = [result.clone() for result in found] + _both(purifier, x, direction)
            return found

        exact, rounded = run("eager", x.double(), {}), run("eager", x, {})
        allowances = [0.0, 0.0]
        if unguided is not None:
            allowances = [FLIPPED_RELU * _relative_error(unguided, exact[0]), FLIPPED_RELU_GRADIENT]
        unguided = exact[0]
        eps = torch.finfo(torch.float32).eps
        bounds = [
            STRICT_FACTOR * max(_relative_error(a, b), eps) + allowance
            for a, b, allowance in zip(rounded, exact, allowances, strict=True)
        ]

        def trial(options: dict[str, bool], run: Any = run, exact: Any = exact, bounds: Any = bounds) -> Row:
            return {"options": options} | _judge(lambda: run(engine, x, options), exact, bounds)

        row |= trial({})
        if _bad(row):
            row["trials"] = [trial({name: False}) for name in ENGINE_OPTIONS] + [trial(dict.fromkeys(ENGINE_OPTIONS, False))]
            row["culprit"] = _culprit(row["trials"])
        yield row


class _Refused(Exception):
    """The engine says beforehand that it does not run this."""


def _both(purifier: Any, x: torch.Tensor, direction: torch.Tensor) -> list[torch.Tensor]:
    image = x.clone().requires_grad_()
    with torch.enable_grad():
        purified = purifier(image, seed=_SEED)
        (gradient,) = torch.autograd.grad(purified, image, direction.to(x.dtype))
    return [purified.detach(), gradient]


def _judge(run: Callable[[], list[torch.Tensor]], exact: list[torch.Tensor], bounds: list[float]) -> Row:
    try:
        found = run()
    except _Refused as error:
        return {"status": "refused", "detail": str(error)}
    except Exception as error:  # whatever an engine does wrong is what this report is for
        return {"status": "failed", "detail": one_line(error)}
    errors = [max(_relative_error(each, right) for each in found[i::2]) for i, right in enumerate(exact)]
    if not all(map(math.isfinite, errors + bounds)):
        return {"status": "failed", "detail": "values that are not finite"}
    agrees = all(error <= bound for error, bound in zip(errors, bounds, strict=True))
    return {
        "status": "ok" if agrees else "mismatch",
        "forward_error": errors[0],
        "forward_bound": bounds[0],
        "gradient_error": errors[1],
        "gradient_bound": bounds[1],
        "detail": f"errors {errors[0]:.2e} forward, {errors[1]:.2e} gradient; bounds {bounds[0]:.2e}, {bounds[1]:.2e}",
    }


def _culprit(trials: list[Row]) -> str:
    *single, none = trials
    alone = [name for name, trial in zip(ENGINE_OPTIONS, single, strict=True) if trial["status"] == "ok"]
    if alone:
        return f"it agrees without {' or without '.join(repr(name) for name in alone)}: that part is wrong here"
    if none["status"] == "ok":
        return f"it agrees only without all of {', '.join(ENGINE_OPTIONS)}: more than one of them is wrong here"
    return f"it is wrong without {', '.join(ENGINE_OPTIONS)}, too: look at the engine's graph, or at PyTorch ({none['detail']})"


# --- rates ----------------------------------------------------------------------------------------------------------------


def measure_rates(device: torch.device, unsound: set[str], *, images: int = 64, megabytes: int = 256) -> Row:
    """What the card copies and multiplies, and the kernels' share of it, in one run.

    Args:
        unsound: Kernels that get no time, since they compute something else.
        images: Of a batch of the paper's networks (the guided step takes 64 times as many).
        megabytes: Of the copy.

    Returns:
        `copy_bytes_per_second`, `matmul_flop_per_second`, `problem` (None, or what stopped the measurement) and `kernels`: rows
        with `kernel`, `shape`, `seconds` (median), `bytes` that have to move and `bytes_per_second`, or `flop` and
        `flop_per_second`, and `share` of the card's rate.
    """
    found: Row = {"copy_bytes_per_second": None, "matmul_flop_per_second": None, "kernels": [], "problem": None}
    try:
        with torch.no_grad(), strict_float32(device.type):
            found["copy_bytes_per_second"] = bandwidth = copy_bandwidth(device, megabytes=megabytes)
            found["matmul_flop_per_second"] = product = matmul_rate(device)
            for name, of_shape, call, amount, counts_bytes in _timed(device, images):
                if name in unsound:
                    continue
                call()
                seconds = statistics.median(device_seconds(call, device) for _ in range(_REPEATS))
                row = {"kernel": name, "shape": of_shape, "seconds": seconds, "bytes": None, "flop": None}
                row |= dict.fromkeys(("bytes_per_second", "flop_per_second"))
                kind, rate = ("bytes", bandwidth) if counts_bytes else ("flop", product)
                row |= {kind: amount, f"{kind}_per_second": amount / seconds, "share": amount / seconds / rate}
                found["kernels"].append(row)
    except Exception as error:  # a card without memory left, or one that a kernel has stopped
        found["problem"] = one_line(error)
    return found


def _timed(device: torch.device, images: int) -> Iterator[tuple[str, str, Callable[[], object], int, bool]]:
    """Name, shape, call, and bytes that have to move or FLOP of each kernel at a shape that fills a GPU."""
    shape = (64 * images, 3, 32, 32)
    x, eps_hat, g = _normals(device, shape, 3)
    table, step = torch.ones(1, 4, device=device), torch.tensor(0, device=device)
    ids = torch.arange(len(x), device=device)
    noise = (seed_tensor(_SEED, device), ids, ids)
    y = torch.empty_like(x)
    yield "guided_step", _by(shape), lambda: guided_step(x, eps_hat, g, table, step, noise=noise, out=y), 4 * x.nbytes, True

    shape = (images, 256, 16, 16)
    h, gy = (t.contiguous(memory_format=torch.channels_last) for t in _normals(device, shape, 2))
    weight, bias = torch.ones(256, device=device), torch.zeros(256, device=device)
    norm: Any = dict(groups=32, eps=1e-6)
    yield "group_norm_silu", _by(shape), lambda: group_norm_silu(h, weight, bias, **norm), 2 * h.nbytes, True
    vjp = lambda: torch.ops.coupfast.group_norm_silu_vjp(h, gy, None, weight, bias, 32, 1e-6, 1.0, True)  # noqa: E731
    yield "group_norm_silu_vjp", _by(shape), vjp, 3 * h.nbytes, True

    packed = pack_weight(*_normals(device, (256, 256, 3, 3), 1))
    for precision in ("ieee", "tf32x3", "tf32"):
        convolve = lambda precision=precision: conv3x3(h, packed, None, precision=precision)  # noqa: E731
        yield f"conv3x3 {precision}", f"{_by(shape)} -> 256", convolve, 2 * 9 * 256 * h.numel(), False


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    error = float((value.double() - exact).norm() / exact.norm())
    return math.inf if math.isnan(error) else error
