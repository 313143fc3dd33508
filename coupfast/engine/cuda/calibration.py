"""Which 3×3 convolution to run: on this GPU, for this shape, the fastest of those that are right.

Nobody can know this without measuring: it depends on the GPU, on cuDNN's choices and on the shape. So each shape is tried once
on the machine that uses it. Every candidate computes random data, is compared with float64, and is timed in turns with the
others; the choice is kept in the user's cache. A candidate that is wrong, not finite, gives other bits at a second call or
raises is named in a warning and never used. Where the fastest takes less time than the host needs to launch it, all are timed
again within a graph.

Of a convolution that could norm what it reads there is a second choice: whether it does, or the norm's kernel before it.

Later runs read their choices from the file and time nothing. That is also what keeps their bits: two timings of equally fast
candidates may end either way, and different candidates round differently.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from coupfast.cache import cache_directory
from coupfast.engine.cuda.capture import Backend, CudaBackend, same_bits, seconds_in_graph
from coupfast.engine.cuda.compiled import Compiler
from coupfast.engine.cuda.flat import flatten
from coupfast.engine.cuda.substitution import CONTIGUOUS, INSIDE, LIBRARY
from coupfast.engine.precision import PRECISIONS, PRODUCTS, Precision, float32_precision
from coupfast.engine.rates import device_seconds
from coupfast.environment import machine_key, one_line
from coupfast_kernels.convolution.definition import FLOAT32_LIMIT, TF32_LIMIT
from coupfast_kernels.convolution.gpu import ALGORITHMS, conv3x3
from coupfast_kernels.convolution.gpu_normed import conv3x3_normed
from coupfast_kernels.convolution.gpu_tuning import tried
from coupfast_kernels.files import write_whole
from coupfast_kernels.group_norm import group_norm_silu
from coupfast_kernels.group_norm.gpu import group_norm_statistics
from coupfast_kernels.locks import locked

logger = logging.getLogger(__name__)


#: strict: the error may be this many times that of the library's own convolution in IEEE float32.
STRICT_FACTOR = 4.0
#: A library whose error is below half a unit in the last place, the rounding of the result alone, is counted as this.
LEAST_ERROR = 2.0**-24

REPEATS = 9  # timings of a candidate, of which the median counts
LAUNCH_SECONDS = 20e-6  # what the host may need to launch a call: times below are not of the device alone
FORMAT = 3  # of the file
PATIENCE_SECONDS = 30.0  # wait for another process that writes the file so long, then write without it

APART = "apart"  # the norm, and then the convolution
#: What remains where all else is refused.
STANDING = {LIBRARY: "PyTorch's own convolution", APART: "A norm before the convolution"}
EPS = 1e-6  # of the norms that are tried, which changes no time

Candidate = Callable[..., torch.Tensor]  # (x, weight, bias) → y; behind a norm its weight and bias are given, too
Timer = Callable[[Callable[[], object]], float]


@dataclasses.dataclass(frozen=True)
class ConvolutionShape:
    """A 3×3 convolution with stride 1 and padding 1. Its transpose is one with the channels exchanged.

    Attributes:
        groups: Of the GroupNorm that is in front of it, with SiLU behind that; 0 where there is none.

    Raises:
        ValueError: if a number is no int of at least 1 (`groups`: 0), or the groups do not divide the channels.
    """

    batch: int
    in_channels: int
    out_channels: int
    height: int
    width: int
    groups: int = 0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            least = 0 if name == "groups" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` of a convolution is an int of at least {least}, got {value!r}")
        if self.groups and self.in_channels % self.groups:
            raise ValueError(f"`groups` of a convolution's norm divide its channels, got {self.groups} of {self.in_channels}")

    def __str__(self) -> str:
        norm = f", normed in {self.groups} groups" if self.groups else ""
        return f"{self.batch}x{self.in_channels}x{self.height}x{self.width} -> {self.out_channels}{norm}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was found for a shape.

    Attributes:
        candidate: The one to use.
        seconds: Median time of a call, for each that is accurate enough.
        errors: Largest error of an image against float64, relative in the Euclidean norm, for each that gave finite numbers.
        refused: Why, for each that may not be used.
    """

    candidate: str
    seconds: dict[str, float]
    errors: dict[str, float]
    refused: dict[str, str]


