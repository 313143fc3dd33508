"""Attacks and defenses of other people: from a folder outside the package, from Python and from the command line."""

import json
import sys

import numpy as np
import pytest
import torch
from evaluation_cases import labelled, pixel_classifier, plain, purified
from torch import nn

from coupfast import cli
from coupfast.evaluation import Ledger, Spec, evaluate
from coupfast.evaluation.suites import find

ATTACKS = '''
import dataclasses

import torch

from coupfast.evaluation import Attack, Cost, Result, Suite, count, knob
from coupfast.evaluation.attacks import SaltAndPepper


@dataclasses.dataclass(frozen=True)
class FGSM(Attack):
    """Signed steps of equal size."""

    norm: str = "Linf"
    eps: float = 8 / 255
    iterations: int = count(1, "signed steps")
    share: float = knob(1.0, "of the radius that is used", metavar="S", words="in (0, 1]", valid=lambda s: 0 < s <= 1)
    seed: int = 3  # a name that the command line has otherwise

    def run(self, defense, x, y, *, seed):
        x_k = x.clone()
        for _ in range(self.iterations):
            leaf = x_k.requires_grad_()
            loss = torch.nn.functional.cross_entropy(defense(leaf), y, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, leaf)
            x_k = (leaf.detach() + self.share * self.eps / self.iterations * gradient.sign()).clamp(0, 1)
        return Result(x_k)

    def cost(self):
        return Cost(0, self.iterations)


both = Suite("both", lambda norm, eps: {"first": FGSM(norm, eps), "noise": SaltAndPepper()}, {"amount": "5 % is a guess"})


@dataclasses.dataclass(frozen=True)
class Halfway(Attack):
    def run(self, defense, x, y, *, seed):
        return Result(x)


class Bare(Attack):
    iterations: int = 1

    def run(self, defense, x, y, *, seed):
        return Result(x)

    def cost(self):
        return Cost(0, 0)


@dataclasses.dataclass(frozen=True)
class Judge(Bare):
    pass


@dataclasses.dataclass(frozen=True)
class Odd(Bare):
    norm: str = "Linf"
    eps: float = 8 / 255
    where: object = object()


def no_attack():
    pass
'''

