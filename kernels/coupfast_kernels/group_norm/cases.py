"""GroupNorm with SiLU and its transpose: on the GPU groups that registers hold and groups that they do not, odd maps, both
formats; on the CPU groups and maps that fill vectors and that do not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from coupfast_kernels import native
from coupfast_kernels.group_norm.cpu import group_norm_affine_cpu, group_norm_vjp_cpu
from coupfast_kernels.group_norm.definition import group_norm_affine_ref, group_norm_silu_ref, group_norm_silu_vjp_ref
from coupfast_kernels.group_norm.gpu import (
    _group_norm_silu,
    _group_norm_silu_vjp,
    _group_norm_statistics,
    _launch,
    _launch_statistics,
    _launch_vjp,
    group_norm_silu,
)
from coupfast_kernels.inputs import LAYOUTS, by, normals
from coupfast_kernels.parity import BITS, Agreement
from coupfast_kernels.registry import Case, Kernel, Trial, register

#: Roundings that an element goes through besides its sums, the polynomials' counted in halves of an ulp: h − mean, rsqrt (4),
#: product, weight, bias, exp of |a| ≤ 4 (14), addition, division (4), product.
ROUNDINGS = 28
#: The same again, the slope (6), and what is subtracted, multiplied, added and scaled around two means (14).
VJP_ROUNDINGS = 48

EPS, ROOT_HALF = 1e-6, 0.5**0.5


def _case(shape: tuple[int, ...], groups: int, layout: str, *, vjp: bool, full: bool, beside: tuple[str, ...] = ()) -> Case:
    """`full`: with everything that can be added."""

    def make(device: torch.device) -> Trial:
        x, residual, gy, gh = normals(device, shape, 4, LAYOUTS[layout])
        (spread, shift), (image_bias,) = normals(device, shape[1:2], 2), normals(device, shape[:2], 1)
        weight, bias = 1.0 + 0.3 * torch.tanh(spread), 0.3 * torch.tanh(shift)
        scale = ROOT_HALF if full else 1.0
        added: dict[str, Any] = dict(image_bias=image_bias, residual=residual) if full else {}
        options: Any = dict(groups=groups, eps=EPS)
        # The same h for every dtype, which float32 has rounded once and for all.
        right_h, _ = group_norm_silu_ref(x, weight, bias, **added, scale=scale, **options)

        def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return group_norm_silu(x, weight, bias, **added, scale=scale, **options)

        def pytorch(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            h = x if not full else (x + image_bias[:, :, None, None] + residual) * scale
            return h, F.silu(F.group_norm(h, groups, weight, bias, EPS))

        def definition(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
            h, *gradients, in_weight, in_bias = (tensor.to(dtype) for tensor in (right_h, gy, gh, weight, bias))
            if not vjp:
                return right_h, group_norm_silu_ref(h, in_weight, in_bias, **options)[1]
            in_gy, in_gh = gradients
            return (group_norm_silu_vjp_ref(h, in_gy, in_gh if full else None, in_weight, in_bias, scale=scale, **options),)

        def transpose(forward: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], torch.Tensor]:
            with torch.enable_grad():
                leaf = x.clone().requires_grad_()
                h, y = forward(leaf)
            outputs, cotangents = ((h, y), (gh, gy)) if full else ((y,), (gy,))
            return lambda: torch.autograd.grad(outputs, leaf, cotangents, retain_graph=True)[0]

        moved = (4 if full else 3 if vjp else 2) * x.nbytes
        if not vjp:
            others = {"pytorch": lambda: pytorch(x)}
            return Trial(lambda: both(x), definition, (BITS, Agreement(ROUNDINGS)), bytes_moved=moved, others=others)
        ours, theirs = transpose(both), transpose(pytorch)
        agreements = (Agreement(VJP_ROUNDINGS),)
        return Trial(lambda: (ours(),), definition, agreements, bytes_moved=moved, others={"pytorch": theirs})

    return Case(f"{by(shape)}, {groups} groups, {layout}, {'with residual' if full else 'alone'}", make, beside)


def _checks(vjp: bool) -> Iterator[Case]:
    # One pass, several groups a program; a group too large for registers; odd maps and channels.
    for channels, size, groups in ((128, 16, 32), (64, 48, 2), (30, 7, 3)):
        for layout in LAYOUTS:
            yield _case((2, channels, size, size), groups, layout, vjp=vjp, full=True)


def _timed(images: int, vjp: bool) -> Iterator[Case]:
    """Maps of DDPM++ deep."""
    for channels, size in ((256, 16), (128, 32), (384, 32), (512, 4)):
        for full in (False, True):
            shape = (images, channels, size, size)
            yield _case(shape, min(channels // 4, 32), "channels-last", vjp=vjp, full=full, beside=("pytorch",))


def _interpret() -> None:
    _group_norm_silu.register_kernel("cpu")(_launch)


def interpret_statistics() -> None:
    """As `Kernel.interpret`, for the statistics alone: the convolutions that take them are compared with them."""
    _group_norm_statistics.register_kernel("cpu")(_launch_statistics)


def _interpret_vjp() -> None:
    _group_norm_silu_vjp.register_kernel("cpu")(_launch_vjp)


#: (channels, height = width, groups) of every GroupNorm in DDPM++ deep.
DDPMPP_DEEP = (
    (128, 32, 32),
    (256, 32, 32),
    (384, 32, 32),
    (128, 16, 32),
    (256, 16, 32),
    (384, 16, 32),
    (512, 16, 32),
    (256, 8, 32),
    (512, 8, 32),
    (256, 4, 32),
    (512, 4, 32),
)


def launch(
    channels: int,
    size: int,
    groups: int,
    *,
    batch: int = 256,
    image_bias: bool = False,
    residual: bool = False,
    silu: bool = True,
    layout: torch.memory_format = torch.channels_last,
) -> None:
    """Launch the kernel for square maps; 1/√2 behind a residual."""
    x, word = torch.empty((batch, channels, size, size), memory_format=layout), torch.empty(channels)
    added = (torch.empty(batch, channels) if image_bias else None, x if residual else None)
    _launch(x, word, word, *added, groups, EPS, 2**-0.5 if residual else 1.0, silu)


def launch_statistics(channels: int, size: int, groups: int, *, residual: bool = False) -> None:
    """Launch what norms nothing itself, for 256 square maps in channels last; 1/√2 behind a residual."""
    x = torch.empty((256, channels, size, size), memory_format=torch.channels_last)
    _launch_statistics(x, None, x if residual else None, groups, EPS, 2**-0.5 if residual else 1.0)


def launch_vjp(
    channels: int,
    size: int,
    groups: int,
    *,
    batch: int = 256,
    gh: bool = False,
    silu: bool = True,
    layout: torch.memory_format = torch.channels_last,
) -> None:
    """Launch its transpose."""
    h, word = torch.empty((batch, channels, size, size), memory_format=layout), torch.empty(channels)
    _launch_vjp(h, h, h if gh else None, word, word, groups, EPS, 2**-0.5 if gh else 1.0, silu)


def _launches() -> Mapping[str, Callable[[], object]]:
    """What stands between the convolutions of DDPM++ deep, and the attention's norms; groups beyond the registers; NCHW."""
    found = {}
    for shape in DDPMPP_DEEP:
        name = f"group norm {shape[0]} at {shape[1]}²"
        found[name] = functools.partial(launch, *shape)
        found[f"{name}, time"] = functools.partial(launch, *shape, image_bias=True)
        found[f"{name}, residual"] = functools.partial(launch, *shape, residual=True)
    return found | {
        "group norm 256 at 16², statistics": functools.partial(launch_statistics, 256, 16, 32),
        "group norm 256 at 16², residual, statistics": functools.partial(launch_statistics, 256, 16, 32, residual=True),
        "group norm 256 at 64², loop, statistics": functools.partial(launch_statistics, 256, 64, 32),
        "group norm 256 at 16², no silu": functools.partial(launch, 256, 16, 32, silu=False),
        "group norm 128 at 32², NCHW, residual": functools.partial(
            launch, 128, 32, 32, residual=True, layout=torch.contiguous_format
        ),
        "group norm 256 at 64², loop, residual": functools.partial(launch, 256, 64, 32, residual=True),
    }


