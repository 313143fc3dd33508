"""What is installed, what runs here, and whether it computes what it should.

Every engine is run on a small case of every method and solver, in float64 and float32, forwards and backwards, and compared
with the definition (`reference.py`) on the same noise. On a GPU so is every kernel, and the CUDA engine on the shipped networks
(`device_checks.py`).
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import math
import platform
import sys
import time
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from coupfast import device_checks, environment
from coupfast.definition import Definition
from coupfast.engine.memory import available_bytes
from coupfast.engine.precision import strict_float32
from coupfast.engines import ENGINES
from coupfast.methods import METHODS
from coupfast.models.checkpoints import file_sha256, listed_sha256
from coupfast.models.ddpmpp import DDPMpp
from coupfast.models.dm_wide_resnet import DMWideResNet
from coupfast.models.wide_resnet import WideResNet
from coupfast.purify import Purifier
from coupfast.solvers import SOLVERS
from coupfast_kernels import native
from coupfast_kernels.noise import philox_4x32_10_ref, standard_normal_ref

CORE_PACKAGES = ("torch", "numpy", "safetensors", "torchsde", "tqdm", "triton")

#: What optional packages are for: (what one can do with them, distributions, importable modules, the extra they come with).
FEATURES: tuple[tuple[str, tuple[str, ...], tuple[str, ...], str], ...] = (
    ("image files in and out", ("pillow",), ("PIL",), "demo"),
    ("the 20 test images 'cifar10-20'", ("foolbox",), ("foolbox",), "demo"),
    ("attacks; the classifier 'resnet18-at'", ("pyautoattack",), ("pyautoattack",), "demo"),
    ("the demo's picture", ("matplotlib",), ("matplotlib",), "demo"),
    ("torchvision's CIFAR-10: 'cifar10', 'cifar10-512'", ("torchvision",), ("torchvision",), "zoo"),
    (
        "RobustBench classifiers by name",
        ("robustbench", "pyautoattack", "torchvision", "timm", "setuptools<81"),
        ("robustbench", "pyautoattack", "torchvision", "timm", "pkg_resources"),
        "zoo",
    ),
    ("diffusers score networks", ("diffusers",), ("diffusers",), "zoo"),
    ("kernel benchmarks", ("pytest", "pytest-benchmark"), ("pytest", "pytest_benchmark"), "bench"),
)

# Random123's known answers for Philox 4x32-10: counter, key, result.
PHILOX_KNOWN_ANSWERS: tuple[tuple[tuple[int, ...], tuple[int, int], tuple[int, ...]], ...] = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)

# SHA-256 of the little-endian float32 bytes of `_normals`: the noise is defined bit for bit.
NORMALS_SHA256 = "d60603c9e9fc9f11dfe20f74fde2f0aa1d23113a9bc2e05adb323dc731d9c0a0"

#: An engine's float32 error may be this many times that of the definition run in float32.
STRICT_FACTOR = 4.0

_SEED, _BATCH, _STEPS, _SIZE = 0, 2, 4, 8


def run(*, device: torch.device | str | None = None, progress: bool = False) -> dict[str, Any]:
    """Look at the installation and check the noise, the shipped weights and every engine: about 10 s on two cores; on a GPU its
    kernels too, meant to take under two minutes.

    Args:
        device: Where engines are tried; None tries the CPU and every CUDA device.
        progress: Show a progress bar.

    Returns:
        JSON-ready: `python`, `machine`, `packages`, `features`, `cpu_kernels`, `noise`, `weights`, `engines`, `parity`, `gpus`,
        `ok`, `problems` (one line each; empty if `ok`), `seconds`. Errors in `parity` are relative to the definition in
        float64, in the Euclidean norm. An engine that refuses a device or a dtype is no problem, except `eager`, which runs
        everywhere. `gpus` has a report of `device_checks.check_device` for each CUDA device; to have none is no problem.
    """
    import coupfast

    started = time.perf_counter()
    if device is None:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(count))]
    else:
        devices = [torch.device(device)]
    noise = [_check_noise(each) for each in devices]
    weights = _check_weights()
    parity = [row for each in devices for row in _check_engines(each, progress)]
    gpus = [device_checks.check_device(each) for each in devices if each.type == "cuda"]
    problems = [
        *(f"noise on {row['device']}: {row['problem']}" for row in noise if row["problem"]),
        *(f"shipped weights, {row['file']}: {row['problem']}" for row in weights if row["problem"]),
        *(
            f"engine {row['engine']} on {row['device']}, {row['dtype']}, {row['case']}: {row['status']}, {row['detail']}"
            for row in parity
            if row["status"] in ("mismatch", "failed") or (row["status"] == "refused" and row["engine"] == "eager")
        ),
        *(problem for gpu in gpus for problem in gpu["problems"]),
    ]
    return {
        "coupfast": {"version": coupfast.__version__, "path": str(Path(coupfast.__file__).parent)},
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "machine": _machine(),
        "packages": {name: environment.version(name) for name in CORE_PACKAGES},
        "features": [_feature(*feature) for feature in FEATURES],
        "cpu_kernels": _cpu_kernels(),
        "noise": noise,
        "weights": weights,
        "engines": _engines(parity),
        "parity": parity,
        "gpus": gpus,
        "ok": not problems,
        "problems": problems,
        "seconds": time.perf_counter() - started,
    }


def text(report: dict[str, Any]) -> str:
    """A report of `run` for people."""
    machine, kernels = report["machine"], report["cpu_kernels"]
    lines = [
        f"coupfast {report['coupfast']['version']} in {report['coupfast']['path']}",
        f"Python {report['python']['version']}, {machine['system']}",
        f"{machine['processor']}, {machine['cores']} cores, vector instructions {machine['vector_instructions']}, "
        f"{machine['free_bytes'] / 2**30:.1f} GiB free; torch uses {machine['torch_threads']} threads",
        *(f"{gpu['name']}, {gpu['bytes'] / 2**30:.0f} GiB, compute capability {gpu['capability']}" for gpu in machine["gpus"]),
    ]
    if not machine["gpus"]:
        lines.append(f"no CUDA device that torch sees (torch built for CUDA: {machine['torch_cuda'] or 'no'})")
    lines.append(", ".join(f"{name} {version or '(not installed)'}" for name, version in report["packages"].items()))
    if kernels["problem"]:
        lines.append(f"C++ kernels: none, so engine 'cpu' does not run: {kernels['problem']}")
    else:
        lines.append(f"C++ kernels for {kernels['isa']}, by {kernels['version']} ({kernels['compiler']})")
    lines += ["", "Optional features"]
    for feature in report["features"]:
        state = "yes" if feature["installed"] else f"no: {', '.join(feature['missing'])} missing, {feature['install']}"
        lines.append(f"  {feature['feature']:50}  {state}")
    lines += ["", "Checks"]
    for row in report["noise"]:
        lines.append(f"  noise on {row['device']}: {row['problem'] or 'known answers, bit for bit'}")
    for row in report["weights"]:
        lines.append(f"  {row['file']}: {row['problem'] or 'SHA-256 as shipped'}")
    for engine, places in report["engines"].items():
        for place in places:
            where = f"  engine {engine} on {place['device']}, {place['dtype']}"
            if place["status"] == "refused":
                runs = [other["dtype"] for other in places if (other["device"], other["status"]) == (place["device"], "runs")]
                reason = place["detail"]
                if runs:  # an engine of one dtype, not a fault
                    lines.append(f"{where}: {' and '.join(runs)} only, {reason.partition(': ')[2] or reason}")
                else:
                    lines.append(f"{where}: does not run here ({reason})")
                continue
            rows = [row for row in report["parity"] if row["engine"] == engine and _where(row) == _where(place)]
            agreed = sum(row["status"] == "ok" for row in rows)
            line = f"{where}: {agreed} of {len(rows)} cases agree with the definition"
            measured = [row for row in rows if "forward_error" in row]
            if measured:
                forward = max(row["forward_error"] for row in measured)
                gradient = max(row["gradient_error"] for row in measured)
                line += f"; largest errors {forward:.1e} forward, {gradient:.1e} gradient"
            lines.append(line)
    for gpu in report["gpus"]:
        lines += device_checks.text(gpu)
    if not report["gpus"]:
        lines.append("  GPU kernels, engine cuda on the shipped networks: not checked, since no CUDA device was looked at")
    lines.append("")
    if report["ok"]:
        lines.append(f"All checks passed in {report['seconds']:.1f} s.")
    else:
        lines += [f"PROBLEM  {problem}" for problem in report["problems"]]
        lines.append(f"{len(report['problems'])} problems found in {report['seconds']:.1f} s.")
    return "\n".join(lines)


# --- what is here -----------------------------------------------------------------------------------------------------


def _machine() -> dict[str, Any]:
    return {
        **environment.machine(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "free_bytes": available_bytes(torch.device("cpu")),
        "torch_threads": torch.get_num_threads(),
        "torch_cuda": torch.version.cuda,
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
    }


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
    }


def _feature(feature: str, distributions: tuple[str, ...], modules: tuple[str, ...], extra: str) -> dict[str, Any]:
    # find_spec does not run a package: some of these import for seconds.
    missing = [name for name, module in zip(distributions, modules, strict=True) if importlib.util.find_spec(module) is None]
    versions = {name.partition("<")[0]: environment.version(name.partition("<")[0]) for name in distributions}
    return {
        "feature": feature,
        "installed": not missing,
        "missing": missing,
        "versions": versions,
        "install": f'pip install "coupfast[{extra}]"',
    }


def _cpu_kernels() -> dict[str, Any]:
    """The C++ kernels as built for this CPU; or why there are none."""
    reason = native.unavailable()
    return {"problem": reason} if reason else {"problem": None, **native.describe()}


# --- noise and weights ------------------------------------------------------------------------------------------------


def _check_noise(device: torch.device) -> dict[str, Any]:
    for counter, key, expected in PHILOX_KNOWN_ANSWERS:
        words = tuple(int(word) for word in philox_4x32_10_ref(tuple(torch.tensor(c, device=device) for c in counter), key))
        if words != expected:
            found, wanted = (" ".join(f"{word:08x}" for word in answer) for answer in (words, expected))
            return {"device": str(device), "problem": f"Philox 4x32-10 gives {found}, Random123 has {wanted}"}
    digest = hashlib.sha256(_normals(device).cpu().numpy().astype("<f4").tobytes()).hexdigest()
    if digest != NORMALS_SHA256:
        return {"device": str(device), "problem": f"the normals' SHA-256 is {digest}, expected {NORMALS_SHA256}"}
    return {"device": str(device), "problem": None}


def _normals(device: torch.device) -> torch.Tensor:
    ids = torch.tensor([0, 1, 2**32 - 1], device=device)
    draw = torch.tensor([0, 7, 2**32 - 1], device=device)
    step = torch.tensor([0, 99, 2**32 - 1], device=device)
    return standard_normal_ref((3, 3, 32, 32), seed=0x0123456789ABCDEF, ids=ids, draw=draw, step=step)


def _check_weights() -> list[dict[str, Any]]:
    """Every file of `SHA256SUMS` against its sum, and every weight file against the list."""
    folder = files("coupfast.models") / "weights"
    try:
        sums = listed_sha256((folder / "SHA256SUMS").read_text())
    except (OSError, ValueError) as error:
        return [{"file": "SHA256SUMS", "problem": f"cannot be read ({error}); install coupfast again"}]
    present = {entry.name for entry in folder.iterdir() if entry.name.endswith(".safetensors")}
    rows = []
    for name in sorted(sums.keys() | present):
        problem = None
        if name not in present:
            problem = "missing; install coupfast again"
        elif name not in sums:
            problem = "not in SHA256SUMS"
        else:
            with as_file(folder / name) as path:
                found = file_sha256(path)
            if found != sums[name]:
                problem = f"damaged: SHA-256 {found}, expected {sums[name]}; install coupfast again"
        rows.append({"file": name, "problem": problem})
    return rows


# --- engines ----------------------------------------------------------------------------------------------------------


def _cases() -> Iterator[tuple[str, dict[str, Any], str]]:
    """Name, options of the purifier, activation of its classifier."""
    for method, recipe in METHODS.items():
        for solver in SOLVERS:
            yield f"{method}, {solver}", {"method": method, "solver": solver}, "silu"
        if recipe.guided:
            # Piecewise-linear classifiers have a route of their own to the Hessian-vector product.
            yield f"{method}, ReLU classifier", {"method": method}, "relu"
            yield f"{method}, detached guidance", {"method": method, "guidance_gradient": "detached"}, "silu"


def _small_networks(activation: str, device: torch.device) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A DDPM++ and a wide residual network with random weights of ordinary size, float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        score = DDPMpp(nf=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), image_size=_SIZE)
        score.redraw_small_layers(torch.Generator().manual_seed(_SEED))
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


def _check_engines(device: torch.device, progress: bool) -> Iterator[dict[str, Any]]:
    cases = list(_cases())
    with tqdm(total=len(cases), desc=f"engines on {device}", unit="case", disable=not progress, leave=False) as bar:
        for name, options, activation in cases:
            networks = _small_networks(activation, device)
            x, direction = _example(device)
            with strict_float32(device.type):
                exact = _definition(networks, options, x.double(), direction)
                rounded = _definition(networks, options, x, direction)
            # How much this case magnifies rounding is read off the definition itself, run in float32.
            float32_errors = tuple(_relative_error(a, b) for a, b in zip(rounded, exact, strict=True))
            for engine in ENGINES:
                for dtype in (torch.float64, torch.float32):
                    row = {"engine": engine, "device": str(device), "dtype": str(dtype).removeprefix("torch."), "case": name}
                    # Compiling would take half a minute a case; `device_checks` runs the engine compiled.
                    more = {"engine": engine} | ({"engine_options": {"compile": False}} if engine == "cuda" else {})
                    yield row | _compare(networks, options | more, x.to(dtype), direction, exact, float32_errors)
            bar.update(1)


def _example(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Images away from 0 and 1, float32, and the gradient that comes into their purification, float64."""
    shape, ids = (_BATCH, 3, _SIZE, _SIZE), torch.arange(_BATCH, device=device)
    x, direction = (standard_normal_ref(shape, seed=_SEED, ids=ids, draw=draw, step=2**32 - 2) for draw in (0, 1))
    return torch.sigmoid(x), direction.double()


