"""What a wheel and an sdist hold, and that the wheel works without the checkout."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import coupfast

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist), built once, without an index."""
    pytest.importorskip("hatchling", reason="pip install hatchling builds without an index")
    from hatchling import build

    if not (ROOT / "coupfast").is_dir():
        pytest.skip("there are no sources to build")
    folder, here = tmp_path_factory.mktemp("built"), os.getcwd()
    os.chdir(ROOT)
    try:
        return folder / build.build_wheel(str(folder)), folder / build.build_sdist(str(folder))
    finally:
        os.chdir(here)


def tracked(*folders: str) -> set[str]:
    """Files of a checkout, as git has them."""
    done = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this is no checkout")
    return set(done.stdout.split())


def test_the_wheel_has_all_of_the_packages_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == {name.removeprefix("kernels/") for name in tracked("coupfast", "kernels/coupfast_kernels")}
    assert {"coupfast/py.typed", "coupfast_kernels/py.typed", "coupfast_kernels/csrc/kernels.cpp"} <= names


def test_the_sdist_has_what_tests_and_site_need(built):
    with tarfile.open(built[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = tracked("coupfast", "kernels", "bench", "tests", "scripts", "docs", "examples", ".ci")
    assert wanted - names == set()
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE", "pyproject.toml"} <= names


def test_the_wheel_works_from_outside(built, tmp_path):
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(tmp_path / "site")
    code = (
        "import torch, coupfast, coupfast_kernels; from coupfast import cli; print(coupfast.__file__);"
        "score, classifier = coupfast.load_score('cifar10-tiny'), coupfast.load_classifier('cifar10-tiny');"
        "print(coupfast.purify(torch.rand(1, 3, 32, 32), score, classifier, num_steps=1, seed=0).shape); cli.main(['methods'])"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path)) and "sde-dpm-solver++-2m" in done.stdout


def test_tests_of_the_sdist_pass_against_the_wheel(built, tmp_path):
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(tmp_path / "site")
    with tarfile.open(built[1]) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("coupfast-*")
    for package in ("coupfast", "kernels/coupfast_kernels"):
        shutil.rmtree(unpacked / package)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "tests")]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    some = ["tests/test_sde.py", "tests/test_readme.py::test_everything_is_on_the_map"]
    done = subprocess.run([*command, *some], cwd=unpacked, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_versions_agree():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert version and citation and version[1] == citation[1] == coupfast.__version__


def test_pre_commit_runs_what_comes_before_the_tests():
    if not (ROOT / ".pre-commit-config.yaml").exists():
        pytest.skip("this is no checkout")
    hooks = re.findall(r"entry: (.+)$", (ROOT / ".pre-commit-config.yaml").read_text(), re.MULTILINE)
    script = re.findall(r'^"\$bin/([\w-]+)"(.*)$', (ROOT / "scripts" / "test").read_text(), re.MULTILINE)
    assert len(hooks) == 3 and hooks == [name + options for name, options in script if name != "python"]
