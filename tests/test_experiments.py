"""The paper's experiments: every one runs at a tiny size, says what it ran and what is published, shares runs and goes on."""

import dataclasses
import itertools
import json
import math
import re
import shutil
import sqlite3
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coupfast.cli import main, parser
from coupfast.cli.reproduce import scale_of
from coupfast.evaluation import configuration
from coupfast.evaluation.ledger import DATABASE
from coupfast.evaluation.protocols import Comparison, Judged, accuracy, mcnemar
from coupfast.experiments import (
    EXPERIMENTS,
    Case,
    Network,
    Page,
    Results,
    Scale,
    announced,
    check,
    figures,
    make,
    making,
    study,
    tables,
    two_gaussians,
)
from coupfast.experiments import scale as scale_module
from coupfast.experiments.paper import table4
from coupfast.models.checkpoints import write_safetensors
from coupfast.models.wide_resnet import WideResNet

SMALL = ["--images", "1", "--budget", "1e-6", "--steps", "1", "--draws", "2", "--paths", "500"]
_JUDGING, _CHOOSING = {"attack": "cascade", "mode": "fast"}, {"attack": "transfer", "mode": "fast"}
#: Not here: networks of its own, a measurement of time, and what has a test of its own.
OTHERS = {"cifar100", "table4", "study"}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder of runs that all tests here share."""
    return tmp_path_factory.mktemp("reproduced")


def reproduce(*words):
    return main(["reproduce", *map(str, words)])


def test_all_are_listed(capsys):
    assert reproduce("--list") == 0
    lines = capsys.readouterr().out.splitlines()
    wanted = "table1 table2 table2c table3 cifar100 fig2a fig2b fig3b fig4a fig4b fig5 fig6 tableE1 table4 appendix-b-c study"
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == wanted.split() == list(EXPERIMENTS)


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in OTHERS])
def test_every_one_runs(name, out, capsys):
    assert reproduce(name, *SMALL, "--out", out, "--json", out / "found.json") == 0
    said = capsys.readouterr().out
    page = (out / "pages" / f"{name}.md").read_text()
    assert EXPERIMENTS[name].title in said and f"coupfast reproduce {name} --images 1" in page
    index = (out / "pages" / "README.md").read_text()
    assert f"[{name}]({name}.md)" in index and "`cifar100` (Section 5.2.1, CIFAR-100" in index.partition("Without a page")[2]
    found = json.loads((out / "found.json").read_text())[name]
    assert found["headline"] in page and found["concludes"]
    assert set(found["runs"]) == {case.name for case in EXPERIMENTS[name].cases}
    # Every table has as many cells in each row as in its header, none of them empty.
    for table in found["tables"][1:]:
        assert table["rows"] and all(len(row) == len(table["header"]) and all(row) for row in table["rows"]), table["title"]
    pictures = re.findall(r"!\[(.*)\]\((.*?)\)", page)
    assert pictures
    for told, file in pictures:
        assert f"## {told}\n" not in page and len(told) > 80, "a title alone tells nobody what there is to see"
        pixels = np.asarray(Image.open(out / "pages" / file).convert("RGB"))
        assert pixels.shape[1] > 250 and pixels.std() > 10


@pytest.mark.parametrize(("name", "figures"), [("table1", ("70.64", "73.05")), ("table2", ("78.58", "83.13"))])
def test_published_stands_beside_measured(name, figures, out):
    reproduce(name, *SMALL, "--out", out, "--json", out / "found.json")
    found = json.loads((out / "found.json").read_text())[name]
    table = next(table for table in found["tables"] if "published" in table["title"])
    column = table["header"].index("robust, published")
    assert [row[column] for row in table["rows"]] == ["0.00", *figures]
    said = " ".join(found["differences"])
    for what in ("other networks", "1 image of cifar10-20", "1 step from", "smaller attacks", "exact gradient"):
        assert what in said
    assert "1 image shows that this runs" in found["concludes"][-1]


def test_a_page_has_the_times_of_its_runs_alone():
    scale = Scale(images=1, steps=10)
    wanted = {"fig5": "10 from t = 0.1", "table2": "8 from t = 0.075", "tableE1": "10 from t = 0.1"}
    wanted["appendix-b-c"] = "15 from t = 0.15, 10 from t = 0.1, 5 from t = 0.05, 2 from t = 0.025"
    for name, steps in wanted.items():
        experiment = EXPERIMENTS[name]
        specs = [case.spec(scale) for case in experiment.cases]
        table = tables.setting(experiment, scale, tables.times(experiment, experiment.cases), specs)
        assert dict(table.rows)["steps of a purification"] == steps
        assert dict(table.rows)["gradient that attacks follow"] == ("–" if name == "tableE1" else "exact")
    said = tables.differences(EXPERIMENTS["table2"], Results(scale, {}, {}, EXPERIMENTS["table2"].cases))
    assert any(line.startswith("8 steps from t = 0.075, and not 75:") for line in said)


def test_a_page_has_the_gradients_and_stages_of_its_runs():
    scale = Scale(images=1, steps=10, budget=0.02, gradient="adjoint")
    cases = EXPERIMENTS["table1"].cases
    found = dict(tables.setting(EXPERIMENTS["table1"], scale, [], [case.spec(scale) for case in cases]).rows)
    assert found["gradient that attacks follow"] == "adjoint, adjoint (guidance detached)"
    bpda = [case.spec(scale) for case in EXPERIMENTS["table3"].cases]
    assert dict(tables.setting(EXPERIMENTS["table3"], scale, [], bpda).rows)["gradient that attacks follow"] == "bpda"
    # A row for stages of one size: the cascade's last one has half the iterations.
    case = Case("COUP", {"attack": "cascade", "method": "coup", "t": 0.1, "eps": 8 / 255})
    rows = {row[0]: row[2] for row in tables.attacks(scale, [case, cases[0]]).rows}
    assert rows["cascade: transfer-3, transfer-5"].startswith("14 of 100 iterations")
    assert rows["cascade: exact"].startswith("7 of 50 iterations")
    assert rows["autoattack-standard: square"] == "100 of 5000 questions"


def test_a_page_names_the_gpu_of_its_runs(out):
    experiment, scale = EXPERIMENTS["tableE1"], Scale(images=1, budget=1e-6, steps=1, draws=2)
    results = make(experiment, scale, out)
    without = Page(experiment, results, "").made
    environment = {**results.runs["COUP"].configuration["environment"], "gpu": {"device": "a GPU of some kind"}}
    run = dataclasses.replace(
        results.runs["COUP"], configuration={**results.runs["COUP"].configuration, "environment": environment}
    )
    made = Page(experiment, dataclasses.replace(results, runs={**results.runs, "COUP": run}), "").made
    assert made == without.replace("; its runs", ", a GPU of some kind; its runs") != without


def test_of_few_images_no_difference_is_called_one(monkeypatch):
    found = Comparison(difference=-0.2, interval=(-0.3, -0.1), only_first=None, only_second=None, p=None, images=20)
    difference = "one − another: -20.0 [-30.0, -10.0] points (average draw, {})"
    few = f"Under attack, {difference.format('20 images')}; of fewer than 30 images none is called a difference."
    better = f"Under attack another is more accurate than one; {difference.format('40 images')}."
    exact = f"Under attack another is more accurate than one; {difference.format('20 images, p = 0.01')}."
    apart = f"Under attack one and another cannot be told apart; {difference.format('20 images').replace('-10', '+10')}."
    for changed, said in (({}, few), ({"images": 40}, better), ({"p": 0.01}, exact), ({"interval": (-0.3, 0.1)}, apart)):
        monkeypatch.setattr(tables, "compare", lambda *_, changed=changed: dataclasses.replace(found, **changed))
        assert tables.says(None, "one", "another") == said


def test_what_so_few_images_cannot_show():
    for images, said in ((20, "from 30 to 70 %."), (50, "from 37 to 63 %."), (100, None)):
        found = tables.few(Results(Scale(), {"a run": types.SimpleNamespace(count=images)}, {}))
        assert found[0].endswith(said) if said else not found
    (said,) = EXPERIMENTS["table4"].differs
    assert said in tables.differences(EXPERIMENTS["table4"], Results(Scale(), {}, {}))
    for name, cut in (("tableE1", False), ("table1", True)):
        rows = dict(tables.setting(EXPERIMENTS[name], Scale(images=1), [], []).rows)
        assert ("budget" in rows) == cut


def test_an_interval_of_a_mean():
    rng = np.random.default_rng()
    hits = 0
    for _ in range(400):
        low, high = map(float, re.fullmatch(r"\S+ \[(.*), (.*)\]", tables.mean(rng.standard_normal(4))).groups())
        hits += low <= 0 <= high
    assert 0.90 < hits / 400 < 0.99  # 0.95, and a standard deviation of 0.011
    assert tables.mean(np.array([1.5])) == "1.500 [–]"


def test_a_table_says_of_how_many_draws_its_runs_are():
    def run(draws):
        found = Judged(np.ones(2, dtype=bool), np.eye(2)[None].repeat(draws, axis=0), np.arange(2))
        shares = {protocol: accuracy(found, protocol) for protocol in tables.SHOWN}
        return types.SimpleNamespace(verdicts={"clean": found, "attacked": found}, accuracies={"attacked": shares})

    for counts, said in (((4, 4), "of 4 fresh draws of"), ((1,), "of 1 fresh draw of"), ((4, 15), "of 4 to 15 fresh draws of")):
        note = tables.by_protocol(Results(Scale(), {str(i): run(draws) for i, draws in enumerate(counts)}, {}, [])).note
        assert said in note and ("worst of more draws" in note) == (len(set(counts)) > 1)


def test_a_run_that_two_need_is_made_once(out, capsys):
    scale = Scale(images=1, budget=1e-6, steps=1, draws=2)
    both = {name: {case.name: case.spec(scale).to_dict() for case in EXPERIMENTS[name].cases} for name in ("fig2b", "fig4b")}
    assert both["fig4b"]["COUP at 1"] == both["fig2b"]["COUP (first classifier)"]
    assert both["fig4b"]["COUP at 0"] == both["fig2b"]["reverse SDE (first classifier)"]
    reproduce("fig2b", *SMALL, "--out", out)
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").glob(f"*/{DATABASE}")}
    capsys.readouterr()
    reproduce("fig5", "fig6", *SMALL, "--out", out)
    after = {path: path.stat().st_mtime_ns for path in (out / "runs").glob(f"*/{DATABASE}")}
    assert set(before) == set(after)
    assert capsys.readouterr().err.count("which has begun") == 2
    assert len(list((out / "measured").glob("gallery-*.npz"))) == 1


def test_what_was_stopped_goes_on(tmp_path, monkeypatch):
    """A run whose last units are lost comes to the same results."""
    scale = Scale(images=1, budget=1e-6, steps=1, draws=2)
    experiment = EXPERIMENTS["tableE1"]
    whole = make(experiment, scale, tmp_path)
    name = next(name for name in whole.runs if name == "COUP")
    with sqlite3.connect(whole.runs[name].folder / DATABASE) as ledger:
        ledger.execute("DELETE FROM units WHERE stage != 'clean'")
    again = make(experiment, scale, tmp_path)
    assert {n: run.fingerprint for n, run in again.runs.items()} == {n: run.fingerprint for n, run in whole.runs.items()}
    assert len(list((tmp_path / "runs").iterdir())) == 3
    # What is done is shown, too, where the software is another one; what is not is refused.
    monkeypatch.setattr(configuration, "sources_sha256", lambda *packages: "other")
    older = make(experiment, scale, tmp_path)
    assert {n: run.fingerprint for n, run in older.runs.items()} == {n: run.fingerprint for n, run in whole.runs.items()}
    assert "Of other versions of the software than the page: 3 runs" in tables.work(older).note
    # It is the last of three: the first two are not begun again before that is said.
    with sqlite3.connect(whole.runs[name].folder / DATABASE) as ledger:
        ledger.execute("DELETE FROM units WHERE stage != 'clean'")
    for first in list(whole.runs)[:2]:
        shutil.rmtree(whole.runs[first].folder)
    with pytest.raises(ValueError, match="another configuration: environment.sources_sha256.*; delete that folder, take"):
        make(experiment, scale, tmp_path)
    assert list((tmp_path / "runs").iterdir()) == [whole.runs[name].folder]
    announcing = dataclasses.replace(experiment, cases=[], announces=lambda scale: types.SimpleNamespace(runs=specs))
    specs = [case.spec(scale) for case in experiment.cases if case.name == name]
    with pytest.raises(ValueError, match="another configuration"):  # one that may follow from the others, too
        make(announcing, scale, tmp_path)


def test_what_was_measured_by_other_software_is_said(tmp_path, monkeypatch):
    experiment, scale = EXPERIMENTS["fig3b"], Scale(paths=200)
    assert "of other versions" not in Page(experiment, make(experiment, scale, tmp_path), "").made
    monkeypatch.setattr(configuration, "sources_sha256", lambda *packages: "other")
    later = make(experiment, scale, tmp_path)
    assert Page(experiment, later, "").made.endswith("; of other versions of the software than the page: what was measured")
    assert tables.older(dataclasses.replace(later, measured={})) == ""


def test_the_budget_scales_what_multiplies():
    scale = Scale(budget=0.01, steps=20)
    cases = {case.name: case for case in EXPERIMENTS["table1"].cases}
    rand, standard = (cases[f"COUP ({suite})"].spec(scale) for suite in ("rand", "standard"))
    assert rand.attack_options == {"iterations": 10, "eot_iter": 2}
    assert standard.attack_options == {"iterations": 10, "target_classes": 1, "queries": 50}
    cascade = Scale(budget=0.02).spec({"attack": "cascade", "method": "coup", "t": 0.1}).stages()
    assert {stage: (attack.iterations, attack.eot_iter) for stage, attack in cascade.items()} == {
        **dict.fromkeys(("transfer-3", "transfer-5"), (14, 1)),
        "exact": (7, 1),
    }
    assert rand.settings().num_steps == 20
    full = dataclasses.replace(scale, budget=1.0, steps=None)
    assert cases["COUP (rand)"].spec(full).attack_options == {} and cases["COUP (rand)"].spec(full).settings().num_steps == 100
    assert {case.spec(full).settings().num_steps for case in EXPERIMENTS["table2"].cases[1:]} == {75}
    other = dataclasses.replace(scale, gradient="adjoint")
    assert cases["COUP (rand)"].spec(other).settings().gradient.name == "adjoint"
    assert {case.spec(other).settings().gradient.name for case in EXPERIMENTS["table3"].cases} == {"bpda"}
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            Scale(budget=share)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["table1", "--networks", "paper"], "score-weights FILE.*checkpoint_8.pth.*--networks tiny"),
        (["table1", "--score", "nowhere.pt"], "score network nowhere.pt"),
        (["tabel1"], "did you mean 'table1'"),
        ([], "say what to reproduce"),
        (["cifar100"], "none ship.*Give --score NAME|FILE"),
        (["table1", "--budget", "2"], "above 0 and at most 1"),
        (["table1", "--images", "21"], "21"),
        (["study", "--gradient", "adjoint"], "--gradient would put 'adjoint' in the place of both"),
        (["study", "--steps", "8"], "transfer goes through 5 steps, and a purification from t = 0.06 has 5 here"),
        (["study", "--workers", "all"], "`workers` is at least 1, or 'auto', got 'all'"),
        (["table4", "--classifier", "cifar10-tiny-silu"], "--classifier names cifar10-tiny-silu: give weights of cifar10-tiny"),
    ],
)
def test_errors_before_any_work(words, said, tmp_path, capsys):
    assert reproduce(*words, "--out", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert re.search(said, captured.err) and not captured.out and not (tmp_path / "out").exists()


def test_pictures_can_be_drawn_or_nothing_begins(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert reproduce("fig3b", *SMALL, "--out", tmp_path / "out") == 2
    assert re.search(r"pip install.*coupfast\[demo\]", capsys.readouterr().err) and not (tmp_path / "out").exists()


def test_cifar100_with_networks_of_ones_own(tmp_path, capsys):
    network = WideResNet(10, 1, 100)
    write_safetensors(tmp_path / "hundred.safetensors", network.state_dict(), network.config)
    x = (np.random.default_rng(0).random((2, 3, 32, 32)) * 255).astype(np.uint8)
    with torch.no_grad():
        y = network.eval()(torch.from_numpy(x).float() / 255).argmax(dim=1).numpy()
    np.savez(tmp_path / "images.npz", x=x, y=y)
    own = ["--score", "cifar10-tiny", "--classifier", tmp_path / "hundred.safetensors", "--data", tmp_path / "images.npz"]
    assert reproduce("cifar100", *SMALL, *own, "--out", tmp_path / "out") == 0
    assert "38.67" in capsys.readouterr().out


def test_the_study_announces_chooses_and_compares(tmp_path, capsys):
    """Of two defenses, as in the whole one; the announcement stands before the first run and is not written again."""
    defenses = {"reverse SDE": {"method": "reverse-sde"}, "COUP": {"method": "coup"}}
    design = study.Design(defenses, [("COUP", "reverse SDE")], ["Linf"], [0.1], _JUDGING, _CHOOSING, [("COUP", "Linf")])
    experiment, scale = design.experiment(), Scale(images=3, budget=1e-6, steps=6, draws=2)
    check(experiment, scale)
    results = make(experiment, scale, tmp_path)
    said = capsys.readouterr().err
    assert said.index("What 2 images can show") < said.index("run 1 of 2") < said.index("COUP, Linf, published gradient")
    choosing = [run for name, run in results.runs.items() if "choosing" in name]
    assert {run.configuration["spec"]["images"] for run in choosing} == {"cifar10-20[2:3]"}
    judged = [run for run in results.runs.values() if run not in choosing]
    assert [run.configuration["spec"]["images"] for run in judged] == ["cifar10-20[0:2]"] * 3 + ["cifar10-20[0:1]"]
    gradients = [run.configuration["defense"]["gradient"]["name"] for run in judged[1:]]
    assert gradients == ["exact", "exact", "adjoint"]
    for runs, attack in ((choosing, "transfer"), (judged[1:], "cascade")):
        assert {(run.configuration["spec"]["attack"], run.configuration["spec"]["mode"]) for run in runs} == {(attack, "fast")}
    (path,) = (tmp_path / "announced").iterdir()
    kept = json.loads(path.read_text())
    assert kept == results.announced and kept["at"] <= min(run.started for run in results.runs.values())
    assert {run.folder.name for run in results.runs.values()} <= set(kept["runs"])
    page = Page(experiment, results, "coupfast reproduce study").write(tmp_path).read_text()
    making._announced(experiment, dataclasses.replace(scale, seed=1), tmp_path)
    assert len(list((tmp_path / "announced").iterdir())) == 2  # what another seed brings was not announced
    other = dataclasses.replace(design, pairs=[("reverse SDE", "COUP")]).experiment()
    assert making._announced(other, scale, tmp_path) and len(list((tmp_path / "announced").iterdir())) == 3
    making._announced(dataclasses.replace(experiment, setting="In other words"), scale, tmp_path)
    assert len(list((tmp_path / "announced").iterdir())) == 3
    for what in ("Choice of t", "p after Holm", "inside worst", kept["at"], "2 images show"):
        assert what in page
    # What was announced is shown as it was written down.
    kept["tables"] = [{**table, "note": f"{table['note']} In the words of then."} for table in kept["tables"]]
    page = Page(experiment, dataclasses.replace(results, announced=kept), "").text()
    assert " ".join(page.split()).count("In the words of then. Written down at") == 2


def test_the_study_takes_the_most_robust_time_and_then_the_most_accurate_one():
    design = study.Design({}, [], [], [0.06, 0.1, 0.15], {}, {}, [])

    def chosen(*pairs):
        """By (robust, clean) at each time."""
        runs = {}
        for t, found in zip(design.times, pairs, strict=True):
            robust, clean = ({"average": types.SimpleNamespace(value=value)} for value in found)
            runs[f"COUP, L2, choosing t* = {t:g}"] = types.SimpleNamespace(accuracies={"attacked": robust, "clean": clean})
        return design.chosen(runs, "COUP", "L2")

    assert chosen((0.2, 0.9), (0.3, 0.5), (0.1, 1.0)) == 0.1
    assert chosen((0.3, 0.7), (0.2, 0.9), (0.3, 0.8)) == 0.15
    assert chosen((0.3, 0.7), (0.3, 0.7), (0.3, 0.6)) == 0.06


def test_the_study_decides_by_the_corrected_p_alone():
    """Of an average over draws the interval, which nothing corrects, may say another thing."""
    found = Comparison(difference=-0.1, interval=(-0.2, 0.01), only_first=None, only_second=None, p=None)
    assert study.Tested(found, p=0.004, adjusted=0.05).decided == -1 and found.conclusion == 0
    found = dataclasses.replace(found, interval=(-0.2, -0.01))
    assert study.Tested(found, p=0.01, adjusted=0.06).decided == 0 and found.conclusion == -1


def test_the_study_tells_what_other_counts_tell_apart_and_whose_time_is_at_an_end(monkeypatch):
    design = study.EXPERIMENT.concludes.__self__
    runs = types.SimpleNamespace(scale=Scale(images=250), runs={})
    nothing = Comparison(difference=0.0, interval=(-0.1, 0.1), only_first=4, only_second=4, p=1.0, images=200)
    found = dataclasses.replace(nothing, difference=0.1, interval=(0.05, 0.15))

    def tested(self, results, protocol="majority"):
        p = 0.01 if protocol == "worst" else 1.0
        return {"one": study.Tested(nothing, 1.0, 1.0), "other": study.Tested(found, p, p)}

    monkeypatch.setattr(study.Design, "tested", tested)
    monkeypatch.setattr(study.Design, "chosen", lambda self, runs, name, norm: 0.15 if name == "DiffPure" else 0.1)
    said = design.concludes(runs)
    assert "By worst, which was not announced as decisive, also other: +10.0 [+5.0, +15.0] points." in said
    assert sum("decisive" in sentence for sentence in said) == 1
    assert any(sentence.endswith("serve better: DiffPure in Linf, DiffPure in L2.") for sentence in said)


def test_the_whole_study_is_as_it_is_asked_for():
    cases = EXPERIMENTS["study"].cases
    scale = Scale(images=250, budget=0.04, steps=20)
    specs = [case.spec(scale) for case in cases]
    assert {spec.images for spec in specs} == {"cifar10-20[200:250]"} and {spec.mode for spec in specs} == {"fast"}
    balls = {(spec.norm, round(spec.eps * 510)) for spec in specs}
    assert balls == {("Linf", 16), ("L2", 255)} and len(cases) == 2 * 6 * 3
    scales = {spec.settings().to_dict()["method"].get("guidance_scale") for spec in specs}
    assert {0.5, 1.0, 2.0, 4.0} <= scales
    assert EXPERIMENTS["study"].alone
    with pytest.raises(ValueError, match="of 2 images none is between 80% and 100%"):
        cases[0].spec(dataclasses.replace(scale, images=2))


def test_the_study_of_the_results_is_that_of_its_page():
    root = Path(__file__).parents[1]
    kept = json.loads((root / "bench" / "results" / "study.json").read_text())
    assert kept == {"study": json.loads((root / "docs" / "experiments" / "study.json").read_text())}


def test_an_announcement_after_the_first_run_says_so():
    before, after = "2026-01-02T03:04:05+00:00", "2026-01-02T03:04:06+00:00"
    assert announced.dated(after, before).startswith("Not announced before")
    assert announced.dated(before, after).startswith("Written down at 2026-01-02T03:04:05")


def test_holm_is_bonferroni_on_every_subset():
    """The definition: a hypothesis falls if every subset that has it falls by Bonferroni's correction."""
    p = {"a": 0.03, "b": 0.004, "c": 0.5, "d": 0.012}
    subsets = [set(names) for size in range(1, 5) for names in itertools.combinations(p, size)]
    closed = {one: max(min(1.0, len(s) * min(p[n] for n in s)) for s in subsets if one in s) for one in p}
    found = announced.holm(p)
    assert list(found) == list(p)
    np.testing.assert_allclose([found[n] for n in p], [closed[n] for n in p], rtol=1e-15)