def _launches_vjp() -> Mapping[str, Callable[[], object]]:
    """The transposes of the same."""
    found = {}
    for shape in DDPMPP_DEEP:
        name = f"group norm {shape[0]} at {shape[1]}²"
        found[f"{name}: transpose"] = functools.partial(launch_vjp, *shape)
        found[f"{name}, residual: transpose"] = functools.partial(launch_vjp, *shape, gh=True)
    return found | {
        "group norm 256 at 16², no silu: transpose": functools.partial(launch_vjp, 256, 16, 32, silu=False),
        "group norm 128 at 32², NCHW: transpose": functools.partial(
            launch_vjp, 128, 32, 32, gh=True, layout=torch.contiguous_format
        ),
        "group norm 256 at 64², loop, residual: transpose": functools.partial(launch_vjp, 256, 64, 32, gh=True),
    }


register(
    Kernel(
        "group_norm_silu",
        "cuda",
        lambda: _checks(False),
        lambda images: _timed(images, False),
        interpret=_interpret,
        launches=_launches,
    )
)
register(
    Kernel(
        "group_norm_silu_vjp",
        "cuda",
        lambda: _checks(True),
        lambda images: _timed(images, True),
        interpret=_interpret_vjp,
        launches=_launches_vjp,
    )
)


# --- the CPU's --------------------------------------------------------------------------------------------------------


