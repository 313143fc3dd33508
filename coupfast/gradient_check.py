"""The gradient certificate: how far the gradient that an attack gets is from the gradient of the steps that ran.

Three measurements on a few images, none of which trusts the code under test:

* against float64 back-propagation through every step of the definition (`definition.py`) on the same noise: cosine,
  relative error, sign agreement. Its chain may be cut into runs of steps where memory is short, which changes nothing.
* against central differences of that definition's loss in float64, with the noise held fixed.
* between noise draws: how much of a gradient's power is the same in every draw (the signal that EOT averages for).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from coupfast import tape
from coupfast.certificate import Agreement, DirectionalDerivative, GradientCertificate, SignalToNoise
from coupfast.definition import Definition
from coupfast.engine import ReplayedNoise
from coupfast.engine.memory import available_bytes
from coupfast.purify import PurifiedClassifier, Purifier
from coupfast.tape import Kept
from coupfast.trials import check_images
from coupfast_kernels.noise import standard_normal_ref

#: Root-mean-square changes of an image in [0, 1] that central differences are taken with.
DIFFERENCE_STEPS = (1e-6, 1e-8, 1e-9, 1e-10)

# Step words of the counter-based noise that no purification uses (2³² − 1 is the forward noising's).
_FUNCTIONAL_STEP = 2**32 - 2
_DIRECTION_STEP = 2**32 - 3


def check_gradient(
    defense: PurifiedClassifier | Purifier,
    x: torch.Tensor,
    y: torch.Tensor | None = None,
    *,
    images: int = 2,
    draws: int = 8,
    directions: int = 2,
    steps: Sequence[float] = DIFFERENCE_STEPS,
    seed: int | None = None,
    ids: Sequence[int] | torch.Tensor | None = None,
    memory_limit: int | None = None,
    progress: bool = False,
) -> GradientCertificate:
    """Compare the gradient that `defense` gives, in its current mode, with the gradient of the steps that ran.

    The loss of a `PurifiedClassifier` is the cross-entropy of its logits, that of a bare `Purifier` a fixed random linear
    functional of the purified image; losses are taken in float64, so that only the defense is measured. The definition that
    it is compared with is the method's own (for COUP, DiffPure and the reverse SDE `reference.purify_ref`) on float64
    copies of the networks and on the same noise, which is float32 by definition. It always differentiates the guidance:
    `guidance_gradient="detached"` is compared with the exact gradient, too. The first clip of a defense is the identity on
    images in [0, 1] and is left out of the definition, whose differences step a little beyond that range; the last clip is
    in it. The guidance of a ReLU classifier jumps where an activation changes side, and so does the loss: differences that
    straddle a jump are far off, the likelier the more steps the solver takes. So several sizes are tried, and their spread
    is part of the result.

    Args:
        defense: What to certify. Its draw counter, its `last_seed` and all gradients of weights are left as they are.
        x: Images in [0, 1], shape (batch, channels, height, width), of the networks' dtype; the first `images` are used.
        y: True labels, int64 (batch,), for a `PurifiedClassifier`; None takes the labels that it predicts in draw 0.
        images: Size of the probe, at least 1. The float64 pass holds `images` times one step's activations or more.
        draws: Noise draws of the signal-to-noise ratio, at least 2; 0 leaves it out.
        directions: Random directions of the central differences, besides the gradient's sign; 0 leaves both out.
        steps: Sizes of the differences, root-mean-square change of an image in [0, 1]; at least two, falling.
        seed: Of a bare purifier's noise (None: 0); a `PurifiedClassifier` has its own.
        ids: Image ids of the noise, shape (batch,); None means 0 … batch − 1.
        memory_limit: Bytes that the float64 back-propagation may take, float64 copies of the weights included; None is
            half of what is free. If all steps at once are too much, it takes as many at a time as fit.
        progress: Show a progress bar.

    Returns:
        The certificate; `print` it or take `to_json()`.

    Raises:
        TypeError, ValueError: for a defense or images that are none, labels that do not fit, settings out of range, networks
            that cannot compute in float64.
        MemoryError: if one step of the probe needs more than `memory_limit`; the message says how much.
        FloatingPointError: if the defense's gradient is not finite.

    Time: `draws` forward and backward passes of the defense, one of the definition in float64, and
    (directions + 1) · len(steps) forward passes of 2 · images in float64. Inside of `coupfast.tape.kept_on` each of them is
    kept when it is done, and the defense's own steps as they are taken.

    Example:
        >>> import torch, coupfast
        >>> purifier = coupfast.Purifier(coupfast.load_score("cifar10-tiny"), method="diffpure", num_steps=2)
        >>> found = coupfast.check_gradient(purifier, torch.rand(1, 3, 32, 32), images=1, draws=0, directions=0)
        >>> found.relative_error < 1e-4
        True
    """
    started = time.perf_counter()
    purifier, head = _parts(defense)
    steps = _check_settings(images, draws, directions, steps, memory_limit)
    if not isinstance(x, torch.Tensor) or x.dim() != 4 or len(x) == 0:
        found = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"`x` are images of shape (batch, channels, height, width), at least one, got {found}")
    check_images(x[:images])  # the definition has neither the clip of `out_of_range` nor images that need it
    if isinstance(defense, PurifiedClassifier):
        if seed is not None and seed != defense.seed:
            raise ValueError(f"`seed` is for a bare Purifier; this defense has its own, {defense.seed}, got {seed}")
        seed = defense.seed
    elif y is not None:
        raise ValueError("`y` are labels for a PurifiedClassifier; a bare Purifier has no logits to compare them with")
    seed = 0 if seed is None else seed
    chosen_ids = torch.arange(len(x)) if ids is None else torch.as_tensor(ids)
    if tuple(chosen_ids.shape) != (len(x),):
        raise ValueError(f"`ids` must have shape ({len(x)},), one per image, got {tuple(chosen_ids.shape)}")

    last_seed = purifier.last_seed
    try:
        # The caller's no_grad, inference mode and autocast must not reach in here.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            probe, probe_ids = x[:images].detach().clone(), chosen_ids[:images].clone()
            bar = tqdm(
                total=1 + max(draws, 1) + (directions + 1 if directions else 0) * len(steps),
                desc="certificate",
                unit="pass",
                disable=not progress,
                leave=False,
            )
            with bar:
                check = _Check(defense, purifier, head, probe, y, seed, probe_ids, lambda: bar.update(1))
                return check.run(draws, directions, steps, memory_limit, started)
    finally:
        purifier.last_seed = last_seed


class _Check:
    """One certificate in the making: a defense, a probe, and the loss that both sides share."""

    def __init__(
        self,
        defense: PurifiedClassifier | Purifier,
        purifier: Purifier,
        head: nn.Module | None,
        x: torch.Tensor,
        y: torch.Tensor | None,
        seed: int,
        ids: torch.Tensor,
        advance: Callable[[], object],
    ) -> None:
        self.defense, self.purifier, self.x, self.seed, self.ids, self.advance = defense, purifier, x, seed, ids, advance
        self.labels: torch.Tensor | None = None
        self.functional: torch.Tensor | None = None
        with torch.no_grad():
            output = self._output(x, 0)  # refuses images that do not fit before the networks are copied
        if head is not None:
            self.labels = output.argmax(dim=1) if y is None else _check_labels(y, x, output)
            self.loss_name = f"cross-entropy of the {'predicted' if y is None else 'true'} label"
        else:
            self.functional = self._normal(0, _FUNCTIONAL_STEP)
            self.loss_name = "random linear functional of the purified image"
        self.definition = Definition(purifier, head)

    def run(
        self, draws: int, directions: int, steps: tuple[float, ...], memory_limit: int | None, started: float
    ) -> GradientCertificate:
        x64 = self.x.double()
        noise = self.definition.noise(self.x, self.seed, self.ids, 0)
        limit = available_bytes(self.x.device) // 2 if memory_limit is None else memory_limit
        predicted, at_once = self.definition.fit(x64, limit)

        output, gradient = self._gradient(0)
        output64, gradient64 = _once(
            "float64 gradient", lambda: self.definition.gradient(x64, noise, self.losses, steps_at_once=at_once)
        )
        assert output64 is not None and gradient64 is not None
        self.advance()
        derivatives = self._derivatives(x64, noise, gradient, gradient64, directions, steps) if directions else ()
        total_snr: SignalToNoise | None = None
        image_snr: tuple[SignalToNoise, ...] = ()
        if draws and gradient is not None:
            total_snr, image_snr = signal_to_noise(self._gradients(gradient, draws))
        purifier = self.purifier
        return GradientCertificate(
            has_gradient=gradient is not None,
            settings=purifier.settings.describe(),
            claims_exact=purifier.settings.gradient.claims_exact,
            num_steps=purifier.num_steps,
            engine=purifier.engine,
            dtype=str(self.x.dtype).removeprefix("torch."),
            device=str(self.x.device),
            loss=self.loss_name,
            labels=None if self.labels is None else tuple(self.labels.tolist()),
            seed=self.seed,
            ids=tuple(self.ids.tolist()),
            overall=None if gradient is None else _agreement(gradient, gradient64),
            images=() if gradient is None else tuple(map(_agreement, gradient, gradient64)),
            forward_error=float((output.double() - output64).abs().max()),
            steps=steps if directions else (),
            derivatives=derivatives,
            draws=draws if gradient is not None else 0,
            signal_to_noise=total_snr,
            images_signal_to_noise=image_snr,
            predicted_bytes=predicted,
            memory_limit=limit,
            steps_at_once=at_once,
            seconds=time.perf_counter() - started,
            torch=torch.__version__,
        )

    def losses(self, output: torch.Tensor) -> torch.Tensor:
        """One loss per image (batch,), in float64, of logits or of purified images."""
        if self.labels is not None:
            return nn.functional.cross_entropy(output.double(), self.labels, reduction="none")
        assert self.functional is not None
        return (self.functional * output.double()).flatten(1).sum(dim=1)

    def _normal(self, draw: int, step: int) -> torch.Tensor:
        ids = self.ids.to(self.x.device)
        return standard_normal_ref(tuple(self.x.shape), seed=self.seed, ids=ids, draw=draw, step=step).double()

    def _output(self, x: torch.Tensor, draw: int) -> torch.Tensor:
        if isinstance(self.defense, PurifiedClassifier):
            return self.defense(x, ids=self.ids, draw=draw)
        output = self.defense(x, seed=self.seed, ids=self.ids, draw=draw)
        assert isinstance(output, torch.Tensor)
        return output

    def _gradient(self, draw: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The defense's output, and the gradient of the losses' sum in its mode, in float64; None if it has none."""

        def make() -> Kept:
            x = self.x.detach().clone().requires_grad_()
            output = self._output(x, draw)
            gradient = None
            if output.requires_grad:
                (gradient,) = torch.autograd.grad(self.losses(output).sum(), x, allow_unused=True)
            return output.detach(), None if gradient is None else gradient.double()

        output, gradient = _once(f"draw {draw}", make)
        assert output is not None
        self.advance()
        return output, gradient

    def _gradients(self, first: torch.Tensor, draws: int) -> Iterator[torch.Tensor]:
        yield first
        for draw in range(1, draws):
            gradient = self._gradient(draw)[1]
            assert gradient is not None
            yield gradient

    def _derivatives(
        self,
        x64: torch.Tensor,
        noise: ReplayedNoise,
        gradient: torch.Tensor | None,
        gradient64: torch.Tensor,
        directions: int,
        steps: tuple[float, ...],
    ) -> tuple[DirectionalDerivative, ...]:
        vectors = {f"random {i}": _unit(self._normal(i, _DIRECTION_STEP)) for i in range(directions)}
        vectors["sign"] = _unit((gradient64 if gradient is None else gradient).sign())
        rows, second = (None if part is None else torch.cat([part, part], dim=1) for part in (noise.rows, noise.second))
        assert rows is not None
        noise_twice = ReplayedNoise(rows, second)
        found = []
        for name, u in vectors.items():
            estimates = []  # [steps][batch]
            for h in steps:
                with torch.no_grad():
                    both = torch.cat([x64 + h * u, x64 - h * u])
                    (moved,) = _once(f"{name} {h!r}", lambda both=both: [self.definition.output(both, noise_twice)])  # type: ignore[misc]
                    assert moved is not None
                    above, below = (self.losses(half) for half in moved.chunk(2))
                estimates.append(((above - below) / (2.0 * h)).tolist())
                self.advance()
            for image in range(len(x64)):
                column = tuple(row[image] for row in estimates)
                apart = [abs(coarse - fine) for coarse, fine in zip(column, column[1:], strict=False)]
                best = int(np.argmin(apart))
                expected = float((gradient64[image] * u[image]).sum())
                found.append(
                    DirectionalDerivative(
                        image=image,
                        direction=name,
                        estimates=column,
                        difference=column[best],
                        uncertainty=apart[best],
                        float64=expected,
                        mode=None if gradient is None else float((gradient[image] * u[image]).sum()),
                        scale=max(abs(expected), float(gradient64[image].norm())),
                    )
                )
        return tuple(found)


