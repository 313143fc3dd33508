"""The gradient certificate: how far the gradient that an attack gets is from the gradient of the steps that ran.

Three measurements on a few images, none of which trusts the code under test:

* against float64 back-propagation through every step of the definition (`definition.py`) on the same noise: cosine,
  relative error, sign agreement. Its chain may be cut into runs of steps where memory is short, which changes nothing.
* against central differences of that definition's loss in float64, with the noise held fixed.
* between noise draws: how much of a gradient's power is the same in every draw (the signal that EOT averages for).
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from coupfast.definition import Definition
from coupfast.engine import ReplayedNoise
from coupfast.engine.memory import available_bytes
from coupfast.purify import PurifiedClassifier, Purifier
from coupfast_kernels.noise import standard_normal_ref

#: Root-mean-square changes of an image in [0, 1] that central differences are taken with.
DIFFERENCE_STEPS = (1e-6, 1e-8, 1e-9, 1e-10)

# Step words of the counter-based noise that no purification uses (2³² − 1 is the forward noising's).
_FUNCTIONAL_STEP = 2**32 - 2
_DIRECTION_STEP = 2**32 - 3

#: Relative errors up to which a gradient that claims to be exact is accepted. In float32 a ReLU within rounding of its kink may
#: fall on either side, which moves a gradient by up to a few percent; the wrong gradients in use are 8 to 120 % off.
BOUNDS = {"float64": 1e-7, "float32": 3e-2}


@dataclasses.dataclass(frozen=True)
class Agreement:
    """A gradient g against the float64 gradient g64, of one image or of all as one vector.

    Attributes:
        cosine: ⟨g, g64⟩ / (‖g‖ ‖g64‖).
        relative_error: ‖g − g64‖ / ‖g64‖, Euclidean.
        sign_agreement: Share of elements whose signs are equal (−1, 0 or 1), in [0, 1].
        norm, norm_float64: ‖g‖, ‖g64‖; loss per unit of an image in [0, 1].
    """

    cosine: float
    relative_error: float
    sign_agreement: float
    norm: float
    norm_float64: float


@dataclasses.dataclass(frozen=True)
class DirectionalDerivative:
    """The derivative of one image's loss along one direction, found in three ways.

    Attributes:
        image: Index in the probe.
        direction: "random 0", "random 1", …, or "sign": that of this mode's gradient (of the float64 gradient where the
            mode has none). Directions have root-mean-square 1.
        estimates: Central differences in float64, one for each of `GradientCertificate.steps`.
        difference: The estimate that agrees best with that of the next smaller step.
        uncertainty: How far those two are apart: truncation (kinks included) and rounding, found without looking at any
            gradient.
        float64: ⟨g64, direction⟩.
        mode: ⟨g, direction⟩; None where the mode has no gradient.
        scale: max(|float64|, ‖g64‖): what errors here are relative to. ‖g64‖ is the root-mean-square of ⟨g64, direction⟩
            over random directions, so a direction that happens to be orthogonal to the gradient is no large error.
    """

    image: int
    direction: str
    estimates: tuple[float, ...]
    difference: float
    uncertainty: float
    float64: float
    mode: float | None
    scale: float


@dataclasses.dataclass(frozen=True)
class SignalToNoise:
    """The power of what a gradient's draws have in common, against the power of the noise in their mean.

    Attributes:
        signal: ‖ḡ‖² − S²/m, unbiased for ‖E g‖²; negative where the draws show no common part.
        noise: S²/m, the variance of the mean of m draws, with S² = Σ ‖g_i − ḡ‖² / (m − 1).
        ratio: signal / noise, for the mean of m draws. It grows in proportion to m.
    """

    signal: float
    noise: float
    ratio: float


@dataclasses.dataclass(frozen=True)
class GradientCertificate:
    """What `check_gradient` found. Numbers that do not exist are nan (None in `to_dict` and JSON).

    Attributes:
        has_gradient: False for `gradient="none"`: then everything that needs one is None or empty.
        settings: What was certified, as `Settings.to_dict` has it.
        claims_exact: Whether this gradient is meant to be that of the steps that ran.
        num_steps, engine, dtype, device: Of the purifier, as it ran.
        loss: In words.
        labels: Labels of the cross-entropy, one per image; None for a bare purifier.
        seed, ids: Of the noise. The gradient was compared at draw 0.
        overall, images: Agreement of all images as one vector, and of each.
        forward_error: Largest difference between the defense's output (logits, or purified images) and the definition's.
        steps: Sizes of the central differences, root-mean-square change of an image in [0, 1].
        derivatives: All directional derivatives.
        draws: Draws that the signal-to-noise ratio is for (0, 1, … draws − 1).
        signal_to_noise, images_signal_to_noise: Of all images as one vector, and of each.
        predicted_bytes, memory_limit: Predicted need of the float64 back-propagation, and what it was allowed.
        steps_at_once: Steps that it went through in one piece.
        seconds: Time of the whole check.
        torch: Version.
    """

    has_gradient: bool
    settings: dict[str, Any]
    claims_exact: bool
    num_steps: int
    engine: str
    dtype: str
    device: str
    loss: str
    labels: tuple[int, ...] | None
    seed: int
    ids: tuple[int, ...]
    overall: Agreement | None
    images: tuple[Agreement, ...]
    forward_error: float
    steps: tuple[float, ...]
    derivatives: tuple[DirectionalDerivative, ...]
    draws: int
    signal_to_noise: SignalToNoise | None
    images_signal_to_noise: tuple[SignalToNoise, ...]
    predicted_bytes: int
    memory_limit: int
    steps_at_once: int
    seconds: float
    torch: str

    @property
    def verdict(self) -> str:
        """In words: "exact", "not exact", "approximate by design", "no gradient", "zero gradient" where float64 has none."""
        if self.overall is None:
            return "no gradient"
        if self.overall.norm_float64 == 0.0:
            return "zero gradient"
        if not self.claims_exact:
            return "approximate by design"
        return "exact" if self.overall.relative_error <= BOUNDS[self.dtype] else "not exact"

    @property
    def holds(self) -> bool:
        """False where a gradient that claims to be exact is not, or where there is none to follow."""
        return self.verdict not in ("not exact", "zero gradient")

    @property
    def cosine(self) -> float:
        """Overall cosine to the float64 gradient; nan where there is no gradient."""
        return self.overall.cosine if self.overall else math.nan

    @property
    def relative_error(self) -> float:
        """Overall relative error against the float64 gradient; nan where there is no gradient."""
        return self.overall.relative_error if self.overall else math.nan

    @property
    def sign_agreement(self) -> float:
        """Overall share of equal signs; nan where there is no gradient."""
        return self.overall.sign_agreement if self.overall else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values; numbers that are not finite become None."""
        return _plain(dataclasses.asdict(self) | {"verdict": self.verdict})

    def to_json(self) -> str:
        """`to_dict` as JSON, indented."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def __repr__(self) -> str:
        return (
            f"GradientCertificate({self.verdict}, cosine {self.cosine:.9f}, relative error {self.relative_error:.2e}, "
            f"{self.settings['method']['name']}, {self.num_steps} steps, engine {self.engine})"
        )

    def __str__(self) -> str:
        lines = [
            f"gradient certificate: {self.verdict}",
            f"  gradient: {_said(self.settings['gradient'])}",
            f"  method:   {_said(self.settings['method'])}; {self.num_steps} steps",
            f"  engine {self.engine}, {self.settings['engine']['precision']}, {self.dtype} on {self.device}, "
            f"torch {self.torch}",
            f"  loss: {self.loss}; {len(self.ids)} images, seed {self.seed}, draw 0",
            "",
            f"against float64 back-propagation through every step ({self.steps_at_once} at once, "
            f"{self.predicted_bytes / 2**20:.0f} MiB predicted)",
            f"  largest forward difference {self.forward_error:.2e}",
        ]
        if self.overall is None:
            lines.append(f"  gradient={self.settings['gradient']['name']!r} gives no gradient: there is nothing to compare")
        else:
            lines.append(
                f"  {'image':>7}  {'cosine':>12}  {'rel. error':>10}  {'equal signs':>11}  {'norm':>9}  {'float64':>9}"
            )
            for name, row in [*((str(i), row) for i, row in enumerate(self.images)), ("all", self.overall)]:
                lines.append(
                    f"  {name:>7}  {row.cosine:12.9f}  {row.relative_error:10.2e}  {100 * row.sign_agreement:10.3f}%  "
                    f"{row.norm:9.3g}  {row.norm_float64:9.3g}"
                )
        if self.derivatives:
            lines += ["", *self._difference_lines()]
        if self.signal_to_noise is not None:
            lines += ["", *self._signal_lines()]
        lines += ["", f"{self.seconds:.1f} s"]
        return "\n".join(lines)

    def _difference_lines(self) -> list[str]:
        rows = self.derivatives
        lines = [
            f"against central differences in float64, noise held fixed: {len(rows)} derivatives (images x directions), "
            "errors relative to the gradient",
            f"  {'':34}  {'median':>9}  {'largest':>9}",
        ]

        def line(name: str, errors: list[float]) -> str:
            return f"  {name:34}  {statistics.median(errors):9.2e}  {max(errors):9.2e}"

        for i, step in enumerate(self.steps):
            lines.append(line(f"float64 gradient, step {step:g}", [abs(r.estimates[i] - r.float64) / r.scale for r in rows]))
        lines.append(line("float64 gradient, best step", [abs(r.difference - r.float64) / r.scale for r in rows]))
        lines.append(line("the differences' own uncertainty", [r.uncertainty / r.scale for r in rows]))
        if self.has_gradient:
            lines.append(line("this gradient, best step", [abs(r.difference - (r.mode or 0.0)) / r.scale for r in rows]))
        return lines

    def _signal_lines(self) -> list[str]:
        assert self.signal_to_noise is not None
        total = self.signal_to_noise
        each = ", ".join(f"{image.ratio:.3g}" for image in self.images_signal_to_noise)
        lines = [f"signal to noise of the mean gradient over {self.draws} draws: {total.ratio:.3g} (images: {each})"]
        if total.noise == 0.0:
            lines.append("  every draw gives the same gradient: there is no noise to average")
        elif total.signal > 0.0:
            lines.append(f"  about {max(1, math.ceil(self.draws / total.ratio))} draws for a ratio of 1")
        else:
            lines.append("  no common signal shows in this many draws")
        return lines


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
    (directions + 1) · len(steps) forward passes of 2 · images in float64.
    """
    started = time.perf_counter()
    purifier, head = _parts(defense)
    steps = _check_settings(images, draws, directions, steps, memory_limit)
    if not isinstance(x, torch.Tensor) or x.dim() != 4 or len(x) == 0:
        found = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"`x` are images of shape (batch, channels, height, width), at least one, got {found}")
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
        output64, gradient64 = self.definition.gradient(x64, noise, self.losses, steps_at_once=at_once)
        self.advance()
        derivatives = self._derivatives(x64, noise, gradient, gradient64, directions, steps) if directions else ()
        total_snr, image_snr = self._signal_to_noise(gradient, draws) if draws and gradient is not None else (None, ())
        purifier = self.purifier
        return GradientCertificate(
            has_gradient=gradient is not None,
            settings=purifier.settings.to_dict(),
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
        x = self.x.detach().clone().requires_grad_()
        output = self._output(x, draw)
        gradient = None
        if output.requires_grad:
            (gradient,) = torch.autograd.grad(self.losses(output).sum(), x, allow_unused=True)
        self.advance()
        return output.detach(), None if gradient is None else gradient.double()

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
                    moved = self.definition.output(torch.cat([x64 + h * u, x64 - h * u]), noise_twice)
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

    def _signal_to_noise(self, first: torch.Tensor, draws: int) -> tuple[SignalToNoise, tuple[SignalToNoise, ...]]:
        # Welford's recurrence: m gradients are never held at once.
        mean, scatter = first.clone(), torch.zeros(len(first), dtype=torch.float64, device=first.device)
        for draw in range(1, draws):
            gradient = self._gradient(draw)[1]
            assert gradient is not None
            before = gradient - mean
            mean = mean + before / (draw + 1)
            scatter = scatter + (before * (gradient - mean)).flatten(1).sum(dim=1)
        noise = scatter / (draws - 1) / draws  # [batch]
        signal = mean.flatten(1).square().sum(dim=1) - noise
        return _ratio(signal.sum(), noise.sum()), tuple(map(_ratio, signal, noise))


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


def _said(fields: dict[str, Any]) -> str:
    """A method or gradient from its JSON: its name, and the options that are numbers or words."""
    options = ", ".join(f"{name} {value}" for name, value in fields.items() if name != "name" and not isinstance(value, dict))
    return f"{fields['name']} ({options})" if options else fields["name"]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
