"""The noise of `definition.py` in one Triton kernel, bit for bit, and its parts for kernels that make noise themselves."""

from __future__ import annotations

import math

import torch
from torch import library

from coupfast_kernels.noise.definition import (
    COS_COEFFICIENTS,
    LN2,
    LOG_COEFFICIENTS,
    PHILOX_KEY_A,
    PHILOX_KEY_B,
    PHILOX_ROUND_A,
    PHILOX_ROUND_B,
    SIN_COEFFICIENTS,
    SQRT_HALF_BITS,
    standard_normal_ref,
)

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton exists for Linux only; the definition and the CPU need none of it
    triton = None

BLOCK = 128  # Philox blocks a program, one a thread
NUM_WARPS = 4


if triton is not None:
    ROUND_A, ROUND_B = tl.constexpr(PHILOX_ROUND_A), tl.constexpr(PHILOX_ROUND_B)
    KEY_A, KEY_B = tl.constexpr(PHILOX_KEY_A), tl.constexpr(PHILOX_KEY_B)
    LOG, LOG_OF_2 = tl.constexpr(LOG_COEFFICIENTS), tl.constexpr(LN2)
    SIN, COS = tl.constexpr(SIN_COEFFICIENTS), tl.constexpr(COS_COEFFICIENTS)
    SQRT_HALF = tl.constexpr(SQRT_HALF_BITS)

    # The kernels below repeat the definitions operation by operation, and give their bits only when launched with
    # `enable_fp_fusion=False`: Triton lets LLVM and ptxas contract a * b + c otherwise.

    @triton.jit
    def philox_4x32_10_kernel(c0, c1, c2, c3, k0, k1):
        """`philox_4x32_10_ref` on uint32."""
        for _ in tl.static_range(10):
            # One wide multiplication gives both words; mul.hi and mul.lo would be two.
            product_a, product_b = c0.to(tl.uint64) * ROUND_A, c2.to(tl.uint64) * ROUND_B
            c0, c1 = (product_b >> 32).to(tl.uint32) ^ c1 ^ k0, product_b.to(tl.uint32)
            c2, c3 = (product_a >> 32).to(tl.uint32) ^ c3 ^ k1, product_a.to(tl.uint32)
            k0, k1 = k0 + KEY_A, k1 + KEY_B
        return c0, c1, c2, c3

    @triton.jit
    def box_muller_kernel(w0, w1):
        """`box_muller_ref` on uint32."""
        shifted = (2 * (w0 >> 9) + 1).to(tl.int32).to(tl.float32).to(tl.int32, bitcast=True) - SQRT_HALF
        exponent = (shifted >> 23).to(tl.float32) - 24.0
        f = ((shifted & 0x7FFFFF) + SQRT_HALF).to(tl.float32, bitcast=True) - 1.0
        p = f * LOG[7] + LOG[6]
        for i in tl.static_range(6):
            p = p * f + LOG[5 - i]
        f2 = f * f
        tail = (f2 * f) * p - 0.5 * f2
        radius = tl.sqrt_rn(-2.0 * (exponent * LOG_OF_2 + (f + tail)))

        n = (2 * (w1 >> 9) + 1).to(tl.int32)
        quadrant = (n + 0x200000) >> 22
        y = (n - (quadrant << 22)).to(tl.float32) * 2.0**-21
        y2 = y * y
        s = ((y2 * SIN[3] + SIN[2]) * y2 + SIN[1]) * y2 + SIN[0]
        s = s * y
        c = (((y2 * COS[3] + COS[2]) * y2 + COS[1]) * y2 + COS[0]) * y2 + 1.0
        swap = (quadrant & 1) == 1
        cosine, sine = tl.where(swap, s, c), tl.where(swap, c, s)
        cosine = tl.where(((quadrant + 1) & 2) == 2, -cosine, cosine)
        sine = tl.where((quadrant & 2) == 2, -sine, sine)
        return radius * cosine, radius * sine

    @triton.jit
    def normals_of_blocks_kernel(block, step, draw, image_id, seed):
        """The four normals of elements 4 block … 4 block + 3, float32 each.

        `block` and the scalars `step`, `draw`, `image_id` are uint32, `seed` is an int64 scalar with the seed's 64 bits.
        """
        k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
        w0, w1, w2, w3 = philox_4x32_10_kernel(block, step, draw, image_id, k0, k1)
        z0, z1 = box_muller_kernel(w0, w1)
        z2, z3 = box_muller_kernel(w2, w3)
        return z0, z1, z2, z3

    @triton.jit
    def columns_kernel(z0, z1, z2, z3):
        """[BLOCK] four times → [BLOCK, 4]; each thread keeps its own, so that nothing moves between threads."""
        return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (z0.shape[0], 4))

    @triton.jit
    def _standard_normal_kernel(z_ptr, seed_ptr, ids_ptr, draw_ptr, step_ptr, elements, tiles, BLOCK: tl.constexpr):
        image, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
        first_block = tile.to(tl.int64) * BLOCK
        blocks = first_block.to(tl.uint32) + tl.arange(0, BLOCK).to(tl.uint32)  # [BLOCK]
        step, draw = tl.load(step_ptr).to(tl.uint32), tl.load(draw_ptr + image).to(tl.uint32)
        image_id, seed = tl.load(ids_ptr + image).to(tl.uint32), tl.load(seed_ptr)
        z0, z1, z2, z3 = normals_of_blocks_kernel(blocks, step, draw, image_id, seed)
        local = tl.arange(0, BLOCK)[:, None] * 4 + tl.arange(0, 4)[None, :]  # [BLOCK, 4]
        z_ptr += image.to(tl.int64) * elements + first_block * 4
        tl.store(z_ptr + local, columns_kernel(z0, z1, z2, z3), mask=local < elements - first_block * 4)


