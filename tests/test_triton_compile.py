"""The kernels compile without a GPU, for A100, H100/H200 and B200, into what their docstrings and docs/how/ say.

Every version of Triton is asked for what results stand on, and for no spills where memory is what bounds a kernel. Registers,
accesses and counts of instructions are the compiler's as much as ours: they are promised of the versions in `FIGURES_OF`.
"""

import functools
import os
import re
from collections import Counter

import numpy as np
import ptx
import pytest
import torch
from test_noise import assert_same_bits, random_words

from coupfast.models.ddpmpp import DDPMpp
from coupfast_kernels import registry
from coupfast_kernels.convolution import cases as convolution
from coupfast_kernels.convolution import gpu_split, gpu_winograd
from coupfast_kernels.convolution.gpu import ALGORITHMS, pack_halves
from coupfast_kernels.convolution.gpu_tuning import CONFIGS, candidates
from coupfast_kernels.group_norm import cases as group_norm
from coupfast_kernels.guided_step import cases as guided_step
from coupfast_kernels.guided_step import guided_step_ref
from coupfast_kernels.noise import SECOND_NOISE_STEP, seed_tensor, standard_normal_ref
from coupfast_kernels.noise import cases as noise

triton = pytest.importorskip("triton", reason="Triton is not installed: no kernel was compiled")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton.language as tl  # noqa: E402

from bench.kernel_report import (  # noqa: E402
    TARGETS,
    Compiled,
    cases,
    compile_offline,
    contracted_in_square_roots,
    record,
)

ALL_COLUMNS = guided_step.ALL_COLUMNS
CASES = cases()
# What the eight kinds of launches become elsewhere says little that these do not.
ON_ALL_TARGETS = [
    "forward",
    "adjoint",
    "noise alone",
    "channels-last: forward",
    "channels-last: adjoint",
    "ragged channels-last: forward",
    "eight columns: forward",
    "channels-last, eight columns: forward",
]

#: .ci/constraints.txt installs the first; bench/results/kernel-report-triton-3.9.md was made with the last.
FIGURES_OF = ("3.7.1", "3.9.0")
figures = pytest.mark.skipif(
    triton.__version__ not in FIGURES_OF,
    reason=f"registers, accesses and counts are promised of Triton {' and '.join(FIGURES_OF)}, this is {triton.__version__}",
)

# Correctly rounded and exact operations, one rounding each; no fma, no mad, no approximation, no f64. Nothing is flushed to
# zero, but in Triton 3.5's square root, which never sees a subnormal: −2 ln u is at least 2⁻²³.
IEEE = {
    "add.f32",
    "add.rn.f32",
    "add.rn.f32x2",
    "cvt.rn.f32.s32",
    "cvt.rn.f32.u32",
    "mul.f32",
    "mul.rn.f32",
    "mul.rn.f32x2",
    "neg.f32",
    "selp.f32",
    "sqrt.rn.f32",
    "sqrt.rn.ftz.f32",
    "sub.f32",
    "sub.rn.f32",
}


@pytest.fixture(scope="module", autouse=True)
def _fresh_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def launched(launch, *arguments, **options):
    return record(functools.partial(launch, *arguments, **options))


STEPS = [
    (name, target)
    for name in [*guided_step.launches(), "noise alone"]
    for target in TARGETS
    if target == 90 or name in ON_ALL_TARGETS
]


@functools.cache
def built_step(name: str, capability: int) -> Compiled:
    return compile_offline(CASES[name], capability)


@pytest.mark.parametrize(("name", "capability"), STEPS)
def test_compiles_to_what_is_promised(name, capability):
    built = built_step(name, capability)
    assert built.spill_bytes == 0
    assert_no_contraction(built, capability)


