"""The variance-preserving SDE and the time grid of a purification.

    β(t) = β_min + t (β_max − β_min)
    ᾱ(t) = exp(−½ (β_max − β_min) t² − β_min t),     σ(t) = sqrt(1 − ᾱ(t))

Song et al. 2021, arXiv:2011.13456, eqs. 11 and 32-33. Everything here is float64 on the
host: a grid is computed once, before a run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

T_END = 1e-5  # where the reference stops integrating
DT_REFERENCE = 1e-3  # torchsde's default step, which DiffPure and COUP leave as it is
NUM_LABELS = 999.0  # networks are trained on labels 999 t


@dataclasses.dataclass(frozen=True)
class VPSDE:
    """Variance-preserving SDE with a linear β schedule on t in [0, 1].

    Args:
        beta_min: β(0), at least 0.
        beta_max: β(1), at least `beta_min`.

    Raises:
        ValueError: if the schedule is not 0 <= beta_min <= beta_max with beta_max > 0.

    Example:
        >>> import coupfast
        >>> sde = coupfast.VPSDE(beta_min=0.1, beta_max=20.0)
        >>> round(float(sde.beta(0.1)), 2), round(float(sde.sigma(0.1)), 3)
        (2.09, 0.322)
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not (0.0 <= self.beta_min <= self.beta_max and 0.0 < self.beta_max < math.inf):
            raise ValueError(
                f"a VP-SDE needs 0 <= beta_min <= beta_max and beta_max > 0, got beta_min={self.beta_min}, "
                f"beta_max={self.beta_max}; the published schedule is 0.1, 20"
            )

    def beta(self, t: np.ndarray | float) -> np.ndarray:
        """β(t), for t in [0, 1]; float64."""
        return self.beta_min + np.asarray(t, dtype=np.float64) * (self.beta_max - self.beta_min)

    def log_alpha_bar(self, t: np.ndarray | float) -> np.ndarray:
        """log ᾱ(t), for t in [0, 1]; float64."""
        t = np.asarray(t, dtype=np.float64)
        return -0.5 * (self.beta_max - self.beta_min) * t**2 - self.beta_min * t

    def alpha_bar(self, t: np.ndarray | float) -> np.ndarray:
        """ᾱ(t), the squared signal rate; float64."""
        return np.exp(self.log_alpha_bar(t))

    def sigma(self, t: np.ndarray | float) -> np.ndarray:
        """σ(t) = sqrt(1 − ᾱ(t)), the noise rate; float64."""
        # expm1: at t = 1e-5, 1 − ᾱ is 1e-6 and a plain difference would lose six digits.
        return np.sqrt(-np.expm1(self.log_alpha_bar(t)))

    def time_of(self, noise: float) -> float:
        """The time t at which σ(t)/sqrt ᾱ(t) is `noise`: where x_0 + noise ε, times sqrt ᾱ(t), is a state of the SDE.

        Args:
            noise: Standard deviation on the [-1, 1] scale, at least 0.

        Returns:
            t, above 1 where the schedule never gets so noisy.
        """
        spread = self.beta_max - self.beta_min
        exponent = math.log1p(noise * noise)  # −log ᾱ(t)
        # The root of ½ spread t² + beta_min t = exponent, in the form that has no difference and needs no spread > 0.
        return 2.0 * exponent / max(self.beta_min + math.sqrt(self.beta_min**2 + 2.0 * spread * exponent), 1e-300)

    def discrete_alpha_bar(self, t: float) -> float:
        """ᾱ of the 1000-step discrete chain, Π (1 − β_i/1000), as DiffPure's forward noising uses it.

        Exact at multiples of 1e-3 (0.897018 at t = 0.1); log-linear in between, so that any t is served.
        """
        return float(np.exp(_chain_log_alpha_bar(self, t)))


@dataclasses.dataclass(frozen=True)
class DiscreteVPSDE(VPSDE):
    """The chain of 1000 steps that DDPMs are trained on, read as times: β_i = (0.1 … 20)/1000, Ho's 1e-4 … 0.02.

    ᾱ(t) is the chain's after 1000 t steps, log-linear in between: the state of a DDPM's index i is that of t = (i + 1)/1000.
    """

    def log_alpha_bar(self, t: np.ndarray | float) -> np.ndarray:
        return _chain_log_alpha_bar(self, t)


def _chain_log_alpha_bar(sde: VPSDE, t: np.ndarray | float) -> np.ndarray:
    """log Π (1 − β_i/1000) of the first 1000 t steps of the discrete chain, linear in between; float64."""
    beta_i = np.linspace(sde.beta_min / 1000, sde.beta_max / 1000, 1000, dtype=np.float64)
    log_alpha_bar = np.concatenate([[0.0], np.cumsum(np.log1p(-beta_i))])
    return np.interp(1000.0 * np.asarray(t, dtype=np.float64), np.arange(1001.0), log_alpha_bar)


def check_sde(sde: object) -> None:
    """TypeError if `sde` is no VP-SDE."""
    if not isinstance(sde, VPSDE):
        raise TypeError(f"`sde` is a coupfast.VPSDE, got {type(sde).__name__}")


GRIDS = ("time", "log-snr", "quadratic")


