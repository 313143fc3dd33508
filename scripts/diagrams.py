"""The diagrams of the pages on how it works, as Matplotlib draws them: `scripts/pictures.py` keeps them.

A diagram is five inches wide, so that its words can be read on a phone, and says nothing by colour alone. The numbers in
Winograd's tile are computed with the transforms of its definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from coupfast_kernels.convolution.definition import winograd_matrices

#: Of Okabe and Ito, which colour-blind readers can tell apart: what is in memory, what is computed, what is compared.
MEMORY, COMPUTED, CHECKED = "#0072B2", "#E69F00", "#009E73"
_PLAIN, _WIDTH = "#444444", 5.0
EPS_HAT, ADJOINT_EPS = r"$\hat\varepsilon$", r"$J_{\hat\varepsilon}^\top v'$"


class Drawing:
    """A figure in inches from its lower left corner, of boxes, arrows and words."""

    def __init__(self, height: float) -> None:
        self.figure = Figure(figsize=(_WIDTH, height), facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(0, _WIDTH)
        self.axes.set_ylim(0, height)
        self.axes.set_axis_off()
        self.boxes: list[tuple[FancyBboxPatch, Any]] = []  # with their words, which have to fit

    def box(self, x: float, y: float, width: float, height: float, words: str, colour: str = _PLAIN, **look: Any) -> None:
        """Words in a frame around (x, y); dashed is what is computed again."""
        patch = FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.06",
            facecolor=(*_rgb(colour), 0.14),
            edgecolor=colour,
            linewidth=1.4,
            linestyle=look.pop("linestyle", "-"),
        )
        self.axes.add_patch(patch)
        self.boxes.append((patch, self.words(x, y, words, **look)))

    def words(self, x: float, y: float, words: str, **look: Any) -> Any:
        return self.axes.text(x, y, words, **{"ha": "center", "va": "center", "fontsize": 10.5, "linespacing": 1.25, **look})

    def arrow(self, start: tuple[float, float], end: tuple[float, float], **look: Any) -> None:
        usual = {"arrowstyle": "-|>", "mutation_scale": 13, "color": _PLAIN, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
        self.axes.add_patch(FancyArrowPatch(start, end, **{**usual, **look}))


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def step() -> Drawing:
    """What a guided step reads and writes, and its transpose."""
    drawing = Drawing(6.0)
    _fused(
        drawing,
        4.55,
        "a step, forwards",
        ("$x$\nthe state", f"{EPS_HAT}\nscore network", "$g$\nguidance"),
        rf"$x' = a\,x + b\,${EPS_HAT}$ + c\,g + d\,z$",
        "$z$: noise, counted from seed, image, draw and step,\nmade here and never in memory",
        "$x'$\nthe next state",
    )
    drawing.axes.axhline(2.98, color="#bbbbbb", linewidth=0.8)
    _fused(
        drawing,
        1.5,
        "its transpose, backwards: the same kernel",
        ("$v'$\ngradient by $x'$", f"$u = ${ADJOINT_EPS}\nback through\nthe network", "$w = H\\,v'$\nHessian of\nthe guidance"),
        r"$v = a\,v' + b\,u + c\,w$",
        "no noise: it does not depend on $x$",
        "$v$\ngradient by $x$",
    )
    return drawing


def _fused(drawing: Drawing, y: float, title: str, read: Sequence[str], formula: str, note: str, written: str) -> None:
    drawing.words(0.12, y + 1.3, title, ha="left", fontsize=11.5, fontweight="bold")
    for x, words in zip((0.82, 2.35, 3.88), read, strict=True):
        drawing.box(x, y + 0.75, 1.42, 0.72, words, MEMORY)
        drawing.arrow((x, y + 0.39), (x, y + 0.12))
    drawing.box(2.35, y - 0.28, 4.48, 0.8, "", COMPUTED)
    drawing.words(2.35, y - 0.07, formula, fontsize=13)
    drawing.words(2.35, y - 0.42, note, fontsize=9)
    drawing.arrow((2.35, y - 0.68), (2.35, y - 0.9))
    drawing.box(2.35, y - 1.15, 1.6, 0.5, written, MEMORY)
    for height, words in ((y + 0.75, "read"), (y - 0.28, "one\nkernel"), (y - 1.15, "written")):
        drawing.words(4.8, height, words, fontsize=9, color=_PLAIN, rotation=90)
    drawing.words(0.12, y - 1.15, "of each element\n12 bytes are read,\n4 are written", ha="left", fontsize=9)


def adjoint() -> Drawing:
    """The exact gradient: what is kept on the way there, and what is computed again on the way back."""
    drawing = Drawing(4.1)
    steps, kept = 4, 1  # drawn: steps, and how many of the last ones keep their activations
    at = np.linspace(0.42, 4.58, steps + 1)
    drawing.words(0.12, 3.88, "forwards", ha="left", fontsize=11.5, fontweight="bold")
    drawing.words(4.88, 3.88, "every state is kept", ha="right", fontsize=9.5)
    drawing.words(0.12, 0.26, "backwards", ha="left", fontsize=11.5, fontweight="bold")
    for k, x in enumerate(at):
        drawing.box(x, 3.3, 0.5, 0.5, f"$x_{k}$", MEMORY)
        drawing.box(x, 0.75, 0.5, 0.5, f"$v_{k}$", _PLAIN)
        if k == steps:
            continue
        middle, after = (x + at[k + 1]) / 2, at[k + 1]
        drawing.arrow((x + 0.25, 3.3), (after - 0.25, 3.3))
        drawing.arrow((after - 0.25, 0.75), (x + 0.25, 0.75))
        keeps = k >= steps - kept
        look = ("activations\nkept", MEMORY, "-") if keeps else (f"evaluated\nagain at $x_{k}$", COMPUTED, "--")
        drawing.box(middle, 2.05, 0.98, 0.62, look[0], look[1], linestyle=look[2], fontsize=8.5)
        drawing.arrow((middle if keeps else x, 3.3 if keeps else 3.05), (middle, 2.36), linestyle="-" if keeps else ":")
        drawing.arrow((middle, 1.74), (middle, 0.78))
    formula = r"$v_k = a\,v' + b\,J_{\hat\varepsilon}^\top v' + c\,H\,v'$  at $x_k$,  $v' = v_{k+1}$"
    drawing.words(3.1, 0.26, formula, fontsize=10.5)
    return drawing


def winograd_tile(channels: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """A tile of F(4 × 4, 3 × 3) in float64: d and w by channel, V and U, their product's sum M, and y."""
    generator = torch.Generator().manual_seed(seed)
    at = torch.linspace(-1, 1, 6, dtype=torch.float64)
    smooth = torch.stack([torch.outer(torch.sin(2 * at + k), torch.cos(3 * at - k)) for k in range(channels)])
    d = smooth + 0.2 * torch.randn(channels, 6, 6, dtype=torch.float64, generator=generator)
    w = torch.randn(channels, 3, 3, dtype=torch.float64, generator=generator)
    a, g, b = winograd_matrices(torch.float64)
    u, v = g @ w @ g.T, b @ d @ b.T
    m = (u * v).sum(dim=0)
    return {"d": d, "w": w, "V": v, "U": u, "M": m, "y": a @ m @ a.T}


