"""Convolutions and their transposes, by each algorithm of the GPU's and of the CPU's."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from coupfast_kernels import native
from coupfast_kernels.convolution import gpu_split, gpu_winograd
from coupfast_kernels.convolution.cpu import DIRECT, F2, F4, pack_weights, packed_conv2d, packed_conv2d_vjp
from coupfast_kernels.convolution.definition import FLOAT32_LIMIT, TF32_LIMIT, conv2d_ref, conv3x3_ref
from coupfast_kernels.convolution.gpu import ALGORITHMS, _launch, _new, conv3x3, conv3x3_op, launch_direct
from coupfast_kernels.convolution.gpu_normed import conv3x3_normed, conv3x3_normed_op
from coupfast_kernels.convolution.gpu_tuning import CONFIGS, Config, trying
from coupfast_kernels.group_norm.cases import EPS, ROUNDINGS, interpret_statistics
from coupfast_kernels.group_norm.definition import group_norm_silu_ref
from coupfast_kernels.group_norm.gpu import group_norm_silu, group_norm_statistics
from coupfast_kernels.inputs import by, normals
from coupfast_kernels.parity import Agreement
from coupfast_kernels.registry import Case, Kernel, Trial, register

LAST, SCALE = torch.channels_last, 0.5**0.5


def _rounding(terms: int) -> Agreement:
    """Chains of additions of random signs round by about the root of their number / 2, and five roundings are behind them."""
    return Agreement(math.sqrt(terms) + 5)


# --- the GPU's --------------------------------------------------------------------------------------------------------


def _conv3x3(
    shape: tuple[int, ...],
    out_channels: int,
    algorithm: str,
    *,
    vjp: bool = False,
    most: int | None = None,
    others: tuple[str, ...] = (),
) -> Case:
    """With everything that can be added; `most` configs are tried."""

    def make(device: torch.device) -> Trial:
        (x,) = normals(device, shape, 1, LAST)
        weight = normals(device, (out_channels, shape[1], 3, 3), 1)[0] / math.sqrt(9 * shape[1])
        pack = ALGORITHMS[algorithm].pack
        packed, packed_vjp = pack(weight), pack(weight.flip(2, 3).transpose(0, 1))
        y_shape = (shape[0], out_channels, *shape[2:])
        residual, v = normals(device, y_shape, 2, LAST)
        (bias,), (image_bias,) = normals(device, (out_channels,), 1), normals(device, y_shape[:2], 1)
        added: Any = dict(image_bias=image_bias, residual=residual, scale=SCALE)

        def kernel(x: torch.Tensor) -> torch.Tensor:
            with trying(most):
                return conv3x3(x, packed, packed_vjp, bias, algorithm=algorithm, **added)

        def run() -> tuple[torch.Tensor]:
            if not vjp:
                return (kernel(x),)
            with trying(most), torch.enable_grad():
                leaf = x.clone().requires_grad_()
                return torch.autograd.grad(kernel(leaf), leaf, v)  # type: ignore[return-value]

        def definition(dtype: torch.dtype) -> tuple[torch.Tensor]:
            if vjp:
                return (F.conv_transpose2d(v.to(dtype), weight.to(dtype), padding=1) * SCALE,)
            more: Any = {name: t.to(dtype) if isinstance(t, torch.Tensor) else t for name, t in added.items()}
            return (conv3x3_ref(x.to(dtype), weight.to(dtype), bias.to(dtype), **more),)

        limits = {"tf32x3": Agreement(limit=FLOAT32_LIMIT), "tf32": Agreement(limit=TF32_LIMIT)}
        agreement = limits.get(ALGORITHMS[algorithm].products) or _rounding(9 * (out_channels if vjp else shape[1]))
        last = weight.contiguous(memory_format=LAST)
        # Some of cuDNN's algorithms are for contiguous maps alone; copies there and back do not count against them here.
        contiguous, more = x.contiguous(), added | {"residual": residual.contiguous()}
        return Trial(
            run,
            definition,
            (agreement,),
            flop=2 * 9 * shape[1] * out_channels * x.numel() // shape[1],
            others={
                "pytorch, channels last": lambda: conv3x3_ref(x, last, bias, **added),
                "pytorch, contiguous": lambda: conv3x3_ref(contiguous, weight, bias, **more),
            },
        )

    return Case(f"{by(shape)} -> {out_channels}, {'vjp' if vjp else 'forward'}", make, others)


def _checks(algorithm: str) -> Iterator[Case]:
    # Border tiles in both directions; three channels in and out, as at the ends of a network. Of a network's shapes calibration
    # compares the config that it chooses; here two a shape are tried, since all would take minutes to compile.
    # Some have no such ends.
    shapes = [((2, 64, 16, 16), 96), ((3, 3, 9, 11), 20), ((2, 40, 8, 8), 3)]
    least = ALGORITHMS[algorithm].least_channels
    for shape, out_channels in [shapes[0], ((3, 40, 9, 11), 20)] if least > 3 else shapes:
        for vjp in (False, True):
            yield _conv3x3(shape, out_channels, algorithm, vjp=vjp, most=2)


def _timed(images: int, algorithm: str) -> Iterator[Case]:
    """DDPM++ deep's most frequent layers, and a WRN-28-10's."""
    layers = [(256, 256, 16), (128, 128, 32), (512, 256, 16), (256, 256, 8), (256, 256, 4)]
    for in_channels, out_channels, size in [*layers, (160, 160, 32), (320, 320, 16), (640, 640, 8)]:
        shape = (images, in_channels, size, size)
        yield _conv3x3(shape, out_channels, algorithm, others=("pytorch, channels last", "pytorch, contiguous"))


def _normed(
    shape: tuple[int, ...], out_channels: int, groups: int, *, most: int | None = None, others: tuple[str, ...] = ()
) -> Case:
    """silu(GroupNorm(x)) inside of Winograd's, from the statistics on, with everything that can be added."""

    def make(device: torch.device) -> Trial:
        (x,) = normals(device, shape, 1, LAST)
        spread, shift = normals(device, shape[1:2], 2)
        norm = (1.0 + 0.3 * torch.tanh(spread), 0.3 * torch.tanh(shift))
        weight = normals(device, (out_channels, shape[1], 3, 3), 1)[0] / math.sqrt(9 * shape[1])
        y_shape = (shape[0], out_channels, *shape[2:])
        (residual,), (image_bias,) = normals(device, y_shape, 1, LAST), normals(device, y_shape[:2], 1)
        (bias,) = normals(device, (out_channels,), 1)
        added: Any = dict(image_bias=image_bias, residual=residual, scale=SCALE)
        packed = gpu_winograd.pack_winograd(weight)

        def run() -> tuple[torch.Tensor]:
            with trying(most):
                _, statistics = group_norm_statistics(x, groups=groups, eps=EPS)
                return (conv3x3_normed(x, statistics, *norm, packed, bias, **added),)

        def apart() -> torch.Tensor:
            _, normed = group_norm_silu(x, *norm, groups=groups, eps=EPS)
            return conv3x3(normed, packed, None, bias, algorithm="winograd", **added)

        def definition(dtype: torch.dtype) -> tuple[torch.Tensor]:
            more: Any = {name: t.to(dtype) if isinstance(t, torch.Tensor) else t for name, t in added.items()}
            _, normed = group_norm_silu_ref(x.to(dtype), *(t.to(dtype) for t in norm), groups=groups, eps=EPS)
            return (conv3x3_ref(normed, weight.to(dtype), bias.to(dtype), **more),)

        return Trial(
            run,
            definition,
            # A sum of random signs keeps the relative error of what it adds.
            (Agreement(math.sqrt(9 * shape[1]) + 5 + ROUNDINGS),),
            flop=2 * 9 * shape[1] * out_channels * x.numel() // shape[1],
            others={"apart": apart},
        )

    return Case(f"{by(shape)} -> {out_channels}, {groups} groups", make, others)


