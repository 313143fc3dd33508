"""Nothing half old is computed: whatever was changed in a network is seen, or refused between a pass and its backward pass."""

import copy

import pytest
import torch
from conftest import relu_classifier, small_score
from torch import nn

from coupfast import PurifiedClassifier, Purifier
from coupfast.fingerprint import fingerprint, weights_fingerprint

X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def scaled(network):
    for parameter in network.parameters():
        parameter.data.mul_(1.2)  # which no version counter counts


def exchanged(network):
    weight = network.conv.weight.data
    weight.copy_(weight.flip(0))


def one_weight(network):
    network.linear.bias.data[3] += 1e-3


def buffer(network):
    network.bn1.running_mean.data.add_(0.1)


def hook(network):
    network.linear.register_forward_hook(lambda module, inputs, output: 3 * output)


def hook_on_the_whole(network):
    network.register_forward_pre_hook(lambda module, inputs: (0.9 * inputs[0],))


class Tempered(nn.Module):
    """A network with settings that are no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = relu_classifier(torch.float32)
        self.temperature, self.shift, self.window = 1.0, torch.zeros(10), (0.0, 1.0)

    def forward(self, x):
        return self.inner(x.clamp(*self.window)) / self.temperature + self.shift


def number(network):
    network.temperature = 100


def tensor(network):
    network.shift[3] = 5.0


def pair(network):
    network.window = (0.2, 0.8)


CHANGES = [
    *((relu_classifier, change) for change in (scaled, exchanged, one_weight, buffer, hook, hook_on_the_whole)),
    *((Tempered, change) for change in (number, tensor, pair)),
]


@pytest.mark.parametrize(("make", "change"), CHANGES, ids=[change.__name__ for _, change in CHANGES])
@pytest.mark.parametrize("engine", ["eager", "cpu"])
def test_what_changed_is_seen(make, change, engine):
    classifier, score = make().float().eval(), small_score(torch.float32)
    defense = PurifiedClassifier(Purifier(score, classifier, num_steps=2, engine=engine), classifier, seed=1)
    before = defense(X, draw=0)
    change(classifier)
    fresh = PurifiedClassifier(Purifier(score, classifier, num_steps=2, engine=engine), classifier, seed=1)(X, draw=0)
    torch.testing.assert_close(defense(X, draw=0), fresh, rtol=0, atol=0)
    assert not torch.equal(before, fresh)


@pytest.mark.parametrize("engine", ["eager", "cpu"])
def test_weights_that_change_before_the_backward_pass_are_refused(engine):
    score = small_score(torch.float32)
    x = X.clone().requires_grad_()
    purified = Purifier(score, method="reverse-sde", num_steps=2, engine=engine)(x, seed=0)
    scaled(score)
    with pytest.raises(RuntimeError, match="changed between a purification and its backward pass"):
        purified.sum().backward()
    assert x.grad is None


def test_weights_of_the_classifier_behind_it_too():
    classifier, x = relu_classifier(torch.float32), X.clone().requires_grad_()
    purifier = Purifier(small_score(torch.float32), method="reverse-sde", num_steps=2)
    logits = PurifiedClassifier(purifier, classifier)(x, draw=0)
    scaled(classifier)
    with pytest.raises(RuntimeError, match="changed between a purification and its backward pass"):
        logits.sum().backward()


def test_equal_networks_elsewhere_have_equal_bits():
    network = relu_classifier(torch.float32)
    other = copy.deepcopy(network)
    assert weights_fingerprint(network) == weights_fingerprint(other)
    assert fingerprint(network) != fingerprint(other)  # programs point into memory
    assert fingerprint(network) == fingerprint(network)
    bias = other.linear.bias.data
    bias[3] = torch.nextafter(bias[3], torch.tensor(1e9))
    assert weights_fingerprint(network) != weights_fingerprint(other)


def test_a_step_of_training_is_seen():
    """A version counter would do here: parameters that are written in place, as optimizers do."""
    score = small_score(torch.float32)
    purifier = Purifier(score, method="reverse-sde", num_steps=2)
    before = purifier(X, seed=0)
    with torch.no_grad():
        score.all_modules[2].weight.add_(0.01)
    fresh = Purifier(score, method="reverse-sde", num_steps=2)(X, seed=0)
    torch.testing.assert_close(purifier(X, seed=0), fresh, rtol=0, atol=0)
    assert not torch.equal(before, fresh)


@pytest.mark.parametrize("mode", ["adjoint", "adjoint-parameters"])
def test_weights_that_change_before_an_adjoints_backward_pass_are_refused(mode):
    score, x = small_score(torch.float32), X.clone().requires_grad_()
    purified = Purifier(score, method="reverse-sde", num_steps=2, gradient=mode)(x, seed=0)
    scaled(score)
    with pytest.raises(RuntimeError, match="changed between a purification and its backward pass"):
        purified.sum().backward()


def test_weights_that_change_before_their_own_gradient_are_refused():
    classifier = relu_classifier(torch.float32).requires_grad_(True)
    purifier = Purifier(small_score(torch.float32), method="reverse-sde", num_steps=2)
    logits = PurifiedClassifier(purifier, classifier)(X, draw=0)
    scaled(classifier)
    with pytest.raises(RuntimeError, match="changed between a purification and its backward pass"):
        logits.sum().backward()
