"""Pictures of a report."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from coupfast.evaluation.drawing import COLOURS, new_figure, to_png
from coupfast.evaluation.report.parts import Picture
from coupfast.evaluation.report.read import Run, class_name
from coupfast.wording import counted

_MAGNIFIED = 10


def curves(run: Run) -> dict[str, np.ndarray]:
    """By stage: images that the attack had not yet seen fail, after each iteration, as a share of all images."""
    curves: dict[str, np.ndarray] = {}
    for stage in run.configuration["stages"]:
        units = [record.result["curve"] for record in run.records.values() if record.unit.stage == stage]
        units = [unit for unit in units if unit]
        if units:
            # An attack that has nobody left stops; its curve stays where it ended.
            length = max(map(len, units))
            curves[stage] = np.sum([unit + unit[-1:] * (length - len(unit)) for unit in units], axis=0) / run.count
    return curves


def curve_figure(runs: Sequence[Run]) -> Any:
    """What `curve_picture` shows, as Matplotlib's."""
    axes = new_figure(7.0, 3.9).add_subplot()
    for number, run in enumerate(runs):
        for style, (stage, curve) in zip(itertools.cycle(("-", "--", ":", "-.")), curves(run).items(), strict=False):
            label = f"{run.name}, {stage}"
            axes.plot(100 * curve, style, color=COLOURS[number % len(COLOURS)], label=label, linewidth=1.8)
    return _framed(axes, "iteration of the attack (0: its starting point)", "not yet seen to fail, % of all")


def curve_picture(runs: Sequence[Run]) -> Picture:
    return Picture(
        "Accuracy against iterations",
        to_png(curve_figure(runs)),
        "As the attack sees it while it runs, on the draws that it uses: an image counts from the first iteration that "
        "misclassified it. The verdicts above are on fresh draws. Stages begin with the images that the one before left.",
        "Falling curves. "
        + "; ".join(
            f"{run.name}, {stage}: from {100 * curve[0]:.0f} to {100 * curve[-1]:.0f} % in "
            f"{counted(len(curve) - 1, 'iteration')}"
            for run in runs
            for stage, curve in curves(run).items()
        ),
    )


def resubmission_figure(runs: Sequence[Run]) -> Any:
    """What `resubmission_picture` shows, as Matplotlib's."""
    axes = new_figure(7.0, 3.9).add_subplot()
    for number, run in enumerate(runs):
        colour = COLOURS[number % len(COLOURS)]
        for kind, style in (("clean", ":"), ("attacked", "-")):
            points = run.resubmission.get(kind, [])
            m, values = np.arange(1, len(points) + 1), [100 * point.value for point in points]
            axes.plot(m, values, style, color=colour, label=f"{run.name}, {kind}", linewidth=1.8)
            if kind == "attacked":
                ends = np.array([point.bootstrap for point in points]).reshape(-1, 2)
                axes.fill_between(m, 100 * ends[:, 0], 100 * ends[:, 1], color=colour, alpha=0.15, linewidth=0)
    return _framed(axes, "M, how often the attacker may send an image", "right every time, % of images")


def resubmission_picture(runs: Sequence[Run]) -> Picture:
    return Picture(
        "Accuracy against the number of submissions",
        to_png(resubmission_figure(runs)),
        "M-resubmission, estimated without bias from all of the judge's draws; M = 1 is their average, the largest M their "
        "worst. Bands: 95 %, a bootstrap over attacked images.",
        "Curves that fall with M. "
        + "; ".join(
            f"{run.name}, {kind}: from {100 * points[0].value:.0f} % at 1 to {100 * points[-1].value:.0f} % at {len(points)}"
            for run in runs
            for kind, points in run.resubmission.items()
            if points
        ),
    )


def competitor(run: Run, number: int) -> int:
    """The likeliest class but for its own at the end of a shown image's way: attacked, where there was an attack."""
    kind = "attacked" if "attacked_confidences" in run.shown else "clean"
    last = run.shown[f"{kind}_confidences"][-1, number].copy()
    last[run.verdicts["clean"].labels[run.shown["images"][number]]] = -1
    return int(last.argmax())


def path_figure(run: Run) -> Any:
    """What `path_picture` shows, as Matplotlib's."""
    images, labels = run.shown["images"], run.verdicts["clean"].labels
    columns = min(len(images), 2)
    rows = -(-len(images) // columns)
    figure = new_figure(3.7 * columns + 1.2, 2.9 * rows + 0.3)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for panel in panels[len(images) :]:
        panel.set_axis_off()
    for number, image in enumerate(images):
        panel = panels[number]
        for colour, of in zip(COLOURS, (labels[image], competitor(run, number)), strict=False):
            for kind, style in (("attacked", "-"), ("clean", ":")):
                if f"{kind}_confidences" in run.shown:
                    confidence = run.shown[f"{kind}_confidences"][:, number, of]
                    label = f"{class_name(run, of)}{' (the label)' if of == labels[image] else ''}, {kind}"
                    panel.plot(confidence, style, color=colour, label=label, linewidth=1.5)
        panel.set_title(f"image {image}", fontsize=9)
        panel.set_ylim(-0.02, 1.02)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)  # below, where no curve is
    figure.supxlabel("step of the purification", fontsize=9)
    figure.supylabel("confidence", fontsize=9)
    return figure


