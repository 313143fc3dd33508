"""Signal to noise of the gradients that attacks follow, for the work that they take, on the shipped networks.

    python bench/gradient_signal.py --json bench/results/gradient-signal-MACHINE.json

One gradient g of an attack is random, since the defense is. Its signal is |E g|², its noise E |g − E g|², and the mean of n
draws has n times the signal to noise of one: so the ratio of both over the work of one draw says what an image-step buys. Work
is counted in image-steps (of `bench/verdict.py`): a purification of K steps takes K, with its gradient 2K. The gradients, each
as the attack itself asks for it, of the loss `--loss`:

* `exact`: 2K;
* `surrogate`: the coarse gradient, of K′ = `--coarse-steps`, through the fine run's states: K + K′;
* `bpda`: K;
* `transfer`: the exact gradient of the purification in K′ steps: 2K′;
* `diffhammer`: N = `--ensemble` purifications without a gradient, whose gradients at the purified images E–M brings together,
  and one that it is pulled back through: (N + 2) K. Its mean is not the mean gradient, and is not meant to be.

All but `exact` point elsewhere: `cosine` is that of their mean to the exact gradient's. The squared norms of means and the
cosine are without the bias that the noise of `--draws` draws would give them: an estimate may lie outside of its range.

They are measured at `--points` points of a way from the clean image to the border of its ball, along the exact mean
gradient.

What common random numbers are worth follows from the same draws at every point: `fresh` is the signal to noise of the mean
gradient along that way with new draws at each point, and `common` with the same ones at all. Draws that are kept can only be
worth more where the noise of one point undoes that of the next; `correlation` is that of the noise of neighbouring points.

Printed are medians over images and points. A small study on small networks: it ranks gradients, not defenses. At its defaults
it takes about an hour of one core, of which `diffhammer` takes two thirds; `--gradients` leaves it out, and `--draws` and
`--points` shorten it, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kept
import tables
import torch
from timing import environment, finite_or_none
from tqdm import tqdm

import coupfast
from coupfast.data import load_images
from coupfast.evaluation.attacks import PGD, DiffHammer, Transfer, ball
from coupfast.evaluation.attacks.iterative import Asked, Iterative
from coupfast.evaluation.attacks.losses import LOSSES
from coupfast.evaluation.metered import Metered
from coupfast.evaluation.units import derive_seed
from coupfast.models.checkpoints import state_dict_sha256

DEFENSES = ("coup", "reverse-sde", "diffpure")
ESTIMATORS = ("exact", "surrogate", "bpda", "transfer", "diffhammer")
MEMORY_BUDGET = 2**31  # bytes; decides no bit


@dataclasses.dataclass(frozen=True)
class Estimator:
    """An attack's gradient.

    Attributes:
        attack: That asks for it.
        gradient: Of the purifier, as keywords.
        work: Image-steps.
    """

    attack: Iterative
    gradient: dict[str, Any]
    work: int


def estimator(name: str, options: argparse.Namespace) -> Estimator:
    steps, coarse, ensemble = options.num_steps, options.coarse_steps, options.ensemble
    ball_of = {"norm": options.norm, "eps": options.eps}
    one = PGD(**ball_of, eot_iter=1, losses=options.loss)
    exact = {"gradient": "exact", "memory_budget": MEMORY_BUDGET}
    return {
        "exact": Estimator(one, exact, 2 * steps),
        "surrogate": Estimator(one, {**exact, "gradient": "surrogate", "surrogate_steps": coarse}, steps + coarse),
        "bpda": Estimator(one, {"gradient": "bpda"}, steps),
        "transfer": Estimator(
            Transfer(**ball_of, eot_iter=1, losses=options.loss, coarse_steps=coarse), exact, 2 * coarse
        ),
        "diffhammer": Estimator(
            DiffHammer(**ball_of, eot_iter=ensemble, losses=options.loss), exact, (ensemble + 2) * steps
        ),
    }[name]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    torch.set_num_threads(options.threads)
    x, y = load_images("cifar10-20", limit=options.images)
    assert y is not None
    score, classifier = coupfast.load_score("cifar10-tiny"), coupfast.load_classifier("cifar10-tiny")
    names = ("loss", "t", "num_steps", "coarse_steps", "ensemble", "norm", "eps", "draws", "points", "seed", "threads")
    document: dict[str, Any] = {
        "settings": {
            "images": len(x),
            **{name: getattr(options, name) for name in names},
            "weights": {"score": state_dict_sha256(score), "classifier": state_dict_sha256(classifier)},
        },
        "environment": environment(torch.device("cpu")),
        "rows": [],
    }
    for method in options.defenses:
        way, mean = [x], None
        for name in (name for name in ESTIMATORS if name in ("exact", *options.gradients)):
            found = estimator(name, options)
            settings = {"method": method, "t": options.t, "num_steps": options.num_steps}
            purifier = coupfast.Purifier(score, classifier, **settings, **found.gradient)
            defense = Metered(coupfast.PurifiedClassifier(purifier, classifier))
            defense.reseed(derive_seed(options.seed, method, name))
            g = []
            for point in tqdm(range(options.points), desc=f"{method}, {name}", leave=False):
                g.append(gradients(found.attack, defense, way[point], y, options))
                if name == "exact" and point + 1 < options.points:
                    length = options.eps / (options.points - 1)
                    step = ball.ascent(g[point].mean(dim=0), options.norm, length)
                    way.append(ball.project(way[point] + step, x, options.norm, options.eps))
            stacked = torch.stack(g).double().flatten(3)  # [points, draws, images, values]
            mean = stacked if mean is None else mean
            row = {"defense": method, "gradient": name, "work": found.work, **measured(stacked, mean, found.work)}
            document["rows"].append(row)
            kept.save(options.json, document)
    header = ("defense", "gradient", "image-steps", "signal/noise", "per 1000", "cosine", "fresh", "common", "correlation")
    print("\n".join(tables.lines([header, *(cells(row) for row in document["rows"])])))
    return 0


def gradients(
    attack: Iterative, defense: Metered, x: torch.Tensor, y: torch.Tensor, options: argparse.Namespace
) -> torch.Tensor:
    """Of every draw and image, shape (draws, images, channels, height, width). Draw m is the same whatever the point."""
    images = torch.arange(len(x)).repeat(options.draws)
    draws = torch.arange(options.draws).repeat_interleave(len(x))
    found = []
    for these, numbers in zip(images.split(options.batch), draws.split(options.batch), strict=True):
        asked = Asked(these, x[these], y[these], numbers, torch.zeros_like(these), True, attack.eot_iter)
        gradient = attack.ask(defense, asked).gradient
        assert gradient is not None
        found.append(gradient)
    return torch.cat(found).view(options.draws, *x.shape)


def measured(g: torch.Tensor, exact: torch.Tensor, work: int) -> dict[str, Any]:
    """Signal and noise of gradients (points, draws, images, values), image by image.

    Args:
        g: Draw m of every point has the same noise.
        exact: Those of the exact gradient, with noise of their own, or `g` itself.
        work: Image-steps of one.
    """
    points, draws = g.shape[:2]
    signal, noise = moments(g, dim=1)  # [points, images]
    along, common = moments(g.mean(dim=0), dim=0)  # [images]; of the same draw at all points
    fresh = noise.sum(dim=0) / points**2
    # The signal of the mean along the way is the same with new draws, and `along` has the bias of its own ones taken off.
    ratios = {
        "signal_to_noise": signal / noise,
        "per_1000": 1000 * signal / noise / work,
        "cosine": torch.ones_like(signal) if g is exact else cosine(g, exact),
        "fresh": 1000 * along / fresh / (points * work),
        "common": 1000 * along / common / (points * work),
    }
    if points > 1:
        _, difference = moments(g[1:] - g[:-1], dim=1)
        ratios["correlation"] = (noise[1:] + noise[:-1] - difference) / (2 * (noise[1:] * noise[:-1]).sqrt())
    return {
        "draws": draws,
        **{f"each_{name}": finite_or_none(ratio.flatten().tolist()) for name, ratio in ratios.items()},
        **{name: median(ratio) for name, ratio in ratios.items()},
    }


def moments(g: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """|E g|² and E |g − E g|² from draws along `dim`, values along the last axis; both without bias."""
    draws = g.shape[dim]
    noise = g.var(dim=dim).sum(dim=-1)
    return g.mean(dim=dim).square().sum(dim=-1) - noise / draws, noise


def cosine(g: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Between E g and E exact, whose draws are independent, (points, images); NaN where a norm cannot be told from 0."""
    dot = (g.mean(dim=1) * exact.mean(dim=1)).sum(dim=-1)
    sizes = moments(g, dim=1)[0] * moments(exact, dim=1)[0]
    return dot / sizes.where(sizes > 0, torch.nan).sqrt()