def signal_to_noise(gradients: Iterable[torch.Tensor]) -> tuple[SignalToNoise, tuple[SignalToNoise, ...]]:
    """Of the mean of several draws' gradients, together and of each image; they are taken one after the other.

    Args:
        gradients: At least two, float64, (batch, …).
    """
    # Welford's recurrence: m gradients are never held at once.
    rest = iter(gradients)
    mean = next(rest).clone()
    scatter, draws = torch.zeros(len(mean), dtype=torch.float64, device=mean.device), 1
    for draws, gradient in enumerate(rest, start=2):
        before = gradient - mean
        mean = mean + before / draws
        scatter = scatter + (before * (gradient - mean)).flatten(1).sum(dim=1)
    noise = scatter / (draws - 1) / draws  # [batch]
    signal = mean.flatten(1).square().sum(dim=1) - noise
    return _ratio(signal.sum(), noise.sum()), tuple(map(_ratio, signal, noise))


def _once(name: str, make: Callable[[], Kept]) -> Kept:
    """A pass; where somebody has a tape it is not taken again after a stop."""
    on = tape.current()
    return make() if on is None else on.once(name, make)


def _parts(defense: Any) -> tuple[Purifier, nn.Module | None]:
    if isinstance(defense, PurifiedClassifier):
        return defense.purifier, defense.classifier
    if isinstance(defense, Purifier):
        return defense, None
    raise TypeError(f"`defense` is a coupfast.PurifiedClassifier or coupfast.Purifier, got {type(defense).__name__}")


