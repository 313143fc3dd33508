"""What Triton and ptxas make of the kernels, found without a GPU: python bench/kernel_report.py [--markdown]

Compiles every kernel for sm_80, sm_90 and sm_100 exactly as its launcher would launch it, reads the machine code with the tools
that come with Triton, and prints a table. Registers, spills and instructions are facts of compilation; speed is not among them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import tables
import torch
import triton
import triton.backends.nvidia
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from coupfast_kernels.convolution import gpu as conv3x3
from coupfast_kernels.convolution.gpu_tuning import CONFIGS, PRECISIONS, Config
from coupfast_kernels.group_norm import gpu as group_norm
from coupfast_kernels.guided_step import gpu as guided_step
from coupfast_kernels.noise import gpu as noise

TARGETS = (80, 90, 100)  # A100; H100, H200; B200
TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"

#: Registers of one SM, and the threads it can hold: the same on all three (compute capabilities 8.0, 9.0, 10.0).
REGISTERS, THREADS = 65536, 2048
#: Shared memory of one SM in bytes, by compute capability, and what it keeps of it for each program.
SHARED, SHARED_KEPT = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}, 1 << 10


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch: a kernel, its arguments by name (tensors, numbers, None) and its options."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One launch compiled for one architecture.

    Attributes:
        registers: Per thread.
        spill_bytes: Stack and local memory per thread.
        shared_bytes: Per program.
        threads_per_sm: How many threads the registers let one SM hold.
        programs_per_sm: How many programs registers and shared memory let one SM hold.
        wide_loads, wide_stores: 128-bit accesses to global memory in the machine code; `loads`, `stores` are all of them.
        wide_copies, copies: The same of asynchronous copies from global to shared memory.
        tensor_core: Machine instructions that multiply matrices.
        instructions: Machine instructions.
        contracted: Machine instructions FFMA, FFMA2 and the like.
        square_roots: `sqrt.rn.f32` in the PTX, which ptxas expands with FFMA.
        arithmetic: All PTX instructions on f32 or f64 that compute.
        ptx: The PTX.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    threads_per_sm: int
    programs_per_sm: int
    wide_loads: int
    loads: int
    wide_stores: int
    stores: int
    wide_copies: int
    copies: int
    tensor_core: int
    instructions: int
    contracted: int
    square_roots: int
    arithmetic: frozenset[str]
    ptx: str


#: What rows of eight columns add: fields of `guided_step`.
TWO_STEP = ("x_before", "eps_before")
ALL_COLUMNS = ("x_in", "second_noise", *TWO_STEP)


def guided_step_launch(
    shape: tuple[int, ...],
    *,
    layout: torch.memory_format = torch.contiguous_format,
    predicted: bool = True,
    guided: bool = True,
    noisy: bool = True,
    more: tuple[str, ...] = (),
) -> Launch:
    """The launch of `guided_step` for states of a shape; `more` are of `ALL_COLUMNS`."""
    x = torch.empty(shape, memory_format=layout)
    words = torch.zeros(shape[0], dtype=torch.int64)
    scalar = torch.zeros((), dtype=torch.int64)
    return _record(
        guided_step,
        "_guided_step_kernel",
        (
            x,
            x,
            x if predicted else None,
            x if guided else None,
            torch.empty(100, 8 if more else 4),
            scalar,
            *((scalar, words, words) if noisy else (None, None, None)),
            x if "x_in" in more else None,
            "second_noise" in more,
            *(x if name in more else None for name in TWO_STEP),
        ),
    )


def standard_normal_launch(shape: tuple[int, ...]) -> Launch:
    """The launch of `standard_normal` for a shape."""
    words, scalar = torch.zeros(shape[0], dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    return _record(noise, "_standard_normal_kernel", (list(shape), scalar, words, words, scalar))


def conv3x3_launch(
    shape: tuple[int, ...], out_channels: int, precision: str, config: Config, *, fused: bool = True
) -> Launch:
    """The launch of `conv3x3` for images of a shape; `fused`: with everything that can be added, as DDPM++'s second ones."""
    batch, in_channels, height, width = shape
    x = torch.empty(shape, memory_format=torch.channels_last)
    y = torch.empty((batch, out_channels, height, width), memory_format=torch.channels_last)
    added = (torch.empty(out_channels), torch.empty(batch, out_channels), y) if fused else (None, None, None)
    packed = torch.empty(9 * in_channels, out_channels)
    return _record(conv3x3, "_conv3x3_kernel", (y, x, packed, *added, 0.5, precision, config))


