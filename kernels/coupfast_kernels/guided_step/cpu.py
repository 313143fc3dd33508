"""`guided_step_ref` with `standard_normal_ref` made inside, on a CPU in one pass: the bits of both, on any number of threads.

    y = a x + b eps_hat + c guidance + d z [+ e x_in + f z' + p x_before + q eps_before],      z = standard_normal_ref(...)

The C++ side is `csrc/guided_step.h`. Its structure holds coefficients, seed and step by value, to be set before each run: one
structure serves every step, alone or among the `operations.Operations` of a network.
"""

from __future__ import annotations

import ctypes
import math

import torch

from coupfast_kernels.noise import FORWARD_NOISING_STEP, SECOND_NOISE_STEP
from coupfast_kernels.operations import GuidedStep, Operations


def guided_step_cpu(
    x: torch.Tensor,
    eps_hat: torch.Tensor | None,
    g: torch.Tensor | None,
    row: tuple[float, ...],
    *,
    seed: int | None,
    ids: torch.Tensor | None = None,
    draw: torch.Tensor | int = 0,
    step: int = 0,
    x_in: torch.Tensor | None = None,
    second_noise: bool = False,
    x_before: torch.Tensor | None = None,
    eps_before: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Fused `guided_step_ref`, with z and z' = `standard_normal_ref` made inside; equal bits.

    Args:
        x: State (adjoint: v): float32, shape (batch, …), as all others contiguous or channels_last, whatever the others are.
            The noise counts elements as (channel, row, column) in either format.
        eps_hat: Predicted noise (adjoint: J_εᵀv), like `x`; None leaves its term out, here and below.
        g: Guidance gradient (adjoint: Hv), like `x`.
        row: (a, b, c, d), or (a, b, c, d, e, f, p, q), rounded once to float32.
        seed: In [0, 2⁶⁴). None, with `ids` None, leaves the noise out.
        ids: Image ids in [0, 2³²), int64, shape (batch,).
        draw: Draw index in [0, 2³²): an int, or int64 of shape (batch,).
        step: Step index in [0, 2³²).
        x_in: State that the purification began from, like `x`.
        second_noise: Add f z', z' being the noise of step SECOND_NOISE_STEP + `step`; that needs `seed`, and `step` < 2³¹ − 1.
        x_before, eps_before: State and predicted noise of the step before, like `x`.
        out: Where to write; may be one of the images read. A new tensor like `x` if None.

    Returns:
        a x + b eps_hat + c g + d z + e x_in + f z' + p x_before + q eps_before, in `out` if given. Not differentiable.

    Raises:
        ValueError, TypeError: for arguments that do not fit.
        native.NativeUnavailable: if the C++ kernels cannot be built here.
    """
    if (seed is None) != (ids is None):
        raise ValueError(f"noise needs `seed` and `ids`, no noise neither; `{'seed' if seed is None else 'ids'}` is missing")
    more = second_noise or any(term is not None for term in (x_in, x_before, eps_before))
    if len(row) not in (4, 8) or (len(row) == 4 and more):
        raise ValueError(
            "`row` is (a, b, c, d), or with any of x_in, second_noise, x_before, eps_before (a, b, c, d, e, f, p, q); "
            f"got {row}"
        )
    y = torch.empty_like(x) if out is None else out
    draws = None if ids is None else draws_tensor(draw, len(x))
    terms = dict(x_in=x_in, x_before=x_before, eps_before=eps_before)
    structure = guided_step_structure(y, x, eps_hat, g, ids=ids, draw=draws, second_noise=second_noise, **terms)
    set_row(structure, row)
    if seed is not None:
        structure.seed, structure.step = checked_seed_and_step(seed, step, second_noise)
    Operations([structure]).run(torch.get_num_threads())
    return y


def set_row(structure: ctypes.Structure, row: tuple[float, ...]) -> None:
    """Coefficients (a, b, c, d) or (a, b, c, d, e, f, p, q) of the next run."""
    for name, value in zip("abcdefpq", row, strict=False):
        setattr(structure, name, value)


def guided_step_structure(
    y: torch.Tensor,
    x: torch.Tensor | None,
    eps_hat: torch.Tensor | None,
    g: torch.Tensor | None,
    *,
    ids: torch.Tensor | None,
    draw: torch.Tensor | None,
    x_in: torch.Tensor | None = None,
    second_noise: bool = False,
    x_before: torch.Tensor | None = None,
    eps_before: torch.Tensor | None = None,
) -> ctypes.Structure:
    """The step as `operations.Operations` takes it.

    Its coefficients, `seed` and `step` are zero: set them before each run (`set_row`). What `ids` and `draw` hold may change
    between runs, too. The caller keeps the tensors, and with them the memory, alive.

    Args:
        y: Where to write; may be one of those read.
        x, eps_hat, g, x_in, second_noise, x_before, eps_before: As for `guided_step_cpu`. Without any image, y = z.
        ids, draw: int64, shape (batch,), in [0, 2³²); both None leave the noise out.

    Raises:
        ValueError, TypeError: for tensors that do not fit each other.
    """
    images = dict(out=y, x=x, eps_hat=eps_hat, g=g, x_in=x_in, x_before=x_before, eps_before=eps_before)
    given = {name: tensor for name, tensor in images.items() if tensor is not None}
    for name, tensor in given.items():
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise TypeError(f"guided steps in C++ take float32 on the CPU, `{name}` is {tensor.dtype} on {tensor.device}")
        if tensor.shape != y.shape:
            raise ValueError(f"`out` is {tuple(y.shape)}, `{name}` is {tuple(tensor.shape)}; all images have one shape")
        if tensor is not y and _overlap(tensor, y) and (tensor.data_ptr(), tensor.stride()) != (y.data_ptr(), y.stride()):
            raise ValueError(f"`out` overlaps `{name}`; it may be `{name}` itself, or must lie elsewhere")
    if x is None and (len(given) > 1 or second_noise or ids is None):
        raise ValueError("a step needs `x`; noise alone needs `ids` and `draw`, and neither an image nor a second noise")
    if y.dim() < 1 or math.prod(y.shape[1:]) >= 2**34:
        raise ValueError(f"images have shape (batch, …) with fewer than 2**34 elements each, got {tuple(y.shape)}")
    if (ids is None) != (draw is None):
        raise ValueError(f"noise needs `ids` and `draw`; `{'ids' if ids is None else 'draw'}` is missing")
    if second_noise and ids is None:
        raise ValueError("a second noise needs the first one's `ids` and `draw`, which are missing")
    for name, words in {"ids": ids, "draw": draw}.items():
        if words is not None:
            _check_words(name, words, len(y))

    channels = y.shape[1] if y.dim() == 4 else 1
    pixel = {name: _pixel(name, tensor) for name, tensor in given.items()}
    address = {name: tensor.data_ptr() for name, tensor in given.items()}
    return GuidedStep(
        batch=len(y),
        channels=channels,
        pixels=math.prod(y.shape[1:]) // max(channels, 1),
        x_pixel=pixel.get("x", pixel["out"]),
        eps_pixel=pixel.get("eps_hat", pixel["out"]),
        guidance_pixel=pixel.get("g", pixel["out"]),
        x_in_pixel=pixel.get("x_in", pixel["out"]),
        x_before_pixel=pixel.get("x_before", pixel["out"]),
        eps_before_pixel=pixel.get("eps_before", pixel["out"]),
        y_pixel=pixel["out"],
        second_noise=int(second_noise),
        x=address.get("x"),
        eps_hat=address.get("eps_hat"),
        guidance=address.get("g"),
        x_in=address.get("x_in"),
        x_before=address.get("x_before"),
        eps_before=address.get("eps_before"),
        ids=None if ids is None else ids.data_ptr(),
        draw=None if draw is None else draw.data_ptr(),
        y=address["out"],
    )


def _pixel(name: str, tensor: torch.Tensor) -> int:
    """Floats from one pixel to the next."""
    if tensor.is_contiguous():
        return 1
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.shape[1]
    raise ValueError(
        f"`{name}` must be contiguous or channels_last, got shape {tuple(tensor.shape)} with strides {tensor.stride()}; "
        "`.contiguous()` makes a copy that is"
    )


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether dense tensors share memory."""
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes


def draws_tensor(draw: torch.Tensor | int, batch: int) -> torch.Tensor:
    if isinstance(draw, torch.Tensor):
        return draw
    if not 0 <= draw < 2**32:
        raise ValueError(f"`draw` is in [0, 2**32), got {draw}")
    return torch.full((batch,), draw, dtype=torch.int64)


def checked_seed_and_step(seed: int, step: int, second_noise: bool = False) -> tuple[int, int]:
    if not 0 <= seed < 2**64:
        raise ValueError(f"`seed` is in [0, 2**64), got {seed}")
    if not 0 <= step < 2**32:
        raise ValueError(f"`step` is in [0, 2**32), got {step}")
    if second_noise and step >= FORWARD_NOISING_STEP - SECOND_NOISE_STEP:
        raise ValueError(f"steps with a second noise are in [0, 2**31 - 1), got {step}: others' counters are taken")
    return seed, step  # ctypes keeps the low 64 bits of a seed, which is all of it


def _check_words(name: str, words: torch.Tensor, batch: int) -> None:
    if words.dtype != torch.int64 or tuple(words.shape) != (batch,) or not words.is_contiguous() or words.device.type != "cpu":
        found = f"{words.dtype} of shape {tuple(words.shape)} on {words.device}"
        raise ValueError(f"`{name}` must be contiguous int64 of shape ({batch},) on the CPU, got {found}")
    for word in words.tolist():
        if not 0 <= word < 2**32:
            raise ValueError(f"`{name}` are in [0, 2**32), got {word}")
