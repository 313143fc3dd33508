"""The noise, alone: its bits on shapes that fill blocks and shapes that do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from coupfast_kernels import native
from coupfast_kernels.inputs import by
from coupfast_kernels.noise.cpu import standard_normal_cpu
from coupfast_kernels.noise.definition import FORWARD_NOISING_STEP, standard_normal_ref
from coupfast_kernels.noise.gpu import _launch, _standard_normal, seed_tensor, standard_normal
from coupfast_kernels.parity import BITS
from coupfast_kernels.registry import Case, Kernel, Trial, register

SEED = 2**63 + 5


def _on_cuda(shape: tuple[int, ...], ids: torch.Tensor, draw: torch.Tensor, step: int) -> Callable[[], torch.Tensor]:
    words = dict(seed=seed_tensor(SEED, ids.device), ids=ids, draw=draw, step=torch.tensor(step, device=ids.device))
    return lambda: standard_normal(shape, **words)


def _on_cpu(shape: tuple[int, ...], ids: torch.Tensor, draw: torch.Tensor, step: int) -> Callable[[], torch.Tensor]:
    return lambda: standard_normal_cpu(shape, seed=SEED, ids=ids, draw=draw, step=step)


def _case(shape: tuple[int, ...], step: int, kernel: Callable[..., Callable[[], torch.Tensor]]) -> Case:
    def make(device: torch.device) -> Trial:
        ids, draw = torch.arange(shape[0], device=device) + 2**31, torch.arange(shape[0], device=device)
        run = kernel(shape, ids, draw, step)
        return Trial(
            lambda: (run(),),
            lambda dtype: (standard_normal_ref(shape, seed=SEED, ids=ids, draw=draw, step=step).to(dtype),),
            (BITS,),
            bytes_moved=4 * torch.Size(shape).numel(),
        )

    return Case(f"{by(shape)}, step {step}", make)


def _checks(kernel: Callable[..., Callable[[], torch.Tensor]]) -> Iterator[Case]:
    for shape in ((3, 3, 32, 32), (2, 3, 17, 19), (2, 5)):
        for step in (7, FORWARD_NOISING_STEP):
            yield _case(shape, step, kernel)


def _interpret() -> None:
    _standard_normal.register_kernel("cpu")(_launch)


def launch(shape: tuple[int, ...]) -> None:
    """Launch the kernel for a shape."""
    words, scalar = torch.zeros(shape[0], dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    _launch(list(shape), scalar, words, words, scalar)


register(
    Kernel(
        "standard_normal",
        "cuda",
        lambda: _checks(_on_cuda),
        lambda images: [_case((64 * images, 3, 32, 32), 7, _on_cuda), _case((images, 3, 32, 32), 7, _on_cuda)],
        interpret=_interpret,
        launches=lambda: {"noise alone": lambda: launch((256, 3, 32, 32))},
    )
)
register(
    Kernel(
        "standard_normal_cpu",
        "cpu",
        lambda: _checks(_on_cpu),
        lambda images: [_case((images, 3, 32, 32), 7, _on_cpu)],
        missing=native.unavailable,
    )
)
