"""Sums and masked maps: whole vectors of channels and ragged ones, one pixel and many, with and without what is optional."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from coupfast_kernels import native
from coupfast_kernels.elementwise.cpu import masked_cpu, pack_mask, sum_cpu
from coupfast_kernels.elementwise.definition import masked_ref, sum_ref
from coupfast_kernels.inputs import by, normals
from coupfast_kernels.parity import Agreement
from coupfast_kernels.registry import Case, Kernel, Trial, register

#: Of a product and a sum, twice where the machine has no fused multiply-add.
AGREEMENT = Agreement(4)
FACTORS = 0.5**0.5, -1.25


def _sum(shape: tuple[int, ...], full: bool) -> Case:
    def make(device: torch.device) -> Trial:
        a, b = normals(device, shape, 2, torch.channels_last)
        others = (b, FACTORS[1]) if full else ()

        def definition(dtype: torch.dtype) -> tuple[torch.Tensor]:
            return (sum_ref(a.to(dtype), FACTORS[0], b.to(dtype) if full else None, FACTORS[1]),)

        def run() -> tuple[torch.Tensor]:
            return (sum_cpu(a, FACTORS[0], *others),)

        return Trial(run, definition, (AGREEMENT,), bytes_moved=(3 if full else 2) * a.nbytes)

    return Case(f"{by(shape)}, {'two maps' if full else 'one map'}", make)


def _masked(shape: tuple[int, ...], full: bool) -> Case:
    def make(device: torch.device) -> Trial:
        d, residual, sign = normals(device, shape, 3, torch.channels_last)
        (multiply,) = normals(device, shape[1:2], 1)
        mask = sign > 0.0
        bits = pack_mask(mask)

        def definition(dtype: torch.dtype) -> tuple[torch.Tensor]:
            more = (multiply.to(dtype), residual.to(dtype), FACTORS[1]) if full else ()
            return (masked_ref(d.to(dtype), mask, *more),)

        def run() -> tuple[torch.Tensor]:
            return (masked_cpu(d, bits, *((multiply, residual, FACTORS[1]) if full else ())),)

        moved = (3 if full else 2) * d.nbytes + bits.nbytes
        return Trial(run, definition, (AGREEMENT,), bytes_moved=moved)

    return Case(f"{by(shape)}, {'with factor and residual' if full else 'alone'}", make)


def _checks(case: Callable[[tuple[int, ...], bool], Case]) -> Iterator[Case]:
    for shape in ((2, 64, 5, 7), (3, 21, 4, 4), (1, 3, 1, 1)):
        for full in (False, True):
            yield case(shape, full)


def _timed(images: int, case: Callable[[tuple[int, ...], bool], Case]) -> Iterator[Case]:
    """Maps of a WRN-28-10 and of DDPM++ deep."""
    for channels, size in ((160, 32), (256, 16)):
        yield case((images, channels, size, size), True)


for name, made in (("sum_cpu", _sum), ("masked_cpu", _masked)):
    register(
        Kernel(
            name,
            "cpu",
            functools.partial(_checks, made),
            functools.partial(_timed, case=made),
            missing=native.unavailable,
        )
    )
