"""What Triton and ptxas make of the kernels, found without a GPU: python bench/kernel_report.py [--markdown]

Compiles what every registered kernel says becomes machine code of its own, for sm_80, sm_90 and sm_100, exactly as its launcher
would launch it, reads the machine code with the tools that come with Triton, and prints tables. Registers, spills and
instructions are facts of compilation; speed is not among them.
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

from coupfast_kernels import registry

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
        threads: Of a program.
        registers: Per thread.
        spill_bytes: Stack and local memory per thread.
        shared_bytes: Per program.
        threads_per_sm: How many threads the registers let one SM hold.
        programs_per_sm: How many programs registers and shared memory let one SM hold.
        wide_loads, wide_stores: 128-bit accesses to global memory in the machine code; `loads`, `stores` are all of them.
        wide_copies, copies: The same of asynchronous copies from global to shared memory.
        tensor_core: Machine instructions that multiply matrices.
        instructions: Machine instructions.
        loop_instructions: Of them those of the longest loop's body; 0 without loops.
        contracted: Machine instructions FFMA, FFMA2 and the like.
        square_roots: `sqrt.rn.f32` in the PTX, which ptxas expands with FFMA.
        arithmetic: All PTX instructions on f32 or f64 that compute.
        ptx: The PTX.
    """

    threads: int
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
    loop_instructions: int
    contracted: int
    square_roots: int
    arithmetic: frozenset[str]
    ptx: str


def cases() -> dict[str, Launch]:
    """Every launch that a registered kernel says becomes machine code of its own, recorded."""
    found = [(name, call) for kernel in registry.kernels() for name, call in kernel.launches().items()]
    return {name: record(call) for name, call in found}


def record(call: Callable[[], object]) -> Launch:
    """What a call hands to the one Triton kernel that it launches, which does not run."""
    launched: list[Launch] = []

    def run(kernel: Any, *positional: Any, grid: Any, warmup: bool, **named: Any) -> None:
        given = dict(zip(kernel.arg_names, positional, strict=False)) | named
        options = {name: value for name, value in given.items() if name not in kernel.arg_names}
        launched.append(Launch(kernel, {name: given[name] for name in kernel.arg_names}, options))

    with mock.patch.object(triton.JITFunction, "run", run):
        call()
    (launch,) = launched
    return launch


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
        threads=threads,
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
        loop_instructions=_longest_loop(machine_code),
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


def _longest_loop(machine_code: str) -> int:
    """Instructions from where the longest branch backwards goes, up to it."""
    labels: dict[str, int] = {}
    longest = count = 0
    for line in machine_code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)", line):
            if instruction[1] == "NOP":
                continue
            count += 1
            target = re.search(r"\.L_x_\d+", instruction[2])
            # A branch to itself is how the code ends.
            if instruction[1].startswith("BRA") and target is not None and target[0] in labels:
                longest = max(longest, count - labels[target[0]])
    return longest if longest > 1 else 0


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


Builds = dict[str, list[Compiled]]  # by name, for each of `TARGETS`


def rows(built: Builds) -> list[tuple[str, ...]]:
    """One row a launch and architecture, the header first."""
    columns = "kernel, sm, registers, threads/SM, spilled, shared, 128-bit loads, 128-bit stores, FFMA (in sqrt), instructions"
    table = [tuple(columns.split(", "))]
    for name, builds in built.items():
        for capability, build in zip(TARGETS, builds, strict=True):
            roots = contracted_in_square_roots(build.square_roots, capability) if build.square_roots else 0
            table.append(
                (
                    name,
                    str(capability),
                    str(build.registers),
                    str(build.threads_per_sm),
                    f"{build.spill_bytes} B",
                    f"{build.shared_bytes} B",
                    f"{build.wide_loads} of {build.loads}",
                    f"{build.wide_stores} of {build.stores}",
                    f"{build.contracted} ({roots})",
                    str(build.instructions),
                )
            )
    return table


def rows_through_shared_memory(built: Builds) -> list[tuple[str, ...]]:
    """One row a launch, the header first: what depends on the architecture thrice, for each of `TARGETS`."""
    columns = ["kernel", "threads", "registers", "programs/SM", "spilled", "shared KiB", "128-bit copies, loads", "stores"]
    table = [(*columns, "FFMA", "tensor-core", "instructions")]
    for name, builds in built.items():

        def each(text: Callable[[Compiled], str], builds: list[Compiled] = builds) -> str:
            return " / ".join(text(build) for build in builds)

        table.append(
            (
                name,
                str(builds[0].threads),
                each(lambda build: str(build.registers)),
                each(lambda build: str(build.programs_per_sm)),
                each(lambda build: f"{build.spill_bytes} B"),
                each(lambda build: f"{build.shared_bytes / 1024:.0f}"),
                each(lambda build: f"{build.wide_copies} of {build.copies}, {build.wide_loads} of {build.loads}"),
                each(lambda build: f"{build.wide_stores} of {build.stores}"),
                each(lambda build: str(build.contracted)),
                each(lambda build: str(build.tensor_core)),
                each(lambda build: str(build.instructions)),
            )
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--only", default="", metavar="TEXT", help="launches whose names begin so")
    options = parser.parse_args()
    chosen = {name: launch for name, launch in cases().items() if name.startswith(options.only)}
    built = {name: [compile_offline(launch, target) for target in TARGETS] for name, launch in chosen.items()}
    # What multiplies tiles brings them to shared memory, and is judged by other figures.
    shared = {name: builds for name, builds in built.items() if any(build.copies for build in builds)}
    print(f"Compiled offline by Triton {triton.__version__}; no kernel has run.")
    for table in (rows({name: built[name] for name in built if name not in shared}), rows_through_shared_memory(shared)):
        if len(table) > 1:
            print()
            print(*tables.lines(table, markdown=options.markdown), sep="\n")


if __name__ == "__main__":
    main()
