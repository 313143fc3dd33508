"""Certified robustness of denoised smoothing: an L2 radius for each image, by Monte Carlo.

    ĉ = the class of most of n₀ draws,   k = how many of n fresh draws say ĉ,   p_low = Clopper and Pearson's bound of k/n
    p_low > ½: no image within σ Φ⁻¹(p_low) changes the smoothed class (but for a share α of such statements);   else abstain

Cohen et al. 2019, arXiv:1902.02918, algorithm CERTIFY and theorem 1; Clopper and Pearson 1934; Carlini et al. 2022,
arXiv:2206.10550. Draws 0 … n₀ − 1 of the defense's noise choose the class and the next n count, so that a run that was stopped
goes on where it was, and gives what it would have given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import special
from tqdm import tqdm

from coupfast.evaluation.configuration import environment
from coupfast.evaluation.drawing import new_figure
from coupfast.evaluation.journal import Journal, digest, read_about
from coupfast.evaluation.purification import describe, settled
from coupfast.methods import DenoisedSmoothing, method_name
from coupfast.models.checkpoints import state_dict_sha256
from coupfast.options import check_integer
from coupfast.purify import PurifiedClassifier
from coupfast.trials import check_images
from coupfast.wording import counted

ABSTAINED = -1

#: Draws between two records of a journal.
DRAWS_AT_ONCE = 1000


@dataclasses.dataclass(frozen=True)
class CertifiedImage:
    """One image's certificate.

    Attributes:
        label: Its true class.
        predicted: The smoothed classifier's class; −1 where it abstains.
        votes: Draws of n that said the class that most of the first n₀ said.
        p_low: Lower bound of the probability of that class.
        radius: L2 distance of images in [0, 1] within which the class is certified to stay; 0 where it abstains.
    """

    label: int
    predicted: int
    votes: int
    p_low: float
    radius: float

    @property
    def correct(self) -> bool:
        return self.predicted == self.label


@dataclasses.dataclass(frozen=True)
class Certification:
    """What `certify` found.

    Attributes:
        sigma: Standard deviation of the noise on images in [0, 1].
        selection_draws, draws: n₀ and n.
        alpha: Share of certificates that may be wrong.
        seed: Of the noise.
        images: One certificate an image, in order.

    Example:
        >>> import torch, coupfast
        >>> purifier = coupfast.Purifier(coupfast.load_score("cifar10-tiny"), method="denoised-smoothing", sigma=0.25)
        >>> defense = coupfast.PurifiedClassifier(purifier, coupfast.load_classifier("cifar10-tiny"))
        >>> found = coupfast.certify(defense, torch.rand(2, 3, 32, 32), torch.tensor([3, 5]), draws=20, selection_draws=5)
        >>> len(found.images)
        2
    """

    sigma: float
    selection_draws: int
    draws: int
    alpha: float
    seed: int
    images: tuple[CertifiedImage, ...]

    def accuracy(self, radius: float = 0.0) -> float:
        """Certified accuracy: the share of images whose true class is certified at this L2 radius, in [0, 1]."""
        return sum(image.correct and image.radius >= radius for image in self.images) / len(self.images)

    @property
    def abstained(self) -> float:
        """Share of images without a certificate."""
        return sum(image.predicted == ABSTAINED for image in self.images) / len(self.images)

    @property
    def largest_radius(self) -> float:
        """What an image is certified with where all n draws agree."""
        return _radius(self.sigma, lower_bound(self.draws, self.draws, self.alpha))

    def curve(self) -> list[tuple[float, float]]:
        """Certified accuracy at every radius where it changes, and at 0: (radius, accuracy up to and with it), rising."""
        radii = sorted({0.0, *(image.radius for image in self.images if image.correct)})
        return [(radius, self.accuracy(radius)) for radius in radii]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, with the curve."""
        return {**dataclasses.asdict(self), "abstained": self.abstained, "curve": self.curve()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Certification:
        """What `to_dict` was made of."""
        known = {name: fields[name] for name in ("sigma", "selection_draws", "draws", "alpha", "seed")}
        return cls(**known, images=tuple(CertifiedImage(**image) for image in fields["images"]))

    def to_json(self) -> str:
        """`to_dict` as JSON, indented."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def __str__(self) -> str:
        quarters = np.arange(0.0, self.largest_radius, 0.25).tolist()
        radii = [radius for radius in quarters if radius == 0.0 or self.accuracy(radius) > 0.0]
        lines = [
            f"certified accuracy of {counted(len(self.images), 'image')}, L2 on [0, 1], "
            f"sigma {self.sigma:g}: {self.draws} draws, {self.selection_draws} to choose the class, "
            f"each certificate wrong with probability {self.alpha:g} at most",
            "  radius    " + "  ".join(f"{radius:6.2f}" for radius in radii),
            "  accuracy  " + "  ".join(f"{100 * self.accuracy(radius):5.1f}%" for radius in radii),
            f"abstained of {100 * self.abstained:.1f} %; largest radius of so many draws {self.largest_radius:.3f}",
        ]
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw certified accuracy over the radius into a file whose suffix says the format.

        Raises:
            ImportError: without matplotlib.
        """
        axes = new_figure(5.0, 3.2).add_subplot()
        radii, accuracies = zip(*self.curve(), (self.largest_radius, 0.0), strict=True)
        # What is certified at a radius is so below it: a value holds to the left of its place.
        axes.step(radii, [100.0 * accuracy for accuracy in accuracies], where="pre")
        axes.set(xlabel="L2 radius, images in [0, 1]", ylabel="certified accuracy, %", ylim=(0.0, 100.0), xlim=(0.0, None))
        axes.set_title(f"sigma = {self.sigma:g}, {self.draws} draws, alpha = {self.alpha:g}", fontsize=10)
        axes.grid(alpha=0.3)
        axes.figure.savefig(path)


def lower_bound(successes: int, trials: int, alpha: float) -> float:
    """Clopper and Pearson's one-sided lower bound of a probability, which holds with probability 1 − alpha.

    Raises:
        ValueError: if not 0 <= successes <= trials, trials > 0 and 0 < alpha < 1.
    """
    if not (0 <= successes <= trials and trials > 0):
        raise ValueError(f"a bound needs 0 <= successes <= trials and trials > 0, got {successes} of {trials}")
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"`alpha` is between 0 and 1, got {alpha}")
    return 0.0 if successes == 0 else float(special.betaincinv(successes, trials - successes + 1, alpha))