@pytest.mark.parametrize(("discordant", "difference"), [(0.6, 0.5), (0.5, -0.2), (0.3, 0.3)])
def test_power_is_the_chance_of_a_small_p(discordant, difference):
    """The definition: over everything that 12 images can be, right by one only, by the other only, or neither."""
    n, level = 12, 0.05
    first, second = (discordant + difference) / 2, (discordant - difference) / 2
    wanted = 0.0
    for b in range(n + 1):
        for c in range(n - b + 1):
            ways = math.comb(n, b) * math.comb(n - b, c)
            chance = ways * first**b * second**c * (1 - discordant) ** (n - b - c)
            wanted += chance * (mcnemar(b, c) <= level)
    # A hundred terms of either way of counting, and the incomplete beta function's own.
    assert announced.power(n, discordant, difference, level) == pytest.approx(wanted, rel=1e-12)
    assert announced.power(n, discordant, 0.0, level) <= level


def test_what_can_be_detected():
    least = announced.detectable(200, 0.2)
    assert announced.power(200, 0.2, least) >= 0.8 > announced.power(200, 0.2, least - 2e-4)
    assert announced.detectable(4, 0.3) is None  # four of four differ: p = 1/8
    assert announced.detectable(200, 0.2, level=0.05 / 12) > least
    with pytest.raises(ValueError, match="needs as many discordant images"):
        announced.power(200, 0.1, 0.2)


