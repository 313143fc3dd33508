"""Before any work: do images, labels, defense and attack fit each other?"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
from collections.abc import Mapping, Sequence

import torch

from coupfast.evaluation.attacks import Attack
from coupfast.evaluation.metered import Metered

logger = logging.getLogger(__name__)

_SEEDS = (1, 2)  # of looks at a defense that nobody counts
_ROUNDED = 1e-3  # how far probabilities may be from adding up to 1


@dataclasses.dataclass(frozen=True)
class Look:
    """What a defense that is no purifier of this package showed at a look.

    Attributes:
        randomized: Whether another seed gives other logits.
        repeatable: Whether the same seed gives the same ones.
    """

    randomized: bool
    repeatable: bool


def checked_images(x: torch.Tensor, y: torch.Tensor, *, paths: int | Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels, on the CPU.

    Raises:
        TypeError, ValueError: if they are no images in [0, 1] with labels.
    """
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"`{name}` is a torch.Tensor, got {type(value).__name__}; `torch.as_tensor({name})` makes one")
    x, y = x.detach().cpu(), y.detach().cpu()
    if x.dtype != torch.float32 or x.dim() != 4 or len(x) == 0:
        hint = "; of uint8 images `x.float() / 255` makes them" if x.dtype == torch.uint8 else ""
        raise ValueError(f"images are float32 of shape (n, channels, height, width), got {x.dtype} of {tuple(x.shape)}{hint}")
    low, high = float(x.min()), float(x.max())
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(f"images have values in [0, 1], got [{low:.6g}, {high:.6g}]; leave normalisation to the classifier")
    if y.dtype != torch.int64 or y.shape != x.shape[:1]:
        hint = "of one row an image `y.argmax(dim=1)` makes them" if y.dim() == 2 else "of other integers `y.long()` makes them"
        raise ValueError(
            f"labels are int64, one per image: {len(x)} images, got {y.dtype} of shape {tuple(y.shape)}; {hint}"
        )
    if not isinstance(paths, int) and paths and paths[-1] >= len(x):
        raise ValueError(f"`paths` names image {paths[-1]}, and there are {len(x)}, numbered from 0")
    digests: dict[bytes, int] = {}
    for i, image in enumerate(x.numpy()):
        first = digests.setdefault(hashlib.sha256(image.tobytes()).digest(), i)
        if y[first] != y[i]:
            raise ValueError(f"images {first} and {i} are equal, and their labels are {int(y[first])} and {int(y[i])}")
    return x, y


def check_attacks(stages: Mapping[str, Attack], x: torch.Tensor, y: torch.Tensor, classes: int) -> None:
    """ValueError if labels are none of the classes, or an attack does not fit classes or images."""
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise ValueError(f"labels are in [0, {classes}), the classes of the classifier, got [{int(y.min())}, {int(y.max())}]")
    for name, attack in stages.items():
        eps = getattr(attack, "eps", 0.0)
        if getattr(attack, "norm", "Linf") == "L2" and eps >= math.sqrt(x[0].numel()):
            raise ValueError(
                f"`eps` = {eps:g} reaches every image in [0, 1] of {x[0].numel()} values, which are at most "
                f"{math.sqrt(x[0].numel()):.4g} apart in L2"
            )
        if classes < attack.least_classes:
            raise ValueError(f"{name} needs {attack.least_classes} classes or more, and the classifier has {classes}")
    targets = max((getattr(attack, "target_classes", 0) for attack in stages.values()), default=0)
    if targets >= classes:
        raise ValueError(f"`target_classes` is at most {classes - 1} for a classifier of {classes} classes, got {targets}")


def classes_of(defense: Metered, x: torch.Tensor, device: torch.device) -> int:
    """How many classes a defense tells apart.

    Raises:
        ValueError: if what it gives are no logits; the message says what they lack.

    Logs a warning if they look like probabilities.
    """
    # Of a purifier the classifier alone: that is soon done.
    model = defense.model if defense.purified is None else defense.purified.classifier
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            logits = model(x[:1].to(device))
        except Exception as error:  # whatever somebody else's module does
            raise ValueError(
                f"the defense cannot take an image of shape {tuple(x.shape[1:])}: {type(error).__name__}: {error}"
            ) from error
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or len(logits) != 1 or logits.shape[1] < 2:
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
        raise ValueError(f"a defense gives logits of shape (batch, classes >= 2); of one image this one gives {found}")
    if not logits.is_floating_point():
        raise ValueError(f"a defense gives logits, which are floating-point numbers, and this one {logits.dtype}: predictions?")
    if bool((logits >= 0.0).all()) and abs(float(logits.sum()) - 1.0) < _ROUNDED:
        logger.warning(
            "the logits of an image are all from 0 on and add up to 1: probabilities? Losses and guidance take a softmax of "
            "logits; after another one their gradients are small, and attacks fail by that: leave the network's own out"
        )
    return logits.shape[1]


def look(defense: Metered, stages: Mapping[str, Attack], x: torch.Tensor, device: torch.device) -> Look:
    """What a module of somebody else's does with its first image.

    Raises:
        ValueError: if an attack follows a gradient that the module does not have.
    """
    image, noise = x[:1].to(device), defense.noise()
    seen = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        with torch.no_grad():
            for seed in (_SEEDS[0], *_SEEDS):
                defense.reseed(seed)
                seen.append(defense(image))
        following = [name for name, attack in stages.items() if attack.cost().gradient]
        if following:
            defense.reseed(_SEEDS[0])
            leaf = image.clone().requires_grad_()
            with torch.enable_grad():
                logits = defense(leaf)
                found = None
                if logits.requires_grad:
                    (found,) = torch.autograd.grad(logits.sum(), leaf, allow_unused=True)
            if found is None:
                raise ValueError(
                    f"{', '.join(following)} follows a gradient, and the defense's logits have none with respect to its images "
                    f"(a no_grad, a detach or a NumPy array inside of it?); attacks without one: square, salt-and-pepper"
                )
    defense.reset()
    defense.set_noise(noise)
    return Look(randomized=not torch.equal(seen[0], seen[2]), repeatable=torch.equal(seen[0], seen[1]))
