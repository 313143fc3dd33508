"""Purification of images: `purify`, `Purifier` and `PurifiedClassifier`.

Images are in [0, 1] outside and become states in [-1, 1] here, the only place where those of a run do (the definition does it
for itself, as do looks at networks before any run). Nothing reads or advances torch's global generator.
"""

from __future__ import annotations

import functools
import inspect
import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from coupfast.budget import Plan
from coupfast.derivatives import (
    on_its_device,
    outside_transforms,
    refuse_transforms,
    strictly,
    unwrapped,
    with_parameter_gradients,
)
from coupfast.engine import CounterNoise, Noise, ReplayedNoise
from coupfast.engine.networks import check_eval, dtype_and_device, frozen
from coupfast.engine.precision import strict_float32
from coupfast.fingerprint import check_unchanged, fingerprint, weights_fingerprint
from coupfast.forked import check_threads
from coupfast.gradients import Adjoint
from coupfast.methods import GuidedLM, Recipe, TableMethod, method_name
from coupfast.methods.base import clip
from coupfast.models.zoo import as_network, is_adoptable
from coupfast.prepared import Prepared, prepare
from coupfast.settings import Settings, options
from coupfast.trials import check_against, check_images, check_network, rounding_of, try_classifier, words
from coupfast.wording import counted

logger = logging.getLogger(__name__)


