"""Networks that somebody adds, from a folder outside of the package, without touching it."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import coupfast
from coupfast.models import registry, zoo
from coupfast.models.checkpoints import CheckpointError, read_safetensors, state_dict_sha256
from coupfast.models.from_file import convert_checkpoint
from coupfast.models.registry import Family

ROOT = Path(coupfast.__file__).resolve().parent.parent

#: A score network and a classifier, each with names, recognition and random weights; and two that are not registered.
OUTSIDE = """
    import torch
    from torch import nn

    from coupfast.models.registry import register_classifier, register_score


    def recognise_score(state):
        weight = state.get("first.weight")
        if weight is None or "time.weight" not in state:
            return None
        return {"width": weight.shape[0]}


    @register_score(
        names={"outside-small": {"width": 4}},
        recognise=recognise_score,
        randomise=lambda network, generator: network.last.weight.data.normal_(generator=generator),
    )
    class OutsideScore(nn.Module):
        image_size, channels = 8, 3

        def __init__(self, width: int = 8):
            super().__init__()
            self.first = nn.Conv2d(3, width, 3, padding=1)
            self.time = nn.Linear(1, width)
            self.last = nn.Conv2d(width, 3, 3, padding=1)
            nn.init.zeros_(self.last.weight)

        def forward(self, x, labels):
            h = self.first(x) + self.time(labels[:, None] / 999)[:, :, None, None]
            return self.last(torch.relu(h))


    @register_classifier(
        "outside-linear",
        names={"outside-ten": {"classes": 10}},
        recognise=lambda state: {"classes": len(state["head.bias"])} if set(state) == {"head.weight", "head.bias"} else None,
    )
    class OutsideClassifier(nn.Module):
        def __init__(self, classes: int = 10):
            super().__init__()
            self.head = nn.Linear(3, classes)

        def forward(self, x):
            return self.head(x.mean(dim=(2, 3)))


    def made():
        return OutsideClassifier(5)


    there = OutsideClassifier(3)
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """The folder, which Python looks into; what was registered is forgotten afterwards."""
    (tmp_path / "outside_models.py").write_text(textwrap.dedent(OUTSIDE))
    monkeypatch.syspath_prepend(tmp_path)
    registry.families()  # the package's own are there
    before = dict(registry._families)
    yield tmp_path
    sys.modules.pop("outside_models", None)
    registry._families.clear()
    registry._families.update(before)


def test_load_by_name_file_and_reference(outside, tmp_path):
    score = coupfast.load_score("outside_models:outside-small", weights="random", seed=3)
    assert type(score).__name__ == "OutsideScore" and score.first.weight.shape[0] == 4
    assert score.last.weight.std() > 0.3  # redrawn
    assert not any(parameter.requires_grad for parameter in score.parameters()) and not score.training
    again = coupfast.load_score("outside-small", weights="random", seed=3)  # registered by now
    assert state_dict_sha256(again) == state_dict_sha256(score)
    assert "outside-small" in registry.listed("score") and "outside-ten" in registry.listed("classifier")
    assert zoo.needs_weights("outside-small") and zoo.needs_weights("outside_models:outside-ten")

    torch.save({"net": {f"module.{k}": v for k, v in score.state_dict().items()}, "acc": 1.0}, tmp_path / "score.pt")
    for loaded in (
        coupfast.load_score(tmp_path / "score.pt"),
        coupfast.load_score("outside_models:outside-small", weights=tmp_path / "score.pt"),
    ):
        assert state_dict_sha256(loaded) == state_dict_sha256(score)
    with pytest.raises(CheckpointError, match="weights of a score network .OutsideScore., not of a classifier"):
        coupfast.load_classifier(tmp_path / "score.pt")
    with pytest.raises(ValueError, match="outside-small.*does not ship"):
        coupfast.load_score("outside-small")

    classifier = coupfast.load_classifier("outside_models:outside-ten", weights="random")
    assert classifier(torch.rand(2, 3, 8, 8)).shape == (2, 10)


def test_functions_and_networks_that_are_not_registered(outside, tmp_path):
    made = coupfast.load_classifier("outside_models:made", seed=1)
    assert made.head.out_features == 5
    assert state_dict_sha256(made) == state_dict_sha256(coupfast.load_classifier("outside_models:made", seed=1))
    torch.save(coupfast.load_classifier("outside_models:made", seed=2).state_dict(), tmp_path / "made.pt")
    filled = coupfast.load_classifier("outside_models:made", weights=tmp_path / "made.pt")
    assert state_dict_sha256(filled) == state_dict_sha256(coupfast.load_classifier("outside_models:made", seed=2))
    with pytest.raises(ValueError, match="`outside_models:OutsideClassifier` is a class of networks, without weights"):
        coupfast.load_classifier("outside_models:OutsideClassifier")
    assert zoo.needs_weights("outside_models:OutsideClassifier") and not zoo.needs_weights("outside_models:made")
    assert coupfast.load_classifier("outside_models:OutsideClassifier", weights="random").head.out_features == 10
    assert coupfast.load_classifier("outside_models:there").head.out_features == 3
    by_file = coupfast.load_classifier(f"{outside}/outside_models.py:there")
    assert by_file is coupfast.load_classifier("outside_models:there")  # one module, however it is named


