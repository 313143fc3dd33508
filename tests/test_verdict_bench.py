"""`bench/verdict.py`: runs that are continued, work that is counted, and a goal that is stated as it was found."""

import json
from pathlib import Path

import pytest
import verdict

from coupfast.evaluation.ledger import Ledger
from coupfast.evaluation.suites import RECOMMENDATION


def test_a_tiny_study(tmp_path, capsys):
    options = ["--out", tmp_path / "runs", "--json", tmp_path / "v.json", "--plot", tmp_path / "v.png", "--t", 0.01]
    options += ["--limit", 1, "--defenses", "coup", "--curves", "rand", "transfer through 3", "--points", 1, "--sizes", 0.01]
    options += ["--eot-iter", 1, "--num-steps", 4, "--draws", 2, "--shard", 1]
    assert verdict.main(list(map(str, options))) == 0
    document, printed = json.loads((tmp_path / "v.json").read_text()), capsys.readouterr().out
    rand, transfer = document["rows"]
    assert (rand["curve"], transfer["curve"]) == ("rand", "transfer through 3")
    (stage,) = transfer["stages"]
    # One iteration through 3 steps, there and back, then a look and the verdict through all 4.
    assert (stage["gradient"], stage["forward"], stage["steps"]) == (1, 2, 3)
    assert transfer["image_steps"] == 2 * 3 * 1 + 4 * 2
    assert rand["image_steps"] == sum(4 * s["forward"] + 8 * s["gradient"] for s in rand["stages"])
    assert {"single", "worst", "average", "official"} <= set(rand["robust"]) and len(rand["resubmission"]) == 2
    (goal,) = document["goal"]
    assert goal["ratio"] <= 1 and "as low as rand" in printed and (tmp_path / "v.png").read_bytes().startswith(b"\x89PNG")
    # Again: nothing is run, and all is the same.
    assert verdict.main(list(map(str, options))) == 0
    assert json.loads((tmp_path / "v.json").read_text())["rows"] == document["rows"]


def test_a_warm_curve_begins_where_another_defense_s_or_ball_s_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(verdict, "START", ("transfer through 3", 1.0))
    options = ["--t", 0.01, "--limit", 1, "--sizes", 0.01, "--eot-iter", 1, "--num-steps", 6, "--draws", 2, "--shard", 1]
    in_l2 = ["--norm", "L2", "--eps", 0.5, "--start-runs", tmp_path / "Linf"]

    def run(ball, defense, curve, *more):
        words = ["--out", tmp_path / ball, "--defenses", defense, "--curves", f"{curve}@1", *options, *more]
        assert verdict.main(list(map(str, words))) == 0

    with pytest.raises(SystemExit, match="begin at transfer through 3@1 of .*reverse-sde, which is not there: run it first"):
        run("Linf", "coup", "cascade, warm")
    run("Linf", "reverse-sde", "transfer through 3")
    run("Linf", "coup", "cascade, warm")
    run("L2", "reverse-sde", "cascade, warm", *in_l2)
    for folder in ("Linf/coup", "L2/reverse-sde"):
        with Ledger(tmp_path / folder / "cascade-warm-1", read_only=True) as ledger:
            assert ledger.configuration["spec"]["start_from"] == str(tmp_path / "Linf" / "reverse-sde" / "transfer-through-3-1")


def test_what_is_wrong_with_a_later_run_is_said_before_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(verdict, "point", lambda *_: pytest.fail("begun"))
    options = ["--out", str(tmp_path), "--curves", "rand@1"]
    with pytest.raises(ValueError, match="a coarser purification takes fewer than the defense's 5 steps, got 5"):
        verdict.main([*options, "transfer through 5@1", "--num-steps", "5"])
    with pytest.raises(ValueError, match="`eot_first` is at most `eot_iter` = 1"):
        verdict.main([*options, "pgd-eot, growing@1", "--eot-iter", "1"])


