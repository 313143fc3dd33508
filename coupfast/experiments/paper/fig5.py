"""Fig. 5: original, attacked, and purified by each method."""

from collections.abc import Mapping

import numpy as np

from coupfast.evaluation.report import Section, Table
from coupfast.experiments import tables
from coupfast.experiments.defenses import EOT_ASSUMED, LOST, NAMES
from coupfast.experiments.experiment import Experiment, Results
from coupfast.experiments.paper import gallery

_SHOWN = 6


def _sections(results: Results) -> list[Section]:
    measured = results.measured
    count = len(measured["labels"])
    rows = []
    for method in gallery.METHODS:
        moved, back = (_far(measured, method, origin) for origin in ("attacked", "clean"))
        right = int(gallery.right(results, method).sum())
        rows.append((NAMES[method], f"{right} of {count}", tables.mean(moved), tables.mean(back)))
    return [
        gallery.picture(
            results,
            "Purified images",
            np.arange(min(_SHOWN, count)),
            gallery.METHODS,
            "The first images of the data, attacked through the reverse SDE.",
        ),
        Table(
            "What purification does to the attacked images",
            ("purifier", "right at this draw", "L2 from attacked", "L2 from original"),
            rows,
            "All images; mean distances of images in [0, 1], with 95 % intervals over images.",
        ),
    ]


def _far(measured: Mapping[str, np.ndarray], method: str, origin: str) -> np.ndarray:
    """L2 of every purified image from its original or attacked one."""
    far: np.ndarray = np.sqrt(((measured[f"{method} images"] - measured[origin]) ** 2).sum(axis=(1, 2, 3)))
    return far


def _concludes(results: Results) -> list[str]:
    told = ", ".join(f"{NAMES[m]} {tables.mean(_far(results.measured, m, 'clean'))}" for m in gallery.METHODS)
    return [
        f"What purifiers make of attacked images is on average so far from the original (L2, with 95 % intervals): {told}.",
        "The images were attacked through the reverse SDE, so its mistakes here were sought and those of the others were not.",
        "Looking at a few images shows what a purifier can change, and no accuracy.",
    ]


EXPERIMENT = Experiment(
    name="fig5",
    place="Fig. 5",
    title="purified images",
    asks="What do DiffPure, the reverse SDE and COUP make of attacked images?",
    setting="Attacked images of CIFAR-10 in the setting of Fig. 2b, WRN-28-10; a grid of images",
    cases=[gallery.ATTACKED],
    measure=gallery.measure,
    sections=_sections,
    concludes=_concludes,
    assumptions=(
        "The paper does not say through which purifier its images were attacked: the reverse SDE here.",
        LOST,
        EOT_ASSUMED,
    ),
)
