"""Counter-based standard normal noise: the same bits on every device, in every batch, in any order.

    words = Philox4x32-10(key = seed, counter = (element // 4, step, draw, image id))
    n = 2 (w >> 9) + 1,    u = n 2⁻²⁴                    (odd n: u is exact in float32, never 0 or 1)
    z_4m, z_4m+1 = sqrt(−2 ln u_0) (cos, sin)(2π u_1);   z_4m+2, z_4m+3 likewise from words 2 and 3

Salmon et al. 2011 (Philox), Box & Muller 1958. `seed` is 64 bits, low word first; `element` counts (channel, row, column).

The libraries' log, cos and sin differ in their last bits from device to device, and on one device between vectorised
and scalar code. So they are written out here in additions, multiplications and one square root, each rounded once as
IEEE 754 has it, in a fixed order, with no contraction to fused multiply-adds: every implementation that keeps this order
gives equal bits, not merely close ones. The argument of cos and sin is reduced in integers, hence exactly.
"""

from __future__ import annotations

import math

import torch

PHILOX_ROUND_A, PHILOX_ROUND_B = 0xD2511F53, 0xCD9E8D57
PHILOX_KEY_A, PHILOX_KEY_B = 0x9E3779B9, 0xBB67AE85
MASK32 = 0xFFFFFFFF

FORWARD_NOISING_STEP = 2**32 - 1  # the step index of DiffPure's forward noising
SECOND_NOISE_STEP = 2**31  # step k's second noise has this step index + k, for k < 2³¹ − 1

# ln(1 + f) = f − f²/2 + f³ P(f) on [sqrt ½ − 1, sqrt 2 − 1], relative error 0.1 × 2⁻²⁴; lowest order first.
LOG_COEFFICIENTS = (
    0.3333333134651184,
    -0.250008225440979,
    0.20001226663589478,
    -0.16623356938362122,
    0.14201761782169342,
    -0.131601944565773,
    0.12761549651622772,
    -0.07634429633617401,
)
LN2 = 0.6931471824645996  # ln 2, rounded to float32
# sin(π/4 y) = y S(y²) and cos(π/4 y) = 1 + y² C(y²) on [−1, 1], errors 0.04 and 0.001 × 2⁻²⁴.
SIN_COEFFICIENTS = (0.7853981852531433, -0.08074543625116348, 0.002490007085725665, -3.595450834836811e-05)
COS_COEFFICIENTS = (-0.3084251284599304, 0.015854327008128166, -0.00032594200456514955, 3.5313344142196e-06)
SQRT_HALF_BITS = 0x3F3504F3  # float32 bits of sqrt ½

ELEMENTS_AT_ONCE = 2**16


def philox_4x32_10_ref(
    counter: tuple[torch.Tensor | int, ...], key: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The definition of Philox 4×32-10.

    Args:
        counter: Four 32-bit words, int64 tensors that broadcast against each other (or ints), values in [0, 2³²).
        key: Two 32-bit words, low word of the seed first.

    Returns:
        Four words, int64 tensors of the broadcast shape with values in [0, 2³²).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(c, dtype=torch.int64) for c in counter))
    k0, k1 = key
    for _ in range(10):
        high_a, low_a = _multiply_32(c0, PHILOX_ROUND_A)
        high_b, low_b = _multiply_32(c2, PHILOX_ROUND_B)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + PHILOX_KEY_A) & MASK32, (k1 + PHILOX_KEY_B) & MASK32
    return c0, c1, c2, c3


