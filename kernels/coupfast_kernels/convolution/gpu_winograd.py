"""3 × 3 convolutions by Winograd's F(4 × 4, 3 × 3): 36 products for 16 outputs instead of 144, in float32.

    V = Bᵀ d B        of every tile d of 6 × 6 pixels, which overlap by two
    M = V[ξ] U[ξ]     for each of the 36 places ξ, [tiles, in_channels] × [in_channels, out_channels]
    y = (Aᵀ M A + bias[o] + image_bias[n, o] + residual) · scale, tiles of 4 × 4

The points are 0, ±5/8, ±3/2 and infinity, and the sums over channels are taken in runs of 32: together they keep the error
below that of a direct sum of float32 (`bench/winograd_points.py`). U = G w Gᵀ is made once, when weights are packed.
`winograd3x3_ref` is this algorithm, and `conv3x3_ref` what it has to give.

`winograd-tf32x3-halves` takes the products M on tensor cores, by three of TF32 for one; U is split when it is packed, and a run
is a sum of its own there. All else stays in float32.

Where GroupNorm and SiLU stand in front, the first kernel can apply them to the pixels as it reads them, by statistics that were
found before: the map between the two is neither written nor read, and a pixel is normed 36 / 16 times (`gpu_normed.py`).

Three kernels, on as many tiles at a time as let V and M stay in the L2 cache; how many changes no bit, nor does the config: an
output is one sum in one order.
"""

from __future__ import annotations

import torch

from coupfast_kernels.convolution.definition import WINOGRAD_POINTS, check_weight3x3, tf32_halves, winograd_matrices
from coupfast_kernels.convolution.gpu_products import image_bias_stride
from coupfast_kernels.convolution.gpu_tuning import Config

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton exists for Linux only; the definition and the CPU need none of it
    triton = None

TILE, SIZE, PLACES = 4, 6, 36
#: Bytes of V and M at a time, where the device does not say how large its L2 cache is.
WORKSPACE_BYTES = 16 << 20
LEAST_TILES, WHOLE_TILES = 16, 128  # at a time: at least, and multiples of where so many fit


def pack_winograd(weight: torch.Tensor) -> torch.Tensor:
    """Transformed weights.

    Args:
        weight: Shape (out_channels, in_channels, 3, 3), float32.

    Returns:
        Shape (36, in_channels, out_channels), contiguous, float32: place 6 i + j has (G w Gᵀ)[i, j], rounded once.

    Raises:
        TypeError, ValueError: for another dtype or shape.
    """
    check_weight3x3(weight)
    _, g, _ = winograd_matrices(torch.float64)
    g = g.to(weight.device)
    return torch.einsum("ia,ocab,jb->ijco", g, weight.double(), g).reshape(PLACES, weight.shape[1], weight.shape[0]).float()


def pack_winograd_halves(weight: torch.Tensor) -> torch.Tensor:
    """Transformed weights in two TF32 numbers, as tensor cores read them.

    Args:
        weight: As `pack_winograd` takes it.

    Returns:
        Shape (2 · 36, out_channels, in_channels), contiguous: the `tf32_halves` of `pack_winograd`, one behind the other.

    Raises:
        TypeError, ValueError: for another dtype or shape.
    """
    return tf32_halves(pack_winograd(weight).transpose(1, 2).contiguous()).flatten(0, 1)


def unpack_winograd_halves(packed: torch.Tensor) -> torch.Tensor:
    """The weights that these come from, up to rounding."""
    return unpack_winograd((packed[:PLACES] + packed[PLACES:]).transpose(1, 2))


def unpack_winograd(packed: torch.Tensor) -> torch.Tensor:
    """The weights that these come from, up to rounding."""
    _, g, _ = winograd_matrices(torch.float64)
    inverse = torch.linalg.pinv(g).to(packed.device)
    u = packed.double().reshape(SIZE, SIZE, *packed.shape[1:])
    return torch.einsum("ai,ijco,bj->ocab", inverse, u, inverse).float()


def workspace_bytes(device: torch.device) -> int:
    """The most that V and M of a convolution take: half of the L2 cache, so that images, weights and results find room, too."""
    if device.type != "cuda":
        return WORKSPACE_BYTES
    return torch.cuda.get_device_properties(device).L2_cache_size // 2 or WORKSPACE_BYTES