def conv3x3_cases() -> dict[str, Launch]:
    """Every config and precision. Of its shape a launch's machine code knows which channels are multiples of 16: all but 3."""
    configs = {
        f"{precision} {config.block_m} × {config.block_n} × {config.block_k}": (precision, config)
        for precision in PRECISIONS
        for config in CONFIGS[precision]
    }
    found = {name: conv3x3_launch((8, 128, 32, 32), 128, *how) for name, how in configs.items()}
    for precision in PRECISIONS:
        large, narrow = CONFIGS[precision][0], CONFIGS[precision][-3]
        found[f"{precision}, 3 channels in"] = conv3x3_launch((8, 3, 32, 32), 128, precision, large)
        found[f"{precision}, 3 channels out"] = conv3x3_launch((8, 128, 32, 32), 3, precision, narrow)
    return found


def cases() -> dict[str, Launch]:
    """Every shape class that the engines use, the ragged ones too."""
    cifar, last = (256, 3, 32, 32), torch.channels_last
    return {
        "forward": guided_step_launch(cifar),
        "forward, unguided": guided_step_launch(cifar, guided=False),
        "adjoint": guided_step_launch(cifar, noisy=False),
        "adjoint, no hvp": guided_step_launch(cifar, noisy=False, guided=False),
        "noise alone": standard_normal_launch(cifar),
        "channels-last: forward": guided_step_launch(cifar, layout=last),
        "channels-last: adjoint": guided_step_launch(cifar, layout=last, noisy=False),
        "channels-last, 4 channels: forward": guided_step_launch((64, 4, 64, 64), layout=last),
        "ragged: forward": guided_step_launch((5, 3, 17, 19)),
        "ragged channels-last: forward": guided_step_launch((5, 3, 17, 19), layout=last),
        "x_in: forward": guided_step_launch(cifar, more=("x_in",)),
        "two noises: forward": guided_step_launch(cifar, more=("second_noise",)),
        "two steps: forward, unguided": guided_step_launch(cifar, guided=False, noisy=False, more=TWO_STEP),
        "no network: forward": guided_step_launch(cifar, predicted=False, guided=False),
        "eight columns: forward": guided_step_launch(cifar, more=ALL_COLUMNS),
        "channels-last, eight columns: forward": guided_step_launch(cifar, layout=last, more=ALL_COLUMNS),
        "channels-last, 4 channels, eight columns: forward": guided_step_launch(
            (64, 4, 64, 64), layout=last, more=ALL_COLUMNS
        ),
        "ragged, eight columns: forward": guided_step_launch((5, 3, 17, 19), more=ALL_COLUMNS),
    }


#: (channels, height = width, groups) of every GroupNorm in DDPM++ deep; 256 images each.
GROUP_NORMS = (
    (128, 32, 32),
    (256, 32, 32),
    (384, 32, 32),
    (128, 16, 32),
    (256, 16, 32),
    (384, 16, 32),
    (512, 16, 32),
    (256, 8, 32),
    (512, 8, 32),
    (256, 4, 32),
    (512, 4, 32),
)


def group_norm_launch(
    channels: int,
    size: int,
    groups: int,
    *,
    batch: int = 256,
    image_bias: bool = False,
    residual: bool = False,
    silu: bool = True,
    layout: torch.memory_format = torch.channels_last,
) -> Launch:
    """The launch of `group_norm_silu` for square maps; 1/√2 behind a residual."""
    x = torch.empty((batch, channels, size, size), memory_format=layout)
    word, per_image = torch.empty(channels), torch.empty(batch, channels)
    kernel = "_group_norm_loop_kernel" if group_norm.loops(channels, size * size, groups) else "_group_norm_kernel"
    added = (per_image if image_bias else None, x if residual else None)
    return _record(group_norm, kernel, (x, word, word, *added, groups, 1e-6, 2**-0.5 if residual else 1.0, silu))


