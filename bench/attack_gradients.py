"""What each gradient is worth to an attack: APGD-CE on COUP, once per gradient mode, on the same images.

    python bench/attack_gradients.py --json bench/results/attack_gradients.json

The defense is the same in every row; only the gradient that the attacker follows differs. Every image is judged on fresh draws
that no attack has seen, at the strongest point that the attack tried: one that it saw to fail if there is any, and of those the
one of the highest loss (APGD itself returns an image as it came where it saw no failure). The modes:

* `exact`, `detached`, `surrogate`, `bpda`: `coupfast.Purifier` with those options;
* `adjoint`: its `gradient="adjoint"` with the guidance detached: torchsde's continuous adjoint in as many steps as the forward
  run, walking its grid back;
* `published`: COUP's way of running (`coupfast.reference.purify_published`, clips around it): the same adjoint, whose steps of
  1e-3 start from t = 1e-5 and so lie beside the forward run's, on torchsde's own Brownian path. Its networks are frozen, which
  saves parameter gradients that nobody uses and changes no other. It steps by 1e-3 and is refused with any `--num-steps`.

torchsde's adjoint depends strongly on the step (`bench/adjoint_error.py`): what `adjoint` is worth in few steps says nothing of
published code. Rows are written as they finish, and a rerun with the same options takes up where the last one stopped. A small
study on small networks: it ranks gradients, it does not rank defenses. It measures no times: `bench/autoattack.py` does.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import kept
import torch
from torch import nn
from tqdm import tqdm

import coupfast
from coupfast.data import load_images
from coupfast.evaluation.attacks.autoattack import APGD
from coupfast.evaluation.metered import Metered
from coupfast.evaluation.protocols import mcnemar, wilson_interval
from coupfast.models.checkpoints import state_dict_sha256
from coupfast.reference import purify_published

PURIFIERS: dict[str, dict] = {
    "exact": {"gradient": "exact"},
    "detached": {"gradient": "exact", "guidance_gradient": "detached"},
    "surrogate": {"gradient": "surrogate", "surrogate_steps": 5},
    "bpda": {"gradient": "bpda"},
    "adjoint": {"gradient": "adjoint", "guidance_gradient": "detached"},
}
MODES = (*PURIFIERS, "published")
BASELINE = "exact"  # what all others are paired with
JUDGING_DRAWS = 2**31  # draws from here on are for verdicts; an attack counts up from 0
MEMORY_BUDGET = 2**30  # bytes; decides no bit


class PublishedCode(nn.Module):
    """COUP's published way of running with a classifier behind it: images in [0, 1] → logits, another Brownian path each call.

    Args:
        score, classifier: Frozen.
        t: Purification time.
        seed: Of the paths, with the number of the call.
    """

    def __init__(self, score: nn.Module, classifier: nn.Module, *, t: float, seed: int) -> None:
        super().__init__()
        self.score, self.classifier, self.t, self.seed = score, classifier, t, seed
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x_0 = (2.0 * x - 1.0).clamp(-1.0, 1.0)
        entropy = self.seed * 2**32 + self.calls
        x_k = purify_published(x_0, self.score, self.classifier, t=self.t, adjoint_params="none", entropy=entropy)
        return self.classifier((x_k.clamp(-1.0, 1.0) + 1.0) * 0.5)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(arguments)
    torch.set_num_threads(options.threads)
    x, y = load_images("cifar10-20", limit=options.images)
    assert y is not None
    score, classifier = coupfast.load_score("cifar10-tiny"), coupfast.load_classifier("cifar10-tiny")
    judge = defense("exact", score, classifier, options)
    steps = judge.purifier.num_steps
    settings = {
        "images": len(x),
        "t": options.t,
        "num_steps": steps,
        "grid": "steps of 1e-3, the last one shorter" if options.num_steps is None else "equal steps",
        "iterations": options.iterations,
        "eot_iter": options.eot_iter,
        "eps_255": options.eps,
        "judged_images": "seen to fail first, then the highest mean loss",
        "judging_draws": options.draws,
        "seed": options.seed,
        "threads": options.threads,
        "weights": {"score": state_dict_sha256(score), "classifier": state_dict_sha256(classifier)},
    }
    results = kept.load(options.json, settings, clean=None, rows=[], paired=[])
    if results["clean"] is None:
        results["clean"] = judged(verdicts(judge, x, y, options.draws))
        kept.save(options.json, results)
    for mode in tqdm(options.modes, desc="gradient modes"):
        if any(row["mode"] == mode for row in results["rows"]):
            continue
        results["rows"].append(attack(mode, score, classifier, judge, x, y, options))
        results["rows"].sort(key=lambda row: MODES.index(row["mode"]))
        results["paired"] = paired(results["rows"])
        kept.save(options.json, results)
    print(f"COUP, cifar10-tiny, {len(x)} images, t = {options.t}, {steps} steps ({settings['grid']}); APGD-CE Linf ", end="")
    print(f"{options.eps:g}/255, {options.iterations} iterations, EOT {options.eot_iter}; 95 % Wilson intervals over images")
    for row in [{"label": "no attack", **results["clean"]}, *results["rows"]]:
        low, high = row["wilson_95"]
        print(
            f"{row['label']:56s} one draw {row['one_draw']:2d}/{len(x)} [{low:.2f}, {high:.2f}]   "
            f"mean of {options.draws} draws {row['mean']:.3f}   worst {row['worst_of_draws']:2d}/{len(x)}"
        )
    for pair in results["paired"]:
        only = ", ".join(
            f"{name} {pair[key]['only_mode']} and {pair[key]['only_exact']}, p = {pair[key]['p']:.2g}"
            for name, key in (("one draw", "one_draw"), ("worst", "worst_of_draws"))
        )
        print(f"{pair['mode']} against {BASELINE}, images that only one of them leaves right: {only}")


def defense(mode: str, score: nn.Module, classifier: nn.Module, options: argparse.Namespace) -> coupfast.PurifiedClassifier:
    purifier = coupfast.Purifier(
        score,
        classifier,
        t=options.t,
        num_steps=options.num_steps,
        memory_budget=MEMORY_BUDGET,
        **PURIFIERS[mode],
    )
    return coupfast.PurifiedClassifier(purifier, classifier, seed=options.seed)


def label(mode: str, steps: int) -> str:
    """A mode in words, which say of a continuous adjoint in how many steps it was solved, and on which grid."""
    if mode == "published":
        return f"as published: continuous adjoint in {steps} steps of 1e-3"
    if mode == "adjoint":
        return f"continuous adjoint in {steps} steps, forward grid walked back"
    return mode


def attack(
    mode: str,
    score: nn.Module,
    classifier: nn.Module,
    judge: coupfast.PurifiedClassifier,
    x: torch.Tensor,
    y: torch.Tensor,
    options: argparse.Namespace,
) -> dict:
    """Attack with one gradient, judge on fresh draws."""
    model: nn.Module
    if mode == "published":
        networks = [copy.deepcopy(network).requires_grad_(False) for network in (score, classifier)]
        model = PublishedCode(*networks, t=options.t, seed=options.seed)
    else:
        model = defense(mode, score, classifier, options)
    apgd = APGD("Linf", options.eps / 255, iterations=options.iterations, eot_iter=options.eot_iter)
    result = apgd.run(Metered(model), x, y, seed=options.seed)
    x_adv = result.strongest
    assert x_adv is not None and float((x_adv - x).abs().max()) <= options.eps / 255 + 1e-6
    return {
        "mode": mode,
        "label": label(mode, judge.purifier.num_steps),
        "options": PURIFIERS.get(mode),
        "unchanged": int((x_adv == x).flatten(1).all(dim=1).sum()),
        "apgd_standing": result.curve[-1],
        **judged(verdicts(judge, x_adv, y, options.draws)),
    }


def verdicts(judge: coupfast.PurifiedClassifier, images: torch.Tensor, y: torch.Tensor, draws: int) -> torch.Tensor:
    """Correct or not, (draws, images)."""
    with torch.no_grad():
        return torch.stack([judge(images, draw=JUDGING_DRAWS + i).argmax(dim=1) == y for i in range(draws)])


def judged(right: torch.Tensor) -> dict:
    one = int(right[0].sum())
    return {
        "one_draw": one,
        "wilson_95": wilson_interval(one, right.shape[1]),
        "mean": float(right.double().mean()),
        "worst_of_draws": int(right.all(dim=0).sum()),
        "right": ["".join(str(int(image)) for image in draw) for draw in right],  # a draw a line, an image a digit
    }


def paired(rows: Sequence[dict]) -> list[dict]:
    """Every mode against the exact one, image by image, by McNemar's exact test."""

    def single(row: dict) -> list[bool]:
        return [image == "1" for image in row["right"][0]]

    def worst(row: dict) -> list[bool]:
        return [set(image) == {"1"} for image in zip(*row["right"], strict=True)]

    def test(exact: list[bool], other: list[bool]) -> dict:
        pairs = list(zip(exact, other, strict=True))
        only_exact, only_mode = pairs.count((True, False)), pairs.count((False, True))
        return {"only_exact": only_exact, "only_mode": only_mode, "p": mcnemar(only_exact, only_mode)}

    baseline = next((row for row in rows if row["mode"] == BASELINE), None)
    if baseline is None:
        return []
    return [
        {
            "mode": row["mode"],
            "one_draw": test(single(baseline), single(row)),
            "worst_of_draws": test(worst(baseline), worst(row)),
        }
        for row in rows
        if row is not baseline
    ]


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--modes", nargs="+", choices=MODES, help="gradient modes (default: all; without `published` if --num-steps is given)")
    add("--images", type=int, default=20, help="of the 20 CIFAR-10 test images (default: %(default)s)")
    add("--t", type=float, default=0.06, help="purification time in (1e-5, 1] (default: %(default)s)")
    add("--num-steps", type=int, help="equal steps of a purification (default: steps of 1e-3, as published: 60 at t = 0.06)")
    add("--iterations", type=int, default=10, help="of APGD-CE (default: %(default)s)")
    add("--eot-iter", type=int, default=1, help="gradients averaged an iteration (default: %(default)s)")
    add("--eps", type=float, default=8.0, help="Linf radius in 1/255 (default: %(default)s)")
    add("--draws", type=int, default=10, help="fresh draws that judge every image (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the defense and of the attack (default: %(default)s)")
    add("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    add("--json", type=Path, help="write rows to this file, and go on from it if it is there")
    options = parser.parse_args(arguments)
    if options.num_steps is not None and "published" in (options.modes or ()):
        parser.error(
            f"published code steps by 1e-3, whatever t is, and --num-steps is {options.num_steps}: leave --num-steps out for "
            "the mode `published`, or ask for `adjoint`, the continuous adjoint in any number of steps"
        )
    options.modes = options.modes or [mode for mode in MODES if mode != "published" or options.num_steps is None]
    return options


if __name__ == "__main__":
    main()