def test_flipped_signs_are_mcnemars_test_where_that_can_be_made():
    differences = np.array([1.0] * 9 + [-1.0] * 2 + [0.0] * 5)
    # Four standard errors of so many flips.
    p = mcnemar(9, 2)
    assert abs(announced.sign_flips(differences) - p) < 4 * math.sqrt(p / announced.FLIPS) + 1 / announced.FLIPS
    assert announced.sign_flips(np.zeros(5)) == 1.0


def test_two_gaussians_against_the_definition():
    """Scores and guidance are derivatives of the logarithms that they are said to be."""
    x = np.linspace(-3, 3, 31)
    h = 1e-5

    def slope(log):
        return (log(x + h) - log(x - h)) / (2 * h)

    alpha_bar = float(two_gaussians._SDE.alpha_bar(0.1))

    def log_mixture(x):
        mean, std = np.sqrt(alpha_bar) * two_gaussians.MEAN, np.sqrt(alpha_bar * two_gaussians.STD**2 + 1 - alpha_bar)
        return np.log(two_gaussians.density(x, 1, mean, std) + two_gaussians.density(x, -1, mean, std))

    def log_confidence(x, noise):
        parts = two_gaussians.density(x, 1) + noise[0], two_gaussians.density(x, -1) + noise[1]
        return np.log(np.maximum(*parts) / sum(parts))

    # Central differences: h² of the third derivative, which is of order one, and rounding over h.
    np.testing.assert_allclose(two_gaussians.score(x, 0.1), slope(log_mixture), atol=1e-9)
    noise = (0.03, 0.2)  # classes meet between points of this grid
    np.testing.assert_allclose(two_gaussians.guidance(x, noise), slope(lambda x: log_confidence(x, noise)), atol=1e-9)