def group_norm_vjp_launch(
    channels: int,
    size: int,
    groups: int,
    *,
    batch: int = 256,
    gh: bool = False,
    silu: bool = True,
    layout: torch.memory_format = torch.channels_last,
) -> Launch:
    """The launch of its transpose."""
    h = torch.empty((batch, channels, size, size), memory_format=layout)
    word = torch.empty(channels)
    kernel = "_group_norm_vjp_loop_kernel" if group_norm.loops(channels, size * size, groups) else "_group_norm_vjp_kernel"
    arguments = (h, h, h if gh else None, word, word, groups, 1e-6, 2**-0.5 if gh else 1.0, silu)
    return _record(group_norm, kernel, arguments, "_launch_vjp")


def group_norm_cases() -> dict[str, Launch]:
    """What stands between the convolutions of DDPM++ deep, and the attention's norms; groups beyond the registers; NCHW."""
    found = {}
    for shape in GROUP_NORMS:
        name = f"{shape[0]} at {shape[1]}²"
        found |= {
            f"group norm {name}": group_norm_launch(*shape),
            f"group norm {name}, time": group_norm_launch(*shape, image_bias=True),
            f"group norm {name}, residual": group_norm_launch(*shape, residual=True),
            f"group norm {name}: transpose": group_norm_vjp_launch(*shape),
            f"group norm {name}, residual: transpose": group_norm_vjp_launch(*shape, gh=True),
        }
    return found | {
        "group norm 256 at 16², no silu": group_norm_launch(256, 16, 32, silu=False),
        "group norm 256 at 16², no silu: transpose": group_norm_vjp_launch(256, 16, 32, silu=False),
        "group norm 128 at 32², NCHW, residual": group_norm_launch(128, 32, 32, residual=True, layout=torch.contiguous_format),
        "group norm 128 at 32², NCHW: transpose": group_norm_vjp_launch(128, 32, 32, gh=True, layout=torch.contiguous_format),
        "group norm 256 at 64², loop, residual": group_norm_launch(256, 64, 32, residual=True),
        "group norm 256 at 64², loop, residual: transpose": group_norm_vjp_launch(256, 64, 32, gh=True),
    }


def compile_offline(launch: Launch, capability: int) -> Compiled:
    """Compiles a launch as Triton's JIT would on a device of this compute capability (80: 8.0)."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        parameter = launch.kernel.params[index]
        if isinstance(value, float):
            signature[name] = "fp32"
            continue
        if parameter.is_constexpr or value is None or (_is_specialized(parameter, value) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if _is_tensor(value):
            signature[name] = {torch.float32: "*fp32", torch.int64: "*i64"}[value.dtype]
            divisible = True  # the allocator's tensors start at multiples of 512 bytes
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            divisible = _is_specialized(parameter, value) and value % 16 == 0
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)

    ptx, machine_code = built.asm["ptx"], _tool("nvdisasm", built.asm["cubin"], "--print-code")
    usage = _tool("cuobjdump", built.asm["cubin"], "--dump-resource-usage")
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    operations = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", machine_code)
    names = Counter(operation.split(".")[0] for operation in operations)

    def wide(instruction: str) -> int:
        return sum(name.split(".")[0] == instruction and ".128" in name for name in operations)

    threads = 32 * launch.options["num_warps"]
    granted = -(-used["REG"] // 8) * 8 * threads  # registers are granted to warps in units of 256
    return Compiled(
        registers=used["REG"],
        spill_bytes=used["STACK"] + used["LOCAL"],
        shared_bytes=built.metadata.shared,
        threads_per_sm=min(THREADS, REGISTERS // granted * threads),
        programs_per_sm=min(
            THREADS // threads, REGISTERS // granted, SHARED[capability] // (built.metadata.shared + SHARED_KEPT)
        ),
        wide_loads=wide("LDG"),
        loads=names["LDG"],
        wide_stores=wide("STG"),
        stores=names["STG"],
        wide_copies=wide("LDGSTS"),
        copies=names["LDGSTS"],
        tensor_core=sum(count for name, count in names.items() if re.fullmatch(r"\w*MMA", name)),
        instructions=sum(count for name, count in names.items() if name != "NOP"),
        contracted=sum(count for name, count in names.items() if re.fullmatch(r"[FD]FMA\w*", name)),
        square_roots=len(re.findall(r"\bsqrt\.", ptx)),
        arithmetic=frozenset(
            operation
            for operation in re.findall(r"^\s*(?:@%\w+ )?([a-z][a-z0-9_.]*\.f(?:32|64)\w*(?:\.\w+)*)\s", ptx, re.MULTILINE)
            if not operation.startswith(("ld.", "st.", "mov."))
        ),
        ptx=ptx,
    )


@triton.jit
def _square_roots_kernel(y_ptr, x_ptr, COUNT: tl.constexpr):
    for i in tl.static_range(COUNT):
        offsets = i * 128 + tl.arange(0, 128)
        tl.store(y_ptr + offsets, tl.sqrt_rn(tl.load(x_ptr + offsets)))


@functools.cache
def contracted_in_square_roots(count: int, capability: int) -> int:
    """How many FFMA ptxas needs for that many correctly rounded square roots (and a subroutine that they share)."""
    x = torch.empty(128 * count)
    launch = Launch(_square_roots_kernel, dict(y_ptr=x, x_ptr=x, COUNT=count), dict(num_warps=4, enable_fp_fusion=False))
    return compile_offline(launch, capability).contracted


def _record(module: Any, kernel_name: str, arguments: tuple[Any, ...], launcher: str = "_launch") -> Launch:
    """What a module's launcher hands to its kernel."""
    kernel = getattr(module, kernel_name)
    with mock.patch.object(module, kernel_name, mock.MagicMock()) as stand_in:
        getattr(module, launcher)(*arguments)
    call = stand_in.__getitem__.return_value.call_args
    named = dict(zip(kernel.arg_names, call.args, strict=False)) | call.kwargs
    options = {name: value for name, value in named.items() if name not in kernel.arg_names}
    return Launch(kernel, {name: named[name] for name in kernel.arg_names}, options)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _is_specialized(parameter: Any, value: Any) -> bool:
    """Whether Triton compiles anew for another such value, as it does for an integer that is 1 or a multiple of 16."""
    return isinstance(value, int) and not parameter.do_not_specialize


