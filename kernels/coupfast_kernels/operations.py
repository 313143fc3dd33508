"""What the C++ kernels take: structures of pointers, lists of them as one call, and the library that runs them.

The structures are those of `csrc/`, field by field. Whoever fills one keeps the memory behind it alive.
"""

from __future__ import annotations

import ctypes
import functools
import logging

from coupfast_kernels import native

logger = logging.getLogger(__name__)

IDENTITY, RELU, SILU = 0, 1, 2


def structure(name: str, **groups: str) -> type[ctypes.Structure]:
    """A structure whose fields are given type by type, in C's order."""
    types = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "f32": ctypes.c_float, "f64": ctypes.c_double, "p": ctypes.c_void_p}
    fields = [(field, types[kind.split("_")[0]]) for kind, names in groups.items() for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


Conv = structure(
    "Conv",
    i32="tile batch height width channels out_height out_width out_channels kernel_height kernel_width stride pad_top pad_left "
    "block_rows activation z_activation spread alone",
    i64="x_pixel y_pixel z_pixel residual_pixel affine_image image_bias_image",
    f32="scale residual_factor",
    p="x weights y z subtract multiply add bias image_bias mask mask_factor residual z_multiply z_add z_mask z_slopes scratch",
)
GroupNormAffine = structure(
    "GroupNormAffine",
    i32="batch channels groups pad",
    i64="pixels x_pixel",
    f64="eps",
    p="x gamma beta subtract multiply add inverse",
)
GroupNormVjp = structure(
    "GroupNormVjp",
    i32="batch channels groups activation",
    i64="pixels x_pixel dh_pixel dx_pixel residual_pixel",
    f32="residual_factor pad",
    p="x gamma subtract multiply add inverse dh residual dx",
)
Sum = structure("Sum", i64="pixels channels a_pixel b_pixel y_pixel", f32="factor_a factor_b", p="a b y")
Masked = structure(
    "Masked",
    i64="pixels channels d_pixel y_pixel residual_pixel",
    f32="residual_factor pad",
    p="d mask multiply residual y",
)
GuidedStep = structure(
    "GuidedStep",
    i64="batch channels pixels x_pixel eps_pixel guidance_pixel x_in_pixel x_before_pixel eps_before_pixel y_pixel seed step "
    "second_noise",
    f32="a b c d e f p q",
    p="x eps_hat guidance x_in x_before eps_before ids draw y",
)
Attention = structure(
    "Attention",
    i32="batch heads size pixels block",
    f32="scale",
    i64="q_pixel k_pixel v_pixel y_pixel q_head k_head v_head y_head",
    p="q k v y largest inverse scratch",
)
AttentionVjp = structure(
    "AttentionVjp",
    i32="batch heads size pixels block",
    f32="scale dy_factor pad",
    i64="q_pixel k_pixel v_pixel dy_pixel dq_pixel dk_pixel dv_pixel q_head k_head v_head dy_head dq_head dk_head dv_head",
    p="q k v dy largest inverse dq dk dv scratch",
)
# In the order of `Kind` in kernels.cpp.
_KINDS = (Conv, GroupNormAffine, GroupNormVjp, Sum, Masked, GuidedStep, Attention, AttentionVjp)

_Operation = structure("Operation", i64="kind", p="parameters")


@functools.cache
def compiled() -> ctypes.CDLL:
    """The compiled kernels, sharing PyTorch's threads.

    Raises:
        native.NativeUnavailable: if they cannot be built here.
    """
    kernels = native.load()
    kernels.coupfast_conv_scratch.restype = ctypes.c_int64
    kernels.coupfast_packed_floats.restype = ctypes.c_int64
    kernels.coupfast_attention_scratch.restype = ctypes.c_int64
    kernels.coupfast_attention_vjp_scratch.restype = ctypes.c_int64
    process = ctypes.CDLL(None)
    try:
        team = [process.GOMP_parallel, process.omp_get_thread_num, process.omp_get_num_threads]
    except AttributeError:
        logger.warning("PyTorch's OpenMP runtime does not show GOMP_parallel: the C++ kernels run on one thread")
    else:
        kernels.coupfast_threads(*(ctypes.cast(function, ctypes.c_void_p) for function in team))
    return kernels


class Operations:
    """A list of structures as one call."""

    def __init__(self, structures: list[ctypes.Structure]) -> None:
        self.structures = structures
        self._array = (_Operation * max(1, len(structures)))()
        for operation, structure in zip(self._array, structures, strict=False):
            operation.kind, operation.parameters = _KINDS.index(type(structure)), ctypes.addressof(structure)
        self._library = compiled()

    def run(self, threads: int) -> None:
        """All of them, in order."""
        self._library.coupfast_run(self._array, ctypes.c_int64(len(self.structures)), threads)
