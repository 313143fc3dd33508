"""One guided step of the reverse VP-SDE (and, without noise, of its adjoint).

    y = a x + b eps_hat + c guidance + d z,      z ~ N(0, 1)

The map is linear in its tensors, so its transpose has the same form: the same step with J_εᵀv, Hv in place of eps_hat and
guidance, and without noise, takes the adjoint one step back. One kernel serves both passes.

Memory-bound: reads three tensors, writes one (two with the classifier's input), makes the noise in registers; judge it by
its share of copy bandwidth. What it reads besides (coefficients, step, seed, image ids, draws) lies in device memory, so
that one captured CUDA graph serves every step, seed and image. Bits equal to the definition's: `kernels/README.md`.
"""

from __future__ import annotations

import torch
from torch import library

from coupfast_kernels.noise import standard_normal_ref

try:
    import triton
    import triton.language as tl

    from coupfast_kernels.noise import columns_kernel, normals_of_blocks_kernel
except ImportError:  # Triton exists for Linux only; the definition and the CPU need none of it
    triton = None

#: Seed, image ids and draws in the memory of the device: int64, shapes (), (batch,) and (batch,).
DeviceNoise = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

BLOCK = 128  # groups of elements a program, one a thread
NUM_WARPS = 4
MOST_CHANNELS = 4  # channels-last images up to here are read and written 128 bits at a time


