"""Whether images and networks can serve, said before any work: shapes, ranges, dtypes, and one image through each network."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from coupfast.engine.networks import check_eval, dtype_and_device


def check_network(network: Any, name: str) -> nn.Module:
    if not isinstance(network, nn.Module):
        raise TypeError(f"the {name} is an nn.Module, got {type(network).__name__}; load_score and load_classifier load one")
    check_eval(network, name)
    return network


def check_images(x: Any) -> None:
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


def check_against(network: nn.Module, name: str, x: torch.Tensor) -> None:
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


def try_networks(score: nn.Module, classifier: nn.Module | None, example: torch.Tensor) -> None:
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


def words(name: str, values: Any, batch: int, device: torch.device) -> torch.Tensor:
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
