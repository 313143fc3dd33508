"""Reports: they say what the ledger says, and need nothing else to be read."""

import base64
import csv
import dataclasses
import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from evaluation_cases import SMALL, labelled, plain, purified, run
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from coupfast.data import CIFAR10_CLASSES
from coupfast.evaluation import Ledger, evaluate, report
from coupfast.evaluation.protocols import judged
from coupfast.evaluation.report import pictures, published, tables, words
from coupfast.evaluation.suites import SUITES
from coupfast.settings import Settings


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A purified and a plain defense under the same attack."""
    folder = tmp_path_factory.mktemp("runs")
    spec = dataclasses.replace(SMALL, paths=3)
    run(folder / "purified", spec, command="coupfast evaluate --out 'a b' --t 0.1 '<&>'").close()
    run(folder / "plain", spec, build=plain).close()
    return folder


def test_a_page_that_needs_nothing_else(runs, tmp_path):
    page, markdown_page, json_page, csv_page = report.write(
        [runs / "purified", runs / "plain"], tmp_path / "out" / "report.html"
    )
    found = json.loads(json_page.read_text())
    assert set(found) == {"purified", "plain"} and len(found["plain"]["attacked"]["predictions"]) == 5
    rows = list(csv.DictReader(io.StringIO(csv_page.read_text())))
    # Of two kinds of images six protocols, and of M-resubmission three points.
    assert [row["run"] for row in rows] == ["purified"] * 18 + ["plain"] * 18
    official = next(row for row in rows if (row["run"], row["kind"], row["protocol"]) == ("plain", "attacked", "official"))
    assert float(official["accuracy"]) == found["plain"]["accuracy"] and int(official["images"]) == 5
    text = page.read_text()
    assert "http" not in text and "<script" not in text and "src=" in text
    pictures = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', text)]
    assert len(pictures) == 5  # resubmission, curves, one path, two galleries
    said = re.findall(r'<img alt="([^"]*)"', text)
    assert len(set(said)) == 5 and all(len(each.split()) >= 8 for each in said), said
    for picture in pictures:
        pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
        assert pixels.shape[1] > 400 and pixels.std() > 10
    # Into a folder that does not hold this run.
    assert "coupfast evaluate --out &#x27;a b-again&#x27; --t 0.1 &#x27;&lt;&amp;&gt;&#x27;" in text
    assert re.search(r"<p>2 runs; reported on \d{4}-\d\d-\d\d\.</p>", text)
    markdown = markdown_page.read_text()
    for title in ("purified: accuracy", "purified against plain, attacked", "plain: by class", "plain: what it took"):
        assert f"<h2>{title}</h2>" in text and f"## {title}" in markdown
    assert "<img" not in markdown
    for line in markdown.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


def test_numbers_are_those_of_the_ledger(runs):
    with Ledger(runs / "purified", read_only=True) as ledger:
        found, fingerprint = judged(ledger), ledger.fingerprint()
    parts = report.sections([report.read(runs / "purified")])
    accuracy = next(part for part in parts if part.title == "purified: accuracy")
    clean, attacked = (int(found[kind].official.sum()) for kind in ("clean", "attacked"))
    assert accuracy.rows[0][1].startswith(f"{20 * clean}.0 % ({clean}/5), ")
    assert accuracy.rows[0][2].startswith(f"{20 * attacked}.0 % ({attacked}/5), ")
    configuration = next(part for part in parts if "hashes" in part.title)
    assert ("fingerprint of the results", fingerprint) in list(configuration.rows)
    assert any(name == "defense.score_sha256" and len(value) == 64 for name, value in configuration.rows)
    classes = next(part for part in parts if part.title == "purified: by class")
    assert sum(int(row[1]) for row in classes.rows) == 5


def test_the_configuration_shows_what_was_set_and_the_stages_what_follows(runs):
    parts = {part.title: part for part in report.sections([report.read(runs / "purified")])}
    rows = dict(parts["purified: configuration, versions, hashes"].rows)
    assert (
        rows["spec.attack_options.iterations"] == "3" and "spec.attack_options.queries" not in rows and "spec.limit" not in rows
    )
    # The defense was given: no network that a spec names by default is its own.
    assert "spec.defense" in rows and "spec.score" not in rows and "spec.classifier" not in rows
    assert rows["spec.eps"] == "0.5/255"
    stages = parts["purified: stages of the attack"]
    (dlr,) = [dict(zip(stages.header, row, strict=True)) for row in stages.rows if row[0] == "apgd-dlr"]
    assert (dlr["loss"], dlr["iterations"], dlr["eot_iter"], dlr["eps"]) == ("dlr", "3", "2", "0.5/255")


def test_what_matters_most_comes_first_a_column_a_run(runs):
    found = [report.read(runs / "purified"), report.read(runs / "plain")]
    table = report.sections(found)[0]
    assert table.title == "Summary" and table.header == ("", "purified", "plain")
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["images"] == ("5", "5") and rows["defense"][0].startswith("coup, t = 0.003 in 2 steps")
    for kind in ("clean", "attacked"):
        for number, one in enumerate(found):
            value = 100 * one.verdicts[kind].official.mean()
            assert rows[f"{kind}: official"][number].startswith(f"{value:.1f} % (")


def test_legends_cover_no_curve(runs):
    found = report.read(runs / "purified")
    curves = pictures.curve_figure([found, dataclasses.replace(found, name="another one")])
    for figure in (curves, pictures.path_figure(found), pictures.resubmission_figure([found])):
        FigureCanvasAgg(figure).draw()
        axes = [panel for panel in figure.axes if panel.lines]
        legends = [*figure.legends, *(panel.get_legend() for panel in axes if panel.get_legend())]
        assert axes and legends
        for legend in legends:
            for panel in axes:
                assert not legend.get_window_extent().overlaps(panel.get_window_extent())


def test_a_single_image_is_drawn_alone():
    figure = pictures.image_grid({"clean": np.zeros((1, 3, 8, 8))}, {"clean": [("cat", False)]})
    (panel,) = figure.axes
    assert panel.get_xlabel() == "✗ cat" and panel.get_title() == "clean"


def test_runs_in_folders_of_one_name_are_told_apart(runs, tmp_path):
    copies = [tmp_path / part / "same" / "run" for part in ("one", "two")]
    for copy in copies:
        shutil.copytree(runs / "plain", copy)
    titles = [part.title for part in report.sections([report.read(copy) for copy in copies])]
    assert "one/same/run against two/same/run, attacked" in titles and "two/same/run: accuracy" in titles
    with pytest.raises(ValueError, match="reported on twice"):
        report.sections([report.read(copies[0]), report.read(copies[0])])


def test_guidance_and_assumptions_are_named_where_there_are_any(runs):
    found = report.read(runs / "purified")
    assert "gradient exact, guidance exact;" in tables._described(found)
    defense = {**found.configuration["defense"], "method": {"name": "reverse-sde", "t": 0.1}, "guided": False}
    configuration = {**found.configuration, "defense": defense}
    assert "guidance" not in tables._described(dataclasses.replace(found, configuration=configuration))
    assert tables._assumed(found) == ""
    spec = {**found.configuration["spec"], "attack": "bpda-eot-20", "attack_options": {"step_size": 0.01}}
    assumed = dataclasses.replace(found, configuration={**found.configuration, "spec": spec})
    assert tables._assumed(assumed) == " That EOT 15 is an assumption of this project: the paper does not state it legibly."


def test_a_radius_is_named_where_there_is_one(runs):
    found = report.read(runs / "purified")
    assert "; autoattack-rand Linf 0.5/255 (apgd-ce: " in tables._described(found)
    for attack, ending in (
        ("salt-and-pepper", "; salt-and-pepper (salt-and-pepper: amount 0.05)"),
        ("none", "; no attack"),
        ("pgd-eot", "; pgd-eot Linf 0.5/255 (pgd-eot: iterations 200, eot_iter 20, "),
    ):
        spec = SMALL.but(attack=attack)
        stages = {stage: attack.to_dict() for stage, attack in spec.stages().items()}
        configuration = {**found.configuration, "spec": spec.to_dict(), "stages": stages}
        summary = tables._described(dataclasses.replace(found, configuration=configuration))
        assert ending in summary and (ending[-1] in ", " or summary.endswith(ending))


def test_only_cifar10_has_the_names_of_its_classes(runs):
    found = report.read(runs / "purified")
    label = int(found.verdicts["clean"].labels[0])
    known = CIFAR10_CLASSES[label]
    for images, name in (("cifar10-20", known), ("cifar10[3:9]", known), ("cifar10", known), ("svhn.npz", str(label))):
        spec = {**found.configuration["spec"], "images": images}
        other = dataclasses.replace(found, configuration={**found.configuration, "spec": spec})
        (table,) = tables.classes([other])
        assert name in [row[0] for row in table.rows]


def test_curves_are_of_all_images(runs):
    found = report.read(runs / "purified")
    curves = pictures.curves(found)
    assert list(curves)[0] == "apgd-ce" and len(curves["apgd-ce"]) == SMALL.attack_options["iterations"] + 1
    for curve in curves.values():
        assert 0 <= curve[-1] <= curve[0] <= 1 and (np.diff(curve) <= 0).all()
    assert curves["apgd-ce"][0] <= 0.8  # one label is wrong: that image is never attacked


def test_shown_images_are_in_order_over_shards(runs):
    shown = report.read(runs / "purified").shown
    assert shown["images"].tolist() == [0, 1, 2]  # shards are of two
    assert shown["clean_images"].shape == (3, 3, 8, 8) and shown["clean_confidences"].shape == (3, 3, 10)
    assert shown["clean_logits"].shape == (3, 3, 10)


def test_chosen_images_are_shown(tmp_path):
    run(tmp_path / "chosen", dataclasses.replace(SMALL, paths=(3, 1)), command="x").close()
    found = report.read(tmp_path / "chosen")
    assert found.shown["images"].tolist() == [1, 3]  # the second of both shards
    x, _ = labelled(5)
    np.testing.assert_array_equal(found.shown["clean_images"], x[[1, 3]].numpy())
    np.testing.assert_array_equal(found.shown["clean_logits"], found.verdicts["clean"].logits[:, [1, 3]])


def test_the_path_is_without_noise_and_shows_the_label_and_what_beats_it(runs):
    found = report.read(runs / "purified")
    purifier = purified("cpu").purifier
    x = torch.from_numpy(found.shown["attacked_images"])
    with torch.no_grad():
        _, states = purifier(x, noise=torch.zeros(2, *x.shape), return_trajectory=True)
        confidences = purified("cpu").classifier(((states[-1] + 1) / 2).clamp(0, 1)).softmax(dim=1)
    torch.testing.assert_close(torch.from_numpy(found.shown["attacked_confidences"][-1]), confidences, rtol=1e-4, atol=1e-5)
    labels = found.verdicts["clean"].labels
    for number in range(3):
        others = [c for c in range(10) if c != labels[number]]
        assert pictures.competitor(found, number) == max(others, key=lambda c: confidences[number, c])
    assert "Without noise, as in the paper's Fig. 2a: of the label" in pictures.path_picture(found).note


def test_runs_are_compared_on_what_both_have(runs, tmp_path):
    run(tmp_path / "fewer", dataclasses.replace(SMALL, draws=2), count=3).close()
    parts = report.sections([report.read(runs / "plain"), report.read(tmp_path / "fewer")])
    (table,) = [part for part in parts if part.title == "plain against fewer, clean"]
    assert "compared on the 3 images that both have, of 5 and 3 and on the first 2 draws, of 3 and 2" in table.note
    assert [row[0] for row in table.rows][2:4] == ["worst of 2 draws", "majority of 2 draws"]


def test_other_pixels_with_equal_labels_are_not_the_same_images(runs, tmp_path):
    x, y = labelled(5, wrong=[1])
    evaluate(SMALL, (x + 0.01).clamp(0, 1), y, defense=plain, out=tmp_path / "brighter").close()
    parts = report.sections([report.read(runs / "plain"), report.read(tmp_path / "brighter")])
    (text,) = [part for part in parts if part.title.startswith("plain against brighter")]
    assert "needs the same images, and of 5 and 5 images none is in both runs" in text.lines


def test_common_noise_is_claimed_of_the_judges_draws_only(runs, tmp_path):
    run(tmp_path / "reseeded", dataclasses.replace(SMALL, seed=5), build=plain).close()
    parts = report.sections([report.read(runs / "plain"), report.read(runs / "purified"), report.read(tmp_path / "reseeded")])
    notes = {part.title: part.note for part in parts if "against" in part.title}
    assert "The same images, in the judge's draws common noise (the official row's" in notes["plain against purified, attacked"]
    assert "The same images, noise of their own" in notes["plain against reseeded, attacked"]


def test_attacks_that_differ_are_pointed_out(runs, tmp_path):
    run(tmp_path / "weaker", SMALL.but(iterations=1), build=plain).close()
    parts = report.sections([report.read(runs / "plain"), report.read(tmp_path / "weaker")])
    (table,) = [part for part in parts if part.title == "plain against weaker, attacked"]
    assert "Warning: they were not attacked in the same way" in table.note


def test_the_protocols_are_explained_and_resubmission_is_a_curve(runs):
    found = report.read(runs / "purified")
    parts = {part.title: part for part in report.sections([found])}
    explained = dict(parts["What the protocols are"].rows)
    assert {"official", "M-resubmission", "worst of N draws"} <= set(explained) and "inside the attack" not in explained
    assert "RobustBench" in explained["official"]
    accuracy = dict((row[0], row[1:]) for row in parts["purified: accuracy"].rows)
    cell = accuracy["2-resubmission, all 2 right"][1]
    assert cell.startswith(f"{100 * found.resubmission['attacked'][1].value:.1f} %")
    rows = [row for row in found.found["accuracies"] if row["protocol"] == "resubmission" and row["kind"] == "attacked"]
    assert [row["draws"] for row in rows] == [1, 2, 3]
    assert [row["accuracy"] for row in rows] == [point.value for point in found.resubmission["attacked"]]
    assert "Accuracy against the number of submissions" in parts


def test_attacks_are_explained_with_what_was_asked_of_them(runs, tmp_path):
    found = report.read(runs / "purified")
    parts = {part.title: part for part in report.sections([found])}
    explained = dict(parts["What the attacks are"].rows)
    assert set(explained) == {"purified: apgd-ce, purified: apgd-dlr"} and "AutoAttack" in next(iter(explained.values()))
    spec = SMALL.but(attack="cascade", mode="fast", coarse_steps=1, iterations=1, eot_iter=1, error=0.25, looks=2)
    run(tmp_path / "fast", spec).close()
    found = report.read(tmp_path / "fast")
    assert dict(row[:2] for row in report.sections([found])[0].rows)["attack"].startswith("cascade in fast mode Linf")
    parts = {part.title: part for part in report.sections([found])}
    explained = dict(parts["What the attacks are"].rows)
    assert {"fast: transfer-3, fast: transfer-5", "fast: exact", "fast: exact, besides"} <= set(explained)
    besides = explained["fast: exact, besides"]
    assert "with a probability of 0.25 at most" in besides and "2 fresh draws, and the point where most of them" in besides
    assert "the point where" not in explained["fast: transfer-3, besides"]
    assert "of at most 0.25 and over all 3 stages 0.75" in parts["fast: accuracy"].note


def test_who_leaves_a_coarse_attack_is_told_as_it_is():
    (said,) = words._besides({"drop": "mean", "coarse_steps": 3})
    assert said.endswith("once the mean logits of the coarser purification and then a fresh draw of the defense failed.")
    assert words._besides({"drop": "mean"}) == ["An image leaves once the mean logits of the draws fail."]


def test_every_attack_of_the_project_is_explained():
    shipped = {type(attack) for suite in SUITES.values() for attack in suite.stages().values()}
    assert shipped == set(words._ATTACKS)


def test_what_an_attack_saw_inside_is_told(tmp_path):
    spec = SMALL.but(attack="pgd-eot", iterations=2, eot_iter=4)
    run(tmp_path / "run", spec, command="x").close()
    found = report.read(tmp_path / "run")
    counts = {}
    for record in found.records.values():
        if "looked" in record.result:
            assert record.result["looks"] == 4
            counts |= dict(zip(record.unit.images, record.result["looked"], strict=True))
    assert sorted(counts) == list(range(5)) and 0 < sum(counts.values())
    assert found.inside["inside average"].value == pytest.approx(1 - sum(counts.values()) / 20)
    assert found.inside["inside worst"].value == pytest.approx(sum(count == 0 for count in counts.values()) / 5)
    parts = {part.title: part for part in report.sections([found])}
    assert any(row[0] == "inside the attack, worst of 4" for row in parts["run: accuracy"].rows)
    assert "inside the attack" in dict(parts["What the protocols are"].rows)


def test_the_lower_of_rand_and_standard(runs, tmp_path):
    """Of the runs of one defense only."""
    cuts = {"iterations": 2, "queries": 4, "target_classes": 3, "eot_iter": 1}
    run(tmp_path / "standard", SMALL.but(attack="autoattack-standard", **cuts), build=plain).close()
    folders = [runs / "plain", runs / "purified", tmp_path / "standard"]
    paths = report.write(folders, tmp_path / "report.html")
    read = [report.read(folder) for folder in folders]
    (table,) = tables.lower(tables.lowers(read))
    assert table.title == "The lower of plain and standard"
    verdicts = [one.verdicts["attacked"].official for one in (read[0], read[2])]
    cells = table.rows[0][1:]
    assert cells[0].startswith(f"{100 * min(v.mean() for v in verdicts):.1f} %")
    assert cells[1].startswith(f"{100 * (verdicts[0] & verdicts[1]).mean():.1f} %")
    kept = json.loads(paths[2].read_text())
    assert {"lower of plain, standard", "both of plain, standard"} <= set(kept)
    assert "lower of plain, standard" in paths[3].read_text()


def test_what_each_stage_found_is_counted(runs):
    found = report.read(runs / "purified")
    (table,) = tables.found_by_stage(found)
    stages = found.configuration["stages"]
    assert [row[0] for row in table.rows] == list(stages)
    for (stage, *cells), after in zip(table.rows, [*list(stages)[1:], None], strict=True):
        here, there = (
            {image for record in found.records.values() if record.unit.stage == name for image in record.unit.images}
            for name in (stage, after)
        )
        assert int(cells[0]) == len(here) == int(cells[1]) + int(cells[2])
        assert after is None or int(cells[2]) == len(there)
    assert int(table.rows[0][1]) > 0


def test_published_figures_stand_beside_runs_of_their_setting_only(runs):
    found = report.read(runs / "purified")
    assert published.like(found) == []
    spec = {
        **found.configuration["spec"],
        **{"defense": None, "images": "cifar10-512", "attack_options": {}, "score": "cifar10-ddpmpp-deep"},
        **{"classifier": "wrn-28-10", "norm": "Linf", "eps": 8 / 255, "attack": "pgd-eot", "limit": None},
        **{"score_weights": "score.safetensors", "classifier_weights": "Standard.pt"},
    }

    def purifies(method="coup", t=0.1, **others):
        return Settings.of(method=method, t=t, **others).to_dict()["method"]

    defense = {
        **found.configuration["defense"],
        **{"method": purifies(), "num_steps": 100, "gradient": {"name": "exact", "guidance": "exact"}},
    }
    adjoint = {"name": "adjoint", "guidance": "detached"}

    def like(spec=spec, attack=None, **changed):
        configuration = {**found.configuration, "spec": spec, "defense": {**defense, **changed}}
        return published.like(dataclasses.replace(found, configuration=configuration), attack)

    (figure,) = like()
    assert figure.robust == {"single": 41.72}
    configuration = {**found.configuration, "spec": spec, "defense": defense}
    rows = tables.accuracies(dataclasses.replace(found, configuration=configuration)).rows
    assert rows[-1][0].startswith("one fresh draw, published: ") and rows[-1][1:] == ("90.33 %", "41.72 %")
    (figure,) = like({**spec, "attack": "bpda-eot-20"}, gradient={"name": "bpda"})
    assert figure.robust == {"official": 83.20} and "table 3" in figure.source
    (figure,) = like({**spec, "classifier": "wrn-70-16"}, method=purifies("diffpure"))
    assert figure.robust == {"single": 42.20}
    (figure,) = like(method=purifies(num_steps=100))
    assert like(method=purifies(num_steps=50), num_steps=50) == []
    others = [{"guidance_scale": 5.0}, {"clamp": False}, {"t": 0.06}, {"solver": "ddim"}]
    for other in [{"method": purifies(**other)} for other in others] + [{"gradient": {"name": "bpda"}}]:
        assert like(**other) == []
    assert like(gradient={"name": "exact", "guidance": "detached"}) == []
    others = [{"images": "cifar10-20"}, {"classifier": "cifar10-tiny"}, {"attack_options": {"iterations": 9}}, {"mode": "fast"}]
    others += [{"start_from": "elsewhere"}, {"limit": 4}, {"guide": "cifar10-tiny"}, {"classifier_weights": "random"}]
    for other in others:
        assert like({**spec, **other}) == []
    (figure,) = like({**spec, "attack": "autoattack-rand"}, published.LOWER, gradient=adjoint)
    assert figure.robust == {"official": 73.05}
    whole = {"name": "adjoint", "guidance": "exact"}
    assert like({**spec, "attack": "autoattack-rand"}, published.LOWER, gradient=whole) == []

    def lower(**of_standard):
        configurations = [
            {**found.configuration, "defense": {**defense, "gradient": adjoint}, "spec": {**spec, **more}}
            for more in ({"attack": "autoattack-rand"}, {"attack": "autoattack-standard", **of_standard})
        ]
        configured = [dataclasses.replace(found, configuration=each) for each in configurations]
        (table,) = tables.lower(tables.lowers(configured))
        return [row[0] for row in table.rows if "published" in row[0]]

    assert len(lower()) == 1
    assert lower(attack_options={"iterations": 10}) == []  # cut short, as the other run was not