def _tool(name: str, cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([os.fspath(TOOLS / name), *options, file.name], check=True, capture_output=True, text=True).stdout


def rows() -> list[tuple[str, ...]]:
    """One row a kernel and architecture, the header first."""
    columns = "kernel, sm, registers, threads/SM, spilled, shared, 128-bit loads, 128-bit stores, FFMA (in sqrt), instructions"
    table = [tuple(columns.split(", "))]
    for name, launch in (cases() | group_norm_cases()).items():
        for capability in TARGETS:
            built = compile_offline(launch, capability)
            roots = contracted_in_square_roots(built.square_roots, capability) if built.square_roots else 0
            table.append(
                (
                    name,
                    str(capability),
                    str(built.registers),
                    str(built.threads_per_sm),
                    f"{built.spill_bytes} B",
                    f"{built.shared_bytes} B",
                    f"{built.wide_loads} of {built.loads}",
                    f"{built.wide_stores} of {built.stores}",
                    f"{built.contracted} ({roots})",
                    str(built.instructions),
                )
            )
    return table


def conv3x3_rows() -> list[tuple[str, ...]]:
    """One row a convolution, the header first: what depends on the architecture thrice, for each of `TARGETS`."""
    columns = ["conv3x3", "threads", "registers", "programs/SM", "spilled", "shared KiB", "128-bit copies, loads", "stores"]
    table = [(*columns, "FFMA", "tensor-core", "instructions")]
    for name, launch in conv3x3_cases().items():
        builds = [compile_offline(launch, capability) for capability in TARGETS]

        def each(text: Callable[[Compiled], str], builds: list[Compiled] = builds) -> str:
            return " / ".join(text(built) for built in builds)

        table.append(
            (
                name,
                str(32 * launch.options["num_warps"]),
                each(lambda built: str(built.registers)),
                each(lambda built: str(built.programs_per_sm)),
                each(lambda built: f"{built.spill_bytes} B"),
                each(lambda built: f"{built.shared_bytes / 1024:.0f}"),
                each(lambda built: f"{built.wide_copies} of {built.copies}, {built.wide_loads} of {built.loads}"),
                each(lambda built: f"{built.wide_stores} of {built.stores}"),
                each(lambda built: str(built.contracted)),
                each(lambda built: str(built.tensor_core)),
                each(lambda built: str(built.instructions)),
            )
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    markdown = parser.parse_args().markdown
    print(f"Compiled offline by Triton {triton.__version__}; no kernel has run.")
    for table in (rows(), conv3x3_rows()):
        print()
        print(*tables.lines(table, markdown=markdown), sep="\n")


if __name__ == "__main__":
    main()
