"""A purified classifier under other people's attacks, unchanged."""

import pytest
import torch
from conftest import relu_classifier, small_score

from coupfast import PurifiedClassifier, Purifier


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
    # Not in the extra `test`: it pins an old requests. pip install --no-deps torchattacks
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


def test_robustbench(defense, batch, monkeypatch):
    from coupfast.compat import import_robustbench

    try:
        robustbench = import_robustbench()
        from robustbench import data
        from robustbench.model_zoo.enums import BenchmarkDataset
    except ImportError as error:
        pytest.skip(f"RobustBench cannot be imported here: {error}")
    if not hasattr(robustbench, "benchmark"):
        pytest.skip("this RobustBench comes without its `benchmark`")
    x, y = batch
    loaders = data._clean_dataset_loaders
    monkeypatch.setitem(loaders, BenchmarkDataset.cifar_10, lambda count, folder, transform: (x[:count], y[:count]))
    # Its attack cannot be made shorter: a radius that reaches everything ends it with the first stage.
    clean, robust = robustbench.benchmark(defense, n_examples=1, dataset="cifar10", threat_model="Linf", eps=0.9)
    assert clean in (0.0, 1.0) and robust in (0.0, 1.0)