def _definition(
    networks: tuple[torch.nn.Module, torch.nn.Module], options: dict[str, Any], x: torch.Tensor, direction: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Purified images and their gradient along `direction`, by the definition in the dtype of `x`."""
    detached = options.get("guidance_gradient") == "detached"
    purifier = Purifier(*networks, num_steps=_STEPS, **options)
    definition = Definition(purifier, dtype=x.dtype, detached=detached)
    noise = definition.noise(x, _SEED, torch.arange(len(x)), 0)
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
        purifier = Purifier(score, classifier, num_steps=_STEPS, **options)
        purifier.plan(len(x), image_shape=tuple(x.shape[1:]))  # type: ignore[arg-type]
    except torch.AcceleratorError as error:  # a device that fails has refused nothing
        return {"status": "failed", "detail": environment.one_line(error)}
    except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        return {"status": "refused", "detail": environment.one_line(error)}
    try:
        image = x.clone().requires_grad_()
        purified = purifier(image, seed=_SEED)
        (gradient,) = torch.autograd.grad(purified, image, direction.to(x.dtype))
    except Exception as error:  # whatever an engine does wrong is what this report is for
        return {"status": "failed", "detail": environment.one_line(error)}
    # Both sides of a float64 comparison round, so twice the factor.
    scale = 1.0 if x.dtype == torch.float32 else 2.0 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    errors = [_relative_error(a, b) for a, b in zip((purified.detach(), gradient), exact, strict=True)]
    if not all(map(math.isfinite, errors)):
        return {"status": "failed", "detail": f"errors {errors[0]} forward, {errors[1]} gradient"}
    bounds = [STRICT_FACTOR * scale * max(error, torch.finfo(torch.float32).eps) for error in float32_errors]
    agrees = all(error <= bound for error, bound in zip(errors, bounds, strict=True))
    return {
        "status": "ok" if agrees else "mismatch",
        "forward_error": errors[0],
        "forward_bound": bounds[0],
        "gradient_error": errors[1],
        "gradient_bound": bounds[1],
        "detail": f"errors {errors[0]:.2e} forward, {errors[1]:.2e} gradient; bounds {bounds[0]:.2e}, {bounds[1]:.2e}",
    }


def _engines(parity: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Per engine, device and dtype: whether it runs at all."""
    found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
    for row in parity:
        if any(_where(row) == _where(place) for place in found[row["engine"]]):
            continue
        rows = [other for other in parity if other["engine"] == row["engine"] and _where(other) == _where(row)]
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


def _where(row: dict[str, Any]) -> tuple[str, str]:
    return row["device"], row["dtype"]


def _relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())