@pytest.mark.parametrize(
    ("load", "reference", "error", "message"),
    [
        (coupfast.load_score, "outside_models:nothing", ValueError, "no score network named 'nothing'.*outside-small"),
        (coupfast.load_score, "no_such_module:net", ImportError, "no_such_module"),
        (coupfast.load_score, "no_such_file.py:net", ImportError, "there is no file .*no_such_file.py"),
        (coupfast.load_score, "outside_models:made", TypeError, "OutsideClassifier is a classifier: are .* swapped"),
        (coupfast.load_classifier, "outside_models:outside-small", ValueError, "no classifier named 'outside-small'"),
        (coupfast.load_classifier, "outside_models:recognise_score", TypeError, "called without arguments"),
        (coupfast.load_score, "broken_models:net", ImportError, "broken_models does not import: ZeroDivisionError"),
    ],
)
def test_references_that_do_not_serve(load, reference, error, message, outside):
    (outside / "broken_models.py").write_text("1 / 0\n")
    with pytest.raises(error, match=message):
        load(reference)


def test_convert(outside, tmp_path):
    score = coupfast.load_score("outside_models:outside-small", weights="random")
    torch.save({"module." + k: v for k, v in score.state_dict().items()}, tmp_path / "s.pt")
    assert convert_checkpoint(tmp_path / "s.pt", tmp_path / "s.safetensors") == {"arch": "OutsideScore", "width": 4}
    assert json.loads(read_safetensors(tmp_path / "s.safetensors")[1]["config"])["width"] == 4
    assert state_dict_sha256(coupfast.load_score(tmp_path / "s.safetensors")) == state_dict_sha256(score)
    # A normalisation in front of a network that has none of its own stays with it.
    classifier = coupfast.load_classifier("outside_models:outside-ten", weights="random")
    front = {"0.mean": torch.tensor([0.5, 0.4, 0.3]), "0.std": torch.tensor([0.2, 0.3, 0.4])}
    torch.save(front | {f"1.{k}": v for k, v in classifier.state_dict().items()}, tmp_path / "c.pt")
    x = torch.rand(2, 3, 8, 8)
    normalised = (x - front["0.mean"][:, None, None]) / front["0.std"][:, None, None]
    convert_checkpoint(tmp_path / "c.pt", tmp_path / "c.safetensors")
    for file in ("c.pt", "c.safetensors"):
        loaded = coupfast.load_classifier(tmp_path / file)
        torch.testing.assert_close(loaded(x), classifier(normalised), rtol=0, atol=0)
    named = coupfast.load_classifier("outside-ten", weights=tmp_path / "c.pt")
    torch.testing.assert_close(named(x), classifier(normalised), rtol=0, atol=0)


def test_the_command_line_knows_them(outside, tmp_path):
    def run(*arguments):
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.run(
            [sys.executable, "-m", "coupfast", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=outside,
            env=os.environ | {"PYTHONPATH": path, "COLUMNS": "400"},
        )

    found = run("purify", "--score", "outside_models:outside-small", "--help")
    assert found.returncode == 0, found.stderr
    assert "outside-small" in found.stdout and "outside-ten" in found.stdout and "package.module:NAME" in found.stdout
    assert "outside-small" not in run("purify", "--help").stdout

    torch.save(coupfast.load_score("outside_models:outside-small", weights="random").state_dict(), tmp_path / "s.pt")
    found = run("convert", "s.pt", "s.safetensors", "--network", "outside_models:outside-small")
    assert found.returncode == 0, found.stderr
    assert "OutsideScore" in found.stdout
    images = torch.rand(2, 3, 8, 8).numpy()
    np.savez(tmp_path / "x.npz", x=images)
    networks = ["--score", "outside_models:outside-small", "--score-weights", "s.safetensors"]
    networks += [f"--classifier={outside}/outside_models.py:outside-ten", "--classifier-weights", "random"]
    found = run("purify", "x.npz", "--out", "out", "--steps", 2, "--device", "cpu", *networks)
    assert found.returncode == 0, found.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


# --- the registry itself ----------------------------------------------------------------------------------------------


class Mine(nn.Module):
    def __init__(self, size: int = 1):
        super().__init__()


def test_what_is_taken_is_refused():
    assert registry.families("score")
    with pytest.raises(ValueError, match="architecture 'WideResNet' is registered already, by coupfast.models.wide_resnet"):
        registry.register(Family("WideResNet", "classifier", Mine))
    with pytest.raises(ValueError, match="classifier 'wrn-28-10' is registered already"):
        registry.register(Family("Mine", "classifier", Mine, names={"wrn-28-10": {}}))
    assert registry.family_of("WideResNet").build is not Mine


def test_every_family_of_the_package_makes_random_networks():
    for family in registry.families():
        for name in family.names:
            network = registry.skeleton(family.kind, name)
            assert sum(parameter.numel() for parameter in network.parameters()) > 1e6
    with pytest.raises(ValueError, match="'nothing' names no score network"):
        registry.skeleton("score", "nothing")


def test_a_configuration_without_arch():
    assert registry.with_arch({"nf": 8})["arch"] == "DDPMpp"
    assert registry.with_arch({"depth": 10, "widen_factor": 1})["arch"] == "WideResNet"
    with pytest.raises(CheckpointError, match="WideResNet, DMWideResNet|DMWideResNet, WideResNet"):
        registry.with_arch({"depth": 10})
    with pytest.raises(CheckpointError, match="no known family"):
        registry.with_arch({"colour": 10})