@figures
@pytest.mark.parametrize(("name", "capability"), STEPS)
def test_figures_of_the_step(name, capability):
    launch, built = CASES[name], built_step(name, capability)
    read = ("x", "eps_hat", "guidance", "x_in", "x_before", "eps_before")
    tensors = sum(launch.arguments.get(f"{image}_ptr") is not None for image in read)
    pieces, columns = launch.arguments.get("INTERLEAVED", 1), launch.arguments.get("COLUMNS", 4)
    if name.startswith("ragged"):
        assert (built.wide_loads, built.wide_stores) == (0, 0)  # images that do not start at multiples of 16 bytes
    else:
        # Every image in 128-bit accesses, each read and written once, and nothing moved between threads.
        assert built.wide_loads == tensors * pieces
        assert built.wide_stores == built.stores == pieces
        assert built.loads - built.wide_loads <= columns + 4  # coefficients, step, seed, id, draw
        assert built.shared_bytes == 0
    floors = {1: 1280, 3: 896, 4: 640} if columns == 4 else {1: 1280, 3: 640, 4: 512}
    assert built.threads_per_sm >= (1024 if name.startswith("ragged, eight") else floors[pieces])
    assert built.arithmetic <= IEEE, f"unexpected arithmetic: {sorted(built.arithmetic - IEEE)}"
    # One logarithm's root for two normals; 4 normals a Philox block.
    noises = (launch.arguments.get("seed_ptr") is not None) + launch.arguments.get("ADD_SECOND_NOISE", False)
    assert built.square_roots == 2 * pieces * noises


def assert_no_contraction(built: Compiled, capability: int) -> None:
    """Each operation is rounded once, to nearest: no two in one, no approximation, nothing flushed, nothing widened."""
    unexpected = {name for name in built.arithmetic if re.match(r"fma|mad|div|rcp|rsqrt|ex2|lg2|sin|cos|tanh", name)}
    assert not unexpected, f"unexpected arithmetic: {sorted(unexpected)}"
    assert not re.search(r"\.f64|\.approx|\.full|\.r[zmp]\.f32", built.ptx)
    assert ".ftz" not in built.ptx.replace("sqrt.rn.ftz", "")
    # ptxas may contract what PTX leaves apart: the only FFMA are those of the square roots.
    allowed = contracted_in_square_roots(built.square_roots, capability) if built.square_roots else 0
    assert built.contracted == allowed


def test_would_notice_contraction():
    """The same launch with Triton's default options does contract."""
    launch = launched(guided_step.launch, (4, 3, 8, 8))
    launch.options["enable_fp_fusion"] = True
    built = compile_offline(launch, 90)
    with pytest.raises(AssertionError, match="unexpected arithmetic"):
        assert_no_contraction(built, 90)
    assert built.contracted > 20


def test_a_batch_does_not_compile_again():
    """Launches differ in what Triton specialises on, and a captured graph's neighbours should not."""
    two, many = (launched(guided_step.launch, (batch, 3, 32, 32)).arguments for batch in (2, 256))
    for name, value in two.items():
        if not isinstance(value, torch.Tensor):
            assert value == many[name], name


# Every config on every architecture, and what is ragged once.
CONVOLUTIONS = [
    # images, output channels, algorithm, which config, fused, architecture
    *(
        ((8, 128, 32, 32), 128, algorithm, number, True, capability)
        for algorithm, configs in CONFIGS.items()
        if ALGORITHMS[algorithm].way == "direct"
        for number in range(len(configs))
        for capability in TARGETS
    ),
    # The same kernel with the loop of one tap and nothing to add; first the largest tiles.
    *(
        ((1, 256, 8, 8), 256, algorithm, number, False, capability)
        for algorithm in ("ieee-split", "tf32x3-halves-split")
        for number in range(len(CONFIGS[algorithm]))
        for capability in (TARGETS if number in (0, 5) else (90,))
    ),
    ((8, 3, 32, 32), 128, "ieee", 0, False, 90),
    ((8, 128, 32, 32), 3, "ieee", 6, False, 90),
    ((8, 3, 32, 32), 128, "tf32x3-halves", 0, False, 90),
    ((8, 128, 32, 32), 3, "tf32x3-halves", 6, False, 90),
    ((8, 128, 32, 32), 128, "tf32x3", 4, False, 100),
    ((8, 128, 32, 32), 128, "tf32", 4, False, 90),
]
TENSOR_CORE = {80: "mma.sync.aligned.m16n8k8", 90: "wgmma.mma_async.sync.aligned.m64n", 100: "tcgen05.mma"}


#: Bytes a thread, by algorithm, config and architecture.
SPILLED = {("tf32x3-halves", 0, 80): 56, ("winograd-tf32x3-halves", 0, 80): 56}


every_convolution = pytest.mark.parametrize(
    ("shape", "out_channels", "algorithm", "number", "fused", "capability"), CONVOLUTIONS, ids=str
)


