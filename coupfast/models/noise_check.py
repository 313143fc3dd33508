"""Whether a network predicts the noise of the VP-SDE at labels 999 t: a noised image of known noise tells.

    x_t = α x₀ + σ ε,      output ≈ a ε + b x₀      (least squares; images and noise less their means per channel)

    predicts                a      b      so, where a network is any good,
    noise                   1      0      b/a ≥ 0: what it takes of the image for noise has the image's sign
    v = α ε − σ x₀          α     −σ      b/a = −σ/α
    x₀                      0      1      a ≈ 0
    −ε, or −ε/σ (score)    < 0     0      a < 0

A network is refused only where it plainly is a good predictor of something else, never for being a poor one of the noise: of
random networks ε and x₀ explain less than a tenth of the output (`EXPLAINED` asks for half), and a network that passes its
input on has b/a = α/σ, which is none of these. Two of the times must agree. Measured on pairs of the 20 images of foolbox with
the shipped network, which knows t up to 0.2: ε and x₀ explain 0.87 to 0.96 of its output there and 0.88 at t = 0.3, and b/a is
0.02 to 1.3 times σ/α; turned into a v-network it has −0.24 to −0.87 at t = 0.2 and −0.48 to −0.66 at 0.3, so that the border
between them is at `V_SHARE`.

On images that are noise themselves a network of either kind takes all of x_t for noise, and b/a is α/σ for both: nothing can be
told, however good it is. There, and on blank images, the check looks at a picture of its own, smooth shades and a disc, which
every network of natural images tells from noise: the shipped one has b/a of 0.05 to 0.25 times σ/α there, and as a v-network
−0.59 to −0.86.

An adapter that was told the wrong prediction (`adapters.NoiseFrom`) says which others there are. Behind one of them the network
is a good predictor of the noise, with less than `ADAPTER_WARNING` times the error of ours: the shipped network has 0.46 to 0.72
times the error that it has as a v-network, and made into one 0.34 to 0.58 times that without an adapter (five pairs of images,
and the picture).

A network that predicts the noise at other labels has its smallest error there: other scales of the labels are tried, and the
error must fall by the factor `LABEL_WARNING` to be mentioned, by `LABEL_REFUSAL` to be refused, and be small where it falls to.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from coupfast.sde import NUM_LABELS, VPSDE

#: Within what purifications use.
SMALL_TIMES = (0.1, 0.2)
#: And one at which v and noise differ more.
TIMES = (*SMALL_TIMES, 0.3)
#: b/a of a v-network is at most −`V_SHARE` σ/α, two standard errors apart; −σ/α if it is perfect.
V_SHARE = 0.2
#: Share of the output that ε and x₀ must explain for it to be judged.
EXPLAINED = 0.5
#: Images less contrasted than this (root mean square on [-1, 1], means taken off) tell nothing of b.
CONTRAST = 0.05
#: Where b/a is within this share of α/σ at two times, the network takes the images for noise (or passes on what it gets).
NOISE_SHARE = 0.25
#: Errors at other labels, as shares of that at 999 t.
LABEL_WARNING, LABEL_REFUSAL = 0.6, 1 / 3
#: The first of other adapters: who has one says that the network is of one of these few kinds.
ADAPTER_WARNING = 0.8
#: Mean squared errors of the noise: below the first a network serves, whatever its labels; above the second it tells nothing.
GOOD_ERROR, WEAK_ERROR = 0.08, 0.25

_IMAGES = 2
_NOTHING = "nothing"
_WHAT = {
    "v_prediction": "v = α ε − σ x₀",
    "sample": "the image x₀",
    "score": "the noise with the other sign (a score, −ε/σ)",
}


def check_noise_prediction(score: nn.Module, x: Tensor, *, sde: VPSDE | None = None) -> None:
    """Raise or warn where a score network is plainly no predictor of the VP-SDE's noise at labels 999 t.

    Silent for networks that predict it, for random ones, and for ones too weak to tell.

    Args:
        score: (x_t, labels) → eps_hat, in eval mode.
        x: Images in [0, 1], (batch, channels, height, width), in the dtype and on the device of the network, of the kind that
            it was trained on; the first two are used. In the place of images of noise, which tell nothing, and of blank ones
            the check takes a picture of its own.
        sde: The schedule; None is the published one.

    Raises:
        ValueError: if it predicts v, x₀ or −ε, or the noise at labels of another scale; the message says what, how that was
            told, and what to do.
        TypeError: if it takes whole labels only.

    Warns:
        UserWarning: if other labels give a smaller error by far (a cosine schedule), or fractions of labels are cut off.

    Cost: three calls of two images and three of one; three more of two for images of noise, four or six more for an adapter,
    ten more for a network whose error is not small. torch's generators are not used.
    """
    sde = sde or VPSDE()
    x0 = 2.0 * x[:_IMAGES].detach() - 1.0
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(x0)
    with torch.no_grad():
        seen = _look(score, x0, noise, sde)
        if seen is not None and seen.blind:
            x0 = _picture(x0)
            seen = _look(score, x0, noise, sde)
        if seen is None:
            return  # the purifier says what is wrong with that
        votes, errors = seen.votes, seen.errors
        for other, count in votes.items():
            if count >= 2:
                raise ValueError(_message(other))
        at_ours = sum(errors[t] for t in SMALL_TIMES) / len(SMALL_TIMES)
        _check_adapter(score, x0, noise, sde, at_ours)  # whatever the error: at small times v and noise differ little
        if at_ours > GOOD_ERROR:
            _check_labels(score, x0, noise, sde, at_ours)
        if not getattr(score, "whole_labels", False):
            _check_fractions(score, x0[:1], noise[:1], sde)


class _Seen(NamedTuple):
    """What a network showed: at how many times it predicts something else, its errors, whether the images told nothing."""

    votes: dict[str, int]
    errors: dict[float, float]
    blind: bool


def _look(score: nn.Module, x0: Tensor, noise: Tensor, sde: VPSDE) -> _Seen | None:
    votes: dict[str, int] = {}
    errors, blind = {}, 0
    for t in TIMES:
        output = _call(score, _noised(sde, t, x0, noise), NUM_LABELS * t)
        if output.shape != x0.shape or not bool(torch.isfinite(output).all()):
            return None
        errors[t] = _error(output, noise)
        other = _told(output, noise, x0, sde, t)
        if other == _NOTHING:
            blind += 1
        elif other is not None:
            votes[other] = votes.get(other, 0) + 1
    return _Seen(votes, errors, blind >= 2)


def _picture(like: Tensor) -> Tensor:
    """Smooth shades and a disc, another one for each image, in [-1, 1]: what no network of images takes for noise."""
    batch, channels, height, width = like.shape
    rows, columns = ((torch.arange(size, dtype=torch.float64) + 0.5) / size for size in (height, width))
    rows, columns = rows[:, None], columns[None, :]
    images = []
    for i in range(batch):
        disc = ((rows - 0.45 - 0.1 * i).square() + (columns - 0.5 + 0.1 * i).square() < 0.09).double()
        for c in range(channels):
            tint = c / max(channels, 2)
            images.append(0.1 + (0.6 - 0.2 * tint) * disc + 0.2 * (rows * (1.0 - tint) + columns * tint))
    return (2.0 * torch.stack(images).view(batch, channels, height, width) - 1.0).to(like)


def _noised(sde: VPSDE, t: float, x0: Tensor, noise: Tensor) -> Tensor:
    return math.sqrt(float(sde.alpha_bar(t))) * x0 + float(sde.sigma(t)) * noise


def _call(score: nn.Module, x_t: Tensor, label: float) -> Tensor:
    labels = _labels(x_t, label)
    try:
        return score(x_t, labels)
    except (RuntimeError, TypeError, IndexError) as error:
        try:
            score(x_t, labels.round().long())
        except (RuntimeError, TypeError, ValueError, IndexError):  # whole labels are not what it lacks
            raise error from None
        raise TypeError(
            f"the score network takes whole labels only ({' '.join(str(error).split())[:200]}); load_score(network, "
            "whole_labels=True) rounds 999 t to them"
        ) from error


def _error(output: Tensor, noise: Tensor) -> float:
    return float((output - noise).double().square().mean())


def _told(output: Tensor, noise: Tensor, x0: Tensor, sde: VPSDE, t: float) -> str | None:
    """What the output is plainly a prediction of, if it is not the noise; None for the noise, `_NOTHING` where images tell
    nothing."""
    columns = torch.stack([_varying(noise), _varying(x0)], dim=1)
    y = _varying(output)
    contrast = float(columns[:, 1].square().mean().sqrt())
    if contrast < CONTRAST:
        return _NOTHING
    if not bool(y.abs().max() > 0):
        return None
    fit = torch.linalg.lstsq(columns, y[:, None]).solution[:, 0]
    left = float((y - columns @ fit).square().sum())
    explained = 1.0 - left / float(y.square().sum())
    if explained < EXPLAINED:
        return None
    a, b = fit.tolist()
    alpha, sigma = math.sqrt(float(sde.alpha_bar(t))), float(sde.sigma(t))
    if abs(b * sigma - a * alpha) < NOISE_SHARE * abs(a) * alpha:
        return _NOTHING
    image = abs(b) * contrast  # beside |a|, as ε has unit variance
    if a < 0 and image < 0.5 * -a:
        return "score"
    uncertain = 2.0 * math.sqrt(left) / (contrast * len(y))
    if a > 0 and b + uncertain < -V_SHARE * a * sigma / alpha:
        return "v_prediction"
    if b > 0.3 and abs(a) < 0.35 * image:
        return "sample"
    return None


def _varying(images: Tensor) -> Tensor:
    # Constant parts are what a network gets wrong first on images unlike its own; they tell nothing.
    return (images - images.mean(dim=(2, 3), keepdim=True)).double().cpu().flatten()


def _message(other: str) -> str:
    advice = "multiply its output by −1 (and a score by σ) in a module around it"
    if other in ("v_prediction", "sample"):
        advice = f"load_score(network, prediction={other!r}) makes the noise of it"
    return (
        f"the score network does not predict the noise, but {_WHAT[other]}: of noised images of known noise its output has "
        f"those shares; {advice}"
    )


def _check_adapter(score: nn.Module, x0: Tensor, noise: Tensor, sde: VPSDE, at_ours: float) -> None:
    """Whether the network behind an adapter predicts the noise well if it is taken for something else."""
    alternatives: Callable[[], list[tuple[str, nn.Module]]] = getattr(score, "alternatives", list)
    best, words = math.inf, ""
    for said, other in alternatives():
        try:
            error = _error_at(other, x0, noise, sde, lambda t: NUM_LABELS * t)
        except (RuntimeError, TypeError, ValueError, IndexError):  # it is not of that kind, then
            continue
        if error < best:
            best, words = error, said
    _say_if_better(
        best,
        at_ours,
        f"the score network may be adapted as if it predicted something else than it does: with {words} its mean squared error "
        f"on noised images is {best:.3g}, and {at_ours:.3g} as it is; load_score(network, {words}) takes it so",
        ADAPTER_WARNING,
    )


def _check_labels(score: nn.Module, x0: Tensor, noise: Tensor, sde: VPSDE, at_ours: float) -> None:
    """Whether the noise is predicted better at labels that mean the same times in other conventions."""
    conventions = {
        "t in [0, 1]": lambda t: t,
        "999 (1 − t), time reversed": lambda t: NUM_LABELS * (1.0 - t),
        "the steps of a schedule of 100": lambda t: 99.0 * t,
        "the steps of a schedule of 4000": lambda t: 3999.0 * t,
        "the steps of the cosine schedule": lambda t: NUM_LABELS * _cosine_time(float(sde.alpha_bar(t))),
    }
    best, name = math.inf, ""
    for convention, label in conventions.items():
        try:
            error = _error_at(score, x0, noise, sde, label)
        except Exception:  # a table of steps may end before such a label
            continue
        if error < best:
            best, name = error, convention
    _say_if_better(
        best,
        at_ours,
        f"the score network predicts the noise better at other labels than 999 t: its mean squared error on noised images is "
        f"{at_ours:.3g} there and {best:.3g} at {name}; if it was trained on those, translate the labels in a module around it",
    )


def _error_at(score: nn.Module, x0: Tensor, noise: Tensor, sde: VPSDE, label: Callable[[float], float]) -> float:
    """The mean error at small times, which the network is told by such labels."""
    found = [_error(score(_noised(sde, t, x0, noise), _labels(x0, label(t))), noise) for t in SMALL_TIMES]
    return sum(found) / len(found)


def _say_if_better(best: float, at_ours: float, text: str, share: float = LABEL_WARNING) -> None:
    """Raise or warn where an error of another convention is small, and below that share of ours."""
    if not best < min(WEAK_ERROR, share * at_ours):
        return
    if best < LABEL_REFUSAL * at_ours:
        raise ValueError(text)
    warnings.warn(text, UserWarning, stacklevel=4)


def _labels(x0: Tensor, label: float) -> Tensor:
    return torch.full((len(x0),), label, dtype=x0.dtype, device=x0.device)


def _cosine_time(alpha_bar: float) -> float:
    """t where cos²(π/2 (t + 0.008)/1.008) is that ᾱ: the cosine schedule of Nichol and Dhariwal 2021, arXiv:2102.09672."""
    return math.acos(math.sqrt(alpha_bar)) * 2.0 / math.pi * 1.008 - 0.008


def _check_fractions(score: nn.Module, x0: Tensor, noise: Tensor, sde: VPSDE) -> None:
    x_t = _noised(sde, 0.1, x0, noise)
    below, between, above = (score(x_t, _labels(x0, label)) for label in (99.0, 99.9, 100.0))
    if torch.equal(below, above):
        return  # a network that does not look at its labels
    if torch.equal(between, below) or torch.equal(between, above):
        how = "cuts off" if torch.equal(between, below) else "rounds"
        advice = "; load_score(network, whole_labels=True) gives it the nearest step" if how == "cuts off" else ""
        warnings.warn(
            f"the score network {how} fractions of labels (99.9 is to it {'99' if how == 'cuts off' else '100'}): its times "
            f"are off by up to {'1' if how == 'cuts off' else '0.5'}/999{advice}",
            UserWarning,
            stacklevel=3,
        )