class Purifier(nn.Module):
    """Purification with options fixed once; see `purify` for what each means.

    Args:
        score: Noise prediction network, (x_k in the [-1, 1] scale, labels = 999 t) → eps_hat; in eval mode.
        classifier: Images in [0, 1] → logits; needed by guided methods; in eval mode.
        settings: How to purify; `keywords` replace what it says.
        keywords: The options, as `purify` has them.

    Attributes:
        settings: Method, gradient and engine, with all their options.
        last_seed: The seed of the last call's noise (the one drawn, where None was given).

    Raises:
        TypeError: if nothing has a keyword, or a network is no `nn.Module`.
        ValueError: if a value is out of its range, a guided method has no classifier, or a network is in training mode. A call
            raises what `purify` does.

    Example:
        >>> import torch, coupfast
        >>> score, classifier = coupfast.load_score("cifar10-tiny"), coupfast.load_classifier("cifar10-tiny")
        >>> purifier = coupfast.Purifier(score, classifier, method="coup", t=0.06, num_steps=3)
        >>> x = torch.rand(2, 3, 32, 32)
        >>> torch.equal(purifier(x, seed=0), purifier(x, seed=0))
        True
    """

    def __init__(
        self, score: nn.Module, classifier: nn.Module | None = None, *, settings: Settings | None = None, **keywords: Any
    ) -> None:
        super().__init__()
        self._settings = Settings.of(settings, **keywords)
        method = self.settings.method
        if method.guided and classifier is None:
            raise ValueError(
                f"method {method_name(method)!r} follows a classifier's confidence and needs `classifier`; without one use "
                f"{'lm' if isinstance(method, GuidedLM) else 'reverse-sde'!r}"
            )
        self.score = check_network(adopted(score), "score net")
        self.classifier = check_network(classifier, "classifier") if method.guided else None
        self.last_seed: int | None = None
        self._recipe = method.recipe() if isinstance(method, TableMethod) else None
        self._chosen: str | None = None
        self._prepared: OrderedDict[Any, Prepared] = OrderedDict()
        self.eval()

    @property
    def settings(self) -> Settings:
        """How this purifies; a purifier that purifies otherwise is another one."""
        return self._settings

    @property
    def num_steps(self) -> int:
        """Steps of a run."""
        return self._settings.num_steps

    def settle(self, settings: Settings) -> Callable[[], None]:
        """Take settings of the same method and gradient that leave less open, as a run does whose bits must not follow what
        memory is free (`Engine.decided`).

        Returns:
            What puts back the settings of before, and all that was made by them.

        Raises:
            ValueError: if they purify otherwise.
        """
        before, prepared = self._settings, self._prepared
        if settings == before:
            return lambda: None
        if settings.method is not before.method or type(settings.gradient) is not type(before.gradient):
            raise ValueError("a purifier that purifies otherwise is another one: make it of these settings")
        self._settings, self._prepared = settings, OrderedDict()

        def undo() -> None:
            self._settings, self._prepared = before, prepared

        return undo

    @property
    def engine(self) -> str:
        """The engine that runs; with "auto" it follows the score network's dtype and device."""
        chosen, reason = self.settings.engine_for(self.score)
        if self.settings.engine.name == "auto" and self._chosen != chosen:
            self._chosen = chosen
            logger.info("engine='auto' chose %r%s", chosen, f": {reason}" if reason else "")
        return chosen

    @property
    def recipe(self) -> Recipe:
        """The numbers of a method that is a table.

        Raises:
            ValueError: for a method that is a step function.
        """
        if self._recipe is None:
            raise ValueError(f"{type(self.settings.method).__name__} is a step function and has no table of coefficients")
        return self._recipe

    def __getstate__(self) -> dict[str, Any]:
        """Without programs, which point into memory of these weights: a copy makes its own when it is first called."""
        return {**self.__dict__, "_prepared": OrderedDict()}

    def __repr__(self) -> str:
        settings, networks = self.settings, [_network_repr(self.score)]
        if self.classifier is not None:
            networks.append(f"guided by {_network_repr(self.classifier)}")
        return (
            f"Purifier({method_name(settings.method)}, {counted(self.num_steps, 'step')}, {', '.join(networks)}\n"
            f"  {settings.method!r}\n  {settings.gradient!r}\n  {settings.engine!r})"
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
        refuse_transforms()
        if isinstance(x, torch.Tensor) and x.device.type == "cpu":
            check_threads()
        if ids is None and noise is None:
            refuse_replica(self, "`ids`")
        check_images(x, bounded=self.settings.method.out_of_range == "refuse")
        prepared = self._prepare(x)
        source = self._noise(x, seed=seed, ids=ids, draw=draw, noise=noise)
        with on_its_device(x.device):
            purified, states = self._purify(prepared, x, source, return_trajectory, progress)
        purified = self.settings.gradient.finish(x, purified)
        return purified if states is None else (purified, states)

    def plan(self, batch: int, *, image_shape: tuple[int, int, int] | None = None) -> Plan:
        """What a run of `batch` images with its gradient will store and evaluate, before it runs.

        One image takes one step and back, once for a purifier, to see what that needs; nothing of the batch's size is made.

        Args:
            batch: Images.
            image_shape: (channels, height, width); None takes the score net's own.

        Raises:
            ValueError: if `memory_budget` is below the least that is possible (which the message says). What does not fit into
                the memory that is free is planned all the same, and says so; a run of it raises MemoryError.
        """
        if isinstance(batch, bool) or not isinstance(batch, (int, np.integer)) or batch < 1:
            raise ValueError(f"`batch` is a number of images, at least 1, got {batch!r}")
        if image_shape is None:
            size, channels = getattr(self.score, "image_size", None), getattr(self.score, "channels", None)
            if size is None or channels is None:
                raise ValueError("this score net does not say its image size; give `image_shape=(channels, height, width)`")
            image_shape = (int(channels), int(size), int(size))
        if isinstance(self.settings.gradient, Adjoint):
            raise ValueError("the memory of a continuous adjoint is torchsde's and cannot be planned here")
        dtype, device = dtype_and_device(self.score) or (torch.float32, torch.device("cpu"))
        with torch.inference_mode(False):
            return self._prepare(torch.zeros(1, *image_shape, dtype=dtype, device=device)).plan(int(batch))

    def _prepare(self, x: torch.Tensor) -> Prepared:
        """Networks and engine for images like `x`, after all checks; kept until networks, shape or device change."""
        for network, name in ((self.score, "score net"), (self.classifier, "classifier")):
            if network is not None:
                check_eval(network, name)
                check_against(network, name, x, self.settings.engine.precision)
        example = unwrapped(x[:1])
        with outside_transforms():  # what is made here is kept
            key = (tuple(x.shape[1:]), x.dtype, x.device, fingerprint(self.score), fingerprint(self.classifier))
            prepared = self._prepared.get(key)
            if prepared is None:
                prepared = self._prepared[key] = prepare(self.settings, self.engine, self.score, self.classifier, example)
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
            self.last_seed = None
            return self._replayed(x, noise)
        if seed is None:
            seed = secrets.randbits(63)
        self.last_seed = check_seed(seed)  # for the caller to read; another of its threads may write it at any moment
        ids = torch.arange(len(x), device="cpu") if ids is None else ids
        return CounterNoise(
            int(seed),
            words("ids", ids, len(x), x.device),
            words("draw", [draw] * len(x) if isinstance(draw, (int, np.integer)) else draw, len(x), x.device),
        )

    def _replayed(self, x: torch.Tensor, noise: torch.Tensor) -> ReplayedNoise:
        recipe = self._recipe
        wanted = (self.settings.method.num_noises, *x.shape)
        if not isinstance(noise, torch.Tensor) or tuple(noise.shape) != wanted:
            found = tuple(noise.shape) if isinstance(noise, torch.Tensor) else type(noise).__name__
            rows = "a row for each time that the method draws" if recipe is None else "one row a step"
            rows += "" if recipe is None or recipe.table.f is None else ", then a second one a step"
            rows += ", the last row being the forward noising's" if recipe is not None and recipe.noising else ""
            raise ValueError(f"`noise` must have shape {wanted} ({rows}), got {found}")
        if noise.dtype != x.dtype or noise.device != x.device:
            raise ValueError(f"`noise` is {noise.dtype} on {noise.device}, the images are {x.dtype} on {x.device}")
        if not bool(torch.isfinite(noise).all()):
            raise ValueError("`noise` has values that are not finite")
        gradient = self.settings.gradient
        if noise.requires_grad and torch.is_grad_enabled() and not gradient.differentiates_noise:
            raise ValueError(f"the gradient of `noise` exists with gradient='exact' only, not with {gradient.name!r}")
        if recipe is None or recipe.table.f is None:
            return ReplayedNoise(noise)
        first, second, noising = noise.split([self.num_steps, self.num_steps, len(noise) - 2 * self.num_steps])
        return ReplayedNoise(torch.cat([first, noising]), second)

    def _purify(
        self, prepared: Prepared, x: torch.Tensor, noise: Noise, keep_states: bool, progress: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        gradient, clamp = self.settings.gradient, self.settings.method.clamp
        with torch.set_grad_enabled(torch.is_grad_enabled() and gradient.flows):
            with strict_float32(x.device.type):
                x_k = 2.0 * _in_range(x, self.settings.method.out_of_range) - 1.0
                if clamp:
                    x_k = clip(x_k, -1.0, 1.0)
            x_k, states = gradient.through(prepared, x_k, noise, keep_states, progress)
            if not bool(torch.isfinite(x_k).all()):
                raise FloatingPointError(
                    f"{int((~torch.isfinite(x_k)).sum())} of {x_k.numel()} purified values are not finite: look at the "
                    f"networks' weights and at their outputs on these images (`return_trajectory=True` on a shorter run)"
                )
            with strict_float32(x.device.type):
                if clamp:
                    x_k = clip(x_k, -1.0, 1.0)
                return (x_k + 1.0) * 0.5, states


class PurifiedClassifier(nn.Module):
    """A classifier behind a purifier: images in [0, 1] → logits of the purified images.

    Args:
        purifier: Purifies.
        classifier: Classifies what comes out; may be the purifier's own.
        seed: Fixes all noise of this defense.

    Attributes:
        next_draw: The draw that the next call without `draw` takes; readable, settable, and in `state_dict`. Every such
            call takes the next one, so repeated calls see fresh noise, and a restored counter repeats them bit for bit.

    Raises:
        TypeError: if `purifier` is none, or `classifier` is no `nn.Module`.
        ValueError: if the classifier is in training mode, or `seed` is outside [0, 2**64). A call raises what `purify` does.

    Example:
        >>> import torch, coupfast
        >>> score, classifier = coupfast.load_score("cifar10-tiny"), coupfast.load_classifier("cifar10-tiny")
        >>> defense = coupfast.PurifiedClassifier(coupfast.Purifier(score, classifier, num_steps=2), classifier, seed=0)
        >>> x = torch.rand(1, 3, 32, 32, requires_grad=True)
        >>> defense(x, draw=0)[0, 3].backward()
        >>> x.grad.shape
        torch.Size([1, 3, 32, 32])
    """

    def __init__(self, purifier: Purifier, classifier: nn.Module, seed: int = 0) -> None:
        super().__init__()
        if not isinstance(purifier, Purifier):
            raise TypeError(f"`purifier` is a coupfast.Purifier, got {type(purifier).__name__}")
        self.purifier = purifier
        self.classifier = check_network(classifier, "classifier")
        self.seed = check_seed(seed)
        self._next_draw = 0
        self._frozen: tuple[Any, nn.Module, Callable[[], None]] | None = None
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

    def __repr__(self) -> str:
        purifier = repr(self.purifier).replace("\n", "\n  ")
        return (
            f"PurifiedClassifier({_network_repr(self.classifier)}, seed={self.seed}, next draw {self.next_draw}\n  {purifier})"
        )

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
        refuse_transforms()
        check_images(x, bounded=self.purifier.settings.method.out_of_range == "refuse")
        check_eval(self.classifier, "classifier")
        check_against(self.classifier, "classifier", x, self.purifier.settings.engine.precision)
        if ids is None or draw is None:
            refuse_replica(self, "`ids` and `draw`")
        if draw is None:
            draw = self._next_draw
            self.next_draw = (draw + 1) % 2**32
        return self.classify(self.purify(x, ids=ids, draw=draw))

    def purify(
        self, x: torch.Tensor, *, ids: Sequence[int] | torch.Tensor | None = None, draw: int | torch.Tensor = 0
    ) -> torch.Tensor:
        """Images (batch, channels, height, width) in [0, 1] as the classifier gets them, on the way of `forward`."""
        purified = self.purifier(x, seed=self.seed, ids=ids, draw=draw)
        assert isinstance(purified, torch.Tensor)  # no trajectory was asked for
        return purified

    def classify(self, x_pure: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes) of images that are purified, on the way of `forward`."""
        head, check = self._head(x_pure)
        return with_parameter_gradients(strictly(head, x_pure, check), self.classifier, x_pure, check)

    def _head(self, x: torch.Tensor) -> tuple[nn.Module, Callable[[], None]]:
        """The classifier, frozen, as it is now, tried on two images when it is new or changed; and what raises once it is
        another one."""
        example = unwrapped(x[:1])
        with outside_transforms():
            identity = (tuple(x.shape[1:]), x.dtype, x.device, fingerprint(self.classifier))
            if self._frozen is None or self._frozen[0] != identity:
                copy = frozen(self.classifier)
                with strict_float32(x.device.type):
                    try_classifier(copy, example, differentiable=False)
                self._frozen = (identity, copy, functools.partial(check_unchanged, weights_fingerprint(copy), copy))
            return self._frozen[1:]


def purify(
    x: torch.Tensor,
    score: nn.Module,
    classifier: nn.Module | None = None,
    *,
    seed: int | None = None,
    ids: Sequence[int] | torch.Tensor | None = None,
    draw: int | torch.Tensor = 0,
    noise: torch.Tensor | None = None,
    return_trajectory: bool = False,
    progress: bool = False,
    settings: Settings | None = None,
    **keywords: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Purify images: integrate the guided reverse VP-SDE from time `t` to 1e-5 (or what else `method` names), starting at `x`.

    Args:
        x: Images in [0, 1], shape (batch, channels, height, width), float32 or float64 like the networks.
        score: Noise prediction network, (x_k in the [-1, 1] scale, labels = 999 t) → eps_hat; in eval mode.
        classifier: Images in [0, 1] → logits, in eval mode; needed by guided methods.
        seed: Fixes the noise; None draws one from the operating system (`Purifier.last_seed` tells it).
        ids: Image ids in [0, 2³²), shape (batch,); None means 0 … batch − 1. The noise is a function of
            (seed, id, draw, step, element), so an image keeps its noise in whatever batch it stands.
        draw: Which of an image's noise paths, an int or (batch,) ints in [0, 2³²).
        noise: An explicit path instead, shape (num_steps, *x.shape), with one more row, the last, for the forward noising
            of `"diffpure"`, and after the first num_steps as many of a second noise where a method's table has one; of another
            method `settings.method.num_noises` rows. May require a gradient.
        return_trajectory: Also return all states x_0 … x_K in the [-1, 1] scale, shape (num_steps + 1, *x.shape), detached.
        progress: Show a progress bar.
        settings: A `coupfast.Settings`, in the place of keywords or below them.
        keywords: How to purify. `method` is `"coup"`, `"reverse-sde"` (COUP without guidance), `"diffpure"` (forward noising
            to `t` first, no guidance), an object such as `coupfast.COUP(t=0.06)`, or `package.module:NAME` of one. `gradient`
            is what `backward` computes: `"exact"`, `"adjoint"`, `"adjoint-parameters"`, `"bpda"`, `"surrogate"`, `"none"` or
            an object. `engine` is `"auto"`, `"eager"`, `"cpu"`, `"cuda"` or an object. The options of each:

        OPTIONS

    Returns:
        Purified images in [0, 1] (with `clamp=False`, beyond it by what the last step left), shape and dtype of `x`.

    Raises:
        ValueError: for images outside [0, 1] or not finite, shapes or dtypes that do not fit, networks in training mode,
            options that do not exist; each message says what was found.
        FloatingPointError: if the purified images are not finite, or, in the backward pass, if the gradient stops being
            finite; that message names the step.

    Memory of a backward pass: 12 KiB per CIFAR-10 image and step, and one step's activations; see `Purifier.plan`.
    Reference: Zhang et al. 2024, arXiv:2408.05900; Nie et al. 2022, arXiv:2205.07460.

    Example:
        >>> import torch, coupfast
        >>> score, classifier = coupfast.load_score("cifar10-tiny"), coupfast.load_classifier("cifar10-tiny")
        >>> coupfast.purify(torch.rand(2, 3, 32, 32), score, classifier, t=0.06, num_steps=2, seed=0).shape
        torch.Size([2, 3, 32, 32])
    """
    purifier = Purifier(score, classifier, settings=settings, **keywords)
    return purifier(x, seed=seed, ids=ids, draw=draw, noise=noise, return_trajectory=return_trajectory, progress=progress)


def adopted(score: Any) -> Any:
    """A diffusers model or pipeline as `load_score` makes a score net of it; anything else as it is."""
    return as_network("score", score) if is_adoptable("score", score) else score


def refuse_replica(module: nn.Module, wanted: str) -> None:
    """RuntimeError in a replica of DataParallel that was not told which noise its part of the batch has."""
    if getattr(module, "_is_replica", False):
        raise RuntimeError(
            "a replica of DataParallel does not know which images it has, and its counter of draws is lost: give "
            f"{wanted} as tensors with the batch, or run one process a GPU (coupfast evaluate --workers)"
        )


def check_seed(seed: Any) -> int:
    """`seed` as an int, or ValueError if it is none in [0, 2⁶⁴)."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**64:
        raise ValueError(f"`seed` is an integer in [0, 2**64), got {seed!r}")
    return int(seed)


def _network_repr(network: nn.Module) -> str:
    count = sum(parameter.numel() for parameter in network.parameters())
    return f"{type(network).__name__} ({count / 1e6:.3g} M parameters)"


def _in_range(x: torch.Tensor, out_of_range: str) -> torch.Tensor:
    """Images in [0, 1]; what was beyond by rounding keeps its gradient, what was clipped has none."""
    if out_of_range == "allow":
        return x
    with torch.no_grad():
        inside = bool(((x >= 0.0) & (x <= 1.0)).all())
    if inside:
        return x
    rounding = rounding_of(x.dtype)
    near = (x >= -rounding) & (x <= 1.0 + rounding)
    clipped = x.detach().clamp(0.0, 1.0)
    return torch.where(near, clipped + (x - x.detach()), clipped)


def _spell_out() -> None:
    """Put the options, which are fields of the settings' dataclasses, into the signatures and the docstring people look at."""
    found = [option for kind in options().values() for option in kind]
    lines = [f"            {option.keyword} ({option.default!r}): {option.help}." for option in found]
    assert purify.__doc__ is not None
    purify.__doc__ = purify.__doc__.replace("        OPTIONS", "\n".join(lines))
    kinds = {"method": "coup", "gradient": "exact"}
    keywords = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default) for name, default in kinds.items()]
    keywords += [inspect.Parameter(option.keyword, inspect.Parameter.KEYWORD_ONLY, default=option.default) for option in found]
    for function in (purify, Purifier.__init__):
        signature = inspect.signature(function)
        others = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        setattr(function, "__signature__", signature.replace(parameters=[*others, *keywords]))  # noqa: B010


_spell_out()
