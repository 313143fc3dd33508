"""`bench/workers.py` and `bench/oversubscribed.py`: what they compare, and what they refuse to say."""

import json

import oversubscribed
import pytest
import workers


def test_a_run_is_timed_by_both_clocks():
    """In one worker of one thread: two threads on a core that others want are what is to be measured."""
    options = ["--images", 2, "--shard", 1, "--num-steps", 1, "--iterations", 1, "--eot-iter", 1]
    found = workers.run(1, 1, workers.parse_options([*map(str, options), "--count", "2", "--engine", "eager"]))
    assert 0 < found["work_seconds"] < found["seconds"] and found["peak_bytes"] > 2**25
    assert len(found["verdicts"]) == 2 * 2 * 2 and set(found["verdicts"]) <= {0, 1}  # clean and attacked, images, draws


def test_no_ratio_of_runs_that_are_not_repeatable(monkeypatch, tmp_path, capsys):
    """Of one kind, that is; of two kinds the verdicts that differ are counted."""
    made = iter("abba")

    def differing(workers, threads, options):
        found = {"seconds": float(threads), "work_seconds": 1.0, "peak_bytes": 1, "verdicts": [1, 1, int(threads == 1)]}
        return {**found, "fingerprint": next(made)}

    monkeypatch.setattr(workers, "run", differing)
    assert workers.main(["--turns", "2", "--count", "2", "--json", str(tmp_path / "w.json")]) == 0
    printed, document = capsys.readouterr().out, json.loads((tmp_path / "w.json").read_text())
    assert [(r["workers"], r["threads"]) for r in document["rows"]] == [(2, 1), (1, 2)] and document["ratio"]["seconds"] == 2
    assert "2 workers of one thread: 2 times as fast" in printed and "of 3 verdicts 1 differ" in printed
    made = iter("abab")
    assert workers.main(["--turns", "2", "--count", "2"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and "a run is not repeatable" in printed.err
    with pytest.raises(SystemExit):
        workers.parse_options(["--images", "4", "--shard", "4", "--count", "2"])


def test_a_busy_core_is_measured_against_a_quiet_one(tmp_path, capsys, monkeypatch):
    running = []
    measured, busied = oversubscribed.measured, oversubscribed.busied

    def slowed(threads, policy, options):
        """As if the other process made this many times as much of it."""
        factor = 12.0 if running and not policy else 1.5 if running else 1.0
        return {"forward": factor, "gradient": 2.0 * factor}

    class Counted:
        def __enter__(self):
            self.inner = busied()
            self.inner.__enter__()
            running.append(1)

        def __exit__(self, *error):
            running.pop()
            return self.inner.__exit__(*error)

    monkeypatch.setattr(oversubscribed, "busied", Counted)
    monkeypatch.setattr(oversubscribed, "measured", slowed)
    assert oversubscribed.main(["--turns", "2", "--json", str(tmp_path / "o.json")]) == 1
    rows = {row["name"]: row for row in json.loads((tmp_path / "o.json").read_text())["rows"]}
    assert rows["threads"]["forward"]["ratio"] == 12.0 and rows["passive"]["gradient"]["ratio"] == 1.5
    assert "the goal, below 10, is missed" in capsys.readouterr().out
    options = oversubscribed.parse_options(["--images", "1", "--num-steps", "1", "--repeats", "1", "--engine", "eager"])
    found = measured(1, {"OMP_WAIT_POLICY": "passive"}, options)
    assert set(found) == {"forward", "gradient"} and min(found.values()) > 0
