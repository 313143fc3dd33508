"""A purifier's networks, frozen and checked for images of one shape, and what runs its steps on them."""

from __future__ import annotations

import abc
import dataclasses
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from coupfast import budget
from coupfast.budget import Need, Plan
from coupfast.derivatives import on_its_device, outside_transforms
from coupfast.engine import BoundEngine, Noise, StepMemory
from coupfast.engine.memory import available_bytes
from coupfast.engine.networks import dtype_and_device, frozen
from coupfast.engine.precision import strict_float32
from coupfast.fingerprint import check_unchanged, plain_state, weights_fingerprint
from coupfast.gradients import Surrogate
from coupfast.integrate import Run, Storage, integrate
from coupfast.methods import Method, Networks, StepMethod, TableMethod
from coupfast.models.noise_check import check_noise_prediction
from coupfast.sde import VPSDE
from coupfast.solvers import CoefficientTable
from coupfast.step_functions import BoundSteps, StepRun, integrate_steps
from coupfast.trials import try_networks
from coupfast_kernels.guided_step import guided_step_ref

if TYPE_CHECKING:
    from torch import nn

    from coupfast.settings import Settings


class Prepared(abc.ABC):
    """Networks and an engine for images like an example.

    Args:
        settings: How to purify.
        engine: The name of the engine that runs.
        score, classifier: The caller's; frozen copies around the same weights are made of them.
        example: An image; its shape, dtype and device are those of all images to come.

    Raises:
        TypeError, ValueError: if images or networks do not fit each other or the method; the message says which.
    """

    bound: BoundEngine | BoundSteps

    def __init__(
        self, settings: Settings, engine: str, score: nn.Module, classifier: nn.Module | None, example: torch.Tensor
    ) -> None:
        self.settings, self.engine, self.num_steps = settings, engine, settings.num_steps
        self.image_shape, self.dtype = tuple(example.shape[1:]), example.dtype
        settings.method.check_shape(self.image_shape)
        self.score = frozen(score)
        self.classifier = None if classifier is None else frozen(classifier)
        found = dtype_and_device(self.score)
        self.device = found[1] if found else torch.device("cpu")
        self._plans: dict[int, Plan] = {}
        with strict_float32(example.device.type):
            try_networks(self.score, self.classifier, example)
            weights = weights_fingerprint(self.score, self.classifier)
            sde = getattr(self.method, "sde", None)  # of somebody else's method it may be anything
            _look_at_prediction(self.score, example, sde if isinstance(sde, VPSDE) else None)
            self.check_unchanged = functools.partial(check_unchanged, weights, self.score, self.classifier)
            with on_its_device(example.device):
                self._build(example)

    @property
    def method(self) -> Method:
        return self.settings.method

    @abc.abstractmethod
    def _build(self, example: torch.Tensor) -> None:
        """Make what runs the steps."""

    @abc.abstractmethod
    def run(
        self, x_k: torch.Tensor, noise: Noise, *, gradient: bool, keep_states: bool, progress: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """From the (clipped) image in the [-1, 1] scale to the last state, and all states (steps + 1, …) if asked for."""

    def begin(self, x_k: torch.Tensor, noise: Noise) -> tuple[torch.Tensor, torch.Tensor]:
        """(x_0, x_in): the state before step 0, and the one before its forward noising."""
        return x_k, x_k

    def plan(self, batch: int) -> Plan:
        """What a run of so many images with its gradient will store and evaluate; it may not fit."""
        if batch not in self._plans:
            with outside_transforms(), on_its_device(self.device), strict_float32(self.device.type):
                self._plans[batch] = self._plan(batch)
        return self._plans[batch]

    def _plan(self, batch: int) -> Plan:
        gradient, bound = self.settings.gradient, self.bound
        steps_back = gradient.backward_steps(self.num_steps)
        state_bytes, may_keep = self._states()
        need = Need(
            batch=batch,
            shape=self.image_shape,
            num_steps=self.num_steps,
            backward_steps=steps_back,
            image_bytes=self._image_bytes(),
            state_bytes=state_bytes,
            may_keep=may_keep,
            largest_batch=bound.largest_batch,
            memory=lambda piece: _in_proportion(bound.memory, piece),
        )
        return budget.make_plan(
            need,
            getattr(gradient, "memory_budget", "auto"),
            free=available_bytes(self.device),
            engine=bound.engine,
            weights_bytes=lambda piece: bound.weights_bytes(min(piece, LARGEST_PLANNED), gradient=steps_back > 0),
            evaluations=bound.evaluations(),
            asked=self._asked(),
        )

    def _asked(self) -> dict[str, list[bool]]:
        """Which steps ask which network, where not all do."""
        return {}

    @abc.abstractmethod
    def _states(self) -> tuple[int, bool]:
        """Bytes of one image's state, and whether a step may keep more than that for its gradient."""

    def _image_bytes(self) -> int:
        return int(np.prod(self.image_shape)) * self.dtype.itemsize

    def _storage(self, batch: int, largest: int | None, gradient: bool) -> Storage:
        # Without a gradient a run holds two states and one layer's activations: there is nothing to plan.
        if not gradient:
            return Storage(min(batch, largest or batch))
        plan = self.plan(batch)
        plan.check_fits()
        return plan.storage

    def _bar(self, storage: Storage, batch: int, progress: bool) -> tqdm:
        total = len(storage.pieces(batch)) * self.num_steps
        return tqdm(total=total, desc="purify", unit="step", disable=not progress, leave=False)


#: Networks that were looked at, by what they are: many purifiers are made around equal ones.
_LOOKED_AT: set[tuple[object, ...]] = set()


def _look_at_prediction(score: nn.Module, example: torch.Tensor, sde: VPSDE | None) -> None:
    """Warn where a noised image of known noise tells that the score net predicts something else than that noise.

    Args:
        sde: The schedule that the method takes the network to be of; None is the published one.
    """
    # A class of the same name may be another one (a notebook's cell, run again), and a function that it holds another function.
    # References and not addresses, which what comes later may have again.
    code: list[object] = [weakref.ref(type(module)) for module in score.modules()]
    code += [weakref.ref(value) for module in score.modules() for value in vars(module).values() if inspect.isfunction(value)]
    what = (weights_fingerprint(score), str(plain_state(score)), str(sde), *code)
    if what in _LOOKED_AT or bool(example.std() == 0.0):  # a plan's blank image tells nothing
        return
    _LOOKED_AT.add(what)
    try:
        check_noise_prediction(score, example, sde=sde)
    except (TypeError, ValueError) as error:
        warnings.warn(str(error), stacklevel=2)


#: Batches up to which memory is planned to the byte; beyond, in proportion: a plan of a million images makes nothing so large.
LARGEST_PLANNED = 4096


def _in_proportion(memory: Callable[[int], StepMemory], batch: int) -> StepMemory:
    if batch <= LARGEST_PLANNED:
        return memory(batch)
    sizes = dataclasses.astuple(memory(LARGEST_PLANNED))
    return StepMemory(*(-(-size * batch // LARGEST_PLANNED) for size in sizes))


class PreparedTable(Prepared):
    """Of a method that is a table: an engine bound to networks."""

    bound: BoundEngine

    def _build(self, example: torch.Tensor) -> None:
        method = self.method
        assert isinstance(method, TableMethod)
        self.recipe = method.recipe()
        gradient, engine = self.settings.gradient, self.settings.engine

        def bound(table: CoefficientTable) -> BoundEngine:
            return engine.prepare(self.engine, self.score, self.classifier, table, example, gradient.differentiates_guidance)

        self.bound = bound(self.recipe.table)
        self.surrogate: tuple[BoundEngine, list[int]] | None = None
        if isinstance(gradient, Surrogate):
            chosen = gradient.chosen(self.num_steps)
            self.surrogate = (bound(method.coarse(chosen)), chosen[:-1])

    def begin(self, x_k: torch.Tensor, noise: Noise) -> tuple[torch.Tensor, torch.Tensor]:
        if self.recipe.noising is None:
            return x_k, x_k
        a, d = self.recipe.noising
        with strict_float32(x_k.device.type):
            return guided_step_ref(x_k, torch.zeros_like(x_k), None, (a, 0.0, 0.0, d), noise.z(-1, x_k)), x_k

    def run(
        self, x_k: torch.Tensor, noise: Noise, *, gradient: bool, keep_states: bool, progress: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x_0, x_in = self.begin(x_k, noise)
        storage = self._storage(len(x_0), self.bound.largest_batch, gradient)
        run = Run(
            self.bound,
            noise,
            storage,
            keep_states=keep_states,
            check=self.check_unchanged,
            surrogate=self.surrogate,
        )
        with self._bar(storage, len(x_0), progress) as bar:
            run.progress = bar.update
            x_last = integrate(x_0, run, gradient=gradient, x_in=x_in if self.recipe.table.e is not None else None)
        return x_last, torch.stack([state.detach() for state in run.states]) if keep_states else None

    def _states(self) -> tuple[int, bool]:
        return self._image_bytes(), self.settings.gradient.keeps

    def _asked(self) -> dict[str, list[bool]]:
        table, steps = self.recipe.table, range(self.num_steps)
        return {"score": [table.evaluates(k) for k in steps], "classifier": [table.guides(k) for k in steps]}


class PreparedSteps(Prepared):
    """Of a method that is a step function: PyTorch runs it."""

    bound: BoundSteps

    def _build(self, example: torch.Tensor) -> None:
        method = self.method
        assert isinstance(method, StepMethod)
        networks = Networks(self.score, self.classifier, detached=not self.settings.gradient.differentiates_guidance)
        self.bound = BoundSteps(method, networks, 2.0 * example - 1.0)

    def run(
        self, x_k: torch.Tensor, noise: Noise, *, gradient: bool, keep_states: bool, progress: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        storage = self._storage(len(x_k), None, gradient)
        run = StepRun(self.bound, noise, storage, keep_states=keep_states, check=self.check_unchanged)
        with self._bar(storage, len(x_k), progress) as bar:
            run.progress = bar.update
            x_last = integrate_steps(x_k, run, gradient=gradient)
        return x_last, torch.stack(run.trajectory()) if keep_states else None

    def _states(self) -> tuple[int, bool]:
        return self.bound.state_bytes(), False


def prepare(settings: Settings, engine: str, score: nn.Module, classifier: nn.Module | None, example: torch.Tensor) -> Prepared:
    """What runs a purifier of these settings on images like `example`."""
    kind: Callable[..., Prepared] = PreparedTable if isinstance(settings.method, TableMethod) else PreparedSteps
    return kind(settings, engine, score, classifier, example)