def test_propositions_hold_in_numbers():
    first = two_gaussians.proposition_1(np.array([1.0, 4.0]), 2000, seed=5)
    assert (first["only_guided"] == 0).all() and (first["gap"] >= 0).all() and (first["guided"] < first["plain"]).all()
    second = two_gaussians.proposition_2(np.array([0.05, 0.2]), 1.0, 2000, seed=5)
    assert (second["above"] == 0).all() and (second["distance"] < second["bound"]).all()
    # 2000 normals: four standard errors of a standard deviation; the linear part of the Euler steps is off by O(h).
    np.testing.assert_allclose(second["spread"], second["spread_limit"], rtol=4 / np.sqrt(2 * 2000) + 0.01)
    # At λ = 0 the classifier does not matter, and Proposition 1's unguided paths are these.
    found = two_gaussians.flips(np.array([0.0, 4.0]), np.array([0.0, 0.5]), 2000, seed=5)
    assert found.crossed[0, 0] == found.crossed[0, 1] and found.crossed[1, 0] < found.crossed[0, 0]
    assert (found.ended <= found.crossed).all()


def test_table_4_shows_what_the_benchmark_wrote():
    """Of a file that bench/speed.py has written; running it measures, and belongs to no test."""
    file = Path(__file__).parents[1] / "bench" / "results" / "speed-tiny-b20-epyc-zen4.json"
    found = json.loads(file.read_text())
    found["environment"]["date"] = "2026-11-26"
    results = Results(Scale(), {}, {name: np.array(json.dumps(found[name])) for name in ("rows", "environment")})
    table, picture = EXPERIMENTS["table4"].sections(results)
    assert "Median of 5 runs of 1 image at once. Measured" in table.note and "COUP cpu" in picture.alt
    assert f"Measured on 2026-11-26: {found['environment']['cpu']}, 2 threads" in table.note
    assert [row[1] for row in table.rows].count("published, V100") == 3
    here = {row[0] for row in table.rows if row[1] == "cpu"}
    assert "COUP" in here and EXPERIMENTS["table4"].concludes(results)


