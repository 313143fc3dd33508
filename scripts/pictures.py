"""Make the pictures of the README and the site again: python scripts/pictures.py [--diagrams] [DIR], by default docs/pictures.

Needs what the demo needs. The diagrams, which take seconds, are drawn by scripts/diagrams.py. All others come from the package
on the shipped networks and the 20 images of foolbox, but for the bars of `gradients.png`, which are of
bench/results/attack_gradients.json; they take a few minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from demo import attack
from diagrams import DIAGRAMS
from matplotlib.figure import Figure
from PIL import Image

import coupfast
from coupfast.data import CIFAR10_CLASSES, load_images

ROOT = Path(__file__).resolve().parents[1]
#: Of Okabe and Ito, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
T, STEPS = 0.06, 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diagrams", action="store_true", help="make these alone")
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "docs" / "pictures", metavar="DIR")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in DIAGRAMS.items():
        keep(draw().figure, out / f"{name}.png")
    if options.diagrams:
        return
    score, classifier = coupfast.load_score("cifar10-tiny"), coupfast.load_classifier("cifar10-tiny")
    x, y = load_images("cifar10-20", limit=10)
    assert y is not None
    x_adv = attack(classifier, x, y, eps=8 / 255, n_iter=20, seed=0)
    keep(path(score, classifier, x, x_adv, y), out / "path.png")
    keep(guidance(score, classifier, x_adv, y), out / "guidance.png")
    keep(draws(score, classifier, x_adv, y), out / "draws.png")
    keep(gradients(), out / "gradients.png")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, str(ROOT / "scripts" / "demo.py"), "--device", "cpu", "--out", folder], check=True)
        keep(Path(folder) / "demo.png", out / "demo.png", width=1200)


def keep(picture: Figure | Path, path: Path, *, width: int = 1000) -> None:
    """As a small file: a palette of 256 colours, no wider than a page needs."""
    if isinstance(picture, Figure):
        with tempfile.TemporaryDirectory() as folder:
            picture.savefig(Path(folder) / "picture.png", dpi=200)
            keep(Path(folder) / "picture.png", path, width=width)
        return
    with Image.open(picture) as opened:
        image = opened.convert("RGB")
    if image.width > width:
        image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
    image.quantize(256).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


def seen(classifier: torch.nn.Module, images: torch.Tensor) -> list[tuple[str, float]]:
    """The class that the classifier sees in each image, and its confidence."""
    with torch.no_grad():
        p = classifier(images).softmax(dim=1)
    return [(CIFAR10_CLASSES[int(row.argmax())], float(row.max())) for row in p]


def strip(rows: list[tuple[str, torch.Tensor, list[str]]]) -> Figure:
    """Rows of images with a caption each."""
    columns = max(len(images) for _, images, _ in rows)
    figure = Figure(figsize=(1.25 * columns + 1.3, 1.6 * len(rows)), facecolor="white", layout="constrained")
    for i, (name, images, captions) in enumerate(rows):
        for j, (image, caption) in enumerate(zip(images, captions, strict=True)):
            axes = figure.add_subplot(len(rows), columns, i * columns + j + 1)
            axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlabel(caption, fontsize=8)
            if j == 0:
                axes.set_ylabel(name, fontsize=9)
    return figure


def path(score: torch.nn.Module, classifier: torch.nn.Module, x: torch.Tensor, x_adv: torch.Tensor, y: torch.Tensor) -> Figure:
    """The ways of one attacked image through DiffPure and COUP."""
    chosen = next(i for i in range(len(x)) if seen(classifier, x_adv)[i][0] != CIFAR10_CLASSES[int(y[i])])
    rows = []
    for name, method in (("DiffPure", "diffpure"), ("COUP", "coup")):
        purifier = coupfast.Purifier(score, classifier, method=method, t=T)
        with torch.no_grad():
            purified, states = purifier(x_adv[chosen : chosen + 1], seed=0, ids=[chosen], return_trajectory=True)
        at = [0, STEPS // 4, STEPS // 2, 3 * STEPS // 4]
        images = torch.cat([x_adv[chosen : chosen + 1], (torch.cat([states[k] for k in at]) + 1) / 2, purified])
        before, after = seen(classifier, images[:1])[0], seen(classifier, purified)[0]
        captions = [f"attacked:\n{before[0]} {before[1]:.2f}"]
        captions += [f"t = {T * (1 - k / STEPS):.3f}" for k in at]
        label = CIFAR10_CLASSES[int(y[chosen])]
        rows.append((f"{name}\n({label})", images, [*captions, f"purified:\n{after[0]} {after[1]:.2f}"]))
    return strip(rows)


def guidance(score: torch.nn.Module, classifier: torch.nn.Module, x_adv: torch.Tensor, y: torch.Tensor) -> Figure:
    """The classifier's largest confidence along the way, with and without following it."""
    figure = Figure(figsize=(6, 3), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    for name, method, colour, line in (("COUP", "coup", BLUE, "-"), ("COUP without guidance", "reverse-sde", ORANGE, "--")):
        purifier = coupfast.Purifier(score, classifier, method=method, t=T)
        with torch.no_grad():
            _, states = purifier(x_adv, seed=0, return_trajectory=True)
            confidence = [classifier(((state + 1) / 2).clamp(0, 1)).softmax(1).amax(1).mean().item() for state in states]
        axes.plot([T * (1 - k / (len(states) - 1)) for k in range(len(states))], confidence, line, color=colour, label=name)
    axes.invert_xaxis()
    axes.set_xlabel("purification time t, falling to 0")
    axes.set_ylabel("largest confidence,\nmean of ten attacked images")
    axes.legend(loc="best", frameon=False)
    axes.grid(alpha=0.3)
    return figure


def draws(score: torch.nn.Module, classifier: torch.nn.Module, x_adv: torch.Tensor, y: torch.Tensor) -> Figure:
    """The same attacked image, purified with eight draws of the noise."""
    defense = coupfast.Purifier(score, classifier, method="diffpure", t=0.1)
    least = None
    for i in range(len(x_adv)):
        with torch.no_grad():
            purified = defense(x_adv[i : i + 1].expand(8, -1, -1, -1), seed=0, ids=[i] * 8, draw=torch.arange(8))
        names = seen(classifier, purified)
        disagreement = abs(sum(name == CIFAR10_CLASSES[int(y[i])] for name, _ in names) - 4)
        if least is None or disagreement < least[0]:
            captions = [f"draw {k}:\n{name} {p:.2f}" for k, (name, p) in enumerate(names)]
            least = (disagreement, purified, captions, CIFAR10_CLASSES[int(y[i])])
    assert least is not None
    return strip([(least[3], least[1], least[2])])


def gradients() -> Figure:
    """How many images stay right, by the gradient that the attacker follows."""
    found = json.loads((ROOT / "bench" / "results" / "attack_gradients.json").read_text())
    names = {"exact": "exact", "detached": "exact,\nno Hessian", "surrogate": "surrogate", "bpda": "BPDA"}
    names["published"] = "as published"
    figure = Figure(figsize=(6, 3), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    rows = [row for mode in names for row in found["rows"] if row["mode"] == mode]
    places = range(len(rows))
    one = [100 * row["one_draw"] / found["settings"]["images"] for row in rows]
    low = [value - 100 * row["wilson_95"][0] for value, row in zip(one, rows, strict=True)]
    high = [100 * row["wilson_95"][1] - value for value, row in zip(one, rows, strict=True)]
    left, right = ([place + shift for place in places] for shift in (-0.2, 0.2))
    axes.bar(left, one, 0.38, yerr=[low, high], color=BLUE, capsize=3, label="one draw, with its 95 % interval")
    means = [100 * row["mean"] for row in rows]
    axes.bar(right, means, 0.38, color=ORANGE, hatch="//", label="average of ten draws")
    axes.set_xticks(list(places), [names[row["mode"]] for row in rows], fontsize=9)
    axes.set_ylabel("attacked images still right, %")
    axes.set_ylim(0, 100)
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    return figure


if __name__ == "__main__":
    main()
