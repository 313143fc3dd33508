"""The weights of one network among all that a checkpoint holds.

Training code puts a state dict into a dictionary beside an accuracy and an optimizer, wraps the network (`module.`,
`_orig_mod.`, an attribute's name), counts averages, and puts a normalisation of the images in front. What is looked for is said
by the caller; what lies around it is dropped if it can mean nothing else, and refused if it could.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import numpy as np
from torch import Tensor

from coupfast.models.registry import CheckpointError

T = TypeVar("T")

#: Parts of names that only wrappers make, wherever they stand: torch.compile, FSDP and activation checkpointing.
_MARKS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
#: Entries that hold the weights meant for use, where there are several; the first that is there.
_ENTRIES = ("state_dict", "model_state_dict", "model", "net", "network", "params", "weights", "classifier")
_AVERAGED = re.compile(r"(?<!un)averaged|(^|[^a-z])(ema|swa)([^a-z]|$)", re.IGNORECASE)
_DEPTH = 4

_MEANS, _STDS = frozenset({"mean", "means", "mu", "_mean"}), frozenset({"std", "stds", "sigma", "sds", "sd", "_std"})


@dataclasses.dataclass(frozen=True)
class Weights(Generic[T]):
    """One network's weights in a file.

    Attributes:
        entry: The dictionary's entries that lead to them, e.g. ("model",); () for the file's own.
        prefix: What stood before every name, e.g. "module.".
        state: Weights by the network's own names.
        rest: Tensors beside them, by the names in the file.
        found: What the caller's recogniser said.
    """

    entry: tuple[str, ...]
    prefix: str
    state: dict[str, Tensor]
    rest: dict[str, Tensor]
    found: T

    @property
    def where(self) -> str:
        return ".".join((*self.entry, self.prefix.rstrip("."))).strip(".")


def state_dicts(content: Any) -> list[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Every dictionary of named tensors in a file's content, with the entries that lead to it; plain values are left out."""
    return list(_state_dicts(content, ()))


def _state_dicts(content: Any, entry: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    if not isinstance(content, dict) or len(entry) > _DEPTH or not all(isinstance(key, str) for key in content):
        return
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    # A plain value may stand beside the weights, not among them: weights have names with a dot.
    plain = (str, bytes, bool, int, float, np.generic, type(None), list, tuple, dict)
    others = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if tensors and all("." not in key and isinstance(content[key], plain) for key in others):
        yield entry, _unmarked(tensors)
    for key in others:
        yield from _state_dicts(content[key], (*entry, key))


def _unmarked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {".".join(part for part in key.split(".") if part not in _MARKS): value for key, value in tensors.items()}


def find_weights(content: Any, recognise: Callable[[dict[str, Tensor]], T | None]) -> Weights[T] | None:
    """The weights that `recognise` knows; None where there are none.

    Args:
        content: What a file holds.
        recognise: Names and shapes → anything but None where they are those of a network.

    Raises:
        CheckpointError: if there are several networks, and nothing says which one is meant.
    """
    found = [weights for entry, state in state_dicts(content) for weights in _recognised(entry, state, recognise)]
    if not found:
        return None
    ranks = [_rank(weights.entry) for weights in found]
    best = found[ranks.index(min(ranks))]
    rivals = [
        other
        for other, rank in zip(found, ranks, strict=True)
        if other is not best and (rank == min(ranks) or (_averaged(other) and not _averaged(best)))
    ]
    if rivals:
        names = " and ".join(repr(weights.where or "the file itself") for weights in (best, *rivals))
        raise CheckpointError(
            f"there are several networks of these names, under {names}; save the one that is meant to a file of its own"
        )
    return best


def _rank(entry: tuple[str, ...]) -> int:
    if not entry:
        return 0
    return 1 + min((_ENTRIES.index(part) for part in entry if part in _ENTRIES), default=len(_ENTRIES))


def _averaged(weights: Weights[Any]) -> bool:
    return any(_AVERAGED.search(part) for part in (*weights.entry, *weights.prefix.split(".")))


def _recognised(
    entry: tuple[str, ...], state: dict[str, Tensor], recognise: Callable[[dict[str, Tensor]], T | None]
) -> Iterator[Weights[T]]:
    """Below every prefix, the shortest first, what is recognised; all others are beside it."""
    inside: dict[str, tuple[dict[str, Tensor], T]] = {}
    for prefix in _prefixes(state):
        if any(prefix.startswith(outer) for outer in inside):
            continue
        part = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
        if (found := recognise(part)) is not None:
            inside[prefix] = (part, found)
    for prefix, (part, found) in inside.items():
        rest = {key: value for key, value in state.items() if not any(key.startswith(other) for other in inside)}
        yield Weights(entry, prefix, part, rest, found)


def _prefixes(state: Mapping[str, Tensor]) -> list[str]:
    prefixes = {""}
    for key in state:
        parts = key.split(".")[:-1]
        prefixes |= {".".join(parts[:count]) + "." for count in range(1, len(parts) + 1)}
    return sorted(prefixes, key=lambda prefix: (prefix.count("."), prefix))


def normalisation(tensors: Mapping[str, Tensor]) -> tuple[list[float], list[float], set[str]] | None:
    """Mean and standard deviation per channel of images in [0, 1], and their names, of tensors beside the weights.

    Two tensors of one number for each channel, ``0.mean`` and ``0.std`` or ``mu`` and ``sigma``. None where there is no such
    pair.

    Raises:
        CheckpointError: if there are several, or one that is not of images in [0, 1].
    """
    pairs = []
    for name, mean in tensors.items():
        parent, _, last = name.rpartition(".")
        if last not in _MEANS or not _per_channel(mean):
            continue
        for other, std in tensors.items():
            if other.rpartition(".")[0] == parent and other.rpartition(".")[2] in _STDS and std.numel() == mean.numel():
                pairs.append((name, other))
    if not pairs:
        return None
    if len(pairs) > 1:
        raise CheckpointError(f"there is more than one normalisation: {', '.join(f'{mean}, {std}' for mean, std in pairs)}")
    ((mean_name, std_name),) = pairs
    mean_values, std_values = (tensors[name].float().flatten().tolist() for name in pairs[0])
    if not all(math.isfinite(m) and -1.0 <= m <= 1.0 for m in mean_values) or not all(0.0 < s <= 2.0 for s in std_values):
        raise CheckpointError(
            f"{mean_name} {mean_values} and {std_name} {std_values} do not normalise images in [0, 1]; build the network "
            "yourself and pass the module"
        )
    return mean_values, std_values, {mean_name, std_name}


def _per_channel(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and 1 <= tensor.numel() <= 4 and max(tensor.shape, default=0) == tensor.numel()


def averaging_counts(tensors: Mapping[str, Tensor]) -> set[str]:
    """The counters that `torch.optim.swa_utils` keeps beside averaged weights."""
    return {name for name, value in tensors.items() if name.rpartition(".")[2] == "n_averaged" and value.numel() == 1}