def test_table_4_asks_for_what_the_benchmark_has(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    speed = __import__("speed")
    found = speed._parse(
        table4.options(Scale(images=20, steps=20, budget=0.6, roles={"score": Network("cifar10-tiny", "own.pt")}))
    )
    assert (found.batch, found.repeats, found.steps_timed, found.network, str(found.score)) == (8, 3, 20, "tiny", "own.pt")
    assert found.t == [0.0, 0.001, 0.05, 0.1, 0.15] and found.methods == ["diffpure", "reverse-sde", "coup"]
    sys.modules.pop("speed")


@pytest.mark.parametrize(("name", "helped", "hurt"), [("fig2a", 1, 2), ("fig2a", 2, 0), ("fig6", 1, 2), ("fig6", 0, 1)])
def test_images_that_one_method_gets_right_are_shown(name, helped, hurt, out):
    """Of four images; the first ones only COUP gets right, the next ones only the reverse SDE, and the rest none of them."""
    results = make(EXPERIMENTS[name], Scale(images=1, budget=1e-6, steps=1, draws=2), out)
    labels, sure = np.zeros(4, dtype=np.int64), np.eye(10)
    coup = [sure[0]] * helped + [sure[1]] * (4 - helped)
    reverse = [sure[1]] * helped + [sure[0]] * hurt + [sure[1]] * (4 - helped - hurt)
    ends = {"coup": np.stack(coup), "reverse-sde": np.stack(reverse), "diffpure": np.stack(coup)}
    measured = {"labels": labels, "clean": np.zeros((4, 3, 32, 32)), "attacked": np.zeros((4, 3, 32, 32))}
    for method, end in ends.items():
        measured |= {f"{method} confidences": end, f"{method} images": np.zeros((4, 3, 32, 32))}
        measured |= {f"{attacked}: {method}": np.stack([end, end]) for attacked in ("coup", "reverse-sde")}
    results = dataclasses.replace(results, measured=measured)
    shown = {part.title: part.alt for part in EXPERIMENTS[name].sections(results) if hasattr(part, "png")}
    said = " ".join(EXPERIMENTS[name].concludes(results))
    assert f"{helped} {'is' if helped == 1 else 'are'} right with COUP only" in said
    assert [title.partition(" is right")[0] for title in shown] == ["COUP"] * bool(helped) + ["The reverse SDE"] * bool(hurt)
    if name == "fig2a":
        assert [alt.partition(" ")[0] for alt in shown.values()] == [str(count) for count in (helped, hurt) if count]


def test_a_band_of_all_images_right_has_a_width():
    everything = Judged(np.ones(4, dtype=bool), np.eye(2)[[0, 0, 0, 0]][None].repeat(3, axis=0), np.zeros(4, dtype=np.int64))
    found = accuracy(everything, "average")
    assert found.bootstrap == (1.0, 1.0)
    low, high = figures.band(found)
    assert low == found.wilson[0] < 0.6 and high == 1.0


def test_the_published_gradient_takes_guidance_for_a_constant():
    cases = {case.name: case for case in EXPERIMENTS["fig2b"].cases}
    scale = Scale(steps=10, gradient="adjoint")
    coup, reverse = (cases[f"{name} (first classifier)"].spec(scale).settings().gradient for name in ("COUP", "reverse SDE"))
    assert (coup.name, coup.guidance, reverse.name) == ("adjoint", "detached", "adjoint")
    exact = cases["COUP (first classifier)"].spec(dataclasses.replace(scale, gradient=None)).settings().gradient
    assert (exact.name, exact.guidance) == ("exact", "exact")


def test_a_page_says_that_its_images_are_jpeg_copies(tmp_path):
    file = tmp_path / "copies.npz"
    np.savez(file, jpeg=np.zeros(3, dtype=np.uint8), offsets=np.array([0, 3]), labels=np.array([1]))
    cases = EXPERIMENTS["fig2b"].cases
    for suffix in ("jpg", "png"):
        (tmp_path / suffix).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / suffix / f"0.{suffix}")
    of_files = ((str(tmp_path / "jpg"), True), (str(tmp_path / "png"), False))
    for source, copies in ((str(file), True), (f"{file}[0:1]", True), *of_files, ("cifar10-20", False)):
        said = tables.differences(EXPERIMENTS["fig2b"], Results(Scale(data=source, images=1), {}, {}, cases))
        assert any("JPEG copies" in line for line in said) == copies
    # Appendix E.1 has 500 images, and everything else 512.
    for name, count in (("tableE1", 500), ("fig2b", 512)):
        for images in (500, 512):
            scale = Scale(networks="paper", images=images)
            said = tables.differences(EXPERIMENTS[name], Results(scale, {}, {}, EXPERIMENTS[name].cases))
            assert any("not those of the paper" in line for line in said) == (images != count)
        # As many as were published where nothing is said; and those that ran count, whatever was asked for.
        options = parser().parse_args(["reproduce", name, "--networks", "paper"])
        assert scale_of(options, EXPERIMENTS[name]).images == count
        ran = {"a run": types.SimpleNamespace(count=3)}
        said = tables.differences(EXPERIMENTS[name], Results(Scale(networks="paper"), ran, {}, EXPERIMENTS[name].cases))
        assert any("3 images of cifar10-512, and not those of the paper" in line for line in said)


