"""Methods of purification, each one object with its own knobs.

There are two kinds. A `TableMethod` is linear in what each step reads: it gives a table of coefficients
(`coupfast.solvers`), which every engine fuses. A `StepMethod` is any function from state to state; PyTorch runs it. Both have
the exact gradient of the steps that ran, in the memory of one step. A method from elsewhere is an object of one of these
classes, given as `method=` or named `package.module:NAME`.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from torch import nn

from coupfast import reference
from coupfast.naming import is_reference, reference_to, resolve
from coupfast.noise import Noise
from coupfast.options import check_name, number_or, option
from coupfast.sde import VPSDE, check_num_steps, check_t, check_times, time_grid
from coupfast.solvers import SOLVERS, CoefficientTable, Solver

#: A tuple of tensors whose first dimension is the batch; the first one is the image, in the [-1, 1] scale.
StepState: TypeAlias = tuple[torch.Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Networks:
    """What a step function may call: frozen networks in the run's dtype.

    Attributes:
        score: (x_k in the [-1, 1] scale, labels (batch,)) → ε̂.
        classifier: Images in [0, 1] → logits; None for a method without guidance.
        detached: Whether gradients take the guidance as a constant.
    """

    score: nn.Module
    classifier: nn.Module | None
    detached: bool = False

    def eps_hat(self, x: torch.Tensor, t: float) -> torch.Tensor:
        """ε̂(x, 999 t)."""
        labels = torch.full((len(x),), 999.0 * t, dtype=x.dtype, device=x.device)
        return self.score(x, labels)

    def guidance(self, x: torch.Tensor) -> torch.Tensor:
        """∇ log max_y p(y | x) with respect to x in [-1, 1], differentiable where gradients are on unless `detached`."""
        if self.classifier is None:
            raise ValueError("this method follows a classifier, and says `guided = False`")
        return reference.confidence_gradient(self.classifier, x, detached=self.detached)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """How an image is purified; a frozen dataclass whose fields are the knobs.

    Attributes:
        name: What people call it; `package.module:NAME` for one that is not of this package.
        reference: Where it comes from.
        guided: Whether it needs a classifier.
        clamp: Clip the state to [-1, 1] before the first and after the last step.
        out_of_range: What is done with images that leave [0, 1], as attacks that probe beyond it and smoothing's noise do:
            "refuse" them; "clip" them to [0, 1], with no gradient where that changed anything; "allow" them as they are (with
            `clamp`, the first clip of the state is one all the same). In the first two cases a few roundings beyond are clipped
            and keep their gradient.
    """

    name: ClassVar[str] = ""
    reference: ClassVar[str] = ""
    guided: ClassVar[bool] = False

    clamp: bool = option(True, help="clip the state to [-1, 1] before and after, as COUP's code does and DiffPure's does not")
    out_of_range: Literal["refuse", "clip", "allow"] = option(
        "refuse",
        choices=("refuse", "clip", "allow"),
        help="images beyond [0, 1]: refuse them, clip them, or allow them as they are",
    )

    def __post_init__(self) -> None:
        check_name("out_of_range", self.out_of_range, ("refuse", "clip", "allow"))
        object.__setattr__(self, "clamp", bool(self.clamp))

    @property
    @abc.abstractmethod
    def num_noises(self) -> int:
        """Rows of an explicit `noise`."""

    def finish(self, state: StepState) -> torch.Tensor:
        """The purified image in the [-1, 1] scale, from the last state; differentiable."""
        return state[0]

    @abc.abstractmethod
    def definition(self, state: StepState, networks: Networks, noise: Noise, steps: range) -> StepState:
        """Some of the steps once more, as slowly and obviously as they can be written; back-propagation goes through them.

        The certificate compares with this. It shares no code with the engines and the adjoint.

        Args:
            state: Where the first of the steps begins, in the dtype to compute in; (x_0,) for step 0, forward noising not done.
            networks: In that dtype.
            noise: The run's.
            steps: Consecutive step indices.

        Returns:
            The state after the last of the steps.
        """


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """A linear method made numeric: the table of its steps and, where it has one, the row of its forward noising."""

    table: CoefficientTable
    noising: tuple[float, float] | None = None  # (sqrt ᾱ, sqrt(1 − ᾱ))

    @property
    def num_noises(self) -> int:
        """Rows of an explicit `noise`: one a step, a second one a step where the table has that column, the noising's last."""
        return self.table.num_steps * (1 + (self.table.f is not None)) + (self.noising is not None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableMethod(Method):
    """A method whose steps are linear in what they read; a subclass gives `recipe`."""

    @abc.abstractmethod
    def recipe(self) -> Recipe:
        """The coefficients of all steps."""

    def coarse(self, chosen: Sequence[int]) -> CoefficientTable:
        """A table that goes through some of this one's states, for `gradient="surrogate"`.

        Args:
            chosen: Indices of states, rising from 0 to K.
        """
        raise ValueError(
            f"{type(self).__name__} has no coarser grid, and gradient='surrogate' needs one; take gradient='exact'"
        )

    @property
    def num_noises(self) -> int:
        return self.recipe().num_noises

    def definition(self, state: StepState, networks: Networks, noise: Noise, steps: range) -> StepState:
        recipe = self.recipe()
        table, x = recipe.table, state[0]
        if steps.start == 0:
            x_in = x
            if recipe.noising is not None:
                signal, spread = recipe.noising
                x = signal * x + spread * noise.z(-1, x)
            state = (x, x_in)
        return reference.rows_ref(
            state,
            networks.score,
            networks.classifier,
            [table.row(k) for k in steps],
            [float(table.labels[k]) for k in steps],
            [(noise.z(k, x), noise.z2(k, x) if table.f is not None else None) for k in steps],
            detached=networks.detached,
        )


def _times(word: str) -> Any:
    """0.1, or a grid: 0.1,0.05,0.01."""
    return tuple(float(part) for part in word.split(",") if part) if "," in word else float(word)


def _sde(word: str) -> VPSDE:
    low, _, high = word.partition(",")
    return VPSDE(float(low), float(high))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionMethod(TableMethod):
    """The reverse VP-SDE from time `t` to 1e-5, by a solver's table.

    Attributes:
        t: Purification time t* in (1e-5, 1]; step 100 of 1000 is 0.1. Or the whole grid: times t_0 > … > t_K in (0, 1].
        num_steps: That many equal steps; None is the reference grid (steps of 1e-3, the last one shorter).
        solver: A name of `coupfast.solvers.SOLVERS`, a function that fills a table, or `package.module:NAME` of one.
        sde: The VP-SDE; β from 0.1 to 20 unless given.
        clamp: Clip the state to [-1, 1] before the first and after the last step, as COUP's code does (DiffPure's does not:
            pass False to reproduce it). The gradient contains the clip.
    """

    t: float | tuple[float, ...] = option(
        0.1,
        help="purification time in (1e-5, 1], step 100 of 1000 is 0.1; or all times of a grid, T,T,...",
        parse=_times,
        metavar="T",
    )
    num_steps: int | None = option(
        None, help="that many equal steps; without it one step each 1e-3 of t, the last one shorter", parse=int, metavar="K"
    )
    solver: str | Solver = option(
        "euler-maruyama", help=f"{', '.join(SOLVERS)}, or package.module:NAME of a function that fills a table", metavar="NAME"
    )
    sde: VPSDE = option(VPSDE(), help="beta(0),beta(1) of the VP-SDE", parse=_sde, metavar="B,B")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.t, (Sequence, np.ndarray)) and not isinstance(self.t, str):
            object.__setattr__(self, "t", check_times(self.t))
            if self.num_steps is not None:
                raise ValueError(
                    f"`t` is a grid of {len(self.t) - 1} steps already; leave `num_steps` out, got {self.num_steps}"
                )  # type: ignore[arg-type]
        else:
            object.__setattr__(self, "t", check_t(self.t))  # type: ignore[arg-type]
        object.__setattr__(self, "num_steps", check_num_steps(self.num_steps))
        if not isinstance(self.sde, VPSDE):
            raise TypeError(f"`sde` is a coupfast.VPSDE, got {type(self.sde).__name__}")
        if isinstance(self.solver, str):
            if is_reference(self.solver):
                resolve(self.solver, option="solver")
            else:
                check_name("solver", self.solver, SOLVERS)
        elif not callable(self.solver):
            raise TypeError(f"`solver` is a name or a function that fills a table, got {type(self.solver).__name__}")

    @property
    def grid(self) -> np.ndarray:
        """Times t_0 > … > t_K at which states live; float64, shape (K + 1,)."""
        if isinstance(self.t, tuple):
            return np.asarray(self.t, dtype=np.float64)
        return time_grid(self.t, self.num_steps)

    def scale(self, t: float) -> float:
        """λ at time t; 0 without guidance."""
        return 0.0

    def table(self, grid: np.ndarray) -> CoefficientTable:
        """The coefficients on a grid of times."""
        solver = self.solver
        if isinstance(solver, str):
            solver = SOLVERS[solver] if solver in SOLVERS else resolve(solver, option="solver")
        found = solver(self.sde, grid, np.array([self.scale(float(t)) for t in grid[:-1]], dtype=np.float64))  # type: ignore[operator]
        if not isinstance(found, CoefficientTable):
            raise TypeError(f"a solver returns a CoefficientTable, {solver!r} returned a {type(found).__name__}")
        return found

    def recipe(self) -> Recipe:
        return Recipe(self.table(self.grid))

    def coarse(self, chosen: Sequence[int]) -> CoefficientTable:
        return self.table(self.grid[list(chosen)])

    def definition(self, state: StepState, networks: Networks, noise: Noise, steps: range) -> StepState:
        if self.solver not in ("euler-maruyama", "probability-flow"):
            return super().definition(state, networks, noise, steps)
        # The SDE itself, through torchsde: not even the coefficients are shared.
        grid, (x,) = self.grid, state
        noising = steps.start == 0 and self.recipe().noising is not None
        rows = [noise.z(k, x) for k in steps] + ([noise.z(-1, x)] if noising else [])
        end = reference.purify_ref(
            x,
            networks.score,
            networks.classifier,
            torch.stack(rows),
            grid=grid[steps.start : steps.stop + 1],
            forward_noising=noising,
            dynamics=self.solver,  # type: ignore[arg-type]
            guidance_scale=self.scale,
            sde=self.sde,
            detached=networks.detached,
        )
        return (end,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class COUP(DiffusionMethod):
    """The reverse SDE from the image itself, following the gradient of the classifier's log-confidence.

    x' = x + h β [½ x − ε̂/σ + λ ∇ log p(ŷ | x)] + sqrt(β h) z. Zhang et al. 2024, arXiv:2408.05900, eq. 5.

    Attributes:
        guidance_scale: λ of the paper, at least 0 (1.0 there); a number, or a function of t (`package.module:NAME` of one).
    """

    name: ClassVar[str] = "coup"
    reference: ClassVar[str] = "Zhang et al. 2024, arXiv:2408.05900, eq. 5"
    guided: ClassVar[bool] = True

    guidance_scale: float | str | Callable[[float], float] = option(
        1.0,
        help="the paper's lambda, at least 0; or package.module:NAME of a function of t",
        parse=number_or(str),
        metavar="L",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.guidance_scale
        if isinstance(given, (int, float, np.floating, np.integer)) and not isinstance(given, bool):
            object.__setattr__(self, "guidance_scale", _checked_scale(given))
        elif isinstance(given, str) and is_reference(given):
            resolve(given, option="guidance_scale")
        elif not callable(given):
            raise ValueError(f"`guidance_scale` is a finite number >= 0, or a function of t, got {given!r}; the paper uses 1.0")
        if not isinstance(self.guidance_scale, float):
            for t in self.grid[:-1]:
                self.scale(float(t))

    def scale(self, t: float) -> float:
        given = self.guidance_scale
        if isinstance(given, str):
            given = resolve(given, option="guidance_scale")
        return given if isinstance(given, float) else _checked_scale(given(t), t)  # type: ignore[operator]


def _checked_scale(value: Any, t: float | None = None) -> float:
    found = value if t is None else f"{value!r} at t = {t:g}"
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise ValueError(f"`guidance_scale` is a finite number >= 0, got {found}; the paper uses 1.0")
    if not 0.0 <= value < math.inf:
        raise ValueError(f"`guidance_scale` is a finite number >= 0, got {found}; the paper uses 1.0")
    return float(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReverseSDE(DiffusionMethod):
    """COUP without guidance: the reverse SDE from the image itself. Zhang et al. 2024, arXiv:2408.05900."""

    name: ClassVar[str] = "reverse-sde"
    reference: ClassVar[str] = "Zhang et al. 2024, arXiv:2408.05900 (COUP without guidance)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffPure(DiffusionMethod):
    """Forward noising to time `t` with the discrete chain's ᾱ, then the reverse SDE. Nie et al. 2022, arXiv:2205.07460."""

    name: ClassVar[str] = "diffpure"
    reference: ClassVar[str] = "Nie et al. 2022, arXiv:2205.07460"

    def recipe(self) -> Recipe:
        grid = self.grid
        alpha_bar = self.sde.discrete_alpha_bar(float(grid[0]))
        return Recipe(self.table(grid), (float(np.sqrt(alpha_bar)), float(np.sqrt(1.0 - alpha_bar))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepMethod(Method):
    """A method whose steps are any function; a subclass gives `num_steps` and `step`.

    `step` has to give the same result for the same arguments (all randomness from `noise`) and must not write into its
    arguments: the backward pass takes every step once more from its stored state.
    """

    if TYPE_CHECKING:
        num_steps: int

    @property
    def num_noises(self) -> int:
        return self.num_steps

    def start(self, x_in: torch.Tensor, noise: Noise) -> StepState:
        """The state before step 0, from the (clipped) image in the [-1, 1] scale; differentiable."""
        return (x_in,)

    @abc.abstractmethod
    def step(self, k: int, state: StepState, noise: Noise, networks: Networks) -> StepState:
        """The state after step k, as many tensors of the same shapes; differentiable PyTorch.

        Args:
            k: 0 … num_steps − 1.
            noise: `noise.z(j, like)` is standard normal noise number j of `num_noises`, of the shape of `like`.
        """

    def definition(self, state: StepState, networks: Networks, noise: Noise, steps: range) -> StepState:
        if steps.start == 0:
            state = self.start(state[0], noise)
        for k in steps:
            state = self.step(k, state, noise, networks)
        return state


METHODS: dict[str, type[Method]] = {method.name: method for method in (COUP, ReverseSDE, DiffPure)}


def method_name(method: Method | type[Method]) -> str:
    """Its name of `METHODS`, or `package.module:NAME`."""
    owner = method if isinstance(method, type) else type(method)
    return owner.name if METHODS.get(owner.name) is owner else reference_to(owner)
