"""The table of operations a step."""

import pathlib
import sys

import pytest

BENCH = str(pathlib.Path(__file__).resolve().parent.parent / "bench")


@pytest.fixture
def launches(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import launches

    yield launches
    for name in ("launches", "cases"):
        sys.modules.pop(name, None)


def test_fewer_in_every_row(launches, capsys):
    assert launches.main(["--network", "tiny"]) == 0
    printed = capsys.readouterr().out
    assert "counted from graphs, not measured" in printed
    lines = [line.split("|") for line in printed.splitlines() if line.startswith("| ")]
    eager, flat, fused, graph = ((int(line[2]), int(line[3])) for line in lines[1:])
    assert eager[0] > flat[0] > fused[0] > graph[0] == 2
    assert flat[1] > fused[1] > graph[1] == 3
    # Noise by its definition alone is over 400 operations.
    assert eager[0] - fused[0] > 400