def median(ratio: torch.Tensor) -> float | None:
    """Of those that are numbers."""
    known = [value for value in ratio.flatten().tolist() if math.isfinite(value)]
    return statistics.median(known) if known else None


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    def told(name: str) -> str:
        return "" if row.get(name) is None else f"{row[name]:.3g}"

    names = ("signal_to_noise", "per_1000", "cosine", "fresh", "common", "correlation")
    return row["defense"], row["gradient"], str(row["work"]), *map(told, names)


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--defenses", nargs="+", choices=DEFENSES, default=list(DEFENSES), help="(default: all)")
    said = "beside the exact one, which is the measure of the others (default: all)"
    add("--gradients", nargs="+", choices=ESTIMATORS, default=list(ESTIMATORS), help=said)
    add("--images", type=int, default=8, help="of the 20 CIFAR-10 test images (default: %(default)s)")
    add("--loss", choices=list(LOSSES), default="ce", help="(default: %(default)s)")
    add("--t", type=float, default=0.06, help="purification time (default: %(default)s)")
    add("--num-steps", type=int, default=20, help="steps K of the defense (default: %(default)s)")
    add("--coarse-steps", type=int, default=5, help="K' of surrogate and transfer (default: %(default)s)")
    add("--ensemble", type=int, default=10, help="draws N of diffhammer (default: %(default)s)")
    add("--norm", choices=("Linf", "L2"), default="Linf", help="of the way (default: %(default)s)")
    add("--eps", type=float, default=8 / 255, help="radius that it goes to, for images in [0, 1] (default: 8/255)")
    add("--draws", type=int, default=16, help="of each gradient, from 2 (default: %(default)s)")
    add("--points", type=int, default=3, help="of the way, from 1 (default: %(default)s)")
    add("--batch", type=int, default=32, help="images and draws at a time; moves no figure (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    add("--json", type=Path, help="write everything to this file, after every row")
    options = parser.parse_args(arguments)
    if options.draws < 2 or options.points < 1 or not 1 <= options.coarse_steps < options.num_steps:
        parser.error("--draws is at least 2, --points at least 1, and --coarse-steps from 1 and fewer than --num-steps")
    return options


if __name__ == "__main__":
    sys.exit(main())
