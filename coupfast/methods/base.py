"""What a method is: an object with its own knobs, of one of two kinds.

A `TableMethod` is linear in what each step reads: it gives a table of coefficients (`coupfast.solvers`), which every engine
fuses. A `StepMethod` is any function from state to state; PyTorch runs it. Both have the exact gradient of the steps that ran,
in the memory of one step.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

import torch
from torch import nn

from coupfast import reference
from coupfast.noise import Noise
from coupfast.options import check_name, option
from coupfast.sde import NUM_LABELS
from coupfast.solvers import CoefficientTable

#: A tuple of tensors whose first dimension is the batch; the first one is the image, in the [-1, 1] scale.
StepState: TypeAlias = tuple[torch.Tensor, ...]


def clip(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """x in [low, high]; its gradient is 1 there, the ends included, and 0 beyond.

    Black and white pixels are at the ends, and many. PyTorch's own clamp passes the gradient there in 2.13, and not in 2.15.
    """
    return torch.where((x >= low) & (x <= high), x, x.detach().clamp(low, high))


@dataclasses.dataclass(frozen=True)
class Networks:
    """What a step function may call: frozen networks in the run's dtype.

    Attributes:
        score: (x_k in the [-1, 1] scale, labels (batch,)) → ε̂.
        classifier: Images in [0, 1] → logits; None for a method without guidance.
        detached: Whether gradients take the guidance as a constant.

    Example:
        >>> import coupfast
        >>> class Denoise(coupfast.StepMethod):
        ...     num_steps = 2
        ...     def step(self, k, state, noise, networks):
        ...         (x,) = state
        ...         return (x - 0.05 * networks.eps_hat(x, 0.05),)  # `networks` is one of these
        >>> coupfast.Purifier(coupfast.load_score("cifar10-tiny"), method=Denoise()).num_steps
        2
    """

    score: nn.Module
    classifier: nn.Module | None
    detached: bool = False

    def eps_hat(self, x: torch.Tensor, t: float) -> torch.Tensor:
        """ε̂(x, 999 t)."""
        labels = torch.full((len(x),), NUM_LABELS * t, dtype=x.dtype, device=x.device)
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

    Raises:
        ValueError: if `out_of_range` is something else.

    Example:
        >>> import coupfast
        >>> isinstance(coupfast.COUP(), coupfast.Method), coupfast.COUP().guided, coupfast.DiffPure().guided
        (True, True, False)
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

    @property
    @abc.abstractmethod
    def score_evaluations(self) -> int:
        """How often a run of one image asks the score network, at most."""

    def check_shape(self, image_shape: tuple[int, ...]) -> None:  # noqa: B027  (most take any)
        """ValueError if images of this shape, (channels, height, width), are not what the method was made for."""

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
    """A linear method made numeric: the table of its steps and, where it has one, the row of its forward noising.

    Example:
        >>> import coupfast
        >>> recipe = coupfast.DiffPure(t=0.06, num_steps=20).recipe()
        >>> scale, deviation = recipe.noising  # of the image, and of the noise that is added
        >>> recipe.table.num_steps, round(scale**2 + deviation**2, 6)
        (20, 1.0)
    """

    table: CoefficientTable
    noising: tuple[float, float] | None = None  # (sqrt ᾱ, sqrt(1 − ᾱ))

    @property
    def num_noises(self) -> int:
        """Rows of an explicit `noise`: one a step, a second one a step where the table has that column, the noising's last."""
        return self.table.num_steps * (1 + (self.table.f is not None)) + (self.noising is not None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableMethod(Method):
    """A method whose steps are linear in what they read; a subclass gives `recipe`.

    Example:
        >>> import coupfast
        >>> recipe = coupfast.DiffPure(t=0.06, num_steps=20).recipe()
        >>> recipe.table.num_steps, recipe.noising is not None
        (20, True)
    """

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

    @property
    def score_evaluations(self) -> int:
        table = self.recipe().table
        return sum(table.reads_eps_hat(k) for k in range(table.num_steps))

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
            clips=None if table.m is None or table.n is None else [(float(table.m[k]), float(table.n[k])) for k in steps],
            shifts=[table.shift(k) for k in steps],
            detached=networks.detached,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepMethod(Method):
    """A method whose steps are any function; a subclass gives `num_steps` and `step`.

    `step` has to give the same result for the same arguments (all randomness from `noise`) and must not write into its
    arguments: the backward pass takes every step once more from its stored state.

    Example:
        >>> import coupfast
        >>> class Shrink(coupfast.StepMethod):
        ...     num_steps = 2
        ...     def step(self, k, state, noise, networks):
        ...         return (state[0] - 0.05 * networks.eps_hat(state[0], 0.05),)
        >>> coupfast.Purifier(coupfast.load_score("cifar10-tiny"), method=Shrink).num_steps
        2
    """

    if TYPE_CHECKING:
        num_steps: int

    @property
    def num_noises(self) -> int:
        return self.num_steps

    @property
    def score_evaluations(self) -> int:
        """One a step, unless a subclass says otherwise."""
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
