"""`bench/autoattack.py` runs, says what it promises to say, and marks what it scaled."""

import json
import pathlib
import sys

import pytest
import torch

BENCH = str(pathlib.Path(__file__).resolve().parent.parent / "bench")


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(BENCH)

    def run(*arguments):
        module = __import__("autoattack")
        # One engine is enough here: the others' parity is tested elsewhere.
        monkeypatch.setattr(module, "engines_here", lambda case: (["eager"], []))
        file = tmp_path / "results.json"
        options = ["--network", "tiny", "--batch", "2", "--steps-timed", "2", "--draws", "2", "--json", str(file)]
        assert module.main([*options, *map(str, arguments)]) == 0
        return json.loads(file.read_text()), capsys.readouterr().out

    yield run
    for name in ("autoattack", "cases", "timing"):
        sys.modules.pop(name, None)
    torch.set_num_threads(threads)


def test_every_row_says_what_it_is(run):
    document, printed = run("--t", "0.002", "--iterations", "1", "--eps", "2")
    rows = {row["contender"]: row for row in document["rows"]}
    assert list(rows) == ["published", "published-frozen", "exact", "detached"]
    for row in rows.values():
        assert (row["scaled"], row["num_steps"], row["steps_timed"]) == (False, 2, 2)
        assert row["seconds"] > 0 and row["images"] == 2
        assert row["ratio_to_published"] in (None, pytest.approx(rows["published"]["seconds"] / row["seconds"]))
        assert 0 <= row["robust_worst"] <= row["robust_average"] <= 1 and 0 <= row["clean_average"] <= 1
    assert rows["published"]["ratio_to_published"] is None and rows["exact"]["equal_to_published"] is not None
    assert "scaled" not in printed


def test_what_did_not_run_is_scaled_and_marked(run):
    document, printed = run("--iterations", "3", "--iterations-timed", "1", "--contenders", "exact")
    (row,) = document["rows"]
    assert (row["iterations"], row["iterations_timed"], row["num_steps"], row["steps_timed"]) == (3, 1, 100, 2)
    assert row["scaled"] is True
    assert "[scaled from 1 of 3 iterations, 2 of 100 steps]" in printed