def guided_step_ref(
    x: torch.Tensor,
    eps_hat: torch.Tensor,
    guidance: torch.Tensor | None,
    coefficients: tuple[float, float, float, float],
    z: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition: plain PyTorch, any device, any dtype.

    Args:
        x, eps_hat: State and predicted noise (adjoint: v and J_εᵀv), one shape and dtype.
        guidance: Guidance gradient (adjoint: Hv), the same shape; None leaves the term out.
        coefficients: (a, b, c, d), rounded once to the dtype of `x`.
        z: Noise of the same shape; None leaves the term out.

    Returns:
        a x + b eps_hat + c guidance + d z, summed from left to right, each operation rounded.
    """
    a, b, c, d = coefficients
    y = a * x
    y = y + b * eps_hat
    if guidance is not None:
        y = y + c * guidance
    if z is not None:
        y = y + d * z
    return y


if triton is not None:

    @triton.jit
    def _guided_step_kernel(
        y_ptr,
        classifier_input_ptr,
        x_ptr,
        eps_hat_ptr,
        guidance_ptr,
        coefficients_ptr,
        step_ptr,
        seed_ptr,
        ids_ptr,
        draw_ptr,
        rows,
        elements,
        groups,
        tiles,
        channels,
        pixels,
        TABLE: tl.constexpr,
        ADD_GUIDANCE: tl.constexpr,
        ADD_NOISE: tl.constexpr,
        WRITE_CLASSIFIER_INPUT: tl.constexpr,
        INTERLEAVED: tl.constexpr,
        STRIDED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """`groups` of 4 · INTERLEAVED elements an image, one a thread; `elements` counts one image.

        INTERLEAVED = 1: a group is one Philox block, 4 elements that lie side by side (STRIDED: as channels-last has them).
        INTERLEAVED = channels: channels-last, a group is 4 pixels, hence one Philox block of each channel.

        No spills; registers leave an SM at least 1280 threads, 896 with 3 channels interleaved, 640 with 4 (sm_80 … sm_100).
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
        a = tl.load(coefficients_ptr + row * 4, mask=known, other=float("nan"))
        b = tl.load(coefficients_ptr + row * 4 + 1, mask=known, other=float("nan"))
        if ADD_GUIDANCE:
            c = tl.load(coefficients_ptr + row * 4 + 2, mask=known, other=float("nan"))

        # All loads before the first store: y may be x.
        ys = ()
        for piece in tl.static_range(INTERLEAVED):
            local = tl.arange(0, BLOCK)[:, None] * (4 * INTERLEAVED) + (4 * piece + tl.arange(0, 4)[None, :])  # [BLOCK, 4]
            mask = local < left
            if STRIDED:
                element = first_element + local
                offset = image_start + (element % pixels) * channels + element // pixels
            else:
                offset = image_start + first_element + local
            y = a * tl.load(x_ptr + offset, mask=mask)
            y = y + b * tl.load(eps_hat_ptr + offset, mask=mask)
            if ADD_GUIDANCE:
                y = y + c * tl.load(guidance_ptr + offset, mask=mask)
            ys = ys + (y,)  # type: ignore[assignment]

        zs = ()
        if ADD_NOISE:
            d = tl.load(coefficients_ptr + row * 4 + 3, mask=known, other=float("nan"))
            draw, image_id = tl.load(draw_ptr + image).to(tl.uint32), tl.load(ids_ptr + image).to(tl.uint32)
            seed = tl.load(seed_ptr)
            first_block = first_group
            for _ in tl.static_range(INTERLEAVED):  # over channels
                blocks = first_block.to(tl.uint32) + tl.arange(0, BLOCK).to(tl.uint32)  # [BLOCK]
                zs = zs + normals_of_blocks_kernel(blocks, step.to(tl.uint32), draw, image_id, seed)
                first_block += groups

        for piece in tl.static_range(INTERLEAVED):
            local = tl.arange(0, BLOCK)[:, None] * (4 * INTERLEAVED) + (4 * piece + tl.arange(0, 4)[None, :])  # [BLOCK, 4]
            mask = local < left
            if STRIDED:
                element = first_element + local
                offset = image_start + (element % pixels) * channels + element // pixels
            else:
                offset = image_start + first_element + local
            y = ys[piece]
            if ADD_NOISE:
                # Float j of a group is channel j % INTERLEAVED of pixel j // INTERLEAVED.
                z = columns_kernel(
                    zs[(4 * piece + 0) % INTERLEAVED * 4 + (4 * piece + 0) // INTERLEAVED],
                    zs[(4 * piece + 1) % INTERLEAVED * 4 + (4 * piece + 1) // INTERLEAVED],
                    zs[(4 * piece + 2) % INTERLEAVED * 4 + (4 * piece + 2) // INTERLEAVED],
                    zs[(4 * piece + 3) % INTERLEAVED * 4 + (4 * piece + 3) // INTERLEAVED],
                )
                y = y + d * z
            tl.store(y_ptr + offset, y, mask=mask)
            if WRITE_CLASSIFIER_INPUT:
                tl.store(classifier_input_ptr + offset, (y + 1.0) * 0.5, mask=mask)


def guided_step(
    x: torch.Tensor,
    eps_hat: torch.Tensor,
    guidance: torch.Tensor | None,
    coefficients: torch.Tensor,
    step: torch.Tensor,
    *,
    noise: DeviceNoise | None = None,
    out: torch.Tensor | None = None,
    classifier_input: torch.Tensor | None = None,
) -> torch.Tensor:
    """Fused `guided_step_ref`, with z = `standard_normal_ref` made inside; equal bits. Nothing waits for the device.

    Args:
        x, eps_hat: State and predicted noise (adjoint: v and J_εᵀv): float32, shape (batch, …), all contiguous or all
            channels_last; 16-byte alignment is faster.
        guidance: Guidance gradient (adjoint: Hv), like `x`; None leaves the term out.
        coefficients: Rows (a, b, c, d), float32 (steps, 4), of which row `step` is used; or one row, (4,), whatever the step.
        step: int64, 0-dim: the row, and the step of the noise, in [0, 2³²). With a table that lacks it the result is NaN
            (on the CPU an IndexError).
        noise: (seed, ids, draw) as `DeviceNoise`: `seed_tensor(seed)`, image ids and draws in [0, 2³²). None leaves the
            term out.
        out: Where to write; may be `x`. A new tensor like `x` if None.
        classifier_input: Where to write (y + 1) / 2, if anywhere.

    Returns:
        a x + b eps_hat + c guidance + d z, in `out` if given. Not differentiable: its transpose is another call.

    Raises:
        ValueError, TypeError: for tensors that do not fit each other.
        RuntimeError: for CUDA tensors without Triton.
    """
    y = torch.empty_like(x) if out is None else out
    seed, ids, draw = (None, None, None) if noise is None else noise
    guided_step_out(y, classifier_input, x, eps_hat, guidance, coefficients, step, seed, ids, draw)
    return y


# Writes into tensors that are given instead of returning new ones: a captured graph reads and writes fixed addresses, so a
# result of its own would have to be copied into the static buffer, two more passes over a map that needs four.
@library.custom_op(
    "coupfast::guided_step_out",
    mutates_args=("y", "classifier_input"),
    device_types="cpu",
    schema="(Tensor(a0!) y, Tensor(a1!)? classifier_input, Tensor x, Tensor eps_hat, Tensor? guidance, Tensor coefficients, "
    "Tensor step, Tensor? seed, Tensor? ids, Tensor? draw) -> ()",
)
def guided_step_out(y, classifier_input, x, eps_hat, guidance, coefficients, step, seed, ids, draw):
    """`guided_step` as PyTorch's dispatcher knows it. On the CPU: the definitions, for tests of what runs on the GPU."""
    _common_layout(y, classifier_input, x, eps_hat, guidance, coefficients, step, seed, ids, draw)
    row, k = coefficients, int(step)
    if coefficients.dim() == 2:
        if not 0 <= k < len(coefficients):
            raise IndexError(f"the table has steps 0 … {len(coefficients) - 1}, `step` is {k}")
        row = coefficients[k]
    z = None
    if seed is not None:
        z = standard_normal_ref(tuple(x.shape), seed=int(seed) % 2**64, ids=ids, draw=draw, step=k)
    a, b, c, d = row.tolist()
    y.copy_(guided_step_ref(x, eps_hat, guidance, (a, b, c, d), z))
    if classifier_input is not None:
        classifier_input.copy_((y + 1.0) * 0.5)


@guided_step_out.register_fake
def _(y, classifier_input, x, eps_hat, guidance, coefficients, step, seed, ids, draw):
    _common_layout(y, classifier_input, x, eps_hat, guidance, coefficients, step, seed, ids, draw)


@guided_step_out.register_kernel("cuda")
def _launch(y, classifier_input, x, eps_hat, guidance, coefficients, step, seed, ids, draw):
    layout = _common_layout(y, classifier_input, x, eps_hat, guidance, coefficients, step, seed, ids, draw)
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
            classifier_input,
            x,
            eps_hat,
            guidance,
            coefficients,
            step,
            seed,
            ids,
            draw,
            rows=coefficients.numel() // 4,
            elements=elements,
            groups=groups,
            tiles=tiles,
            channels=channels,
            pixels=pixels,
            TABLE=coefficients.dim() == 2,
            ADD_GUIDANCE=guidance is not None,
            ADD_NOISE=seed is not None,
            WRITE_CLASSIFIER_INPUT=classifier_input is not None,
            INTERLEAVED=interleaved,
            STRIDED=strided,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,  # bits, not ulps: see kernels/README.md
        )


def _common_layout(y, classifier_input, x, eps_hat, guidance, coefficients, step, seed, ids, draw) -> torch.memory_format:
    """The memory format that all images share, after checking that everything fits; reads no values."""
    images = {"y": y, "classifier_input": classifier_input, "x": x, "eps_hat": eps_hat, "guidance": guidance}
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
    if tuple(coefficients.shape[-1:]) != (4,) or coefficients.dim() not in (1, 2):
        raise ValueError(f"`coefficients` have shape (steps, 4) or (4,), got {tuple(coefficients.shape)}")
    given = {"seed": seed, "ids": ids, "draw": draw}
    missing = [name for name, tensor in given.items() if tensor is None]
    if missing and len(missing) < 3:
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
