"""Pictures of the README and the pages: each is described, shown and made by a script; diagrams can be read and are right."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from coupfast_kernels.convolution.definition import winograd_matrices

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
PAGES = [ROOT / "README.md", *(page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "experiments")]
#: A picture by Markdown and by MyST: where it lies, what it shows.
SHOWN = re.compile(
    r"!\[(?P<alt>[^\]]*)\]\((?P<file>[^)]+)\)|^```\{image\} (?P<path>\S+)\n(?::alt: (?P<said>.*)\n)?", re.MULTILINE
)


@pytest.fixture(scope="module")
def diagrams():
    spec = importlib.util.spec_from_file_location("diagrams", ROOT / "scripts" / "diagrams.py")
    module = sys.modules["diagrams"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["diagrams"]


def test_each_is_shown_and_described():
    shown = {}
    for page in PAGES:
        for found in SHOWN.finditer(page.read_text()):
            path = (page.parent / (found["file"] or found["path"])).resolve()
            assert path.is_file(), f"{page}: {path}"
            shown[path] = found["alt"] or found["said"] or ""
    assert {path for path in shown if path.parent == PICTURES} == set(PICTURES.glob("*.png"))
    assert {path.name: said for path, said in shown.items() if len(said.split()) < 10} == {}


def test_each_is_made_by_a_script(diagrams):
    made = set(diagrams.DIAGRAMS) | set(re.findall(r'out / "([\w-]+)\.png"', (ROOT / "scripts" / "pictures.py").read_text()))
    # Those three are made by benchmarks, as the pages that show them say.
    assert {path.stem for path in PICTURES.glob("*.png")} == made | {"solvers", "verdict", "verdict-full"}


@pytest.mark.parametrize("name", ["design", "step", "adjoint", "engine-cpu", "engine-cuda", "winograd"])
def test_the_words_of_a_diagram_fit(diagrams, name):
    drawing = diagrams.DIAGRAMS[name]()
    canvas = FigureCanvasAgg(drawing.figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    for frame, words in [*drawing.boxes, *((drawing.figure.patch, words) for words in drawing.axes.texts)]:
        if words.get_text():
            outer, inner = frame.get_window_extent(renderer), words.get_window_extent(renderer)
            assert outer.x0 <= inner.x0 and inner.x1 <= outer.x1, words.get_text()
            assert outer.y0 <= inner.y0 and inner.y1 <= outer.y1, words.get_text()


def test_winograds_tile_is_the_convolution(diagrams):
    tile = diagrams.winograd_tile()
    direct = torch.nn.functional.conv2d(tile["d"][None], tile["w"][None])[0, 0]
    a, g, b = (matrix.abs() for matrix in winograd_matrices(torch.float64))
    size = a @ ((g @ tile["w"].abs() @ g.T) * (b @ tile["d"].abs() @ b.T)).sum(dim=0) @ a.T
    # Roundings of a term: its transforms' sums of 6 and of 3 and their constants, product, sum over channels, the way back; and
    # the direct sum's.
    assert ((tile["y"] - direct).abs() <= (2 * 7 + 2 * 4 + 4 + 2 * 7 + 28) * torch.finfo(torch.float64).eps * size).all()
    assert [tuple(tile[key].shape[-2:]) for key in "dVUMy"] == [(6, 6)] * 4 + [(4, 4)]
