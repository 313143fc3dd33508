"""GroupNorm in C++ on channels-last float32 maps (`csrc/norm.h`): as an affine map a channel, which convolutions take in, and
its transpose through an activation."""

from __future__ import annotations

from typing import Any

import torch

from coupfast_kernels.operations import IDENTITY, SILU, GroupNormAffine, GroupNormVjp, Operations


def group_norm_affine_cpu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, groups: int, eps: float
) -> tuple[torch.Tensor, ...]:
    """`group_norm_affine_ref`: subtract, multiply, add and inverse deviation, each (batch, channels).

    Raises:
        ValueError: for tensors that do not fit each other, or groups that do not divide the channels.
    """
    (x,) = _maps(groups, x=x)
    channels = _channels(x, weight=weight, bias=bias)
    found = torch.empty((4, *x.shape[:2]), dtype=torch.float32)
    structure = GroupNormAffine(eps=eps, x_pixel=x.shape[1], x=x.data_ptr(), **_addresses(found))
    structure.gamma, structure.beta = (tensor.data_ptr() for tensor in channels)
    _run(structure, x, groups)
    return tuple(found)


def group_norm_vjp_cpu(
    x: torch.Tensor,
    gy: torch.Tensor,
    gx: torch.Tensor | None,
    weight: torch.Tensor,
    affine: tuple[torch.Tensor, ...],
    *,
    groups: int,
    factor: float = 1.0,
    silu: bool = True,
) -> torch.Tensor:
    """The transpose of GroupNorm with SiLU behind it, `group_norm_silu_vjp_ref` with scale 1, plus `factor` · `gx`.

    Args:
        x: What was normalised, (batch, channels, height, width).
        gy: Its result's cotangent.
        gx: Another cotangent of x, or None.
        weight: Of each channel.
        affine: As `group_norm_affine_cpu` returned it for x.
        groups, silu: As there.

    Returns:
        ∂L/∂x, channels last.

    Raises:
        ValueError: as `group_norm_affine_cpu`.
    """
    maps = _maps(groups, x=x, gy=gy, **({} if gx is None else {"gx": gx}))
    x, gy = maps[:2]
    (weight,) = _channels(x, weight=weight)
    known = torch.stack(affine)
    if known.shape != (4, *x.shape[:2]) or known.dtype != torch.float32:
        raise ValueError(f"`affine` is four float32 tensors {tuple(x.shape[:2])}, got {known.dtype} {tuple(known.shape)}")
    result = torch.empty_like(x)
    structure = GroupNormVjp(
        activation=SILU if silu else IDENTITY,
        x=x.data_ptr(),
        dh=gy.data_ptr(),
        dx=result.data_ptr(),
        gamma=weight.data_ptr(),
        **{f"{name}_pixel": x.shape[1] for name in ("x", "dh", "dx", "residual")},
        **_addresses(known),
    )
    if gx is not None:
        structure.residual, structure.residual_factor = maps[2].data_ptr(), factor
    _run(structure, x, groups)
    return result


def _maps(groups: int, **maps: torch.Tensor) -> list[torch.Tensor]:
    shape = maps["x"].shape
    for name, tensor in maps.items():
        if tensor.dtype != torch.float32 or tensor.dim() != 4 or tensor.shape != shape or tensor.numel() == 0:
            raise ValueError(
                f"`{name}` is float32 with four axes, like `x` and not empty, got {tensor.dtype} {tuple(tensor.shape)}"
            )
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise NotImplementedError("group norms on the CPU have no gradient of their own: call group_norm_vjp_cpu")
    if groups < 1 or shape[1] % groups:
        raise ValueError(f"`groups` divides the {shape[1]} channels, got {groups}")
    return [tensor.contiguous(memory_format=torch.channels_last) for tensor in maps.values()]


def _channels(x: torch.Tensor, **tensors: torch.Tensor) -> list[torch.Tensor]:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or tensor.shape != x.shape[1:2]:
            raise ValueError(f"`{name}` is float32 with {x.shape[1]} values, got {tensor.dtype} {tuple(tensor.shape)}")
    return [tensor.detach().contiguous() for tensor in tensors.values()]


def _addresses(affine: torch.Tensor) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in zip(("subtract", "multiply", "add", "inverse"), affine, strict=True)}


def _run(structure: Any, x: torch.Tensor, groups: int) -> None:
    structure.batch, structure.channels, structure.groups = x.shape[0], x.shape[1], groups
    structure.pixels = x.shape[2] * x.shape[3]
    Operations([structure]).run(torch.get_num_threads())
