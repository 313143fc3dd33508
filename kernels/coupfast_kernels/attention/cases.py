"""Attention and its transpose: one head and several, channels and pixels that fill vectors and panels and that do not."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from coupfast_kernels import native
from coupfast_kernels.attention.cpu import attention_cpu, attention_vjp_cpu
from coupfast_kernels.attention.definition import attention_ref, attention_vjp_ref
from coupfast_kernels.inputs import by, normals
from coupfast_kernels.parity import Agreement
from coupfast_kernels.registry import Case, Kernel, Trial, register

#: Roundings of a result besides those of its sums: scaled query, score − largest, exp (2), the inverse sum, product; in the
#: transpose those of the weight, their mean, difference and product.
ROUNDINGS = 12


def _case(shape: tuple[int, ...], heads: int, *, vjp: bool) -> Case:
    def make(device: torch.device) -> Trial:
        q, k, v, dy = normals(device, shape, 4, torch.channels_last)
        batch, channels, height, width = shape
        size, pixels = channels // heads, height * width
        options: dict = dict(heads=heads, scale=1.0 / math.sqrt(size))
        # Sums of random signs round by about the root of their number / 2: scores by that of a head's channels, and so on.
        agreement = Agreement(math.sqrt(size) + math.sqrt(pixels) + ROUNDINGS)
        multiply_adds = batch * heads * pixels**2 * size

        def definition(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
            tensors = [tensor.to(dtype) for tensor in (q, k, v, dy)]
            return attention_vjp_ref(*tensors, **options) if vjp else (attention_ref(*tensors[:3], **options),)

        tokens = [tensor.unflatten(1, (heads, -1)).flatten(3).transpose(2, 3) for tensor in (q, k, v)]
        if not vjp:
            others = {"pytorch, fused": lambda: F.scaled_dot_product_attention(*tokens)}
            return Trial(
                lambda: attention_cpu(q, k, v, **options)[:1], definition, (agreement,), flop=4 * multiply_adds, others=others
            )
        statistics = attention_cpu(q, k, v, **options)[1]
        with torch.enable_grad():
            leaves = [tensor.clone().requires_grad_() for tensor in tokens]
            result = F.scaled_dot_product_attention(*leaves)
        cotangent = dy.unflatten(1, (heads, -1)).flatten(3).transpose(2, 3)
        return Trial(
            lambda: attention_vjp_cpu(q, k, v, statistics, dy, **options),
            definition,
            (agreement,) * 3,
            flop=10 * multiply_adds,
            others={"pytorch, fused": lambda: torch.autograd.grad(result, leaves, cotangent, retain_graph=True)},
        )

    return Case(f"{by(shape)}, {heads} head{'s' if heads > 1 else ''}", make, ("pytorch, fused",))


def _checks(vjp: bool) -> Iterator[Case]:
    # Two queries (of one nothing depends on scores); fewer pixels and channels than a vector; neither a multiple of a panel;
    # more queries than the transpose holds.
    for shape, heads in (((1, 1, 1, 2), 1), ((3, 20, 3, 5), 2), ((2, 37, 4, 4), 1), ((1, 48, 9, 7), 3), ((1, 16, 17, 18), 1)):
        yield _case(shape, heads, vjp=vjp)


def _timed(images: int, vjp: bool) -> Iterator[Case]:
    """DDPM++ deep's; as wide with heads of 64 channels; on the smallest map."""
    for size, heads in ((16, 1), (16, 4), (4, 1)):
        yield _case((images, 256, size, size), heads, vjp=vjp)


for name, transposed in (("attention_cpu", False), ("attention_cpu vjp", True)):
    register(
        Kernel(
            name,
            "cpu",
            functools.partial(_checks, transposed),
            functools.partial(_timed, vjp=transposed),
            missing=native.unavailable,
        )
    )
