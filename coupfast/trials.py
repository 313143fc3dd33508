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


def check_images(x: Any, *, bounded: bool = True) -> None:
    """TypeError or ValueError if these are no images.

    Args:
        x: Images, shape (batch, channels, height, width).
        bounded: Whether their values have to be in [0, 1], up to rounding.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"images are a torch.Tensor, got {type(x).__name__}; of an array `torch.as_tensor(x)` makes one")
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
    rounding = rounding_of(x.dtype)
    if bounded and (low < -rounding or high > 1.0 + rounding):
        digits = 9 if x.dtype == torch.float32 else 17
        raise ValueError(
            f"images have values in [0, 1], got [{low:.{digits}g}, {high:.{digits}g}]; purify rescales to [-1, 1] itself; for "
            "images that leave the range on purpose: out_of_range='clip' or 'allow'"
        )


def rounding_of(dtype: torch.dtype) -> float:
    """How far beyond [0, 1] an image of this dtype may be by rounding: a few operations' worth."""
    return 8 * torch.finfo(dtype).eps


def check_against(network: nn.Module, name: str, x: torch.Tensor, precision: str) -> None:
    """ValueError if a network is of another dtype or on another device than the images, or made for another size."""
    dtypes = {parameter.dtype for parameter in network.parameters() if parameter.is_floating_point()}
    if len(dtypes) > 1 and precision != "fast":
        raise ValueError(
            f"the {name} has weights of {', '.join(sorted(map(str, dtypes)))}, and precision={precision!r} computes in the "
            f"images' {x.dtype} throughout; convert it (`.to(dtype)`), or take it as it is with precision='fast'"
        )
    if dtypes and dtypes != {x.dtype} and precision != "fast":
        raise ValueError(
            f"images are {x.dtype}, the {name} is {dtypes.pop()}; convert one of them (`.to(dtype)`), or, for a network that "
            "converts inside, precision='fast'"
        )
    found = dtype_and_device(network)
    if found is not None and found[1] != x.device:
        raise ValueError(f"images are on {x.device}, the {name} is on {found[1]}; move one of them (`.to(device)`)")
    if not type(network).__module__.startswith("coupfast."):
        return  # what other people's attributes of these names mean is theirs to know
    size, channels = getattr(network, "image_size", None), getattr(network, "channels", None)
    if isinstance(channels, int) and channels != x.shape[1]:
        raise ValueError(f"images have {x.shape[1]} channels, the {name} takes {channels}")
    if isinstance(size, int) and tuple(x.shape[2:]) != (size, size):
        raise ValueError(f"images are {x.shape[2]} x {x.shape[3]}, the {name} is made for {size} x {size}")


def try_networks(score: nn.Module, classifier: nn.Module | None, example: torch.Tensor) -> None:
    """One image and its negative through each network, so that one that cannot serve says so before any work.

    Args:
        score, classifier: In eval mode, parameters frozen.
        example: One image in [0, 1], shape (1, channels, height, width).

    Raises:
        ValueError: for a network that fails, returns something else, gives different results for the same input, writes into
            its input, or lets the other images of a batch change an image's result.
    """
    x = 2.0 * example - 1.0
    label = torch.full((1,), 1.0, dtype=example.dtype, device=example.device)
    eps_hat = _twice("score net", score, x, label)
    if not isinstance(eps_hat, torch.Tensor) or eps_hat.shape != example.shape:
        found = tuple(eps_hat.shape) if isinstance(eps_hat, torch.Tensor) else type(eps_hat).__name__
        hint = "; coupfast.load_score wraps a diffusers model" if hasattr(eps_hat, "sample") else ""
        if isinstance(eps_hat, torch.Tensor) and eps_hat.dim() == 4 and eps_hat.shape[1] == 2 * example.shape[1]:
            hint = "; of a network that also predicts a variance: load_score(network, learned_variance=True)"
        hint = hint or _swapped(eps_hat)
        raise ValueError(f"the score net must return eps_hat of shape {tuple(example.shape)}, got {found}{hint}")
    if eps_hat.dtype != example.dtype:
        raise ValueError(f"the score net must return {example.dtype}, got {eps_hat.dtype}")
    _check_alone("score net", score, eps_hat, x, label)
    if classifier is not None:
        try_classifier(classifier, example)


