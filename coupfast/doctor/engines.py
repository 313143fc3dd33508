"""Every engine on a small case of every method and solver, forwards and backwards, beside the definition on the same noise."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from tqdm import tqdm

from coupfast import environment
from coupfast.definition import Definition
from coupfast.engine.precision import strict_float32
from coupfast.engines import ENGINES
from coupfast.methods import METHODS, DiffusionMethod, Method
from coupfast.models.ddpmpp import DDPMpp
from coupfast.models.dm_wide_resnet import DMWideResNet
from coupfast.models.wide_resnet import WideResNet
from coupfast.purify import Purifier
from coupfast_kernels.noise import standard_normal_ref
from coupfast_kernels.parity import FLOAT32_FACTOR, relative_error

SEED, BATCH, STEPS, SIZE = 0, 2, 4, 8

#: Methods whose rows have other columns (x_in, a second noise) or ask no network, made short.
_SHORT: dict[str, dict[str, Any]] = {
    "ld-sde": {"t": 0.04},
    "gdmp": {"rounds": 2, "noise_steps": 3, "guide_batch": 1, "image_elements": 3 * SIZE * SIZE},
    "one-step": {"t": (0.3, 0.1), "clip_denoised": True},
}

#: Name, options of the purifier, activation of its classifier.
EngineCase = tuple[str, dict[str, Any], str]


def cases() -> Iterator[EngineCase]:
    """Methods and solvers that differ in what a step reads, and what else takes a route of its own.

    Solvers that fill the same columns with other numbers are the same to an engine.
    """
    for method, recipe in METHODS.items():
        if issubclass(recipe, DiffusionMethod):
            for solver in ("euler-maruyama", "probability-flow"):
                yield f"{method}, {solver}", {"method": method, "solver": solver}, "silu"
        elif method in _SHORT:
            yield method, {"method": method, **_SHORT[method]}, "silu"
        if issubclass(recipe, DiffusionMethod) and recipe.guided:
            # Piecewise-linear classifiers have a route of their own to the Hessian-vector product.
            yield f"{method}, ReLU classifier", {"method": method}, "relu"
            yield f"{method}, detached guidance", {"method": method, "guidance_gradient": "detached"}, "silu"
            # All columns of a step that remembers the one before, and what lies between the networks and the row.
            clipped = {"method": method, "solver": "sde-dpm-solver++-2m", "clip_denoised": True}
            yield f"{method}, two steps, clipped image", clipped, "silu"


def _small_networks(activation: str, device: torch.device) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A DDPM++ and a wide residual network with random weights of ordinary size, float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        score = DDPMpp(nf=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), image_size=SIZE)
        score.redraw_small_layers(torch.Generator().manual_seed(SEED))
        classifier: WideResNet | DMWideResNet
        if activation == "relu":
            classifier = WideResNet(10, 1)
            last = classifier.fc
        else:
            classifier = DMWideResNet(10, 1, activation=activation)
            last = classifier.logits
        # Confident enough for the guidance and its Hessian to be seen in the result; and batch norms as after training,
        # since untouched ones are the identity.
        last.weight.data.mul_(100.0)
        for module in classifier.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for tensor, low in ((module.running_mean, -0.2), (module.running_var, 0.8), (module.bias, -0.2)):
                    assert tensor is not None
                    tensor.data.uniform_(low, low + 0.4)
    for network in (score, classifier):
        network.to(device).eval().requires_grad_(False)
    return score, classifier


def check_engines(
    device: torch.device,
    chosen: Iterable[EngineCase] | None = None,
    *,
    engines: Iterable[str] = tuple(ENGINES),
    progress: bool = False,
) -> Iterator[dict[str, Any]]:
    """Engines (all, if none are named) on these cases (None: all), in float64 and float32, on one device.

    Yields:
        `engine`, `device`, `dtype`, `case`, `status` ("ok", "mismatch", "failed", "refused"), `detail`, and where it ran errors
        and bounds, forward and of the gradient.
    """
    every, names = list(cases() if chosen is None else chosen), list(engines)
    with tqdm(total=len(every), desc=f"engines on {device}", unit="case", disable=not progress, leave=False) as bar:
        for name, options, activation in every:
            networks = _small_networks(activation, device)
            x, direction = _example(device)
            with strict_float32(device.type):
                exact = _definition(networks, options, x.double(), direction)
                rounded = _definition(networks, options, x, direction)
            # How much this case magnifies rounding is read off the definition itself, run in float32.
            float32_errors = tuple(relative_error(a, b) for a, b in zip(rounded, exact, strict=True))
            for engine in names:
                for dtype in (torch.float64, torch.float32):
                    row = {"engine": engine, "device": str(device), "dtype": str(dtype).removeprefix("torch."), "case": name}
                    # Compiling would take half a minute a case; `gpu` runs the engine compiled.
                    more = {"engine": engine} | ({"engine_options": {"compile": False}} if engine == "cuda" else {})
                    yield row | _compare(networks, options | more, x.to(dtype), direction, exact, float32_errors)
            bar.update(1)


def _example(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Images away from 0 and 1, float32, and the gradient that comes into their purification, float64."""
    shape, ids = (BATCH, 3, SIZE, SIZE), torch.arange(BATCH, device=device)
    x, direction = (standard_normal_ref(shape, seed=SEED, ids=ids, draw=draw, step=2**32 - 2) for draw in (0, 1))
    return torch.sigmoid(x), direction.double()


