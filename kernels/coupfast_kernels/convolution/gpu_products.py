"""What the kernels of convolutions have in common: a bias of each image, and products of float32 by three of TF32."""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton exists for Linux only; the definition and the CPU need none of it
    triton = None


def image_bias_stride(image_bias: torch.Tensor | None) -> int:
    """From one image's bias to the next: 0 where one row is that of all images."""
    return 0 if image_bias is None or len(image_bias) == 1 else image_bias.shape[1]


if triton is not None:

    @triton.jit
    def sum_of_halves_kernel(a, big, small):
        """a @ (big + small), without small · small; `big` and `small` are the `tf32_halves` of a weight.

        What the tensor cores read of the small half of `a`, unrounded, is off by 2⁻²² of `a` at most. Infinity becomes NaN.
        """
        # Half a unit of TF32's last place added, and cut off: rounded to nearest, in two instructions.
        a_big = ((a.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        part = tl.dot(a - a_big, big, tl.zeros((a.shape[0], big.shape[1]), dtype=tl.float32), input_precision="tf32")
        part = tl.dot(a_big, small, part, input_precision="tf32")
        return tl.dot(a_big, big, part, input_precision="tf32")
