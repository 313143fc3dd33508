"""The guided step in its bits: both formats, ragged images, with and without noise, four and eight columns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from coupfast_kernels import native
from coupfast_kernels.guided_step.cpu import guided_step_cpu, guided_step_structure, set_row
from coupfast_kernels.guided_step.definition import guided_step_ref
from coupfast_kernels.guided_step.gpu import _launch, guided_step, guided_step_out
from coupfast_kernels.inputs import LAYOUTS, by, normals
from coupfast_kernels.noise import SECOND_NOISE_STEP, seed_tensor, standard_normal_ref
from coupfast_kernels.operations import Operations
from coupfast_kernels.parity import BITS
from coupfast_kernels.registry import Case, Kernel, Trial, register

SEED, STEP = 2**63 + 5, 7

#: (state, ε̂ and guidance; the last columns' images; row; ids and draws, or None; whether there is a second noise) → calls by
#: name, "run" the kernel's.
Launcher = Callable[..., dict[str, Callable[[], torch.Tensor]]]


def _on_cuda(images: Any, terms: Any, row: Any, words: Any, second: bool) -> dict[str, Callable[[], torch.Tensor]]:
    device, columns = images[0].device, len(row)
    table = torch.full((STEP + 1, columns), torch.nan, device=device)
    table[STEP] = torch.tensor(row, device=device)
    step = torch.tensor(STEP, device=device)
    noise = None if words is None else (seed_tensor(SEED, device), *words)
    x, eps_hat, guidance = images
    return {"run": lambda: guided_step(x, eps_hat, guidance, table, step, noise=noise, second_noise=second, **terms)}


def _on_cpu(images: Any, terms: Any, row: Any, words: Any, second: bool) -> dict[str, Callable[[], torch.Tensor]]:
    ids, draw = words or (None, None)
    noise: Any = dict(seed=None) if words is None else dict(seed=SEED, ids=ids, draw=draw, step=STEP)
    x, eps_hat, guidance = images
    y = torch.empty_like(x)
    structure = guided_step_structure(y, x, eps_hat, guidance, ids=ids, draw=draw, second_noise=second, **terms)
    set_row(structure, row)
    structure.seed, structure.step = SEED, STEP
    operations, threads = Operations([structure]), torch.get_num_threads()

    def filled_before() -> torch.Tensor:
        operations.run(threads)
        return y

    return {
        "run": lambda: guided_step_cpu(x, eps_hat, guidance, row, **noise, second_noise=second, **terms),
        "among operations": filled_before,
    }


def _case(
    shape: tuple[int, ...], layout: str, noisy: bool, columns: int, launcher: Launcher, others: tuple[str, ...] = ()
) -> Case:
    def make(device: torch.device) -> Trial:
        *images, x_in, x_before, eps_before = normals(device, shape, 6, LAYOUTS[layout])
        terms = dict(x_in=x_in, x_before=x_before, eps_before=eps_before) if columns == 8 else {}
        row = tuple(normals(device, (columns,), 1)[0].tolist())
        words = (torch.arange(shape[0], device=device) + 2**31, torch.arange(shape[0], device=device)) if noisy else None
        second = noisy and columns == 8

        def definition(dtype: torch.dtype) -> tuple[torch.Tensor]:
            def z(step: int) -> torch.Tensor:
                assert words is not None
                return standard_normal_ref(shape, seed=SEED, ids=words[0], draw=words[1], step=step).to(dtype)

            z1, z2 = z(STEP) if noisy else None, z(SECOND_NOISE_STEP + STEP) if second else None
            more: Any = {name: image.to(dtype) for name, image in terms.items()}
            x, eps_hat, guidance = (image.to(dtype) for image in images)
            return (guided_step_ref(x, eps_hat, guidance, row, z1, z2=z2, **more),)

        calls = launcher(images, terms, row, words, second)
        run = calls.pop("run")
        moved = (4 + len(terms)) * images[0].nbytes
        return Trial(lambda: (run(),), definition, (BITS,), bytes_moved=moved, others=calls)

    name = f"{by(shape)}, {layout}, {columns} columns, {'with' if noisy else 'without'} noise"
    return Case(name, make, others)


def _checks(launcher: Launcher) -> Iterator[Case]:
    for shape in ((5, 3, 32, 32), (3, 3, 17, 19)):
        for layout in LAYOUTS:
            for noisy in (True, False):
                for columns in (4, 8):
                    yield _case(shape, layout, noisy, columns, launcher)


def _timed_on_cuda(images: int) -> Iterator[Case]:
    for batch in (64 * images, images):
        for columns in (4, 8):
            for noisy in (False, True):
                yield _case((batch, 3, 32, 32), "contiguous", noisy, columns, _on_cuda)


def _timed_on_cpu(images: int) -> Iterator[Case]:
    for layout in LAYOUTS:
        for columns in (4, 8):
            for noisy in (False, True):
                yield _case((images, 3, 32, 32), layout, noisy, columns, _on_cpu, ("among operations",))


def _interpret() -> None:
    guided_step_out.register_kernel("cpu")(_launch)


#: What rows of eight columns add.
TWO_STEP = ("x_before", "eps_before")
ALL_COLUMNS = ("x_in", "second_noise", *TWO_STEP)


def launch(
    shape: tuple[int, ...],
    *,
    layout: torch.memory_format = torch.contiguous_format,
    predicted: bool = True,
    guided: bool = True,
    noisy: bool = True,
    more: tuple[str, ...] = (),
) -> None:
    """Launch the kernel for states of a shape, whatever is in them; `more` are of `ALL_COLUMNS`."""
    x = torch.empty(shape, memory_format=layout)
    words, scalar = torch.zeros(shape[0], dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    _launch(
        x,
        x,
        x if predicted else None,
        x if guided else None,
        torch.empty(100, 8 if more else 4),
        scalar,
        *((scalar, words, words) if noisy else (None, None, None)),
        x if "x_in" in more else None,
        "second_noise" in more,
        *(x if name in more else None for name in TWO_STEP),
    )


def launches() -> Mapping[str, Callable[[], object]]:
    """Every shape class that the engines use, the ragged ones too."""
    cifar, small, ragged, last = (256, 3, 32, 32), (64, 4, 64, 64), (5, 3, 17, 19), torch.channels_last
    options: dict[str, dict[str, Any]] = {
        "forward": dict(shape=cifar),
        "forward, unguided": dict(shape=cifar, guided=False),
        "adjoint": dict(shape=cifar, noisy=False),
        "adjoint, no hvp": dict(shape=cifar, noisy=False, guided=False),
        "channels-last: forward": dict(shape=cifar, layout=last),
        "channels-last: adjoint": dict(shape=cifar, layout=last, noisy=False),
        "channels-last, 4 channels: forward": dict(shape=small, layout=last),
        "ragged: forward": dict(shape=ragged),
        "ragged channels-last: forward": dict(shape=ragged, layout=last),
        "x_in: forward": dict(shape=cifar, more=("x_in",)),
        "two noises: forward": dict(shape=cifar, more=("second_noise",)),
        "two steps: forward, unguided": dict(shape=cifar, guided=False, noisy=False, more=TWO_STEP),
        "no network: forward": dict(shape=cifar, predicted=False, guided=False),
        "eight columns: forward": dict(shape=cifar, more=ALL_COLUMNS),
        "channels-last, eight columns: forward": dict(shape=cifar, layout=last, more=ALL_COLUMNS),
        "channels-last, 4 channels, eight columns: forward": dict(shape=small, layout=last, more=ALL_COLUMNS),
        "ragged, eight columns: forward": dict(shape=ragged, more=ALL_COLUMNS),
    }
    return {name: functools.partial(launch, **each) for name, each in options.items()}


register(
    Kernel("guided_step", "cuda", lambda: _checks(_on_cuda), _timed_on_cuda, interpret=_interpret, launches=launches)
)
register(Kernel("guided_step_cpu", "cpu", lambda: _checks(_on_cpu), _timed_on_cpu, missing=native.unavailable))
