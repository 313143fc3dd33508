"""A defense under evaluation: its noise can be set, its work is counted."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn

from coupfast.evaluation.purification import describe, settled
from coupfast.models.checkpoints import state_dict_sha256
from coupfast.naming import reference_to
from coupfast.purify import PurifiedClassifier, Purifier

Ids: TypeAlias = Sequence[int] | torch.Tensor | None
Draw: TypeAlias = int | torch.Tensor | None


class Recording(Protocol):
    """Answers that were given before; see `Recorder`."""

    def __call__(self, x: torch.Tensor, ids: Ids, draw: Draw) -> torch.Tensor: ...

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
    ) -> torch.Tensor:
        """Logits; `ids` and `draw` name the noise, as in `PurifiedClassifier`, and mean nothing to other modules.

        Raises:
            FloatingPointError: if a logit is NaN.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            self.gradient_images += len(x)
            if not torch._C._functorch.is_functorch_wrapped_tensor(x):
                x = x.view_as(x)  # a hook on it sees what comes back here, and not from elsewhere
                x.register_hook(self._count)
        else:
            self.forward_images += len(x)
        logits = self.ask(x, ids, draw) if self.recorder is None else self.recorder(x, ids, draw)
        if self.passed is not None:
            self.passed(len(x))
        return logits

    def ask(self, x: torch.Tensor, ids: Ids, draw: Draw) -> torch.Tensor:
        """`forward` without counting or recording: the model itself."""
        logits: torch.Tensor = self.model(x) if self.purified is None else self.model(x, ids=ids, draw=draw)
        if bool(torch.isnan(logits).any()):  # whose largest is class 0
            wrong = int(torch.isnan(logits).any(dim=1).sum())
            raise FloatingPointError(f"of {len(x)} images {wrong} have a logit that is no number (NaN)")
        return logits

    def _count(self, gradient: torch.Tensor) -> None:
        each = gradient.detach().flatten(1)
        self.gradients += len(each)
        self.zero_gradients += int((each == 0).all(dim=1).sum())
        self.nonfinite_gradients += int((~torch.isfinite(each)).any(dim=1).sum())
