"""`guided_step_ref` in one Triton kernel that makes the noise in registers: equal bits, everything read from device memory."""

from __future__ import annotations

import torch
from torch import library

from coupfast_kernels.guided_step.definition import guided_step_ref
from coupfast_kernels.noise import FORWARD_NOISING_STEP, SECOND_NOISE_STEP, standard_normal_ref

try:
    import triton
    import triton.language as tl

    from coupfast_kernels.noise.gpu import columns_kernel, normals_of_blocks_kernel
except ImportError:  # Triton exists for Linux only; the definition and the CPU need none of it
    triton = None

#: Seed, image ids and draws in the memory of the device: int64, shapes (), (batch,) and (batch,).
DeviceNoise = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

BLOCK = 128  # groups of elements a program, one a thread
NUM_WARPS = 4
MOST_CHANNELS = 4  # channels-last images up to here are read and written 128 bits at a time


if triton is not None:
    SECOND = tl.constexpr(SECOND_NOISE_STEP)

    @triton.jit
    def _guided_step_kernel(
        y_ptr,
        x_ptr,
        eps_hat_ptr,
        guidance_ptr,
        coefficients_ptr,
        step_ptr,
        seed_ptr,
        ids_ptr,
        draw_ptr,
        x_in_ptr,
        x_before_ptr,
        eps_before_ptr,
        rows,
        elements,
        groups,
        tiles,
        channels,
        pixels,
        TABLE: tl.constexpr,
        COLUMNS: tl.constexpr,
        ADD_NOISE: tl.constexpr,
        ADD_SECOND_NOISE: tl.constexpr,
        INTERLEAVED: tl.constexpr,
        STRIDED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """`groups` of 4 · INTERLEAVED elements an image, one a thread; `elements` counts one image.

        INTERLEAVED = 1: a group is one Philox block, 4 elements that lie side by side (STRIDED: as channels-last has them).
        INTERLEAVED = channels: channels-last, a group is 4 pixels, hence one Philox block of each channel.
        Terms whose pointer is None are left out; COLUMNS = 4 has none of the last four.

        No spills; registers leave an SM at least 1280 threads, 896 with 3 channels interleaved, 640 with 4 (sm_80 … sm_100);
        with all terms of COLUMNS = 8, 1280 (ragged images 1024), 640 and 512.
        """
        image, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
        first_group = tile.to(tl.int64) * BLOCK
        first_element = first_group * (4 * INTERLEAVED)
        image_start = image.to(tl.int64) * elements
        left = elements - first_element  # of this image

        step = tl.load(step_ptr)
        row = step if TABLE else step * 0
        # A step that the table does not have gives NaN instead of somebody else's memory.
        known = (row >= 0) & (row < rows)
        row_ptr = coefficients_ptr + row * COLUMNS
        a = tl.load(row_ptr, mask=known, other=float("nan"))
        if eps_hat_ptr is not None:
            b = tl.load(row_ptr + 1, mask=known, other=float("nan"))
        if guidance_ptr is not None:
            c = tl.load(row_ptr + 2, mask=known, other=float("nan"))

        # All loads before the first store: y may be what is read.
        ys = ()
        for piece in tl.static_range(INTERLEAVED):
            offset, mask = _place_kernel(piece, first_element, image_start, left, channels, pixels, INTERLEAVED, STRIDED, BLOCK)
            y = a * tl.load(x_ptr + offset, mask=mask)
            if eps_hat_ptr is not None:
                y = y + b * tl.load(eps_hat_ptr + offset, mask=mask)
            if guidance_ptr is not None:
                y = y + c * tl.load(guidance_ptr + offset, mask=mask)
            ys = ys + (y,)  # type: ignore[assignment]

        zs = ()
        if ADD_NOISE:
            d = tl.load(row_ptr + 3, mask=known, other=float("nan"))
            draw, image_id = tl.load(draw_ptr + image).to(tl.uint32), tl.load(ids_ptr + image).to(tl.uint32)
            seed = tl.load(seed_ptr)
            zs = _normals_kernel(first_group, groups, step.to(tl.uint32), draw, image_id, seed, INTERLEAVED, BLOCK)

        if COLUMNS == 8:
            # The noise first: these loads would hold registers through it.
            if x_in_ptr is not None:
                e = tl.load(row_ptr + 4, mask=known, other=float("nan"))
            if x_before_ptr is not None:
                p = tl.load(row_ptr + 6, mask=known, other=float("nan"))
            if eps_before_ptr is not None:
                q = tl.load(row_ptr + 7, mask=known, other=float("nan"))
            sums = ()
            for piece in tl.static_range(INTERLEAVED):
                offset, mask = _place_kernel(
                    piece, first_element, image_start, left, channels, pixels, INTERLEAVED, STRIDED, BLOCK
                )
                y = ys[piece]
                if ADD_NOISE:
                    y = y + d * _of_piece_kernel(zs, piece, INTERLEAVED)
                if x_in_ptr is not None:
                    y = y + e * tl.load(x_in_ptr + offset, mask=mask)
                sums = sums + (y,)  # type: ignore[assignment]
            ys = sums
            if ADD_SECOND_NOISE:
                f = tl.load(row_ptr + 5, mask=known, other=float("nan"))
                second = (step + SECOND).to(tl.uint32)
                zs = _normals_kernel(first_group, groups, second, draw, image_id, seed, INTERLEAVED, BLOCK)
            sums = ()
            for piece in tl.static_range(INTERLEAVED):
                offset, mask = _place_kernel(
                    piece, first_element, image_start, left, channels, pixels, INTERLEAVED, STRIDED, BLOCK
                )
                y = ys[piece]
                if ADD_SECOND_NOISE:
                    y = y + f * _of_piece_kernel(zs, piece, INTERLEAVED)
                if x_before_ptr is not None:
                    y = y + p * tl.load(x_before_ptr + offset, mask=mask)
                if eps_before_ptr is not None:
                    y = y + q * tl.load(eps_before_ptr + offset, mask=mask)
                sums = sums + (y,)  # type: ignore[assignment]
            ys = sums

        for piece in tl.static_range(INTERLEAVED):
            offset, mask = _place_kernel(piece, first_element, image_start, left, channels, pixels, INTERLEAVED, STRIDED, BLOCK)
            y = ys[piece]
            if ADD_NOISE and COLUMNS == 4:
                y = y + d * _of_piece_kernel(zs, piece, INTERLEAVED)
            tl.store(y_ptr + offset, y, mask=mask)

    @triton.jit
    def _place_kernel(
        piece,
        first_element,
        image_start,
        left,
        channels,
        pixels,
        INTERLEAVED: tl.constexpr,
        STRIDED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Where a piece of a program's groups lies, and what exists of it: [BLOCK, 4] each."""
        local = tl.arange(0, BLOCK)[:, None] * (4 * INTERLEAVED) + (4 * piece + tl.arange(0, 4)[None, :])
        mask = local < left
        if STRIDED:
            element = first_element + local
            offset = image_start + (element % pixels) * channels + element // pixels
        else:
            offset = image_start + first_element + local
        return offset, mask

    @triton.jit
    def _normals_kernel(
        first_block, groups, step, draw, image_id, seed, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr
    ):
        """The normals of a program's groups: four of each channel, [BLOCK] each."""
        zs = ()
        for _ in tl.static_range(INTERLEAVED):  # over channels
            blocks = first_block.to(tl.uint32) + tl.arange(0, BLOCK).to(tl.uint32)  # [BLOCK]
            zs = zs + normals_of_blocks_kernel(blocks, step, draw, image_id, seed)
            first_block += groups
        return zs

    @triton.jit
    def _of_piece_kernel(zs, piece: tl.constexpr, INTERLEAVED: tl.constexpr):
        """A piece's normals, [BLOCK, 4]: float j of a group is channel j % INTERLEAVED of pixel j // INTERLEAVED."""
        return columns_kernel(
            zs[(4 * piece + 0) % INTERLEAVED * 4 + (4 * piece + 0) // INTERLEAVED],
            zs[(4 * piece + 1) % INTERLEAVED * 4 + (4 * piece + 1) // INTERLEAVED],
            zs[(4 * piece + 2) % INTERLEAVED * 4 + (4 * piece + 2) // INTERLEAVED],
            zs[(4 * piece + 3) % INTERLEAVED * 4 + (4 * piece + 3) // INTERLEAVED],
        )


def guided_step(
    x: torch.Tensor,
    eps_hat: torch.Tensor | None,
    guidance: torch.Tensor | None,
    coefficients: torch.Tensor,
    step: torch.Tensor,
    *,
    noise: DeviceNoise | None = None,
    x_in: torch.Tensor | None = None,
    second_noise: bool = False,
    x_before: torch.Tensor | None = None,
    eps_before: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Fused `guided_step_ref`, with z and z' = `standard_normal_ref` made inside; equal bits. Nothing waits for the device.

    Args:
        x: State (adjoint: v): float32, shape (batch, …). All images are contiguous, or all channels_last; 16-byte alignment is
            faster.
        eps_hat: Predicted noise (adjoint: J_εᵀv), like `x`; None leaves its term out, here and below.
        guidance: Guidance gradient (adjoint: Hv), like `x`.
        coefficients: Rows (a, b, c, d) or (a, b, c, d, e, f, p, q), float32 (steps, 4) or (steps, 8), of which row `step` is
            used; or one row, (4,) or (8,), whatever the step.
        step: int64, 0-dim: the row, and the step of the noise, in [0, 2³²). With a table that lacks it the result is NaN
            (on the CPU an IndexError).
        noise: (seed, ids, draw) as `DeviceNoise`: `seed_tensor(seed)`, image ids and draws in [0, 2³²).
        x_in: State that the purification began from, like `x`.
        second_noise: Add f z', z' being the noise of step SECOND_NOISE_STEP + `step`; that needs `noise`, and `step` < 2³¹ − 1.
        x_before, eps_before: State and predicted noise of the step before, like `x`.
        out: Where to write; may be one of the images read. A new tensor like `x` if None.

    Returns:
        a x + b eps_hat + c guidance + d z + e x_in + f z' + p x_before + q eps_before, in `out` if given. Not differentiable:
        its transpose is another call.

    Raises:
        ValueError, TypeError: for tensors that do not fit each other.
        RuntimeError: for CUDA tensors without Triton.
    """
    y = torch.empty_like(x) if out is None else out
    seed, ids, draw = (None, None, None) if noise is None else noise
    more = (x_in, second_noise, x_before, eps_before)
    guided_step_out(y, x, eps_hat, guidance, coefficients, step, seed, ids, draw, *more)
    return y


# Writes into a tensor that is given instead of returning a new one: a captured graph reads and writes fixed addresses, so a
# result of its own would have to be copied into the static buffer, two more passes over a map that needs four.
@library.custom_op(
    "coupfast::guided_step_out",
    mutates_args=("y",),
    device_types="cpu",
    schema="(Tensor(a0!) y, Tensor x, Tensor? eps_hat, Tensor? guidance, Tensor coefficients, Tensor step, Tensor? seed, "
    "Tensor? ids, Tensor? draw, Tensor? x_in, bool second_noise, Tensor? x_before, Tensor? eps_before) -> ()",
)
def guided_step_out(
    y, x, eps_hat, guidance, coefficients, step, seed, ids, draw, x_in, second_noise, x_before, eps_before
):
    """`guided_step` as PyTorch's dispatcher knows it. On the CPU: the definitions, for tests of what runs on the GPU."""
    images = dict(y=y, x=x, eps_hat=eps_hat, guidance=guidance, x_in=x_in, x_before=x_before, eps_before=eps_before)
    _common_layout(images, coefficients, step, seed, ids, draw, second_noise)
    row, k = coefficients, int(step)
    if coefficients.dim() == 2:
        if not 0 <= k < len(coefficients):
            raise IndexError(f"the table has steps 0 … {len(coefficients) - 1}, `step` is {k}")
        row = coefficients[k]
    if second_noise and not 0 <= k < FORWARD_NOISING_STEP - SECOND_NOISE_STEP:
        raise ValueError(f"steps with a second noise are in [0, 2**31 - 1), got {k}: others' counters are taken")

    def normals(word: int) -> torch.Tensor:
        return standard_normal_ref(tuple(x.shape), seed=int(seed) % 2**64, ids=ids, draw=draw, step=word)

    z = None if seed is None else normals(k)
    z2 = normals(SECOND_NOISE_STEP + k) if second_noise else None
    more = dict(x_in=x_in, z2=z2, x_before=x_before, eps_before=eps_before)
    y.copy_(guided_step_ref(x, eps_hat, guidance, tuple(row.tolist()), z, **more))


@guided_step_out.register_fake
def _(y, x, eps_hat, guidance, coefficients, step, seed, ids, draw, x_in, second_noise, x_before, eps_before):
    images = dict(y=y, x=x, eps_hat=eps_hat, guidance=guidance, x_in=x_in, x_before=x_before, eps_before=eps_before)
    _common_layout(images, coefficients, step, seed, ids, draw, second_noise)


@guided_step_out.register_kernel("cuda")
def _launch(y, x, eps_hat, guidance, coefficients, step, seed, ids, draw, x_in, second_noise, x_before, eps_before):
    images = dict(y=y, x=x, eps_hat=eps_hat, guidance=guidance, x_in=x_in, x_before=x_before, eps_before=eps_before)
    layout = _common_layout(images, coefficients, step, seed, ids, draw, second_noise)
    if triton is None:
        raise RuntimeError("guided steps on CUDA need Triton, which is not installed; `pip install triton` (Linux)")
    if x.numel() == 0:
        return
    elements = x.numel() // len(x)
    channels = x.shape[1] if x.dim() == 4 else 1
    pixels = elements // channels
    interleaved, strided = 1, False
    if layout is torch.channels_last:
        if channels <= MOST_CHANNELS and pixels % 4 == 0:
            interleaved = channels
        else:
            strided = True
    groups = triton.cdiv(elements, 4 * interleaved)
    tiles = triton.cdiv(groups, BLOCK)
    # The current device, not the tensors', is where Triton launches.
    with torch.cuda.device_of(x):
        _guided_step_kernel[(len(x) * tiles,)](
            y,
            x,
            eps_hat,
            guidance,
            coefficients,
            step,
            seed,
            ids,
            draw,
            x_in,
            x_before,
            eps_before,
            rows=coefficients.numel() // coefficients.shape[-1],
            elements=elements,
            groups=groups,
            tiles=tiles,
            channels=channels,
            pixels=pixels,
            TABLE=coefficients.dim() == 2,
            COLUMNS=coefficients.shape[-1],
            ADD_NOISE=seed is not None,
            ADD_SECOND_NOISE=second_noise,
            INTERLEAVED=interleaved,
            STRIDED=strided,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,  # bits, not ulps: see docs/how/kernels.md
        )


def _common_layout(images, coefficients, step, seed, ids, draw, second_noise) -> torch.memory_format:
    """The memory format that all images share, after checking that everything fits; reads no values."""
    x = images["x"]
    images = {name: tensor for name, tensor in images.items() if tensor is not None}
    for name, tensor in images.items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"guided_step takes float32, `{name}` is {tensor.dtype}")
        if tensor.shape != x.shape or tensor.device != x.device:
            raise ValueError(
                f"`x` is {tuple(x.shape)} on {x.device}, `{name}` is {tuple(tensor.shape)} on {tensor.device}; they must agree"
            )
    if x.dim() < 1 or x.numel() // max(len(x), 1) >= 2**34:
        raise ValueError(f"`x` has shape (batch, …) with fewer than 2**34 elements an image, got {tuple(x.shape)}")

    if coefficients.dtype != torch.float32 or not coefficients.is_contiguous():
        raise TypeError(f"`coefficients` are contiguous float32, got {coefficients.dtype}, strides {coefficients.stride()}")
    if coefficients.dim() not in (1, 2) or coefficients.shape[-1] not in (4, 8):
        raise ValueError(f"`coefficients` have shape (steps, 4), (steps, 8), (4,) or (8,), got {tuple(coefficients.shape)}")
    more = [name for name in ("x_in", "x_before", "eps_before") if name in images] + ["second_noise"] * second_noise
    if more and coefficients.shape[-1] == 4:
        raise ValueError(f"{', '.join(more)} need rows of 8 coefficients, got {tuple(coefficients.shape)}")
    given = {"seed": seed, "ids": ids, "draw": draw}
    missing = [name for name, tensor in given.items() if tensor is None]
    if missing and (len(missing) < 3 or second_noise):
        raise ValueError(f"noise needs seed, ids and draw; missing: {', '.join(missing)}")
    wanted = {"step": (), "seed": (), "ids": (len(x),), "draw": (len(x),)}
    words = {"step": step} | ({} if missing else given)
    for name, tensor in words.items():
        if tensor.dtype != torch.int64 or tuple(tensor.shape) != wanted[name] or not tensor.is_contiguous():
            raise ValueError(
                f"`{name}` must be contiguous int64 of shape {wanted[name]}, got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
    for name, tensor in ({"coefficients": coefficients} | words).items():
        if tensor.device != x.device:
            raise ValueError(f"`x` is on {x.device}, `{name}` on {tensor.device}; a kernel reads from its own device")

    layouts = [torch.contiguous_format] + ([torch.channels_last] if x.dim() == 4 else [])
    for layout in layouts:
        if all(tensor.is_contiguous(memory_format=layout) for tensor in images.values()):
            return layout
    strides = ", ".join(f"`{name}` {tensor.stride()}" for name, tensor in images.items())
    raise ValueError(f"images must be all contiguous or all channels_last, got strides {strides}")
