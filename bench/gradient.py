"""What the gradient of a purification costs, and how right it is: `python bench/gradient.py --t 0.1`.

Method COUP, forward and backward pass, in turns within one run. The modes:

* `published`: torchsde's `sdeint_adjoint` as COUP's code calls it: every parameter requires a gradient, whose integrals the
  backward pass solves for; the guidance is taken by `.backward(retain_graph=True)` on a detached copy, so H is missing;
* `published-differentiated`: that adjoint with the guidance differentiated (`purify_ref(adjoint="parameters")`: it walks the
  forward grid back, where `published` steps back by 1e-3 from where the run ends; `adjoint_error.py` says what that does);
* `frozen`: `published` with frozen networks and `adjoint_params=()`: the best that torchsde's adjoint can do;
* `frozen-differentiated`: `published-differentiated` with frozen networks and `adjoint_params=()`;
* `back-propagation`: through torchsde's plain loop, all steps in memory, networks frozen;
* `double-backward`: the discrete adjoint in eager PyTorch, one step recomputed at a time, Hessian-vector products by double
  back-propagation;
* `exact`, `detached`: `coupfast.Purifier` with that `guidance_gradient`, one row per engine and per `--memory-budget`.

All take the published run's path in the published steps of 1e-3 (`cases.published_path`): the error of torchsde's adjoint
depends strongly on them. Errors are against the discrete gradient of exactly those steps in float64, means over images:
`rel_error` = |v − v64| / |v64|, `cosine`, and `sign_agreement`, the share of pixels whose gradient has the right sign. v is the
gradient with respect to the image in [0, 1] of ⟨w, purified image⟩. All modes have the same w: the gradient of the
classifier's cross-entropy at the float64 result, scaled to a root mean square of 1.
`rounding` is the relative error against the same mode in float64 (None for torchsde's adjoints). An engine whose `rounding`
is over 4 times that of float32 back-propagation (or of `double-backward`, if that mode is left out) gets no times, and the
command exits with 1. With a trained classifier it may be 1e-3 in any case: a ReLU that lies on its kink to within rounding
may fall on the other side, which moves the Hessian by up to a percent; the tests check more closely, under equal masks.

Where only the first K of N steps are taken (`scaled`: the default for the paper's networks on a CPU; `--full` takes all),
errors are those of K steps, which for torchsde's adjoint are much less than those of N (the last step, to t = 1e-5, makes most
of its error), whereas times are stated for N: a forward pass through torchsde times (N + 1) / (K + 1), since it
evaluates the drift once more than it takes steps, all else times N / K.

`peak_bytes` is the peak of PyTorch's allocator above the weights for all N steps. It grows by the same amount with every
step from the second on, so it follows from runs of 2 and 3 steps (`peak_bytes_from_steps`) made for nothing else.

On a GPU `host_seconds_per_image` is what the host was busy with both passes (None on a CPU), and `kernels_per_step` and
`launches_per_step` are those of both, as in `speed.py`. `share_of_matmul` is the FLOP of all network evaluations that `exact`
and `detached` plan, by direct sums and every pass counted as a forward one, as a share of what a float32 matrix product reached
in the same run.

`planned_peak_bytes` is the plan's own prediction for the steps that are timed, `kept_steps` how many of those keep all
activations. What the cpu engine takes of the operating system is in the plan, not in `peak_bytes`.

Ratios say how many times faster a row is than `published`, `frozen` and `double-backward` (`ratio_to_eager`), and than the
eager engine in the same mode with the same memory budget (`ratio_to_eager_engine`).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from cases import (
    COLUMNS,
    Case,
    Path,
    add_case_options,
    engines_here,
    load_case,
    markdown,
    pass_flop,
    published_path,
    purifier_on,
    share_of_matmul,
    steps_to_time,
    write_results,
)
from timing import Summary, interleave, launches, peak_bytes, rotated, timed, timed_twice, times_faster
from torch import nn

import coupfast
from coupfast import integrate
from coupfast.engine import ReplayedNoise
from coupfast.engine.eager import EagerProgram
from coupfast.engine.networks import frozen
from coupfast.engine.precision import strict_float32
from coupfast.engines import ENGINES
from coupfast.guidance import Guidance
from coupfast.methods import METHODS
from coupfast.reference import purify_published, purify_ref
from coupfast.sde import parity_grid

METHOD = "coup"
CONTRACT = 4.0  # `strict`: in units of the error of float32 back-propagation through the plain loop
FLIPPED_RELU = 1e-3
BASELINES = {"ratio_to_published": "published", "ratio_to_frozen": "frozen", "ratio_to_eager": "double-backward"}
OURS = ("exact", "detached")
MODES = (
    "published",
    "published-differentiated",
    "frozen",
    "frozen-differentiated",
    "back-propagation",
    "double-backward",
    *OURS,
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    case = load_case(options)
    skipped = []
    if options.engines is None:
        options.engines, skipped = engines_here(case)
    print(case)
    rows_of = _rows if options.truth == "float64" else _rows_against_exact
    rows = [row for t in options.t for row in rows_of(case, t, options)]
    if options.markdown:
        print(markdown(rows, ("mode", *COLUMNS, "forward_seconds_per_image", "backward_seconds_per_image", "rel_error")))
    if options.json:
        write_results(options.json, rows, case, options, engines_that_do_not_run_here=skipped)
    broken = sum(not row["within_contract"] for row in rows)
    if broken:
        print(f"{broken} of {len(rows)} rows are over their contract and have no times", file=sys.stderr)
    return 1 if broken else 0


Purify = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class _Mode:
    """A way to a gradient: images to purified images, differentiable.

    Attributes:
        extra_evaluations: Drift evaluations of the forward pass besides one a step.
        same_mode: Which float64 gradient `rounding` is measured against: `"exact"`, `"detached"` or None.
        evaluations: Of each network for one image, by its name; None if nobody plans them.
        budget: What the mode may keep; None if it is none of `OURS`.
        plan: Of the images in hand; None likewise.
    """

    name: str
    engine: str
    purify: Purify
    extra_evaluations: int = 0
    same_mode: str | None = None
    evaluations: dict[str, int] | None = None
    budget: str | None = None
    plan: coupfast.Plan | None = None

    @property
    def key(self) -> str:
        return self.key_on(self.engine)

    def key_on(self, engine: str) -> str:
        """The key of the same on an engine."""
        return f"{self.name} ({engine}{'' if self.budget is None else f', {self.budget}'})"

    def planned(self) -> dict[str, Any]:
        """What a row says of the plan."""
        plan = self.plan
        return {
            "memory_budget": self.budget,
            "kept_steps": None if plan is None else plan.storage.kept_steps,
            "planned_peak_bytes": None if plan is None else plan.peak_bytes,
        }


def _modes(case: Case, path: Path, t: float, options: argparse.Namespace) -> list[_Mode]:
    networks = case.networks
    score, classifier = frozen(networks.score), frozen(networks.classifier)
    device_type = case.x.device.type

    def published(score: nn.Module, classifier: nn.Module, adjoint_params: str) -> Purify:
        def purify(x: torch.Tensor) -> torch.Tensor:
            x_k = purify_published(
                2.0 * x - 1.0,
                score,
                classifier,
                t=t,
                t_end=path.t_end,
                adjoint_params="all" if adjoint_params == "all" else "none",
                entropy=path.entropy,
            )
            return (x_k + 1.0) * 0.5

        return purify

    def definition(score: nn.Module, classifier: nn.Module, kind: Any) -> Purify:
        def purify(x: torch.Tensor) -> torch.Tensor:
            x_k = purify_ref(2.0 * x - 1.0, score, classifier, path.noise, grid=path.grid, adjoint=kind)
            return (x_k + 1.0) * 0.5

        return purify

    def double_backward(x: torch.Tensor) -> torch.Tensor:
        with strict_float32(device_type):
            return discrete_adjoint(x, score, classifier, path)

    modes = [
        _Mode("published", "torchsde", published(networks.score, networks.classifier, "all"), 1),
        _Mode("published-differentiated", "torchsde", definition(networks.score, networks.classifier, "parameters"), 1),
        _Mode("frozen", "torchsde", published(score, classifier, "none"), 1),
        _Mode("frozen-differentiated", "torchsde", definition(score, classifier, "frozen"), 1),
        _Mode("back-propagation", "torchsde", definition(score, classifier, "none"), 1, "exact"),
        _Mode("double-backward", "eager", double_backward, 0, "exact"),
    ]
    modes = [mode for mode in modes if mode.name in options.modes]
    bound: dict[tuple[str, str], coupfast.Purifier] = {}
    for name, engine, budget in itertools.product(OURS, options.engines, options.memory_budget):
        if name not in options.modes:
            continue
        purifier = purifier_on(path.grid, networks, METHOD, engine=engine, guidance_gradient=name, memory_budget="least")
        _share(purifier, bound.setdefault((name, engine), purifier), case.x)
        if budget != "least":
            allowed = _budget(purifier, budget, len(case.x))
            purifier = purifier_on(path.grid, networks, METHOD, engine=engine, guidance_gradient=name, memory_budget=allowed)
        _share(purifier, bound.setdefault((name, engine), purifier), case.x)
        plan = purifier.plan(len(case.x))
        if budget == "activations" and plan.storage.kept_steps < plan.num_steps:
            raise SystemExit(
                f"engine {engine}: {plan.activations_bytes} bytes hold {plan.storage.kept_steps} of {plan.num_steps} steps' "
                "activations, not all; take fewer --steps-timed or a smaller --batch"
            )
        evaluations = _evaluations(plan, len(case.x))
        modes.append(_Mode(name, engine, _replayed(purifier, path), 0, name, evaluations, budget, plan))
    return modes


def _share(purifier: coupfast.Purifier, bound: coupfast.Purifier, x: torch.Tensor) -> None:
    """Let a purifier run what another of the same networks and table is bound to: packed weights are gigabytes each time."""
    if purifier is not bound:
        prepared = copy.copy(bound._prepare(x))
        prepared.settings, prepared._plans = purifier.settings, {}
        purifier._prepared.update(dict.fromkeys(bound._prepared, prepared))


def _evaluations(plan: coupfast.Plan, batch: int) -> dict[str, int]:
    pieces = -(-batch // plan.storage.piece)
    counts: dict[str, int] = {}
    for kind, count in plan.evaluations.items():
        network = kind.split()[0]
        counts[network] = counts.get(network, 0) + count // pieces
    return counts


def _replayed(purifier: coupfast.Purifier, path: Path) -> Purify:
    return lambda x: purifier(x, noise=path.noise)


def _budget(purifier: coupfast.Purifier, kept: str, batch: int) -> int | str:
    """Bytes for `memory_budget`: what the least plan needs and every step's slopes, or every step's activations."""
    if kept == "auto":
        return "auto"
    plan = purifier.plan(batch)
    if kept == "slopes":
        return plan.peak_bytes + plan.num_steps * plan.step.slopes
    return plan.peak_bytes + plan.step.forward_keeping + plan.step.transpose_kept + plan.num_steps * plan.step.activations


def discrete_adjoint(
    x: torch.Tensor, score: nn.Module, classifier: nn.Module, path: Path, *, differentiate_guidance: bool = True
) -> torch.Tensor:
    """Purified images whose gradient is the discrete adjoint, one step at a time, H v by double back-propagation."""
    x_0 = 2.0 * x - 1.0
    table = METHODS[METHOD](t=path.grid).recipe().table
    guidance = Guidance(classifier, x_0.detach(), route="double-backward")
    program = EagerProgram(score, guidance, table, x_0.detach()[:1], differentiate_guidance)
    run = integrate.Run(program, ReplayedNoise(path.noise.to(x.dtype)), integrate.Storage(piece=len(x)))
    return (integrate.integrate(x_0, run, gradient=True) + 1.0) * 0.5


def _rows(case: Case, t: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    num_steps = len(parity_grid(t)) - 1
    steps = steps_to_time(options, num_steps)
    if steps < num_steps and "auto" in options.memory_budget:
        raise SystemExit("--memory-budget auto keeps what fits of the steps that run, so it cannot be scaled; add --full")
    x = case.x
    path = published_path(2.0 * x - 1.0, t=t, steps=steps, forward_noising=False, entropy=options.seed)
    truths, w = float64_gradients(case, path)
    modes = _modes(case, path, t, options)

    # These passes are the warm-up, too.
    gradients = {mode.key: _pass_through(mode, x, w) for mode in modes}
    rounding = {
        mode.key: relative_error(gradients[mode.key], truths[mode.same_mode]) for mode in modes if mode.same_mode is not None
    }
    eager = eager_rounding(case, path, w, truths["exact"], rounding)
    bound = max(CONTRACT * eager, FLIPPED_RELU if case.networks.relus_may_flip else 0.0)
    rows: dict[str, dict[str, Any]] = {}
    for mode in modes:
        v, v64 = gradients[mode.key].double().flatten(1), truths["exact"].flatten(1)
        rows[mode.key] = {
            **_measured(mode, case, t, num_steps, steps),
            "seconds_per_image": None,
            "spread": None,
            "forward_seconds_per_image": None,
            "backward_seconds_per_image": None,
            "peak_bytes": None,
            "peak_bytes_from_steps": None,
            **_agreement(v, v64),
            "rounding": rounding.get(mode.key),
            "ratio_to_published": None,
            "ratio_to_frozen": None,
            "ratio_to_eager": None,
            "host_seconds_per_image": None,
            "kernels_per_step": None,
            "launches_per_step": None,
            "share_of_matmul": None,
            "ratio_to_eager_engine": None,
            **mode.planned(),
            # Written so that NaN does not pass.
            "within_contract": mode.name not in OURS or rounding[mode.key] <= bound,
            **case.machine_fields(),
        }

    sound = [mode for mode in modes if rows[mode.key]["within_contract"]]

    images = {mode.key: rotated(x) for mode in sound}

    def measure(mode: _Mode) -> tuple[float, float, float]:
        """Seconds an image forward, backward, and of the host."""
        image = next(images[mode.key]).clone().requires_grad_()
        forward, purified = timed_twice(lambda: mode.purify(image), x.device)
        backward, _ = timed_twice(lambda: torch.autograd.grad(purified, image, w), x.device)
        forwards = (num_steps + mode.extra_evaluations) / (steps + mode.extra_evaluations) / len(x)
        backwards = num_steps / steps / len(x)
        host = forwards * (forward.host or 0.0) + backwards * (backward.host or 0.0)
        return forwards * forward.seconds, backwards * backward.seconds, host

    turns = interleave({mode.key: lambda mode=mode: measure(mode) for mode in sound}, options.repeats)
    by_key = {mode.key: mode for mode in sound}
    totals = {key: [forward + backward for forward, backward, _ in samples] for key, samples in turns.items()}
    flop = pass_flop(case.networks, x)
    for key, samples in turns.items():
        total = Summary.of(totals[key])
        rows[key] |= {
            "seconds_per_image": total.median,
            "spread": total.spread,
            "forward_seconds_per_image": Summary.of([forward for forward, _, _ in samples]).median,
            "backward_seconds_per_image": Summary.of([backward for _, backward, _ in samples]).median,
        }
        rows[key]["ratio_to_eager_engine"] = times_faster(totals.get(by_key[key].key_on("eager")), totals[key])
        if x.device.type == "cuda":
            rows[key]["host_seconds_per_image"] = Summary.of([host for _, _, host in samples]).median
        for field, name in BASELINES.items():
            baseline = next((mode.key for mode in sound if mode.name == name), None)
            rows[key][field] = times_faster(totals.get(baseline or ""), totals[key])

    for mode in sound:
        row = rows[mode.key]
        if mode.evaluations is not None:
            planned = sum(count * flop[network] for network, count in mode.evaluations.items()) * num_steps / steps
            row["share_of_matmul"] = share_of_matmul(planned, row["seconds_per_image"], case)
        counted = launches(lambda mode=mode: _pass_through(mode, x, w), x.device)
        if counted is not None:
            row |= {"kernels_per_step": counted.kernels / steps, "launches_per_step": counted.calls / steps}

    for key, (peak, from_steps) in _peaks(case, t, num_steps, w, set(turns), options).items():
        rows[key] |= {"peak_bytes": peak, "peak_bytes_from_steps": from_steps}
    for row in rows.values():
        print(_line(row), flush=True)
    return list(rows.values())


def _rows_against_exact(case: Case, t: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Errors against eager's `exact` in float32, whose own error is a few 1e-6; times, but no memory.

    A whole run is timed by its one pass, a scaled one by repeats after that pass.
    """
    num_steps = len(parity_grid(t)) - 1
    steps = steps_to_time(options, num_steps)
    path = published_path(2.0 * case.x - 1.0, t=t, steps=steps, forward_noising=False, entropy=options.seed)
    modes = {mode.key: mode for mode in _modes(case, path, t, options)}
    truth = next((key for key, mode in modes.items() if (mode.name, mode.engine) == ("exact", "eager")), None)
    if truth is None:
        raise SystemExit("--truth exact needs `exact` among the modes and `eager` among the engines")
    classifier = frozen(case.networks.classifier)
    with torch.no_grad():
        purified, label = modes[truth].purify(case.x), classifier(case.x).argmax(dim=1)
    purified.requires_grad_()
    (w,) = torch.autograd.grad(nn.functional.cross_entropy(classifier(purified), label, reduction="sum"), purified)
    w = w / w.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()

    gradients: dict[str, torch.Tensor] = {}

    def measure(mode: _Mode) -> float:
        seconds, gradients[mode.key] = timed(lambda: _pass_through(mode, case.x, w), case.x.device)
        return seconds * num_steps / steps / len(case.x)

    times = {key: [measure(mode)] for key, mode in modes.items()}
    if steps < num_steps:
        times = interleave({key: lambda mode=mode: measure(mode) for key, mode in modes.items()}, options.repeats)
    rows = []
    for key, mode in modes.items():
        v, v64 = gradients[key].double().flatten(1), gradients[truth].double().flatten(1)
        total = Summary.of(times[key])
        row = {
            **_measured(mode, case, t, num_steps, steps),
            "seconds_per_image": total.median,
            "spread": total.spread,
            "truth": "exact, eager, float32",
            **_agreement(v, v64),
            "within_contract": True,
            "ratio_to_eager_engine": times_faster(times.get(mode.key_on("eager")), times[key]),
            **mode.planned(),
            **{
                field: times_faster(next((times[k] for k in modes if modes[k].name == name), None), times[key])
                for field, name in BASELINES.items()
            },
            **case.machine_fields(),
        }
        rows.append(row)
        print(
            f"{mode.name:24} {mode.engine:9} {mode.budget or '':11} t={t:g} B={len(case.x)}  {total.median:.4g} s/image  "
            f"{steps}/{num_steps} steps; {_ratios(row)}  "
            f"against {row['truth']}: rel. error {row['rel_error']:.2e}, cosine {row['cosine']:.6f}, "
            f"signs {row['sign_agreement']:.2%}",
            flush=True,
        )
    return rows