def _case_on_cpu(shape: tuple[int, ...], groups: int, *, vjp: bool, full: bool = False) -> Case:
    """`full`: with another cotangent of x."""

    def make(device: torch.device) -> Trial:
        x, gy, gx = normals(device, shape, 3, torch.channels_last)
        x += 0.5  # a mean that is small beside the deviation has a large relative error
        spread, shift = normals(device, shape[1:2], 2)
        weight, bias = 1.0 + 0.3 * torch.tanh(spread), 0.3 * torch.tanh(shift)
        options: Any = dict(groups=groups, eps=EPS)
        affine = group_norm_affine_cpu(x, weight, bias, **options)

        def definition(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
            in_x, in_gy, in_gx, in_weight, in_bias = (tensor.to(dtype) for tensor in (x, gy, gx, weight, bias))
            if not vjp:
                return group_norm_affine_ref(in_x, in_weight, in_bias, **options)
            gradient = group_norm_silu_vjp_ref(in_x, in_gy, None, in_weight, in_bias, **options)
            return (gradient + ROOT_HALF * in_gx if full else gradient,)

        if not vjp:
            others = {"pytorch": lambda: F.group_norm(x, groups, weight, bias, EPS)}
            agreements = (Agreement(ROUNDINGS),) * 2 + (BITS,) + (Agreement(ROUNDINGS),)
            run = functools.partial(group_norm_affine_cpu, x, weight, bias, **options)
            return Trial(run, definition, agreements, bytes_moved=x.nbytes, others=others)
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            y = F.silu(F.group_norm(leaf, groups, weight, bias, EPS))
        return Trial(
            lambda: (
                group_norm_vjp_cpu(x, gy, gx if full else None, weight, affine, groups=groups, factor=ROOT_HALF),
            ),
            definition,
            (Agreement(VJP_ROUNDINGS),),
            bytes_moved=(4 if full else 3) * x.nbytes,
            others={"pytorch": lambda: torch.autograd.grad(y, leaf, gy, retain_graph=True)},
        )

    return Case(f"{by(shape)}, {groups} groups{', with residual' if full else ''}", make, ("pytorch",))


def _checks_on_cpu(vjp: bool) -> Iterator[Case]:
    # Groups of 4, of 12 (48 channels are whole vectors), of 10, of one ragged channel each, of more than a share; one pixel.
    for shape, groups in (
        ((2, 128, 9, 7), 32),
        ((1, 384, 8, 8), 32),
        ((3, 30, 5, 7), 3),
        ((2, 21, 4, 4), 21),
        ((1, 300, 6, 6), 2),
        ((2, 16, 1, 1), 4),
    ):
        yield _case_on_cpu(shape, groups, vjp=vjp, full=shape[0] > 1)


def _timed_on_cpu(images: int, vjp: bool) -> Iterator[Case]:
    """Maps of DDPM++ deep."""
    for channels, size in ((256, 16), (128, 32), (384, 32), (512, 4)):
        yield _case_on_cpu((images, channels, size, size), 32, vjp=vjp)


for name, transposed in (("group_norm_cpu affine", False), ("group_norm_cpu silu vjp", True)):
    register(
        Kernel(
            name,
            "cpu",
            functools.partial(_checks_on_cpu, transposed),
            functools.partial(_timed_on_cpu, vjp=transposed),
            missing=native.unavailable,
        )
    )
