"""Figures that several experiments have, as PNG files. No shape or colour alone tells things apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from coupfast.evaluation.drawing import COLOURS, new_figure, to_png
from coupfast.evaluation.protocols import Accuracy
from coupfast.evaluation.report import Picture

_MARKS, _LINES, _HATCHES = "os^Dvp*", ("-", "--", ":", "-."), ("", "///", "...", "xx", "\\\\\\")


def bars(
    title: str,
    groups: Mapping[str, Mapping[str, Accuracy]],
    note: str,
    published: Mapping[str, Mapping[str, float]] | None = None,
) -> Picture:
    """Accuracies with intervals, side by side in groups.

    Args:
        groups: By group and by bar; all groups have the same bars.
        published: In per cent, drawn as marks beside the bars.
    """
    names = list(next(iter(groups.values())))
    axes = new_figure(2.4 + max(1.9, 0.6 * len(names)) * len(groups), 3.9).add_subplot()
    width = 0.8 / len(names)
    label: str | None = "published"
    for number, name in enumerate(names):
        at = np.arange(len(groups)) + (number - (len(names) - 1) / 2) * width
        found = [group[name] for group in groups.values()]
        values = np.array([100 * one.value for one in found])
        ends = 100 * np.array([one.wilson for one in found])
        error = np.stack([values - ends[:, 0], ends[:, 1] - values]).clip(min=0)
        colour = COLOURS[number % len(COLOURS)]
        look = {"color": colour, "alpha": 0.75, "hatch": _HATCHES[number % len(_HATCHES)]}
        axes.bar(at, values, 0.9 * width, yerr=error, capsize=3, label=name, **look)
        # Of a bar of height 0 nothing else would say which it is.
        axes.plot(at, values, _MARKS[number % len(_MARKS)], color=colour, markeredgecolor="black", markersize=7, clip_on=False)
        known = published or {}
        marks = [(x, known[group][name]) for x, group in zip(at, groups, strict=True) if name in known.get(group, {})]
        if marks:
            # Beside the interval, which may end there.
            beside = [(x + 0.3 * width, value) for x, value in marks]
            axes.plot(*zip(*beside, strict=True), "kD", markersize=6, label=label, clip_on=False)
            label = None
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 104)
    axes.figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    told = [
        f"{' '.join(group.split())}: {', '.join(f'{name} {100 * one.value:.1f} %' for name, one in found.items())}"
        for group, found in groups.items()
    ]
    return Picture(title, to_png(axes.figure), note, f"Bars with intervals. {'; '.join(told)}.")


def band(found: Accuracy) -> tuple[float, float]:
    """Of 95 %, the wider of two at either end: of 0 or 100 % every resample is the same, as if there were no doubt."""
    (low, high), (least, most) = found.wilson, found.bootstrap or found.wilson
    return min(low, least), max(high, most)


def curves(title: str, across: str, x: Sequence[float], lines: Mapping[str, Sequence[Accuracy]], note: str) -> Picture:
    """Accuracies over a number, with bands of 95 %."""
    axes = new_figure(6.6, 4.0).add_subplot()
    for number, (name, found) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        low, high = 100 * np.array([band(one) for one in found]).T
        style = f"{_MARKS[number % len(_MARKS)]}{_LINES[number % 2]}"
        axes.plot(x, [100 * one.value for one in found], style, color=colour, label=name, markersize=5)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel(across)
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 104)
    axes.figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    reached = [
        f"{name}: from {100 * found[0].value:.1f} % at {x[0]:g} to {100 * found[-1].value:.1f} % at {x[-1]:g}"
        for name, found in lines.items()
    ]
    return Picture(title, to_png(axes.figure), note, f"Curves over {across}. {'; '.join(reached)}.")