class Calibration:
    """Choices of one device and precision.

    Args:
        device: Where the convolutions run.
        precision: "strict", "fast", "3xtf32" or "tf32": which candidates there are, and how large their error may be.
        folder: Where choices are kept; None takes `calibration` in the user's cache (`coupfast.cache`).
        compiler: What compiles the pieces that the library's convolutions are in; None where nothing does.
        candidates: By name, functions (x, weight, bias) → y in place of the package's own; "library" must be among them.
        timer: Seconds that a call takes. None takes CUDA events, on a CPU the wall clock.
        backend: What captures calls that are shorter than a launch. None takes CUDA graphs; on a CPU nothing is captured.

    Raises:
        ValueError: for an unknown precision, or candidates without "library".

    Threads may share one. Processes may calibrate at once: the choice that is written first is everyone's.
    """

    def __init__(
        self,
        device: torch.device | str,
        *,
        precision: Precision = "strict",
        folder: str | Path | None = None,
        compiler: Compiler | None = None,
        candidates: Mapping[str, Candidate] | None = None,
        timer: Timer | None = None,
        backend: Backend | None = None,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"`precision` is one of {', '.join(PRECISIONS)}, got {precision!r}")
        self.device, self.precision = torch.device(device), precision
        self.candidates = dict(_candidates(self.device, precision, compiler) if candidates is None else candidates)
        if LIBRARY not in self.candidates:
            raise ValueError(f"`candidates` must have {LIBRARY!r}, which is what remains; got {', '.join(self.candidates)}")
        self.timer = timer or functools.partial(device_seconds, device=self.device)
        self.backend = backend or (CudaBackend(self.device) if self.device.type == "cuda" else None)
        self.folder = Path(folder) if folder is not None else cache_directory("calibration")
        self.key = machine_key(self.device) | {"precision": precision, "candidates": sorted(self.candidates)}
        if (configs := tried()) is not None:  # what is the fastest of some is not for those who have all
            self.key |= {"configs": configs}
        digest = hashlib.sha256(json.dumps([FORMAT, self.key], sort_keys=True).encode()).hexdigest()
        self.file = self.folder / f"{digest[:32]}.json"
        self._choices: dict[ConvolutionShape, Choice] = {}
        self._said: set[str] = set()
        self._one_thread = threading.RLock()

    def choose(self, shape: ConvolutionShape) -> Choice:
        """The choice for a shape: remembered, else from the file, else measured now (seconds, where Triton has to compile).

        Raises:
            RuntimeError: if the library's own convolution fails, or if a CUDA graph is being captured and the choice is not yet
                in memory: choose before capturing.
        """
        with self._one_thread:
            if shape not in self._choices:
                if _capturing(self.device):
                    raise RuntimeError(
                        f"the convolution {shape} has not been calibrated, and a CUDA graph is being captured; call "
                        "`choose` for every shape before the capture"
                    )
                kept = self._read()
                if shape in kept:
                    self._choices[shape] = kept[shape]
                else:
                    self._choices[shape] = self._measure(shape)
            return self._choices[shape]

    # --- measuring ------------------------------------------------------------------------------------------------------

    def _measure(self, shape: ConvolutionShape) -> Choice:
        candidates, standing, definition = self.candidates, LIBRARY, _library
        if shape.groups:
            candidates, standing, definition = self._around(shape), APART, functools.partial(_library_normed, shape.groups)
        errors: dict[str, float] = {}
        refused: dict[str, str] = {}
        passing = False  # a candidate that failed for a reason that may be gone tomorrow

        def timed(timer: Timer) -> dict[str, float]:
            """Median seconds of those that are not refused, in turns."""
            nonlocal passing
            samples: dict[str, list[float]] = {}
            for repeat in range(REPEATS):
                names = [name for name in calls if name not in refused]
                turn = repeat % max(len(names), 1)
                for name in names[turn:] + names[:turn]:
                    try:
                        samples.setdefault(name, []).append(_finite_seconds(timer(calls[name])))
                    except Exception as error:
                        refused[name] = one_line(error)
                        passing |= isinstance(error, torch.cuda.OutOfMemoryError)
            return {name: _median(samples[name]) for name in calls if name not in refused}

        # The outer settings must not decide what is compared, and no graph is wanted of these calls.
        with float32_precision(self.device.type, self.precision), torch.no_grad():
            arguments = _example(shape, self.device)
            truth = definition(*(tensor.double() for tensor in arguments))
            limit = self._limit(_error(definition(*arguments), truth))
            calls = {
                name: functools.partial(function, *arguments)
                for name, function in candidates.items()
                if not isinstance(function, _Triton) or function.suits(shape)
            }
            for name, call in calls.items():
                try:
                    _poison(truth)
                    first = call()
                    errors[name] = found = _error(first, truth)
                    if not found <= limit and name != APART:  # whose parts have been compared, each for itself
                        refused[name] = f"its error against float64 is {found:.2e}, over {limit:.2e}"
                    elif not same_bits(first, call()):
                        if name != standing:
                            refused[name] = "it gives other bits at a second call"
                        else:  # which is what remains
                            logger.warning("%s %s gives other bits at every call here", STANDING[name], shape)
                except Exception as error:  # whatever a kernel does wrong on a GPU nobody has tried it on
                    refused[name] = one_line(error)
                    passing |= isinstance(error, torch.cuda.OutOfMemoryError)
            del truth
            seconds = timed(self.timer)
            if self.backend is not None and min(seconds.values(), default=math.inf) < LAUNCH_SECONDS:
                sound = dict(refused)
                in_graph = timed(functools.partial(seconds_in_graph, backend=self.backend, clock=self.timer))
                if standing in refused:  # a fault of capturing, not of convolutions: an engine without graphs can do without
                    logger.warning(
                        "convolution %s on %s cannot be captured (%s): times are of single calls, launches with them",
                        shape,
                        self.key["device"],
                        refused[standing],
                    )
                    refused = sound
                else:
                    seconds = in_graph
        for name, reason in refused.items():
            if name != standing:
                logger.warning("convolution %s on %s: %r is not used: %s", shape, self.key["device"], name, reason)
        if standing in refused:
            others = "".join(f"; {name}: {reason}" for name, reason in refused.items() if name != standing)
            raise RuntimeError(
                f"{STANDING[standing]} {shape} fails on {self.key['device']}: {refused[standing]}{others}. Nothing can be "
                "relied on here: check the installation with `coupfast doctor`, and that the GPU has memory left"
            )
        choice = Choice(min(seconds, key=lambda name: seconds[name]), seconds, errors, refused)
        logger.info("convolution %s on %s: %s", shape, self.key["device"], choice)
        return choice if passing else self._keep(shape, choice)

    def _around(self, shape: ConvolutionShape) -> dict[str, Candidate]:
        """The ways to norm in front of the convolution that its own shape takes."""
        alone = self.candidates[self.choose(dataclasses.replace(shape, groups=0)).candidate]
        found: dict[str, Candidate] = {APART: _Apart(shape.groups, alone)}
        if isinstance(alone, _Triton) and ALGORITHMS[alone.algorithm].way == "winograd":
            found[INSIDE] = _Inside(shape.groups, alone)
        return found

    def _limit(self, library_error: float) -> float:
        if self.precision == "tf32":
            return TF32_LIMIT
        if self.precision in ("fast", "3xtf32"):
            return FLOAT32_LIMIT
        return STRICT_FACTOR * max(library_error, LEAST_ERROR)

    # --- the file -------------------------------------------------------------------------------------------------------

    def _read(self) -> dict[ConvolutionShape, Choice]:
        """The file's choices; none if there is no file, or one that cannot be used, which is said once."""
        try:
            document = json.loads(self.file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except OSError as error:
            self._say("choices of convolutions cannot be read from %s (%s); they are made anew", self.file, error)
            return {}
        except ValueError as error:
            self._say("%s is damaged (%s); its choices of convolutions are made anew", self.file, error)
            return {}
        try:
            if document["format"] != FORMAT or document["key"] != self.key:
                raise ValueError("it is of another machine or version than its name says")
            return {_shape_of(row): self._choice_of(row) for row in document["choices"]}
        except (KeyError, TypeError, ValueError) as error:
            self._say("%s is damaged (%s); its choices of convolutions are made anew", self.file, one_line(error))
            return {}

    def _choice_of(self, row: dict[str, Any]) -> Choice:
        found = Choice(*(row[field.name] for field in dataclasses.fields(Choice)))
        known = {APART, INSIDE} if row["groups"] else set(self.candidates)
        if found.candidate not in found.seconds or found.candidate in found.refused:
            raise ValueError(f"it chooses {found.candidate!r}, which it has not timed or has refused")
        for numbers in (found.seconds, found.errors):
            if not all(isinstance(value, float) and math.isfinite(value) for value in numbers.values()):
                raise ValueError(f"it has {numbers} for numbers")
        if not {*found.seconds, *found.errors, *found.refused} <= known:
            raise ValueError(f"it names candidates that are not among {', '.join(sorted(known))}")
        return found

    def _keep(self, shape: ConvolutionShape, choice: Choice) -> Choice:
        """Add a choice to the file; returns the file's own, where another process has written one meanwhile."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Where there are no locks, writers may lose rows.
            with locked(self.file.with_suffix(".lock"), work="writes choices of convolutions", patience=PATIENCE_SECONDS):
                choices = self._read()
                if shape in choices:
                    return choices[shape]
                choices[shape] = choice
                rows = [dataclasses.asdict(key) | dataclasses.asdict(value) for key, value in choices.items()]
                document = {"format": FORMAT, "key": self.key, "choices": rows}
                write_whole(self.file, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
        except OSError as error:
            self._say(
                "choices of convolutions cannot be kept in %s (%s); this process keeps them in memory, and every other one "
                "measures again; set XDG_CACHE_HOME to a folder that can be written",
                self.folder,
                error,
            )
        return choice

    def _say(self, message: str, *values: object) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.warning(message, *values)


def _candidates(device: torch.device, precision: Precision, compiler: Compiler | None) -> dict[str, Candidate]:
    found: dict[str, Candidate] = {LIBRARY: _library, CONTIGUOUS: _Contiguous()}
    if compiler is not None:
        found["compiled"] = _Compiled(compiler)
    if device.type == "cuda":
        for name, algorithm in ALGORITHMS.items():
            if algorithm.products in ("ieee", PRODUCTS[precision]):
                found[f"triton-{name}"] = _Triton(name)
    return found


def _library(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, weight, bias, padding=1)


def _library_normed(
    groups: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, norm_weight: torch.Tensor, norm_bias: torch.Tensor
) -> torch.Tensor:
    return _library(F.silu(F.group_norm(x, groups, norm_weight, norm_bias, EPS)), weight, bias)


class _Contiguous:
    """The library's convolution on contiguous maps, which some of cuDNN's algorithms exist for alone, with the copies from
    channels last and back that a piece then has."""

    def __init__(self) -> None:
        self._weight: tuple[torch.Tensor, torch.Tensor] | None = None  # the last one, and as a piece has it

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        if self._weight is None or self._weight[0] is not weight:
            self._weight = weight, weight.contiguous()
        return _library(x.contiguous(), self._weight[1], bias).contiguous(memory_format=torch.channels_last)


class _Compiled:
    """The library's convolution as a compiled piece has it: what is added behind it is fused, the format of memory planned."""

    def __init__(self, compiler: Compiler) -> None:
        self.compiler = compiler
        self._made: tuple[torch.Tensor, Callable[..., Any]] | None = None  # for the last weight

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        if self._made is None or self._made[0] is not weight:
            graph = flatten(lambda *given: (_library(*given),), (x,), (weight, bias))
            self._made = weight, self.compiler(graph.module, graph.example_inputs())
        return self._made[1](x, weight, bias)[0]


class _Triton:
    """`coupfast_kernels`' `conv3x3` by one of its algorithms."""

    def __init__(self, algorithm: str) -> None:
        self.algorithm = algorithm
        self._packed: tuple[torch.Tensor, torch.Tensor] | None = None  # of the last weight: an engine packs once, too

    def suits(self, shape: ConvolutionShape) -> bool:
        """Whether to try it."""
        return ALGORITHMS[self.algorithm].suits(
            shape.batch, shape.in_channels, shape.out_channels, shape.height, shape.width
        )

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return conv3x3(x, self.packed(weight), None, bias, algorithm=self.algorithm)

    def packed(self, weight: torch.Tensor) -> torch.Tensor:
        if self._packed is None or self._packed[0] is not weight:
            self._packed = (weight, ALGORITHMS[self.algorithm].pack(weight))
        return self._packed[1]


@dataclasses.dataclass
class _Apart:
    """The norm's kernel, and then the convolution that was chosen."""

    groups: int
    convolution: Candidate

    def __call__(self, x, weight, bias, norm_weight, norm_bias) -> torch.Tensor:
        return self.convolution(group_norm_silu(x, norm_weight, norm_bias, groups=self.groups, eps=EPS)[1], weight, bias)


@dataclasses.dataclass
class _Inside:
    """Statistics, and then the same convolution, which norms what it reads."""

    groups: int
    convolution: _Triton

    def __call__(self, x, weight, bias, norm_weight, norm_bias) -> torch.Tensor:
        _, statistics = group_norm_statistics(x, groups=self.groups, eps=EPS)
        packed, algorithm = self.convolution.packed(weight), self.convolution.algorithm
        return conv3x3_normed(x, statistics, norm_weight, norm_bias, packed, bias, algorithm=algorithm)


def _example(shape: ConvolutionShape, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Normal images, channels last, and weights that keep the result's size; the same ones at every call on a device.

    Behind a norm its weight and bias, too, and images with a mean.
    """
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape.batch, shape.in_channels, shape.height, shape.width, generator=generator, device=device)
    weight = torch.randn(shape.out_channels, shape.in_channels, 3, 3, generator=generator, device=device)
    weight /= math.sqrt(9 * shape.in_channels)
    bias = 0.1 * torch.randn(shape.out_channels, generator=generator, device=device)
    example = (x.contiguous(memory_format=torch.channels_last), weight.contiguous(memory_format=torch.channels_last), bias)
    if not shape.groups:
        return example
    spread, shift = torch.randn(2, shape.in_channels, generator=generator, device=device)
    return (example[0] + 0.5, *example[1:], 1.0 + 0.3 * torch.tanh(spread), 0.3 * torch.tanh(shift))


def _poison(like: torch.Tensor) -> None:
    """NaN where the allocator is about to put the next float32 result: what a kernel leaves out must not look right."""
    torch.full(like.shape, float("nan"), device=like.device)


def _error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest relative error of an image in the Euclidean norm.

    Raises:
        ValueError: if it is another tensor than was asked for, or has values that are not finite.
    """
    if found.shape != truth.shape or found.dtype != torch.float32 or found.device != truth.device:
        raise ValueError(
            f"it gives {found.dtype} of shape {tuple(found.shape)} on {found.device}, not float32 of {tuple(truth.shape)} on "
            f"{truth.device}"
        )
    difference, size = (found.double() - truth).flatten(1).norm(dim=1), truth.flatten(1).norm(dim=1)
    error = float((difference / size).max())
    if not math.isfinite(error):
        missing = int((~found.isfinite()).sum())
        raise ValueError(f"it gives {missing} of {found.numel()} values that are not finite")
    return error


def _finite_seconds(seconds: float) -> float:
    if not math.isfinite(seconds) or seconds <= 0.0:
        raise ValueError(f"its time is {seconds} s")
    return float(seconds)


def _median(samples: list[float]) -> float:
    return sorted(samples)[len(samples) // 2]


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _shape_of(row: dict[str, Any]) -> ConvolutionShape:
    return ConvolutionShape(*(row[field.name] for field in dataclasses.fields(ConvolutionShape)))