def _multiply_32(x: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of a 32 × 32 bit product; in halves, since int64 has no room for its 64th bit."""
    low, high = (x & 0xFFFF) * factor, (x >> 16) * factor
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def box_muller_ref(w0: torch.Tensor, w1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of the two normals of a pair of 32-bit words (int64 tensors); float32, equal bits everywhere."""
    radius_squared = -2.0 * _log_of_odd(2 * (w0 >> 9) + 1)
    # Not every library rounds its float32 square root (MKL's is an ulp off in one argument of six). Rounded from float64
    # it is right even where that one is off: a root of a 24-bit number is never within 2⁻⁵⁰ of a midpoint of two floats.
    radius = torch.sqrt(radius_squared.double()).float()
    cosine, sine = _cos_sin_of_odd(2 * (w1 >> 9) + 1)
    return radius * cosine, radius * sine


def _log_of_odd(n: torch.Tensor) -> torch.Tensor:
    """ln(n 2⁻²⁴) for odd n in [1, 2²⁴), float32."""
    shifted = n.to(torch.float32).view(torch.int32) - SQRT_HALF_BITS
    exponent = (shifted >> 23).to(torch.float32) - 24.0
    mantissa = ((shifted & 0x7FFFFF) + SQRT_HALF_BITS).view(torch.float32)  # in [sqrt ½, sqrt 2)
    f = mantissa - 1.0
    p = torch.full_like(f, LOG_COEFFICIENTS[-1])
    for coefficient in reversed(LOG_COEFFICIENTS[:-1]):
        p = p * f
        p = p + coefficient
    f2 = f * f
    tail = (f2 * f) * p - 0.5 * f2
    return exponent * LN2 + (f + tail)


def _cos_sin_of_odd(n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of 2π n 2⁻²⁴ for odd n in [1, 2²⁴), float32."""
    quadrant = (n + 0x200000) >> 22  # 0 … 4, 4 being 0 again
    y = (n - (quadrant << 22)).to(torch.float32) * 2.0**-21  # exact, in (−1, 1): eighths of a turn
    y2 = y * y
    s = torch.full_like(y, SIN_COEFFICIENTS[-1])
    for coefficient in reversed(SIN_COEFFICIENTS[:-1]):
        s = s * y2
        s = s + coefficient
    s = s * y
    c = torch.full_like(y, COS_COEFFICIENTS[-1])
    for coefficient in reversed(COS_COEFFICIENTS[:-1]):
        c = c * y2
        c = c + coefficient
    c = c * y2 + 1.0
    swap = (quadrant & 1) == 1
    cosine, sine = torch.where(swap, s, c), torch.where(swap, c, s)
    cosine = torch.where(((quadrant + 1) & 2) == 2, -cosine, cosine)
    sine = torch.where((quadrant & 2) == 2, -sine, sine)
    return cosine, sine


def standard_normal_ref(
    shape: tuple[int, ...],
    *,
    seed: int,
    ids: torch.Tensor,
    draw: torch.Tensor | int,
    step: torch.Tensor | int,
) -> torch.Tensor:
    """The definition of the noise: float32 of `shape`, a function of (seed, image id, draw, step, element) alone.

    Args:
        shape: (batch, channels, height, width), or any shape whose first axis is the batch.
        seed: In [0, 2⁶⁴).
        ids: Image ids in [0, 2³²), int64, shape (batch,), on the device that the noise is wanted on.
        draw: Draw index in [0, 2³²): an int, or int64 of shape (batch,).
        step: Step index in [0, 2³²): an int, or int64 of shape (steps,), which puts a first axis `steps` in the result.

    Returns:
        Standard normal noise on the device of `ids`, of `shape` or (steps, *shape).
    """
    elements = math.prod(shape[1:])
    if isinstance(draw, torch.Tensor):
        draw = draw.to(ids.device)
    images = max(1, ELEMENTS_AT_ONCE // max(elements, 1))
    if shape[0] > images:  # some hundred passes over the data: keep it in cache
        pieces = [slice(start, start + images) for start in range(0, shape[0], images)]
        return torch.cat(
            [
                standard_normal_ref(
                    (len(ids[piece]), *shape[1:]),
                    seed=seed,
                    ids=ids[piece],
                    draw=draw[piece] if isinstance(draw, torch.Tensor) else draw,
                    step=step,
                )
                for piece in pieces
            ],
            dim=1 if isinstance(step, torch.Tensor) else 0,
        )
    blocks = torch.arange((elements + 3) // 4, dtype=torch.int64, device=ids.device)  # [blocks]
    if isinstance(draw, torch.Tensor):
        draw = draw[:, None]  # [batch, 1]
    leading: tuple[int, ...] = ()
    if isinstance(step, torch.Tensor):
        leading, step = tuple(step.shape), step.to(ids.device)[:, None, None]  # [steps, 1, 1]
    key = (seed & MASK32, seed >> 32)
    w0, w1, w2, w3 = philox_4x32_10_ref((blocks, step, draw, ids[:, None]), key)
    z0, z1 = box_muller_ref(w0, w1)
    z2, z3 = box_muller_ref(w2, w3)
    z = torch.stack([z0, z1, z2, z3], dim=-1).flatten(-2)[..., :elements]
    return z.reshape(leading + tuple(shape))
