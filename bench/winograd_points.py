"""The rounding error of F(4 x 4, 3 x 3) by interpolation points and by the length of its sums.

    python bench/winograd_points.py [--channels C] [--json FILE]

One layer with normal inputs and uniform weights in float32 arithmetic, fused multiply-adds rounded once, against float64; as a
multiple of the error of the direct sum, taken term by term in the same arithmetic. First which points, with sums of one run;
then how long the runs, with the points that `kernels/coupfast_kernels/csrc/conv.h` takes.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from fractions import Fraction as F

import numpy as np

TILE, KERNEL = 4, 3
SIZE = TILE + KERNEL - 1
OURS = (F(0), F(5, 8), -F(5, 8), F(3, 2), -F(3, 2))
POINTS = {
    "0, ±1, ±2": (0, 1, -1, 2, -2),
    "0, ±1, ±1/2": (0, 1, -1, F(1, 2), -F(1, 2)),
    "0, ±1, 1/2, -2": (0, 1, -1, F(1, 2), -2),
    "0, ±1/2, ±3/2": (0, F(1, 2), -F(1, 2), F(3, 2), -F(3, 2)),
    "0, ±3/4, ±3/2": (0, F(3, 4), -F(3, 4), F(3, 2), -F(3, 2)),
    "0, ±5/8, ±8/5": (0, F(5, 8), -F(5, 8), F(8, 5), -F(8, 5)),
    "0, ±5/8, ±3/2": OURS,
}


def transforms(points: tuple) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Aᵀ, G and Bᵀ of the Cook-Toom algorithm at these points and infinity, float64 from exact fractions."""
    finite = [F(p) for p in points]
    a = [[p**i for p in finite] + [F(int(i == TILE - 1))] for i in range(TILE)]
    g, b = [], []
    for j, p in enumerate(finite):
        others = finite[:j] + finite[j + 1 :]
        product = F(1)
        for other in others:
            product *= p - other
        g.append([p**i / product for i in range(KERNEL)])
        b.append(_from_roots(others) + [F(0)])
    g.append([F(0)] * (KERNEL - 1) + [F(1)])
    b.append(_from_roots(finite))
    return tuple(np.array([[float(value) for value in row] for row in matrix]) for matrix in (a, g, b))  # type: ignore[return-value]


def _from_roots(roots: list[F]) -> list[F]:
    coefficients = [F(1)]
    for root in roots:
        shifted = [F(0), *coefficients]
        coefficients = [s - root * c for s, c in zip(shifted, [*coefficients, F(0)], strict=True)]
    return coefficients


def rounded(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32).astype(np.float64)


def summed(terms: np.ndarray, factors: np.ndarray, run: int) -> np.ndarray:
    """Σ_c terms[:, c] factors[c], one rounding a term within runs of `run` terms, then the runs' sums in order."""
    total = np.zeros((len(terms), factors.shape[1]))
    for start in range(0, terms.shape[1], run):
        part = np.zeros_like(total)
        for c in range(start, min(start + run, terms.shape[1])):
            part = rounded(part + terms[:, c, None] * factors[None, c])  # before rounding as good as exact in float64
        total = rounded(total + part)
    return total


def winograd_error(d: np.ndarray, g: np.ndarray, true: np.ndarray, points: tuple, run: int) -> float:
    a, weights, b = transforms(points)
    u = rounded(weights @ g @ weights.T)  # [out, channel, SIZE, SIZE]
    v = rounded(rounded(b @ d) @ b.T)  # [tile, channel, SIZE, SIZE]
    m = np.empty((len(d), len(g), SIZE, SIZE))
    for i in range(SIZE):
        for j in range(SIZE):
            m[:, :, i, j] = summed(v[:, :, i, j], u[:, :, i, j].T, run)
    y = rounded(rounded(a @ m) @ a.T)
    return float(np.linalg.norm(y - true) / np.linalg.norm(true))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=256, help="input channels (default 256)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()
    generator = np.random.default_rng(options.seed)
    tiles, outputs = 48, 16
    d = generator.standard_normal((tiles, options.channels, SIZE, SIZE)).astype(np.float32).astype(np.float64)
    g = generator.uniform(-1, 1, (outputs, options.channels, KERNEL, KERNEL)).astype(np.float32).astype(np.float64)
    columns = np.stack([d[:, :, i : i + TILE, j : j + TILE] for i in range(KERNEL) for j in range(KERNEL)], axis=2)
    columns = columns.transpose(0, 3, 4, 1, 2).reshape(tiles * TILE * TILE, -1)
    flat = g.reshape(outputs, -1).T
    shape = (tiles, TILE, TILE, outputs)
    true = (columns @ flat).reshape(shape).transpose(0, 3, 1, 2)
    direct = summed(columns, flat, columns.shape[1]).reshape(shape).transpose(0, 3, 1, 2)
    unit = float(np.linalg.norm(direct - true) / np.linalg.norm(true))
    rows = [("direct sum, one run", unit)]
    for name, points in POINTS.items():
        rows.append((f"F(4x4) at {name}, one run", winograd_error(d, g, true, points, options.channels)))
    for run in (128, 64, 32, 16):
        rows.append((f"F(4x4) at 0, ±5/8, ±3/2, runs of {run}", winograd_error(d, g, true, OURS, run)))
    for name, error in rows:
        print(f"{name:44s} {error:.2e}  {error / unit:5.2f} x direct")
    if options.json:
        content = {"channels": options.channels, "seed": options.seed, "relative_error": dict(rows)}
        options.json.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