@functools.cache
def built_convolution(shape, out_channels, algorithm, number, fused, capability) -> Compiled:
    config = CONFIGS[algorithm][number]
    return compile_offline(launched(convolution.launch, shape, out_channels, algorithm, config, fused=fused), capability)


@every_convolution
def test_a_convolution_compiles_to_what_is_promised(shape, out_channels, algorithm, number, fused, capability):
    built = built_convolution(shape, out_channels, algorithm, number, fused, capability)
    # An SM can run it. How well is the tuner's to find, which times every config: some versions spill a few words of some.
    assert built.programs_per_sm >= 1
    assert ".f64" not in built.ptx
    if ALGORITHMS[algorithm].products == "ieee":
        # Float32 multiply-adds only, and no sum beside them but the epilogue's: chains.
        assert "tf32" not in built.ptx
        assert "mma" not in built.ptx
        assert built.tensor_core == 0
        assert re.search(r"\bfma\.rn\.f32", built.ptx)
        if not fused:
            assert not re.search(r"\b(add|sub)[.\w]*\.f32", built.ptx)
    else:
        assert "tf32" in built.ptx
        assert built.tensor_core > 0
    if algorithm == "tf32x3":
        assert re.search(r"cvt\.rna?\.tf32\.f32", built.ptx)  # split three ways with correct rounding


@figures
@every_convolution
def test_figures_of_a_convolution(shape, out_channels, algorithm, number, fused, capability):
    config = CONFIGS[algorithm][number]
    built = built_convolution(shape, out_channels, algorithm, number, fused, capability)
    assert built.spill_bytes <= SPILLED.get((algorithm, number, capability), 0)
    assert built.programs_per_sm * 32 * config.num_warps >= 256

    # 128 bits wherever channels are multiples of 16, each tensor once a program: 4 floats a thread and access. Copies for all
    # stages but one before the loop, and for one in it.
    threads = 32 * config.num_warps
    results = config.block_m * config.block_n // (4 * threads)
    halves = ALGORITHMS[algorithm].pack is pack_halves  # whose rows are of channels in, as those of pixels are
    weights = 2 if halves else 1  # for each of the terms
    copies = config.num_stages * (config.block_m + weights * config.block_n) * config.block_k // (4 * threads)
    if out_channels % 16 == 0:
        assert built.wide_stores == built.stores == results
    if shape[1] % 16 == 0 and (halves or out_channels % 16 == 0):
        assert built.copies == built.wide_copies == copies or algorithm == "tf32"
        # The residual, and a bias per image; the bias is one value a column.
        assert built.wide_loads >= (2 * results if fused else 0)
    elif shape[1] % 16 == 0:
        assert built.wide_copies == config.num_stages * config.block_m * config.block_k // (4 * threads)  # of pixels

    if ALGORITHMS[algorithm].products == "ieee":
        # As many multiply-adds as there are products.
        fused_multiply_adds = len(re.findall(r"\bfma\.rn\.f32\s", built.ptx)) + 2 * len(
            re.findall(r"\bfma\.rn\.f32x2\s", built.ptx)
        )
        assert fused_multiply_adds == config.block_m * config.block_n * config.block_k // threads
    else:
        # The later instructions multiply at least 64 rows, for four warps at once.
        alone = config.block_m < 64 or config.num_warps < 4
        assert TENSOR_CORE[80 if alone else capability] in built.ptx
        assert built.contracted == 0
        # Split three ways, or not rounded at all.
        assert ("cvt.rna.tf32.f32" in built.ptx) == (algorithm == "tf32x3")
    if algorithm == "tf32x3" and not fused:
        # Every pass of the loop begins a sum of its own on the tensor cores, and adds it to the last in float32.
        adds = len(re.findall(r"\badd(?:\.rn)?\.f32\s", built.ptx)) + 2 * len(re.findall(r"\badd(?:\.rn)?\.f32x2\s", built.ptx))
        assert adds == config.block_m * config.block_n // threads


@figures
def test_weights_split_once_take_fewer_instructions():
    """Of the largest tiles on an H100. Predicted without masks of channels: 269 for 32 terms instead of 402 for 16."""
    halves, both = (
        built_convolution((8, 128, 32, 32), 128, algorithm, 0, True, 90).loop_instructions
        for algorithm in ("tf32x3-halves", "tf32x3")
    )
    assert 0 < halves <= 300
    assert both >= 390
    assert CONFIGS["tf32x3-halves"][0].block_k == 2 * CONFIGS["tf32x3"][0].block_k


