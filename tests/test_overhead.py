"""The shares of a step of the CPU engine."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from coupfast_kernels import native

ROOT = pathlib.Path(__file__).resolve().parent.parent
REASON = native.unavailable()


@pytest.mark.skipif(REASON is not None, reason=REASON or "")
@pytest.mark.parametrize(("options", "part"), [((), "kernels"), (("--by-kernel",), "F(4x4)")], ids=["whole", "by kernel"])
def test_shares_are_of_a_whole(tmp_path, options, part):
    command = [sys.executable, "bench/overhead.py", "--network", "tiny", "--threads", "1", "--repeats", "2", *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    subprocess.run([*command, "--json", str(tmp_path / "rows.json")], cwd=ROOT, env=environment, check=True)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["step"] for row in rows] == ["forward", "backward"]
    for row in rows:
        assert sum(row["shares"].values()) == pytest.approx(1.0) and {part, "PyTorch", "outside"} <= row["shares"].keys()
        assert all(0.0 < share < 1.0 for share in row["shares"].values())
