"""The definition of a solver by its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from coupfast.reference.guided_noise import GuidedNoise
from coupfast.reference.samplers import (
    StepNoise,
    ancestral_ref,
    ddim_ref,
    dpm_solver_pp_2m_ref,
    exponential_ref,
    reverse_diffusion_ref,
    sde_dpm_solver_1_ref,
)
from coupfast.reference.sde import purify_ref

#: Solvers that `solve_ref` defines.
DEFINED = (
    *("euler-maruyama", "probability-flow", "reverse-diffusion", "exponential", "ddim", "ancestral"),
    *("sde-dpm-solver-1", "dpm-solver++-2m", "sde-dpm-solver++-2m"),
)


def solve_ref(
    name: str,
    state: tuple[torch.Tensor, ...],
    predicted: GuidedNoise,
    z: StepNoise,
    grid: np.ndarray,
    steps: range,
    knobs: Mapping[str, Any],
) -> tuple[torch.Tensor, ...]:
    """Some of the steps of a solver on a grid.

    Args:
        name: One of `DEFINED`.
        state: (x,), and the predicted image of the step before where a two-step solver goes on.
        predicted: The networks; whether x̂0 is clipped follows from the knobs.
        z: The noise of a step.
        grid: All times.
        steps: The indices of those that are taken.
        knobs: The solver's.

    Returns:
        The state after them, in the same notation.
    """
    knobs = dict(knobs)
    predicted = dataclasses.replace(predicted, clip=knobs.pop("clip_denoised", False))
    x = state[0]
    if name in ("euler-maruyama", "probability-flow"):
        # The SDE itself, through torchsde: not even the coefficients are shared.
        end = purify_ref(
            x,
            predicted.score,
            predicted.classifier,
            torch.stack([z(k) for k in steps]),
            grid=grid[steps.start : steps.stop + 1],
            dynamics=name,
            guidance_scale=predicted.guidance_scale,
            sde=predicted.sde,
            detached=predicted.detached,
        )
        return (end,)
    if name in ("dpm-solver++-2m", "sde-dpm-solver++-2m"):
        return dpm_solver_pp_2m_ref(state, predicted, z, grid, steps, stochastic=name.startswith("sde"), **knobs)
    if name == "ddim":
        return (ddim_ref(x, predicted, z, grid, steps, **knobs),)
    if name == "ancestral":
        return (ancestral_ref(x, predicted, z, grid, steps, **knobs),)
    plain = {"sde-dpm-solver-1": sde_dpm_solver_1_ref, "exponential": exponential_ref}
    return ((plain | {"reverse-diffusion": reverse_diffusion_ref})[name](x, predicted, z, grid, steps),)
