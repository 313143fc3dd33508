"""Engine "cuda" on the shipped networks and a GPU, against eager in float64 on the same GPU; and which part of it is wrong.

The checks are functions of a device, so that on a CPU they can be checked themselves.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from coupfast.doctor.engines import there_and_back, verdict
from coupfast.doctor.kernels import Row, is_bad, measure_rates
from coupfast.environment import one_line
from coupfast.methods import METHODS
from coupfast.models.zoo import load_classifier, load_score
from coupfast.purify import Purifier
from coupfast_kernels.convolution.gpu_tuning import trying
from coupfast_kernels.inputs import normals
from coupfast_kernels.parity import FLOAT32_FACTOR, relative_error

#: A ReLU of a trained network that lies on its kink to within rounding may fall on either side: a percent of what the guidance
#: moves the images by, and of the gradient this much.
FLIPPED_RELU, FLIPPED_RELU_GRADIENT = 1e-2, 1e-3

#: What engine "cuda" can run without, one by one where it is wrong.
ENGINE_OPTIONS = ("graphs", "compile", "triton", "beside")

_SEED, _STEPS = 2**63 + 5, 3

#: Of a quick look: cases of a kernel (the engine's gradient takes the transposes), and configs of a convolution that the engine
#: tries; cases have their own.
QUICK_CASES, QUICK_CONFIGS = 1, 1


def check_gpu(device: torch.device, unsound: set[str], *, full: bool = True) -> Row:
    """What there is to check of a GPU beside its kernels.

    Most of the time goes into compiling, and more where the engine has to be taken apart.

    Args:
        unsound: Names of kernels that are wrong there, which get no time.
        full: Also with PyTorch's compiler and every config of a convolution, and kernels' rates; otherwise the guided method
            alone, whose pieces are the others', too.

    Returns:
        JSON-ready: `device`, `engine` (rows of `check_engine`), `rates` (`measure_rates`), `problems` (one line each).
    """
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if full:
            engine = list(check_engine(device))
        else:
            with trying(QUICK_CONFIGS):
                engine = list(check_engine(device, options={"compile": False}, methods=("coup",)))
        rates = measure_rates(device, unsound, kernels=None if full else ())
    problems = [
        f"engine {row['engine']} on {device}, {row['case']}: {row['status']}, {row['detail']}; {row['culprit']}"
        for row in engine
        if is_bad(row)
    ]
    if rates["problem"]:
        problems.append(f"rates on {device}: {rates['problem']}")
    return {"device": str(device), "engine": engine, "rates": rates, "problems": problems}


def check_engine(
    device: torch.device,
    *,
    engine: str = "cuda",
    options: Mapping[str, bool] | None = None,
    methods: Sequence[str] = ("reverse-sde", "coup"),
    take_apart: bool = True,
    build: Callable[..., Any] | None = None,
) -> Iterator[Row]:
    """The engine on the shipped networks, forwards and backwards, against eager in float64.

    Args:
        engine: Its name.
        options: Parts that are on or off; None leaves all as they are.
        methods: Each gives a row.
        take_apart: Whether to try what is wrong again with its parts off one by one.
        build: (score, classifier, method=…, engine=…, num_steps=…, engine_options=…) → purifier; None takes `Purifier`.

    Yields:
        `engine`, `case`, `status` ("ok", "mismatch", "failed", "refused"), errors and bounds (relative, Euclidean norm;
        FLOAT32_FACTOR times eager's own in float32, and what flipped ReLUs may add), `detail`; and where it is wrong, `trials`:
        the same with its options off one by one, and `culprit`, which says in words what they tell.
    """
    construct: Callable[..., Any] = build or Purifier
    score, classifier = (load("cifar10-tiny", device=device) for load in (load_score, load_classifier))
    size = int(getattr(score, "image_size", 32))
    x, other, direction = normals(device, (2, 3, size, size), 3)
    x, other, direction = torch.sigmoid(x), torch.sigmoid(other), direction.double()
    for method in methods:
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
            found = there_and_back(purifier, x, direction, _SEED)
            if name != "eager":
                # A program that is run again may write where it wrote before: the first results must survive, and be repeated.
                there_and_back(purifier, other, direction, _SEED)
                found = [result.clone() for result in found] + there_and_back(purifier, x, direction, _SEED)
            return found

        exact, rounded = run("eager", x.double(), {}), run("eager", x, {})
        allowances = [0.0, 0.0]
        if METHODS[method].guided:
            (unguided, _) = run("eager", x.double(), {}, "reverse-sde")
            allowances = [FLIPPED_RELU * relative_error(unguided, exact[0]), FLIPPED_RELU_GRADIENT]
        eps = torch.finfo(torch.float32).eps
        bounds = [
            FLOAT32_FACTOR * max(relative_error(a, b), eps) + allowance
            for a, b, allowance in zip(rounded, exact, allowances, strict=True)
        ]

        def trial(options: dict[str, bool], run: Any = run, exact: Any = exact, bounds: Any = bounds) -> Row:
            return {"options": options} | _judge(lambda: run(engine, x, options), exact, bounds)

        given = dict(options or {})
        row |= trial(given)
        if take_apart and is_bad(row):
            row["trials"] = [trial(given | {name: False}) for name in ENGINE_OPTIONS]
            row["trials"].append(trial(dict.fromkeys(ENGINE_OPTIONS, False)))
            row["culprit"] = _culprit(row["trials"])
        yield row


class _Refused(Exception):
    """The engine says beforehand that it does not run this."""


def _judge(run: Callable[[], list[torch.Tensor]], exact: list[torch.Tensor], bounds: list[float]) -> Row:
    try:
        found = run()
    except _Refused as error:
        return {"status": "refused", "detail": str(error)}
    except Exception as error:  # whatever an engine does wrong is what this report is for
        return {"status": "failed", "detail": one_line(error)}
    errors = [max(relative_error(each, right) for each in found[i::2]) for i, right in enumerate(exact)]
    if not all(map(math.isfinite, errors + bounds)):
        return {"status": "failed", "detail": "values that are not finite"}
    return verdict(errors, bounds)


def _culprit(trials: list[Row]) -> str:
    *single, none = trials
    alone = [name for name, trial in zip(ENGINE_OPTIONS, single, strict=True) if trial["status"] == "ok"]
    if alone:
        return f"it agrees without {' or without '.join(repr(name) for name in alone)}: that part is wrong here"
    if none["status"] == "ok":
        return f"it agrees only without all of {', '.join(ENGINE_OPTIONS)}: more than one of them is wrong here"
    return f"it is wrong without {', '.join(ENGINE_OPTIONS)}, too: look at the engine's graph, or at PyTorch ({none['detail']})"