def try_classifier(classifier: nn.Module, example: torch.Tensor, *, differentiable: bool = True) -> None:
    """The same of a classifier of images in [0, 1].

    Args:
        differentiable: Whether it guides: its output has to repeat itself and to have a gradient. One that only classifies what
            was purified may draw random numbers.
    """
    with torch.random.fork_rng(devices=[example.device] if example.device.type == "cuda" else []):
        logits = _called("classifier", classifier, example.clone())
        if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or len(logits) != 1 or logits.shape[1] < 2:
            found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise ValueError(f"the classifier must return logits of shape (batch, classes >= 2), got {found}")
        if differentiable:
            _twice("classifier", classifier, example)
        again = _called("classifier", classifier, example.clone())
        if torch.equal(logits, again):  # else it is random, and nothing can be told from two results
            _check_alone("classifier", classifier, logits, example)
    if not differentiable:
        return
    with torch.enable_grad():
        image = example.clone().requires_grad_()
        logits, gradient = classifier(image), None
        if logits.requires_grad:
            (gradient,) = torch.autograd.grad(logits.sum(), image, allow_unused=True)
    if gradient is None:
        raise ValueError(
            "the classifier's output does not depend on its input as far as autograd can see (a `no_grad` or a `detach` inside "
            "it?); guidance needs its gradient"
        )


def _called(name: str, network: nn.Module, *inputs: torch.Tensor) -> Any:
    try:
        with torch.no_grad():
            return network(*inputs)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        shapes = " and ".join(f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for tensor in inputs)
        words = " ".join(str(error).split())
        hint = ""
        if "embedding" in words or "indices" in words:
            hint = "; labels are floats, 999 t: a network of integer labels needs an adapter, `load_score(…, labels='rounded')`"
        elif "positional argument" in words:
            hint = f"; a {name} takes {'(x, labels)' if name == 'score net' else 'images only'}: are the networks swapped?"
        elif says := [f"{key} = {getattr(network, key)}" for key in ("channels", "image_size") if hasattr(network, key)]:
            hint = f"; it says {', '.join(says)}"
        shown = words if len(words) <= 300 else f"{words[:300]}..."
        raise ValueError(f"the {name} fails on inputs of {shapes}: {type(error).__name__}: {shown}{hint}") from error


def _twice(name: str, network: nn.Module, *inputs: torch.Tensor) -> Any:
    """The network's result; ValueError if it writes into its inputs or gives another result the second time."""
    inputs = tuple(tensor.clone() for tensor in inputs)
    versions = [tensor._version for tensor in inputs]
    first, second = _called(name, network, *inputs), _called(name, network, *inputs)
    if versions != [tensor._version for tensor in inputs]:
        raise ValueError(f"the {name} writes into its input; a purifier needs the state again: work on a copy in `forward`")
    if isinstance(first, torch.Tensor) and not _close(second, first):
        raise ValueError(
            f"the {name} gives different results for the same input, or none that is finite: it keeps state, draws "
            f"random numbers or overflows, and the steps that ran could not be rebuilt from it"
        )
    return first


def _check_alone(name: str, network: nn.Module, result: torch.Tensor, x: torch.Tensor, *labels: torch.Tensor) -> None:
    """ValueError if an image's result changes with the other images of its batch."""
    other = -x if labels else 1.0 - x
    pair = _called(name, network, torch.cat([x, other]), *(label.expand(2).clone() for label in labels))
    if not isinstance(pair, torch.Tensor) or len(pair) != 2:
        found = tuple(pair.shape) if isinstance(pair, torch.Tensor) else type(pair).__name__
        raise ValueError(f"the {name} returns {found} for two images, and {tuple(result.shape)} for one")
    if not _close(pair[:1], result):
        apart = float((pair[:1] - result).abs().max())
        raise ValueError(
            f"the {name}'s result for an image depends on the other images of its batch: it moves by {apart:.2g} of "
            f"{float(result.abs().max()):.2g} beside another image (a batch norm without running statistics?)"
        )


def _close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 1e-3 * wanted.abs().max())


def _swapped(result: Any) -> str:
    logits = isinstance(result, torch.Tensor) and result.dim() == 2
    return "; that looks like logits: are the networks swapped?" if logits else ""


def words(name: str, values: Any, batch: int, device: torch.device) -> torch.Tensor:
    """(batch,) int64 with values in [0, 2³²)."""
    try:
        tensor = values if isinstance(values, torch.Tensor) else torch.as_tensor(values, device="cpu")
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