def winograd() -> Drawing:
    """One tile through its transforms, products and back."""
    drawing = Drawing(6.5)
    tile = winograd_tile()
    place = (2, 3)  # the one that is followed
    left, right = 1.25, 3.75
    _maps(drawing, (left, 5.75), tile["d"], "$d$: 6 × 6 pixels, a sheet a\nchannel; tiles overlap by two")
    _maps(drawing, (right, 5.75), tile["w"], "$w$: 3 × 3 weights,\na sheet a channel")
    _maps(drawing, (left, 3.72), tile["V"], "$V = B^\\top d\\,B$", place)
    _maps(drawing, (right, 3.72), tile["U"], "$U = G\\,w\\,G^\\top$, once, when packed", place)
    words = "at each of the 36 places (one is framed) a matrix product:\n[tiles, channels in] · [channels in, channels out]"
    drawing.box(2.5, 2.27, 4.7, 0.52, words, COMPUTED, fontsize=9.5)
    for x in (left, right):
        drawing.arrow((x, 4.68), (x, 4.4))
        drawing.arrow((x, 2.84), (x, 2.54))
    drawing.arrow((left, 2.0), (left, 1.72))
    _maps(drawing, (left, 1.12), tile["M"][None], "$M$, of one channel out", place)
    drawing.arrow((1.95, 1.12), (3.25, 1.12))
    drawing.words(2.6, 1.32, "$A^\\top M\\,A$")
    _maps(drawing, (right, 1.12), tile["y"][None], "$y$: 4 × 4 results", size=4 / 6)
    drawing.words(2.5, 0.18, "between two channels 36 products, directly 16 · 9 = 144", fontsize=9)
    return drawing


