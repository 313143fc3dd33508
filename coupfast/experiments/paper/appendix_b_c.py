"""Appendices B and C: density and what a classifier can be trusted with; purification with and without noising first."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from coupfast.evaluation.drawing import COLOURS, new_figure, to_png
from coupfast.evaluation.protocols import OFFICIAL
from coupfast.evaluation.report import Picture, Section, Table
from coupfast.experiments import figures, images, tables, two_gaussians
from coupfast.experiments.defenses import EOT_ASSUMED, LOST, NAMES
from coupfast.experiments.experiment import Experiment, Results
from coupfast.experiments.paper import fig2b
from coupfast.experiments.scale import Scale

_TIMES = (0.025, 0.05, 0.1, 0.15)
_METHODS = ("diffpure", "reverse-sde", "coup")
# Of B.1: training points of a classifier, repeats, radius of a neighbourhood, and where on the boundary it is looked at.
_POINTS, _REPEATS, _RADIUS = 5_000, 300, 0.25
_ALONG = np.linspace(0.0, 2.5, 11)
_SEPARATIONS = (0.5, 1.0, 3.0)
_LINE = np.linspace(-6, 6, 1201)


def _measure(scale: Scale, folders: Mapping[str, str]) -> dict[str, np.ndarray]:
    found = _neighbours(scale.seed)
    x, _ = scale.spec({"method": "none", "attack": "none"}).load()
    x = x.to(scale.device)
    for method in _METHODS:
        distances, changed = [], []
        for t in _TIMES:
            model = images.defended(scale, {"method": method, "t": t})
            pure, confidences = images.purified(model, x, scale.seed)
            before = model.classifier(x).argmax(dim=1)
            distances.append((pure - x).flatten(1).norm(dim=1).cpu().numpy())
            changed.append((confidences.argmax(dim=1) != before).cpu().numpy())
        found |= {f"{method} distance": np.stack(distances), f"{method} changed": np.stack(changed)}  # [times, images]
    return found


def _neighbours(seed: int) -> dict[str, np.ndarray]:
    """What a classifier by neighbourhoods says at points (0, u) of the true boundary, (repeats, points), and how many it saw.

    Data: x₁ and x₂ independent N(0, 1), and the class is +1 with chance 1 / (1 + exp(−4 x₁)): one half at x₁ = 0, while
    the density falls along x₂.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    said, seen = np.full((_REPEATS, len(_ALONG)), np.nan), np.zeros((_REPEATS, len(_ALONG)), dtype=np.int64)
    for repeat in range(_REPEATS):
        x = rng.standard_normal((2, _POINTS))
        first = rng.random(_POINTS) < 1 / (1 + np.exp(-4 * x[0]))
        near = (x[0] ** 2 + (x[1] - _ALONG[:, None]) ** 2) < _RADIUS**2  # [points, data]
        seen[repeat] = near.sum(axis=1)
        hits = (near & first).sum(axis=1)
        said[repeat] = np.where(seen[repeat] > 0, hits / np.maximum(seen[repeat], 1), np.nan)
    return {"said": said, "seen": seen}


def _sections(results: Results) -> list[Section]:
    measured = results.measured
    rows = []
    for method in _METHODS:
        for i, t in enumerate(_TIMES):
            distance, changed = measured[f"{method} distance"][i], measured[f"{method} changed"][i]
            rows.append((NAMES[method], f"{t:g}", tables.mean(distance), f"{int(changed.sum())} of {len(changed)}"))
    groups = {
        kind: {NAMES[m]: results.runs[fig2b.case(m).name].accuracies[key][OFFICIAL] for m in _METHODS}
        for kind, key in (("clean", "clean"), ("under APGD-CE", "attacked"))
    }
    return [
        _trust(measured),
        _confidence(),
        _distances(measured),
        Table(
            "Clean images with and without noising first",
            ("method", "t*", "L2 from the image", "class changed"),
            rows,
            "DiffPure adds noise first and the others do not. Mean distances of images in [0, 1], with 95 % intervals "
            "over images; class changed: the classifier says another one of the purified image than of the image itself.",
        ),
        figures.bars("Accuracy with and without noising first", groups, "t* = 0.1; lines are intervals of 95 % over images."),
        tables.compared(results, [(fig2b.case("reverse-sde").name, fig2b.case("diffpure").name)]),
    ]


def _trust(measured: Mapping[str, np.ndarray]) -> Picture:
    """B.1: how far a learned classifier is off at its boundary, against the density there."""
    seen = measured["seen"].mean(axis=0)
    axes = new_figure(6.0, 3.8).add_subplot()
    axes.plot(seen, np.nanstd(measured["said"], axis=0), "o", color=COLOURS[0], label="of repeats")
    line = np.sort(seen)
    axes.plot(line, 0.5 / np.sqrt(line), "-", color=COLOURS[1], label="1 / (2 sqrt n), Appendix B.1")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("training points near by, n (density)")
    axes.set_ylabel("spread of the learned confidence")
    axes.figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    return Picture(
        "B.1, confidence is learned better where data is dense",
        to_png(axes.figure),
        f"A classifier by neighbourhoods of radius {_RADIUS:g} at points of the true boundary, {_REPEATS} training sets of "
        f"{_POINTS} points each: its standard deviation around one half.",
        "The spread of the learned confidence over the number of training points near by, both in powers of ten: points of the "
        "repeats beside the falling line 1 / (2 sqrt n).",
    )