def test_the_goal_is_the_cheapest_point_that_is_as_low_by_every_count():
    def row(curve, share, work, value):
        again = [{"value": value, "bootstrap": (value - 0.1, value + 0.1)} for _ in range(4)]
        robust = {protocol: {"value": value, "bootstrap": (value - 0.1, value + 0.1)} for protocol in verdict.COUNTED}
        return {
            **{"defense": "coup", "curve": curve, "share": share, "attack": {}, "image_steps": work, "seconds": 2.0 * work},
            "robust": robust,
            "resubmission": again,
        }

    rows = [row("rand", 0.5, 500, 0.4), row("rand", 1.0, 1000, 0.3), row("cheap", 1.0, 10, 0.5), row("good", 1.0, 100, 0.38)]
    found = verdict.goal(rows, "coup")
    assert (found["curve"], found["ratio"], found["seconds_ratio"]) == ("good", 0.1, 0.1)
    assert found["lower_or_equal_in_value"] == []
    for by in ("worst", "official"):  # by one protocol it is not as low
        other = [{**row, "robust": {**row["robust"]}} for row in rows]
        other[3]["robust"][by] = {"value": 0.41, "bootstrap": None, "wilson": (0.3, 0.5)}
        other[0]["robust"][by] = {"value": 0.45, "bootstrap": None, "wilson": (0.3, 0.5)}
        assert (verdict.goal(other, "coup")["curve"], verdict.goal(other, "coup")["ratio"]) == ("rand", 1.0)
    again = [{"value": value, "bootstrap": None} for value in (0.9, 0.41, 0.3, 0.9)]  # of which two are counted by other names
    assert verdict.goal([*rows[:3], {**rows[3], "resubmission": again}], "coup")["curve"] == "rand"
    again[1]["value"] = 0.39
    assert verdict.goal([*rows[:3], {**rows[3], "resubmission": again}], "coup")["curve"] == "good"
    warm = verdict.goal([*rows, row("cascade, warm", 1.0, 1, 0.1)], "coup")  # whose start is not counted
    assert warm["curve"] == "good"
    rows[1]["robust"]["official"] = {"value": 0.3, "bootstrap": None, "wilson": (0.2, 0.37)}  # which has no bootstrap
    assert verdict.goal(rows, "coup")["curve"] == "rand"
    assert verdict.goal(rows, "diffpure") is None


def test_sizes_keep_the_proportion_of_nothing_below_one():
    half = verdict.CURVES["pgd-eot"].at(0.25, 8 / 255)
    assert half == {"attack": "pgd-eot", "mode": "full", "iterations": 50, "step_size": 0.007}
    cut = verdict.CURVES["cascade, fast"].at(1e-6, 0.02)
    assert cut == {"attack": "cascade", "mode": "fast", "iterations": 1, "step_size": 2.5 * 0.02}
    parts = verdict.CURVES["cascade"].at(0.1, 8 / 255)
    step = 2.5 * 8 / 255
    assert parts == {
        **{"attack": "cascade", "mode": "full", "iterations": 10, "step_size": step / 10},
        **{"exact.iterations": 5, "exact.step_size": step / 5},
    }
    assert verdict.CURVES["rand"].at(0.5, 0.02) == {"attack": "autoattack-rand", "mode": "full", "iterations": 50}


def test_what_is_recommended_is_so_for_what_was_measured():
    """Its reasons have figures of a study, which is not in the package: they are those of its file."""
    name = "bench/results/verdict-100-epyc-zen4.json"
    found = json.loads((Path(__file__).parents[1] / name).read_text())
    rows = {(row["defense"], row["curve"]): row for row in found["rows"] if row["share"] == 1}
    ours, rand = ([rows[defense, curve] for defense in verdict.DEFENSES] for curve in ("cascade, fast", "rand"))
    assert (RECOMMENDATION.attack, RECOMMENDATION.mode) == (ours[0]["attack"]["attack"], ours[0]["attack"]["mode"])
    fell = [row["stages"][0]["images"] - row["stages"][-1]["images"] for row in ours]
    shares = [row["image_steps"] / full["image_steps"] for row, full in zip(ours, rand, strict=True)]
    for said in (
        f"of {found['settings']['limit']} test images",
        f"{min(fell)} to {max(fell)} fell through 3 and 5 steps",
        f"for {min(shares):.2f} to {max(shares):.2f} of its image-steps ({name})",
    ):
        assert said in RECOMMENDATION.reasons
    for row, cut in zip(ours, rand, strict=True):  # what the reasons and docs/measured/attacks.md say in words
        here, there = verdict.counts(row), verdict.counts(cut)
        names = ["worst", "majority", "mean logits", *(by for by in here if by.endswith(" times"))]
        assert len(names) == 11 and all(here[by]["value"] <= there[by]["value"] for by in names)
    full_size = "bench/results/verdict-20-full-epyc-zen4.json"
    found = json.loads((Path(__file__).parents[1] / full_size).read_text())
    rows = {(row["defense"], row["curve"], row["share"]): row for row in found["rows"]}
    half, at_full = ([rows[(defense, *of)] for defense in verdict.DEFENSES] for of in (("cascade, fast", 0.5), ("rand", 1.0)))
    shares = [row["image_steps"] / full["image_steps"] for row, full in zip(half, at_full, strict=True)]
    assert f"for {min(shares):.3f} to {max(shares):.3f} of rand's image-steps ({full_size})" in RECOMMENDATION.reasons
    for row, full in zip([*ours, *half], [*rand, *at_full], strict=True):
        assert len(verdict.counts(full)) == 14 and verdict.above(row, full) == []
    assert [row["stages"][0]["steps"] for row in ours] == [3] * 3 and [row["stages"][1]["steps"] for row in ours] == [5] * 3