def _timed_normed(images: int) -> Iterator[Case]:
    """DDPM++ deep's most frequent layers behind a norm."""
    for in_channels, out_channels, size in ((256, 256, 16), (128, 128, 32), (512, 256, 16), (256, 256, 8)):
        yield _normed((images, in_channels, size, size), out_channels, 32, others=("apart",))


def _interpret_normed() -> None:
    def with_the_first_config(x, statistics, norm_weight, norm_bias, packed, bias, image_bias, residual, scale, algorithm):
        y = _new(x, packed.shape[ALGORITHMS[algorithm].out_axis])
        norm, config = (statistics, norm_weight, norm_bias), CONFIGS[algorithm][0]
        gpu_winograd.launch_winograd(y, x, packed, bias, image_bias, residual, scale, config, norm=norm)
        return y

    interpret_statistics()
    conv3x3_normed_op.register_kernel("cpu")(with_the_first_config)


def _interpret() -> None:
    def with_the_first_config(x, packed, packed_vjp, bias, image_bias, residual, scale, algorithm):
        y = _new(x, packed.shape[ALGORITHMS[algorithm].out_axis])
        _launch(y, x, packed, bias, image_bias, residual, scale, algorithm, CONFIGS[algorithm][0])
        return y

    conv3x3_op.register_kernel("cpu")(with_the_first_config)


