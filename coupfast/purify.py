"""Purification of images: `purify`, `Purifier` and `PurifiedClassifier`.

The only module that changes ranges: images are in [0, 1] outside and become states in [-1, 1] inside. It also owns the
noise: nothing here reads or advances torch's global generator.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from coupfast import adjoint, reference
from coupfast.defenses import METHODS, Recipe, recipe
from coupfast.engine import CounterNoise, Noise, Programs, ReplayedNoise, StepMemory, cpu, cuda, eager
from coupfast.engine.memory import available_bytes
from coupfast.engine.networks import check_eval, dtype_and_device, frozen, weights_identity
from coupfast.engine.precision import strict_float32
from coupfast.sde import VPSDE, check_num_steps, check_t
from coupfast.solvers import SOLVERS
from coupfast_kernels.guided_step import guided_step_ref

logger = logging.getLogger(__name__)

ENGINES: dict[str, Callable[..., Programs]] = {"eager": eager.prepare, "cpu": cpu.prepare, "cuda": cuda.prepare}
PRECISIONS = cuda.PRECISIONS
#: What runs without tensor cores, hence everywhere; the others are the cuda engine's.
FLOAT32_PRECISIONS = ("strict", "fast")
GRADIENTS = ("exact", "adjoint", "adjoint-parameters", "bpda", "surrogate", "none")
GUIDANCE_GRADIENTS = ("exact", "detached")

# States, masks and images that a run holds besides x_0 … x_K: the caller's image, its scaling and clip, the result's clip
# and scaling, and v before and after a step.
EXTRA_IMAGES = 8


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one purification of a batch, with its gradient, will store and evaluate.

    Attributes:
        batch: Images.
        engine: The engine that will run.
        num_steps: Steps of the table.
        storage: Images at a time, what is kept.
        step: Bytes of one step of a piece, above states and weights.
        states_bytes: All states of the batch.
        slopes_bytes, activations_bytes: All slopes and activations that are kept.
        weights_bytes: Transformed weights that the engine keeps beside the networks' own.
        peak_bytes: Predicted peak above all weights, the caller's own `noise` not counted.
        least_bytes: The least `memory_budget` that this batch can run in.
        budget_bytes: The budget that the plan was made for.
        evaluations: Predicted network evaluations of the whole batch, forward and backward pass together, by kind.
    """

    batch: int
    engine: str
    num_steps: int
    storage: adjoint.Storage
    step: StepMemory
    states_bytes: int
    slopes_bytes: int
    activations_bytes: int
    weights_bytes: int
    peak_bytes: int
    least_bytes: int
    budget_bytes: int
    evaluations: dict[str, int]

    def __str__(self) -> str:
        kept = ["all states"]
        if self.storage.slopes:
            kept.append("the classifier's slopes as bits")
        if self.storage.kept_steps:
            kept.append(f"the activations of the last {self.storage.kept_steps} steps")
        counts = ", ".join(f"{count} {kind}" for kind, count in self.evaluations.items())
        return (
            f"{self.batch} images, {self.num_steps} steps, engine {self.engine}, {self.storage.piece} images at a time\n"
            f"keeps {', '.join(kept)}\n"
            f"transformed weights {self.weights_bytes / 2**20:.1f} MiB; "
            f"predicted peak {self.peak_bytes / 2**20:.1f} MiB above all weights (budget {self.budget_bytes / 2**20:.1f}, "
            f"least {self.least_bytes / 2**20:.1f})\n"
            f"network evaluations, forward and backward: {counts}"
        )


