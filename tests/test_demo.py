"""The demo, as small as it goes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_demo(tmp_path):
    for package in ("pyautoattack", "foolbox", "matplotlib"):
        if not importlib.util.find_spec(package):
            pytest.skip(f"the demo needs {package}")
    small = "--images 1 --num-steps 1 --attack-iterations 1 --methods reverse-sde --device cpu".split()
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), *small, "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "robust" in done.stdout  # that this is no measure of it
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "demo.json").read_text())
    assert record