def seed_tensor(seed: int, device: torch.device | str) -> torch.Tensor:
    """The 64 bits of a seed as the kernels read them from device memory: int64 (two's complement), 0-dim."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"`seed` is in [0, 2**64), got {seed}")
    return torch.tensor(seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)


def standard_normal(
    shape: tuple[int, ...], *, seed: torch.Tensor, ids: torch.Tensor, draw: torch.Tensor, step: torch.Tensor
) -> torch.Tensor:
    """Fused `standard_normal_ref`, contiguous; equal bits, one kernel, nothing read by the host.

    Args:
        shape: (batch, …).
        seed: `seed_tensor(seed)`.
        ids, draw: Image ids and draws in [0, 2³²), int64 (batch,).
        step: Step in [0, 2³²), int64, 0-dim. All four on one device.

    Raises:
        ValueError: for tensors that do not fit.
        RuntimeError: for CUDA tensors without Triton.
    """
    return _standard_normal(list(shape), seed, ids, draw, step)


@library.custom_op(
    "coupfast::standard_normal",
    mutates_args=(),
    device_types="cpu",
    schema="(SymInt[] shape, Tensor seed, Tensor ids, Tensor draw, Tensor step) -> Tensor",
)
def _standard_normal(shape, seed, ids, draw, step):
    _check_words(shape, seed, ids, draw, step)
    return standard_normal_ref(tuple(shape), seed=int(seed) % 2**64, ids=ids, draw=draw, step=int(step))


@_standard_normal.register_fake
def _(shape, seed, ids, draw, step):
    _check_words(shape, seed, ids, draw, step)
    return ids.new_empty(shape, dtype=torch.float32)


@_standard_normal.register_kernel("cuda")
def _launch(shape, seed, ids, draw, step):
    _check_words(shape, seed, ids, draw, step)
    if triton is None:
        raise RuntimeError("noise in one kernel on CUDA needs Triton, which is not installed; `pip install triton` (Linux)")
    z = torch.empty(shape, dtype=torch.float32, device=ids.device)
    if z.numel() == 0:
        return z
    elements = z.numel() // len(z)
    tiles = triton.cdiv(elements, 4 * BLOCK)
    # The current device, not the tensors', is where Triton launches.
    with torch.cuda.device_of(ids):
        _standard_normal_kernel[(len(z) * tiles,)](
            z, seed, ids, draw, step, elements, tiles, BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=False
        )
    return z


def _check_words(shape, seed, ids, draw, step) -> None:
    """Reads no values: on a GPU that would wait for it."""
    if len(shape) < 1 or math.prod(shape[1:]) >= 2**34:
        raise ValueError(f"`shape` is (batch, …) with fewer than 2**34 elements an image, got {tuple(shape)}")
    wanted = {"seed": (), "ids": (shape[0],), "draw": (shape[0],), "step": ()}
    for (name, wants), tensor in zip(wanted.items(), (seed, ids, draw, step), strict=True):
        if tensor.dtype != torch.int64 or tuple(tensor.shape) != wants or not tensor.is_contiguous():
            found = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ValueError(f"`{name}` must be contiguous int64 of shape {wants}, got {found}")
        if tensor.device != ids.device:
            raise ValueError(f"`ids` are on {ids.device}, `{name}` on {tensor.device}; a kernel reads from its own device")
