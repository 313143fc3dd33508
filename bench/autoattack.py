"""What an attack on COUP takes with the published gradient and with ours, and what it finds: `python bench/autoattack.py`.

APGD-CE from pyautoattack, unmodified, on the same images from the same starting points. The contenders:

* `published`: COUP as its code runs it, in steps of 1e-3 through torchsde's `sdeint_adjoint` with every parameter's gradient
  integrated, but without the clips around it, which the rows below leave out, too;
* `published-frozen`: the same with frozen networks and `adjoint_params=()`;
* `exact`, `detached`: `coupfast.PurifiedClassifier` with that guidance gradient, one row per engine.

Before anything is timed, every engine takes two steps of a published run's path, there and back, on the first image: its
images must be those of the published code and its gradient that of the definition in float64, both to rounding, as
`speed.py` and `gradient.py` ask for it. One that misses that has no times, and the command exits with 1.

Contenders take turns, `--repeats` times, and a ratio is the median of the repeats' ratios. Their noise is not the same path
(the published code draws it from torchsde's Brownian interval), so what they attack is not, either: APGD leaves images alone
that its first look finds misclassified. `images_attacked`, `forward_images` and `gradient_images` (images through the
defense, without and with a gradient) say what was done, and beside the whole attack's `seconds` and `ratio_to_published`
there are those of one purification, whichever kind it is: `seconds_per_purification` and `ratio_per_purification`.

What they find is compared on fresh draws of one judge, the eager engine, at the point where the attack saw the highest mean
loss (APGD itself returns an image as it came where it saw no failure): `robust_average`, `robust_worst`, and
`equal_to_published`, the share of images with the same verdict in the majority of draws.

Where the attack's first iterations or a purification's first steps only are run (`scaled: true`; the default for the paper's
networks), `seconds` is what ran, scaled by (iterations + 1) / (timed + 1) and by the steps (for torchsde's forward pass, which
evaluates the drift once more than it takes steps, that overstates the ratio by at most 1 / timed). Verdicts are of what ran.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from cases import (
    Case,
    add_case_options,
    engines_here,
    largest_difference,
    load_case,
    markdown,
    published_path,
    purifier_on,
    steps_to_time,
    write_results,
)
from gradient import CONTRACT, FLIPPED_RELU, eager_rounding, float64_gradients, relative_error
from speed import definition
from timing import Summary, interleave, timed, times_faster
from torch import nn

import coupfast
from coupfast.data import load_images
from coupfast.engine.networks import frozen
from coupfast.evaluation.attacks.autoattack import APGD
from coupfast.evaluation.attacks.base import Result
from coupfast.evaluation.metered import Metered
from coupfast.evaluation.protocols import wilson_interval
from coupfast.reference import purify_published
from coupfast.sde import parity_grid

METHOD = "coup"
OURS = ("exact", "detached")
CONTENDERS = ("published", "published-frozen", *OURS)
PARITY_STEPS = 2
COLUMNS = (
    *("contender", "engine", "network", "t", "images", "iterations", "eot_iter", "scaled", "seconds", "ratio_to_published"),
    *("images_attacked", "forward_images", "gradient_images", "seconds_per_purification", "ratio_per_purification"),
    *("robust_average", "robust_worst", "robust_majority", "equal_to_published", "within_contract", "device", "torch"),
)


class Published(nn.Module):
    """COUP's published code and a classifier: images → logits, a fresh path a call.

    Args:
        score, classifier: As given: with parameters that require gradients, their integrals are computed.
        t, t_end: From where to where.
        adjoint_params: "all" or "none".
    """

    def __init__(self, score: nn.Module, classifier: nn.Module, t: float, t_end: float, adjoint_params: Any) -> None:
        super().__init__()
        self.score, self.classifier = score, classifier
        self.t, self.t_end, self.adjoint_params = t, t_end, adjoint_params
        self.calls = 0
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x_k = purify_published(
            2.0 * x - 1.0,
            self.score,
            self.classifier,
            t=self.t,
            t_end=self.t_end,
            adjoint_params=self.adjoint_params,
            entropy=self.calls,
        )
        return self.classifier((x_k + 1.0) * 0.5)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.iterations_timed is None:
        options.iterations_timed = 1 if options.network == "paper" and not options.full else options.iterations
    options.iterations_timed = min(options.iterations_timed, options.iterations)
    case = load_case(options)
    engines, skipped = engines_here(case)
    print(case)
    rows = [row for t in options.t for row in _rows(case, t, engines, options)]
    if options.json:
        write_results(options.json, rows, case, options, engines_that_do_not_run_here=skipped)
    if options.markdown:
        print(markdown(rows, COLUMNS))
    return 0 if all(row["within_contract"] for row in rows) else 1


def _rows(case: Case, t: float, engines: Sequence[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    grid = parity_grid(t)
    num_steps = len(grid) - 1
    steps = steps_to_time(options, num_steps)
    grid = grid[: steps + 1]
    networks, x = case.networks, case.x
    y = _labels(case)
    score, classifier = frozen(networks.score), frozen(networks.classifier)

    def ours(engine: str, guidance_gradient: str) -> nn.Module:
        options_ = {"engine": engine, "guidance_gradient": guidance_gradient, "memory_budget": "least"}
        purifier = purifier_on(grid, networks, METHOD, **options_)
        return coupfast.PurifiedClassifier(purifier, networks.classifier, seed=options.seed)

    t_end = float(grid[-1])
    models: dict[tuple[str, str], nn.Module] = {
        ("published", "torchsde"): Published(networks.score, networks.classifier, t, t_end, "all"),
        ("published-frozen", "torchsde"): Published(score, classifier, t, t_end, "none"),
        **{(name, engine): ours(engine, name) for name in OURS for engine in engines},
    }
    defenses = {key: Metered(model) for key, model in models.items() if key[0] in options.contenders}
    broken = _over_their_contract(case, t, [key for key in defenses if key[0] in OURS], options.seed)
    sound = [key for key in defenses if key not in broken]
    attack = APGD("Linf", options.eps / 255, iterations=options.iterations_timed, eot_iter=options.eot_iter)

    def measure(key: tuple[str, str]) -> tuple[float, Result]:
        """One attack, from the same noise every time."""
        defense = defenses[key]
        _from_the_start(defense)
        with torch.random.fork_rng():
            return timed(lambda: attack.run(defense, x, y, seed=options.seed), x.device)

    for key in sound:
        image = x.clone().requires_grad_()
        torch.autograd.grad(defenses[key](image).sum(), image)  # warms up, and looks at the networks
    turns = interleave({" ".join(key): lambda key=key: measure(key) for key in sound}, options.repeats)
    judge = ours("eager", "exact")
    clean = float(_right(judge, x, y, options.draws).float().mean())
    steps_factor, factor = num_steps / steps, (options.iterations + 1) / (options.iterations_timed + 1) * num_steps / steps
    rows: list[dict[str, Any]] = []
    seconds: dict[tuple[str, str], list[float]] = {}
    each: dict[tuple[str, str], list[float]] = {}
    published: dict[str, Any] | None = None
    for key, defense in defenses.items():
        row = {
            "contender": key[0],
            "engine": key[1],
            "network": networks.name,
            "t": t,
            "num_steps": num_steps,
            "steps_timed": steps,
            "images": len(x),
            "iterations": options.iterations,
            "iterations_timed": options.iterations_timed,
            "eot_iter": options.eot_iter,
            "scaled": factor != 1,
            "repeats": options.repeats,
            "within_contract": key in sound,
            **case.machine_fields(),
        }
        rows.append(row)
        if key not in sound:
            print(f"{key[0]:17} {key[1]:9} OVER ITS CONTRACT, no times: {broken[key]}", flush=True)
            continue
        samples, results = zip(*turns[" ".join(key)], strict=True)
        seconds[key] = [factor * sample for sample in samples]
        purifications = defense.forward_images + defense.gradient_images
        each[key] = [steps_factor * sample / purifications for sample in samples]
        baseline = ("published", "torchsde") if key[0] != "published" else None
        result = results[-1]
        assert result.strongest is not None and result.loss is not None
        right = _right(judge, result.strongest, y, options.draws)
        majority = right.float().mean(dim=0) > 0.5
        whole, one = Summary.of(seconds[key]), Summary.of(each[key])
        row |= {
            "seconds": whole.median,
            "spread": whole.spread,
            "ratio_to_published": times_faster(seconds.get(baseline), seconds[key]) if baseline else None,
            "images_attacked": int((result.loss > -float("inf")).sum()),
            "forward_images": defense.forward_images,
            "gradient_images": defense.gradient_images,
            "seconds_per_purification": one.median,
            "ratio_per_purification": times_faster(each.get(baseline), each[key]) if baseline else None,
            "draws": options.draws,
            "clean_average": clean,
            "robust_average": float(right.float().mean()),
            "robust_worst": float(right.all(dim=0).float().mean()),
            "robust_majority": float(majority.float().mean()),
            "robust_majority_wilson_95": wilson_interval(int(majority.sum()), len(x)),
            "majority": majority.tolist(),
            "equal_to_published": None
            if published is None
            else float((majority == torch.tensor(published["majority"])).float().mean()),
        }
        published = row if key[0] == "published" else published
        print(_line(row), flush=True)
    return rows


def _from_the_start(defense: Metered) -> None:
    """Its noise and its counts, as at the first call."""
    defense.reset()
    if isinstance(defense.model, Published):
        defense.model.calls = 0
    else:
        assert isinstance(defense.model, coupfast.PurifiedClassifier)
        defense.model.next_draw = 0


def _over_their_contract(
    case: Case, t: float, keys: Sequence[tuple[str, str]], seed: int
) -> dict[tuple[str, str], str]:
    """Which of ours do not compute what the published code and the definition do, and by how much, in words."""
    networks, first = case.networks, Case(case.networks, case.images, case.x[:1], case.machine)
    steps = min(PARITY_STEPS, len(parity_grid(t)) - 1)
    path = published_path(2.0 * first.x - 1.0, t=t, steps=steps, forward_noising=False, entropy=seed)
    truth, allowance = definition(networks, METHOD, first.x, path.noise, path.grid)
    with torch.no_grad():
        x_k = purify_published(2.0 * first.x - 1.0, networks.score, networks.classifier, t=t, t_end=path.t_end, entropy=seed)
    allowed = CONTRACT * largest_difference((x_k + 1.0) * 0.5, truth) + allowance
    gradients, w = float64_gradients(first, path)
    rounding = max(
        CONTRACT * eager_rounding(first, path, w, gradients["exact"], {}), FLIPPED_RELU if networks.relus_may_flip else 0.0
    )
    broken = {}
    for name, engine in keys:
        purifier = purifier_on(path.grid, networks, METHOD, engine=engine, guidance_gradient=name, memory_budget="least")
        image = first.x.clone().requires_grad_()
        purified = purifier(image, noise=path.noise)
        difference = largest_difference(purified.detach(), truth)
        error = relative_error(torch.autograd.grad(purified, image, w)[0], gradients[name])
        # Written so that NaN does not pass.
        if not (difference <= allowed and error <= rounding):
            broken[name, engine] = (
                f"images differ by {difference:.1e} (allowed {allowed:.1e}), gradients by {error:.1e} ({rounding:.1e})"
            )
    return broken


def _labels(case: Case) -> torch.Tensor:
    """True labels; for images without any, what the classifier says."""
    y = load_images(case.images, limit=len(case.x))[1] if case.images != "random" else None
    if y is not None:
        return y.to(case.x.device)
    with torch.no_grad():
        return case.networks.classifier(case.x).argmax(dim=1)


def _right(judge: nn.Module, x: torch.Tensor, y: torch.Tensor, draws: int) -> torch.Tensor:
    """(draws, images) bool, on draws that no attack has seen: those count up from 0."""
    with torch.no_grad():
        return torch.stack([judge(x, draw=2**31 + draw).argmax(dim=1) == y for draw in range(draws)]).cpu()


def _line(row: dict[str, Any]) -> str:
    scaled = ""
    if row["scaled"]:
        scaled = (
            f"  [scaled from {row['iterations_timed']} of {row['iterations']} iterations, {row['steps_timed']} of "
            f"{row['num_steps']} steps]"
        )
    ratio, each = (
        f", {row[field]:.2f}x published" if row[field] else "" for field in ("ratio_to_published", "ratio_per_purification")
    )
    equal = "" if row["equal_to_published"] is None else f", equal to published's {100 * row['equal_to_published']:.0f} %"
    low, high = row["robust_majority_wilson_95"]
    average, worst, majority = (100 * row[f"robust_{name}"] for name in ("average", "worst", "majority"))
    return (
        f"{row['contender']:17} {row['engine']:9} {row['seconds']:.4g} ± {row['spread']:.2g} s{ratio}; "
        f"{row['images_attacked']} of {row['images']} images attacked, EOT {row['eot_iter']}, {row['forward_images']} + "
        f"{row['gradient_images']} purifications of {row['seconds_per_purification']:.3g} s{each}; robust: "
        f"average {average:.1f} %, worst of {row['draws']} {worst:.1f} %, majority {majority:.1f} % "
        f"[{100 * low:.0f}, {100 * high:.0f}]{equal}{scaled}"
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time an attack on COUP, as published and ours, and compare what it finds.")
    add_case_options(parser, images=None)
    parser.set_defaults(repeats=1)  # an attack is long
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="default: all")
    parser.add_argument("--iterations", type=int, default=10, help="of APGD-CE (default 10)")
    parser.add_argument("--iterations-timed", type=int, help="run so many and scale (default: all; paper's networks: 1)")
    parser.add_argument("--eot-iter", type=int, default=1, help="gradients averaged an iteration (default 1)")
    parser.add_argument("--eps", type=float, default=8.0, help="Linf radius in 1/255 (default 8)")
    parser.add_argument("--draws", type=int, default=10, help="fresh draws that judge every image (default 10)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
