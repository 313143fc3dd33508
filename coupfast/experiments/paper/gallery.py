"""Figs. 5 and 6: attacked images, and what every purifier makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from coupfast.evaluation.drawing import to_png
from coupfast.evaluation.report import Picture
from coupfast.evaluation.report.pictures import image_grid
from coupfast.evaluation.report.read import class_name
from coupfast.experiments import images
from coupfast.experiments.defenses import NAMES, defense
from coupfast.experiments.experiment import Results
from coupfast.experiments.paper import fig2b
from coupfast.experiments.scale import Scale

#: The run whose images they are.
ATTACKED = fig2b.case("reverse-sde")
METHODS = ("diffpure", "reverse-sde", "coup")


def measure(scale: Scale, folders: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Clean and attacked images, labels, and by method purified images and confidences at the judge's seed, draw 0."""
    x, x_adv, labels = images.of_run(folders[ATTACKED.name])
    found = {"clean": x.numpy(), "attacked": x_adv.numpy(), "labels": labels.numpy()}
    for method in METHODS:
        pure, confidences = images.purified(images.defended(scale, defense(method)), x_adv.to(scale.device), scale.seed)
        found |= {f"{method} images": pure.cpu().numpy(), f"{method} confidences": confidences.cpu().numpy()}
    return found


def right(results: Results, method: str) -> np.ndarray:
    """Whether each attacked image is right after a method, at the draw that is shown."""
    found: np.ndarray = results.measured[f"{method} confidences"].argmax(axis=1) == results.measured["labels"]
    return found


def picture(results: Results, title: str, chosen: np.ndarray, methods: Sequence[str], note: str) -> Picture:
    """Rows: the chosen images. The true class stands below the original without a mark: nobody was asked for it."""
    measured, run = results.measured, results.runs[ATTACKED.name]
    labels = measured["labels"][chosen]
    columns = {"original": measured["clean"][chosen], "attacked": measured["attacked"][chosen]}
    below: dict[str, list[tuple[str, bool | None]]] = {
        "original": [(f"{class_name(run, label)} ({image})", None) for label, image in zip(labels, chosen, strict=True)]
    }
    for method in methods:
        confidences = measured[f"{method} confidences"][chosen]
        said = confidences.argmax(axis=1)
        columns[NAMES[method]] = measured[f"{method} images"][chosen]
        below[NAMES[method]] = [
            (f"{class_name(run, cls)} {row[cls]:.2f}", bool(cls == label))
            for cls, row, label in zip(said, confidences, labels, strict=True)
        ]
    note += (
        " Below an original stand its true class and its number, below what a purifier made of it the class that the "
        "classifier sees and its confidence (✗ and orange: wrong)."
    )
    said = [
        f"{below['original'][row][0]}: {', '.join(f'{NAMES[method]} {below[NAMES[method]][row][0]}' for method in methods)}"
        for row in range(len(chosen))
    ]
    alt = f"A row for each image: {', '.join(columns)}. What the classifier sees: {'; '.join(said)}."
    return Picture(title, to_png(image_grid(columns, below)), note, alt)
