"""A 3 × 3 convolution that norms what it reads: conv(silu(GroupNorm(x))) without the map between the two.

    statistics   of x, by the kernel that would have normed it (`group_norm_statistics`)
    V = Bᵀ d B   of every tile d of silu((x − mean − shift) / deviation · weight + bias), which is 0 outside of the image
    M, y         as in `gpu_winograd.py`

What is applied to a pixel is what the norm's own kernel applies to it, operation by operation: the result has the bits of
`group_norm_silu` and then `conv3x3`. It spares 4 bytes written an element, and what is read of them again beyond the cache; it
costs a norm and a SiLU 36 / 16 times a pixel instead of once.

It has no transpose of its own: `group_norm_silu_vjp` reads x, which stays, and never the map between. So the transpose of the
parts is that of the whole, and nothing is there for it to spare.
"""

from __future__ import annotations

import torch
from torch import library

from coupfast_kernels.convolution.definition import conv3x3_normed_ref
from coupfast_kernels.convolution.gpu import ALGORITHMS, _new, _out_channels, fastest_launch
from coupfast_kernels.convolution.gpu_tuning import Config
from coupfast_kernels.convolution.gpu_winograd import launch_winograd


def conv3x3_normed(
    x: torch.Tensor,
    statistics: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    image_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    scale: float = 1.0,
    algorithm: str = "winograd",
) -> torch.Tensor:
    """Fused `conv3x3_normed_ref`, not differentiable.

    Args:
        x: As in `conv3x3`.
        statistics: Of `x`, shape (batch, 3, groups), by `group_norm_statistics`; contiguous, as are weight and bias.
        norm_weight, norm_bias: The norm's, shape (in_channels,).
        packed, bias, image_bias, residual, scale: As in `conv3x3`.
        algorithm: One of `ALGORITHMS` that is a way of Winograd's. The CPU computes the definition whichever it is.

    Returns:
        As `conv3x3`.

    Raises:
        TypeError, ValueError: for tensors that do not fit each other, another memory format or algorithm.
        RuntimeError: as `conv3x3`.
    """
    return conv3x3_normed_op(
        x, statistics, norm_weight, norm_bias, packed, bias, image_bias, residual, scale, algorithm
    )


@library.custom_op(
    "coupfast::conv3x3_normed",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor statistics, Tensor norm_weight, Tensor norm_bias, Tensor packed, Tensor? bias, "
    "Tensor? image_bias, Tensor? residual, float scale, str algorithm) -> Tensor",
)
def conv3x3_normed_op(x, statistics, norm_weight, norm_bias, packed, bias, image_bias, residual, scale, algorithm):
    """`conv3x3_normed` as PyTorch's dispatcher knows it. On the CPU: the definition, for tests of what runs on the GPU."""
    y = _result(x, statistics, norm_weight, norm_bias, packed, bias, image_bias, residual, algorithm)
    if y.numel() == 0:
        return y
    weight, added = ALGORITHMS[algorithm].unpack(packed), dict(image_bias=image_bias, residual=residual, scale=scale)
    return y.copy_(conv3x3_normed_ref(x, statistics, norm_weight, norm_bias, weight, bias, **added))


@conv3x3_normed_op.register_fake
def _(x, statistics, norm_weight, norm_bias, packed, bias, image_bias, residual, scale, algorithm):
    return _result(x, statistics, norm_weight, norm_bias, packed, bias, image_bias, residual, algorithm)


@conv3x3_normed_op.register_kernel("cuda")
def _on_cuda(x, statistics, norm_weight, norm_bias, packed, bias, image_bias, residual, scale, algorithm):
    y = _result(x, statistics, norm_weight, norm_bias, packed, bias, image_bias, residual, algorithm)
    norm = (statistics, norm_weight, norm_bias)

    def launch(config: Config) -> None:
        launch_winograd(y, x, packed, bias, image_bias, residual, scale, config, norm=norm)

    fastest_launch(y, x, algorithm, launch)  # of the convolution alone: how it is cut is a matter of its products
    return y


def _result(x, statistics, norm_weight, norm_bias, packed, bias, image_bias, residual, algorithm) -> torch.Tensor:
    """Uninitialised, after checking that everything fits; reads no values."""
    out_channels = _out_channels(x, packed, None, bias, image_bias, residual, algorithm)
    if ALGORITHMS[algorithm].way != "winograd":
        ways = ", ".join(name for name, each in ALGORITHMS.items() if each.way == "winograd")
        raise ValueError(f"`algorithm` of a convolution that norms what it reads is one of {ways}, got {algorithm!r}")
    batch, channels = x.shape[:2]
    groups = statistics.shape[-1] if statistics.dim() == 3 else 0
    if tuple(statistics.shape) != (batch, 3, groups) or groups < 1 or channels % groups:
        raise ValueError(
            f"`statistics` are of {batch} images and of groups that divide {channels} channels, shape (batch, 3, groups), got "
            f"{tuple(statistics.shape)}"
        )
    for name, tensor in {"statistics": statistics, "norm_weight": norm_weight, "norm_bias": norm_bias}.items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"conv3x3_normed takes float32, `{name}` is {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"`x` is on {x.device}, `{name}` on {tensor.device}; a kernel reads from its own device")
        if not tensor.is_contiguous() or (name != "statistics" and tuple(tensor.shape) != (channels,)):
            raise ValueError(
                f"`{name}` must be contiguous{'' if name == 'statistics' else f' of shape ({channels},)'}, got shape "
                f"{tuple(tensor.shape)}, strides {tensor.stride()}"
            )
    return _new(x, out_channels)