DEFENSES = '''
import torch
from torch import nn
from evaluation_cases import pixel_classifier, purified


class Rounded(nn.Module):
    """Noise of torch's, then a classifier."""

    def __init__(self, noise=0.01):
        super().__init__()
        self.network, self.noise = pixel_classifier(), noise

    def forward(self, x):
        return self.network(x + self.noise * torch.randn_like(x))


def build(device):
    return Rounded().eval().to(device)


def without_device():
    return pixel_classifier()


def needs_more(device):
    raise KeyError("a file")


def learning():
    return Rounded()


def wrong():
    return 3


def predictions():
    class Predictions(nn.Module):
        def forward(self, x):
            return pixel_classifier()(x).argmax(dim=1)

    return Predictions().eval()


def without_gradient():
    class Numpy(nn.Module):
        def forward(self, x):
            with torch.no_grad():
                return pixel_classifier()(x)

    return Numpy().eval()


module = pixel_classifier()
purified_here = purified
number = 3
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that is no package's, with modules, labelled images and nothing else."""
    (tmp_path / "my_attacks.py").write_text(ATTACKS)
    (tmp_path / "my_defenses.py").write_text(DEFENSES)
    x, y = labelled(4, wrong=[1])
    np.savez(tmp_path / "images.npz", x=x.numpy(), y=y.numpy())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("my_attacks", "my_defenses"):
        sys.modules.pop(name, None)


def run(*arguments):
    return cli.main(list(map(str, arguments)))


SMALL = {"shard": 2, "draws": 2, "eps": 1 / 255, "paths": 1}
WORDS = ["images.npz", "--shard", "2", "--draws", "2", "--eps", "1/255", "--paths", "1", "--device", "cpu"]


# --- attacks -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["my_attacks", "my_attacks.py"])
def test_an_attack_from_python(folder, place):
    fgsm = find(f"{place}:FGSM").stages()["fgsm"].__class__
    attack = fgsm(eps=1 / 255, iterations=3)
    small = {name: value for name, value in SMALL.items() if name != "eps"}
    with evaluate(plain("cpu"), *labelled(4, wrong=[1]), attack=attack, **small) as found:
        assert found.accuracy < found.clean_accuracy == 0.75
        assert found.ledger.configuration["stages"]["fgsm"]["iterations"] == 3
        assert 0 < float((found.x_adv - labelled(4)[0]).abs().max()) <= 1 / 255 + 1e-6
        first = found.fingerprint
    by_class = {"attack": fgsm, "iterations": 3, **SMALL}
    by_name = {"attack": f"{place}:FGSM", "iterations": 3, **SMALL}
    for options in (by_class, by_name):
        with evaluate(plain("cpu"), *labelled(4, wrong=[1]), **options) as found:
            assert found.fingerprint == first


@pytest.mark.parametrize("place", ["my_attacks", "my_attacks.py"])
def test_an_attack_on_the_command_line(folder, place, capsys):
    words = [*WORDS, "--defense", "my_defenses.py:build", "--attack", f"{place}:FGSM"]
    assert run("evaluate", *words, "--iterations", "3", "--share", "1/2", "--attack-seed", "5", "--out", "run") == 0
    said = capsys.readouterr().out
    assert f"my_defenses.py:build under {place}:FGSM, Linf 1/255, 4 images" in said
    # In other processes; its options again from the run.
    assert run("evaluate", "--resume", "run", "--workers", "2") == 0
    assert capsys.readouterr().out == said
    assert (
        run("evaluate", *words, "--iterations", "3", "--share", "0.5", "--attack-seed", "5", "--workers", "2", "--out", "two")
        == 0
    )
    with Ledger("run", read_only=True) as one, Ledger("two", read_only=True) as two:
        assert one.fingerprint() == two.fingerprint()
        stage = one.configuration["stages"]["fgsm"]
        assert (stage["iterations"], stage["share"], stage["seed"]) == (3, 0.5, 5)
        assert stage["class"].endswith(f"{place}:FGSM")
    capsys.readouterr()
    assert run("plan", *words, "--iterations", "7") == 0
    assert [line.split()[1:4] for line in capsys.readouterr().out.splitlines() if line.startswith("fgsm")] == [["4", "4", "28"]]
    assert run("report", "run") == 0
    assert "fgsm" in (folder / "run" / "report.md").read_text()


def test_help_explains_its_knobs(folder, capsys):
    with pytest.raises(SystemExit):
        run("evaluate", "--attack", "my_attacks:FGSM", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "--share S of the radius that is used (1.0 in fgsm)" in text
    assert "--attack-seed" in text and "1 in fgsm; 100 in autoattack-standard" in text


def test_a_suite(folder):
    spec = Spec.of(attack="my_attacks:both", amount=0.3, iterations=2, **SMALL)
    assert list(spec.stages()) == ["first", "noise"]
    assert (spec.stages()["first"].iterations, spec.stages()["noise"].amount) == (2, 0.3)
    assert spec.suite.assumed == {"amount": "5 % is a guess"}
    assert Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    "words, message",
    [
        (["--attack", "my_attacks:FGSM", "--share", "2"], "`share` is in (0, 1], got 2.0"),
        (["--attack", "my_attacks:FGSM", "--iterations", "0"], "`iterations` is at least 1, got 0"),
        (["--attack", "my_attacks:FGSM", "--queries", "5"], "'fgsm' has no queries to set; it has iterations, seed, share"),
        (["--attack", "my_attacks:Halfway"], "Halfway is no whole attack: it has no cost"),
        (["--attack", "my_attacks:Bare"], "Bare is to be a frozen dataclass"),
        (["--attack", "my_attacks:Judge"], "'judge' is no name for a stage"),
        (["--attack", "my_attacks:Odd"], "`where` of Odd is a object, and a ledger keeps numbers, texts and lists"),
        (["--attack", "my_attacks:no_attack"], "is a function, and a coupfast.evaluation.attacks.base.Attack or"),
        (["--attack", "my_attacks:Missing"], "my_attacks has no 'Missing'; it has"),
        (["--attack", "my_attack:FGSM"], "importing my_attack gives ModuleNotFoundError"),
        (
            ["--attack", "my_attacks:FGSM", "--defense", "my_defenses.py:without_gradient"],
            "fgsm follows a gradient, and the defense's",
        ),
    ],
)
def test_what_is_wrong_with_an_attack_is_one_line(folder, capsys, words, message):
    defense = [] if "--defense" in words else ["--defense", "my_defenses.py:build"]
    assert run("evaluate", *WORDS, *defense, *words, "--out", "run") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (folder / "run").exists()


# --- defenses ----------------------------------------------------------------------------------------------------------------


def test_any_module(tmp_path):
    """Without noise, with torch's, and around a purification: each draw of the judge is another, and a rerun the same."""

    class Shifted(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner((x + 0.001).clamp(0, 1))

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = pixel_classifier()

        def forward(self, x):
            return self.inner(x + 0.01 * torch.randn_like(x))

    for number, (module, randomized) in enumerate(
        [(plain("cpu"), 0), (Noisy().eval(), 1), (Shifted(purified("cpu")).eval(), 1)]
    ):
        fingerprints = set()
        for again in range(2):
            found = evaluate(
                module, *labelled(4, wrong=[1]), attack="apgd-ce", iterations=2, out=tmp_path / f"{number}{again}", **SMALL
            )
            with found:
                fingerprints.add(found.fingerprint)
                first, second = found.verdicts["clean"].logits
                assert (np.abs(first - second).max() > 0) == bool(randomized)
                # An image that one clean draw gets wrong is attacked where another draw may get it right.
                assert ("apgd-ce-00000", (0, 1)[: 1 + randomized]) in {
                    (n, r.unit.images) for n, r in found.ledger.done().items()
                }
        assert len(fingerprints) == 1


def test_the_callers_noise_is_left_alone():
    defense = purified("cpu")
    defense.seed, defense.next_draw = 77, 5
    torch.manual_seed(4)
    state = torch.random.get_rng_state()
    evaluate(defense, *labelled(2), attack="salt-and-pepper", **SMALL).close()
    assert (defense.seed, defense.next_draw) == (77, 5) and torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", ["build", "without_device", "module", "Rounded"])
def test_a_defense_by_its_name(folder, name, capsys):
    if name == "Rounded":  # is made in training mode
        assert run("evaluate", *WORDS, "--defense", "my_defenses:Rounded", "--attack", "none", "--out", "run") == 2
        assert "the defense is in training mode; call .eval() first" in capsys.readouterr().err
        return
    for workers, place in ((1, "my_defenses"), (2, "my_defenses.py")):
        words = ["--defense", f"{place}:{name}", "--attack", "apgd-ce", "--iterations", "2", "--out", f"run{workers}"]
        assert run("evaluate", *WORDS, *words, "--workers", workers) == 0
        assert f"{place}:{name} under apgd-ce" in capsys.readouterr().out
    with Ledger("run1", read_only=True) as one, Ledger("run2", read_only=True) as two:
        assert one.fingerprint() == two.fingerprint()
    assert run("evaluate", "--resume", "run1") == 0
    assert run("report", "run1", "run2") == 0
    with evaluate(Spec(images="images.npz", defense=f"my_defenses:{name}", attack="none", **SMALL)) as found:
        assert found.clean_accuracy == 0.75 or name == "build"


def test_a_purifier_by_its_name_is_planned_and_certified(folder, capsys):
    words = [*WORDS, "--defense", "my_defenses:purified_here", "--attack", "apgd-ce", "--iterations", "2"]
    assert run("plan", *words) == 0
    assert "2 steps" not in capsys.readouterr().out  # all of them were probed
    assert run("evaluate", *words, "--certify", "1", "--out", "run") == 0
    assert "my_defenses:purified_here under apgd-ce" in capsys.readouterr().out
    with Ledger("run", read_only=True) as ledger:
        assert ledger.notes()["certificate"]["verdict"] == "exact"
    assert run("evaluate", *words[:-6], "--defense", "my_defenses:build", "--certify", "1", "--out", "other") == 2
    assert "this defense is no coupfast.PurifiedClassifier" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--defense", "my_defenses:number"], "is a int, and an nn.Module or what makes one is needed"),
        (["--defense", "my_defenses:wrong"], "makes a int, and an nn.Module is needed"),
        (["--defense", "my_defenses:needs_more"], "raises KeyError: 'a file'"),
        (["--defense", "my_defenses:learning"], "the defense is in training mode; call .eval() first"),
        (
            ["--defense", "my_defenses:predictions"],
            "gives logits of shape (batch, classes >= 2); of one image this one gives (1,)",
        ),
        (["--defense", "my_defenses:nothing"], "my_defenses has no 'nothing'"),
        (["--defense", "nothing.py:build"], "there is no file"),
        (
            ["--defense", "my_defenses:build", "--t", "0.05"],
            "`t` is of a defense that is built here, and `defense` gives another",
        ),
        (["--defense", "my_defenses:build", "--method", "none"], "`purifier` is of a defense that is built here"),
        (
            ["--defense", "my_defenses:build", "--classifier", "x.pt", "--num-steps", "2"],
            "`classifier`, `num_steps` are of a defense",
        ),
    ],
)
def test_what_is_wrong_with_a_defense_is_one_line(folder, capsys, words, message):
    assert run("evaluate", *WORDS, *words, "--attack", "apgd-ce", "--out", "run") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (folder / "run").exists()


def test_a_spec_that_contradicts_its_defense_is_refused():
    x, y = labelled(2)
    for options, message in (({"t": 0.05}, "`t` is"), ({"method": "none"}, "`purifier` is"), ({"score": "x"}, "`score` is")):
        with pytest.raises(ValueError, match=f"{message} of a defense that is built here, and `defense` gives another one"):
            evaluate(plain("cpu"), x, y, **options)
        with pytest.raises(ValueError, match=f"{message} of a defense that is built here"):
            evaluate(Spec.of(**options), x, y, defense=plain("cpu"))
    with pytest.raises(ValueError, match="given twice"):
        evaluate(Spec(defense="a:b"), x, y, defense=plain("cpu"))
    with pytest.raises(TypeError, match="given twice"):
        evaluate(plain("cpu"), x, y, defense=plain("cpu"))


def test_what_cannot_be_sent_to_other_processes_is_refused(tmp_path):
    x, y = labelled(4)
    message = "cannot be sent to one .*no lambda.*name it .file.py:build., or use one worker"
    with pytest.raises(ValueError, match=message):
        evaluate(lambda device: plain(device), x, y, attack="none", workers=2, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with evaluate(plain("cpu"), x, y, attack="none", workers=2, out=tmp_path / "run", **SMALL) as found:  # a module can
        assert found.clean_accuracy == 1.0


def test_noise_that_no_seed_fixes_is_said(caplog):
    class Unseeded(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.generator = pixel_classifier(), np.random.default_rng(0)

        def forward(self, x):
            return self.inner(x) + float(self.generator.normal())

    evaluate(Unseeded().eval(), *labelled(2), attack="none", **SMALL).close()
    assert "has noise that does not follow torch.manual_seed" in caplog.text


def test_probabilities_in_the_place_of_logits_are_said(caplog):
    evaluate(pixel_classifier(), *labelled(2), attack="none", **SMALL).close()
    assert "probabilities?" not in caplog.text
    evaluate(nn.Sequential(pixel_classifier(), nn.Softmax(dim=1)).eval(), *labelled(2), attack="none", **SMALL).close()
    assert "add up to 1: probabilities?" in caplog.text


def test_a_gradient_that_an_attack_is_not_made_for_is_said(caplog):
    evaluate(purified("cpu"), *labelled(2), attack="bpda-eot", iterations=1, eot_iter=1, **SMALL).close()
    assert "bpda-eot is made for the purifier's gradient 'bpda', and this one has 'exact'" in caplog.text


def test_a_classifier_keeps_the_modes_of_its_parts():
    """Dropout at test time is a defense; a batch norm that learns is a mistake."""
    network = nn.Sequential(nn.Dropout(0.5), *pixel_classifier()).eval()
    network[0].train()
    with evaluate(network, *labelled(2), attack="none", **SMALL) as found:
        first, second = found.verdicts["clean"].logits
        assert np.abs(first - second).max() > 0
    assert network[0].training
    learning = nn.Sequential(nn.BatchNorm2d(3), *pixel_classifier()).eval()
    learning[0].train()
    with pytest.raises(ValueError, match=r"in training mode \(its BatchNorm2d\)"):
        evaluate(learning, *labelled(2), attack="none", **SMALL)