def test_all_leaves_out_what_cannot_run(tmp_path, capsys, monkeypatch):
    made = []
    monkeypatch.setattr("coupfast.cli.reproduce.make", lambda experiment, *a, **k: made.append(experiment.name) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reproduce("all", *SMALL, "--out", tmp_path / "out")
    assert made == ["table1"] and "left out: cifar100 runs on CIFAR-100's networks" in capsys.readouterr().err


def test_a_network_is_tried_once_for_all_experiments(monkeypatch):
    loads = []
    for kind in ("score", "classifier"):
        load = getattr(scale_module, f"load_{kind}")
        monkeypatch.setattr(scale_module, f"load_{kind}", lambda *a, load=load, **k: loads.append(a) or load(*a, **k))
    scale = Scale(images=1, budget=1e-6, steps=1)
    for name in ("table1", "fig4a", "fig2b"):
        check(EXPERIMENTS[name], scale)
    assert loads == [("cifar10-tiny",), ("cifar10-tiny",), ("cifar10-tiny-silu",)]


def test_roles_replace_networks():
    scale = Scale(roles={"second": Network("cifar10-tiny")})
    assert scale.network("second").name == "cifar10-tiny" and scale.network("classifier").name == "cifar10-tiny"
    with pytest.raises(ValueError, match="no network 'third'"):
        Scale(roles={"third": Network("x")})
