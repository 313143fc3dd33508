"""What the error of torchsde's continuous adjoint depends on: `python bench/adjoint_error.py --json FILE`.

COUP on the shipped trained networks, on the first images of CIFAR-10's test set that the demo has. The gradient of the summed
cross-entropy of the purified, clipped images with respect to the images, by torchsde's `sdeint_adjoint` with the guidance
detached, as COUP's code has it, against the exact gradient of the same forward steps on the same noise, guidance and Hessian
included. Times, σ and noise are in float64, networks in float32 (`--dtype float64` tells what that rounds). Of each image, then
averaged: `cosine`, `rel_error` = |v − v*| / |v*|, and `sign_agreement`, the share of pixels whose gradient has the right sign.
The rows:

* `steps`: `--num-steps` equal ones, and those of published code (1e-3, the last one shorter). The backward pass walks the
  forward grid back (`purify_ref(adjoint="frozen")`, which is `gradient="adjoint"` of a purifier). `after_first_step` has the
  first of the backward steps, the one that starts at t_end, replaced by the exact one (its state and its gradient).
* `end`: steps of 1e-3 that end at `--t-end`, from the first `--t`. `stiffness` is h β/σ² of the first backward step: where the
  score is that of noise of width σ around an image, that step multiplies v by about 1 − h β/σ².
* `shifted`, beside the published steps: what published code (`purify_published`) does, which steps back by 1e-3 from t = 1e-5,
  so that its backward grid lies beside the forward one, on the same Brownian path. Time is in float64 here, so that
  `rel_difference` = |v − v'| / |v'|, with v' the gradient that walks the forward grid back, is the shift's doing.
* `float32`: published code in float32, as published, from the first `--t`: with its rounding of time and of σ, which
  `walked_back` and the truth, on its times and increments, do not have.

Every row has a Brownian path of its own, from one seed. Nothing is printed, and the exit status is 1, unless on one image, in
float64 and to rounding: the exact gradient is that of `coupfast.purify(gradient="exact")`, the continuous adjoint that of
`gradient="adjoint"`, and published code on a grid that ends on a whole step is `purify_ref(adjoint="frozen")`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import kept
import numpy as np
import torch
import torchsde
from torch import nn
from tqdm import tqdm

import coupfast
from coupfast.data import load_images
from coupfast.models.checkpoints import state_dict_sha256
from coupfast.reference import purify_published, purify_ref
from coupfast.sde import DT_REFERENCE, T_END, VPSDE, parity_grid, time_grid

PARITY = 1e-10  # relative, in float64: roundings, which an adjoint that starts at t = 1e-5 magnifies by some hundreds
PARITY_T = 0.06  # three steps from there tell


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """Frozen networks and images in [0, 1] of one dtype, and labels."""

    score: nn.Module
    classifier: nn.Module
    x: torch.Tensor
    y: torch.Tensor

    def loss(self, x_k: torch.Tensor) -> torch.Tensor:
        """The summed cross-entropy of purified, clipped images; x_k in the [-1, 1] scale."""
        return nn.functional.cross_entropy(self.classifier((x_k.clamp(-1.0, 1.0) + 1.0) * 0.5), self.y, reduction="sum")

    def cotangent(self, x_k: torch.Tensor) -> torch.Tensor:
        point = x_k.detach().requires_grad_()
        return torch.autograd.grad(self.loss(point), point)[0]

    def to(self, dtype: torch.dtype) -> Case:
        score, classifier = (copy.deepcopy(network).to(dtype) for network in (self.score, self.classifier))
        return Case(score, classifier, self.x.to(dtype), self.y)

    def first(self) -> Case:
        return dataclasses.replace(self, x=self.x[:1], y=self.y[:1])


@dataclasses.dataclass(frozen=True, eq=False)
class Exact:
    """The exact gradient v of a run with respect to its first state, and what it went through.

    Attributes:
        v: With respect to x_0.
        w: With respect to x_K: where every gradient of the same run begins.
        x_last, v_last: The state before the last step, and the gradient with respect to it.
    """

    v: torch.Tensor
    w: torch.Tensor
    x_last: torch.Tensor
    v_last: torch.Tensor


def exact(case: Case, grid: np.ndarray, noise: torch.Tensor) -> Exact:
    """Back-propagation through the definition, one step rebuilt at a time."""

    def step(x_k: torch.Tensor, k: int) -> torch.Tensor:
        return purify_ref(x_k, case.score, case.classifier, noise[k : k + 1], grid=grid[k : k + 2])

    states = [2.0 * case.x - 1.0]
    with torch.no_grad():
        for k in range(len(grid) - 1):
            states.append(step(states[-1], k))
    v = w = case.cotangent(states[-1])
    v_last = v
    for k in reversed(range(len(grid) - 1)):
        x_k = states[k].requires_grad_()
        (v,) = torch.autograd.grad(step(x_k, k), x_k, v)
        v_last = v if k == len(grid) - 2 else v_last
    return Exact(v, w, states[-2].detach(), v_last)


def walked_back(case: Case, grid: np.ndarray, noise: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """torchsde's continuous adjoint on the forward run's own grid, the guidance detached; from w at the end of it."""
    x_0 = (2.0 * case.x - 1.0).requires_grad_()
    x_k = purify_ref(x_0, case.score, case.classifier, noise, grid=grid, detached=True, adjoint="frozen")
    return torch.autograd.grad(x_k, x_0, w)[0]


def published(case: Case, *, t: float, t_end: float, entropy: int, dtype: torch.dtype, w: torch.Tensor) -> torch.Tensor:
    """The same by published code, in `dtype`."""
    case = case.to(dtype)
    x_0 = (2.0 * case.x - 1.0).requires_grad_()
    x_k = purify_published(x_0, case.score, case.classifier, t=t, t_end=t_end, adjoint_params="none", entropy=entropy)
    return torch.autograd.grad(x_k, x_0, w.to(dtype))[0]


def steps_to(t: float, t_end: float) -> np.ndarray:
    """Steps of 1e-3 from t to t_end, the last one shorter."""
    grid = time_grid(t)
    return np.append(grid[grid > t_end + 1e-9], t_end)


def float64_grid(t: float, t_end: float) -> np.ndarray:
    """The times at which published code stands in float64: s = 1 − t, steps added up, the last one cut."""
    s, end = [1.0 - t], 1.0 - t_end
    while s[-1] < end:
        s.append(min(s[-1] + DT_REFERENCE, end))
    return 1.0 - np.asarray(s)


class Brownian:
    """One path of W over s = 1 − t: increments on any grid, as standard normal noise.

    Args:
        x: Images whose path it is.
        t, t_end: From where to where.
        entropy: Its seed.
        dtype: That the path is drawn in; the noise is float64.
    """

    def __init__(self, x: torch.Tensor, t: float, t_end: float, entropy: int, dtype: torch.dtype = torch.float64) -> None:
        s = torch.tensor([1.0 - t, 1.0 - t_end], dtype=dtype)
        self.shape, self.dtype = x.shape, dtype
        self.interval = torchsde.BrownianInterval(s[0], s[1], size=x.flatten(1).shape, dtype=dtype, entropy=entropy)

    def noise(self, grid: np.ndarray) -> torch.Tensor:
        """Standard normal, float64, shape (steps, *x.shape)."""
        s = torch.from_numpy(1.0 - grid).to(self.dtype)
        rows = [self.interval(a, b).double().view(self.shape) / (b - a).double().sqrt() for a, b in pairwise(s)]
        return torch.stack(rows)


def errors(v: torch.Tensor, truth: torch.Tensor) -> dict[str, Any]:
    v, truth = v.double().flatten(1), truth.double().flatten(1)
    cosine = nn.functional.cosine_similarity(v, truth)
    return {
        "cosine": float(cosine.mean()),
        "cosine_least": float(cosine.min()),
        "cosine_most": float(cosine.max()),
        "rel_error": float(relative(v, truth).mean()),
        "sign_agreement": float((v.sign() == truth.sign()).double().mean()),
    }


def relative(v: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """|v − truth| / |truth|, (batch,)."""
    v, truth = v.double().flatten(1), truth.double().flatten(1)
    return (v - truth).norm(dim=1) / truth.norm(dim=1)


def walk_row(case: Case, grid: np.ndarray, entropy: int, *, steps: str) -> dict[str, Any]:
    """`steps`: "equal", "published" or "cut" (those of 1e-3, which end before t = 1e-5)."""
    t, t_end, h = float(grid[0]), float(grid[-1]), float(grid[-2] - grid[-1])
    noise = Brownian(case.x, t, t_end, entropy).noise(grid).to(case.x.dtype)
    found = exact(case, grid, noise)
    v = walked_back(case, grid, noise, found.w)
    row = {
        "t": t,
        "num_steps": len(grid) - 1,
        "t_end": t_end,
        "steps": steps,
        "stiffness": float(h * VPSDE().beta(t_end) / VPSDE().sigma(t_end) ** 2),
        **errors(v, found.v),
    }
    if steps != "cut" and len(grid) > 2:
        row["after_first_step"] = errors(walked_back(case, grid[:-1], noise[:-1], found.v_last), found.v)
    if steps == "published":
        shifted = published(case, t=t, t_end=t_end, entropy=entropy, dtype=torch.float64, w=found.w)
        row["shifted"] = {**errors(shifted, found.v), **differences(shifted, v)}
    return row


def float32_row(case: Case, t: float, entropy: int) -> dict[str, Any]:
    grid = parity_grid(t)
    noise = Brownian(case.x, t, T_END, entropy, torch.float32).noise(grid).to(case.x.dtype)
    found = exact(case, grid, noise)
    back = walked_back(case, grid, noise, found.w)
    v = published(case, t=t, t_end=T_END, entropy=entropy, dtype=torch.float32, w=found.w)
    return {
        "t": t,
        "num_steps": len(grid) - 1,
        "t_end": float(grid[-1]),
        "steps": "published",
        "walked_back": errors(back, found.v),
        "shifted": {**errors(v, found.v), **differences(v, back)},
    }


def differences(v: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    each = relative(v, other)
    return {
        "rel_difference": float(each.mean()),
        "rel_difference_least": float(each.min()),
        "rel_difference_most": float(each.max()),
    }


def parity(case: Case, seed: int) -> dict[str, float]:
    """Relative differences of what must be equal but for rounding, on one image."""
    case, t = case.first().to(torch.float64), PARITY_T
    grid = time_grid(t, 3)
    noise = Brownian(case.x, t, T_END, seed).noise(grid)
    found = exact(case, grid, noise)

    def through(**options: Any) -> torch.Tensor:
        x = case.x.clone().requires_grad_()
        purified = coupfast.purify(
            x, case.score, case.classifier, t=t, num_steps=3, engine="eager", noise=noise, clamp=True, **options
        )
        assert isinstance(purified, torch.Tensor)
        loss = nn.functional.cross_entropy(case.classifier(purified), case.y, reduction="sum")
        return torch.autograd.grad(loss, x)[0] / 2.0  # with respect to [-1, 1]

    adjoint = through(gradient="adjoint", guidance_gradient="detached")
    whole = float64_grid(t, t - 3 * DT_REFERENCE)[:4]
    t_end = float(whole[-1])
    replayed = Brownian(case.x, t, t_end, seed).noise(whole)
    ended = exact(case, whole, replayed)
    same = published(case, t=t, t_end=t_end, entropy=seed, dtype=torch.float64, w=ended.w)
    return {
        "exact": float(relative(through(gradient="exact"), found.v).max()),
        "adjoint": float(relative(adjoint, walked_back(case, grid, noise, found.w)).max()),
        "published": float(relative(same, walked_back(case, whole, replayed, ended.w)).max()),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    torch.set_num_threads(options.threads)
    x, y = load_images("cifar10-20", limit=options.images)
    assert y is not None
    networks = coupfast.load_score("cifar10-tiny"), coupfast.load_classifier("cifar10-tiny")
    case = Case(*(copy.deepcopy(network).requires_grad_(False) for network in networks), x, y)
    case = case.to(getattr(torch, options.dtype))
    settings = {
        "images": len(x),
        "t": options.t,
        "num_steps": options.num_steps,
        "t_end": options.t_end,
        "dtype": options.dtype,
        "seed": options.seed,
        "weights": dict(zip(("score", "classifier"), map(state_dict_sha256, networks), strict=True)),
    }
    results = kept.load(options.json, settings, parity=None, rows={})
    if results["parity"] is None:
        results["parity"] = parity(case, options.seed)
    if not all(difference < PARITY for difference in results["parity"].values()):
        print(f"relative differences over {PARITY:g} of what should be equal: {results['parity']}; nothing was measured")
        return 1
    for name, run in tqdm(planned(case, options).items(), desc="runs"):
        if name not in results["rows"]:
            results["rows"][name] = run()
            kept.save(options.json, results)
    report(results["rows"], options)
    return 0


def planned(case: Case, options: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every row's name and its run."""

    def walk(grid: np.ndarray, steps: str) -> Callable[[], dict[str, Any]]:
        return lambda: walk_row(case, grid, options.seed, steps=steps)

    runs: dict[str, Callable[[], dict[str, Any]]] = {}
    for t in options.t:
        for num_steps in options.num_steps:
            runs[f"t {t:g}, {num_steps} equal steps"] = walk(time_grid(t, num_steps), "equal")
        grid = float64_grid(t, T_END)
        runs[f"t {t:g}, {len(grid) - 1} published steps"] = walk(grid, "published")
    first = options.t[0]
    for t_end in options.t_end:
        runs[f"t {first:g}, steps of 1e-3 to {t_end:g}"] = walk(steps_to(first, t_end), "cut")
    runs[f"t {first:g}, published code in float32"] = lambda: float32_row(case, first, options.seed)
    return runs


