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

    def run(*arguments, status=0, change=lambda module: None):
        module = __import__("autoattack")
        change(module)
        # One engine is enough here: the others' parity is tested elsewhere.
        monkeypatch.setattr(module, "engines_here", lambda case: (["eager"], []))
        file = tmp_path / "results.json"
        options = ["--network", "tiny", "--batch", "2", "--steps-timed", "2", "--draws", "2", "--json", str(file)]
        assert module.main([*options, *map(str, arguments)]) == status
        return json.loads(file.read_text()), capsys.readouterr().out

    yield run
    for name in ("autoattack", "cases", "gradient", "speed", "timing"):
        sys.modules.pop(name, None)
    torch.set_num_threads(threads)


def test_every_row_says_what_it_is(run):
    document, printed = run("--t", "0.002", "--iterations", "1", "--eps", "2")
    rows = {row["contender"]: row for row in document["rows"]}
    assert list(rows) == ["published", "published-frozen", "exact", "detached"]
    for row in rows.values():
        assert (row["scaled"], row["num_steps"], row["steps_timed"]) == (False, 2, 2)
        assert row["seconds"] > 0 and row["images"] == 2 and row["within_contract"]
        assert 0 <= row["images_attacked"] <= 2
        # APGD looks once at each image, and with a gradient before and after its only step at those that were right.
        assert row["forward_images"] >= 2 and row["gradient_images"] >= 2 * row["images_attacked"]
        each = row["seconds"] / (row["forward_images"] + row["gradient_images"])
        assert row["seconds_per_purification"] == pytest.approx(each)
        assert row["ratio_to_published"] in (None, pytest.approx(rows["published"]["seconds"] / row["seconds"]))
        assert 0 <= row["robust_worst"] <= row["robust_average"] <= 1 and 0 <= row["clean_average"] <= 1
        if row["ratio_to_published"]:
            each = rows["published"]["seconds_per_purification"] / row["seconds_per_purification"]
            assert row["ratio_per_purification"] == pytest.approx(each)
    assert rows["published"]["ratio_to_published"] is None and rows["exact"]["equal_to_published"] is not None
    assert "scaled" not in printed


def test_repeats_take_turns_and_make_a_table(run):
    order = []

    def watch(module):
        interleave = module.interleave

        def noted(contenders, repeats):
            named = {name: lambda n=name, call=call: (order.append(n), call())[1] for name, call in contenders.items()}
            return interleave(named, repeats)

        module.interleave = noted

    arguments = ("--t", "0.002", "--iterations", "1", "--repeats", "2", "--markdown")
    document, printed = run(*arguments, "--contenders", "published-frozen", "exact", change=watch)
    assert order == ["published-frozen torchsde", "exact eager", "exact eager", "published-frozen torchsde"]
    assert [row["repeats"] for row in document["rows"]] == [2, 2]
    assert all(row["spread"] > 0 for row in document["rows"])
    assert "| contender | engine |" in printed and "| exact | eager | tiny |" in printed


def test_verdicts_are_about_the_strongest_images_that_the_attack_saw(run):
    judged, strongest = [], []

    def watch(module):
        right, attack = module._right, module.APGD.run
        module._right = lambda judge, x, y, draws: (judged.append(x), right(judge, x, y, draws))[1]

        class Watched(module.APGD):
            def run(self, *arguments, **options):
                result = attack(self, *arguments, **options)
                strongest.append(result.strongest)
                return result

        module.APGD = Watched

    run("--t", "0.002", "--iterations", "1", "--contenders", "exact", change=watch)
    assert torch.equal(judged[-1], strongest[-1])


def test_an_engine_that_computes_something_else_gets_no_times(run):
    def break_it(module):
        purifier_on = module.purifier_on

        def wrong(grid, networks, method, **options):
            if options.get("guidance_gradient") == "detached":
                del options["guidance_gradient"]
                options["gradient"] = "bpda"
            return purifier_on(grid, networks, method, **options)

        module.purifier_on = wrong

    arguments = ("--t", "0.002", "--iterations", "1", "--contenders", "exact", "detached")
    document, printed = run(*arguments, status=1, change=break_it)
    exact, detached = document["rows"]
    assert exact["within_contract"] and "seconds" in exact
    assert not detached["within_contract"] and "seconds" not in detached
    assert "detached          eager     OVER ITS CONTRACT, no times" in printed


def test_what_did_not_run_is_scaled_and_marked(run):
    document, printed = run("--iterations", "3", "--iterations-timed", "1", "--contenders", "exact")
    (row,) = document["rows"]
    assert (row["iterations"], row["iterations_timed"], row["num_steps"], row["steps_timed"]) == (3, 1, 100, 2)
    assert row["scaled"] is True
    assert "[scaled from 1 of 3 iterations, 2 of 100 steps]" in printed
