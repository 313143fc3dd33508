"""Whether a network is still what it was: its weights to the bit, its plain attributes, its hooks.

A purifier works on frozen copies around the caller's weights, and its engines pack some of these. What is changed afterwards
must be seen before anything half old is computed; PyTorch's version counters do not count what goes through `.data`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from coupfast.derivatives import outside_transforms

# Words of a run that is summed. What does not show: an exchange of weights within one run of a large tensor, or changes there
# whose words add up to a multiple of 2³² (an even number of signs, say).
_RUN, _SHORT_RUN = 1021, 61
_SMALL = 2**13  # words
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_INTERNAL = frozenset({*nn.Module().__dict__, *_HOOKS})
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def fingerprint(network: nn.Module | None) -> tuple[Any, ...]:
    """A value that changes when a network's weights, plain attributes or hooks do.

    Weights and tensors that are attributes count by their bits and where they lie; numbers, words and tuples of them by value;
    other attributes, modules and hooks by identity, so that what changes inside of a list or an object of another class is not
    seen. One pass over the weights.
    """
    if network is None:
        return ()
    others: list[Any] = []
    for module in network.modules():
        others.append((id(type(module)), module.training, *_hooks(module)))
        for name, value in module.__dict__.items():
            if name not in _INTERNAL and not isinstance(value, torch.Tensor):
                others.append((name, _told(value)))
    tensors = _tensors(network)
    return (_bits(tensors), tuple(tensor.data_ptr() for tensor in tensors), tuple(others))


def weights_fingerprint(*networks: nn.Module | None) -> str:
    """The part of `fingerprint` that is about the bits of weights and of tensors that are attributes."""
    return _bits([tensor for network in networks if network is not None for tensor in _tensors(network)])


def plain_state(network: nn.Module) -> tuple[Any, ...]:
    """Classes of all modules and their plain attributes: with `weights_fingerprint` what a network is, wherever it lies."""
    return tuple(
        (type(module).__qualname__, *((name, value) for name, value in module.__dict__.items() if _is_plain(name, value)))
        for module in network.modules()
    )


def _is_plain(name: str, value: Any) -> bool:
    return name not in _INTERNAL and isinstance(value, _PLAIN)


def check_unchanged(wanted: str, *networks: nn.Module | None) -> None:
    """RuntimeError if `weights_fingerprint` of these networks is another one by now."""
    if weights_fingerprint(*networks) != wanted:
        raise RuntimeError(
            "the weights of a network changed between a purification and its backward pass, which would mix old and new ones: "
            "call backward() before the weights are changed, or purify again"
        )


def _tensors(network: nn.Module) -> list[torch.Tensor]:
    tensors = []
    for module in network.modules():
        named = [*module._parameters.items(), *module._buffers.items(), *module.__dict__.items()]
        tensors += [tensor for _, tensor in named if isinstance(tensor, torch.Tensor)]
    return tensors


def _hooks(module: nn.Module) -> Iterator[Any]:
    for name in _HOOKS:
        hooks = getattr(module, name, None)
        yield tuple(map(id, hooks.values())) if hooks else ()


def _told(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return value if value == value else "nan"
    if isinstance(value, tuple):
        return tuple(map(_told, value))
    return id(value)


def _bits(tensors: list[torch.Tensor]) -> str:
    """A hash of all bits. Small tensors are put together first: each on its own would cost more in calls than in memory."""
    gathered: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    sums: list[torch.Tensor] = []

    def flush(key: tuple[torch.device, torch.dtype]) -> None:
        sums.extend(_sums(torch.cat(gathered.pop(key)), small=True))

    with outside_transforms(), torch.no_grad():
        for tensor in tensors:
            words = tensor.detach().reshape(-1)
            if words.is_complex():
                words = torch.view_as_real(words).reshape(-1)
            words = words.view(_WORDS[words.element_size()])
            if len(words) >= _SMALL:
                sums += _sums(words)
                continue
            key = words.device, words.dtype
            gathered.setdefault(key, []).append(words)
            if sum(map(len, gathered[key])) >= _SMALL:
                flush(key)
        for key in list(gathered):
            flush(key)
        digest = hashlib.blake2b(digest_size=16)
        for device, dtype in sorted({(part.device, part.dtype) for part in sums}, key=str):
            parts = [part for part in sums if (part.device, part.dtype) == (device, dtype)]
            digest.update(torch.cat(parts).cpu().numpy().tobytes())
    return digest.hexdigest()


def _sums(words: torch.Tensor, *, small: bool = False) -> list[torch.Tensor]:
    """Sums of runs, as fast as memory is read; they may overflow and wrap, and no wider copy of the weights is made."""
    run = _SHORT_RUN if small else _RUN
    whole = len(words) - len(words) % run
    runs = words[:whole].view(-1, run)
    found = [runs.sum(dim=1, dtype=words.dtype), words[whole:]]
    return [*found, runs.sum(dim=0, dtype=words.dtype)] if small else found