def _peaks(
    case: Case, t: float, num_steps: int, w: torch.Tensor, keys: set[str], options: argparse.Namespace
) -> dict[str, tuple[int, list[int]]]:
    """Peak bytes of a run of all steps, and the lengths of the runs that it follows from, by mode."""
    # What "auto" keeps does not grow in proportion to the steps.
    lengths = [2, 3] if num_steps > 3 and "auto" not in options.memory_budget else [num_steps]
    found: dict[str, list[int]] = {}
    for steps in lengths:
        path = published_path(2.0 * case.x - 1.0, t=t, steps=steps, forward_noising=False, entropy=options.seed)
        for mode in (mode for mode in _modes(case, path, t, options) if mode.key in keys):
            if mode.name in OURS:
                _pass_through(mode, case.x, w)  # a first call looks at the networks
            for network in (case.networks.score, case.networks.classifier):
                network.zero_grad(set_to_none=True)
            peak = peak_bytes(lambda mode=mode: _pass_through(mode, case.x, w), case.x.device)
            found.setdefault(mode.key, []).append(peak)
    return {key: (peaks[-1] + (num_steps - lengths[-1]) * (peaks[-1] - peaks[0]), lengths) for key, peaks in found.items()}


def _pass_through(mode: _Mode, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The gradient of ⟨w, purified image⟩ with respect to the image."""
    image = x.clone().requires_grad_()
    return torch.autograd.grad(mode.purify(image), image, w)[0]


def float64_gradients(case: Case, path: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The discrete gradients in float64, with and without the guidance's Hessian, and the cotangent w in float32."""
    networks, x = case.networks, case.x.double()
    with torch.no_grad():
        label = networks.classifier64(x).argmax(dim=1)
    gradients = {}
    w = torch.empty(0)
    for name in OURS:
        image = x.clone().requires_grad_()
        purified = discrete_adjoint(
            image, networks.score64, networks.classifier64, path, differentiate_guidance=name == "exact"
        )
        if not gradients:
            point = purified.detach().requires_grad_()
            loss = nn.functional.cross_entropy(networks.classifier64(point), label, reduction="sum")
            (w,) = torch.autograd.grad(loss, point)
            # In float32 from here on, so that every mode has the same.
            w = (w / w.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()).float()
        (gradients[name],) = torch.autograd.grad(purified, image, w.double())
    return gradients, w


def eager_rounding(
    case: Case, path: Path, w: torch.Tensor, truth: torch.Tensor, rounding: dict[str, float]
) -> float:
    """The error that float32 back-propagation makes; the measure of all engines'."""
    for key in ("back-propagation (torchsde)", "double-backward (eager)"):
        if key in rounding:
            return rounding[key]
    score, classifier = frozen(case.networks.score), frozen(case.networks.classifier)
    image = case.x.clone().requires_grad_()
    (v,) = torch.autograd.grad(discrete_adjoint(image, score, classifier, path), image, w)
    return relative_error(v, truth)


def relative_error(v: torch.Tensor, v64: torch.Tensor) -> float:
    v, v64 = v.double().flatten(1), v64.flatten(1)
    return float(((v - v64).norm(dim=1) / v64.norm(dim=1)).mean())


def _agreement(v: torch.Tensor, v64: torch.Tensor) -> dict[str, float]:
    """How near gradients, one a row, are to those they should be."""
    return {
        "rel_error": relative_error(v, v64),
        "cosine": float(torch.nn.functional.cosine_similarity(v, v64).mean()),
        "sign_agreement": float((v.sign() == v64.sign()).double().mean()),
    }


def _measured(mode: _Mode, case: Case, t: float, num_steps: int, steps: int) -> dict[str, Any]:
    """What was measured, `steps` of `num_steps`."""
    return {
        "mode": mode.name,
        "engine": mode.engine,
        "network": case.networks.name,
        "t": t,
        "num_steps": num_steps,
        "steps_timed": steps,
        "scaled": steps < num_steps,
        "batch": len(case.x),
    }


def _line(row: dict[str, Any]) -> str:
    head = f"{row['mode']:24} {row['engine']:9} {row['memory_budget'] or '':11} t={row['t']:g} B={row['batch']}"
    errors = f"rel. error {row['rel_error']:.2e}, cosine {row['cosine']:.6f}, signs {100 * row['sign_agreement']:.2f} %"
    if not row["within_contract"]:
        return f"{head} OVER ITS CONTRACT, no times: {errors}, rounding {row['rounding']:.1e}"
    ratios = _ratios(row)
    scaled = f"  [scaled from {row['steps_timed']} of {row['num_steps']} steps]" if row["scaled"] else ""
    seconds = f"{row['seconds_per_image']:.4g} ± {row['spread']:.2g} s/image"
    if row["host_seconds_per_image"] is not None:
        seconds += f" (host {row['host_seconds_per_image']:.4g})"
    if row["launches_per_step"] is not None:
        seconds += f", {row['launches_per_step']:.0f} launches of {row['kernels_per_step']:.0f} kernels a step"
    if row["share_of_matmul"] is not None:
        seconds += f", {row['share_of_matmul']:.0%} of a matrix product's rate"
    return f"{head} {seconds}  {row['peak_bytes'] / 2**20:.0f} MiB  {ratios}  {errors}{scaled}"


def _ratios(row: dict[str, Any]) -> str:
    names = BASELINES | {"ratio_to_eager_engine": "eager engine"}
    return "  ".join(f"{row[field]:.2f}x {name}" for field, name in names.items() if row[field] is not None)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and check the gradient of a purification.")
    add_case_options(parser, images=None)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: all")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), help="of exact and detached; default: all here")
    parser.add_argument(
        "--memory-budget",
        nargs="+",
        choices=["slopes", "least", "activations", "auto"],
        default=["slopes"],
        help="what exact and detached keep, a row each: every state and every ReLU's slope as a bit (default), states only, "
        "all activations of the steps that are timed, or what fits",
    )
    parser.add_argument(
        "--truth",
        choices=["float64", "exact"],
        default="float64",
        help="what errors are measured against; exact: eager's own float32 gradient, without memory, for whole runs and large "
        "batches of large networks, whose float64 gradient takes hours (default: float64)",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
