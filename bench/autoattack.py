"""What an attack on COUP takes with the published gradient and with ours, and what it finds: `python bench/autoattack.py`.

APGD-CE from pyautoattack, unmodified, on the same images from the same starting points. The contenders:

* `published`: COUP as its code runs it, through torchsde's `sdeint_adjoint` with every parameter's gradient integrated;
* `published-frozen`: the same with frozen networks and `adjoint_params=()`;
* `exact`, `detached`: `coupfast.PurifiedClassifier` with that guidance gradient, one row per engine.

Their noise is not the same path (the published code draws it from torchsde's Brownian interval), so what they find is
compared on fresh draws of one judge, the eager engine: `robust_average`, `robust_worst`, and `equal_to_published`, the share of
images with the same verdict in the majority of draws.

Where the attack's first iterations or a purification's first steps only are run (`scaled: true`; the default for the paper's
networks), `seconds` is what ran, scaled by (iterations + 1) / (timed + 1) and by the steps (for torchsde's forward pass, which
evaluates the drift once more than it takes steps, that overstates the ratio by at most 1 / timed). Verdicts are of what ran.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from cases import Case, add_case_options, engines_here, load_case, purifier_on, steps_to_time, write_results
from timing import times_faster
from torch import nn

import coupfast
from coupfast.data import load_images
from coupfast.engine.networks import frozen
from coupfast.evaluation.attacks.autoattack import APGD
from coupfast.evaluation.defense import Defense
from coupfast.evaluation.protocols import wilson_interval
from coupfast.reference import purify_published
from coupfast.sde import parity_grid

METHOD = "coup"
OURS = ("exact", "detached")
CONTENDERS = ("published", "published-frozen", *OURS)


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
    return 0


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
    builders: dict[tuple[str, str], Callable[[], nn.Module]] = {
        ("published", "torchsde"): lambda: Published(networks.score, networks.classifier, t, t_end, "all"),
        ("published-frozen", "torchsde"): lambda: Published(score, classifier, t, t_end, "none"),
        **{(name, engine): lambda n=name, e=engine: ours(e, n) for name in OURS for engine in engines},
    }
    builders = {key: build for key, build in builders.items() if key[0] in options.contenders}
    judge = ours("eager", "exact")
    clean = float(_right(judge, x, y, options.draws).float().mean())
    attack = APGD("Linf", options.eps / 255, iterations=options.iterations_timed, eot_iter=options.eot_iter)
    factor = (options.iterations + 1) / (options.iterations_timed + 1) * num_steps / steps
    rows: list[dict[str, Any]] = []
    for (name, engine), build in builders.items():
        defense = Defense(build())
        image = x.clone().requires_grad_()
        torch.autograd.grad(defense(image).sum(), image)  # warms up, and looks at the networks
        with torch.random.fork_rng():
            started = time.perf_counter()
            x_adv = attack.run(defense, x, y, seed=options.seed).x_adv
            seconds = factor * (time.perf_counter() - started)
        right = _right(judge, x_adv, y, options.draws)
        majority = right.float().mean(dim=0) > 0.5
        published = rows[0] if rows and rows[0]["contender"] == "published" else None
        rows.append(
            {
                "contender": name,
                "engine": engine,
                "network": networks.name,
                "t": t,
                "num_steps": num_steps,
                "steps_timed": steps,
                "images": len(x),
                "iterations": options.iterations,
                "iterations_timed": options.iterations_timed,
                "eot_iter": options.eot_iter,
                "scaled": factor != 1,
                "seconds": seconds,
                "ratio_to_published": times_faster([published["seconds"]] if published else None, [seconds]),
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
                **case.machine_fields(),
            }
        )
        print(_line(rows[-1]), flush=True)
    return rows


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
    ratio = f"  {row['ratio_to_published']:.2f}x published" if row["ratio_to_published"] else ""
    equal = "" if row["equal_to_published"] is None else f", equal to published's {100 * row['equal_to_published']:.0f} %"
    low, high = row["robust_majority_wilson_95"]
    average, worst, majority = (100 * row[f"robust_{name}"] for name in ("average", "worst", "majority"))
    return (
        f"{row['contender']:17} {row['engine']:9} {row['seconds']:.4g} s{ratio}  {row['images']} images, EOT "
        f"{row['eot_iter']}; robust: average {average:.1f} %, worst of {row['draws']} {worst:.1f} %, majority {majority:.1f} % "
        f"[{100 * low:.0f}, {100 * high:.0f}]{equal}{scaled}"
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time an attack on COUP, as published and ours, and compare what it finds.")
    add_case_options(parser, images=None)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="default: all")
    parser.add_argument("--iterations", type=int, default=10, help="of APGD-CE (default 10)")
    parser.add_argument("--iterations-timed", type=int, help="run so many and scale (default: all; paper's networks: 1)")
    parser.add_argument("--eot-iter", type=int, default=1, help="gradients averaged an iteration (default 1)")
    parser.add_argument("--eps", type=float, default=8.0, help="Linf radius in 1/255 (default 8)")
    parser.add_argument("--draws", type=int, default=10, help="fresh draws that judge every image (default 10)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