def _maps(
    drawing: Drawing,
    centre: tuple[float, float],
    sheets: torch.Tensor,
    words: str,
    place: tuple[int, int] | None = None,
    *,
    size: float | None = None,
) -> None:
    """Maps as sheets behind each other, their numbers as shades of one colour for below zero and another for above."""
    n = sheets.shape[-1]
    size = (1.0 if n == 6 else 0.5) if size is None else size
    cell, limit = size / n, float(sheets.abs().max())
    for number in range(len(sheets) - 1, -1, -1):
        shift = 0.1 * (number - (len(sheets) - 1) / 2)
        left, top = centre[0] - size / 2 + shift, centre[1] + size / 2 + shift
        for i in range(n):
            for j in range(n):
                share = float(sheets[number, i, j]) / limit
                shade = (*_rgb(MEMORY if share < 0 else "#D55E00"), abs(share) ** 0.7)
                corner = (left + j * cell, top - (i + 1) * cell)
                drawing.axes.add_patch(Rectangle(corner, cell, cell, facecolor="white", edgecolor="none"))
                drawing.axes.add_patch(Rectangle(corner, cell, cell, facecolor=shade, edgecolor="#999999", linewidth=0.4))
        if place is not None:
            corner = (left + place[1] * cell, top - (place[0] + 1) * cell)
            drawing.axes.add_patch(Rectangle(corner, cell, cell, facecolor="none", edgecolor="black", linewidth=2.2))
    drawing.words(centre[0], centre[1] - size / 2 - 0.14, words, va="top", fontsize=9.5)


def _way(*boxes: tuple[str, str, float, str]) -> Drawing:
    """Boxes below each other with arrows between: words, a colour, a height, and what stands at the right."""
    gap, below, above = 0.24, 0.12, 0.1
    y = round(sum(height for _, _, height, _ in boxes) + gap * (len(boxes) - 1) + below, 2)
    drawing = Drawing(y + above)
    for number, (words, colour, height, note) in enumerate(boxes):
        if number:
            drawing.arrow((1.62, y), (1.62, y - gap))
            y -= gap
        drawing.box(1.62, y - height / 2, 3.0, height, words, colour, fontsize=10)
        drawing.words(3.24, y - height / 2, note, ha="left", fontsize=9)
        y -= height
    return drawing


def cpu_engine() -> Drawing:
    """How engine cpu makes a list of kernel calls of a network."""
    parts = "parts:\nconvolutions with what is around them,\nattention, joined maps, group norms;\nregions: all the rest"
    return _way(
        ("your network", _PLAIN, 0.4, "any nn.Module"),
        ("trace: its operations, in order", COMPUTED, 0.46, "once for a shape\nof images"),
        (parts, COMPUTED, 1.02, "kernels take the\nparts, PyTorch\nthe regions"),
        ("program: two lists of calls,\nforwards and backwards", COMPUTED, 0.62, "once for each\nbatch size"),
        ("memory, planned as a whole:\nan address for every value", MEMORY, 0.62, "kernels allocate\nnothing in a step"),
        ("a step: the lists run", COMPUTED, 0.46, "every step, image\nand seed"),
    )