def check_t(t: float, name: str = "t") -> float:
    """`t` as a float, or ValueError if it is not in (1e-5, 1]; `name` is what the message calls it."""
    if isinstance(t, bool) or not isinstance(t, (int, float, np.floating, np.integer)):
        raise TypeError(f"`{name}` is a number, got {type(t).__name__}")
    if not (T_END < t <= 1.0):
        raise ValueError(f"`{name}` is continuous time in (1e-5, 1], got {t}; step 100 of 1000 is {name}=0.1")
    return float(t)


def check_times(t: Iterable[float]) -> tuple[float, ...]:
    """A grid as floats, or ValueError if it is not falling within (0, 1], two times or more."""
    times = tuple(float(value) for value in t)
    if len(times) < 2 or not all(math.isfinite(value) for value in times):
        raise ValueError(f"a grid `t` has two finite times or more, got {times}")
    if not (times[0] <= 1.0 and times[-1] > 0.0 and all(a > b for a, b in zip(times, times[1:], strict=False))):
        shown = ", ".join(f"{value:g}" for value in times[:6]) + (", …" if len(times) > 6 else "")
        raise ValueError(f"a grid `t` falls from at most 1 to above 0, where the network has no label; got {shown}")
    return times


def check_num_steps(num_steps: int | None) -> int | None:
    """`num_steps` as an int or None, or ValueError if it is below 1."""
    if num_steps is None:
        return None
    if isinstance(num_steps, bool) or not isinstance(num_steps, (int, np.integer)):
        raise TypeError(f"`num_steps` is an int or None (the reference grid), got {num_steps!r}")
    if num_steps < 1:
        raise ValueError(f"`num_steps` must be at least 1, got {num_steps}; None is the reference grid")
    return int(num_steps)


def time_grid(t: float, num_steps: int | None = None, *, grid: str = "time", sde: VPSDE | None = None) -> np.ndarray:
    """The times t_0 = t > t_1 > … > t_K = 1e-5 at which states live; float64, shape (K + 1,).

    Args:
        t: Purification time t*, in (1e-5, 1].
        num_steps: K steps; None is the reference grid: steps of 1e-3, the last one shorter (100 steps at t = 0.1), and as many
            where `grid` says otherwise.
        grid: What is divided equally: "time"; "log-snr", λ = log(sqrt ᾱ / σ) (Lu et al. 2022, arXiv:2206.00927); or
            "quadratic", the square root of time (Song et al. 2021, arXiv:2010.02502).
        sde: Whose λ; None is the published one.
    """
    t, num_steps = check_t(t), check_num_steps(num_steps)
    if grid != "time":
        steps = len(time_grid(t)) - 1 if num_steps is None else num_steps
        if grid == "quadratic":
            times = np.linspace(math.sqrt(t), math.sqrt(T_END), steps + 1, dtype=np.float64) ** 2
        elif grid == "log-snr":
            times = _at_equal_log_snr(sde or VPSDE(), t, steps)
        else:
            raise ValueError(f"`grid` is one of {', '.join(map(repr, GRIDS))}, got {grid!r}")
        times[0], times[-1] = t, T_END
        return times
    if num_steps is not None:
        return np.linspace(t, T_END, num_steps + 1, dtype=np.float64)
    # A whole number of steps plus rounding is that number: 1e-9 of a step is not a step.
    count = max(1, math.ceil((t - T_END) / DT_REFERENCE - 1e-9))
    return np.append(t - DT_REFERENCE * np.arange(count, dtype=np.float64), T_END)


def _at_equal_log_snr(sde: VPSDE, t: float, steps: int) -> np.ndarray:
    """Times of equal steps of λ between t and 1e-5, found by bisection: any schedule's λ falls with time."""
    log_alpha_bar = sde.log_alpha_bar(np.array([t, T_END]))
    # λ = ½ log(ᾱ / (1 − ᾱ))
    ends = 0.5 * (log_alpha_bar - np.log(-np.expm1(log_alpha_bar)))
    wanted = -np.logaddexp(0.0, -2.0 * np.linspace(ends[0], ends[1], steps + 1))  # log ᾱ
    low, high = np.zeros(steps + 1), np.full(steps + 1, t)
    for _ in range(60):
        middle = 0.5 * (low + high)
        late = sde.log_alpha_bar(middle) < wanted
        low, high = np.where(late, low, middle), np.where(late, middle, high)
    return 0.5 * (low + high)


def parity_grid(t: float) -> np.ndarray:
    """The reference grid as published: s = 1 − t accumulated in float32, returned as t in float64, shape (K + 1,).

    For comparisons with the published code only: float32 accumulation moves the grid by up to about 1e-6 at t = 0.1 and 1e-5
    at t = 1. The number of steps is that of `time_grid(t)` at every t = n/1000; float32 may add one, a short last one, where
    t is above such a time by no more than 1e-5.
    """
    check_t(t)
    start, end, dt = np.float32(1.0 - t), np.float32(1.0 - T_END), np.float32(DT_REFERENCE)
    s = [start]
    while s[-1] < end:
        s.append(min(np.float32(s[-1] + dt), end))
    return np.float64(1.0) - np.asarray(s, dtype=np.float32).astype(np.float64)
