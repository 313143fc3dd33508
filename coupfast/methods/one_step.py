"""Purification by one evaluation, or a few, each of which leads to an image at once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from coupfast import reference
from coupfast.methods.base import Networks, Recipe, StepState, TableMethod
from coupfast.methods.diffusion import sde_option
from coupfast.naming import is_reference, resolve
from coupfast.noise import Noise
from coupfast.options import check_flag, number_or, one_or_several, option
from coupfast.sde import NUM_LABELS, VPSDE, check_sde, check_t
from coupfast.solvers import CoefficientTable, noising, one_after_the_other

Factor = float | str | Callable[[float], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneStep(TableMethod):
    """Noise the image to time t and ask once what it was: f(x, t) = c_skip x + c_out F(x, t).

    Without factors of its own F is ε̂ and f the predicted image x̂0 = (x − σ ε̂)/α: denoising in one shot (Carlini et al. 2022,
    arXiv:2206.10550). With them it is a consistency function (Song et al. 2023, arXiv:2303.01469, eq. 5; purification: Lei et
    al. 2024, arXiv:2408.17064): the network is F, c_skip and c_out are what it was trained with. With several times the result
    is noised again to the next one (algorithm 1 there).

    Attributes:
        t: Time in (1e-5, 1], or times that fall.
        c_skip, c_out: Numbers, functions of t, or `package.module:NAME` of one; both or none.
        clip_denoised: Clip f to [-1, 1]; the gradient has the mask.
        sde: The VP-SDE whose ᾱ(t) the noising and x̂0 have.

    Raises:
        TypeError: if a field is of another type.
        ValueError: if times are out of range or do not fall, or one of `c_skip` and `c_out` is missing, not finite, or 0 for
            `c_out`.

    Example:
        >>> import coupfast
        >>> score = coupfast.load_score("cifar10-tiny")
        >>> coupfast.Purifier(score, method=coupfast.OneStep(t=0.1)).num_steps
        2
    """

    name: ClassVar[str] = "one-step"
    reference: ClassVar[str] = "Carlini et al. 2022, arXiv:2206.10550; Song et al. 2023, arXiv:2303.01469, eq. 5"

    t: float | tuple[float, ...] = option(
        0.1, help="time of the evaluation, or of each: T,T,...", parse=one_or_several(float), metavar="T"
    )
    c_skip: Factor | None = option(
        None,
        help="of a consistency function, for method one-step: a number, or package.module:NAME of a function of t",
        parse=number_or(str),
        metavar="C",
    )
    c_out: Factor | None = option(None, help="the same", parse=number_or(str), metavar="C")
    clip_denoised: bool = option(False, help="clip the predicted image to [-1, 1]")
    sde: VPSDE = sde_option(VPSDE())

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sde(self.sde)
        if isinstance(self.t, (Sequence, np.ndarray)) and not isinstance(self.t, str):
            times = tuple(check_t(t) for t in self.t)
            if not times or any(a <= b for a, b in zip(times, times[1:], strict=False)):
                raise ValueError(f"`t` is a time or several that fall, got {self.t!r}")
            object.__setattr__(self, "t", times)
        else:
            object.__setattr__(self, "t", check_t(self.t))  # type: ignore[arg-type]
        check_flag("clip_denoised", self.clip_denoised)
        if (self.c_skip is None) != (self.c_out is None):
            raise ValueError("`c_skip` and `c_out` belong together: give both, or none for the predicted image")
        for t in self.times:
            if self.factors(t)[1] == 0.0:
                raise ValueError(f"`c_out` is 0 at t = {t:g}: the network would be asked for nothing")

    @property
    def times(self) -> tuple[float, ...]:
        """Of the evaluations."""
        return self.t if isinstance(self.t, tuple) else (self.t,)

    def factors(self, t: float) -> tuple[float, float]:
        """c_skip and c_out at time t."""
        if self.c_skip is None:
            signal = math.sqrt(float(self.sde.alpha_bar(t)))
            return 1.0 / signal, -float(self.sde.sigma(t)) / signal
        return _factor("c_skip", self.c_skip, t), _factor("c_out", self.c_out, t)

    def recipe(self) -> Recipe:
        tables, zero = [], np.zeros(1)
        for t in self.times:
            skip, out = (np.array([factor]) for factor in self.factors(t))
            signal, sigma = math.sqrt(float(self.sde.alpha_bar(t))), float(self.sde.sigma(t))
            clip = {"m": skip, "n": out} if self.clip_denoised else {}
            labels = np.array([NUM_LABELS * t])
            ask = CoefficientTable(t=np.array([t, 0.0]), a=skip, b=out, c=zero, d=zero, labels=labels, **clip)
            tables += [noising(0.0, t, signal, sigma), ask]
        return Recipe(one_after_the_other(tables))

    def definition(self, state: StepState, networks: Networks, noise: Noise, steps: range) -> StepState:
        x = state[0]
        return (
            reference.one_step_ref(
                x,
                networks.score,
                lambda k: noise.z(k, x),
                steps,
                times=self.times,
                factors=None if self.c_skip is None else self.factors,
                clip=self.clip_denoised,
                sde=self.sde,
            ),
        )


def _factor(name: str, given: Any, t: float) -> float:
    if isinstance(given, str):
        if not is_reference(given):
            raise ValueError(f"`{name}` is a number, a function of t, or package.module:NAME of one, got {given!r}")
        given = resolve(given, option=name)
    value = given(t) if callable(given) else given
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)) or not math.isfinite(value):
        raise ValueError(f"`{name}` is a finite number, or a function of t that gives one, got {value!r} at t = {t:g}")
    return float(value)
