"""A purified classifier under other people's attacks, unchanged."""

import pytest
import torch
from conftest import relu_classifier, small_score

from coupfast import PurifiedClassifier, Purifier
from coupfast.data import load_images


@pytest.fixture
def defense():
    score, classifier = small_score(torch.float32), relu_classifier(torch.float32)
    return PurifiedClassifier(Purifier(score, classifier, num_steps=3), classifier, seed=1)


@pytest.fixture
def batch(defense):
    """Images, and the labels that the defense gives them: attacks leave misclassified images alone."""
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return x, defense(x, draw=0).argmax(dim=1)


def test_autoattack(defense, batch):
    attacks = pytest.importorskip("pyautoattack.autopgd_base")
    x, y = batch
    torch.manual_seed(0)
    apgd = attacks.APGDAttack(defense, n_iter=3, norm="Linf", eps=8 / 255, loss="ce", eot_iter=2, seed=0, device="cpu")
    x_adv = apgd.perturb(x, y).detach()
    assert x_adv.shape == x.shape
    assert float((x_adv - x).abs().max()) <= 8 / 255 + 1e-6
    assert defense.next_draw > 3  # every call took a fresh draw, however often the attack reseeded torch


def test_foolbox(defense, batch):
    foolbox = pytest.importorskip("foolbox")
    x, y = batch
    model = foolbox.PyTorchModel(defense, bounds=(0, 1))
    attack = foolbox.attacks.LinfPGD(steps=3)
    _, x_adv, broken = attack(model, x, y, epsilons=8 / 255)
    assert float((x_adv - x).abs().max()) <= 8 / 255 + 1e-6
    assert broken.shape == (4,)


def test_torchattacks(defense, batch):
    # Not in the extra `test`: it pins an old requests, and its wheel overwrites RobustBench. pip install --no-deps torchattacks
    torchattacks = pytest.importorskip("torchattacks", reason="pip install --no-deps torchattacks")
    x, y = batch
    x_adv = torchattacks.PGD(defense, eps=8 / 255, alpha=2 / 255, steps=3)(x, y)
    assert float((x_adv - x).abs().max()) <= 8 / 255 + 1e-6
    assert not torch.equal(x_adv, x) and defense.next_draw >= 3


def test_adversarial_robustness_toolbox(defense, batch):
    art = pytest.importorskip("art.estimators.classification", reason="needs adversarial-robustness-toolbox")
    from art.attacks.evasion import ProjectedGradientDescent

    x, y = batch
    classifier = art.PyTorchClassifier(
        defense,
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=(3, 8, 8),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    attack = ProjectedGradientDescent(classifier, eps=8 / 255, eps_step=2 / 255, max_iter=3, verbose=False)
    x_adv = torch.from_numpy(attack.generate(x.numpy(), y.numpy()))
    assert float((x_adv - x).abs().max()) <= 8 / 255 + 1e-6
    assert not torch.equal(x_adv, x) and defense.next_draw >= 3


def test_robustbench(defense, monkeypatch):
    from coupfast.models.robustbench_import import import_robustbench

    try:
        robustbench = import_robustbench()
    except ImportError as error:
        pytest.skip(f"RobustBench cannot be imported here: {error}")
    if not hasattr(robustbench, "benchmark"):
        pytest.skip("this RobustBench has its benchmark commented out, as 1.1.1 has")
    import pyautoattack
    from robustbench import data
    from robustbench.model_zoo.enums import BenchmarkDataset

    class FirstStage(pyautoattack.AutoAttack):
        """As RobustBench asks for it, but without the stages after APGD-CE, which would take most of the time."""

        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.attacks_to_run = self.attacks_to_run[:1]

    x, _ = load_images("cifar10-20")
    x = torch.nn.functional.avg_pool2d(x, 4)
    with torch.no_grad():
        y = defense(x, draw=0).argmax(dim=1)
    monkeypatch.setattr(pyautoattack, "AutoAttack", FirstStage)
    loaders = data._clean_dataset_loaders  # of RobustBench's, which download
    monkeypatch.setitem(loaders, BenchmarkDataset.cifar_10, lambda count, folder, transform: (x[:count], y[:count]))
    draws = defense.next_draw
    clean, robust = robustbench.benchmark(defense, n_examples=20, dataset="cifar10", threat_model="Linf", eps=0.9)
    assert clean > 0.5 and 0 <= robust < clean
    assert defense.next_draw > draws + 100  # APGD's iterations, each on a fresh draw