def _confidence() -> Picture:
    """B.2: density and confidence, where classes overlap and where they do not."""
    x, agreed = _LINE, []
    figure = new_figure(9.6, 3.2)
    for panel, mean in zip(figure.subplots(1, len(_SEPARATIONS), sharey=True), _SEPARATIONS, strict=True):
        mixed, surest, agree = _agreement(x, mean)
        panel.plot(x, mixed / mixed.max(), "-", color=COLOURS[0], label="density (of its largest)")
        panel.plot(x, surest, "--", color=COLOURS[1], label="confidence")
        title = f"means ±{mean:g}: slopes agree\nin {100 * agree:.0f} % of data"
        agreed.append(" ".join(title.split()))
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("x")
        handles = panel.get_legend_handles_labels()
    figure.legend(*handles, fontsize=8, loc="outside lower center", ncols=2)
    return Picture(
        "B.2, density and confidence",
        to_png(figure),
        "Two Gaussians of standard deviation 1. Where they overlap, going up in density is going to the boundary.",
        f"{len(_SEPARATIONS)} panels of density and confidence over x, for two classes further and further apart: "
        f"{'; '.join(agreed)}.",
    )


def _agreement(x: np.ndarray, mean: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Density, confidence, and the share of data where both rise in the same direction."""
    plus, minus = two_gaussians.density(x, 1, mean), two_gaussians.density(x, -1, mean)
    mixed = 0.5 * (plus + minus)
    surest = np.maximum(plus, minus) / (plus + minus)
    same = np.gradient(mixed) * np.gradient(surest) > 0
    return mixed, surest, float((mixed * same).sum() / mixed.sum())


def _distances(measured: Mapping[str, np.ndarray]) -> Picture:
    figure = new_figure(8.6, 3.6)
    panels = figure.subplots(1, 2)
    for number, method in enumerate(_METHODS):
        style = f"{'os^'[number]}{('-', '--', ':')[number]}"
        # Ever finer: two may have equal values, and the upper one hides nothing of the one below.
        look = {"color": COLOURS[number], "linewidth": 3.5 - number, "markersize": 11 - 3 * number}
        distances = measured[f"{method} distance"]
        half = [tables.half_width(values) for values in distances]
        panels[0].errorbar(_TIMES, distances.mean(axis=1), half, fmt=style, label=NAMES[method], capsize=3, **look)
        panels[1].plot(_TIMES, 100 * measured[f"{method} changed"].mean(axis=1), style, **look)
    panels[0].set_ylabel("L2 of purified − image")
    panels[1].set_ylabel("class changed, % of images")
    for panel in panels:
        panel.set_xlabel("purification time t*")
        panel.set_ylim(bottom=0)
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    ends = "; ".join(
        f"{NAMES[method]} {found[0]:.2f} to {found[-1]:.2f}"
        for method in _METHODS
        for found in [measured[f"{method} distance"].mean(axis=1)]
    )
    return Picture(
        "C, how far purification goes",
        to_png(figure),
        "Clean images, one draw of the noise each; lines on the left are intervals of 95 % over images.",
        f"Two panels over the purification time from {_TIMES[0]:g} to {_TIMES[-1]:g}: the distance from the image, in L2 "
        f"({ends}), and the share of images whose class changed.",
    )


def _concludes(results: Results) -> list[str]:
    measured, at = results.measured, _TIMES.index(0.1)
    noised, straight = (measured[f"{method} distance"][at] for method in ("diffpure", "reverse-sde"))
    seen, spread = measured["seen"].mean(axis=0), np.nanstd(measured["said"], axis=0)
    shares = {mean: _agreement(_LINE, mean)[2] for mean in _SEPARATIONS}
    agreed = ", ".join(f"{100 * share:.0f} % (means ±{mean:g})" for mean, share in shares.items())
    off = float(np.abs(spread[seen > 5] * 2 * np.sqrt(seen[seen > 5]) - 1).max())
    return [
        f"C: at t* = 0.1 DiffPure ends {noised.mean() / straight.mean():.2f} times as far from a clean image as the reverse "
        "SDE, which leaves its noising out; L2 of the one less that of the other, with its 95 % interval over images: "
        f"{tables.mean(noised - straight)}. "
        f"{tables.says(results, fig2b.case('reverse-sde').name, fig2b.case('diffpure').name)}",
        f"B.1: the spread of the learned confidence follows 1 / (2 sqrt n) within {100 * off:.0f} % where more than 5 points "
        f"are near by.",
        f"B.2: density and confidence rise in the same direction in {agreed} of data, between the means only: where classes "
        f"overlap, going up in density is going to the boundary.",
        "B is about toy data whose classes are known; what images are like it does not say.",
    ]


EXPERIMENT = Experiment(
    name="appendix-b-c",
    place="Appendix B, C",
    title="density and confidence; with and without noising first",
    asks="Is a classifier to be trusted more where data is dense (B.1), do density and confidence rise together (B.2), and "
    "what does DiffPure's noising do that the reverse SDE leaves out (C)?",
    setting="Derivations (B), and a reference to Fig. 2b and Fig. 5 (C); no numbers",
    cases=[fig2b.case(method) for method in _METHODS],
    measure=_measure,
    times=_TIMES,
    sections=_sections,
    concludes=_concludes,
    assumptions=(
        "The paper shows no experiment for B: data sets and classifiers here are this project's.",
        LOST,
        EOT_ASSUMED,
    ),
)
