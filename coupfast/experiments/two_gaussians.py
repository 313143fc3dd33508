"""COUP on one-dimensional data of two classes, N(+m, s²) and N(−m, s²), where score, density and classifier are known.

    x ← x + h β(t) [½ x + ∂ log p_t(x) + λ ∂ log p̂(ŷ | x)] + sqrt(β(t) h) z,      t = t*, t* − h, …

p_t is the mixture after the VP-SDE's noise: N(±sqrt ᾱ m, ᾱ s² + 1 − ᾱ). The classifier is p̂(y | x) = (p_y(x) + ν ε_y) / Σ (…),
p_y the density of a class and ε_y = |N(0, 1)| drawn once for each path: at ν = 0 it is the true one. All in float64.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from coupfast.sde import VPSDE

MEAN, STD = 1.0, 1.0
START, T, STEP = 0.5, 0.1, 1e-3
_SDE = VPSDE()
_BATCH = 10_000


def times(t: float, step: float = STEP) -> np.ndarray:
    """Where steps begin."""
    return t - step * np.arange(round(t / step))


def density(x: np.ndarray, y: int, mean: float = MEAN, std: float = STD) -> np.ndarray:
    """p_y(x) of a class, y = +1 or −1."""
    found: np.ndarray = np.exp(-0.5 * ((x - y * mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))
    return found


def score(x: np.ndarray, t: float) -> np.ndarray:
    """∂ log p_t(x)."""
    alpha_bar = float(_SDE.alpha_bar(t))
    mean, variance = np.sqrt(alpha_bar) * MEAN, alpha_bar * STD**2 + 1.0 - alpha_bar
    found: np.ndarray = (mean * np.tanh(mean * x / variance) - x) / variance
    return found


def guidance(x: np.ndarray, noise: tuple[np.ndarray | float, np.ndarray | float] = (0.0, 0.0)) -> np.ndarray:
    """∂ log max_y p̂(y | x), with ν ε_y of the classes +1 and −1."""
    plus, minus = density(x, 1), density(x, -1)
    slope_plus, slope_minus = -(x - MEAN) / STD**2 * plus, -(x + MEAN) / STD**2 * minus
    seen_plus, seen_minus = plus + noise[0], minus + noise[1]
    first = seen_plus >= seen_minus
    own = np.where(first, slope_plus / seen_plus, slope_minus / seen_minus)
    found: np.ndarray = own - (slope_plus + slope_minus) / (seen_plus + seen_minus)
    return found


@dataclasses.dataclass(frozen=True)
class Flips:
    """Of paths that start at a positive point, how many ended below 0, and how many were below 0 after some step."""

    ended: np.ndarray
    crossed: np.ndarray


def flips(scales: np.ndarray, levels: np.ndarray, paths: int, seed: int) -> Flips:
    """Counts, shape (scales, levels), of `paths` paths with common noise, for guidance scales λ and noise levels ν."""
    ended = np.zeros((len(scales), len(levels)), dtype=np.int64)
    crossed = np.zeros_like(ended)
    lam, nu = scales[:, None, None], levels[None, :, None]
    for number, count in enumerate(_batches(paths)):
        rng = np.random.Generator(np.random.Philox([seed, number]))
        plus, minus = np.abs(rng.standard_normal((2, count)))
        x = np.full((len(scales), len(levels), count), START)
        below = np.zeros(x.shape, dtype=bool)
        for t in times(T):
            beta = float(_SDE.beta(t))
            drift = 0.5 * x + score(x, t) + lam * guidance(x, (nu * plus, nu * minus))
            x = x + STEP * beta * drift + np.sqrt(beta * STEP) * rng.standard_normal(count)
            below |= x < 0
        ended += (x < 0).sum(axis=2)
        crossed += below.sum(axis=2)
    return Flips(ended, crossed)


def proposition_1(scales: np.ndarray, paths: int, seed: int) -> dict[str, np.ndarray]:
    """Guided paths beside unguided ones of the same noise, with the true classifier.

    Returns:
        By λ: `plain` and `guided`, how many were below 0 after some step; `only_plain`, `only_guided`; `gap`, the least that a
        guided path was ahead of its partner before either had crossed (0 where they start); `drift`, the least advantage of the
        guided drift over x in (0, 4]; `slope`, the least slope of an unguided step, which has to be positive.
    """
    grid = np.linspace(1e-3, 4.0, 4000)
    steps = np.stack([grid + STEP * float(_SDE.beta(t)) * (0.5 * grid + score(grid, t)) for t in times(T)])
    slope = float((np.diff(steps, axis=1) / np.diff(grid)).min())
    names = ("plain", "guided", "only_plain", "only_guided", "gap", "drift", "slope")
    found: dict[str, list[float]] = {name: [] for name in names}
    for scale in scales:
        counts, gap = np.zeros(4, dtype=np.int64), np.inf
        for number, count in enumerate(_batches(paths)):
            rng = np.random.Generator(np.random.Philox([seed, number]))
            plain, guided = np.full(count, START), np.full(count, START)
            down = np.zeros((2, count), dtype=bool)
            for t in times(T):
                beta = float(_SDE.beta(t))
                z = np.sqrt(beta * STEP) * rng.standard_normal(count)
                plain = plain + STEP * beta * (0.5 * plain + score(plain, t)) + z
                guided = guided + STEP * beta * (0.5 * guided + score(guided, t) + scale * guidance(guided)) + z
                down |= np.stack([plain < 0, guided < 0])
                both_up = ~down.any(axis=0)
                if both_up.any():
                    gap = min(gap, float((guided - plain)[both_up].min()))
            counts += [down[0].sum(), down[1].sum(), (down[0] & ~down[1]).sum(), (~down[0] & down[1]).sum()]
        row = [*counts.tolist(), gap, float((scale * guidance(grid)).min()), slope]
        for name, value in zip(found, row, strict=True):
            found[name].append(value)
    return {name: np.array(values) for name, values in found.items()}


def proposition_2(ends: np.ndarray, scale: float, paths: int, seed: int) -> dict[str, np.ndarray]:
    """How far purification moves a point, beside the bound, over the time it starts from.

    With A = Π (1 + ½ β h), which tends to exp(½ ∫β), and N the path's own noise after the linear part of the steps,

        |x_K − x_0| <= (A − 1) (|x_0| + 2 (C_s + λ C_p)) + |N|

    for every path whose scores are at most C_s and guidance at most C_p in size: here the largest of any of these paths. N is
    normal with variance near exp(∫β) − 1.

    Returns:
        By t*: `distance` and `bound`, means over paths; `distance_99` and `bound_99`, their 99 % quantiles; `above`, how many
        paths are beyond their own bound; `spread`, the standard deviation of N, and `spread_limit`, sqrt(exp(∫β) − 1).
    """
    names = ("distance", "bound", "distance_99", "bound_99", "above", "spread", "spread_limit")
    found: dict[str, list[float]] = {name: [] for name in names}
    for end in ends:
        rng = np.random.Generator(np.random.Philox([seed, round(1e6 * end)]))
        x, noise, growth, largest = np.full(paths, START), np.zeros(paths), 1.0, np.zeros(2)
        for t in times(end):
            beta = float(_SDE.beta(t))
            pull, push = score(x, t), guidance(x)
            largest = np.maximum(largest, [np.abs(pull).max(), np.abs(push).max()])
            z = np.sqrt(beta * STEP) * rng.standard_normal(paths)
            x = x + STEP * beta * (0.5 * x + pull + scale * push) + z
            noise = (1 + 0.5 * STEP * beta) * noise + z
            growth *= 1 + 0.5 * STEP * beta
        distance = np.abs(x - START)
        bound = (growth - 1) * (START + 2 * (largest[0] + scale * largest[1])) + np.abs(noise)
        limit = np.sqrt(1.0 / float(_SDE.alpha_bar(end)) - 1.0)
        quantiles = [float(np.quantile(values, 0.99)) for values in (distance, bound)]
        # Rounding of a few hundred steps.
        above = int((distance > bound + 1e-12).sum())
        row = [float(distance.mean()), float(bound.mean()), *quantiles, above, float(noise.std()), float(limit)]
        for name, value in zip(found, row, strict=True):
            found[name].append(value)
    return {name: np.array(values) for name, values in found.items()}


def _batches(paths: int) -> list[int]:
    whole, rest = divmod(paths, _BATCH)
    return [_BATCH] * whole + [rest] * (rest > 0)
