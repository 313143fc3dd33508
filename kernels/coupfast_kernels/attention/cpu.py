"""Attention in C++ on channels-last float32 maps (`csrc/attention.h`)."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch

from coupfast_kernels.operations import Attention, AttentionVjp, Operations, compiled

BLOCK_ROWS = 24  #: Queries that a thread takes together.
_ITEMS = 8  # a thread, so that threads end together; more pairs than that need would only leave the caches


def block_pairs(batch: int, heads: int, pixels: int, threads: int) -> int:
    """Pairs of an image and a head that are in scratch memory at a time: `Attention.block`. No bit depends on it."""
    return min(batch * heads, math.ceil(_ITEMS * threads / math.ceil(pixels / BLOCK_ROWS)))


def scratch_floats(attention: ctypes.Structure, threads: int) -> int:
    """Floats of scratch memory that an `Attention` or `AttentionVjp` needs, for its `block`."""
    library = compiled()
    transposed = isinstance(attention, AttentionVjp)
    count = library.coupfast_attention_vjp_scratch if transposed else library.coupfast_attention_scratch
    return count(ctypes.byref(attention), threads)


def attention_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, heads: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_ref`, and what its transpose needs.

    Args:
        q, k, v: As in `attention_ref`, float32; other formats than channels last are copied.
        heads, scale: As there.

    Returns:
        y, channels last, and of every query the largest score and the inverse of Σ exp(score − largest): (2, batch, heads,
        height · width).

    Raises:
        ValueError: for tensors that do not fit each other or the heads.
        NotImplementedError: for a tensor that wants a gradient.
    """
    q, k, v = _checked(heads, q=q, k=k, v=v)
    y = torch.empty_like(q)
    statistics = torch.empty((2, len(q), heads, q.shape[2] * q.shape[3]), dtype=torch.float32)
    structure = Attention(scale=scale, largest=statistics[0].data_ptr(), inverse=statistics[1].data_ptr())
    _run(structure, heads, q=q, k=k, v=v, y=y)
    return y, statistics


def attention_vjp_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, statistics: torch.Tensor, dy: torch.Tensor, *, heads: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`attention_vjp_ref`: dq, dk and dv, channels last, with what `attention_cpu` returned for the same q, k and v.

    Raises:
        ValueError, NotImplementedError: as `attention_cpu`.
    """
    q, k, v, dy = _checked(heads, q=q, k=k, v=v, dy=dy)
    expected = (2, len(q), heads, q.shape[2] * q.shape[3])
    if tuple(statistics.shape) != expected or statistics.dtype != torch.float32 or not statistics.is_contiguous():
        raise ValueError(f"`statistics` is contiguous float32 {expected}, got {statistics.dtype} {tuple(statistics.shape)}")
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    structure = AttentionVjp(
        scale=scale, dy_factor=1.0, largest=statistics[0].data_ptr(), inverse=statistics[1].data_ptr()
    )
    _run(structure, heads, q=q, k=k, v=v, dy=dy, dq=dq, dk=dk, dv=dv)
    return dq, dk, dv


def _checked(heads: int, **maps: torch.Tensor) -> list[torch.Tensor]:
    q = maps["q"]
    for name, tensor in maps.items():
        if tensor.dtype != torch.float32 or tensor.dim() != 4 or tensor.numel() == 0 or tensor.device.type != "cpu":
            raise ValueError(f"`{name}` is float32 on the CPU with four axes and not empty, got {_words(tensor)}")
        if tensor.shape != q.shape:
            raise ValueError(f"`{name}` has the shape of `q`, {tuple(q.shape)}, got {tuple(tensor.shape)}")
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise NotImplementedError("attention_cpu has no gradient of its own: call attention_vjp_cpu, or use attention_ref")
    if heads < 1 or q.shape[1] % heads:
        raise ValueError(f"`heads` divides the {q.shape[1]} channels, got {heads}")
    return [tensor.contiguous(memory_format=torch.channels_last) for tensor in maps.values()]


def _words(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"


def _run(structure: Any, heads: int, **maps: torch.Tensor) -> None:
    batch, channels, height, width = maps["q"].shape
    size, pixels = channels // heads, height * width
    structure.batch, structure.heads, structure.size, structure.pixels = batch, heads, size, pixels
    for name, tensor in maps.items():
        setattr(structure, name, tensor.data_ptr())
        setattr(structure, f"{name}_pixel", channels)
        setattr(structure, f"{name}_head", size)
    threads = torch.get_num_threads()
    structure.block = block_pairs(batch, heads, pixels, threads)
    scratch = torch.empty(scratch_floats(structure, threads), dtype=torch.float32)
    structure.scratch = scratch.data_ptr()
    Operations([structure]).run(threads)
