"""What `evaluate` gives back: the ledger's numbers, as an object."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from evaluation_cases import SMALL, labelled, plain, purified

from coupfast.evaluation import Evaluation, Ledger, Spec, evaluate
from coupfast.evaluation.ledger import LedgerError
from coupfast.evaluation.protocols import OFFICIAL, accuracy, judged, table


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("result") / "run"
    x, y = labelled(5, wrong=[1])
    with evaluate(SMALL, x, y, defense=purified, out=folder) as found:
        yield found


def test_accuracies_are_those_of_the_ledger(found):
    with Ledger(found.folder, read_only=True) as ledger:
        verdicts = judged(ledger)
    assert found.accuracy == verdicts["attacked"].official.mean() < found.clean_accuracy == verdicts["clean"].official.mean()
    assert found.accuracies["attacked"]["worst"] == accuracy(verdicts["attacked"], "worst")
    assert set(found.accuracies) == {"clean", "attacked"} and OFFICIAL in found.accuracies["clean"]
    assert found.table() == table(verdicts)
    assert found.fingerprint == found.ledger.fingerprint()


def test_the_adversarial_images_are_those_that_were_judged(found):
    x, _ = labelled(5)
    assert found.x_adv.shape == x.shape and found.x_adv.dtype == torch.float32
    assert 0 < float((found.x_adv - x).abs().max()) <= SMALL.eps + 1e-6
    shown = found.ledger.arrays(found.ledger.done()["judge-00000"])["attacked_images"]
    np.testing.assert_array_equal(found.x_adv[:1].numpy(), shown)
    with Evaluation(found.folder) as again:  # the images were Python's
        with pytest.raises(ValueError, match="was given its images from Python; give them again as `x`"):
            _ = again.x_adv
    with Evaluation(found.folder, x=x) as again:
        assert torch.equal(again.x_adv, found.x_adv) and again.accuracy == found.accuracy


def test_json_and_csv(found, tmp_path):
    document = json.loads(found.to_json(tmp_path / "new" / "found.json"))
    assert document == json.loads((tmp_path / "new" / "found.json").read_text())
    assert document["accuracy"] == found.accuracy and document["fingerprint"] == found.fingerprint
    predictions = np.array(document["attacked"]["predictions"])  # [images][draws]
    assert predictions.shape == (5, 3)
    right = predictions == np.array(document["labels"])[:, None]
    rows = list(csv.DictReader(io.StringIO(found.to_csv(tmp_path / "found.csv"))))
    assert (tmp_path / "found.csv").read_text() == found.to_csv()
    by_name = {(row["kind"], row["protocol"]): row for row in rows}
    assert float(by_name["attacked", "average"]["accuracy"]) == pytest.approx(right.mean())
    assert float(by_name["attacked", "worst"]["accuracy"]) == pytest.approx(right.all(axis=1).mean())
    assert by_name["attacked", "official"]["draws"] == "3" and by_name["clean", "official"]["draws"] == "1"
    assert by_name["clean", "official"]["bootstrap_low"] == ""
    assert float(by_name["clean", "single"]["low"]) <= float(by_name["clean", "single"]["accuracy"])


def test_repr_says_what_matters(found):
    text = repr(found)
    assert len(text.splitlines()) == 1
    assert f"coup under autoattack-rand, Linf {255 * SMALL.eps:g}/255, 5 images" in text
    assert f"clean {100 * found.clean_accuracy:.1f} %, attacked {100 * found.accuracy:.1f} %" in text


def test_without_a_folder_it_goes_with_the_result():
    found = evaluate(plain("cpu"), *labelled(2), attack="none", draws=1)
    folder = found.folder
    assert folder.is_dir() and found.accuracy == found.clean_accuracy == 1.0 and "attacked" not in found.accuracies
    found.close()
    assert not folder.exists()


def test_flat_keywords_go_where_they_belong():
    spec = Spec.of(t=0.05, attack="autoattack-rand", iterations=3, norm="L2", eps=0.5, limit=2, method="coup", eot_iter=None)
    assert spec.purifier == {"t": 0.05, "method": "coup"} and spec.attack_options == {"iterations": 3}
    assert (spec.norm, spec.eps, spec.limit) == ("L2", 0.5, 2)
    assert spec.but(t=0.07).purifier == {"t": 0.07, "method": "coup"}
    assert spec.but(attack="pgd-eot", eot_iter=2).attack_options == {"eot_iter": 2}  # the knobs were another attack's
    assert spec.but(method="none").purifier is None
    assert spec.settings().method.t == 0.05 and spec.settings().gradient.memory_budget == "whole"
    assert spec.but(attack="bpda-eot").settings().gradient.name == "bpda"
    assert spec.but(gradient="surrogate", num_steps=20).settings().gradient.name == "surrogate"
    for wrong, message in (
        ({"iteration": 3}, "an evaluation has no iteration to set; did you mean 'iterations'?"),
        ({"n_iter": 3}, "did you mean 'iterations'"),
        ({"steps": 3}, "did you mean 'num_steps'"),
        ({"method": "none", "t": 0.05}, "`t` is of a purifier, and with method 'none' there is none"),
        ({"attack": "apgd-ce", "queries": 3}, "'apgd-ce' has no queries to set"),
        ({"t": 3.0}, "`t` is continuous time"),
    ):
        with pytest.raises(ValueError, match=message):
            Spec.of(**wrong)


def test_settings_may_be_an_object():
    import coupfast

    settings = coupfast.Settings.of(
        t=0.003, num_steps=2, engine="eager", gradient="surrogate", surrogate_steps=1, memory_budget="whole"
    )
    spec = Spec(purifier=settings, attack="none")
    assert spec.settings() == settings
    # Memory as it is free would split batches by the moment.
    assert Spec(purifier=coupfast.Settings.of(settings, memory_budget="auto"), attack="none").settings() == settings
    assert Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert spec.but(t=0.004).settings().method.t == 0.004
    assert coupfast.evaluate is evaluate and coupfast.Spec is Spec


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x, y, out: evaluate(SMALL, str(out), y), TypeError, "`x` are images, got .*; the run's folder is `out`"),
        (lambda x, y, out: evaluate(SMALL, x), ValueError, "give both `x` and `y`, or neither"),
        (
            lambda x, y, out: evaluate(plain("cpu"), x, y, resume=True),
            ValueError,
            "`resume` continues the run in the folder `out`",
        ),
        (lambda x, y, out: evaluate(plain("cpu"), x, y, out=out, resume=True), LedgerError, "holds no run"),
        (lambda x, y, out: evaluate(plain("cpu"), x, y.tolist()), TypeError, "`y` is a torch.Tensor, got list"),
        (lambda x, y, out: evaluate(3, x, y), TypeError, "`defense` is an nn.Module .* got a int"),
        (lambda x, y, out: evaluate(torch.nn.Linear, x, y), TypeError, "got the class Linear"),
        (lambda x, y, out: evaluate(plain("cpu"), x, y, device="cuda"), ValueError, "workers need a GPU|the defense is on cpu"),
        (lambda x, y, out: evaluate(plain("cpu"), x, y, iteration=3), ValueError, "did you mean 'iterations'"),
    ],
)
def test_says_what_is_wrong(call, error, message, tmp_path):
    with pytest.raises(error, match=message):
        call(*labelled(2), tmp_path)


def test_a_run_keeps_what_the_engine_decided_by_free_memory(tmp_path, monkeypatch):
    """Continued where less memory is free it has the same bits: the choice is the run's, not the moment's."""
    from coupfast.engine.cpu import options as cpu_options

    monkeypatch.setattr(cpu_options, "available_bytes", lambda device: 2**20)
    spec = Spec(purifier={"t": 0.06, "num_steps": 1}, attack="none", limit=2, draws=2, paths=0)
    x, y = spec.load()
    little = evaluate(spec, x, y, out=tmp_path / "little")
    with Ledger(tmp_path / "little", read_only=True) as ledger:
        assert ledger.configuration["defense"]["engine"]["options"] == {"largest_tile": 1}
    monkeypatch.undo()
    again = evaluate(spec, x, y, out=tmp_path / "little", resume=True)
    much = evaluate(spec, x, y, out=tmp_path / "much")
    with Ledger(tmp_path / "much", read_only=True) as ledger:
        assert ledger.configuration["defense"]["engine"]["options"] == {"largest_tile": 4}
    assert again.fingerprint == little.fingerprint != much.fingerprint