def path_picture(run: Run) -> Picture:
    noiseless = "Without noise, as in the paper's Fig. 2a"
    if run.configuration["defense"]["noises_first"]:
        noiseless += " (nor any before the first step, which this method has otherwise)"
    return Picture(
        f"{run.name}: confidence along the purification",
        to_png(path_figure(run)),
        f"{noiseless}: of the label, and of the class that comes nearest to it or beats it at the end. The classifier sees the "
        "state as it is.",
        f"{counted(len(run.shown['images']), 'panel')}, one for an image: confidence in the label and in its nearest "
        "rival over the steps of the purification, solid for the attacked image and dotted for the clean one.",
    )


def gallery(run: Run) -> Picture:
    shown, count = run.shown, len(run.shown["images"])
    x = shown["clean_images"]
    columns: list[tuple[str, np.ndarray, str | None]] = [("clean", x, None)]
    if "clean_purified" in shown:
        columns.append(("clean, purified", shown["clean_purified"], "clean"))
    if "attacked_images" in shown:
        magnified = 0.5 + _MAGNIFIED * (shown["attacked_images"] - x)
        columns += [(f"perturbation × {_MAGNIFIED}", magnified, None), ("attacked", shown["attacked_images"], None)]
    if "attacked_purified" in shown:
        columns.append(("attacked, purified", shown["attacked_purified"], "attacked"))
    if "clean_purified" not in shown:  # nothing is purified: what the classifier says stands below the images themselves
        columns = [(title, images, title if title in ("clean", "attacked") else kind) for title, images, kind in columns]
    labels = run.verdicts["clean"].labels[shown["images"]]
    below: dict[str, list[tuple[str, bool | None]]] = {}
    for title, _, kind in columns:
        if kind is not None:
            said = zip(shown[f"{kind}_logits"][0], labels, strict=True)
            below[title] = [_said(run, logits, label) for logits, label in said]
        elif title == "clean":
            numbers = zip(shown["images"], labels, strict=True)
            below[title] = [(f"{class_name(run, label)} ({image})", None) for image, label in numbers]
    return Picture(
        f"{run.name}: gallery",
        to_png(image_grid({title: images for title, images, _ in columns}, below)),
        "Below: the class that the defense says and its confidence, at the judge's first draw (✗ and orange: wrong).",
        f"Rows of images, one for each of {count}: {', '.join(title for title, _, _ in columns)}.",
    )


def _said(run: Run, logits: np.ndarray, label: int) -> tuple[str, bool | None]:
    """What is said of an image and how surely, and whether it is right."""
    predicted = int(logits.argmax())
    confidence = float(np.exp(logits[predicted] - logits.max()) / np.exp(logits - logits.max()).sum())
    return f"{class_name(run, predicted)} {confidence:.2f}", predicted == int(label)


def image_grid(columns: Mapping[str, np.ndarray], below: Mapping[str, Sequence[tuple[str, bool | None]]]) -> Any:
    """A figure of images, one a row.

    Args:
        columns: Images in [0, 1], (n, 3, height, width), by title.
        below: By title, what stands below each image, and whether it is right: blue, or orange and marked; None: neither.
    """
    count = len(next(iter(columns.values())))
    figure = new_figure(1.6 * len(columns), 1.95 * count + 0.2)
    panels = figure.subplots(count, len(columns), squeeze=False)
    for column, (title, images) in enumerate(columns.items()):
        for row in range(count):
            panel = panels[row, column]
            panel.imshow(images[row].transpose(1, 2, 0).clip(0, 1), interpolation="nearest")
            panel.set_xticks([])
            panel.set_yticks([])
            if row == 0:
                panel.set_title(title, fontsize=9)
            if title in below:
                text, right = below[title][row]
                look = {} if right is None else {"color": COLOURS[not right]}
                panel.set_xlabel(f"{'✗ ' if right is False else ''}{text}", fontsize=8, **look)
    return figure


def _framed(axes: Any, what: str, share: str) -> Any:
    """The figure of these axes, with curves of shares in per cent over whole numbers."""
    axes.set_xlabel(what)
    axes.set_ylabel(share)
    axes.set_ylim(0, 102)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.figure.legend(fontsize=8, loc="outside lower center", ncols=2)  # below, where no curve is
    return axes.figure