@figures
@pytest.mark.parametrize(("algorithm", "whole"), [("ieee-split", "ieee"), ("tf32x3-halves-split", "tf32x3-halves")])
def test_a_tap_takes_the_instructions_of_a_pass_nine_times_fewer(algorithm, whole):
    """Predicted: a pass of the loop costs what it does in the whole sum, of which a program then has a ninth."""
    config = CONFIGS[algorithm][0]
    tap = built_convolution((1, 256, 8, 8), 256, algorithm, 0, False, 90)
    full = built_convolution((8, 128, 32, 32), 128, whole, CONFIGS[whole].index(config), True, 90)
    assert 0 < tap.loop_instructions <= 1.03 * full.loop_instructions
    assert tap.instructions < full.instructions


@pytest.mark.parametrize("capability", TARGETS)
def test_the_sum_of_parts_computes_and_moves_what_was_counted(capability):
    """Predicted an output: 9 parts, a residual and two biases added and one product; each number read and written once."""
    built = compile_offline(launched(convolution.launch_sum_of_parts, 128), capability)
    values = gpu_split.SUM_M * gpu_split.SUM_N // built.threads
    assert float32_operations(built) == {"add": values * (gpu_split.PARTS + 3), "mul": values}
    assert_no_contraction(built, capability)
    assert built.spill_bytes == 0
    if triton.__version__ in FIGURES_OF:
        # A thread's values are one access of 128 bits: of the parts, the residual and the biases; of the result.
        assert built.wide_loads == built.loads == gpu_split.PARTS + 3
        assert built.wide_stores == built.stores == 1
        assert built.threads_per_sm == 2048


def float32_operations(built: Compiled) -> Counter:
    """Additions (and subtractions), products and multiply-adds of a thread in the PTX, those of pairs counted twice."""
    found = re.findall(r"^\s*(add|sub|mul|fma)(?:\.rn)?\.f32(x2)?\s", built.ptx, re.MULTILINE)
    counts = Counter()
    for name, pair in found:
        counts["add" if name == "sub" else name] += 2 if pair else 1
    return counts


#: Configs of products by architecture, and channels of transforms; ragged ones differ in their masks only.
PRODUCTS = [(number, 90) for number in range(len(CONFIGS["winograd"]))] + [(0, 80), (0, 100)]
WINOGRAD = {
    "input": (128, 128),
    "normed": (128, 128),
    "output": (128, 128),
    "input, 20 channels": (20, 128),
    "normed, 20 channels": (20, 128),
    "output, 20 channels": (128, 20),
}


@functools.cache
def built_winograd(
    part: str, number: int, capability: int, algorithm: str = "winograd", channels: tuple[int, int] = (128, 128)
) -> Compiled:
    kind, *_ = part.split(",")
    more = (*channels, CONFIGS[algorithm][number], algorithm) if kind == "product" else WINOGRAD[part]
    return compile_offline(launched(convolution.launch_winograd_part, kind, *more), capability)


def assert_strict(built: Compiled) -> None:
    assert built.programs_per_sm >= 1
    assert not re.search(r"\.f64|tf32|mma|\.approx|\.full", built.ptx)
    assert built.tensor_core == 0


@pytest.mark.parametrize(("number", "capability"), PRODUCTS)
def test_a_product_of_winograds_is_runs_of_multiply_adds(number, capability):
    """Of 36 products for 16 outputs a pass of the loop takes 2 BLOCK_K terms in one run, and adds it to the others' sum."""
    config, built = CONFIGS["winograd"][number], built_winograd("product", number, capability)
    assert_strict(built)
    results = config.block_m * config.block_n // (32 * config.num_warps)  # of a thread
    found = float32_operations(built)
    assert found["fma"] == results * 2 * config.block_k
    assert found["add"] == results
    assert found["mul"] == 0
    assert 2 * config.block_k == 32
    # Predicted with runs of 32: 2.25 multiply-adds and 0.07 additions an output and channel, where a direct sum has 9.
    per_output = 36 / 16 * (found["fma"] + found["add"]) / (results * 32)
    assert per_output == 2.25 * (1 + 1 / 32)


