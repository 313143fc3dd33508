"""The README is short, its figures are those of files, and the maps of the pages name all that is there and nothing else."""

import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import coupfast

ROOT, PACKAGE = Path(__file__).parent.parent, Path(coupfast.__file__).parent


def rows(page: str) -> list[list[str]]:
    """The cells of a page's first table, without its head."""
    _, _, rest = (ROOT / "docs" / page).read_text().partition("\n|")
    lines = ["|" + line for line in rest.split("\n\n")[0].split("\n|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


ADDED, PLACES = rows("extend/index.md"), rows("how/map.md")


@pytest.mark.parametrize("cells", ADDED, ids=lambda cells: cells[0])
def test_what_to_add_is_there(cells):
    for name in code(cells[1]):
        if re.fullmatch(r"coupfast\w*(\.\w+)+", name):
            pkgutil.resolve_name(name)


def test_where_it_is_tested():
    tested = [path for cells in ADDED for path in code(cells[-1])]
    assert len(tested) >= 4
    assert [path for path in tested if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("cells", PLACES, ids=lambda cells: cells[0])
def test_where_things_are(cells):
    paths = [word for word in code(cells[1]) if word.endswith((".py", "/"))]
    assert paths
    assert [path for path in paths if not (PACKAGE / path).exists()] == []


def test_everything_is_on_the_map():
    named = {path.rstrip("/") for cells in PLACES for path in code(cells[1])}
    modules = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert sorted((modules | folders) - named) == []


@pytest.mark.parametrize("folder", ["evaluation", "engine"])
def test_a_folder_says_what_is_in_it(folder):
    text = (PACKAGE / folder / "__init__.py").read_text()
    parts = {path.stem for path in (PACKAGE / folder).iterdir() if not path.stem.startswith("_")}
    assert sorted(part for part in parts if not re.search(rf"\b{part}\b", text)) == []


def test_the_readme_is_short_and_its_figures_are_measured():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 700
    done = subprocess.run([sys.executable, str(ROOT / "docs" / "_ext" / "figures.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in text, "run `python docs/_ext/figures.py` and put what it prints there"


def test_links_of_the_readme_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "kernels" / "README.md"):
        targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
        assert targets or page.name == "CONTRIBUTING.md"
        assert [target for target in targets if not (page.parent / target).exists()] == []
