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