@pytest.mark.parametrize(("number", "capability"), [*((number, 90) for number in range(8)), (0, 80), (1, 80), (0, 100)])
def test_a_product_of_halves_is_runs_on_tensor_cores(number, capability):
    """A pass of the loop takes 32 terms in one run of three products, and adds it to the others' sum in float32."""
    algorithm = "winograd-tf32x3-halves"
    config, built = CONFIGS[algorithm][number], built_winograd("product", number, capability, algorithm)
    assert config.block_k == 32
    assert built.programs_per_sm >= 1
    assert built.tensor_core > 0
    assert not re.search(r"\.f64|\.approx|\.full|cvt\.rna?\.tf32", built.ptx)
    pixels = config.block_m * config.block_k // built.threads  # of a thread, at least
    found, results = float32_operations(built), config.block_m * config.block_n // built.threads
    assert found["fma"] == found["mul"] == 0
    assert found["add"] >= results + pixels  # the runs' sums, and the pixels' small halves
    if triton.__version__ in FIGURES_OF:
        assert built.spill_bytes <= SPILLED.get((algorithm, number, capability), 0)
        assert built.wide_copies == built.copies
        assert built.wide_stores == built.stores == results // 4
        assert built.programs_per_sm * built.threads >= 256
        if (number, capability) == (0, 90):
            # Predicted: less than the 300 that a direct sum's pass may take, since no taps are masked.
            assert 0 < built.loop_instructions < 300


@pytest.mark.parametrize("algorithm", [name for name, each in ALGORITHMS.items() if each.way == "winograd"])
@pytest.mark.parametrize(
    ("channels", "capability"), [((20, 128), 80), ((20, 128), 100), ((128, 3), 90), ((40, 20), 90)], ids=str
)
def test_a_product_of_ragged_channels_multiplies_as_a_whole_one(channels, capability, algorithm):
    """By the config that a large map is first tried with: what is masked adds zeros, by the same instructions."""
    config, *_ = candidates(1024, channels[1], algorithm)
    number = CONFIGS[algorithm].index(config)
    ragged, whole = (
        built_winograd("product", number, capability, algorithm, each) for each in (channels, (128, 128))
    )
    assert float32_operations(ragged) == float32_operations(whole)
    assert ragged.tensor_core == whole.tensor_core
    assert (ragged.tensor_core > 0) == ("halves" in algorithm)
    assert ragged.programs_per_sm >= 1
    assert not re.search(r"\.f64|\.approx|\.full|cvt\.rna?\.tf32", ragged.ptx)
    if triton.__version__ in FIGURES_OF:
        assert ragged.spill_bytes <= {(20, 128): 80, (128, 3): 16}.get(channels, 0)


@pytest.mark.parametrize(
    ("part", "capability"), [(part, target) for part in WINOGRAD for target in TARGETS if target == 90 or "," not in part]
)
def test_a_transform_of_winograds_computes_what_was_counted(part, capability):
    """Six lines, then six (input) or four (output) across them, of 12 multiply-adds, or 6 sums, 2 products, 4 multiply-adds."""
    built = built_winograd(part, 0, capability)
    found, values = float32_operations(built), gpu_winograd.TRANSFORM_T * gpu_winograd.TRANSFORM_C // built.threads
    if part.startswith("normed"):
        # Predicted a pixel: two differences, two products and a sum; −a, a factor of the exponent, 1 + it, a product.
        # Some versions of Triton fold −a into the factor: then it is no operation of its own.
        assert found["add"] in (values * 36 * 4, values * 36 * 5)
        assert found == {"fma": values * 12 * 12, "add": found["add"], "mul": values * 36 * 4}
        approximate = re.findall(r"^\s*(\w+)[.\w]*\.(?:approx|full)[.\w]*\s", built.ptx, re.MULTILINE)
        assert Counter(approximate) == {"ex2": values * 36, "div": values * 36}
        assert not re.search(r"\.f64|tf32|mma", built.ptx)
        return
    assert_strict(built)
    if part.startswith("input"):
        assert found == {"fma": values * 12 * 12}
    else:
        assert found["fma"] == values * 10 * 4
        assert found["mul"] == values * (10 * 2 + 16)  # and the scale
        # The biases' sum, which begins at zero; a bias and a residual for each of 16.
        assert values * (10 * 6 + 2 * 16 + 1) <= found["add"] <= values * (10 * 6 + 2 * 16 + 2)


