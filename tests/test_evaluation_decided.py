"""What follows from the memory that is free is decided once for a run, whoever made the defense."""

import multiprocessing

import numpy as np
import pytest
import torch
from conftest import small_score
from evaluation_cases import SMALL, labelled, pixel_classifier, run
from torch import nn

from coupfast import PurifiedClassifier, Purifier, prepared
from coupfast.engine.cpu import options as cpu_options
from coupfast.evaluation import Spec, evaluate
from coupfast.evaluation.ledger import Ledger
from coupfast.evaluation.plan import plan
from coupfast.evaluation.pools import UnitFailed

SPEC = SMALL.but(attack="apgd-ce", iterations=2, eot_iter=1, draws=2)


def fast(device="cpu", **options):
    """A defense whose purifier leaves all to be decided; in a worker there is no memory free to decide by."""
    if multiprocessing.parent_process() is not None:
        cpu_options.available_bytes = lambda device: 0
    classifier = pixel_classifier()
    purifier = Purifier(small_score(torch.float32), classifier, t=0.003, num_steps=2, engine="cpu", **options)
    return PurifiedClassifier(purifier, classifier)


class Around(nn.Module):
    """A defense with a purified classifier inside, and another purifier."""

    def __init__(self):
        super().__init__()
        self.inner = fast()
        self.before = Purifier(small_score(torch.float32), method="reverse-sde", t=0.003, num_steps=1, engine="cpu")

    def forward(self, x):
        return self.inner(self.before(x, seed=0).clamp(0, 1))


def around(device):
    fast(device)
    return Around().eval()


def described(folder):
    with Ledger(folder, read_only=True) as ledger:
        defense = ledger.configuration["defense"]
    return [defense] if "method" in defense else defense["purifications"]


@pytest.fixture
def little(monkeypatch):
    def set_free(size):
        monkeypatch.setattr(cpu_options, "available_bytes", lambda device: size)

    return set_free


@pytest.mark.parametrize("make, purifiers", [(fast, 1), (around, 2)], ids=["purified", "inside"])
def test_a_given_object_is_decided_once(tmp_path, little, make, purifiers):
    little(0)
    with run(tmp_path / "little", SPEC, make("cpu"), count=3) as ledger:
        found = ledger.fingerprint()
    for one in described(tmp_path / "little"):
        assert one["engine"]["options"] == {"largest_tile": 1} and one["gradient"]["memory_budget"] == "whole"
    assert len(described(tmp_path / "little")) == purifiers
    little(2**40)
    defense = make("cpu")
    with torch.no_grad():
        defense(labelled(2)[0])  # its engine is chosen already, otherwise
    inside = [module for module in defense.modules() if isinstance(module, Purifier)]
    before = [(module.settings, dict(module._prepared)) for module in inside]
    with run(tmp_path / "little", SPEC, defense, count=3, resume=True) as ledger:  # its configuration is this one
        assert ledger.fingerprint() == found
    with run(tmp_path / "much", SPEC, defense, count=3) as ledger:
        assert ledger.fingerprint() != found
    assert all(one["engine"]["options"] == {"largest_tile": 4} for one in described(tmp_path / "much"))
    # The caller's object is as it was.
    assert [(module.settings, dict(module._prepared)) for module in inside] == before
    assert all(module.settings.engine.options == {} and module.settings.gradient.memory_budget == "auto" for module in inside)


def test_a_run_that_was_stopped_goes_on_as_it_was_decided(tmp_path, little, monkeypatch):
    little(0)
    with run(tmp_path / "whole", SPEC, fast("cpu")) as ledger:
        whole = ledger.fingerprint()

    def stop(self, *arguments):
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr("coupfast.evaluation.worker.Worker._judge", stop)
        with pytest.raises(UnitFailed):
            run(tmp_path / "run", SPEC, fast("cpu"))
    little(2**40)
    with run(tmp_path / "run", SPEC, fast("cpu"), resume=True) as ledger:
        assert ledger.fingerprint() == whole


def test_workers_take_what_the_run_decided(tmp_path):
    with run(tmp_path / "one", SPEC, fast) as ledger:
        one = ledger.fingerprint()
    with run(tmp_path / "two", SPEC, fast, workers=2) as ledger:  # in which no memory is free
        assert ledger.fingerprint() == one


def test_what_an_object_says_itself_is_not_decided_for_it(tmp_path, little):
    defense = fast(engine_options={"largest_tile": 2}, memory_budget=2**28)
    little(0)
    with evaluate(defense, *labelled(2), attack="none", draws=1, paths=0, out=tmp_path / "run"):
        (one,) = described(tmp_path / "run")
        assert one["engine"]["options"] == {"largest_tile": 2} and one["gradient"]["memory_budget"] == 2**28
    other = fast(engine_options={"largest_tile": 4}, memory_budget=2**28)
    with pytest.raises(ValueError, match="defense.engine.options.largest_tile was 2 and is 4"):
        evaluate(other, *labelled(2), attack="none", draws=1, paths=0, out=tmp_path / "run", resume=True)


def test_a_purifier_is_not_settled_to_purify_otherwise():
    purifier = fast().purifier
    other = Purifier(purifier.score, purifier.classifier, t=0.1)
    with pytest.raises(ValueError, match="a purifier that purifies otherwise is another one"):
        purifier.settle(other.settings)


def test_a_plan_is_of_what_the_run_will_decide(tmp_path, monkeypatch):
    x, y = labelled(4)
    np.savez(tmp_path / "images.npz", x=x.numpy(), y=y.numpy())
    defense, spec = fast(), Spec.of(images=str(tmp_path / "images.npz"), attack="apgd-ce", iterations=1, shard=4)
    predicted = []
    least = fast(memory_budget="least")
    for free in (2**12, 2**40):  # of which half would be too little for a batch, and enough to keep everything
        monkeypatch.setattr(prepared, "available_bytes", lambda device, free=free: free)
        predicted.append([plan(spec, defense=one).probe.memory for one in (defense, least)])
    # Never in pieces of a batch, and with more memory than the least only where it is there.
    assert predicted[0][0] == predicted[0][1] == predicted[1][1] < predicted[1][0]
    assert defense.purifier.settings.gradient.memory_budget == "auto"
