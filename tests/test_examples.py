"""The scripts of `examples/`, as they are, each in a process of its own."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_example(script, tmp_path):
    text = script.read_text()
    assert text.startswith("# %% [markdown]\n# # "), "an example begins with its title"
    for package in ("foolbox", *re.findall(r"^# Needs: (\w+)$", text, re.MULTILINE)):  # foolbox has the images
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{script.name} needs {package}")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    if done.returncode and re.search(r"^ImportError: .*(torchvision|RobustBench)", done.stderr, re.MULTILINE):
        pytest.skip(f"{script.name}: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    assert done.stdout