def _short(options: dict[str, Any]) -> dict[str, Any]:
    """The same in few steps, where nothing is said of that and the method has such an option."""
    method = options.get("method", "coup")
    return options if isinstance(method, Method) or method in _SHORT else {"num_steps": STEPS, **options}


def _definition(
    networks: tuple[torch.nn.Module, torch.nn.Module], options: dict[str, Any], x: torch.Tensor, direction: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Purified images and their gradient along `direction`, by the definition in the dtype of `x`."""
    detached = options.get("guidance_gradient") == "detached"
    purifier = Purifier(*networks, **_short(options))
    definition = Definition(purifier, dtype=x.dtype, detached=detached)
    noise = definition.noise(x, SEED, torch.arange(len(x)), 0)
    return definition.gradient(x, noise, lambda purified: purified * direction.to(x.dtype))


def _compare(
    networks: tuple[torch.nn.Module, torch.nn.Module],
    options: dict[str, Any],
    x: torch.Tensor,
    direction: torch.Tensor,
    exact: tuple[torch.Tensor, torch.Tensor],
    float32_errors: tuple[float, ...],
) -> dict[str, Any]:
    score, classifier = (copy.deepcopy(network).to(x.dtype) for network in networks)
    try:
        purifier = Purifier(score, classifier, **_short(options))
        purifier.plan(len(x), image_shape=tuple(x.shape[1:]))  # type: ignore[arg-type]
    except torch.AcceleratorError as error:  # a device that fails has refused nothing
        return {"status": "failed", "detail": environment.one_line(error)}
    except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        return {"status": "refused", "detail": environment.one_line(error)}
    try:
        found = there_and_back(purifier, x, direction, SEED)
    except Exception as error:  # whatever an engine does wrong is what this report is for
        return {"status": "failed", "detail": environment.one_line(error)}
    # Both sides of a float64 comparison round, so twice the factor.
    scale = 1.0 if x.dtype == torch.float32 else 2.0 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    errors = [relative_error(a, b) for a, b in zip(found, exact, strict=True)]
    if not all(map(math.isfinite, errors)):
        return {"status": "failed", "detail": f"errors {errors[0]} forward, {errors[1]} gradient"}
    bounds = [FLOAT32_FACTOR * scale * max(error, torch.finfo(torch.float32).eps) for error in float32_errors]
    return verdict(errors, bounds)


def there_and_back(purifier: Any, x: torch.Tensor, direction: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """Purified images, and what comes back of a direction."""
    image = x.clone().requires_grad_()
    with torch.enable_grad():
        purified = purifier(image, seed=seed)
        (gradient,) = torch.autograd.grad(purified, image, direction.to(x.dtype))
    return [purified.detach(), gradient]


def verdict(errors: list[float], bounds: list[float]) -> dict[str, Any]:
    """Whether finite errors, forwards and of the gradient, are within their bounds, as a row of a report."""
    agrees = all(error <= bound for error, bound in zip(errors, bounds, strict=True))
    return {
        "status": "ok" if agrees else "mismatch",
        "forward_error": errors[0],
        "forward_bound": bounds[0],
        "gradient_error": errors[1],
        "gradient_bound": bounds[1],
        "detail": f"errors {errors[0]:.2e} forward, {errors[1]:.2e} gradient; bounds {bounds[0]:.2e}, {bounds[1]:.2e}",
    }


def by_engine(parity: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Per engine, device and dtype: whether it runs at all."""
    found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
    for row in parity:
        if any(place_of(row) == place_of(place) for place in found[row["engine"]]):
            continue
        rows = [other for other in parity if other["engine"] == row["engine"] and place_of(other) == place_of(row)]
        refused = all(other["status"] == "refused" for other in rows)
        found[row["engine"]].append(
            {
                "device": row["device"],
                "dtype": row["dtype"],
                "status": "refused" if refused else "runs",
                "detail": row["detail"] if refused else "",
            }
        )
    return found


def place_of(row: dict[str, Any]) -> tuple[str, str]:
    return row["device"], row["dtype"]