def launch(shape: tuple[int, ...], out_channels: int, algorithm: str, config: Config, *, fused: bool = True) -> None:
    """Launch the kernel for images of a shape; `fused`: with everything that can be added, as DDPM++'s second ones.

    Of an algorithm that splits the sum: the kernel of the parts, to which nothing is added.
    """
    x, packed = torch.empty(shape, memory_format=LAST), torch.empty(ALGORITHMS[algorithm].packed_shape(shape[1], out_channels))
    y = _new(x, out_channels)
    added: tuple[Any, Any, Any] = (None, None, None)
    if fused and ALGORITHMS[algorithm].way == "direct":
        added = (torch.empty(out_channels), torch.empty(shape[0], out_channels), y)
    launch_direct(y, x, packed, *added, 0.5, algorithm, config)


def launch_sum_of_parts(out_channels: int) -> None:
    """Launch the kernel that adds the parts, for an image of 16 × 16, with everything that can be added."""
    y = torch.empty(1, out_channels, 16, 16, memory_format=LAST)
    parts = torch.empty(gpu_split.PARTS, y.numel())
    gpu_split.launch_sum(y, parts, torch.empty(out_channels), torch.empty(1, out_channels), y, 0.5)


def launch_winograd_part(
    part: str, in_channels: int, out_channels: int, config: Config | None = None, algorithm: str = "winograd"
) -> None:
    """Launch one kernel of Winograd's for 8 images of 32 × 32: "input", also "normed" in 4 groups, "product" by a config, or
    "output" with everything."""
    x, y = (torch.empty(8, channels, 32, 32, memory_format=LAST) for channels in (in_channels, out_channels))
    tiles = gpu_winograd.tiles_of(x)
    v, m = (torch.empty(36, tiles, channels) for channels in (in_channels, out_channels))
    if part == "input":
        gpu_winograd.launch_input(v, x, 0, tiles)
    elif part == "normed":
        word = torch.empty(in_channels)
        gpu_winograd.launch_input(v, x, 0, tiles, (torch.empty(8, 3, 4), word, word))
    elif part == "output":
        gpu_winograd.launch_output(y, m, torch.empty(out_channels), torch.empty(8, out_channels), y, 0.5, 0, tiles)
    else:
        assert config is not None
        packed = torch.empty(ALGORITHMS[algorithm].packed_shape(in_channels, out_channels))
        gpu_winograd.launch_product(m, v, packed, tiles, config)


def _launches(algorithm: str) -> Mapping[str, Callable[[], object]]:
    """Every config. Of its shape a launch's machine code knows which channels are multiples of 16: all but 3."""
    configs, shape = CONFIGS[algorithm], (8, 128, 32, 32)
    def name(config: Config) -> str:
        return f"{algorithm} {config.block_m} × {config.block_n} × {config.block_k}"

    if ALGORITHMS[algorithm].way == "winograd":
        product = functools.partial(launch_winograd_part, "product", 128, 128, algorithm=algorithm)
        products = {name(config): functools.partial(product, config) for config in configs}
        if algorithm != "winograd":  # the transforms are the same
            return products
        return products | {
            "winograd, input": functools.partial(launch_winograd_part, "input", 128, 128),
            "winograd, input, 20 channels": functools.partial(launch_winograd_part, "input", 20, 128),
            "winograd, output": functools.partial(launch_winograd_part, "output", 128, 128),
            "winograd, output, 20 channels": functools.partial(launch_winograd_part, "output", 128, 20),
        }
    found = {name(config): functools.partial(launch, shape, 128, algorithm, config) for config in configs}
    if ALGORITHMS[algorithm].way == "split":
        found |= {f"{algorithm}, sum": functools.partial(launch_sum_of_parts, 128)}
    if ALGORITHMS[algorithm].least_channels <= 3:
        found |= {f"{algorithm}, 3 channels in": functools.partial(launch, (8, 3, 32, 32), 128, algorithm, configs[0])}
    return found | {f"{algorithm}, 3 channels out": functools.partial(launch, shape, 3, algorithm, configs[-3])}


for each in ALGORITHMS:
    register(
        Kernel(
            f"conv3x3 {each}",
            "cuda",
            functools.partial(_checks, each),
            functools.partial(_timed, algorithm=each),
            interpret=_interpret,
            launches=functools.partial(_launches, each),
        )
    )
