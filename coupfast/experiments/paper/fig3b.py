"""Fig. 3b: label flips of two Gaussians over guidance and the classifier's noise; Propositions 1 and 2 in numbers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from coupfast.evaluation.drawing import COLOURS, new_figure, to_png
from coupfast.evaluation.protocols import wilson_interval
from coupfast.evaluation.report import Picture, Section, Table
from coupfast.experiments import two_gaussians
from coupfast.experiments.experiment import Experiment, Results
from coupfast.experiments.scale import Scale

_SCALES = np.array([0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0])
_LEVELS = np.array([0.0, 0.02, 0.05, 0.1, 0.2, 0.5])
_ENDS = np.array([0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3])


def _measure(scale: Scale, folders: Mapping[str, str]) -> dict[str, np.ndarray]:
    found = two_gaussians.flips(_SCALES, _LEVELS, scale.paths, scale.seed)
    first = two_gaussians.proposition_1(_SCALES[1:], scale.paths, scale.seed)
    second = two_gaussians.proposition_2(_ENDS, 1.0, scale.paths, scale.seed)
    measured = {"paths": np.array(scale.paths), "ended": found.ended, "crossed": found.crossed}
    return measured | {f"first {name}": x for name, x in first.items()} | {f"second {name}": x for name, x in second.items()}


def _sections(results: Results) -> list[Section]:
    measured, paths = results.measured, int(results.measured["paths"])
    rows = []
    for i, scale in enumerate(_SCALES):
        cells = [_share(int(count), paths) for count in measured["ended"][i]]
        rows.append((f"{scale:g}", *cells))
    first = [
        (
            f"{scale:g}",
            *(f"{int(measured[f'first {name}'][i]):,}" for name in ("plain", "guided", "only_plain", "only_guided")),
            *(f"{measured[f'first {name}'][i]:.3g}" for name in ("gap", "drift", "slope")),
        )
        for i, scale in enumerate(_SCALES[1:])
    ]
    names = ("distance", "bound", "distance_99", "bound_99", "spread", "spread_limit")
    second = [
        (f"{t:g}", *(f"{measured[f'second {name}'][i]:.3f}" for name in names), f"{int(measured['second above'][i])}")
        for i, t in enumerate(_ENDS)
    ]
    return [
        _heat(measured, paths),
        _curves(measured, paths),
        Table(
            "Label flips",
            ("λ", *(f"ν = {level:g}" for level in _LEVELS)),
            rows,
            f"Paths that end below 0, in % of {paths:,}, with 95 % intervals; all points have the same noise.",
        ),
        Table(
            "Proposition 1",
            ("λ", "unguided", "guided", "only unguided", "only guided", "least lead", "least drift", "least slope"),
            first,
            f"Paths that cross, of {paths:,} pairs with the same noise and the true classifier. "
            "The proposition: where guidance pushes "
            "away from 0 (least drift above 0) and a step keeps the order of points (least slope above 0), fewer paths "
            "cross. In a pair the guided one is then never behind before one of them crosses (least lead at least 0), and "
            "none crosses alone.",
        ),
        _bound(measured),
        Table(
            "Proposition 2",
            ("t*", "distance, mean", "bound, mean", "distance, 99 %", "bound, 99 %", "noise", "sqrt(exp ∫β − 1)", "beyond"),
            second,
            f"{paths:,} paths at λ = 1, each beside its own bound; noise: the standard deviation "
            "of the bound's random term; beyond: how many paths are.",
        ),
    ]


def _share(count: int, paths: int) -> str:
    low, high = wilson_interval(count, paths)
    return f"{100 * count / paths:.2f} [{100 * low:.2f}, {100 * high:.2f}]"


def _heat(measured: Mapping[str, np.ndarray], paths: int) -> Picture:
    figure, maps = new_figure(9.4, 3.9), {}
    panels = figure.subplots(1, 2)
    for panel, (name, title) in zip(panels, (("ended", "ends below 0"), ("crossed", "below 0 after some step")), strict=True):
        shares = maps[title] = 100 * measured[name] / paths
        shown = panel.imshow(shares.T, origin="lower", aspect="auto", cmap="viridis")
        panel.set_xticks(range(len(_SCALES)), [f"{scale:g}" for scale in _SCALES])
        panel.set_yticks(range(len(_LEVELS)), [f"{level:g}" for level in _LEVELS])
        panel.set_xlabel("guidance scale λ")
        panel.set_ylabel("noise of the classifier ν")
        panel.set_title(f"{title}, %", fontsize=10)
        middle = (shares.min() + shares.max()) / 2
        for i in range(len(_SCALES)):
            for j in range(len(_LEVELS)):
                colour = "black" if shares[i, j] > middle else "white"
                panel.text(i, j, f"{shares[i, j]:.1f}", ha="center", va="center", fontsize=7, color=colour)
        figure.colorbar(shown, ax=panel)
    told = "; ".join(f"{title}, {shares.min():.1f} to {shares.max():.1f} %" for title, shares in maps.items())
    return Picture(
        "Label flips, a map",
        to_png(figure),
        f"From {two_gaussians.START:g}, {paths:,} paths a point.",
        f"Two maps with a number in each field, guidance scale across and noise of the classifier up, of the share of "
        f"paths: {told}.",
    )


def _curves(measured: Mapping[str, np.ndarray], paths: int) -> Picture:
    axes = new_figure(6.6, 4.0).add_subplot()
    for j, level in enumerate(_LEVELS):
        counts = measured["ended"][:, j]
        ends = 100 * np.array([wilson_interval(int(count), paths) for count in counts])
        colour = COLOURS[j % len(COLOURS)]
        axes.plot(_SCALES, 100 * counts / paths, f"{'os^Dvp'[j]}-", color=colour, markersize=4, label=f"ν = {level:g}")
        axes.fill_between(_SCALES, ends[:, 0], ends[:, 1], color=colour, alpha=0.2, linewidth=0)
    axes.set_xlabel("guidance scale λ")
    axes.set_ylabel("paths that end below 0, %")
    axes.set_ylim(bottom=0)
    axes.figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    told = "; ".join(
        f"ν = {level:g}, from {first:.1f} to {last:.1f} %"
        for level, first, last in zip(_LEVELS, *(100 * measured["ended"][[0, -1]] / paths), strict=True)
    )
    return Picture(
        "Label flips, curves",
        to_png(axes.figure),
        "Bands: 95 %.",
        f"Curves of the share of paths that end below 0, over the guidance scale from {_SCALES[0]:g} to {_SCALES[-1]:g}: "
        f"{told}.",
    )


def _bound(measured: Mapping[str, np.ndarray]) -> Picture:
    axes = new_figure(6.0, 3.8).add_subplot()
    for name, label, style in (
        ("distance", "distance, mean", "o-"),
        ("distance_99", "distance, 99 %", "s--"),
        ("bound", "bound, mean", "^-"),
        ("bound_99", "bound, 99 %", "D--"),
    ):
        axes.plot(_ENDS, measured[f"second {name}"], style, color=COLOURS[name.startswith("bound")], label=label, markersize=4)
    axes.set_xlabel("purification time t*")
    axes.set_ylabel("|purified − input|")
    axes.set_ylim(bottom=0)
    axes.figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    return Picture(
        "Proposition 2, distance and bound",
        to_png(axes.figure),
        "Mean and 99 % quantile over paths, λ = 1.",
        f"Four curves over the purification time from {_ENDS[0]:g} to {_ENDS[-1]:g}: mean and 99 % quantile of the distance "
        "between input and purified point, and of its bound.",
    )


def _fewest(counts: np.ndarray, paths: int) -> str:
    """The λ with the fewest flips, and those whose intervals meet its."""
    ends, best = [wilson_interval(int(count), paths) for count in counts], int(counts.argmin())
    others = [f"{scale:g}" for i, scale in enumerate(_SCALES) if i != best and ends[i][0] <= ends[best][1]]
    return f"{_SCALES[best]:g}" + (f" (intervals of {', '.join(others)} meet its)" if others else "")


def _concludes(results: Results) -> list[str]:
    measured, paths = results.measured, int(results.measured["paths"])
    best = ", ".join(f"ν = {level:g}: {_fewest(measured['ended'][:, j], paths)}" for j, level in enumerate(_LEVELS))
    clean, noisy = measured["ended"][:, 0] / paths, measured["ended"][:, -1] / paths
    only = int(measured["first only_guided"].sum())
    lead, above = float(measured["first gap"].min()), int(measured["second above"].sum())
    return [
        f"With the true classifier, of paths from {two_gaussians.START:g}, {100 * clean[0]:.1f} % flip "
        f"at λ = 0 and {100 * clean[-1]:.1f} % at λ = {_SCALES[-1]:g}; with the noisiest (ν = {_LEVELS[-1]:g}) "
        f"{100 * noisy[0]:.1f} % and {100 * noisy[-1]:.1f} %.",
        f"The λ with the fewest flips, by noise of the classifier: {best}.",
        f"Proposition 1: of all pairs {only} had a guided path cross alone, and the least lead of a guided path was "
        f"{lead:.2g}; "
        + ("as it says." if only == 0 and lead >= 0 else "which contradicts it."),
        f"Proposition 2: {above} paths of all were beyond their bound, "
        + ("as it says" if above == 0 else "which contradicts it")
        + f", and at t* = {_ENDS[3]:g} the bound's mean is "
        f"{measured['second bound'][3] / measured['second distance'][3]:.1f} times the mean distance.",
        "One dimension, known densities and a classifier whose errors do not depend on an attacker: it says nothing of images.",
    ]


EXPERIMENT = Experiment(
    name="fig3b",
    place="Fig. 3b",
    title="label flips of two Gaussians, and Propositions 1 and 2",
    asks="Does guidance keep a purification from crossing the decision boundary, also with a classifier that is wrong, where "
    "everything is known?",
    setting="A mixture of two symmetric Gaussians in one dimension, Euler steps, a noisy classifier; numbers not legible",
    measure=_measure,
    sections=_sections,
    concludes=_concludes,
    simulates=True,
    assumptions=(
        f"Not legible, and assumed: classes N(±{two_gaussians.MEAN:g}, {two_gaussians.STD:g}²), the start "
        f"{two_gaussians.START:g}, t* = {two_gaussians.T:g} in Euler steps of {two_gaussians.STEP:g}, λ from 0 to "
        f"{_SCALES[-1]:g}, ν from 0 to {_LEVELS[-1]:g}.",
        "The noisy classifier is (p_y + ν ε_y) / Σ (…) with ε_y = |N(0, 1)| for each class, drawn once for each path: the "
        "paper's formula is not legible, and noise in numerator and denominator is what the sentence around it describes.",
        "A flip is a path that ends below 0; Proposition 1 is about paths that are below 0 after some step. Both are shown.",
        "The constants of Proposition 2's bound are not legible: it is derived again from the paper's proof, for the steps "
        "that run, with the largest score and guidance that any of the paths met.",
    ),
)