def report(rows: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    def line(name: str, found: dict[str, Any], more: str = "") -> None:
        print(
            f"{name:48s} cosine {found['cosine']:.4f} [{found['cosine_least']:.3f}, {found['cosine_most']:.3f}]  "
            f"rel. error {found['rel_error']:.3f}  signs {found['sign_agreement']:.1%}{more}"
        )

    print(f"torchsde's continuous adjoint against the exact gradient, COUP, cifar10-tiny, {options.images} images, means:")
    for name, row in rows.items():
        walked = row.get("walked_back", row)
        line(name, walked, f"  h β/σ² {row['stiffness']:.3g}" if "stiffness" in row else "  forward grid walked back")
        if "after_first_step" in row:
            line("    its first backward step exact", row["after_first_step"])
        if "shifted" in row:
            shifted = row["shifted"]
            mean, low, high = (shifted[f"rel_difference{end}"] for end in ("", "_least", "_most"))
            line("    backward grid as published", shifted, f"  differs by {mean:.2%} [{low:.2%}, {high:.2%}]")


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=int, default=8, help="of the 20 CIFAR-10 test images (default: %(default)s)")
    add("--t", type=float, nargs="+", default=[0.06, 0.1], help="purification times in (1e-5, 1] (default: 0.06 0.1)")
    add("--num-steps", type=int, nargs="+", default=[20], help="equal steps, beside published ones of 1e-3 (default: 20)")
    add(
        "--t-end",
        type=float,
        nargs="+",
        default=[1e-4, 1e-3, 1e-2],
        help="times at which the grid ends, in [1e-5, t) (default: 1e-4 1e-3 1e-2, beside 1e-5, where published code ends)",
    )
    add("--dtype", choices=["float32", "float64"], default="float32", help="of the networks (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the Brownian path (default: %(default)s)")
    add("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    add("--json", type=Path, help="write rows to this file, and go on from it if it is there")
    options = parser.parse_args(arguments)
    if not all(T_END <= t_end < options.t[0] for t_end in options.t_end):
        parser.error(f"a grid ends in [{T_END:g}, {options.t[0]:g}), before the first --t, got --t-end {options.t_end}")
    return options


if __name__ == "__main__":
    sys.exit(main())