class Purifier(nn.Module):
    """Purification with options fixed once; see `purify` for what each means.

    Args:
        score: Noise prediction network, (x_k in the [-1, 1] scale, labels = 999 t) → eps_hat; in eval mode.
        classifier: Images in [0, 1] → logits; needed by guided methods; in eval mode.
        Others: See `purify`.

    Attributes:
        last_seed: The seed of the last call's noise (the one drawn, where None was given).
        num_steps: Steps of a run.
    """

    def __init__(
        self,
        score: nn.Module,
        classifier: nn.Module | None = None,
        *,
        method: str = "coup",
        t: float = 0.1,
        guidance_scale: float = 1.0,
        num_steps: int | None = None,
        solver: str = "euler-maruyama",
        sde: VPSDE = VPSDE(),
        engine: str = "auto",
        precision: str = "strict",
        engine_options: Mapping[str, bool] | None = None,
        gradient: str = "exact",
        guidance_gradient: Literal["exact", "detached"] = "exact",
        surrogate_steps: int = 10,
        memory_budget: int | Literal["auto", "least"] = "auto",
        clamp: bool = True,
    ) -> None:
        super().__init__()
        _check_name("method", method, METHODS)
        _check_name("solver", solver, SOLVERS)
        _check_name("engine", engine, ["auto", *ENGINES])
        _check_name("precision", precision, PRECISIONS)
        _check_name("gradient", gradient, GRADIENTS)
        _check_name("guidance_gradient", guidance_gradient, GUIDANCE_GRADIENTS)
        if not isinstance(guidance_scale, (int, float, np.floating, np.integer)) or not 0.0 <= guidance_scale < float("inf"):
            raise ValueError(f"`guidance_scale` is a finite number >= 0, got {guidance_scale!r}; the paper uses 1.0")
        if METHODS[method].guidance and classifier is None:
            raise ValueError(
                f"method {method!r} follows a classifier's confidence and needs `classifier`; without one use 'reverse-sde'"
            )
        if isinstance(memory_budget, str):
            _check_name("memory_budget", memory_budget, ["auto", "least"])
        elif isinstance(memory_budget, bool) or not isinstance(memory_budget, int) or memory_budget < 0:
            raise ValueError(f"`memory_budget` is 'auto', 'least' or a number of bytes, got {memory_budget!r}")
        self.score = _check_network(score, "score net")
        self.classifier = _check_network(classifier, "classifier") if METHODS[method].guidance else None
        self.method, self.t, self.solver = method, check_t(t), solver
        self.guidance_scale, self.sde = float(guidance_scale), sde
        self._engine = engine
        self._chosen: str | None = None
        self.precision, self.gradient, self.guidance_gradient = precision, gradient, guidance_gradient
        self.engine_options = dict(engine_options or {})
        cuda.Options.of(self.engine_options)
        self.memory_budget, self.clamp = memory_budget, bool(clamp)
        self.recipe: Recipe = self._recipe(check_num_steps(num_steps))
        self.num_steps = self.recipe.table.num_steps
        if isinstance(surrogate_steps, bool) or not isinstance(surrogate_steps, (int, np.integer)):
            raise TypeError(f"`surrogate_steps` is an int, got {surrogate_steps!r}")
        if gradient == "surrogate" and not 1 <= surrogate_steps <= self.num_steps:
            raise ValueError(f"`surrogate_steps` is between 1 and the run's {self.num_steps} steps, got {surrogate_steps}")
        self.surrogate_steps = surrogate_steps
        self.last_seed: int | None = None
        self._prepared: OrderedDict[Any, _Prepared] = OrderedDict()
        self.eval()

    @property
    def engine(self) -> str:
        """The engine that runs; with "auto" it follows the score network's dtype and device."""
        if self._engine != "auto":
            return self._engine
        chosen, reason = _choose_engine(self.score)
        if self._chosen != chosen:
            self._chosen = chosen
            logger.info("engine='auto' chose %r%s", chosen, f": {reason}" if reason else "")
        return chosen

    def _recipe(self, num_steps: int | None, times: np.ndarray | None = None) -> Recipe:
        return recipe(
            METHODS[self.method],
            sde=self.sde,
            t=self.t if times is None else times,
            num_steps=num_steps,
            solver=self.solver,
            guidance_scale=self.guidance_scale,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without programs, which point into memory of these weights: a copy makes its own when it is first called."""
        return {**self.__dict__, "_prepared": OrderedDict()}

    def extra_repr(self) -> str:
        return (
            f"method={self.method!r}, t={self.t}, num_steps={self.num_steps}, guidance_scale={self.guidance_scale}, "
            f"engine={self.engine!r}, gradient={self.gradient!r}"
        )

    def forward(
        self,
        x: torch.Tensor,
        *,
        seed: int | None = None,
        ids: Sequence[int] | torch.Tensor | None = None,
        draw: int | torch.Tensor = 0,
        noise: torch.Tensor | None = None,
        return_trajectory: bool = False,
        progress: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Purified images; see `purify`."""
        if torch.is_inference_mode_enabled():
            # Guidance is a gradient, which inference mode would not record even where gradients are enabled again.
            with torch.inference_mode(False), torch.no_grad():
                return self.forward(
                    x.clone() if isinstance(x, torch.Tensor) else x,
                    seed=seed,
                    ids=ids,
                    draw=draw,
                    noise=noise,
                    return_trajectory=return_trajectory,
                    progress=progress,
                )
        prepared = self._prepare(x)
        source = self._noise(x, seed=seed, ids=ids, draw=draw, noise=noise)
        purified, trajectory = self._integrate(prepared, x, source, return_trajectory, progress)
        if self.gradient == "bpda":
            purified = adjoint.identity_gradient(x, purified)
        return purified if trajectory is None else (purified, trajectory)

    def plan(self, batch: int, *, image_shape: tuple[int, int, int] | None = None) -> Plan:
        """What a run of `batch` images with its gradient will store and evaluate, before it runs.

        One image takes one step and back, once for a purifier, to see what that needs.

        Args:
            batch: Images.
            image_shape: (channels, height, width); None takes the score net's own.

        Raises:
            ValueError: if `memory_budget` is below the least that is possible (which the message says).
        """
        if image_shape is None:
            size, channels = getattr(self.score, "image_size", None), getattr(self.score, "channels", None)
            if size is None or channels is None:
                raise ValueError("this score net does not say its image size; give `image_shape=(channels, height, width)`")
            image_shape = (int(channels), int(size), int(size))
        if self.gradient in ("adjoint", "adjoint-parameters"):
            raise ValueError("the memory of a continuous adjoint is torchsde's and cannot be planned here")
        dtype, device = dtype_and_device(self.score) or (torch.float32, torch.device("cpu"))
        with torch.inference_mode(False):
            return self._prepare(torch.zeros(batch, *image_shape, dtype=dtype, device=device)).plan(batch)

    def _prepare(self, x: torch.Tensor) -> _Prepared:
        """Programs for images like `x`, after all checks; kept until the weights, the shape or the device change."""
        _check_images(x)
        for network, name in ((self.score, "score net"), (self.classifier, "classifier")):
            if network is not None:
                check_eval(network, name)
                _check_against(network, name, x)
        key = (tuple(x.shape[1:]), x.dtype, x.device, weights_identity(self.score), weights_identity(self.classifier))
        prepared = self._prepared.get(key)
        if prepared is None:
            prepared = self._prepared[key] = _Prepared(self, x)
            while len(self._prepared) > 4:
                self._prepared.popitem(last=False)
        return prepared

    def _noise(
        self,
        x: torch.Tensor,
        *,
        seed: int | None,
        ids: Sequence[int] | torch.Tensor | None,
        draw: int | torch.Tensor,
        noise: torch.Tensor | None,
    ) -> Noise:
        if noise is not None:
            wanted = (self.recipe.num_noises, *x.shape)
            if not isinstance(noise, torch.Tensor) or tuple(noise.shape) != wanted:
                found = tuple(noise.shape) if isinstance(noise, torch.Tensor) else type(noise).__name__
                extra = ", the last row being the forward noising's" if self.recipe.noising else ""
                raise ValueError(f"`noise` must have shape {wanted} (one row a step{extra}), got {found}")
            if noise.dtype != x.dtype or noise.device != x.device:
                raise ValueError(f"`noise` is {noise.dtype} on {noise.device}, the images are {x.dtype} on {x.device}")
            if not bool(torch.isfinite(noise).all()):
                raise ValueError("`noise` has values that are not finite")
            if noise.requires_grad and torch.is_grad_enabled() and self.gradient not in ("exact", "none"):
                raise ValueError(f"the gradient of `noise` exists with gradient='exact' only, not with {self.gradient!r}")
            self.last_seed = None
            return ReplayedNoise(noise)
        if seed is None:
            seed = secrets.randbits(63)
        elif isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**64:
            raise ValueError(f"`seed` is an integer in [0, 2**64), got {seed!r}")
        self.last_seed = int(seed)  # for the caller to read; another of its threads may write it at any moment
        ids = torch.arange(len(x)) if ids is None else ids
        return CounterNoise(
            int(seed),
            _words("ids", ids, len(x), x.device),
            _words("draw", [draw] * len(x) if isinstance(draw, (int, np.integer)) else draw, len(x), x.device),
        )

    def _integrate(
        self, prepared: _Prepared, x: torch.Tensor, noise: Noise, return_trajectory: bool, progress: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        differentiable = self.gradient not in ("bpda", "none")
        with torch.set_grad_enabled(torch.is_grad_enabled() and differentiable):
            with strict_float32(x.device.type):
                x_k = 2.0 * x - 1.0
                if self.clamp:
                    x_k = _clip(x_k)
                if self.recipe.noising is not None:
                    a, d = self.recipe.noising
                    x_k = guided_step_ref(x_k, torch.zeros_like(x_k), None, (a, 0.0, 0.0, d), noise.z(-1, x_k))
            if self.gradient in ("adjoint", "adjoint-parameters") and torch.is_grad_enabled() and x_k.requires_grad:
                if return_trajectory:
                    raise ValueError("`return_trajectory` and torchsde's adjoint do not go together: it keeps no states")
                x_k = self._continuous_adjoint(prepared, x_k, noise)
                states = None
            else:
                x_k, states = self._steps(prepared, x_k, noise, return_trajectory, progress)
            if not bool(torch.isfinite(x_k).all()):
                raise FloatingPointError(
                    f"{int((~torch.isfinite(x_k)).sum())} of {x_k.numel()} purified values are not finite: look at the "
                    f"networks' weights and at their outputs on these images (`return_trajectory=True` on a shorter run)"
                )
            with strict_float32(x.device.type):
                if self.clamp:
                    x_k = _clip(x_k)
                purified = (x_k + 1.0) * 0.5
        return purified, states

    def _steps(
        self, prepared: _Prepared, x_k: torch.Tensor, noise: Noise, return_trajectory: bool, progress: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        differentiable = self.gradient in ("exact", "surrogate") and adjoint.wanted(x_k, noise)
        # Without a gradient a run holds two states and one layer's activations: there is nothing to plan.
        piece = min(len(x_k), prepared.programs.largest_batch or len(x_k))
        storage = prepared.plan(len(x_k)).storage if differentiable else adjoint.Storage(piece)
        run = adjoint.Run(prepared.programs, noise, storage, keep_states=return_trajectory)
        if self.gradient == "surrogate":
            run.surrogate = prepared.surrogate
        pieces = len(run.pieces(len(x_k)))
        with tqdm(total=pieces * self.num_steps, desc="purify", unit="step", disable=not progress, leave=False) as bar:
            run.progress = bar.update
            x_k = adjoint.integrate(x_k, run, gradient=differentiable)
        return x_k, torch.stack([state.detach() for state in run.states]) if return_trajectory else None

    def _continuous_adjoint(self, prepared: _Prepared, x_k: torch.Tensor, noise: Noise) -> torch.Tensor:
        """The same steps through torchsde, whose backward pass solves the adjoint SDE (Li et al. 2020)."""
        with torch.no_grad():
            rows = torch.stack([noise.z(k, x_k) for k in range(self.num_steps)])
        score, classifier = prepared.score, prepared.classifier
        if self.gradient == "adjoint-parameters":
            # Copies once more, so that the integrals of their gradients end here and not in the caller's networks.
            score = frozen(score).requires_grad_(True)
            classifier = None if classifier is None else frozen(classifier).requires_grad_(True)
        return adjoint.strictly(
            lambda x: reference.purify_ref(
                x,
                score,
                classifier,
                rows,
                grid=self.recipe.table.t,
                dynamics=self.solver,  # the definition names its dynamics as the solvers are named, and refuses others
                guidance_scale=self.guidance_scale,
                sde=self.sde,
                detached=self.guidance_gradient == "detached",
                adjoint="parameters" if self.gradient == "adjoint-parameters" else "frozen",
            ),
            x_k,
        )


class _Prepared:
    """A purifier's networks, frozen and checked for images of one shape, and the programs that run them."""

    def __init__(self, purifier: Purifier, x: torch.Tensor) -> None:
        self.purifier = purifier
        self.image_shape, self.dtype = x.shape[1:], x.dtype
        self.score = frozen(purifier.score)
        self.classifier = None if purifier.classifier is None else frozen(purifier.classifier)
        example = x[:1].detach()
        with strict_float32(x.device.type):
            _try_networks(self.score, self.classifier, example)
            self.programs = self._programs(purifier.recipe, example)
            self.surrogate: tuple[Programs, list[int]] | None = None
            if purifier.gradient == "surrogate":
                chosen = np.round(np.linspace(0, purifier.num_steps, purifier.surrogate_steps + 1)).astype(int).tolist()
                coarse = purifier._recipe(None, purifier.recipe.table.t[chosen])
                self.surrogate = (self._programs(coarse, example), chosen[:-1])
        self._plans: dict[int, Plan] = {}

    def _programs(self, recipe: Recipe, example: torch.Tensor) -> Programs:
        purifier = self.purifier
        options: dict[str, Any] = {}
        if purifier.engine == "cuda":
            options = {"precision": purifier.precision, "options": purifier.engine_options}
        elif purifier.precision not in FLOAT32_PRECISIONS or purifier.engine_options:
            found = f"engine_options={purifier.engine_options}" if purifier.engine_options else f"{purifier.precision!r}"
            raise ValueError(f"{found} is for the cuda engine; this purifier runs on {purifier.engine!r}")
        return ENGINES[purifier.engine](
            self.score,
            self.classifier,
            recipe.table,
            example,
            differentiate_guidance=purifier.guidance_gradient == "exact",
            **options,
        )

    def plan(self, batch: int) -> Plan:
        if batch not in self._plans:
            with strict_float32(self.purifier_device.type):
                self._plans[batch] = self._make_plan(batch)
        return self._plans[batch]

    def _make_plan(self, batch: int) -> Plan:
        steps = self.purifier.num_steps
        image = int(np.prod(self.image_shape)) * self.dtype.itemsize
        differentiable, exact = self.purifier.gradient in ("exact", "surrogate"), self.purifier.gradient == "exact"
        stored_states = steps + 1 if differentiable else 1
        states = (stored_states - 1 + EXTRA_IMAGES) * batch * image

        def peak(piece: int, slopes: bool, kept_steps: int) -> int:
            step = self.programs.memory(piece)
            kept = steps * (self.programs.memory(batch).slopes if slopes else 0)
            activations = kept_steps * (step.activations - (step.slopes if slopes else 0))
            at_once = [step.forward, step.transpose if differentiable and kept_steps < steps else 0]
            if kept_steps:
                at_once += [activations + step.transpose_kept, activations - step.activations + step.forward_keeping]
            return states + kept + max(at_once)

        least = peak(1, False, 0)
        budget = self.purifier.memory_budget
        if budget == "auto":
            allowed = available_bytes(self.purifier_device) // 2
        elif budget == "least":
            allowed = peak(batch, False, 0)
        else:
            allowed = int(budget)
            if allowed < least:
                raise ValueError(
                    f"`memory_budget` is {allowed} bytes; {batch} images of shape {tuple(self.image_shape)} in {steps} steps "
                    f"need at least {least} ({least / 2**20:.1f} MiB), one image at a time"
                )
        piece = min(batch, self.programs.largest_batch or batch)
        while piece > 1 and peak(piece, False, 0) > allowed:
            piece = (piece + 1) // 2
        if budget == "auto" and peak(piece, False, 0) > allowed:
            raise MemoryError(
                f"{batch} images in {steps} steps need {least / 2**20:.0f} MiB even one image at a time, and half of the free "
                f"memory is {allowed / 2**20:.0f} MiB; use fewer images a call, or give `memory_budget` in bytes"
            )
        if piece < batch and budget == "auto":
            logger.info("%d images do not fit at once: purifying %d at a time", batch, piece)
        slopes = exact and self.programs.memory(1).slopes > 0 and peak(piece, True, 0) <= allowed
        kept_steps = 0
        one = self.programs.memory(piece)
        if piece == batch and budget != "least" and exact and one.activations > one.slopes:
            while kept_steps < steps and peak(piece, slopes, kept_steps + 1) <= allowed:
                kept_steps += 1
        storage = adjoint.Storage(piece, slopes, kept_steps)
        return Plan(
            batch=batch,
            engine=self.programs.engine,
            num_steps=steps,
            storage=storage,
            step=self.programs.memory(piece),
            states_bytes=stored_states * batch * image,
            slopes_bytes=steps * self.programs.memory(batch).slopes if slopes else 0,
            activations_bytes=kept_steps * self.programs.memory(piece).activations,
            weights_bytes=self.programs.weights_bytes(piece, gradient=differentiable),
            peak_bytes=peak(piece, slopes, kept_steps),
            least_bytes=least,
            budget_bytes=allowed,
            evaluations=self._evaluations(batch, storage),
        )

    @property
    def purifier_device(self) -> torch.device:
        found = dtype_and_device(self.score)
        return found[1] if found else torch.device("cpu")

    def _evaluations(self, batch: int, storage: adjoint.Storage) -> dict[str, int]:
        pieces, steps = -(-batch // storage.piece), self.purifier.num_steps
        kinds = self.programs.evaluations()
        backward = {"exact": steps, "surrogate": self.purifier.surrogate_steps}.get(self.purifier.gradient, 0)
        rebuilt = backward - storage.kept_steps
        counts: dict[str, int] = {}
        parts = [("step", steps), ("slopes" if storage.slopes else "rebuild", rebuilt), ("activations", storage.kept_steps)]
        for kind, times in parts:
            for name, each in kinds[kind].items():
                counts[name] = counts.get(name, 0) + each * times * pieces
        return {name: count for name, count in counts.items() if count}


class PurifiedClassifier(nn.Module):
    """A classifier behind a purifier: images in [0, 1] → logits of the purified images.

    Args:
        purifier: Purifies.
        classifier: Classifies what comes out; may be the purifier's own.
        seed: Fixes all noise of this defense.

    Attributes:
        next_draw: The draw that the next call without `draw` takes; readable, settable, and in `state_dict`. Every such
            call takes the next one, so repeated calls see fresh noise, and a restored counter repeats them bit for bit.
    """

    def __init__(self, purifier: Purifier, classifier: nn.Module, seed: int = 0) -> None:
        super().__init__()
        if not isinstance(purifier, Purifier):
            raise TypeError(f"`purifier` is a coupfast.Purifier, got {type(purifier).__name__}")
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**64:
            raise ValueError(f"`seed` is an integer in [0, 2**64), got {seed!r}")
        self.purifier = purifier
        self.classifier = _check_network(classifier, "classifier")
        self.seed = int(seed)
        self._next_draw = 0
        self._frozen: tuple[Any, nn.Module] | None = None
        self.eval()

    @property
    def next_draw(self) -> int:
        return self._next_draw

    @next_draw.setter
    def next_draw(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < 2**32:
            raise ValueError(f"`next_draw` is an integer in [0, 2**32), got {value!r}")
        self._next_draw = int(value)

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor([self._next_draw], dtype=torch.int64)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.next_draw = int(state[0])

    def forward(
        self,
        x: torch.Tensor,
        *,
        ids: Sequence[int] | torch.Tensor | None = None,
        draw: int | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits (batch, classes) of the purified images.

        Args:
            x: Images in [0, 1], shape (batch, channels, height, width).
            ids: Image ids, which with `draw` name the noise; None means 0 … batch − 1.
            draw: An int or (batch,) ints; None takes the counter's next.
        """
        _check_images(x)
        check_eval(self.classifier, "classifier")
        _check_against(self.classifier, "classifier", x)
        if draw is None:
            draw = self._next_draw
            self.next_draw = (draw + 1) % 2**32
        purified = self.purifier(x, seed=self.seed, ids=ids, draw=draw)
        identity = weights_identity(self.classifier)
        if self._frozen is None or self._frozen[0] != identity:
            self._frozen = (identity, frozen(self.classifier))
        return adjoint.strictly(self._frozen[1], purified)


def purify(
    x: torch.Tensor,
    score: nn.Module,
    classifier: nn.Module | None = None,
    *,
    method: str = "coup",
    t: float = 0.1,
    guidance_scale: float = 1.0,
    num_steps: int | None = None,
    solver: str = "euler-maruyama",
    sde: VPSDE = VPSDE(),
    engine: str = "auto",
    precision: str = "strict",
    engine_options: Mapping[str, bool] | None = None,
    gradient: str = "exact",
    guidance_gradient: Literal["exact", "detached"] = "exact",
    surrogate_steps: int = 10,
    memory_budget: int | Literal["auto", "least"] = "auto",
    clamp: bool = True,
    seed: int | None = None,
    ids: Sequence[int] | torch.Tensor | None = None,
    draw: int | torch.Tensor = 0,
    noise: torch.Tensor | None = None,
    return_trajectory: bool = False,
    progress: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Integrate the guided reverse VP-SDE from time `t` to 1e-5, starting at `x`.

    Args:
        x: Images in [0, 1], shape (batch, channels, height, width), float32 or float64 like the networks.
        score: Noise prediction network, (x_k in the [-1, 1] scale, labels = 999 t) → eps_hat; in eval mode.
        classifier: Images in [0, 1] → logits, in eval mode; needed by guided methods.
        method: `"coup"`, `"reverse-sde"` (COUP without guidance) or `"diffpure"` (forward noising to `t` first, no guidance).
        t: Purification time t* in (1e-5, 1]; step 100 of 1000 is 0.1.
        guidance_scale: λ of the paper, at least 0.
        num_steps: That many equal steps; None is the reference grid (steps of 1e-3, the last one shorter).
        solver: `"euler-maruyama"`, or `"probability-flow"` (Euler on the ODE, no noise).
        sde: The VP-SDE; β from 0.1 to 20 unless given.
        engine: `"eager"`, PyTorch operation by operation; `"cpu"`, this project's kernels for float32 on a CPU; `"cuda"`,
            compiled networks, this project's kernels and CUDA graphs for float32 on a GPU; `"auto"` takes the fastest one that
            can run here and logs which.
        precision: `"strict"`: fp32 as IEEE 754 has it (or float64, as given), whatever the caller's autocast and TF32 settings,
            and nothing with more than four times PyTorch's own rounding error. `"fast"` allows fp32 algorithms with errors up
            to 1e-5. `"3xtf32"` and `"tf32"` use a GPU's tensor cores (engine `"cuda"` only): with every product of the 3x3
            convolutions split in three, close to fp32; and with products of 11 bits.
        engine_options: Parts of the cuda engine to switch off, to find out which is at fault: `compile`, `graphs`, `triton`.
        gradient: What `backward` computes: `"exact"`, the discrete gradient of the steps that ran; `"adjoint"`, torchsde's
            continuous stochastic adjoint (`"adjoint-parameters"`: with the integrals of all parameter gradients, as
            published code does); `"bpda"`, the identity; `"surrogate"`, the exact gradient of a coarser grid through the stored
            states; `"none"`.
        guidance_gradient: `"exact"` differentiates the guidance, too; `"detached"` takes it as a constant, as COUP's code does.
        surrogate_steps: Steps of the coarser grid of `gradient="surrogate"`.
        memory_budget: Bytes above the weights that a run with gradient may use; `"auto"` takes up to half of what is free,
            `"least"` keeps nothing but states. Splits the batch only where one step of it does not fit.
        clamp: Clip the state to [-1, 1] before the first and after the last step, as COUP's code does (DiffPure's does not:
            pass False to reproduce it). The gradient contains the clip.
        seed: Fixes the noise; None draws one from the operating system (`Purifier.last_seed` tells it).
        ids: Image ids in [0, 2³²), shape (batch,); None means 0 … batch − 1. The noise is a function of
            (seed, id, draw, step, element), so an image keeps its noise in whatever batch it stands.
        draw: Which of an image's noise paths, an int or (batch,) ints in [0, 2³²).
        noise: An explicit path instead, shape (num_steps, *x.shape), with one more row, the last, for the forward noising
            of `"diffpure"`. May require a gradient.
        return_trajectory: Also return all states x_0 … x_K in the [-1, 1] scale, shape (num_steps + 1, *x.shape), detached.
        progress: Show a progress bar.

    Returns:
        Purified images in [0, 1] (with `clamp=False`, beyond it by what the last step left), shape and dtype of `x`.

    Raises:
        ValueError: for images outside [0, 1] or not finite, shapes or dtypes that do not fit, networks in training mode,
            options that do not exist; each message says what was found.
        FloatingPointError: if the purified images are not finite, or, in the backward pass, if the gradient stops being
            finite; that message names the step.

    Memory of a backward pass: 12 KiB per CIFAR-10 image and step, and one step's activations; see `Purifier.plan`.
    Reference: Zhang et al. 2024, arXiv:2408.05900; Nie et al. 2022, arXiv:2205.07460.
    """
    purifier = Purifier(
        score,
        classifier,
        method=method,
        t=t,
        guidance_scale=guidance_scale,
        num_steps=num_steps,
        solver=solver,
        sde=sde,
        engine=engine,
        precision=precision,
        engine_options=engine_options,
        gradient=gradient,
        guidance_gradient=guidance_gradient,
        surrogate_steps=surrogate_steps,
        memory_budget=memory_budget,
        clamp=clamp,
    )
    return purifier(
        x, seed=seed, ids=ids, draw=draw, noise=noise, return_trajectory=return_trajectory, progress=progress
    )


def _choose_engine(score: nn.Module) -> tuple[str, str | None]:
    """The fastest engine for this network, and why it is not a faster one."""
    found = dtype_and_device(score)
    fast = {"cpu": ("cpu", cpu.unavailable), "cuda": ("cuda", cuda.unavailable)}
    if found is None:
        return "eager", "the score net has no weights to go by"
    if found[1].type not in fast or found[0] != torch.float32:
        return "eager", f"the others run float32 on {' or '.join(fast)}, not {found[0]} on {found[1].type}"
    engine, unavailable = fast[found[1].type]
    reason = unavailable(*found)
    return ("eager", reason) if reason else (engine, None)


def _check_name(option: str, value: Any, known: Iterable[str]) -> None:
    known = list(known)
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"`{option}` is one of {', '.join(map(repr, known))}, got {value!r}{hint}")


def _check_network(network: Any, name: str) -> nn.Module:
    if not isinstance(network, nn.Module):
        raise TypeError(f"the {name} is an nn.Module, got {type(network).__name__}; load_score and load_classifier load one")
    check_eval(network, name)
    return network


def _check_images(x: Any) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"images are a torch.Tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"images have shape (batch, channels, height, width), got {tuple(x.shape)}")
    if x.shape[0] == 0 or x.numel() == 0:
        raise ValueError(f"there are no images in a batch of shape {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"images are float32 or float64, got {x.dtype}; uint8 images: `x.float() / 255`")
    with torch.no_grad():
        low, high = float(x.min()), float(x.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"{int((~torch.isfinite(x)).sum())} of {x.numel()} image values are not finite")
    if low < 0.0 or high > 1.0:
        raise ValueError(f"images have values in [0, 1], got [{low:.6g}, {high:.6g}]; purify rescales to [-1, 1] itself")


def _check_against(network: nn.Module, name: str, x: torch.Tensor) -> None:
    found = dtype_and_device(network)
    if found is not None:
        if found[0] != x.dtype:
            raise ValueError(f"images are {x.dtype}, the {name} is {found[0]}; convert one of them (`.to(dtype)`)")
        if found[1] != x.device:
            raise ValueError(f"images are on {x.device}, the {name} is on {found[1]}; move one of them (`.to(device)`)")
    size, channels = getattr(network, "image_size", None), getattr(network, "channels", None)
    if isinstance(channels, int) and channels != x.shape[1]:
        raise ValueError(f"images have {x.shape[1]} channels, the {name} takes {channels}")
    if isinstance(size, int) and tuple(x.shape[2:]) != (size, size):
        raise ValueError(f"images are {x.shape[2]} x {x.shape[3]}, the {name} is made for {size} x {size}")


def _try_networks(score: nn.Module, classifier: nn.Module | None, example: torch.Tensor) -> None:
    """One image through each network, so that one that cannot serve says so before any work."""
    x, label = 2.0 * example - 1.0, torch.full((1,), 1.0, dtype=example.dtype, device=example.device)
    eps_hat = _twice("score net", score, x, label)
    if not isinstance(eps_hat, torch.Tensor) or eps_hat.shape != example.shape:
        found = tuple(eps_hat.shape) if isinstance(eps_hat, torch.Tensor) else type(eps_hat).__name__
        raise ValueError(f"the score net must return eps_hat of shape {tuple(example.shape)}, got {found}")
    if eps_hat.dtype != example.dtype:
        raise ValueError(f"the score net must return {example.dtype}, got {eps_hat.dtype}")
    if classifier is None:
        return
    _twice("classifier", classifier, example)
    with torch.enable_grad():
        image = example.clone().requires_grad_()
        logits = classifier(image)
        if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or len(logits) != 1 or logits.shape[1] < 2:
            found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise ValueError(f"the classifier must return logits of shape (batch, classes >= 2), got {found}")
        gradient = None
        if logits.requires_grad:
            (gradient,) = torch.autograd.grad(logits.sum(), image, allow_unused=True)
    if gradient is None:
        raise ValueError(
            "the classifier's output does not depend on its input as far as autograd can see (a `no_grad` or a `detach` inside "
            "it?); guidance needs its gradient"
        )


def _twice(name: str, network: nn.Module, *inputs: torch.Tensor) -> Any:
    """The network's result; ValueError if it writes into its inputs or gives another result the second time."""
    inputs = tuple(tensor.clone() for tensor in inputs)
    versions = [tensor._version for tensor in inputs]
    with torch.no_grad():
        first, second = network(*inputs), network(*inputs)
    if versions != [tensor._version for tensor in inputs]:
        raise ValueError(f"the {name} writes into its input; a purifier needs the state again: work on a copy in `forward`")
    if isinstance(first, torch.Tensor) and not bool((second - first).abs().max() <= 1e-3 * first.abs().max()):
        raise ValueError(
            f"the {name} gives different results for the same input, or none that is finite: it keeps state, draws "
            f"random numbers or overflows, and the steps that ran could not be rebuilt from it"
        )
    return first


def _clip(x: torch.Tensor) -> torch.Tensor:
    """x in [-1, 1]; its gradient is 1 there, the ends included, and 0 beyond.

    Black and white pixels are at the ends, and many. PyTorch's own clamp passes the gradient there in 2.13, and not in 2.15.
    """
    return torch.where(x.abs() <= 1.0, x, x.detach().clamp(-1.0, 1.0))


def _words(name: str, values: Any, batch: int, device: torch.device) -> torch.Tensor:
    """(batch,) int64 with values in [0, 2³²)."""
    try:
        tensor = torch.as_tensor(values)
    except (RuntimeError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"`{name}` are integers in [0, 2**32), got {values!r} ({error})") from error
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise TypeError(f"`{name}` are integers, got {tensor.dtype}")
    if tuple(tensor.shape) != (batch,):
        raise ValueError(f"`{name}` must have shape ({batch},), one per image, got {tuple(tensor.shape)}")
    tensor = tensor.to(torch.int64)
    if int(tensor.min()) < 0 or int(tensor.max()) >= 2**32:
        raise ValueError(f"`{name}` are in [0, 2**32), got [{int(tensor.min())}, {int(tensor.max())}]")
    return tensor.to(device)
