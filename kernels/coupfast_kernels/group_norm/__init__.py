"""GroupNorm with SiLU behind it and a sum in front of it: `definition`, and one kernel a pass in `gpu`."""

from coupfast_kernels.group_norm.definition import group_norm_silu_ref, group_norm_silu_vjp_ref
from coupfast_kernels.group_norm.gpu import group_norm_silu

__all__ = ["group_norm_silu", "group_norm_silu_ref", "group_norm_silu_vjp_ref"]