def tiles_of(x: torch.Tensor) -> int:
    """Tiles of all images."""
    return x.shape[0] * -(-x.shape[2] // TILE) * -(-x.shape[3] // TILE)


def tiles_at_once(tiles: int, channels: int, workspace: int) -> int:
    """How many tiles' V and M, of so many channels together, fit into the workspace."""
    fit = workspace // (4 * PLACES * channels)
    return min(tiles, max(LEAST_TILES, fit // WHOLE_TILES * WHOLE_TILES or fit))


if triton is not None:
    from coupfast_kernels.convolution.gpu_products import sum_of_halves_kernel
    from coupfast_kernels.group_norm.gpu_kernels import normed_kernel

    A, B = (tl.constexpr(float(point)) for point in WINOGRAD_POINTS)
    A2, B2, A3, B3 = (tl.constexpr(power) for power in (A.value**2, B.value**2, A.value**3, B.value**3))
    ALL, BOTH = tl.constexpr((A.value * B.value) ** 2), tl.constexpr(-(A.value**2 + B.value**2))

    @triton.jit
    def _fma_kernel(factor, x, y):
        return tl.fma(x, tl.full(x.shape, factor, tl.float32), y)

    @triton.jit
    def _input_line_kernel(d):
        """Bᵀ d."""
        even_a, odd_a = _fma_kernel(-B2, d[2], d[4]), _fma_kernel(-B2, d[1], d[3])
        even_b, odd_b = _fma_kernel(-A2, d[2], d[4]), _fma_kernel(-A2, d[1], d[3])
        return (
            _fma_kernel(ALL, d[0], _fma_kernel(BOTH, d[2], d[4])),
            _fma_kernel(A, odd_a, even_a),
            _fma_kernel(-A, odd_a, even_a),
            _fma_kernel(B, odd_b, even_b),
            _fma_kernel(-B, odd_b, even_b),
            _fma_kernel(ALL, d[1], _fma_kernel(BOTH, d[3], d[5])),
        )

    @triton.jit
    def _output_line_kernel(m):
        """Aᵀ m."""
        sum_a, difference_a = m[1] + m[2], m[1] - m[2]
        sum_b, difference_b = m[3] + m[4], m[3] - m[4]
        return (
            m[0] + (sum_a + sum_b),
            _fma_kernel(A, difference_a, difference_b * B),
            _fma_kernel(A2, sum_a, sum_b * B2),
            _fma_kernel(A3, difference_a, _fma_kernel(B3, difference_b, m[5])),
        )

    @triton.jit
    def _program_kernel(first, tile_rows, tile_columns, channels, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
        """Of a transform's program: its tiles from `first` on, its channels, and image, row and column of tiles' outputs."""
        blocks = tl.cdiv(channels, BLOCK_C)
        t = tl.program_id(0) // blocks * BLOCK_T + tl.arange(0, BLOCK_T)
        channel = (tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
        tile, tiles = first + t, tile_rows * tile_columns
        place = tile % tiles
        return t, channel, tile // tiles, place // tile_columns * 4, place % tile_columns * 4

    @triton.jit(do_not_specialize=["groups", "first", "count", "at_once", "height", "width", "tile_rows", "tile_columns"])
    def _input_kernel(
        v_ptr,
        x_ptr,
        statistics_ptr,
        norm_weight_ptr,
        norm_bias_ptr,
        groups,
        first,
        count,
        at_once,
        height,
        width,
        tile_rows,
        tile_columns,
        in_channels,
        BLOCK_T: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        """V of tiles first … first + count, [36, at_once, in_channels]. Memory-bound: reads x 36 / 16 times, writes V.

        With `statistics_ptr`, [images, 3, groups], of silu(GroupNorm(x)), which is 0 outside of the image, too.
        """
        t, channel, image, h, w = _program_kernel(first, tile_rows, tile_columns, in_channels, BLOCK_T, BLOCK_C)
        top, left = h - 1, w - 1
        inside = t < count
        known = channel < in_channels  # [1, BLOCK_C]
        corner = (image.to(tl.int64) * height + top) * width + left
        if statistics_ptr is not None:
            place = image[:, None] * (3 * groups) + channel // (in_channels // groups)
            mask = inside[:, None] & known
            mean = tl.load(statistics_ptr + place, mask=mask, other=0.0)
            shift = tl.load(statistics_ptr + groups + place, mask=mask, other=0.0)
            inverse = tl.load(statistics_ptr + 2 * groups + place, mask=mask, other=0.0)
            norm_weight = tl.load(norm_weight_ptr + channel, mask=known, other=0.0)
            norm_bias = tl.load(norm_bias_ptr + channel, mask=known, other=0.0)
        half = ()
        for j in tl.static_range(6):
            column_there = inside & (left + j >= 0) & (left + j < width)
            d = ()
            for i in tl.static_range(6):
                there = column_there & (top + i >= 0) & (top + i < height)
                pixel = (corner + (i * width + j))[:, None]
                value = tl.load(x_ptr + pixel * in_channels + channel, mask=there[:, None] & known, other=0.0)
                if statistics_ptr is not None:
                    # The order of the norm's own kernel, and so its bits.
                    value = normed_kernel(value - mean, shift, inverse, norm_weight, norm_bias, SILU=True)
                    value = tl.where(there[:, None] & known, value, 0.0)
                d = d + (value,)  # type: ignore[assignment]
            half = half + _input_line_kernel(d)
        for i in tl.static_range(6):
            v = _input_line_kernel((half[i], half[6 + i], half[12 + i], half[18 + i], half[24 + i], half[30 + i]))
            for j in tl.static_range(6):
                row = ((6 * i + j) * at_once + t)[:, None]
                tl.store(v_ptr + (row * in_channels + channel), v[j], mask=inside[:, None] & known)

    @triton.jit(do_not_specialize=["count", "at_once"])
    def _product_kernel(
        m_ptr,
        v_ptr,
        u_ptr,
        small_ptr,
        count,
        at_once,
        in_channels,
        out_channels,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        """M[ξ] = V[ξ] U[ξ], sums in runs of 32 channels. Tiles of channels vary fastest, then those of rows.

        A run is two blocks; with `small_ptr`, where `u_ptr` has the large halves, one.
        """
        column_tiles, row_tiles = tl.cdiv(out_channels, BLOCK_N), tl.cdiv(count, BLOCK_M)
        program = tl.program_id(0) // column_tiles
        column = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        row, place = program % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M), program // row_tiles
        k = tl.arange(0, BLOCK_K)
        rows, columns = (row < count)[:, None], (column < out_channels)[None, :]
        a_ptr = v_ptr + (place * at_once + row)[:, None] * in_channels + k[None, :]  # [BLOCK_M, BLOCK_K]
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if small_ptr is None:
            b_ptr = u_ptr + (place * in_channels + k)[:, None] * out_channels + column[None, :]  # [BLOCK_K, BLOCK_N]
            for start in range(0, in_channels, 2 * BLOCK_K):
                left = in_channels - start
                a = tl.load(a_ptr + start, mask=rows & (k < left)[None, :], other=0.0)
                b = tl.load(b_ptr + start * out_channels, mask=(k < left)[:, None] & columns, other=0.0)
                part = tl.dot(a, b, input_precision="ieee")
                a = tl.load(a_ptr + (start + BLOCK_K), mask=rows & (k < left - BLOCK_K)[None, :], other=0.0)
                b = tl.load(b_ptr + (start + BLOCK_K) * out_channels, mask=(k < left - BLOCK_K)[:, None] & columns, other=0.0)
                # Two products a run: Triton makes one chain of a sum with a single product.
                sums += tl.dot(a, b, part, input_precision="ieee")
        else:
            offset = (place * out_channels + column)[:, None] * in_channels + k[None, :]  # [BLOCK_N, BLOCK_K]
            for start in range(0, in_channels, BLOCK_K):
                known = (k < in_channels - start)[None, :]
                a = tl.load(a_ptr + start, mask=rows & known, other=0.0)
                there = (column < out_channels)[:, None] & known
                big = tl.trans(tl.load(u_ptr + (start + offset), mask=there, other=0.0))
                small = tl.trans(tl.load(small_ptr + (start + offset), mask=there, other=0.0))
                sums += sum_of_halves_kernel(a, big, small)
        tl.store(m_ptr + (place * at_once + row)[:, None] * out_channels + column[None, :], sums, mask=rows & columns)

    @triton.jit(do_not_specialize=["first", "count", "at_once", "height", "width", "tile_rows", "tile_columns"])
    def _output_kernel(
        y_ptr,
        m_ptr,
        bias_ptr,
        image_bias_ptr,
        residual_ptr,
        image_bias_stride,
        scale,
        first,
        count,
        at_once,
        height,
        width,
        tile_rows,
        tile_columns,
        out_channels,
        BLOCK_T: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        """y of tiles first … first + count. Memory-bound: reads M (from L2) and the residual, writes y."""
        t, channel, image, h, w = _program_kernel(first, tile_rows, tile_columns, out_channels, BLOCK_T, BLOCK_C)
        inside = t < count
        known = channel < out_channels  # [1, BLOCK_C]
        mask = inside[:, None] & known
        half = ()
        for j in tl.static_range(6):
            m = ()
            for i in tl.static_range(6):
                row = ((6 * i + j) * at_once + t)[:, None]
                value = tl.load(m_ptr + (row * out_channels + channel), mask=mask, other=0.0)
                m = m + (value,)  # type: ignore[assignment]
            half = half + _output_line_kernel(m)
        bias = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
        if bias_ptr is not None:
            bias += tl.load(bias_ptr + channel, mask=known, other=0.0)
        if image_bias_ptr is not None:
            bias += tl.load(image_bias_ptr + (image[:, None] * image_bias_stride + channel), mask=mask, other=0.0)
        corner = (image.to(tl.int64) * height + h) * width + w
        for i in tl.static_range(4):
            line = _output_line_kernel((half[i], half[4 + i], half[8 + i], half[12 + i], half[16 + i], half[20 + i]))
            for j in tl.static_range(4):
                there = mask & ((h + i < height) & (w + j < width))[:, None]
                offset = (corner + (i * width + j))[:, None] * out_channels + channel
                y = line[j] + bias
                if residual_ptr is not None:
                    y = y + tl.load(residual_ptr + offset, mask=there, other=0.0)
                tl.store(y_ptr + offset, y * scale, mask=there)


#: Tiles × channels of a program of a transform, and its warps: two values a thread, so that each of 36 accesses is 64 bits.
TRANSFORM_T, TRANSFORM_C, TRANSFORM_WARPS = 4, 64, 4


#: What `x` is normed by, before SiLU: statistics [batch, 3, groups] (`group_norm_statistics_ref`), weight and bias [channels].
Norm = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def launch_winograd(
    y, x, packed, bias, image_bias, residual, scale, config: Config, *, norm: Norm | None = None, workspace: int | None = None
) -> None:
    """Writes `y`, which no other argument may overlap; V and M together take `workspace` bytes at most, or 16 tiles."""
    tiles, channels = tiles_of(x), x.shape[1] + y.shape[1]
    at_once = tiles_at_once(tiles, channels, workspace_bytes(x.device) if workspace is None else workspace)
    v = torch.empty(PLACES, at_once, x.shape[1], dtype=x.dtype, device=x.device)
    m = torch.empty(PLACES, at_once, y.shape[1], dtype=x.dtype, device=x.device)
    for first in range(0, tiles, at_once):
        count = min(at_once, tiles - first)
        launch_input(v, x, first, count, norm)
        launch_product(m, v, packed, count, config)
        launch_output(y, m, bias, image_bias, residual, scale, first, count)


def launch_input(v, x, first: int, count: int, norm: Norm | None = None) -> None:
    """V of some tiles."""
    statistics, norm_weight, norm_bias = (None, None, None) if norm is None else norm
    _input_kernel[_transform_grid(count, x.shape[1])](
        v,
        x,
        statistics,
        norm_weight,
        norm_bias,
        groups=1 if statistics is None else statistics.shape[2],
        first=first,
        count=count,
        at_once=v.shape[1],
        **_maps(x),
        in_channels=x.shape[1],
        BLOCK_T=TRANSFORM_T,
        BLOCK_C=TRANSFORM_C,
        num_warps=TRANSFORM_WARPS,
        enable_fp_fusion=False,  # multiply-adds are where the formula has them
    )


def launch_product(m, v, packed, count: int, config: Config) -> None:
    """M of some tiles."""
    u, small = packed.split(PLACES) if len(packed) > PLACES else (packed, None)
    programs = PLACES * triton.cdiv(count, config.block_m) * triton.cdiv(m.shape[2], config.block_n)
    _product_kernel[(programs,)](
        m,
        v,
        u,
        small,
        count=count,
        at_once=v.shape[1],
        in_channels=v.shape[2],
        out_channels=m.shape[2],
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )


def launch_output(y, m, bias, image_bias, residual, scale: float, first: int, count: int) -> None:
    """y of some tiles."""
    _output_kernel[_transform_grid(count, y.shape[1])](
        y,
        m,
        bias,
        image_bias,
        residual,
        image_bias_stride=image_bias_stride(image_bias),
        scale=float(scale),
        first=first,
        count=count,
        at_once=m.shape[1],
        **_maps(y),
        out_channels=y.shape[1],
        BLOCK_T=TRANSFORM_T,
        BLOCK_C=TRANSFORM_C,
        num_warps=TRANSFORM_WARPS,
        enable_fp_fusion=False,
    )


def _transform_grid(count: int, channels: int) -> tuple[int]:
    return (triton.cdiv(count, TRANSFORM_T) * triton.cdiv(channels, TRANSFORM_C),)


def _maps(x: torch.Tensor) -> dict[str, int]:
    height, width = x.shape[2:]
    return dict(height=height, width=width, tile_rows=-(-height // TILE), tile_columns=-(-width // TILE))