def test_what_the_page_says_of_100_images():
    """Of which attacks docs/measured/attacks.md says in words that they leave more than the upper ends of rand's intervals."""
    file = Path(__file__).parents[1] / "bench" / "results" / "verdict-100-epyc-zen4.json"
    document = json.loads(file.read_text())
    rows = {(row["defense"], row["curve"], row["share"]): row for row in document["rows"]}
    above = {of: verdict.above(row, rows[row["defense"], "rand", 1.0]) for of, row in rows.items()}
    assert {of: counts for of, counts in above.items() if counts} == {
        ("diffpure", "diffhammer, fast", 0.5): [verdict.OFFICIAL, "average"]
    }
    assert [verdict.goal(document["rows"], defense) for defense in verdict.DEFENSES] == document["goal"]
    ratios = {found["defense"]: found["ratio"] for found in document["goal"]}
    assert max(ratios["coup"], ratios["reverse-sde"]) < 0.1 < ratios["diffpure"] < 0.11
    for defense in verdict.DEFENSES:
        cascade, hammer = (rows[defense, f"{name}, fast", 1.0] for name in ("cascade", "diffhammer"))
        assert hammer["image_steps"] < cascade["image_steps"] / 2
        growing = rows[defense, "pgd-eot, growing", 1.0]  # of docs/guides/attacks.md
        assert growing["image_steps"] < cascade["image_steps"]
        least = cascade["robust"]["average"]["value"]
        assert min(hammer["robust"]["average"]["value"], growing["robust"]["average"]["value"]) > least


def test_what_the_page_says_beside_rand_at_its_full_size():
    """docs/measured/attacks.md tells in words which attacks leave no more than the upper ends of rand's intervals."""
    results = Path(__file__).parents[1] / "bench" / "results"
    files = (results / f"verdict-20-{name}-epyc-zen4.json" for name in ("full", "options"))
    documents = [json.loads(file.read_text()) for file in files]
    full, options = (document["rows"] for document in documents)
    assert [verdict.goal(full, defense) for defense in verdict.DEFENSES] == documents[0]["goal"]
    assert max(found["ratio"] for found in documents[0]["goal"]) <= 0.1  # the aim
    rand = {row["defense"]: row for row in full if row["curve"] == "rand"}
    assert set(rand) == set(verdict.DEFENSES)

    def above(row, *, resubmitted=True):
        return [by for by in verdict.above(row, rand[row["defense"]]) if resubmitted or by in verdict.COUNTED]

    half = {(row["defense"], row["curve"]): row for row in full if row["share"] == 0.5}
    assert {of: above(row) for of, row in half.items() if above(row)} == {
        ("coup", "diffhammer, fast"): ["3 times", "4 times"],
        ("diffpure", "diffhammer, fast"): [verdict.OFFICIAL, "5 times", "6 times"],
    }
    for defense, times in (("coup", (3, 4)), ("diffpure", (5, 6))):
        assert max(verdict.interval(verdict.counts(rand[defense])[f"{m} times"])[1] for m in times) <= 0.002
    at = {(row["defense"], row["curve"], row["share"]): row for row in options}
    full_at = {row["defense"]: row for row in full if (row["curve"], row["share"]) == verdict.START}
    for defense in verdict.DEFENSES:
        warm, cold = (at[defense, curve, 0.1] for curve in ("cascade, warm", "cascade, fast"))
        assert above(warm) == [] and warm["image_steps"] < cold["image_steps"]
        assert warm["robust"]["average"]["value"] < cold["robust"]["average"]["value"]
        at_half = {row["curve"]: row for row in full if (row["defense"], row["share"]) == (defense, 0.5)}
        cascade, hammer = (at_half[f"{name}, fast"]["image_steps"] for name in ("cascade", "diffhammer"))
        assert hammer < cascade / 2
        growing, plain = at[defense, "pgd-eot, growing", 0.1], at[defense, "pgd-eot, fast", 0.1]
        assert above(growing, resubmitted=False) == [] != above(growing) and growing["image_steps"] < cascade
        assert bool(above(plain, resubmitted=False)) == (defense == "reverse-sde") and above(plain)
        begun = full_at[verdict.ELSEWHERE[defense]]["image_steps"] + warm["image_steps"]
        assert (begun > cascade) == (defense != "diffpure")
        least = min(row["robust"]["average"]["value"] for row in full if row["defense"] == defense)
        assert rand[defense]["robust"]["average"]["value"] == least