def cuda_engine() -> Drawing:
    """How engine cuda makes a graph that is replayed of two networks."""
    pieces = "pieces, as flat graphs with\nderivatives written out:\nscore, evaluate, cotangent, …"
    replayed = "replayed for every step: state, step's\nindex, seed, ids and draws lie\nin memory"
    return _way(
        ("score network and classifier", _PLAIN, 0.4, "any nn.Modules"),
        ("traces", COMPUTED, 0.4, "once for a shape\nof images"),
        (pieces, COMPUTED, 0.84, "each compared with\nPyTorch's before use"),
        ("this project's kernels put in\nwhere calibration favours them", COMPUTED, 0.62, "measured once\non a GPU, kept"),
        ("a piece compiled where that\nspares launches", COMPUTED, 0.62, "launches are\ncounted, kept"),
        ("one step captured as one graph\non fixed addresses", COMPUTED, 0.62, "once for a range\nof batch sizes"),
        (replayed, MEMORY, 0.84, "the host launches\nthe graph and copies\nthe state"),
    )


def design() -> Drawing:
    """An image's way through the package, and the gradient's way back."""
    drawing = Drawing(5.5)
    drawing.box(2.5, 5.17, 4.7, 0.46, "evaluation: attacks, judge, ledger", _PLAIN)
    drawing.arrow((1.0, 4.94), (1.0, 4.56))
    drawing.words(1.08, 4.75, "image in [0, 1]", ha="left", fontsize=9)
    drawing.arrow((4.0, 4.56), (4.0, 4.94))
    drawing.words(3.92, 4.75, "logits; gradient", ha="right", fontsize=9)
    drawing.box(2.5, 4.3, 4.7, 0.52, "defense: purify, then classify", _PLAIN)
    drawing.arrow((1.0, 4.04), (1.0, 3.66))
    drawing.words(1.08, 3.85, "state in [-1, 1]", ha="left", fontsize=9)
    drawing.arrow((4.0, 3.66), (4.0, 4.04))
    drawing.words(3.92, 3.85, "purified; gradient", ha="right", fontsize=9)
    words = "purifier: a method's table, a row for each step;\nnoise counted by seed, image, draw and step"
    drawing.box(2.5, 3.33, 4.7, 0.66, words, MEMORY)
    drawing.arrow((1.0, 3.0), (1.0, 2.68))
    drawing.arrow((4.0, 2.68), (4.0, 3.0))
    drawing.box(2.5, 2.35, 4.7, 0.66, "engine: for each row a step,\nand on the way back its transpose", COMPUTED)
    for x, words in ((0.9, "eager:\nPyTorch"), (2.5, "cpu:\nC++ kernels"), (4.1, "cuda: Triton\nkernels, graphs")):
        drawing.arrow((x, 2.02), (x, 1.75))
        drawing.box(x, 1.45, 1.5, 0.6, words, COMPUTED, fontsize=9.5)
    words = "definition: the same SDE by torchsde in float64;\nof the above it shares the SDE's constants alone"
    drawing.box(2.5, 0.45, 4.7, 0.7, words, CHECKED, fontsize=9.5)
    drawing.arrow((2.5, 1.15), (2.5, 0.8), arrowstyle="<|-|>", linestyle="--")
    drawing.words(2.6, 0.98, "compared by tests and certificates", ha="left", fontsize=9)
    return drawing


DIAGRAMS = {
    "design": design,
    "step": step,
    "adjoint": adjoint,
    "engine-cpu": cpu_engine,
    "engine-cuda": cuda_engine,
    "winograd": winograd,
}
