"""What a gradient certificate says: numbers, a verdict, text and JSON. `coupfast.gradient_check` finds them."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from typing import Any

from coupfast.wording import counted

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
        settings: What was certified, as `Settings.describe` has it.
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

    Example:
        >>> import torch, coupfast
        >>> score, classifier = coupfast.load_score("cifar10-tiny"), coupfast.load_classifier("cifar10-tiny")
        >>> defense = coupfast.PurifiedClassifier(coupfast.Purifier(score, classifier, num_steps=2), classifier)
        >>> found = coupfast.check_gradient(defense, torch.rand(1, 3, 32, 32), images=1, draws=0, directions=0)
        >>> found.verdict, found.holds
        ('exact', True)
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
            f"{self.settings['method']['name']}, {counted(self.num_steps, 'step')}, engine {self.engine})"
        )

    def __str__(self) -> str:
        lines = [
            f"gradient certificate: {self.verdict}",
            f"  gradient: {_said(self.settings['gradient'])}",
            f"  method:   {_said(self.settings['method'])}; {counted(self.num_steps, 'step')}",
            f"  engine {self.engine}, {self.settings['engine']['precision']}, {self.dtype} on {self.device}, "
            f"torch {self.torch}",
            f"  loss: {self.loss}; {counted(len(self.ids), 'image')}, seed {self.seed}, draw 0",
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
            f"against central differences in float64, noise held fixed: {counted(len(rows), 'derivative')} (images x "
            "directions), errors relative to the gradient",
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
            lines.append(f"  about {counted(max(1, math.ceil(self.draws / total.ratio)), 'draw')} for a ratio of 1")
        else:
            lines.append("  no common signal shows in this many draws")
        return lines


def _said(fields: dict[str, Any]) -> str:
    """A method or gradient from its JSON: its name, and the options that are numbers or words."""
    plain = {name: _said(value) if isinstance(value, dict) and "name" in value else value for name, value in fields.items()}
    options = ", ".join(f"{name} {value}" for name, value in plain.items() if name != "name" and not isinstance(value, dict))
    return f"{fields['name']} ({options})" if options else fields["name"]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