def certify(
    defense: PurifiedClassifier,
    x: torch.Tensor,
    y: torch.Tensor | Sequence[int],
    *,
    draws: int = 1000,
    selection_draws: int = 100,
    alpha: float = 0.001,
    batch: int = 100,
    ids: Sequence[int] | None = None,
    journal: str | Path | None = None,
    progress: bool = False,
) -> Certification:
    """Certify the smoothed classifier that a classifier behind denoised smoothing is.

    Args:
        defense: Its method is `DenoisedSmoothing`, whose `sigma` is the certificate's; its seed fixes all noise.
        x: Images in [0, 1], shape (batch, channels, height, width).
        y: True classes, (batch,).
        draws: n, at least 1 (100000 as published). The largest radius grows with it.
        selection_draws: n₀, at least 1 (100 as published).
        alpha: Probability that a certificate is wrong, in (0, 1) (0.001 as published).
        batch: Draws at a time.
        ids: Image ids of the noise; None means 0 … len(x) − 1. Every image has noise of its own, whatever its neighbours.
        journal: File that keeps what is counted, in which the same call goes on after it was stopped; None keeps nothing.
        progress: Show a bar.

    Returns:
        A class or an abstention for each image, with the L2 radius within which that class is certified.

    Raises:
        TypeError, ValueError: for what cannot be certified; the message says what was found.

    Example:
        >>> import torch, coupfast
        >>> purifier = coupfast.Purifier(coupfast.load_score("cifar10-tiny"), method="denoised-smoothing", sigma=0.25)
        >>> defense = coupfast.PurifiedClassifier(purifier, coupfast.load_classifier("cifar10-tiny"))
        >>> found = coupfast.certify(defense, torch.rand(1, 3, 32, 32), torch.tensor([3]), draws=20, selection_draws=5)
        >>> type(found).__name__
        'Certification'
    """
    if not isinstance(defense, PurifiedClassifier):
        raise TypeError(f"`defense` is a coupfast.PurifiedClassifier, got {type(defense).__name__}")
    method = defense.purifier.settings.method
    if not isinstance(method, DenoisedSmoothing):
        raise ValueError(
            f"a radius follows from normal noise of one sigma on the image: method 'denoised-smoothing', got "
            f"{method_name(method)!r}"
        )
    check_images(x)
    draws, selection_draws = check_integer("draws", draws, 1), check_integer("selection_draws", selection_draws, 1)
    batch = check_integer("batch", batch, 1)
    if draws + selection_draws > 2**32:
        raise ValueError(f"there are 2**32 draws of noise, got {draws} + {selection_draws}")
    lower_bound(1, 1, alpha)
    labels = torch.as_tensor(y, device="cpu")
    if tuple(labels.shape) != (len(x),) or labels.is_floating_point():
        raise ValueError(f"`y` are {len(x)} classes, one an image, got {labels.dtype} of shape {tuple(labels.shape)}")
    numbers = list(range(len(x))) if ids is None else [int(i) for i in ids]
    if len(numbers) != len(x):
        raise ValueError(f"`ids` are {len(x)} numbers, one an image, got {len(numbers)}")
    votes = _Votes(defense, batch)
    certified = []
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=len(x) * (selection_draws + draws), unit="draw", disable=not progress))
        kept = None
        if journal is not None:
            # What is left open, to be decided by the memory that is free, stays as it was decided when the counting began.
            before = (read_about(Path(journal)) or {}).get("settings")
            stack.callback(defense.purifier.settle(settled(defense.purifier, before)))
            kept = Journal(Path(journal), _about(defense, x, numbers, draws, selection_draws, batch))
            stack.callback(kept.close)
        for index, (image, number, label) in enumerate(zip(x, numbers, labels.tolist(), strict=True)):
            count = functools.partial(_counted, votes, kept, index, image, number, bar=bar)
            chosen = int(count(0, selection_draws).argmax())
            k = int(count(selection_draws, draws)[chosen])
            p_low = lower_bound(k, draws, alpha)
            sure = p_low > 0.5
            certified.append(
                CertifiedImage(
                    label=label,
                    predicted=chosen if sure else ABSTAINED,
                    votes=k,
                    p_low=p_low,
                    radius=_radius(method.sigma, p_low) if sure else 0.0,
                )
            )
    return Certification(method.sigma, selection_draws, draws, alpha, defense.seed, tuple(certified))