@figures
@pytest.mark.parametrize("capability", TARGETS)
def test_figures_of_winograd(capability):
    numbers = [number for number, target in PRODUCTS if target == capability]
    products = [(CONFIGS["winograd"][number], built_winograd("product", number, capability)) for number in numbers]
    for config, built in products:
        assert built.spill_bytes == 0
        assert built.programs_per_sm * built.threads >= 256
        quads = config.block_m * config.block_n // (4 * built.threads)
        assert built.wide_stores == built.stores == quads  # M once, 128 bits at a time
    # Of the largest tiles at least five in six instructions of the loop multiply.
    config, built = products[0]
    pairs = 2 if capability == 100 else 1
    fused = config.block_m * config.block_n * 2 * config.block_k // (built.threads * pairs)
    assert built.loop_instructions <= fused * (1.3 if pairs == 2 else 1.2)
    # A transform reads each of its 36 values once and writes each result once, two channels at a time: 64 bits.
    read, normed, written = (built_winograd(part, 0, capability) for part in ("input", "normed", "output"))
    assert (read.spill_bytes, read.loads, read.stores) == (0, 36, 36)
    # Weight and bias of two channels at once; three statistics of the group of each.
    assert (normed.spill_bytes, normed.loads, normed.stores) == (0, 36 + 2 + 2 * 3, 36)
    assert (written.spill_bytes, written.loads, written.stores) == (0, 36 + 16 + 2, 16)
    assert min(read.threads_per_sm, normed.threads_per_sm, written.threads_per_sm) >= 512
    # Predicted 16 a pixel and channel with a SiLU of 8; ranges of the exponential and of the quotient take 8 or 9 more.
    assert 16 * 72 < normed.instructions - read.instructions <= 26 * 72


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if ALGORITHMS[name].way != "winograd"])
def test_layers_share_their_machine_code(algorithm):
    """All that a launch's machine code knows of its shape is which channels are multiples of 16."""

    def known(shape, out_channels):
        launch = launched(convolution.launch, shape, out_channels, algorithm, CONFIGS[algorithm][0])
        special = [parameter.name for parameter in launch.kernel.params if not parameter.do_not_specialize]
        return {name: launch.arguments[name] % 16 == 0 for name in special if isinstance(launch.arguments[name], int)}

    # DDPM++ deep's and a WRN-28-10's, images and maps of any size.
    first = known((8, 128, 32, 32), 128)
    layers = [(128, 128), (256, 128), (384, 256), (512, 256), (160, 160), (160, 320), (640, 640)]
    for number, (in_channels, out_channels) in enumerate(layers):
        size = (4, 8, 16, 32)[number % 4]
        assert known((1 + 2 * number, in_channels, size, size), out_channels) == first
    assert known((8, 3, 32, 32), 128) != first


# What `guided_step` and `standard_normal` compile to, run by the machine of tests/ptx.py: the interpreter shows that the
# kernels say the right thing, this that LLVM has kept it to the last bit. Left to trust are ptxas, which may not contract
# (`--fmad=false`, and no FFMA found above), and the hardware.
@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("way", ["forward", "adjoint", "eight columns"])
def test_the_compiled_step_gives_the_bits_of_the_definition(layout, way, capability):
    shape, steps, k = (2, 3, 12, 16), 4, 2
    generator = torch.Generator().manual_seed(capability)
    names = ("x", "eps_hat", "guidance", "x_in", "x_before", "eps_before")
    images = {name: torch.randn(shape, generator=generator).contiguous(memory_format=layout) for name in names}
    noisy, more = way != "adjoint", ALL_COLUMNS if way == "eight columns" else ()
    present = {name: image for name, image in images.items() if name in ("x", "eps_hat", "guidance", *more)}
    coefficients = torch.randn(steps, 8 if more else 4, generator=generator)
    seed, ids, draw = 2**64 - 9, random_words(2, 1), random_words(2, 2)
    words = dict(seed=seed_tensor(seed, "cpu"), ids=ids, draw=draw) if noisy else {}
    given = dict(y=torch.full(shape, float("nan")).contiguous(memory_format=layout), **present)
    given |= dict(coefficients=coefficients, step=torch.tensor(k), **words)
    launch = launched(guided_step.launch, shape, layout=layout, noisy=noisy, more=more)
    launch.arguments["rows"] = steps
    found = run_ptx(launch, capability, given)

    z, z2 = (
        standard_normal_ref(shape, seed=seed, ids=ids, draw=draw, step=step) if wanted else None
        for step, wanted in ((k, noisy), (SECOND_NOISE_STEP + k, "second_noise" in more))
    )
    terms = [present.pop(name) for name in ("x", "eps_hat", "guidance")]
    assert_same_bits(found["y"], guided_step_ref(*terms, tuple(coefficients[k].tolist()), z, z2=z2, **present))