def _check_settings(
    images: int, draws: int, directions: int, steps: Sequence[float], memory_limit: int | None
) -> tuple[float, ...]:
    for name, value, least in (("images", images, 1), ("draws", draws, 0), ("directions", directions, 0)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"`{name}` is an integer of at least {least}, got {value!r}")
    if draws == 1:
        raise ValueError("`draws` is at least 2, since one draw shows no variance (0 leaves the ratio out), got 1")
    if memory_limit is not None and (
        isinstance(memory_limit, bool) or not isinstance(memory_limit, (int, np.integer)) or memory_limit < 1
    ):
        raise ValueError(f"`memory_limit` is a number of bytes or None, got {memory_limit!r}")
    sizes = tuple(float(step) for step in steps)
    if len(sizes) < 2 or not all(0.0 < size <= 0.1 for size in sizes) or list(sizes) != sorted(set(sizes), reverse=True):
        raise ValueError(f"`steps` are at least two falling sizes in (0, 0.1], got {sizes}; {DIFFERENCE_STEPS} serves float64")
    return sizes


def _check_labels(y: Any, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    if not isinstance(y, torch.Tensor) or y.dim() != 1 or y.is_floating_point() or y.dtype == torch.bool or len(y) < len(x):
        found = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, torch.Tensor) else type(y).__name__
        raise ValueError(f"`y` are integer labels, one per image of `x`, got {found}")
    labels = y[: len(x)].to(device=x.device, dtype=torch.int64)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        raise ValueError(f"`y` are labels in [0, {logits.shape[1]}), the classes of this classifier, got [{low}, {high}]")
    return labels


def _agreement(g: torch.Tensor, g64: torch.Tensor) -> Agreement:
    norm, norm64 = float(g.norm()), float(g64.norm())
    product = norm * norm64
    return Agreement(
        cosine=float((g * g64).sum()) / product if product else math.nan,
        relative_error=float((g - g64).norm()) / norm64 if norm64 else math.nan,
        sign_agreement=float((g.sign() == g64.sign()).double().mean()),
        norm=norm,
        norm_float64=norm64,
    )


def _ratio(signal: torch.Tensor, noise: torch.Tensor) -> SignalToNoise:
    s, n = float(signal), float(noise)
    return SignalToNoise(signal=s, noise=n, ratio=s / n if n else math.inf if s > 0 else math.nan)


def _unit(u: torch.Tensor) -> torch.Tensor:
    """Each image's direction scaled to root-mean-square 1; zero stays zero."""
    size = u.flatten(1).square().mean(dim=1).sqrt().view(-1, 1, 1, 1)
    return u / torch.where(size > 0, size, 1.0)
