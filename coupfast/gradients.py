"""What `backward` computes through a purification: one object a mode.

`Exact` is the gradient of the steps that ran. The others are what the literature attacks with, for comparison.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from coupfast import reference
from coupfast.budget import Budget
from coupfast.derivatives import identity_gradient, strictly
from coupfast.engine import Noise, ReplayedNoise
from coupfast.engine.networks import frozen
from coupfast.methods import DiffusionMethod, Method, TableMethod
from coupfast.options import check_name, option
from coupfast.tape import keeps_no_steps

if TYPE_CHECKING:
    from coupfast.prepared import Prepared

GUIDANCE_GRADIENTS = ("exact", "detached")


def _budget(word: str) -> int | str:
    """auto, whole, least, 2GiB, 500MiB or a number of bytes."""
    for suffix, size in (("GiB", 2**30), ("MiB", 2**20)):
        if word.endswith(suffix):
            return int(float(word[: -len(suffix)]) * size)
    return word if word in ("auto", "whole", "least") else int(word)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradient:
    """What `backward` computes; a frozen dataclass whose fields are the knobs.

    Attributes:
        name: What people call it.
        claims_exact: Whether it is the gradient of the steps that ran, and a certificate may fail it.
        flows: Whether autograd goes through the steps at all.
        differentiates_noise: Whether explicit noise may require a gradient (and gets one, if there are any).
        keeps: Whether a run may keep slopes and activations for it.
    """

    name: ClassVar[str] = ""
    claims_exact: ClassVar[bool] = False
    flows: ClassVar[bool] = True
    differentiates_noise: ClassVar[bool] = False
    keeps: ClassVar[bool] = False

    @property
    def differentiates_guidance(self) -> bool:
        """Whether the gradient contains the Hessian of the guidance."""
        return getattr(self, "guidance", "exact") == "exact"

    def check(self, method: Method, num_steps: int) -> None:
        """ValueError if this gradient does not exist for a method."""

    def backward_steps(self, num_steps: int) -> int:
        """Steps that a backward pass takes, of a run of so many."""
        return 0

    def through(
        self, prepared: Prepared, x_k: torch.Tensor, noise: Noise, keep_states: bool, progress: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """From the (clipped) image in the [-1, 1] scale to the last state, and all states if asked for."""
        return prepared.run(x_k, noise, gradient=False, keep_states=keep_states, progress=progress)

    def finish(self, x: torch.Tensor, purified: torch.Tensor) -> torch.Tensor:
        """The purified image as the caller gets it."""
        return purified


def _check_guidance(value: Any) -> None:
    check_name("guidance_gradient", value, GUIDANCE_GRADIENTS)


def _check_budget(value: Any) -> None:
    if isinstance(value, str):
        check_name("memory_budget", value, ["auto", "whole", "least"])
    elif isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"`memory_budget` is 'auto', 'whole', 'least' or a number of bytes, got {value!r}")


def _guidance_option() -> Any:
    return option(
        "exact",
        keyword="guidance_gradient",
        choices=GUIDANCE_GRADIENTS,
        help="detached: the guidance taken as a constant, as COUP's published code has it",
    )


def _budget_option() -> Any:
    return option(
        "auto",
        help="memory above the weights that a run with gradient may use: auto is up to half of what is free, whole the same "
        "with the batch never split, least keeps nothing but states, else bytes (2GiB, 500MiB)",
        parse=_budget,
        metavar="SIZE",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact(Gradient):
    """The discrete gradient of the steps that ran.

    Attributes:
        guidance: `"exact"` differentiates the guidance, too; `"detached"` takes it as a constant, as COUP's code does.
        memory_budget: Bytes above the weights that a run with gradient may use; `"auto"` takes up to half of what is free,
            `"least"` keeps nothing but states. Splits the batch only where one step of it does not fit, which changes its
            rounding (what is kept does not): `"whole"` takes as much as `"auto"`, and `"least"` as little as it can, without.

    Raises:
        ValueError: if `guidance` or `memory_budget` is something else.

    Example:
        >>> import coupfast
        >>> score = coupfast.load_score("cifar10-tiny")
        >>> chosen = coupfast.Exact(guidance="detached")
        >>> purifier = coupfast.Purifier(score, method="reverse-sde", num_steps=10, gradient=chosen)
        >>> purifier.settings.gradient.name
        'exact'
    """

    name: ClassVar[str] = "exact"
    flows: ClassVar[bool] = True
    differentiates_noise: ClassVar[bool] = True
    keeps: ClassVar[bool] = True

    guidance: Literal["exact", "detached"] = _guidance_option()
    memory_budget: Budget = _budget_option()

    def __post_init__(self) -> None:
        _check_guidance(self.guidance)
        _check_budget(self.memory_budget)

    @property
    def claims_exact(self) -> bool:  # type: ignore[override]
        return self.guidance == "exact"

    def backward_steps(self, num_steps: int) -> int:
        return num_steps

    def through(
        self, prepared: Prepared, x_k: torch.Tensor, noise: Noise, keep_states: bool, progress: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return prepared.run(x_k, noise, gradient=_wanted(x_k, noise), keep_states=keep_states, progress=progress)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surrogate(Exact):
    """The exact gradient of a coarser grid through the stored states.

    Attributes:
        steps: Of the coarser grid.
        guidance, memory_budget: As of `Exact`.

    Raises:
        TypeError: if `steps` is no int.
        ValueError: as `Exact`. How many steps there are is checked with the method's.

    Example:
        >>> import coupfast
        >>> score = coupfast.load_score("cifar10-tiny")
        >>> purifier = coupfast.Purifier(score, method="reverse-sde", num_steps=10, gradient=coupfast.Surrogate(steps=5))
        >>> purifier.settings.gradient.name
        'surrogate'
    """

    name: ClassVar[str] = "surrogate"
    differentiates_noise: ClassVar[bool] = False
    keeps: ClassVar[bool] = False

    steps: int = option(
        10, keyword="surrogate_steps", help="steps of the coarser grid of gradient surrogate", parse=int, metavar="K"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.steps, bool) or not isinstance(self.steps, (int, np.integer)):
            raise TypeError(f"`surrogate_steps` is an int, got {self.steps!r}")
        object.__setattr__(self, "steps", int(self.steps))

    @property
    def claims_exact(self) -> bool:  # type: ignore[override]
        return False

    def check(self, method: Method, num_steps: int) -> None:
        if not isinstance(method, TableMethod):
            raise ValueError(f"gradient='surrogate' needs a coarser grid, and {type(method).__name__} has none; take 'exact'")
        if type(method).coarse is TableMethod.coarse:
            method.coarse([])  # says that there is none, whatever the number of its steps
        if not 1 <= self.steps <= num_steps:
            raise ValueError(f"`surrogate_steps` is between 1 and the run's {num_steps} steps, got {self.steps}")
        method.coarse(self.chosen(num_steps))

    def chosen(self, num_steps: int) -> list[int]:
        """Indices of the states of the coarser grid, from 0 to `num_steps`."""
        return np.round(np.linspace(0, num_steps, self.steps + 1)).astype(int).tolist()

    def backward_steps(self, num_steps: int) -> int:
        return self.steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adjoint(Gradient):
    """torchsde's continuous stochastic adjoint (Li et al. 2020, arXiv:2001.01328), back over the run's own grid and noise.

    Its error depends strongly on the steps, most on the first backward one, at t = 1e-5: cosine to the exact gradient 0.21 in
    20 steps and 0.68 in 60 at t = 0.06 (`bench/adjoint_error.py`). It is the published gradient to about 1 % only with
    `num_steps=None` and `guidance="detached"`: published code starts its backward steps of 1e-3 at t = 1e-5, beside the
    forward ones (`coupfast.reference.purify_published`).

    It is one call of torchsde there and one back, and none of its steps are kept: an evaluation that is killed loses the one
    batch that was on its way, of minutes or, with large networks on a CPU, hours; `Exact` loses a step.

    Attributes:
        guidance: As of `Exact`.

    Raises:
        ValueError: if `guidance` is something else.

    Example:
        >>> import coupfast
        >>> score = coupfast.load_score("cifar10-tiny")
        >>> purifier = coupfast.Purifier(score, method="reverse-sde", num_steps=10, gradient=coupfast.Adjoint())
        >>> purifier.settings.gradient.name
        'adjoint'
    """

    name: ClassVar[str] = "adjoint"
    parameters: ClassVar[bool] = False

    guidance: Literal["exact", "detached"] = _guidance_option()

    def __post_init__(self) -> None:
        _check_guidance(self.guidance)

    def check(self, method: Method, num_steps: int) -> None:
        if not isinstance(method, DiffusionMethod) or method.solver not in ("euler-maruyama", "probability-flow"):
            solver = f" with solver {method.solver!r}" if isinstance(method, DiffusionMethod) else ""
            raise ValueError(
                f"gradient={self.name!r} solves the adjoint of an SDE, and {type(method).__name__}{solver} is none that "
                "torchsde steps through; take gradient='exact'"
            )

    def through(
        self, prepared: Prepared, x_k: torch.Tensor, noise: Noise, keep_states: bool, progress: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not (torch.is_grad_enabled() and x_k.requires_grad):
            return super().through(prepared, x_k, noise, keep_states, progress)
        if keep_states:
            raise ValueError("`return_trajectory` and torchsde's adjoint do not go together: it keeps no states")
        method = prepared.method
        assert isinstance(method, DiffusionMethod)
        x_0, _ = prepared.begin(x_k, noise)
        table = method.recipe().table
        with torch.no_grad():
            rows = torch.stack([noise.z(k, x_0) for k in range(table.num_steps)])
        score, classifier = prepared.score, prepared.classifier
        if self.parameters:
            # Copies once more, so that the integrals of their gradients end here and not in the caller's networks.
            score = frozen(score).requires_grad_(True)
            classifier = None if classifier is None else frozen(classifier).requires_grad_(True)
        with keeps_no_steps(f"a purification with gradient {self.name!r}"):
            purified = strictly(
                lambda x: reference.purify_ref(
                    x,
                    score,
                    classifier,
                    rows,
                    grid=table.t,
                    dynamics=method.solver,  # type: ignore[arg-type]  # it names its dynamics as the solvers are named
                    guidance_scale=method.scale,
                    sde=method.sde,
                    detached=self.guidance == "detached",
                    adjoint="parameters" if self.parameters else "frozen",
                ),
                x_0,
                prepared.check_unchanged,
            )
        return purified, None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdjointParameters(Adjoint):
    """`Adjoint` with the integrals of all parameter gradients, as published code computes them.

    Example:
        >>> import coupfast
        >>> score = coupfast.load_score("cifar10-tiny")
        >>> purifier = coupfast.Purifier(score, method="reverse-sde", num_steps=10, gradient=coupfast.AdjointParameters())
        >>> purifier.settings.gradient.name
        'adjoint-parameters'
    """

    name: ClassVar[str] = "adjoint-parameters"
    parameters: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class BPDA(Gradient):
    """The identity in the place of the purification's Jacobian (Athalye et al. 2018, arXiv:1802.00420).

    Example:
        >>> import coupfast
        >>> score = coupfast.load_score("cifar10-tiny")
        >>> purifier = coupfast.Purifier(score, method="reverse-sde", num_steps=10, gradient=coupfast.BPDA())
        >>> purifier.settings.gradient.name
        'bpda'
    """

    name: ClassVar[str] = "bpda"
    flows: ClassVar[bool] = False

    def finish(self, x: torch.Tensor, purified: torch.Tensor) -> torch.Tensor:
        return identity_gradient(x, purified)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoGradient(Gradient):
    """No gradient at all: purification only.

    Example:
        >>> import coupfast
        >>> score = coupfast.load_score("cifar10-tiny")
        >>> purifier = coupfast.Purifier(score, method="reverse-sde", num_steps=10, gradient=coupfast.NoGradient())
        >>> purifier.settings.gradient.name
        'none'
    """

    name: ClassVar[str] = "none"
    flows: ClassVar[bool] = False
    differentiates_noise: ClassVar[bool] = True


GRADIENTS: dict[str, type[Gradient]] = {
    mode.name: mode for mode in (Exact, Adjoint, AdjointParameters, BPDA, Surrogate, NoGradient)
}


def _wanted(x_0: torch.Tensor, noise: Noise) -> bool:
    """Whether autograd would ask for a gradient of a run from this state with this noise."""
    rows = [noise.rows, noise.second] if isinstance(noise, ReplayedNoise) else []
    return torch.is_grad_enabled() and (x_0.requires_grad or any(row is not None and row.requires_grad for row in rows))