@pytest.mark.parametrize("capability", TARGETS)
def test_the_compiled_noise_gives_the_bits_of_the_definition(capability):
    shape, step = (3, 3, 32, 32), torch.tensor(2**32 - 1)
    seed, ids, draw = seed_tensor(2**63 + 11, "cpu"), random_words(3, 1), random_words(3, 2)
    given = {"z": torch.full(shape, float("nan")), "seed": seed, "ids": ids, "draw": draw, "step": step}
    found = run_ptx(launched(noise.launch, shape), capability, given)
    assert_same_bits(found["z"], standard_normal_ref(shape, seed=2**63 + 11, ids=ids, draw=draw, step=2**32 - 1))


@pytest.mark.parametrize(("kind", "high"), [("u32", 0xFFFFFFFA), ("s32", 0xFFFFFFFF)])
def test_the_high_word_of_a_product(kind, high):
    """As Triton 3.6 divides by three. (2³² − 1) · (2³² − 5) unsigned, −1 · 5 signed."""
    registers = {"%r1": np.array([2**32 - 1], np.uint32), "%r2": np.array([2**32 - 5 if kind == "u32" else 5], np.uint32)}

    def read(operand, bits):
        return registers[operand]

    assert ptx._compute("mul", ["hi", kind], ["%r1", "%r2"], read, registers).tolist() == [high]
    registers["%r3"] = np.array([7], np.uint32)
    assert ptx._compute("mad", ["hi", kind], ["%r1", "%r2", "%r3"], read, registers).tolist() == [(high + 7) % 2**32]


def run_ptx(launch, capability, given):
    """All programs of a launch in turn, with these tensors for its pointers; the tensors afterwards."""
    built, memory = compile_offline(launch, capability), ptx.Memory()
    addresses = {name: memory.put(tensor) for name, tensor in given.items() if tensor is not None}
    arguments = []
    for parameter, (name, value) in zip(launch.kernel.params, launch.arguments.items(), strict=True):
        if parameter.is_constexpr or value is None or (not isinstance(value, torch.Tensor) and value == 1):
            continue  # compiled in
        arguments.append(addresses[name.removesuffix("_ptr")] if isinstance(value, torch.Tensor) else value)
    programs = len(next(iter(given.values()))) * launch.arguments["tiles"]
    try:
        for program in range(programs):
            ptx.run(built.ptx, arguments, memory, program, threads=32 * launch.options["num_warps"])
    except NotImplementedError as error:
        if triton.__version__ in FIGURES_OF:
            raise
        pytest.skip(f"Triton {triton.__version__} writes what tests/ptx.py does not run, NOT tested but interpreted: {error}")
    return {name: memory.get(address, given[name]) for name, address in addresses.items()}


# The largest tile, whose transpose needs the most registers; twelve channels a group; one warp; groups that are looped over.
GROUP_NORMS_COMPILED = {
    "group norm 128 at 32², residual": TARGETS,
    "group norm 128 at 32², residual: transpose": (90,),
    "group norm 384 at 32², residual": (90,),
    "group norm 384 at 32², residual: transpose": TARGETS,
    "group norm 384 at 16², time": (90,),
    "group norm 256 at 16², residual, statistics": TARGETS,
    "group norm 256 at 64², loop, statistics": (90,),
    "group norm 512 at 4²": (90,),
    "group norm 512 at 4²: transpose": (90,),
    "group norm 256 at 64², loop, residual": (90,),
    "group norm 256 at 64², loop, residual: transpose": (90,),
}


every_group_norm = pytest.mark.parametrize(
    ("name", "capability"), [(name, target) for name, targets in GROUP_NORMS_COMPILED.items() for target in targets]
)


@functools.cache
def built_group_norm(name: str, capability: int) -> Compiled:
    return compile_offline(CASES[name], capability)


