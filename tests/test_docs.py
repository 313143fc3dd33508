"""The site builds without a warning, and every block of code in the README and on the site's pages runs."""

import ast
import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import coupfast
import coupfast_kernels
from coupfast import cli
from coupfast.models import registry as network_registry
from coupfast_kernels import registry as kernel_registry

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"coupfast": coupfast, "kernels/coupfast_kernels": coupfast_kernels}
#: What else a page may tell people to type.
SCRIPTS = ("./scripts/", ".", "python", "pip", "ray", "pytest", "sphinx-build")
#: A fenced block, with what a comment above it says of why it is not run.
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
PAGES = sorted(
    page
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    if "experiments" not in page.relative_to(ROOT).parts and re.search(r"^```(python|sh)$", page.read_text(), re.MULTILINE)
)


def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("sphinx", reason='the site needs the extra "docs"')
    pytest.importorskip("myst_parser", reason='the site needs the extra "docs"')
    pytest.importorskip("furo", reason='the site needs the extra "docs"')
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "-b", "html"]
    done = subprocess.run([*command, str(ROOT / "docs"), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "reference" / "cli.html").read_text()
    assert "--num-steps" in page and "coupfast evaluate" in page
    # Nothing that a reader's browser would have to fetch from elsewhere.
    outside = [
        (built.name, found)
        for built in tmp_path.rglob("*.html")
        for found in re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', built.read_text())
    ]
    assert outside == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_its_code_runs(page, tmp_path, monkeypatch):
    """Python blocks of a page run in order in one namespace and folder; one that begins with `# NAME.py` is written there as a
    module instead. Lines of `sh` blocks run, too, unless a comment says why not: then their options are parsed.
    """
    namespace = {"__name__": "__page__"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    # What a page registers is known on that page only. (Looking a name up imports the package's own.)
    assert network_registry.find_known("score", "cifar10-tiny") and network_registry.find_known("classifier", "cifar10-tiny")
    monkeypatch.setattr(kernel_registry, "_kernels", {kernel.name: kernel for kernel in kernel_registry.kernels()})
    monkeypatch.setattr(network_registry, "_families", dict(network_registry._families))
    monkeypatch.setattr(network_registry, "_names", list(network_registry._names))
    before = set(sys.modules)
    try:
        for found in BLOCK.finditer(page.read_text()):
            code = found["code"]
            if found["language"] == "python":
                if name := re.match(r"# (\w+\.py)\n", code):
                    (tmp_path / name[1]).write_text(code)
                elif not found["reason"]:
                    exec(compile(code, f"{page.name}, the block of {code[:40]!r}", "exec"), namespace)
            elif found["language"] == "sh":
                for line in code.replace("\\\n", " ").splitlines():
                    check_line(line.split(" #")[0].strip(), run=not found["reason"])
            elif found["language"] == "bash":  # a script for another system: its grammar, and its commands of ours
                assert subprocess.run(["bash", "-n"], input=code, text=True).returncode == 0
                for line in re.findall(r"coupfast .*$", code, re.MULTILINE):
                    check_line(line, run=False)
    finally:
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
                del sys.modules[name]


def check_line(line: str, *, run: bool) -> None:
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # variables of the environment
        words = words[1:]
    if not words:
        return
    if words[0] == "coupfast":
        argv = words[1:]
        if run:
            output = io.StringIO()
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                status = cli.main(argv)
            assert status == 0, f"{line}\n{output.getvalue()}"
        else:
            argv = [word if word != "cuda" or torch.cuda.is_available() else "cpu" for word in argv]
            cli.parser(argv).parse_args(argv)
    else:
        assert words[0].startswith(SCRIPTS), f"nothing checks this line: {line}"
        assert not run, f"a page says why it does not run what is not `coupfast`: {line}"
        for word in words:
            if re.fullmatch(r"(\./)?(bench|scripts|examples|tests|docs|\.ci)/[\w./]+", word):
                assert (ROOT / word).exists() or "MACHINE" in word or "results" in word, line


def test_errors_of_the_page_are_those_of_the_code():
    said = []
    for package in PACKAGES.values():
        for file in Path(package.__file__).parent.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    said.append(node.value)
                elif isinstance(node, ast.JoinedStr):  # what varies stands between the dots of a row
                    said.append("\0".join(part.value for part in node.values if isinstance(part, ast.Constant)))
    text = "\n".join(said)
    rows = re.findall(r"^\| (.*?) \|", (ROOT / "docs" / "reference" / "errors.md").read_text(), re.MULTILINE)[1:]
    parts = [part.strip(" ,") for row in rows for part in row.split("…")]
    assert len(rows) > 20 and [part for part in parts if part not in text] == []


def test_paths_that_pages_name_are_there():
    pattern = re.compile(r"`((?:\./)?(?:tests|bench|scripts|examples|docs|coupfast|kernels|\.ci)/[\w./-]+?)(?:`|[ :])")
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    named = {(page.name, path) for page in pages for path in pattern.findall(page.read_text()) if "MACHINE" not in path}
    assert len(named) > 50
    # Packages may be installed elsewhere, where these tests are of an sdist.
    packages = {f"{folder}/": Path(package.__file__).parent for folder, package in PACKAGES.items()}
    missing = []
    for page, path in sorted(named):
        folder = next((folder for folder in packages if f"{path}/".startswith(folder)), "")
        if not (packages.get(folder, ROOT) / f"{path}/".removeprefix(folder)).exists():
            missing.append((page, path))
    assert missing == []
