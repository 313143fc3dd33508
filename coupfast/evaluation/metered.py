"""A defense under evaluation: its noise can be set, its work is counted."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn

from coupfast.evaluation.purification import describe, settled
from coupfast.evaluation.views import Known, View, coarser
from coupfast.models.checkpoints import state_dict_sha256
from coupfast.naming import reference_to
from coupfast.purify import PurifiedClassifier, Purifier

Ids: TypeAlias = Sequence[int] | torch.Tensor | None
Draw: TypeAlias = int | torch.Tensor | None


class Recording(Protocol):
    """Answers that were given before; see `Recorder`."""

    def __call__(self, x: torch.Tensor, ids: Ids, draw: Draw, view: View | None) -> torch.Tensor: ...

    def made(self, name: str, make: Callable[[], Sequence[torch.Tensor]]) -> list[torch.Tensor]: ...


class Metered(nn.Module):
    """Images in [0, 1] → logits, through a `PurifiedClassifier` or any other module.

    Attributes:
        forward_images: Images that went through without a gradient being recorded, since `reset`.
        gradient_images: Images that went through with one.
        gradients: Gradients that came back, one an image and backward pass.
        zero_gradients: Those of them that are 0 in every value: their image cannot be attacked along them.
        nonfinite_gradients: Those with a value that is infinite or NaN.
        passed: Told of each call's images when they are through; None if nobody asks.
        recorder: Answers in the place of the model, as far as it has answers; None if nothing is recorded.
        known: The judge's noise, which takes the place of whatever is asked for; None if the attack does not know it.

    Raises:
        TypeError: if the model is no module.
        ValueError: if it, or a batch norm in it, is in training mode.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"a defense is an nn.Module from images in [0, 1] to logits, got {type(model).__name__}")
        learning = [m for m in model.modules() if m.training and isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if model.training or learning:
            where = "" if model.training else f" (its {type(learning[0]).__name__})"
            raise ValueError(f"the defense is in training mode{where}; call .eval() first")
        self.model = model
        self.reset()
        self.passed: Callable[[int], object] | None = None
        self.recorder: Recording | None = None
        self.known: Known | None = None
        self._coarser: dict[int | tuple[int, ...], PurifiedClassifier] = {}
        self.training = False  # what is inside stays as it is: a defense may have dropout on purpose
        self._inner = [module for module in model.modules() if isinstance(module, PurifiedClassifier)]
        self._purifiers = [module for module in model.modules() if isinstance(module, Purifier)]
        if (purified := self.purified) is not None:  # first, whatever else has one in it
            self._purifiers.sort(key=lambda purifier: purifier is not purified.purifier)

    @property
    def purified(self) -> PurifiedClassifier | None:
        return self.model if isinstance(self.model, PurifiedClassifier) else None

    def reseed(self, seed: int, draw: int = 0) -> None:
        """From here on all noise follows from `seed`, in [0, 2**63), and from the draw to begin with."""
        for purified in self._inner:  # the model itself, or parts of it
            purified.seed, purified.next_draw = seed, draw
        torch.manual_seed(seed)  # a classifier with noise of its own takes it from there

    def reset(self) -> None:
        self.forward_images = self.gradient_images = 0
        self.gradients = self.zero_gradients = self.nonfinite_gradients = 0

    def noise(self) -> list[tuple[int, int]]:
        """Seeds and counters of all purifications inside, for `set_noise`."""
        return [(purified.seed, purified.next_draw) for purified in self._inner]

    def set_noise(self, noise: Sequence[tuple[int, int]]) -> None:
        for purified, (seed, draw) in zip(self._inner, noise, strict=True):
            purified.seed, purified.next_draw = seed, draw

    def settle(self, recorded: Mapping[str, Any] | None = None) -> Callable[[], None]:
        """Leave nothing open, in the purifiers inside, that would follow from the state of the machine; see `settled`.

        Args:
            recorded: What `describe` said when the run began, in which it was decided; None decides now.

        Returns:
            What puts the purifiers' own settings back.
        """
        before: Sequence[Mapping[str, Any] | None] = []
        if recorded is not None:
            before = [*([recorded] if "method" in recorded else []), *recorded.get("purifications", [])]
        with contextlib.ExitStack() as stack:
            for purifier, said in itertools.zip_longest(self._purifiers, before[: len(self._purifiers)]):
                stack.callback(purifier.settle(settled(purifier, said)))
            return stack.pop_all().close

    def describe(self) -> dict[str, Any]:
        """What it is, the engine that runs and SHA-256 of the weights, as JSON has them."""
        if self.purified is None:
            return {
                "class": reference_to(type(self.model)),
                "classifier_sha256": state_dict_sha256(self.model),
                "purifications": [describe(purifier) for purifier in self._purifiers],
            }
        purifier, *others = self._purifiers
        guidance = purifier.classifier
        return {
            **describe(purifier),
            **({"purifications": [describe(other) for other in others]} if others else {}),
            "score_sha256": state_dict_sha256(purifier.score),
            "guidance_sha256": None if guidance is None else state_dict_sha256(guidance),
            "classifier_sha256": state_dict_sha256(self.purified.classifier),
        }

    def forward(
        self,
        x: torch.Tensor,
        *,
        ids: Ids = None,
        draw: Draw = None,
        view: View | None = None,
    ) -> torch.Tensor:
        """Logits; `ids` and `draw` name the noise, as in `PurifiedClassifier`, and mean nothing to other modules.

        With a `view` what that says, which takes a `PurifiedClassifier` and both names.

        Raises:
            FloatingPointError: if a logit is NaN.
        """
        if self.known is not None:
            if ids is None or draw is None:
                raise ValueError("an attack that knows the judge's noise names its draws: `ids` and `draw` are to be given")
            ids = torch.tensor(self.known.images)[torch.as_tensor(ids).cpu()]
            draw = draw % self.known.draws
        if torch.is_grad_enabled() and x.requires_grad:
            self.gradient_images += len(x)
            if not torch._C._functorch.is_functorch_wrapped_tensor(x):
                x = x.view_as(x)  # a hook on it sees what comes back here, and not from elsewhere
                x.register_hook(self._count)
        else:
            self.forward_images += len(x)
        logits = self.ask(x, ids, draw, view) if self.recorder is None else self.recorder(x, ids, draw, view)
        if self.passed is not None:
            self.passed(len(x))
        return logits

    def classify(self, x_pure: torch.Tensor) -> torch.Tensor:
        """Logits of purified images. It costs next to nothing beside a purification, and is not counted.

        Raises:
            FloatingPointError: if a logit is NaN.
        """
        return self._checked(self._purified().classify(x_pure))

    def coarser(self, steps: int | tuple[int, ...]) -> PurifiedClassifier:
        """The defense in fewer steps; see `views.coarser`."""
        if steps not in self._coarser:
            self._coarser[steps] = coarser(self._purified(), steps)
        return self._coarser[steps]

    def ask(self, x: torch.Tensor, ids: Ids, draw: Draw, view: View | None = None) -> torch.Tensor:
        """`forward` without counting or recording: the model itself."""
        if view is not None:
            return self._seen(view, x, ids, draw)
        logits: torch.Tensor = self.model(x) if self.purified is None else self.model(x, ids=ids, draw=draw)
        return self._checked(logits)

    def _seen(self, view: View, x: torch.Tensor, ids: Ids, draw: Draw) -> torch.Tensor:
        purified = self._purified()
        if ids is None or draw is None:
            raise ValueError("another view of a defense has no draws of its own: `ids` and `draw` are to be given")
        if view.steps is not None:
            seed, purified = purified.seed, self.coarser(view.steps)
            purified.seed = seed
        if not view.classified:
            return purified.purify(x, ids=ids, draw=draw)
        return self._checked(purified(x, ids=ids, draw=draw))

    def _purified(self) -> PurifiedClassifier:
        if self.purified is None:
            raise ValueError(f"a {type(self.model).__name__} is no coupfast.PurifiedClassifier, and purifies nothing")
        return self.purified

    @staticmethod
    def _checked(logits: torch.Tensor) -> torch.Tensor:
        if bool(torch.isnan(logits).any()):  # whose largest is class 0
            wrong = int(torch.isnan(logits).any(dim=1).sum())
            raise FloatingPointError(f"of {len(logits)} images {wrong} have a logit that is no number (NaN)")
        return logits

    def _count(self, gradient: torch.Tensor) -> None:
        each = gradient.detach().flatten(1)
        self.gradients += len(each)
        self.zero_gradients += int((each == 0).all(dim=1).sum())
        self.nonfinite_gradients += int((~torch.isfinite(each)).any(dim=1).sum())
