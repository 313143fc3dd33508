"""Counter-based standard normal noise: `definition`, and the same bits from one kernel in `gpu` and in `cpu`."""

from coupfast_kernels.noise.definition import (
    FORWARD_NOISING_STEP,
    SECOND_NOISE_STEP,
    box_muller_ref,
    philox_4x32_10_ref,
    standard_normal_ref,
)
from coupfast_kernels.noise.gpu import seed_tensor, standard_normal

__all__ = [
    "FORWARD_NOISING_STEP",
    "SECOND_NOISE_STEP",
    "box_muller_ref",
    "philox_4x32_10_ref",
    "seed_tensor",
    "standard_normal",
    "standard_normal_ref",
]
