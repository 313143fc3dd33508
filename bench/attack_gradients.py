"""What each gradient is worth to an attack: APGD-CE on COUP, once per gradient mode, on the same images.

    python bench/attack_gradients.py --json bench/results/attack_gradients.json

The defense is the same in every row; only the gradient that the attacker follows differs. Every image is judged at the point
where the attack saw the highest loss, on fresh draws that no attack has seen: APGD itself returns an image as it came where it
saw no failure. Rows are written as they finish, and a rerun with the same options takes up where the
last one stopped. A small study on small networks: it ranks gradients, it does not rank defenses.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from timing import environment
from torch import nn
from tqdm import tqdm

import coupfast
from coupfast.data import load_images
from coupfast.evaluation.attacks.autoattack import APGD
from coupfast.evaluation.metered import Metered
from coupfast.evaluation.protocols import wilson_interval
from coupfast.models.checkpoints import state_dict_sha256

MODES: dict[str, dict] = {
    "exact": {"gradient": "exact"},
    "detached": {"gradient": "exact", "guidance_gradient": "detached"},
    "surrogate": {"gradient": "surrogate", "surrogate_steps": 5},
    "adjoint, guidance detached": {"gradient": "adjoint", "guidance_gradient": "detached"},
    "bpda": {"gradient": "bpda"},
}
JUDGING_DRAWS = 2**31  # draws from here on are for verdicts; an attack counts up from 0


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    x, y = load_images("cifar10-20", limit=options.images)
    assert y is not None
    score, classifier = coupfast.load_score("cifar10-tiny"), coupfast.load_classifier("cifar10-tiny")
    settings = {
        "images": len(x),
        "t": options.t,
        "num_steps": options.num_steps,
        "iterations": options.iterations,
        "eot_iter": options.eot_iter,
        "eps_255": options.eps,
        "judged_images": "highest mean loss",
        "judging_draws": options.draws,
        "seed": options.seed,
        "threads": options.threads,
        "weights": {"score": state_dict_sha256(score), "classifier": state_dict_sha256(classifier)},
    }
    results = load(options.json, settings)
    for mode in tqdm(options.modes, desc="gradient modes"):
        if any(row["mode"] == mode for row in results["rows"]):
            continue
        results["rows"].append(attack(mode, score, classifier, x, y, options))
        if options.json:
            partial = options.json.with_suffix(".partial")
            partial.write_text(json.dumps(results, indent=1) + "\n")
            partial.replace(options.json)
    print(f"COUP, cifar10-tiny, {len(x)} images, t = {options.t}, {options.num_steps} steps; APGD-CE Linf {options.eps:g}/255,")
    print(f"{options.iterations} iterations, EOT {options.eot_iter}; 95 % Wilson intervals over images")
    for row in results["rows"]:
        low, high = row["wilson_95"]
        seconds = "not timed" if row["seconds"] is None else f"{row['seconds']:.0f} s"
        print(
            f"{row['mode']:28s} clean {row['clean_mean']:.3f}   robust, one draw {row['robust_one_draw']:2d}/{len(x)} "
            f"[{low:.2f}, {high:.2f}]   mean of {options.draws} draws {row['robust_mean']:.3f}   {seconds}"
        )


def attack(
    mode: str, score: nn.Module, classifier: nn.Module, x: torch.Tensor, y: torch.Tensor, options: argparse.Namespace
) -> dict:
    """Attack with one gradient, judge on fresh draws."""
    purifier = coupfast.Purifier(score, classifier, t=options.t, num_steps=options.num_steps, **MODES[mode])
    defense = coupfast.PurifiedClassifier(purifier, classifier, seed=options.seed)
    apgd = APGD("Linf", options.eps / 255, iterations=options.iterations, eot_iter=options.eot_iter)
    start = time.perf_counter()
    result = apgd.run(Metered(defense), x, y, seed=options.seed)
    seconds = time.perf_counter() - start
    x_adv = result.strongest
    assert x_adv is not None and float((x_adv - x).abs().max()) <= options.eps / 255 + 1e-6
    clean, robust = (verdicts(defense, images, y, options.draws) for images in (x, x_adv))
    one = int(robust[0].sum())
    return {
        "mode": mode,
        "options": MODES[mode],
        "unchanged": int((x_adv == x).flatten(1).all(dim=1).sum()),
        "apgd_standing": result.curve[-1],
        "robust_one_draw": one,
        "wilson_95": wilson_interval(one, len(y)),
        "robust_mean": float(robust.float().mean()),
        "robust_worst_of_draws": int(robust.all(dim=0).sum()),
        "clean_one_draw": int(clean[0].sum()),
        "clean_mean": float(clean.float().mean()),
        "clean_worst_of_draws": int(clean.all(dim=0).sum()),
        "seconds": seconds,
    }


def verdicts(defense: coupfast.PurifiedClassifier, images: torch.Tensor, y: torch.Tensor, draws: int) -> torch.Tensor:
    """Correct or not, (draws, images)."""
    with torch.no_grad():
        return torch.stack([defense(images, draw=JUDGING_DRAWS + i).argmax(dim=1) == y for i in range(draws)])


def load(path: Path | None, settings: dict) -> dict:
    """The rows so far, refused if they were made with other options."""
    if path is None or not path.exists():
        return {"settings": settings, "environment": environment(torch.device("cpu")), "rows": []}
    results = json.loads(path.read_text())
    if results["settings"] != settings:
        differing = {name for name in settings if results["settings"].get(name) != settings[name]}
        raise SystemExit(f"{path} was made with other options ({', '.join(sorted(differing))}): name another file")
    return results


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--modes", nargs="+", choices=list(MODES), default=list(MODES), help="gradient modes (default: all)")
    add("--images", type=int, default=20, help="of the 20 CIFAR-10 test images (default: %(default)s)")
    add("--t", type=float, default=0.06, help="purification time in (1e-5, 1] (default: %(default)s)")
    add("--num-steps", type=int, default=20, help="equal steps of a purification (default: %(default)s)")
    add("--iterations", type=int, default=10, help="of APGD-CE (default: %(default)s)")
    add("--eot-iter", type=int, default=1, help="gradients averaged an iteration (default: %(default)s)")
    add("--eps", type=float, default=8.0, help="Linf radius in 1/255 (default: %(default)s)")
    add("--draws", type=int, default=10, help="fresh draws that judge every image (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the defense and of the attack (default: %(default)s)")
    add("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    add("--json", type=Path, help="write rows to this file, and go on from it if it is there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
