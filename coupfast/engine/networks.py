"""Networks inside a purifier: in eval mode, frozen, and sharing their weights' memory with the caller's."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def check_eval(network: nn.Module, name: str) -> None:
    """ValueError if any module that behaves differently in training is in training mode."""
    for path, module in network.named_modules():
        if module.training and (not list(module.children()) or _is_stochastic_or_batch_dependent(module)):
            raise ValueError(
                f"the {name} is in training mode (`{path or type(module).__name__}`): its dropout and batch statistics "
                f"would make the purification irreproducible; call `{name.split()[0]}.eval()` first"
            )


def _is_stochastic_or_batch_dependent(module: nn.Module) -> bool:
    rate = getattr(module, "dropout", None)
    if isinstance(rate, float) and rate > 0:  # by `F.dropout(..., self.training)`
        return True
    return isinstance(module, (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm))


def frozen(network: Network) -> Network:
    """A copy of the modules around the same weights, none of which requires a gradient.

    The caller's network keeps its `requires_grad` flags. Weights that are replaced (by `.to(device)`, say) are not seen by the
    copy, and what an engine makes of them beforehand does not follow changes in place: compare `coupfast.fingerprint`.
    """
    memo: dict[int, object] = {}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(_usable(parameter), requires_grad=False)
    for buffer in network.buffers():
        memo[id(buffer)] = _usable(buffer)
    for module in network.modules():  # results that are kept as attributes, as the old weight_norm does, have no deepcopy
        for value in module.__dict__.values():
            if isinstance(value, torch.Tensor) and id(value) not in memo:
                memo[id(value)] = _usable(value)
    try:
        alias = copy.deepcopy(network, memo)
    except Exception as error:
        raise TypeError(
            f"{type(network).__name__} cannot be copied ({type(error).__name__}: {error}); a purifier works on a frozen "
            f"copy of a network's modules, so everything in them must survive `copy.deepcopy`"
        ) from error
    return alias.requires_grad_(False)


def _usable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without its graph; a copy of one that was made in inference mode, which autograd would refuse."""
    return tensor.detach().clone() if tensor.is_inference() else tensor.detach()


def dtype_and_device(network: nn.Module) -> tuple[torch.dtype, torch.device] | None:
    """Those of the first floating-point weight; None for a network without one."""
    for tensor in [*network.parameters(), *network.buffers()]:
        if tensor.is_floating_point():
            return tensor.dtype, tensor.device
    return None
