"""Defenses and images small enough to attack many times, for the tests of the evaluation."""

import functools
import os
import signal

import torch
from conftest import small_score
from torch import nn

from coupfast import PurifiedClassifier, Purifier
from coupfast.evaluation import Spec, evaluate


def pixel_classifier():
    """A random network on 3 x 8 x 8 images that looks at single pixels: its margins are a few of 255."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    network[3].weight.data *= 8.0
    return network.eval()


def plain(device):
    return pixel_classifier().to(device)


def purified(device, gradient="exact"):
    classifier = pixel_classifier()
    # A short time: the random score network knows nothing of images, and most are still to be classified correctly.
    options = {"t": 0.003, "num_steps": 2, "gradient": gradient, "engine": "eager"}  # nothing to compile in every worker
    purifier = Purifier(small_score(torch.float32), classifier, **options)
    return PurifiedClassifier(purifier, classifier)


def dies_once(flag, device):
    """The purified defense, but that the first process to come to a gradient leaves the file `flag` and is killed there."""

    def strike(*_):
        if torch.is_grad_enabled():
            try:
                flag.touch(exist_ok=False)
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)

    defense = purified(device)
    defense.register_forward_pre_hook(strike)
    return defense


purified_bpda = functools.partial(purified, gradient="bpda")


def labelled(count, *, wrong=()):
    """Random 8 x 8 images with the labels that the plain classifier gives them, except for those that are to be wrong."""
    x = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = pixel_classifier()(x).argmax(dim=1)
    y[list(wrong)] = (y[list(wrong)] + 1) % 10
    return x, y


SMALL = Spec.of(attack="autoattack-rand", iterations=3, eot_iter=2, shard=2, draws=3, paths=1, eps=0.5 / 255, seed=121)


def run(folder, spec=SMALL, build=purified, count=5, **options):
    """The ledger of a run to its end."""
    return evaluate(spec, *labelled(count, wrong=[1]), defense=build, out=folder, **options).ledger