register(
    Kernel(
        "conv3x3_normed",
        "cuda",
        # Border tiles; channels and groups that fill no block.
        lambda: (_normed(*given, most=2) for given in (((2, 64, 16, 16), 96, 16), ((3, 40, 9, 11), 20, 5))),
        _timed_normed,
        interpret=_interpret_normed,
        launches=lambda: {
            f"winograd, normed input, {channels} channels": functools.partial(launch_winograd_part, "normed", channels, 128)
            for channels in (128, 20)
        },
    )
)


# --- the CPU's --------------------------------------------------------------------------------------------------------


def _conv2d(shape: tuple[int, ...], out_channels: int, kernel: int, stride: int, tile: int, *, vjp: bool = False) -> Case:
    def make(device: torch.device) -> Trial:
        weight = normals(device, (out_channels, shape[1], kernel, kernel), 1)[0] / math.sqrt(kernel**2 * shape[1])
        (bias,), (image,) = normals(device, (out_channels,), 1), normals(device, shape, 1, LAST)
        packed = pack_weights(weight, tile)
        x: torch.Tensor = image
        arguments: tuple[Any, ...] = (packed, bias, out_channels, kernel, stride, tile)
        if vjp:
            size = [(axis + 2 * (kernel // 2) - kernel) // stride + 1 for axis in shape[2:]]
            (x,) = normals(device, (shape[0], out_channels, *size), 1, LAST)
            packed = pack_weights(weight, tile, transposed=True, stride=stride)

        def run() -> tuple[torch.Tensor]:
            if vjp:
                return (packed_conv2d_vjp(x, packed, (shape[1], shape[2], shape[3]), kernel, stride, tile),)
            return (packed_conv2d(x, *arguments),)

        def definition(dtype: torch.dtype) -> tuple[torch.Tensor]:
            if vjp:
                geometry = [stride] * 2, [kernel // 2] * 2, [1, 1], False, [0, 0], 1, [True, False, False]
                backward = torch.ops.aten.convolution_backward
                return (backward(x.to(dtype), image.to(dtype), weight.to(dtype), None, *geometry)[0],)
            return (conv2d_ref(x.to(dtype), weight.to(dtype), bias.to(dtype), stride),)

        terms = kernel**2 * x.shape[1]
        return Trial(
            run,
            definition,
            # Winograd's own error is of the transforms: docs/how/kernels-cpu.md has it beside the direct sum's.
            (_rounding(terms) if tile == DIRECT else Agreement(limit=FLOAT32_LIMIT),),
            flop=2 * kernel**2 * shape[1] * out_channels * shape[0] * (shape[2] // stride) * (shape[3] // stride),
            others={"pytorch, channels last": lambda: definition(torch.float32)},
        )

    way = f"{kernel} x {kernel}{f', stride {stride}' if stride > 1 else ''}, {'vjp' if vjp else 'forward'}"
    return Case(f"{by(shape)} -> {out_channels}, {way}", make)


def _checks_on_cpu(tile: int) -> Iterator[Case]:
    for vjp in (False, True):
        for shape, out_channels in (((2, 40, 9, 11), 20), ((1, 3, 8, 8), 33)):
            yield _conv2d(shape, out_channels, 3, 1, tile, vjp=vjp)
        if tile == DIRECT:
            yield _conv2d((2, 40, 9, 11), 20, 1, 1, tile, vjp=vjp)
            yield _conv2d((2, 40, 9, 12), 20, 3, 2, tile, vjp=vjp)
            yield _conv2d((2, 40, 9, 11), 3, 3, 1, tile, vjp=vjp)


def _timed_on_cpu(images: int, tile: int) -> Iterator[Case]:
    for channels, size in ((256, 16), (128, 32), (256, 8), (32, 32)):
        yield _conv2d((images, channels, size, size), channels, 3, 1, tile)
    if tile == DIRECT:
        yield _conv2d((images, 3, 32, 32), 128, 3, 1, tile)
        yield _conv2d((images, 128, 32, 32), 3, 3, 1, tile)
        yield _conv2d((images, 64, 32, 32), 64, 1, 1, tile)
        for vjp in (False, True):
            yield _conv2d((images, 160, 32, 32), 320, 3, 2, tile, vjp=vjp)


ALGORITHMS_ON_CPU: dict[str, int] = {"direct": DIRECT, "F(2 x 2)": F2, "F(4 x 4)": F4}
for name, number in ALGORITHMS_ON_CPU.items():
    register(
        Kernel(
            f"conv2d_cpu {name}",
            "cpu",
            functools.partial(_checks_on_cpu, number),
            functools.partial(_timed_on_cpu, tile=number),
            missing=native.unavailable,
        )
    )
