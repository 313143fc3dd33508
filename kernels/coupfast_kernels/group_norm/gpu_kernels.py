"""Triton kernels of GroupNorm with SiLU, of its statistics alone and of its transpose: of groups that registers hold, and of
groups that are looped over."""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton exists for Linux only; the definition and the CPU need none of it
    triton = None

if triton is not None:

    @triton.jit
    def _tile_kernel(
        tile,
        PIXELS: tl.constexpr,
        CHANNELS: tl.constexpr,
        GROUP_CHANNELS: tl.constexpr,
        CHANNELS_LAST: tl.constexpr,
        BLOCK_P: tl.constexpr,
        BLOCK_G: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        """Of BLOCK_G whole groups: offsets in the image, what exists of them, channels, which exist."""
        p = tl.arange(0, BLOCK_P)[:, None, None]
        g = tl.arange(0, BLOCK_G)[None, :, None]
        c = tl.arange(0, BLOCK_C)[None, None, :]
        channel = (tile * BLOCK_G + g) * GROUP_CHANNELS + c  # [1, BLOCK_G, BLOCK_C]
        if CHANNELS_LAST:
            offset = p * CHANNELS + channel
        else:
            offset = channel * PIXELS + p
        # Channels have a mask of their own, so that the pixels of a thread share what it reads of them.
        known = (c < GROUP_CHANNELS) & (g >= 0)
        return offset, (p < PIXELS) & known, channel, known  # [BLOCK_P, BLOCK_G, BLOCK_C] twice, [1, BLOCK_G, BLOCK_C] twice

    @triton.jit
    def _part_kernel(
        group,
        start,
        PIXELS: tl.constexpr,
        CHANNELS: tl.constexpr,
        GROUP_CHANNELS: tl.constexpr,
        CHANNELS_LAST: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Elements start … start + BLOCK of one group, as they lie in memory: offsets, channels, and what exists; [BLOCK]."""
        i = start + tl.arange(0, BLOCK)
        if CHANNELS_LAST:
            channel = group * GROUP_CHANNELS + i % GROUP_CHANNELS
            offset = i // GROUP_CHANNELS * CHANNELS + channel
        else:
            channel = group * GROUP_CHANNELS + i // PIXELS
            offset = group * (GROUP_CHANNELS * PIXELS) + i
        return offset, channel, i < GROUP_CHANNELS * PIXELS

    @triton.jit
    def _h_kernel(x_ptr, image_bias_ptr, residual_ptr, scale, offset, mask, channel, known):
        """h of what exists; each operation rounded, in the order of the definition."""
        h = tl.load(x_ptr + offset, mask=mask, other=0.0)
        if image_bias_ptr is not None:
            h = h + tl.load(image_bias_ptr + channel, mask=known, other=0.0)
        if residual_ptr is not None:
            h = h + tl.load(residual_ptr + offset, mask=mask, other=0.0)
        return h * scale

    @triton.jit
    def _sum_kernel(t):
        """Sums over pixels, then over the channels of a group: [BLOCK_P, BLOCK_G, BLOCK_C] → [1, BLOCK_G, 1]."""
        return tl.sum(tl.sum(t, axis=0), axis=1)[None, :, None]

    @triton.jit
    def _inverse_deviation_kernel(squares, shift, eps):
        """1 / sqrt(var + eps) from the means of d² and of d, for d = h less nearly its mean; NaN where squares overflowed."""
        # Rounding can take the difference below 0 by as much as its error, with eps = 0 below the root's domain.
        inverse = tl.rsqrt(tl.maximum(squares - shift * shift, 0.0) + eps)
        return tl.where(squares < float("inf"), inverse, float("nan"))

    @triton.jit
    def _statistics_kernel(h, exists, inverse_count: tl.constexpr, eps):
        """Nearly a group's mean; d = h less that, 0 where nothing exists; the mean of d; 1 / sqrt(var + eps)."""
        mean = _sum_kernel(h) * inverse_count
        d = tl.where(exists, h - mean, 0.0)
        # The mean's own rounding, which a large mean makes large, is seen in d, whose mean would be 0 without it.
        shift = _sum_kernel(d) * inverse_count
        return mean, d, shift, _inverse_deviation_kernel(_sum_kernel(d * d) * inverse_count, shift, eps)

    @triton.jit
    def _loop_statistics_kernel(
        x_ptr,
        image_bias_ptr,
        residual_ptr,
        scale,
        group,
        eps,
        PIXELS: tl.constexpr,
        CHANNELS: tl.constexpr,
        GROUP_CHANNELS: tl.constexpr,
        CHANNELS_LAST: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Nearly the mean of a group's h, what it is off by, and 1 / sqrt(var + eps): twice over the group."""
        count: tl.constexpr = PIXELS * GROUP_CHANNELS
        inverse_count: tl.constexpr = 1.0 / count

        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, count, BLOCK):
            offset, channel, exists = _part_kernel(group, first, PIXELS, CHANNELS, GROUP_CHANNELS, CHANNELS_LAST, BLOCK)
            total += _h_kernel(x_ptr, image_bias_ptr, residual_ptr, scale, offset, exists, channel, exists)
        mean = tl.sum(total) * inverse_count

        total, squares = tl.zeros((BLOCK,), dtype=tl.float32), tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, count, BLOCK):
            offset, channel, exists = _part_kernel(group, first, PIXELS, CHANNELS, GROUP_CHANNELS, CHANNELS_LAST, BLOCK)
            h = _h_kernel(x_ptr, image_bias_ptr, residual_ptr, scale, offset, exists, channel, exists)
            d = tl.where(exists, h - mean, 0.0)
            total += d
            squares += d * d
        shift = tl.sum(total) * inverse_count
        return mean, shift, _inverse_deviation_kernel(tl.sum(squares) * inverse_count, shift, eps)

    @triton.jit
    def _sigmoid_kernel(a):
        return 1.0 / (1.0 + tl.exp(-a))

    @triton.jit
    def normed_kernel(d, shift, inverse, weight, bias, SILU: tl.constexpr):
        """y of what exists, d = h less nearly its mean."""
        y = (d - shift) * inverse * weight + bias
        if SILU:
            y = y * _sigmoid_kernel(y)
        return y

    @triton.jit
    def _gn_kernel(gy_ptr, offset, mask, n, weight, bias, SILU: tl.constexpr):
        """∂L/∂n, 0 where nothing exists."""
        gn = tl.load(gy_ptr + offset, mask=mask, other=0.0) * weight
        if SILU:
            a = n * weight + bias
            s = _sigmoid_kernel(a)
            gn = gn * (s * (1.0 + a * (1.0 - s)))
        return gn

    @triton.jit
    def _group_norm_kernel(
        h_ptr,
        y_ptr,
        statistics_ptr,
        x_ptr,
        weight_ptr,
        bias_ptr,
        image_bias_ptr,
        residual_ptr,
        image_bias_stride,
        scale,
        eps,
        TILES: tl.constexpr,
        PIXELS: tl.constexpr,
        CHANNELS: tl.constexpr,
        GROUP_CHANNELS: tl.constexpr,
        CHANNELS_LAST: tl.constexpr,
        SILU: tl.constexpr,
        BLOCK_P: tl.constexpr,
        BLOCK_G: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        """One program takes BLOCK_G groups of one image, TILES programs an image; with `statistics_ptr` those in place of y.

        No spills; registers leave an SM at least 512 threads on the maps of DDPM++ deep (sm_80 … sm_100).
        """
        image, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
        start = image.to(tl.int64) * (PIXELS * CHANNELS)
        if image_bias_ptr is not None:
            image_bias_ptr += image.to(tl.int64) * image_bias_stride
        if residual_ptr is not None:
            residual_ptr += start
        offset, exists, channel, known = _tile_kernel(
            tile, PIXELS, CHANNELS, GROUP_CHANNELS, CHANNELS_LAST, BLOCK_P, BLOCK_G, BLOCK_C
        )
        inverse_count: tl.constexpr = 1.0 / (PIXELS * GROUP_CHANNELS)

        h = _h_kernel(x_ptr + start, image_bias_ptr, residual_ptr, scale, offset, exists, channel, known)
        if h_ptr is not None:
            tl.store(h_ptr + start + offset, h, mask=exists)
        mean, d, shift, inverse = _statistics_kernel(h, exists, inverse_count, eps)
        if statistics_ptr is not None:
            groups: tl.constexpr = TILES * BLOCK_G
            place = image * (3 * groups) + tile * BLOCK_G + tl.arange(0, BLOCK_G)[None, :, None]
            tl.store(statistics_ptr + place, mean)
            tl.store(statistics_ptr + groups + place, shift)
            tl.store(statistics_ptr + 2 * groups + place, inverse)
        else:
            weight = tl.load(weight_ptr + channel, mask=known, other=0.0)
            bias = tl.load(bias_ptr + channel, mask=known, other=0.0)
            tl.store(y_ptr + start + offset, normed_kernel(d, shift, inverse, weight, bias, SILU), mask=exists)

    @triton.jit
    def _group_norm_vjp_kernel(
        gx_ptr,
        h_ptr,
        gy_ptr,
        gh_ptr,
        weight_ptr,
        bias_ptr,
        scale,
        eps,
        TILES: tl.constexpr,
        PIXELS: tl.constexpr,
        CHANNELS: tl.constexpr,
        GROUP_CHANNELS: tl.constexpr,
        CHANNELS_LAST: tl.constexpr,
        SILU: tl.constexpr,
        BLOCK_P: tl.constexpr,
        BLOCK_G: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        """One program takes BLOCK_G groups of one image, TILES programs an image.

        No spills; registers leave an SM at least 512 threads on the maps of DDPM++ deep (sm_80 … sm_100).
        """
        image, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
        start = image.to(tl.int64) * (PIXELS * CHANNELS)
        offset, exists, channel, known = _tile_kernel(
            tile, PIXELS, CHANNELS, GROUP_CHANNELS, CHANNELS_LAST, BLOCK_P, BLOCK_G, BLOCK_C
        )
        inverse_count: tl.constexpr = 1.0 / (PIXELS * GROUP_CHANNELS)

        h = tl.load(h_ptr + start + offset, mask=exists, other=0.0)
        _, d, shift, inverse = _statistics_kernel(h, exists, inverse_count, eps)
        n = (d - shift) * inverse
        weight = tl.load(weight_ptr + channel, mask=known, other=0.0)
        bias = tl.load(bias_ptr + channel, mask=known, other=0.0)
        gn = _gn_kernel(gy_ptr + start, offset, exists, n, weight, bias, SILU)
        mean, slope = _sum_kernel(gn) * inverse_count, _sum_kernel(gn * n) * inverse_count
        g = (gn - mean - n * slope) * inverse
        if gh_ptr is not None:
            g = g + tl.load(gh_ptr + start + offset, mask=exists, other=0.0)
        tl.store(gx_ptr + start + offset, g * scale, mask=exists)

    @triton.jit
    def _group_norm_loop_kernel(
        h_ptr,
        y_ptr,
        statistics_ptr,
        x_ptr,
        weight_ptr,
        bias_ptr,
        image_bias_ptr,
        residual_ptr,
        image_bias_stride,
        scale,
        eps,
        TILES: tl.constexpr,
        PIXELS: tl.constexpr,
        CHANNELS: tl.constexpr,
        GROUP_CHANNELS: tl.constexpr,
        CHANNELS_LAST: tl.constexpr,
        SILU: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """`_group_norm_kernel` for a group that registers do not hold: three times over it, BLOCK elements at a time, twice for
        statistics alone.

        No spills; registers leave an SM at least 512 threads.
        """
        image, group = tl.program_id(0) // TILES, tl.program_id(0) % TILES
        start = image.to(tl.int64) * (PIXELS * CHANNELS)
        if image_bias_ptr is not None:
            image_bias_ptr += image.to(tl.int64) * image_bias_stride
        if residual_ptr is not None:
            residual_ptr += start
        x_ptr += start
        count: tl.constexpr = PIXELS * GROUP_CHANNELS
        mean, shift, inverse = _loop_statistics_kernel(
            x_ptr, image_bias_ptr, residual_ptr, scale, group, eps, PIXELS, CHANNELS, GROUP_CHANNELS, CHANNELS_LAST, BLOCK
        )
        if statistics_ptr is not None:
            place = statistics_ptr + image * (3 * TILES) + group
            tl.store(place, mean)
            tl.store(place + TILES, shift)
            tl.store(place + 2 * TILES, inverse)
        if h_ptr is not None or y_ptr is not None:
            for first in range(0, count, BLOCK):
                offset, channel, exists = _part_kernel(group, first, PIXELS, CHANNELS, GROUP_CHANNELS, CHANNELS_LAST, BLOCK)
                h = _h_kernel(x_ptr, image_bias_ptr, residual_ptr, scale, offset, exists, channel, exists)
                if h_ptr is not None:
                    tl.store(h_ptr + start + offset, h, mask=exists)
                if y_ptr is not None:
                    weight = tl.load(weight_ptr + channel, mask=exists, other=0.0)
                    bias = tl.load(bias_ptr + channel, mask=exists, other=0.0)
                    y = normed_kernel(h - mean, shift, inverse, weight, bias, SILU)
                    tl.store(y_ptr + start + offset, y, mask=exists)

    @triton.jit
    def _group_norm_vjp_loop_kernel(
        gx_ptr,
        h_ptr,
        gy_ptr,
        gh_ptr,
        weight_ptr,
        bias_ptr,
        scale,
        eps,
        TILES: tl.constexpr,
        PIXELS: tl.constexpr,
        CHANNELS: tl.constexpr,
        GROUP_CHANNELS: tl.constexpr,
        CHANNELS_LAST: tl.constexpr,
        SILU: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """`_group_norm_vjp_kernel` for a group that registers do not hold: h is read four times, gy twice.

        No spills; registers leave an SM at least 512 threads.
        """
        image, group = tl.program_id(0) // TILES, tl.program_id(0) % TILES
        start = image.to(tl.int64) * (PIXELS * CHANNELS)
        h_ptr += start
        gy_ptr += start
        count: tl.constexpr = PIXELS * GROUP_CHANNELS
        inverse_count: tl.constexpr = 1.0 / count
        mean_h, shift, inverse = _loop_statistics_kernel(
            h_ptr, None, None, 1.0, group, eps, PIXELS, CHANNELS, GROUP_CHANNELS, CHANNELS_LAST, BLOCK
        )
        total, products = tl.zeros((BLOCK,), dtype=tl.float32), tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, count, BLOCK):
            offset, channel, exists = _part_kernel(group, first, PIXELS, CHANNELS, GROUP_CHANNELS, CHANNELS_LAST, BLOCK)
            n = (tl.load(h_ptr + offset, mask=exists, other=0.0) - mean_h - shift) * inverse
            weight = tl.load(weight_ptr + channel, mask=exists, other=0.0)
            bias = tl.load(bias_ptr + channel, mask=exists, other=0.0)
            gn = _gn_kernel(gy_ptr, offset, exists, n, weight, bias, SILU)
            total += gn
            products += gn * n
        mean, slope = tl.sum(total) * inverse_count, tl.sum(products) * inverse_count

        for first in range(0, count, BLOCK):
            offset, channel, exists = _part_kernel(group, first, PIXELS, CHANNELS, GROUP_CHANNELS, CHANNELS_LAST, BLOCK)
            n = (tl.load(h_ptr + offset, mask=exists, other=0.0) - mean_h - shift) * inverse
            weight = tl.load(weight_ptr + channel, mask=exists, other=0.0)
            bias = tl.load(bias_ptr + channel, mask=exists, other=0.0)
            gn = _gn_kernel(gy_ptr, offset, exists, n, weight, bias, SILU)
            g = (gn - mean - n * slope) * inverse
            if gh_ptr is not None:
                g = g + tl.load(gh_ptr + start + offset, mask=exists, other=0.0)
            tl.store(gx_ptr + start + offset, g * scale, mask=exists)
