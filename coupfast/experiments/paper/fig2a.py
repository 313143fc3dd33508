"""Fig. 2a: what the classifier thinks along the purification, where the reverse SDE fails and COUP does not."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from coupfast.evaluation.drawing import COLOURS, new_figure, to_png
from coupfast.evaluation.report import Picture, Section, Table
from coupfast.evaluation.report.read import class_name
from coupfast.experiments import images
from coupfast.experiments.defenses import EOT_ASSUMED, LOST, NAMES, defense
from coupfast.experiments.experiment import Experiment, Results
from coupfast.experiments.paper import fig2b
from coupfast.experiments.scale import Scale
from coupfast.wording import counted

_METHODS = ("reverse-sde", "coup")
_SHOWN = 4
_ARTICLE = {"reverse-sde": "the reverse SDE", "coup": "COUP"}


def _measure(scale: Scale, folders: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Confidences (steps + 1, images, classes) along the noise-free ways of both methods, for each of the two attacks."""
    found: dict[str, np.ndarray] = {}
    models = {method: images.defended(scale, defense(method)) for method in _METHODS}
    for attacked in _METHODS:
        _, x_adv, labels = images.of_run(folders[fig2b.case(attacked).name])
        found["labels"] = labels.numpy()
        for method, model in models.items():
            found[f"{attacked}: {method}"] = images.quiet(model, x_adv.to(scale.device)).cpu().numpy()
    return found


def _ends(results: Results, attacked: str) -> dict[str, np.ndarray]:
    """By method, whether each image is right at the end of its noise-free way."""
    labels = results.measured["labels"]
    return {method: results.measured[f"{attacked}: {method}"][-1].argmax(axis=1) == labels for method in _METHODS}


def _kinds(results: Results, attacked: str) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of images on which the reverse SDE fails and COUP does not, and of the opposite kind."""
    return images.opposite(*_ends(results, attacked).values())


def _sections(results: Results) -> list[Section]:
    rows = []
    for attacked in _METHODS:
        ends = _ends(results, attacked)
        helped, hurt = _kinds(results, attacked)
        both, none = int((ends["reverse-sde"] & ends["coup"]).sum()), int((~ends["reverse-sde"] & ~ends["coup"]).sum())
        rows.append((NAMES[attacked], str(len(results.measured["labels"])), *map(str, (len(helped), len(hurt), both, none))))
    table = Table(
        "Images by what becomes of them without noise",
        ("attacked", "images", "only COUP is right", "only the reverse SDE is right", "both", "neither"),
        rows,
        "Every image is attacked by APGD-CE through one of the methods, with its noise, and then purified by both without "
        "noise. Which method was attacked decides much: the attack on one is a transferred attack on the other.",
    )
    helped, hurt = _kinds(results, "reverse-sde")
    sections: list[Section] = [table]
    for title, chosen in (("COUP is right, the reverse SDE fails", helped), ("The reverse SDE is right, COUP fails", hurt)):
        if len(chosen):
            sections.append(_ways(results, title, chosen[:_SHOWN]))
    if not len(helped) + len(hurt):
        sections.append(_ways(results, "Neither kind was found: the first images", np.arange(len(ends["coup"]))[:_SHOWN]))
    return sections


def _ways(results: Results, title: str, chosen: np.ndarray) -> Picture:
    """Confidence of the label, and of the class that the failing method ends at (or of the next best, where none fails)."""
    labels = results.measured["labels"]
    columns = min(2, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = new_figure(3.5 * columns, 2.6 * rows + 0.5)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for panel in panels[len(chosen) :]:
        panel.set_axis_off()
    for panel, image in zip(panels, chosen, strict=False):
        ways = {method: results.measured[f"reverse-sde: {method}"][:, image] for method in _METHODS}
        ends, ranked = [way[-1].argmax() for way in ways.values()], ways["reverse-sde"][-1].argsort()[::-1]
        wrong = next(cls for cls in (*ends, *ranked) if cls != labels[image])
        for method, style in zip(_METHODS, ("-", "--"), strict=True):
            for colour, (kind, cls) in zip(COLOURS, {"true class": labels[image], "wrong class": wrong}.items(), strict=False):
                panel.plot(ways[method][:, cls], style, color=colour, linewidth=1.5, label=f"{kind}, {NAMES[method]}")
        true, other = (class_name(results.runs[fig2b.case("reverse-sde").name], cls) for cls in (labels[image], wrong))
        panel.set_title(f"image {image}: {true} (true) and {other}", fontsize=9)
        panel.set_ylim(-0.02, 1.02)
        panel.set_xlabel("step", fontsize=9)
    figure.supylabel("confidence", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    return Picture(
        title,
        to_png(figure),
        "Confidence along the purification without noise, of images that were attacked through the reverse SDE: the true "
        "class and the class that the failing method ends at, or the next best where none fails. The first ones in the order "
        "of the data.",
        f"{counted(len(chosen), 'panel')}, one for an image: confidence in the true class and in a wrong one over the steps "
        "of the purification, solid for the reverse SDE and dashed for COUP.",
    )


def _concludes(results: Results) -> list[str]:
    said, count = [], len(results.measured["labels"])
    for attacked in _METHODS:
        helped, hurt = _kinds(results, attacked)
        said.append(
            f"Of {counted(count, 'image')} attacked through {_ARTICLE[attacked]}, without noise {len(helped)} "
            f"{'is' if len(helped) == 1 else 'are'} right with COUP only, {len(hurt)} with the reverse SDE only."
        )
    return said + [
        "The paper's case is of the first kind, and its attack went through the reverse SDE: that COUP is right there more "
        "often than the other way round is what a transferred attack gives in any case. Compare the two rows.",
        "Curves of single images show what can happen, not how often it does.",
    ]


EXPERIMENT = Experiment(
    name="fig2a",
    place="Fig. 2a",
    title="confidence along the purification",
    asks="What does the classifier think along the way, where the reverse SDE fails and COUP does not, and how many such "
    "images and of the opposite kind are there?",
    setting="An image that APGD-CE in Linf 8/255 found against the reverse SDE, purified without Brownian motion; one figure",
    cases=[fig2b.case(method) for method in _METHODS],
    measure=_measure,
    sections=_sections,
    concludes=_concludes,
    assumptions=(LOST, EOT_ASSUMED),
)