def _radius(sigma: float, p_low: float) -> float:
    return sigma * statistics.NormalDist().inv_cdf(p_low) if 0.5 < p_low < 1.0 else 0.0


@dataclasses.dataclass(frozen=True)
class _Votes:
    """How many draws of one image say which class."""

    defense: PurifiedClassifier
    batch: int

    def __call__(self, image: torch.Tensor, number: int, draws: range) -> Iterator[torch.Tensor]:
        for start in range(draws.start, draws.stop, self.batch):
            part = torch.arange(start, min(start + self.batch, draws.stop))
            ids = torch.full((len(part),), number, dtype=torch.int64)
            with torch.no_grad():
                logits = self.defense(image[None].expand(len(part), -1, -1, -1), ids=ids, draw=part)
            if not bool(torch.isfinite(logits).all()):
                raise FloatingPointError(f"the logits of image {number} are not finite in draws {start} to {int(part[-1])}")
            yield torch.bincount(logits.argmax(dim=1).cpu(), minlength=logits.shape[1])


def _counted(
    votes: _Votes, kept: Journal | None, index: int, image: torch.Tensor, number: int, first: int, count: int, *, bar: tqdm
) -> torch.Tensor:
    """Votes of draws first … first + count − 1 of the image at `index`, those that are known from the journal."""
    total: torch.Tensor | None = None
    for start in range(first, first + count, DRAWS_AT_ONCE):
        draws = range(start, min(start + DRAWS_AT_ONCE, first + count))
        entry = None if kept is None else kept.get(("votes", index, start))
        if entry is not None:
            part = torch.tensor(entry.said["votes"])
            bar.update(len(draws))
        else:
            part = torch.zeros((), dtype=torch.int64)
            for each in votes(image, number, draws):
                part = part + each
                bar.update(int(each.sum()))
            if kept is not None:
                kept.append(("votes", index, start), {"votes": part.tolist()})
        total = part if total is None else total + part
    assert total is not None
    return total


def _about(
    defense: PurifiedClassifier, x: torch.Tensor, ids: list[int], draws: int, selection_draws: int, batch: int
) -> dict[str, Any]:
    """All that the counts of a journal depend on."""
    return {
        "settings": describe(defense.purifier) | {"seed": defense.seed},
        "score": state_dict_sha256(defense.purifier.score),
        "classifier": state_dict_sha256(defense.classifier),
        "environment": environment(x.device),
        "images": digest(x),
        "ids": ids,
        "draws": draws,
        "selection_draws": selection_draws,
        "batch": batch,
    }