@every_group_norm
def test_group_norm_compiles_to_what_is_promised(name, capability):
    built = built_group_norm(name, capability)
    assert built.spill_bytes == 0
    # h is stored as it was added, and no product goes unrounded into a sum; nothing is widened.
    assert built.contracted == 0
    assert ".f64" not in built.ptx
    # What the tests' bounds count, and no other approximation.
    approximate = {operation for operation in built.arithmetic if ".approx" in operation or ".full" in operation}
    assert {operation.split(".")[0] for operation in approximate} <= {"ex2", "div", "rsqrt"}


@figures
@every_group_norm
def test_figures_of_a_group_norm(name, capability):
    launch, built = CASES[name], built_group_norm(name, capability)
    assert built.threads_per_sm >= 512
    # Words of a warp's sums, three at most at a time.
    assert built.shared_bytes <= 4096
    statistics = 3 if name.endswith("statistics") else 0
    assert built.wide_loads == built.loads
    assert built.wide_stores == built.stores - statistics
    approximate = {operation for operation in built.arithmetic if ".approx" in operation or ".full" in operation}
    assert approximate == {"rsqrt.approx.ftz.f32"} | (set() if statistics else {"ex2.approx.f32", "div.full.f32"})

    if "BLOCK_P" in launch.arguments:  # read once, written once: no more accesses than a thread's elements take
        a = launch.arguments
        quads = a["BLOCK_P"] * a["BLOCK_G"] * a["BLOCK_C"] // (4 * 32 * launch.options["num_warps"])
        read = sum(a.get(f"{image}_ptr") is not None for image in ("x", "residual", "gy", "gh"))
        read += "gx_ptr" in a  # h is read by the transpose, written by the other
        written = 1 if "gx_ptr" in a else (a["h_ptr"] is not None) + (a["y_ptr"] is not None)
        words = (0 if statistics else 2) + (a.get("image_bias_ptr") is not None)
        assert built.loads == read * quads + words
        assert built.stores == written * quads + statistics


@figures
@pytest.mark.parametrize("capability", TARGETS)
def test_statistics_are_found_by_the_instructions_of_the_norm(capability):
    """Up to the root as many of each, those of pairs counted twice, whatever their order in the code: sums are cut alike."""

    def before_the_root(name):
        ptx = built_group_norm(name, capability).ptx
        found = re.findall(r"^\s*(?:@%\w+ )?((?:\w+[.\w]*\.f32|shfl|bar)[.\w]*)\s", ptx, re.MULTILINE)
        found = [operation for operation in found if not operation.startswith(("ld.", "st.", "mov."))]
        counts = Counter()
        for operation in found[: found.index("rsqrt.approx.ftz.f32") + 1]:
            counts[operation.removesuffix("x2")] += 2 if operation.endswith("x2") else 1
        return counts

    both = [before_the_root(f"group norm 256 at 16², residual{more}") for more in ("", ", statistics")]
    assert both[0] == both[1]
    assert both[0].total() > 300


def test_every_group_norm_of_the_score_network_is_listed():
    with torch.device("meta"):
        network, found = DDPMpp(), set()

        def record(norm, inputs):
            found.add((norm.num_channels, inputs[0].shape[-1], norm.num_groups))

        for module in network.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.register_forward_pre_hook(record)
        network(torch.empty(1, 3, 32, 32), torch.empty(1))
    assert found == set(group_norm.DDPMPP_DEEP)


def test_group_norms_of_another_batch_do_not_compile_again():
    for launch in (group_norm.launch, group_norm.launch_vjp):
        two, many = (launched(launch, 128, 16, 32, batch=batch).arguments for batch in (2, 256))
        assert {name: value for name, value in two.items() if not isinstance(value, torch.Tensor)} == {
            name: value for name, value in many.items() if not isinstance(value, torch.Tensor)
        }


@triton.jit
def _doubled_kernel(y_ptr, x_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, 2.0 * tl.load(x_ptr + offsets))


def test_a_kernel_from_elsewhere_is_compiled_with_the_others(monkeypatch):
    def launch():
        _doubled_kernel[(4,)](torch.empty(512), torch.empty(512), BLOCK=128, num_warps=1)

    monkeypatch.setattr(registry, "_kernels", dict(registry._kernels))
    registry.register(registry.Kernel("doubled", "cuda", list, lambda images: [], launches=lambda: {"doubled": launch}))
    found = cases()
    assert set(found) == {*CASES, "doubled"}
    built = compile_offline(found["doubled"], 90)
    assert (built.threads, built.wide_loads, built.wide_stores) == (32, 1, 1)
