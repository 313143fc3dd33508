"""3 × 3 convolutions of few images: each of the nine taps by programs of its own, and their results added by another kernel.

    parts[tap] = Σ_c x moved by the tap · weight[tap]                   the kernel of `gpu.py`, one tap a program
    y = (bias + image_bias + parts[0] + … + parts[8] + residual) · scale

A result of 16 × 256 numbers is 16 tiles of 16 × 16: a card has more SMs, and each of these tiles is a sum of 2304 terms.
By taps there are nine times as many programs with a ninth of the terms each, and 18 passes more over y, which stay in L2
where a result is small enough for all this to be worth it (`is_small`).

The order of the sum is fixed: there is no atomic addition. The parts are always the taps, whatever the card, the batch or the
config: in `ieee-split` an output is nine chains and their sum, and no choice moves a bit. `sum_parts_ref` is what the second
kernel has to give, to the bit, and `conv3x3_ref` what both have.
"""

from __future__ import annotations

from coupfast_kernels.convolution.gpu_products import image_bias_stride

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton exists for Linux only; the definition and the CPU need none of it
    triton = None

PARTS = 9
#: A result of fewer tiles than this of 64 × 64 leaves SMs of a large GPU idle: an A100 has 108, an H100 132, a B200 148.
TILE, TILES = 64, 128
#: What the parts of such a result take at most: 18.9 MB, less than the L2 cache of each of these (40 MB and more).
MOST_BYTES = 4 * PARTS * TILE * TILE * TILES


def is_small(pixels: int, out_channels: int) -> bool:
    """Whether a result has too few tiles for a large GPU, so that splitting its sums may pay."""
    return -(-pixels // TILE) * -(-out_channels // TILE) < TILES


if triton is not None:

    @triton.jit(do_not_specialize=["pixels", "plane"])
    def _sum_kernel(
        y_ptr,
        parts_ptr,
        bias_ptr,
        image_bias_ptr,
        residual_ptr,
        image_bias_stride,
        scale,
        pixels,
        plane,
        out_channels,
        PARTS: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ):
        """Memory-bound: reads the parts (from L2) and the residual, writes y."""
        column_tiles = tl.cdiv(out_channels, BLOCK_N)
        first = (tl.program_id(0) // column_tiles).to(tl.int64) * BLOCK_M  # pixel, among those of all images
        column = (tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        row = tl.arange(0, BLOCK_M)[:, None]
        mask = (row < pixels - first) & (column < out_channels)
        offset = first * out_channels + (row * out_channels + column)
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if bias_ptr is not None:
            sums += tl.load(bias_ptr + column, mask=mask, other=0.0)
        if image_bias_ptr is not None:
            image = first // plane + ((first % plane).to(tl.int32) + row) // plane
            sums += tl.load(image_bias_ptr + (image * image_bias_stride + column), mask=mask, other=0.0)
        part = parts_ptr + offset
        for _ in tl.static_range(PARTS):
            sums += tl.load(part, mask=mask, other=0.0)
            part += pixels.to(tl.int64) * out_channels
        if residual_ptr is not None:
            sums += tl.load(residual_ptr + offset, mask=mask, other=0.0)
        tl.store(y_ptr + offset, sums * scale, mask=mask)


#: Pixels × channels of a program, and its warps: four values a thread, so that each access is 128 bits.
SUM_M, SUM_N, SUM_WARPS = 4, 64, 2


def launch_sum(y, parts, bias, image_bias, residual, scale: float) -> None:
    """Writes `y` from the results of its taps, [9, pixels · out_channels]; no other argument may overlap it."""
    batch, out_channels, height, width = y.shape
    pixels = batch * height * width
    _sum_kernel[(triton.cdiv(pixels, SUM_M) * triton.cdiv(out_channels, SUM_N),)](
        y,
        parts,
        bias,
        image_bias,
        residual,
        image_bias_stride=image_bias_stride(image_bias),
        scale=float(scale),
        pixels=pixels,
        plane=height * width,
        out_channels=out_channels,
        PARTS=PARTS,
        BLOCK_M=SUM_M,
        BLOCK_N=SUM_N,
        num_warps=SUM_WARPS,
        enable_fp_fusion=False,
    )
