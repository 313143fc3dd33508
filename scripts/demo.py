"""Purify 20 CIFAR-10 test images and their attacked copies by DiffPure, the reverse SDE and COUP.

The networks are the two small ones that coupfast ships. The attack knows the classifier and not the defence, so this
shows what purification does; it does not measure how robust a defence is. Run it through scripts/demo, which installs
what it needs.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Everything that has to be installed is imported where it is used: --help answers before there is anything.
if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn

NETWORKS = "cifar10-tiny"
METHODS = {"diffpure": "DiffPure", "reverse-sde": "reverse SDE", "coup": "COUP"}
CAVEAT = (
    "The attack was made against the classifier alone: it does not adapt to the defence, so these numbers say nothing\n"
    "about how robust the defences are. They show what purification does to a perturbation that was not made for it."
)


def main() -> None:
    options = parse_options()

    import torch
    from tqdm import tqdm

    import coupfast
    from coupfast.data import load_images
    from coupfast.environment import machine, version
    from coupfast.models.checkpoints import state_dict_sha256
    from coupfast.wording import counted

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    started = time.perf_counter()
    score = coupfast.load_score(NETWORKS).to(device)
    classifier = coupfast.load_classifier(NETWORKS).to(device)
    x, y = load_images("cifar10-20", limit=options.images)
    assert y is not None
    x, y = x.to(device), y.to(device)

    purifiers = {
        method: coupfast.Purifier(
            score,
            classifier if method == "coup" else None,
            method=method,
            t=options.t,
            num_steps=options.num_steps,
            engine=options.engine,
        )
        for method in options.methods
    }
    steps = {method: purifier.num_steps for method, purifier in purifiers.items()}
    engines = sorted({purifier.engine for purifier in purifiers.values()})
    print(
        f"{counted(len(x), 'CIFAR-10 test image')}, networks {NETWORKS}, t = {options.t:g} in "
        f"{counted(max(steps.values()), 'step')}, "
        f"seed {options.seed}, engine {' '.join(engines)} on {device}"
    )
    print(f"Attacking the classifier: APGD-CE, Linf {options.eps:g}/255, {counted(options.attack_iterations, 'iteration')} ...")
    attack_started = time.perf_counter()
    x_adv = attack(classifier, x, y, eps=options.eps / 255, n_iter=options.attack_iterations, seed=options.seed)
    attack_seconds = time.perf_counter() - attack_started

    rows = [result("none", x, x_adv, y, classifier, seconds=None)]
    chunks = range(0, len(x), options.batch_size)
    with tqdm(total=2 * len(x) * len(options.methods), unit="image", disable=None) as progress:
        for method, purifier in purifiers.items():
            progress.set_description(METHODS[method])
            method_started = time.perf_counter()
            purified = []
            for images in (x, x_adv):
                parts = []
                for start in chunks:
                    ids = torch.arange(start, min(start + options.batch_size, len(x)))
                    # The noise belongs to the image (its id): the batch size changes rounding at most.
                    part = purifier(images[start : start + options.batch_size], seed=options.seed, ids=ids)
                    parts.append(part)
                    progress.update(len(part))
                purified.append(torch.cat(parts))
            seconds = time.perf_counter() - method_started
            rows.append(result(method, purified[0], purified[1], y, classifier, seconds=seconds))

    print("\n" + table(rows, len(x)) + "\n\n" + CAVEAT + "\n")
    options.out.mkdir(parents=True, exist_ok=True)
    picture, report = options.out / "demo.png", options.out / "demo.json"
    draw(rows, x, x_adv, y, options).savefig(picture, dpi=150)
    facts = {
        "command": shlex.join([sys.executable, *sys.argv]),
        "caveat": CAVEAT.replace("\n", " "),
        "options": {
            "images": f"cifar10-20, the first {len(x)}",
            "networks": NETWORKS,
            "methods": options.methods,
            "t": options.t,
            "num_steps": steps,
            "engines": engines,
            "seed": options.seed,
            "batch_size": options.batch_size,
            "device": str(device),
        },
        "attack": {
            "name": "APGD-CE on the undefended classifier",
            "norm": "Linf",
            "eps": f"{options.eps:g}/255",
            "n_iter": options.attack_iterations,
            "n_restarts": 1,
            "seed": options.seed,
            "largest_change": (x_adv - x).abs().max().item(),
            "seconds": attack_seconds,
        },
        "weights_sha256": {
            "score": state_dict_sha256(score),
            "classifier": state_dict_sha256(classifier),
        },
        "versions": {
            "python": platform.python_version(),
            "coupfast": coupfast.__version__,
            **{name: version(name) for name in ("torch", "numpy", "pyautoattack", "foolbox")},
        },
        "machine": {
            **machine(),
            "torch_threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        },
        "labels": y.tolist(),
        "results": [{key: value for key, value in row.items() if key != "images"} for row in rows],
        "seconds": time.perf_counter() - started,
    }
    report.write_text(json.dumps(facts, indent=2) + "\n")
    print(f"Wrote {picture} and {report} after {facts['seconds']:.0f} s.")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument(
        "--images", type=int, default=20, metavar="N", help="how many of the 20 images to take (default: %(default)s)"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="the defences to compare (default: all)"
    )
    parser.add_argument(
        "--t",
        type=float,
        default=0.06,
        help="purification time, in (1e-5, 1]; the small networks learned t up to 0.2 (default: %(default)s)",
    )
    parser.add_argument(
        "--num-steps", type=int, metavar="K", help="steps from t to 0 (default: one each 0.001 of t, as published)"
    )
    parser.add_argument(
        "--eps",
        type=float,
        default=8,
        metavar="LEVELS",
        help="Linf radius of the attack in 8-bit levels: 8 is 8/255 (default: %(default)s)",
    )
    parser.add_argument(
        "--attack-iterations", type=int, default=100, metavar="K", help="iterations of APGD-CE (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="fixes the attack's start and the noise of purification (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=10, metavar="B", help="images purified at once (default: %(default)s)"
    )
    parser.add_argument("--device", help="where to compute: cpu, cuda, cuda:1, ... (default: cuda if there is one, else cpu)")
    parser.add_argument(
        "--engine", default="auto", help="what runs the steps: auto (default, the fastest one), eager, cpu or cuda"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo-results"), metavar="DIR", help="where to write (default: %(default)s)"
    )
    options = parser.parse_args()
    if not 1 <= options.images <= 20:
        parser.error(f"--images is a number from 1 to 20, got {options.images}")
    for name in ("batch_size", "attack_iterations"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is a number from 1 up, got {getattr(options, name)}")
    return options


def attack(classifier: nn.Module, x: Tensor, y: Tensor, *, eps: float, n_iter: int, seed: int) -> Tensor:
    """Images within Linf distance `eps` of `x` that the classifier gets wrong where APGD finds one, else `x` itself."""
    from pyautoattack.autopgd_base import APGDAttack

    apgd = APGDAttack(
        classifier, n_iter=n_iter, norm="Linf", n_restarts=1, eps=eps, seed=seed, loss="ce", device=str(x.device)
    )
    return apgd.perturb(x, y).detach()


def result(
    name: str, clean: Tensor, attacked: Tensor, y: Tensor, classifier: nn.Module, *, seconds: float | None
) -> dict[str, Any]:
    """What the classifier says of the clean and the attacked images after the defence `name`."""
    import torch

    from coupfast.evaluation.protocols import wilson_interval

    row: dict[str, Any] = {"defence": name, "seconds": seconds, "images": attacked}
    for key, images in (("clean", clean), ("attacked", attacked)):
        with torch.no_grad():
            p = classifier(images).softmax(dim=1)
        predicted = p.argmax(dim=1)
        correct = int((predicted == y).sum())
        row[key] = {
            "correct": correct,
            "n": len(y),
            "accuracy": correct / len(y),
            "wilson_95": wilson_interval(correct, len(y)),
            "mean_confidence_true_class": p.gather(1, y[:, None]).mean().item(),
            "predicted": predicted.tolist(),
            "confidence": p.amax(dim=1).tolist(),
        }
    return row


def table(rows: list[dict], n: int) -> str:
    lines = [
        f"{'':12}  {'accuracy (95 % interval), n = ' + str(n):^46}  {'confidence in true class':^24}",
        f"{'defence':12}  {'clean':^22}  {'attacked':^22}  {'clean':^11}  {'attacked':^11}  {'time':>7}",
    ]
    for row in rows:
        cells = [f"{METHODS.get(row['defence'], row['defence']):12}"]
        for key in ("clean", "attacked"):
            low, high = row[key]["wilson_95"]
            cells.append(f"{row[key]['accuracy']:6.0%}  ({low:3.0%} to {high:4.0%})".center(22))
        cells += [f"{row[key]['mean_confidence_true_class']:.2f}".center(11) for key in ("clean", "attacked")]
        cells.append("" if row["seconds"] is None else f"{row['seconds']:5.1f} s")
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def draw(rows: list[dict], x: Tensor, x_adv: Tensor, y: Tensor, options: argparse.Namespace) -> Figure:
    """A grid: one column an image (the first ten), one row each for original, attacked and every defence."""
    from matplotlib.figure import Figure

    from coupfast.data import CIFAR10_CLASSES

    columns = min(10, len(y))
    undefended = rows[0]
    grid = [
        ("original", x, undefended["clean"]),
        (f"attacked\nLinf {options.eps:g}/255", x_adv, undefended["attacked"]),
    ]
    grid += [(f"attacked,\nthen {METHODS[row['defence']]}", row["images"], row["attacked"]) for row in rows[1:]]
    # Inches. A cell is a square image with room to its right, and its caption below.
    cell, side, caption, left, top, bottom = 1.3, 1.2, 0.36, 1.75, 0.85, 0.6
    width, height = max(8.0, left + columns * cell + 0.05), top + len(grid) * (side + caption) + bottom
    figure = Figure(figsize=(width, height), facecolor="white")
    figure.text(
        0.15 / width,
        1 - 0.38 / height,
        f"Purification of attacked CIFAR-10 images, t = {options.t:g}, networks {NETWORKS}",
        fontsize=14,
        weight="bold",
    )
    for i, (name, images, verdict) in enumerate(grid):
        from_bottom = bottom + (len(grid) - 1 - i) * (side + caption)
        figure.text(
            0.15 / width,
            (from_bottom + caption + side / 2) / height,
            f"{name}\n{verdict['correct']}/{verdict['n']} right",
            fontsize=11,
            va="center",
            linespacing=1.4,
        )
        for j in range(columns):
            place = ((left + j * cell) / width, (from_bottom + caption) / height, side / width, side / height)
            axes = figure.add_axes(place)
            axes.imshow(images[j].permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            right = verdict["predicted"][j] == y[j].item()
            colour = "#0072B2" if right else "#D55E00"  # of Okabe and Ito, for the colour-blind
            for spine in axes.spines.values():
                spine.set(color=colour, linewidth=2)
            if i == 0:  # what it is
                axes.set_title(CIFAR10_CLASSES[y[j].item()], fontsize=8.5, color="#444444", pad=3)
            axes.set_xlabel(
                f"{'' if right else '✗ '}{CIFAR10_CLASSES[verdict['predicted'][j]]} {verdict['confidence'][j]:.2f}",
                fontsize=8.5,
                color=colour,
                labelpad=3,
            )
    figure.text(
        0.15 / width,
        0.16 / height,
        "Below each image: the class that the classifier sees, and its confidence; blue: right, orange with ✗: wrong.\n"
        "The attack (APGD-CE) does not know the defences: this shows what purification does, not how robust it is.",
        fontsize=9,
        color="#444444",
    )
    return figure


if __name__ == "__main__":
    main()
