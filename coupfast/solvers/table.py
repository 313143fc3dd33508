"""Coefficients of all steps of a run, as numbers.

A step of a method that is linear in what it reads is one row of numbers, known before the run:

    x_{k+1} = a x_k + b ε̂(x_k, 999 t_k) + c g(x_k) + d z  [ + e x_in + f z′ + p x_{k-1} + q ε̂(x_{k-1}) ]

The first four columns serve every method of Euler's kind. The others exist only where a method needs them: x_in, the state
that the purification began from; a second noise; and the step before, for two-step solvers.

Two more things may happen between the networks and the row. With m and n the predicted noise is clipped: ε̂ is replaced by what
belongs to clip(x̂0, ±1), x̂0 = m x_k + n ε̂. With s what the next step reads as ε̂(x_{k−1}) carries the guidance of its own step:

    ε̂ ← (clip(m x_k + n ε̂, ±1) − m x_k) / n,      ε̂(x_{k−1}) ← ε̂(x_{k−1}) + s_{k−1} g(x_{k−1})
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from coupfast.sde import NUM_LABELS, VPSDE

#: Columns that a table may lack, in the order of a row.
EXTRA_COLUMNS = ("e", "f", "p", "q")
#: Columns of what happens between the networks and the row; a table may lack them.
BETWEEN_COLUMNS = ("m", "n", "s")


@dataclasses.dataclass(frozen=True, eq=False)
class CoefficientTable:
    """One purification's coefficients: K rows, and where its states live in time.

    Attributes:
        t: Times t_0 … t_K, float64, shape (K + 1,); row k goes from t[k] to t[k + 1].
        a, b, c, d: Factors of the state, the predicted noise, the guidance gradient and the noise; float64, shape (K,).
        e, f, p, q: Factors of x_in, of a second noise, of x_{k−1} and of ε̂(x_{k−1}); the same shape, or None: no such column.
        m, n: Factors of x_k and ε̂ in the x̂0 that is clipped, n never 0; both None: nothing is clipped.
        s: What ε̂(x_k) is shifted by, times g(x_k), where the next step reads it; None: it is not.
        labels: What the network is told at the start of each step; None makes it 999 t.

    Raises:
        ValueError: for columns of another length, values that are not finite, a first row that asks for the step before it,
            and columns that make no sense alone.

    Example:
        >>> import numpy as np, coupfast
        >>> ones = np.ones(2)  # two steps
        >>> table = coupfast.CoefficientTable(np.array([0.1, 0.05, 1e-5]), ones, -0.1 * ones, 0 * ones, 0.1 * ones)
        >>> table.num_steps, table.row(0)[1]
        (2, -0.1)
    """

    t: np.ndarray
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    d: np.ndarray
    e: np.ndarray | None = None
    f: np.ndarray | None = None
    p: np.ndarray | None = None
    q: np.ndarray | None = None
    m: np.ndarray | None = None
    n: np.ndarray | None = None
    s: np.ndarray | None = None
    labels: np.ndarray = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if np.ndim(self.t) != 1 or len(self.t) < 2:
            raise ValueError(f"`t` are the K + 1 times of K steps, K at least 1, got shape {np.shape(self.t)}")
        if self.labels is None:
            object.__setattr__(self, "labels", NUM_LABELS * np.asarray(self.t, dtype=np.float64)[:-1])
        for name in ("a", "b", "c", "d", *EXTRA_COLUMNS, *BETWEEN_COLUMNS, "labels"):
            column = getattr(self, name)
            if column is None and name not in "abcd":
                continue
            column = np.asarray(column, dtype=np.float64)
            object.__setattr__(self, name, column)
            if column.shape != (len(self.t) - 1,):
                raise ValueError(
                    f"column {name} has shape {column.shape}, and {len(self.t)} times make {len(self.t) - 1} steps"
                )
            if not np.all(np.isfinite(column)):
                raise ValueError(
                    f"column {name} has values that are not finite, the first in step {np.argmin(np.isfinite(column))}"
                )
        for name in ("p", "q"):
            column = getattr(self, name)
            if column is not None and column[0] != 0.0:
                raise ValueError(f"column {name} of step 0 asks for the step before it, and there is none: {column[0]}")
        if (self.m is None) != (self.n is None) or (self.n is not None and np.any(self.n == 0.0)):
            raise ValueError("columns m and n say together what x̂0 is, n being nowhere 0: give both or none")
        if self.s is not None and self.q is None:
            raise ValueError("column s is for what the next step reads as ε̂(x_{k−1}), and without column q none does")

    @property
    def num_steps(self) -> int:
        return len(self.a)

    @property
    def clips(self) -> bool:
        """Whether x̂0 is clipped."""
        return self.m is not None

    def clip(self, k: int) -> tuple[float, float] | None:
        """m_k and n_k; None where x̂0 is not clipped."""
        return None if self.m is None or self.n is None else (float(self.m[k]), float(self.n[k]))

    def guides(self, k: int) -> bool:
        """Whether step k uses the guidance gradient."""
        return bool(self.c[k] != 0.0 or self.shift(k) != 0.0)

    def shift(self, k: int) -> float:
        """s_k where the step after it reads ε̂(x_k), else 0."""
        return 0.0 if self.s is None or not self._read_later(k) else float(self.s[k])

    def _read_later(self, k: int) -> bool:
        """Whether step k + 1 reads ε̂(x_k)."""
        return bool(self.q is not None and k + 1 < self.num_steps and self.q[k + 1] != 0.0)

    @property
    def guided(self) -> bool:
        """Whether any step uses the guidance gradient."""
        return any(self.guides(k) for k in range(self.num_steps))

    @property
    def extended(self) -> bool:
        """Whether there is any column beside the first four."""
        return any(getattr(self, name) is not None for name in EXTRA_COLUMNS)

    @property
    def two_step(self) -> bool:
        """Whether a step reads the one before it."""
        return self.p is not None or self.q is not None

    def evaluates(self, k: int) -> bool:
        """Whether step k asks the networks: a row that only mixes states and noise, as a forward noising, does not."""
        return self.reads_eps_hat(k) or self.guides(k)

    def reads_eps_hat(self, k: int) -> bool:
        """Whether step k, or the step after it, reads ε̂(x_k)."""
        return bool(self.b[k] != 0.0 or self._read_later(k))

    def row(self, k: int) -> tuple[float, ...]:
        """(a_k, b_k, c_k, d_k), and e_k, f_k, p_k, q_k where the table is extended (0 for an absent column); float64."""
        columns = [self.a, self.b, self.c, self.d]
        if self.extended:
            columns += [np.zeros_like(self.a) if column is None else column for column in (self.e, self.f, self.p, self.q)]
        return tuple(float(column[k]) for column in columns)

    def tensor(self, *, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
        """All rows, cast once; shape (K, 4), or (K, 8) where the table is extended."""
        rows = np.array([self.row(k) for k in range(self.num_steps)], dtype=np.float64)
        return torch.from_numpy(rows).to(device=device, dtype=dtype)

    def sha256(self) -> str:
        """Of all times and coefficients: two purifications with equal tables take equal steps."""
        digest = hashlib.sha256(np.ascontiguousarray(self.t, dtype="<f8").tobytes())
        for name in ("a", "b", "c", "d", *EXTRA_COLUMNS):
            column = getattr(self, name)
            digest.update(name.encode() + (b"" if column is None else np.ascontiguousarray(column, dtype="<f8").tobytes()))
        told = None if np.array_equal(self.labels, NUM_LABELS * self.t[:-1]) else self.labels
        for name, column in (*((name, getattr(self, name)) for name in BETWEEN_COLUMNS), ("labels", told)):
            if column is not None:
                digest.update(name.encode() + np.ascontiguousarray(column, dtype="<f8").tobytes())
        return digest.hexdigest()


def one_after_the_other(tables: Sequence[CoefficientTable]) -> CoefficientTable:
    """A table of the steps of several; each begins at its own first time, wherever the one before ended."""
    # Where no network is asked, what would be clipped may be any number but 0.
    absent = dict.fromkeys(EXTRA_COLUMNS, 0.0) | {"m": 1.0, "n": 1.0, "s": 0.0}
    asking = [table for table in tables if any(table.reads_eps_hat(k) for k in range(table.num_steps))]
    if len({table.clips for table in asking}) > 1:
        raise ValueError("some of these tables clip x̂0 and some do not: a table does so in all steps that ask a network")
    columns: dict[str, Any] = {}
    for name in ("a", "b", "c", "d", "labels", *absent):
        found = [getattr(table, name) for table in tables]
        if any(column is not None for column in found):
            filled = [
                np.full(table.num_steps, absent[name]) if column is None else column
                for table, column in zip(tables, found, strict=True)
            ]
            columns[name] = np.concatenate(filled)
    return CoefficientTable(t=np.concatenate([*(table.t[:-1] for table in tables), tables[-1].t[-1:]]), **columns)


def noising(t_before: float, t: float, signal: float, sigma: float) -> CoefficientTable:
    """One row that moves an image to time t: x′ = signal x + sigma z. It asks no network."""
    zero = np.zeros(1)
    return CoefficientTable(t=np.array([t_before, t]), a=np.array([signal]), b=zero, c=zero, d=np.array([sigma]))


#: (sde, times t_0 … t_K, guidance scale at t_0 … t_{K−1}) → table.
Solver: TypeAlias = Callable[[VPSDE, np.ndarray, "np.ndarray | float"], CoefficientTable]
