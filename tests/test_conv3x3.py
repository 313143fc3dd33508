"""The 3 × 3 convolution: its definition, operator and tuner, and its kernel in the interpreter (its own process: test_noise).

The interpreter multiplies in float32 whatever the algorithm: it does not round to TF32. What TF32 costs is shown of the model.
"""

import contextlib
import logging
import math
import mmap
import os

import numpy as np
import pytest
import torch
from test_noise import assert_same_bits, run_interpreted
from torch import library
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from coupfast.engine.cuda.calibration import STRICT_FACTOR
from coupfast.engine.precision import strict_float32
from coupfast_kernels.convolution import gpu as module
from coupfast_kernels.convolution import gpu_normed, gpu_split, gpu_winograd
from coupfast_kernels.convolution import gpu_tuning as tuning
from coupfast_kernels.convolution.definition import (
    FLOAT32_LIMIT,
    TF32_LIMIT,
    conv3x3_normed_ref,
    conv3x3_ref,
    round_to_tf32,
    sum_parts_ref,
    tf32x3_ref,
    winograd3x3_ref,
    winograd_matrices,
)
from coupfast_kernels.convolution.gpu import ALGORITHMS, conv3x3, pack_halves, pack_weight
from coupfast_kernels.convolution.gpu_normed import conv3x3_normed
from coupfast_kernels.convolution.gpu_tuning import CONFIGS, Config, candidates, choose, tuned
from coupfast_kernels.group_norm import gpu as group_norm
from coupfast_kernels.group_norm import group_norm_silu_ref
from coupfast_kernels.group_norm.definition import group_norm_statistics_ref
from coupfast_kernels.parity import relative_error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LAST = torch.channels_last
U = 2.0**-24  # relative error of one float32 rounding
EPILOGUES = ["plain", "bias", "image bias", "residual", "all"]
IEEE_CONFIGS = CONFIGS["ieee"]
SCALE = 0.7071067811865476  # 1/√2, as DDPM++ scales its residual blocks


def numbers(*shape, seed):
    y = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return y.contiguous(memory_format=LAST) if len(shape) == 4 else y


def layer(shape, out_channels, epilogue="all", seed=0):
    """Random (x, weight, bias, options) of a convolution of images of a shape."""
    batch, in_channels, height, width = shape
    x = numbers(*shape, seed=10 * seed + 1)
    weight = numbers(out_channels, in_channels, 3, 3, seed=10 * seed + 2).contiguous()
    bias = numbers(out_channels, seed=10 * seed + 3) if epilogue in ("bias", "all") else None
    options = {}
    if epilogue in ("image bias", "all"):
        options["image_bias"] = numbers(batch, out_channels, seed=10 * seed + 4)
    if epilogue in ("residual", "all"):
        options["residual"] = numbers(batch, out_channels, height, width, seed=10 * seed + 5)
        options["scale"] = SCALE
    return x, weight, bias, options


def turned(weight):
    """The weights of the transpose."""
    return weight.flip(2, 3).transpose(0, 1)


def doubles(options):
    # The scale too is rounded once; its error is counted among the roundings.
    return {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in options.items()}


def counted(algorithm, channels):
    """How many roundings a term of a sum goes through at most, of what `size_of` gives.

    A direct sum's terms are 9 times the channels, however they are ordered; of one that is split, the channels, and nine parts.
    Halves lose as much as 7 more: 2⁻²³ of the weight, which packing rounds to 22 bits; 2⁻²² for small · small; terms of 2⁻³³.
    Winograd's: 1 of the transformed weights; two passes of two multiply-adds, which the interpreter rounds twice; a run of 32
    and the runs; two passes of a difference and two multiply-adds.
    """
    way, halves = ALGORITHMS[algorithm].way, 7 if "halves" in algorithm else 0
    if way == "winograd":
        return 1 + 2 * 4 + 33 + math.ceil(channels / 32) + 2 * 5 + halves
    return (channels + 9 if way == "split" else 9 * channels) + halves


def size_of(algorithm, x, weight):
    """The convolution of absolute values, in float64; Winograd's with its transforms' absolute values, which do not cancel."""
    matrices = tuple(matrix.abs() for matrix in winograd_matrices(torch.float64))
    x, weight = x.double().abs(), weight.double().abs()
    return winograd3x3_ref(x, weight, matrices) if ALGORITHMS[algorithm].way == "winograd" else conv3x3_ref(x, weight)


def assert_close_to_exact(y, x, weight, bias, options, algorithm="ieee"):
    """Against the definition in float64, each output within what its own sum may lose.

    With bias, image bias and residual a term goes through three roundings more. The rounded scale and its product are two more.
    """
    bias = None if bias is None else bias.double()
    exact = conv3x3_ref(x.double(), weight.double(), bias, **doubles(options))
    sizes = {name: abs(value) for name, value in doubles(options).items()}
    added = conv3x3_ref(torch.zeros_like(x).double(), weight.double(), None if bias is None else bias.abs(), **sizes)
    size = size_of(algorithm, x, weight) * options.get("scale", 1.0) + added
    roundings = counted(algorithm, x.shape[1]) + 5
    bound = roundings * U / (1 - roundings * U) * size
    wrong = ~((y.double() - exact).abs() <= bound)  # NaN is wrong
    assert not bool(wrong.any()), (
        f"{int(wrong.sum())} of {wrong.numel()} outputs off, first at {tuple(wrong.nonzero()[0].tolist())}"
    )


class TestDefinition:
    def test_is_the_formula(self):
        x, weight, bias, options = layer((2, 3, 5, 4), 6)
        x, weight, bias, options = x.double(), weight.double(), bias.double(), doubles(options)
        padded = torch.zeros(2, 3, 7, 6, dtype=torch.float64)
        padded[:, :, 1:-1, 1:-1] = x
        wanted = torch.zeros(2, 6, 5, 4, dtype=torch.float64)
        for i in range(3):
            for j in range(3):
                wanted += torch.einsum("nchw,oc->nohw", padded[:, :, i : i + 5, j : j + 4], weight[:, :, i, j])
        wanted = (wanted + bias[None, :, None, None] + options["image_bias"][:, :, None, None] + options["residual"]) * SCALE
        # 27 products and their sums, in another order; four more terms.
        tol = 31 * torch.finfo(torch.float64).eps
        found = conv3x3_ref(x, weight, bias, **options)
        torch.testing.assert_close(found, wanted, rtol=tol, atol=tol * float(wanted.abs().max()))

    def test_packed_rows_are_taps_then_channels(self):
        weight = numbers(5, 4, 3, 3, seed=1)
        packed = pack_weight(weight)
        assert packed.is_contiguous()
        assert packed.shape == (36, 5)
        for i, j, c in ((0, 0, 0), (0, 2, 3), (2, 1, 1)):
            assert_same_bits(packed[(3 * i + j) * 4 + c], weight[:, c, i, j])
        assert_same_bits(module._unpack_weight(packed), weight)

    def test_halves_are_tf32_and_their_sum_is_the_weight(self):
        weight = numbers(5, 4, 3, 3, seed=1)
        big, small = packed = pack_halves(weight)
        assert packed.is_contiguous()
        assert packed.shape == (2, 5, 36)
        for half in packed:
            assert_same_bits(half, round_to_tf32(half))
        assert bool((small.abs() <= 2.0**-11 * big.abs()).all())
        for i, j, c in ((0, 0, 0), (0, 2, 3), (2, 1, 1)):
            column = (3 * i + j) * 4 + c
            error = big[:, column].double() + small[:, column].double() - weight[:, c, i, j].double()
            assert bool((error.abs() <= 2.0**-23 * weight[:, c, i, j].abs()).all())
        torch.testing.assert_close(ALGORITHMS["tf32x3-halves"].unpack(packed), weight, rtol=2.0**-22, atol=0)

    @pytest.mark.parametrize("shape", [(2, 3, 8, 4), (1, 2, 9, 7), (3, 1, 1, 1)], ids=str)
    def test_winograd_is_the_same_convolution(self, shape):
        x, weight, _, _ = layer(shape, 6, "plain")
        x, weight = x.double(), weight.double()
        matrices = tuple(matrix.abs() for matrix in winograd_matrices(torch.float64))
        # Two transforms of three, two and six terms, on both sides; products and their sum.
        bound = 40 * torch.finfo(torch.float64).eps * winograd3x3_ref(x.abs(), weight.abs(), matrices)
        assert bool(((winograd3x3_ref(x, weight) - conv3x3_ref(x, weight)).abs() <= bound).all())

    def test_winograd_weights_are_transformed_once_and_rounded_once(self):
        weight = numbers(5, 4, 3, 3, seed=1)
        packed, (_, g, _) = gpu_winograd.pack_winograd(weight), winograd_matrices(torch.float64)
        assert packed.is_contiguous()
        for i, j in ((0, 0), (1, 4), (5, 2)):
            exact = torch.einsum("a,ocab,b->co", g[i], weight.double(), g[j])
            torch.testing.assert_close(packed[6 * i + j].double(), exact, rtol=U * (1 + 2.0**-20), atol=2.0**-50)
        assert_close_to_exact(conv3x3_ref(torch.ones(1, 4, 3, 3), gpu_winograd.unpack_winograd(packed)), torch.ones(1, 4, 3, 3),
                              weight, None, {}, "winograd")

    def test_tiles_at_once_fit_the_workspace(self):
        for tiles, channels, megabytes in ((1024, 512, 25), (7, 512, 25), (1024, 512, 2), (1 << 20, 6, 1)):
            workspace = megabytes << 20
            found = gpu_winograd.tiles_at_once(tiles, channels, workspace)
            assert 4 * 36 * channels * found <= workspace
            assert found == tiles or 4 * 36 * channels * (found + 128) > workspace
        assert gpu_winograd.tiles_at_once(1024, 512, 1) == gpu_winograd.LEAST_TILES

    def test_parts_add_up_to_the_convolution(self):
        x, weight, bias, options = layer((2, 3, 5, 4), 6)
        x, weight, bias, options = x.double(), weight.double(), bias.double(), doubles(options)
        taps = [torch.zeros_like(weight) for _ in range(9)]
        for number, tap in enumerate(taps):
            tap[:, :, number // 3, number % 3] = weight[:, :, number // 3, number % 3]
        parts = torch.stack([conv3x3_ref(x, tap) for tap in taps])
        wanted = conv3x3_ref(x, weight, bias, **options)
        tol = 31 * torch.finfo(torch.float64).eps  # as for the formula
        torch.testing.assert_close(
            sum_parts_ref(parts, bias, **options), wanted, rtol=tol, atol=tol * float(wanted.abs().max())
        )

    def test_what_is_small_leaves_a_large_gpu_idle_and_its_parts_fit_its_cache(self):
        for pixels, out_channels, small in ((1, 1, True), (64 * 127, 64, True), (64 * 127 + 1, 64, False), (256, 2048, False)):
            assert gpu_split.is_small(pixels, out_channels) == small
            if small:
                assert 4 * gpu_split.PARTS * pixels * out_channels <= gpu_split.MOST_BYTES <= 40 << 20
        # Of DDPM++ deep: all maps of one image, those of 16 x 16 and less of four.
        layers = [(256, 4), (256, 8), (256, 16), (128, 32), (256, 32)]
        ieee = ALGORITHMS["ieee-split"]
        assert [ieee.suits(1, channels, channels, size, size) for channels, size in layers] == [True] * 5
        assert [ieee.suits(4, channels, channels, size, size) for channels, size in layers] == [True] * 3 + [False] * 2

    def test_its_transpose_is_the_convolution_with_weights_turned_over(self):
        x, weight, _, _ = layer((2, 3, 5, 4), 6)
        x, weight = x.double().requires_grad_(), weight.double()
        v = numbers(2, 6, 5, 4, seed=7).double()
        (expected,) = torch.autograd.grad(conv3x3_ref(x, weight), x, v)
        tol = 54 * torch.finfo(torch.float64).eps  # 54 products, in another order perhaps
        torch.testing.assert_close(conv3x3_ref(v, turned(weight)), expected, rtol=tol, atol=tol * float(expected.abs().max()))

    def test_packing_refuses(self):
        with pytest.raises(TypeError, match="`weight` is torch.float64"):
            pack_weight(numbers(5, 4, 3, 3, seed=1).double())
        with pytest.raises(ValueError, match=r"got \(5, 4, 1, 1\)"):
            pack_halves(numbers(5, 4, 1, 1, seed=1))


class TestTF32:
    def test_rounds_to_the_nearest_and_ties_away(self):
        x = torch.cat([numbers(4096, seed=1) * 2.0 ** torch.randint(-100, 100, (4096,)), torch.tensor([0.0, -0.0])])
        ties = torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11, 2 - 2.0**-11, -1 - 2.0**-11, -(2.0 - 2.0**-11)])
        x = torch.cat([x, ties])
        mantissa, exponent = torch.frexp(x.double())  # 0.5 ≤ |mantissa| < 1: 11 bits are 2¹¹ steps
        steps = mantissa.abs() * 2**11
        wanted = torch.copysign(torch.ldexp((steps + 0.5).floor() / 2**11, exponent), x.double())
        assert_same_bits(round_to_tf32(x), wanted.float())
        assert round_to_tf32(ties[:1]) == 1 + 2.0**-10  # away from zero, not to even

    def test_keeps_what_is_not_finite(self):
        x = torch.tensor([math.inf, -math.inf])
        assert_same_bits(round_to_tf32(x), x)
        assert bool(round_to_tf32(torch.tensor([math.nan])).isnan())

    def test_three_products_are_as_good_as_float32_and_one_is_not(self):
        x, weight, _, _ = layer((2, 64, 6, 6), 24, "plain")
        exact = conv3x3_ref(x.double(), weight.double())
        size = conv3x3_ref(x.double().abs(), weight.double().abs())

        three = (tf32x3_ref(x, weight) - exact).abs()
        # 2⁻²³ for what is left of x, as much for the weight, 2⁻²² for small · small; terms of 2⁻³³ and float64's own.
        assert bool((three <= 2.0**-21 * (1 + 2.0**-9) * size).all())

        one = conv3x3_ref(round_to_tf32(x).double(), round_to_tf32(weight).double()) - exact
        assert bool((one.abs() <= 2.0**-10 * (1 + 2.0**-9) * size).all())  # 2⁻¹¹ for each factor

        # float32's own: one chain in the kernel's order, each product and each sum rounded.
        columns = torch.nn.functional.unfold(x, 3, padding=1).view(2, 64, 9, 36).transpose(1, 2).reshape(2, 576, 36)
        packed, chain = pack_weight(weight), torch.zeros(2, 24, 36)
        for k in range(576):
            chain = chain + packed[k][None, :, None] * columns[:, k][:, None, :]
        float32 = chain.view_as(exact).double() - exact

        def rms(error):
            return float((error.pow(2).mean() / exact.pow(2).mean()).sqrt())

        assert rms(three) < rms(float32)
        # A factor's error is at most 2⁻¹¹ and uniform below: its rms is within [2⁻¹¹/√12, 2⁻¹¹/√3]; two of them, independent.
        assert 2.0**-11 / math.sqrt(12) * math.sqrt(2) * 0.9 < rms(one) < 2.0**-11 / math.sqrt(3) * math.sqrt(2) * 1.1
        assert rms(three) < 2.0**-9 * rms(one)


class TestOperator:
    @pytest.mark.parametrize("epilogue", EPILOGUES)
    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_is_the_definition_on_the_cpu(self, algorithm, epilogue):
        """Of the weights as they were packed."""
        x, weight, bias, options = layer((3, 5, 4, 7), 6, epilogue)
        packed = ALGORITHMS[algorithm].pack(weight)
        y = conv3x3(x, packed, None, bias, **options, algorithm=algorithm)
        assert_same_bits(y, conv3x3_ref(x, ALGORITHMS[algorithm].unpack(packed), bias, **options))
        assert y.is_contiguous(memory_format=LAST)
        assert_close_to_exact(y, x, weight, bias, options, algorithm)

    @pytest.mark.parametrize("epilogue", EPILOGUES)
    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_gradients(self, algorithm, epilogue):
        x, weight, bias, options = layer((2, 5, 4, 7), 6, epilogue)
        v = numbers(2, 6, 4, 7, seed=9)
        inputs = [x.requires_grad_()] + ([options["residual"].requires_grad_()] if "residual" in options else [])
        pack = ALGORITHMS[algorithm].pack
        y = conv3x3(x, pack(weight), pack(turned(weight)), bias, **options, algorithm=algorithm)
        gx, *gresidual = torch.autograd.grad(y, inputs, v)
        scale = options.get("scale", 1.0)
        assert_close_to_exact(gx, v, turned(weight), None, {"scale": scale}, algorithm)
        assert gx.is_contiguous(memory_format=LAST)
        for g in gresidual:
            assert_same_bits(g, v * scale)

    def test_gradient_of_the_gradient(self):
        """The transpose of the transpose is the convolution: what a Hessian–vector product asks for."""
        x, weight, _, _ = layer((2, 5, 4, 7), 6, "plain")
        v, u = numbers(2, 6, 4, 7, seed=9).requires_grad_(), numbers(2, 5, 4, 7, seed=8)
        y = conv3x3(x.requires_grad_(), pack_weight(weight), pack_weight(turned(weight)), scale=SCALE)
        (gx,) = torch.autograd.grad(y, x, v, create_graph=True)
        (gv,) = torch.autograd.grad(gx, v, u)
        assert_close_to_exact(gv, u, weight, None, {"scale": SCALE})

    def test_gradients_that_come_in_another_layout(self):
        x, weight, _, _ = layer((2, 5, 4, 7), 6, "plain")
        y = conv3x3(x.requires_grad_(), pack_weight(weight), pack_weight(turned(weight)))
        (gx,) = torch.autograd.grad(y.sum(), x)  # an expanded scalar
        assert_close_to_exact(gx, torch.ones(2, 6, 4, 7), turned(weight), None, {})

    def test_traces_into_itself(self):
        x, weight, bias, options = layer((2, 5, 4, 7), 6)
        v = numbers(2, 6, 4, 7, seed=9)

        def run(x, packed, packed_vjp, bias, image_bias, residual, v):
            x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
            y = conv3x3(x, packed, packed_vjp, bias, image_bias=image_bias, residual=residual, scale=SCALE)
            return y.detach(), *torch.autograd.grad(y, (x, residual), v)

        arguments = (x, pack_weight(weight), pack_weight(turned(weight)), bias, options["image_bias"], options["residual"], v)
        graph = make_fx(run)(*arguments)
        calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        calls = [call for call in calls if call not in (torch.ops.aten.detach.default, torch.ops.aten.alias.default)]
        operator = torch.ops.coupfast.conv3x3.default
        assert calls == [operator, operator, torch.ops.aten.mul.Tensor]
        for found, wanted in zip(graph(*arguments), run(*arguments), strict=True):
            assert_same_bits(found, wanted)

    def test_traces_for_a_device_that_is_not_there(self):
        with FakeTensorMode():
            x, residual = (torch.empty(4, c, 8, 8, device="cuda", memory_format=LAST) for c in (128, 256))
            packed, bias = torch.empty(1152, 256, device="cuda"), torch.empty(256, device="cuda")
            y = conv3x3(x, packed, None, bias, residual=residual, algorithm="tf32x3")
            assert (tuple(y.shape), y.device.type) == ((4, 256, 8, 8), "cuda")
            assert y.is_contiguous(memory_format=LAST)
            with pytest.raises(ValueError, match="`bias` on cpu"):
                conv3x3(x, packed, None, torch.empty(256))

    @pytest.mark.parametrize("differentiable", [False, True])
    def test_pytorch_finds_the_operator_consistent(self, differentiable):
        x, weight, bias, options = layer((2, 5, 4, 6), 3)
        if differentiable:
            x.requires_grad_()
            options["residual"].requires_grad_()
        arguments = (x, pack_weight(weight), pack_weight(turned(weight)), bias, options["image_bias"], options["residual"])
        checks = ("test_schema", "test_faketensor") + (
            ("test_autograd_registration", "test_aot_dispatch_dynamic") * differentiable
        )
        library.opcheck(torch.ops.coupfast.conv3x3.default, (*arguments, SCALE, "ieee"), test_utils=checks)

    @pytest.mark.parametrize("shape", [(0, 5, 4, 4), (2, 5, 0, 4)], ids=str)
    def test_nothing(self, shape):
        y = conv3x3(torch.empty(shape).contiguous(memory_format=LAST), pack_weight(numbers(6, 5, 3, 3, seed=1)), None)
        assert y.shape == (shape[0], 6, *shape[2:])

    def test_refuses(self):
        x, weight, bias, options = layer((2, 5, 4, 7), 6)
        packed, packed_vjp = pack_weight(weight), pack_weight(turned(weight))
        for wrong, error, message in (
            (dict(x=x.double()), TypeError, "`x` is torch.float64"),
            (
                dict(x=x.contiguous()),
                ValueError,
                r"`x` must be channels_last, .* use .contiguous\(memory_format=torch.channels_last",
            ),
            (dict(x=x[0]), ValueError, "shape .batch, channels, height, width., got"),
            (dict(x=x[:, :4].contiguous(memory_format=LAST)), ValueError, r"\(9 · in_channels, .* 4 channels, got \(45"),
            (dict(algorithm="tf32x3-halves"), ValueError, r"pack_halves\(weight\) for algorithm=.*, shape \(2, out"),
            (dict(packed=weight), ValueError, "`packed` is pack_weight"),
            (dict(packed=packed.t().contiguous().t()), ValueError, "`packed` must be contiguous"),
            (dict(packed_vjp=packed), ValueError, r"`packed_vjp` must have shape \(54, 5\)"),
            (dict(bias=bias[:5]), ValueError, r"`bias` must have shape \(6,\)"),
            (dict(bias=bias.double()), TypeError, "`bias` is torch.float64"),
            (dict(image_bias=options["image_bias"][:, :5]), ValueError, r"shape \(2, 6\) or \(1, 6\) .*, got \(2, 5\)"),
            (dict(image_bias=options["image_bias"].repeat(2, 1)), ValueError, r"`image_bias` must have shape .*, got \(4, 6\)"),
            (dict(residual=options["residual"].contiguous()), ValueError, "`residual` must be channels_last"),
            (dict(residual=options["residual"][:1]), ValueError, r"`residual` must have shape \(2, 6, 4, 7\)"),
            (dict(algorithm="fp16"), ValueError, "one of ieee, tf32x3, tf32, tf32x3-halves.*, got 'fp16'"),
            (dict(packed=packed.requires_grad_()), RuntimeError, "for `x` and `residual` only, asked for: packed; freeze"),
            (dict(bias=bias.clone().requires_grad_()), RuntimeError, "asked for: bias"),
            (dict(x=x.clone().requires_grad_(), packed_vjp=None), RuntimeError, "needs `packed_vjp`"),
        ):
            right = dict(x=x, packed=packed.detach(), packed_vjp=packed_vjp, bias=bias) | options
            with pytest.raises(error, match=message):
                conv3x3(**(right | wrong))
        with FakeTensorMode(), pytest.raises(ValueError, match="offsets of 32 bits inside of an image"):
            conv3x3(torch.empty(1, 1, 2**16, 2**15).contiguous(memory_format=LAST), torch.empty(9, 1), None)

    def test_without_a_gradient_needs_no_second_packing(self):
        x, weight, _, _ = layer((2, 5, 4, 7), 6, "plain")
        with torch.no_grad():
            y = conv3x3(x.requires_grad_(), pack_weight(weight), None)
        assert not y.requires_grad


def norm_of(x, groups, seed=1):
    """(statistics, weight, bias) of a norm in front, whose silu(bias) is not zero."""
    weight, bias = 1.0 + 0.3 * numbers(x.shape[1], seed=seed), 1.0 + numbers(x.shape[1], seed=seed + 1)
    return group_norm_statistics_ref(x, groups=groups, eps=1e-6)[1].to(x.dtype), weight.to(x.dtype), bias.to(x.dtype)


class TestNormed:
    """A convolution that norms what it reads."""

    @pytest.mark.parametrize("epilogue", EPILOGUES)
    @pytest.mark.parametrize("algorithm", [name for name, each in ALGORITHMS.items() if each.way == "winograd"])
    def test_is_the_definition_on_the_cpu(self, algorithm, epilogue):
        x, weight, bias, options = layer((3, 6, 4, 7), 5, epilogue)
        norm, packed = norm_of(x, 3), ALGORITHMS[algorithm].pack(weight)
        y = conv3x3_normed(x, *norm, packed, bias, **options, algorithm=algorithm)
        assert_same_bits(y, conv3x3_normed_ref(x, *norm, ALGORITHMS[algorithm].unpack(packed), bias, **options))
        assert y.is_contiguous(memory_format=LAST)

    def test_its_definition_is_that_of_the_parts_and_pads_behind_the_silu(self):
        x, weight, bias, _ = layer((2, 6, 5, 4), 3, "bias")
        x, weight, bias = x.double(), weight.double(), bias.double()
        statistics, *norm = norm_of(x, 2)
        _, normed = group_norm_silu_ref(x, *norm, groups=2, eps=1e-6)
        tol = 200 * torch.finfo(torch.float64).eps  # means of 60 values, then 54 products
        wanted = conv3x3_ref(normed, weight, bias)
        found = conv3x3_normed_ref(x, statistics, *norm, weight, bias)
        torch.testing.assert_close(found, wanted, rtol=tol, atol=tol * float(wanted.abs().max()))
        around = torch.nn.functional.pad(x, (1, 1, 1, 1))
        early = torch.nn.functional.conv2d(group_norm_silu_ref(around, *norm, groups=2, eps=1e-6)[1], weight, bias)
        assert float((early - wanted).abs().max()) > 0.1

    def test_pytorch_finds_the_operator_consistent(self):
        x, weight, bias, options = layer((2, 16, 4, 6), 3)
        packed = gpu_winograd.pack_winograd(weight)
        arguments = (x, *norm_of(x, 4), packed, bias, options["image_bias"], options["residual"], SCALE, "winograd")
        library.opcheck(torch.ops.coupfast.conv3x3_normed.default, arguments)
        empty = x[:0].contiguous(memory_format=LAST)
        assert conv3x3_normed(empty, arguments[1][:0], *arguments[2:5]).shape == (0, 3, 4, 6)

    def test_refuses(self):
        x, weight, bias, _ = layer((2, 6, 4, 7), 5, "bias")
        statistics, norm_weight, norm_bias = norm_of(x, 3)
        right = dict(x=x, statistics=statistics, norm_weight=norm_weight, norm_bias=norm_bias)
        right |= dict(packed=gpu_winograd.pack_winograd(weight), bias=bias)
        for wrong, error, message in (
            (dict(algorithm="ieee", packed=pack_weight(weight)), ValueError, "one of winograd, winograd-.*, got 'ieee'"),
            (dict(statistics=statistics[:1]), ValueError, r"of 2 images and of groups that divide 6 .*, got \(1, 3, 3\)"),
            (dict(statistics=torch.zeros(2, 3, 4)), ValueError, r"got \(2, 3, 4\)"),
            (dict(statistics=statistics[:, :, 0]), ValueError, r"got \(2, 3\)"),
            (dict(statistics=statistics.mT.contiguous().mT), ValueError, "`statistics` must be contiguous, got"),
            (dict(statistics=statistics.double()), TypeError, "`statistics` is torch.float64"),
            (dict(norm_weight=norm_weight[:5]), ValueError, r"`norm_weight` must be .* of shape \(6,\), got shape \(5,\)"),
            (dict(norm_bias=norm_bias.double()), TypeError, "`norm_bias` is torch.float64"),
            (dict(x=x.contiguous()), ValueError, "`x` must be channels_last"),
        ):
            with pytest.raises(error, match=message):
                conv3x3_normed(**(right | wrong))
        with pytest.raises(RuntimeError, match="conv3x3_normed"):
            conv3x3_normed(**(right | dict(x=x.clone().requires_grad_()))).sum().backward()


def test_says_that_triton_is_missing(monkeypatch):
    monkeypatch.setattr(module, "triton", None)
    x, weight, _, _ = layer((2, 5, 4, 7), 6, "plain")
    with pytest.raises(RuntimeError, match="needs Triton, which is not installed"):
        module._on_cuda(x, pack_weight(weight), None, None, None, None, 1.0, "ieee")
    packed = gpu_winograd.pack_winograd(weight)
    with pytest.raises(RuntimeError, match="needs Triton, which is not installed"):
        gpu_normed._on_cuda(x, *norm_of(x, 5), packed, None, None, None, 1.0, "winograd")


class TestTuning:
    """The choice, with a clock that is given and launches that do nothing."""

    @pytest.fixture(autouse=True)
    def _nothing_chosen(self, monkeypatch):
        monkeypatch.setattr(tuning, "_chosen", {})
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    @staticmethod
    def clock(times, asked):
        """`seconds` that runs the launch it is given, and answers with the time of the config that was launched."""

        def seconds(launch):
            before = len(asked)
            launch()
            assert len(asked) == before + 1
            return times[asked[-1]]

        return seconds

    def test_takes_the_fastest(self):
        for fastest in IEEE_CONFIGS:
            asked = []
            times = {config: 1.0 if config == fastest else 2.0 for config in IEEE_CONFIGS}
            assert choose(IEEE_CONFIGS, asked.append, self.clock(times, asked)) == fastest
            assert asked == list(IEEE_CONFIGS)

    def test_once_a_key(self):
        asked = []
        times = {config: float(number) for number, config in enumerate(reversed(IEEE_CONFIGS))}
        for key in ("a", "a", "b", "a"):
            assert tuned(key, IEEE_CONFIGS, asked.append, self.clock(times, asked)) == IEEE_CONFIGS[-1]
        assert len(asked) == 2 * len(IEEE_CONFIGS)

    @pytest.mark.skipif(module.triton is None, reason="Triton is not installed: its errors do not exist")
    def test_leaves_out_what_does_not_run_and_says_so(self, caplog):
        from triton.runtime.errors import OutOfResources

        asked = []

        def launch(config):
            asked.append(config)
            if config == IEEE_CONFIGS[0]:
                raise OutOfResources(300000, 232448, "shared memory")
            if config == IEEE_CONFIGS[1]:
                raise RuntimeError("Triton Error [CUDA]: invalid argument")

        times = {config: float(number) for number, config in enumerate(IEEE_CONFIGS)}
        with caplog.at_level(logging.WARNING, logger=tuning.logger.name):
            assert choose(IEEE_CONFIGS, launch, self.clock(times, asked)) == IEEE_CONFIGS[2]
        assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
        assert "shared memory" in caplog.text
        assert "invalid argument" in caplog.text

    def test_tries_no_more_than_asked_for(self, monkeypatch):
        """And remembers that choice for such calls alone."""
        asked = []
        monkeypatch.setattr(module, "triton", object())
        monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
        monkeypatch.setattr(module, "_launch", lambda *arguments: None)
        monkeypatch.setattr(tuning, "tuned", lambda key, configs, *rest: asked.append((key, configs)) or configs[0])
        x, weight, _, _ = layer((2, 5, 16, 16), 64, "plain")

        def call():
            module._on_cuda(x, pack_weight(weight), None, None, None, None, 1.0, "ieee")

        call()
        with tuning.trying(2):
            call()
        call()
        (first, every), (second, two), (third, again) = asked
        assert first == third != second
        assert every == again and two == every[:2] != every

    def test_says_why_none_runs(self):
        def launch(config):
            raise RuntimeError(f"no room for {config.block_m} pixels")

        with pytest.raises(
            RuntimeError, match=r"none of 9 configs runs[\s\S]*no room for 128 pixels[\s\S]*no room for 16 pixels"
        ):
            tuned("a", IEEE_CONFIGS, launch, lambda launch: launch())
        assert tuning._chosen == {}

    def test_hides_neither_full_memory_nor_mistakes(self):
        for mistake in (torch.OutOfMemoryError("CUDA out of memory"), AttributeError("a bug")):

            def launch(config, mistake=mistake):
                raise mistake

            with pytest.raises(type(mistake)):
                choose(IEEE_CONFIGS, launch, lambda launch: launch())

    def test_refuses_inside_of_a_capture(self, monkeypatch):
        asked = []
        times = dict.fromkeys(IEEE_CONFIGS, 1.0)
        tuned("known", IEEE_CONFIGS, asked.append, self.clock(times, asked))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert tuned("known", IEEE_CONFIGS, asked.append, self.clock(times, asked)) == IEEE_CONFIGS[0]
        with pytest.raises(RuntimeError, match="not been tuned for new, .* warm up first"):
            tuned("new", IEEE_CONFIGS, asked.append, self.clock(times, asked))
        assert len(asked) == len(IEEE_CONFIGS)

    def test_times_only_what_fits_the_result(self):
        assert set(CONFIGS) == set(ALGORITHMS)
        for algorithm in ALGORITHMS:
            assert candidates(256 * 1024, 256, algorithm) == CONFIGS[algorithm]
        for pixels, out_channels in ((1, 1), (16, 3), (16, 256), (1024, 3), (35, 20)):
            found = candidates(pixels, out_channels, "ieee")
            assert found
            for config in found:
                assert config.block_m < 2 * max(pixels, 16)
                assert config.block_n < 2 * max(out_channels, 16)

    def test_one_order_of_sums(self):
        """What the tensor cores' sums depend on is no choice of the tuner's."""
        for algorithm in set(ALGORITHMS) - {"ieee", "ieee-split"}:  # Winograd's runs, too, are two of these long
            assert len({config.block_k for config in CONFIGS[algorithm]}) == 1


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_kernel_in_the_interpreter():
    run_interpreted("tests/test_conv3x3.py")


def poisoned(shape):
    """A channels-last NaN tensor inside of a NaN buffer that shows what was written beside it."""
    like = torch.empty(shape).contiguous(memory_format=LAST)
    buffer = torch.full((like.numel() + 64,), float("nan"))
    return buffer, buffer[32:-32].as_strided(like.shape, like.stride(), 32)


SMALL = Config(16, 16, 16, 1, 1)
# Images and output channels: three and twenty channels, odd maps, ragged in M, N and K, one pixel, several blocks of channels.
LAYERS = [
    ((1, 3, 5, 7), 20),
    ((2, 20, 3, 5), 3),
    ((3, 5, 3, 3), 5),
    ((2, 16, 4, 4), 32),
    ((2, 40, 1, 1), 3),
    ((1, 4, 1, 6), 17),
]
#: The others have the code of `ieee`, and one flag.
DIFFERENT = ["ieee", "tf32x3-halves", "ieee-split", "tf32x3-halves-split"]
WINOGRAD = ["winograd", "winograd-tf32x3-halves"]


if INTERPRETED:

    def promised(elements):
        """Zeros in memory of which almost none is touched."""
        try:
            memory = mmap.mmap(-1, 4 * elements, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
        except OSError as error:
            pytest.skip(f"this machine promises no {elements >> 28} GiB more ({error}): 64-bit addresses are NOT tested here")
        return torch.frombuffer(memory, dtype=torch.float32)

    def only_program(monkeypatch, *place):
        """One program of many: the interpreter would run them all, and then copy the storage onto itself."""
        from triton.runtime import interpreter

        def program(axis):
            number = place[axis] if axis < len(place) else 0
            return interpreter.TensorHandle(interpreter.np.array([number], dtype=interpreter.np.int32), module.tl.int32)

        monkeypatch.setattr(interpreter.interpreter_builder, "create_get_program_id", program)
        monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *arguments: None)

    class TestInterpreted:
        @pytest.fixture(autouse=True)
        def _poisoned_workspace(self, monkeypatch):
            empty = torch.empty

            def poisoned(*shape, **options):
                return empty(*shape, **options).fill_(float("nan"))

            monkeypatch.setattr(gpu_winograd.torch, "empty", poisoned)

        def launch(self, x, weight, bias, options, config=SMALL, algorithm="ieee"):
            shape = (len(x), weight.shape[0], *x.shape[2:])
            buffer, y = poisoned(shape)
            before = x.clone()
            arguments = (options.get("image_bias"), options.get("residual"), options.get("scale", 1.0))
            packed = ALGORITHMS[algorithm].pack(weight)
            module._launch(y, x, packed, bias, *arguments, algorithm, config)
            assert_same_bits(x, before)
            assert bool(buffer[:32].isnan().all())
            assert bool(buffer[-32:].isnan().all())
            return y

        @pytest.mark.parametrize(
            ("shape", "out_channels", "epilogue"),
            [(*images, "all") for images in LAYERS] + [(*LAYERS[2], epilogue) for epilogue in EPILOGUES[:-1]],
            ids=str,
        )
        @pytest.mark.parametrize("algorithm", [*DIFFERENT, *WINOGRAD])
        def test_equals_the_definition(self, algorithm, shape, out_channels, epilogue):
            x, weight, bias, options = layer(shape, out_channels, epilogue)
            found = self.launch(x, weight, bias, options, algorithm=algorithm)
            assert_close_to_exact(found, x, weight, bias, options, algorithm)

        @pytest.mark.parametrize("algorithm", [*DIFFERENT, *WINOGRAD])
        @pytest.mark.parametrize(("shape", "out_channels"), LAYERS, ids=str)
        def test_transpose(self, shape, out_channels, algorithm):
            """Against autograd of the definition, not against the convolution with weights turned over."""
            x, weight, _, _ = layer(shape, out_channels, "plain")
            v = numbers(shape[0], out_channels, *shape[2:], seed=9)
            found = self.launch(v, turned(weight), None, {"scale": SCALE}, algorithm=algorithm)

            point = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
            (exact,) = torch.autograd.grad(conv3x3_ref(point, weight.double(), scale=SCALE), point, v.double())
            roundings = counted(algorithm, out_channels) + 2  # the scale and its product
            bound = roundings * U / (1 - roundings * U) * size_of(algorithm, v, turned(weight)) * SCALE
            assert bool(((found.double() - exact).abs() <= bound).all())

        @pytest.mark.parametrize("algorithm", [*DIFFERENT, "winograd"])
        def test_one_bias_of_all_images(self, algorithm):
            """The bits of as many copies."""
            x, weight, bias, options = layer((3, 5, 3, 3), 20)
            one = options["image_bias"][:1]
            found = self.launch(x, weight, bias, options | {"image_bias": one}, algorithm=algorithm)
            again = self.launch(x, weight, bias, options | {"image_bias": one.repeat(3, 1)}, algorithm=algorithm)
            assert_same_bits(found, again)

        @pytest.mark.parametrize(
            ("config", "algorithm"),
            [
                (Config(32, 16, 16, 1, 1), "tf32x3"),
                (Config(16, 32, 32, 1, 1), "tf32"),
                (Config(32, 16, 32, 1, 1), "tf32x3-halves"),
                (Config(16, 32, 32, 1, 1), "tf32x3-halves-split"),
                (CONFIGS["ieee-split"][0], "ieee-split"),
                (CONFIGS["winograd"][0], "winograd"),
                (Config(16, 32, 32, 1, 1), "winograd-tf32x3-halves"),
                (IEEE_CONFIGS[0], "ieee"),
                (IEEE_CONFIGS[-1], "ieee"),
            ],
            ids=str,
        )
        def test_other_blocks(self, config, algorithm):
            x, weight, bias, options = layer((2, 20, 5, 7), 20, seed=1)
            found = self.launch(x, weight, bias, options, config, algorithm)
            assert_close_to_exact(found, x, weight, bias, options, algorithm)

        @pytest.mark.parametrize("algorithm", DIFFERENT)
        def test_pads_with_zeros_not_with_neighbours(self, algorithm):
            """Exact: whole numbers small enough. The last column of an image must not see the first of its next row."""
            x = torch.arange(2 * 3 * 3 * 4, dtype=torch.float32).reshape(2, 3, 3, 4).contiguous(memory_format=LAST)
            weight = torch.arange(-54, 54, dtype=torch.float32).reshape(4, 3, 3, 3)
            found = self.launch(x, weight, None, {}, algorithm=algorithm)
            assert_same_bits(found, conv3x3_ref(x.double(), weight.double()).float())

        def test_three_products_of_tf32_are_as_good_as_float32_and_one_is_not(self, monkeypatch):
            """On tensor cores that cut off what TF32 does not hold, the worst that PTX leaves open, and add in float32."""
            from triton.runtime import interpreter

            multiply, tf32 = interpreter.interpreter_builder.create_dot, interpreter._ir.INPUT_PRECISION.TF32

            def cut(a, b, d, input_precision, max_num_imprecise_acc):
                assert input_precision == tf32
                for factor in (a, b):
                    factor.data = (np.ascontiguousarray(factor.data).view(np.int32) & -0x2000).view(np.float32)
                return multiply(a, b, d, input_precision, max_num_imprecise_acc)

            monkeypatch.setattr(interpreter.interpreter_builder, "create_dot", cut)
            x, weight, bias, options = layer((1, 72, 8, 8), 16, seed=3)
            exact = conv3x3_ref(x.double(), weight.double(), bias.double(), **doubles(options))
            config = Config(64, 16, 32, 1, 1)
            errors = {
                algorithm: relative_error(self.launch(x, weight, bias, options, config, algorithm), exact)
                for algorithm in ("tf32", "tf32x3-halves", "winograd-tf32x3-halves")
            }
            assert 1e-4 < errors.pop("tf32") < TF32_LIMIT
            with strict_float32("cpu"):
                library = relative_error(conv3x3_ref(x, weight, bias, **options), exact)
            for error in errors.values():
                assert error <= STRICT_FACTOR * library < FLOAT32_LIMIT

        @pytest.mark.parametrize("channels", [16, 72])
        def test_winograd_is_within_what_strict_allows(self, channels):
            """Four times the error of PyTorch's float32, with everything that can be added; in chunks, the same bits."""
            x, weight, bias, options = layer((2, channels, 9, 12), 16, seed=channels)
            exact = conv3x3_ref(x.double(), weight.double(), bias.double(), **doubles(options))
            with strict_float32("cpu"):
                library = conv3x3_ref(x, weight, bias, **options)
            y = self.launch(x, weight, bias, options, algorithm="winograd")
            for image in range(2):
                allowed = STRICT_FACTOR * relative_error(library[image], exact[image])
                assert relative_error(y[image], exact[image]) <= allowed
            packed, again = gpu_winograd.pack_winograd(weight), torch.full_like(y, float("nan"))
            added = (options[name] for name in ("image_bias", "residual", "scale"))
            gpu_winograd.launch_winograd(again, x, packed, bias, *added, SMALL, workspace=1)  # 16 of the 18 tiles, and two
            assert_same_bits(again, y)

        @pytest.mark.parametrize(
            ("shape", "out_channels", "groups", "config", "algorithm"),
            [
                ((2, 20, 9, 12), 20, 5, SMALL, "winograd"),
                ((3, 40, 5, 3), 3, 40, SMALL, "winograd"),
                ((2, 16, 1, 6), 17, 1, SMALL, "winograd"),
                ((5, 72, 1, 1), 4, 2, SMALL, "winograd"),
                ((1, 72, 8, 8), 16, 8, Config(16, 16, 32, 1, 1), "winograd-tf32x3-halves"),
            ],
            ids=str,
        )
        def test_norms_what_it_reads_to_the_bit(self, shape, out_channels, groups, config, algorithm):
            """As the norm's kernel and then the convolution, each within counted roundings of float64; in chunks, too."""
            x, weight, bias, options = layer(shape, out_channels)
            x, (_, *norm) = x + 1.0, norm_of(x, groups)
            _, statistics = group_norm._launch_statistics(x, None, None, groups, 1e-6, 1.0)
            _, normed = group_norm._launch(x, *norm, None, None, groups, 1e-6, 1.0, True)
            apart = self.launch(normed, weight, bias, options, config, algorithm)
            assert_close_to_exact(apart, normed, weight, bias, options, algorithm)
            packed = ALGORITHMS[algorithm].pack(weight)
            added = (options["image_bias"], options["residual"], options["scale"])
            for workspace in (None, 1):
                buffer, y = poisoned(apart.shape)
                given = (statistics, *norm)
                gpu_winograd.launch_winograd(y, x, packed, bias, *added, config, norm=given, workspace=workspace)
                assert_same_bits(y, apart)
                assert bool(torch.cat([buffer[:32], buffer[-32:]]).isnan().all())

            exact_x, *exact_norm = (t.double() for t in (x, *norm))
            _, exact_normed = group_norm_silu_ref(exact_x, *exact_norm, groups=groups, eps=1e-6)
            exact = conv3x3_ref(exact_normed, weight.double(), bias.double(), **doubles(options))
            with strict_float32("cpu"):
                library = conv3x3_ref(
                    torch.nn.functional.silu(torch.nn.functional.group_norm(x, groups, *norm, 1e-6)), weight, bias, **options
                )
            assert relative_error(y, exact) <= STRICT_FACTOR * relative_error(library, exact)

        def test_pixels_of_an_image_that_is_not_finite_stay_in_their_groups_and_images(self):
            x, weight, _, _ = layer((2, 8, 5, 7), 6, "plain")
            x[1, 2, 2, 3] = float("nan")
            _, statistics = group_norm._launch_statistics(x, None, None, 2, 1e-6, 1.0)
            _, *norm = norm_of(x, 2)
            packed, y = gpu_winograd.pack_winograd(weight), torch.full_like(layer((2, 6, 5, 7), 6)[0], float("nan"))
            gpu_winograd.launch_winograd(y, x, packed, None, None, None, 1.0, SMALL, norm=(statistics, *norm))
            assert bool(statistics[0].isfinite().all() and statistics[1, :, 1].isfinite().all())
            assert bool(statistics[1, 2, 0].isnan())
            assert bool(y[0].isfinite().all() and y[1].isnan().all())

        @pytest.mark.parametrize("epilogue", EPILOGUES)
        @pytest.mark.parametrize(("shape", "out_channels"), [((2, 5, 3, 7), 20), ((3, 5, 2, 2), 70)], ids=str)
        def test_parts_are_added_in_one_order(self, shape, out_channels, epilogue):
            _, _, bias, options = layer(shape, out_channels, epilogue)
            buffer, y = poisoned((shape[0], out_channels, *shape[2:]))
            parts = [numbers(*y.shape, seed=seed) * 10.0**seed for seed in range(9)]  # another order has other bits
            rows = torch.stack([part.permute(0, 2, 3, 1).flatten() for part in parts])
            added = (options.get("image_bias"), options.get("residual"), options.get("scale", 1.0))
            gpu_split.launch_sum(y, rows, bias, *added)
            assert_same_bits(y, sum_parts_ref(torch.stack(parts), bias, **options))
            backwards = sum_parts_ref(torch.stack(parts[::-1]), bias, **options)
            assert not torch.equal(y, backwards)
            assert bool(torch.cat([buffer[:32], buffer[-32:]]).isnan().all())

        @pytest.mark.parametrize("algorithm", DIFFERENT)
        def test_infinity_stays_in_its_window(self, algorithm):
            x, weight, _, _ = layer((2, 5, 5, 7), 6, "plain")
            x[1, 2, 2, 3] = float("inf")
            y = self.launch(x, weight, None, {}, algorithm=algorithm)
            reached = torch.zeros(2, 6, 5, 7, dtype=torch.bool)
            reached[1, :, 1:4, 2:5] = True
            assert bool((y.isfinite() == ~reached).all())

        def test_addresses_beyond_32_bits(self, monkeypatch):
            """The last program of the second of two images of 8 GiB: memory that is promised, and almost none touched."""
            channels, height, width, config = 16, 2**15 + 1, 4099, SMALL
            elements = 2 * height * width * channels
            assert elements > 2**32
            shape, strides = (2, channels, height, width), (height * width * channels, 1, width * channels, channels)
            x, y, residual = (promised(elements).as_strided(shape, strides) for _ in "xyr")
            crop, weight, bias, _ = layer((1, channels, 2, width), channels, "bias")
            x[1:, :, -2:] = crop
            last = (2 * height * width) % config.block_m or config.block_m  # pixels of the last program
            residual[1, :, -1, -last:] = numbers(channels, last, seed=9)
            image_bias = numbers(2, channels, seed=8)

            only_program(monkeypatch, -(-2 * height * width // config.block_m) - 1)
            module._conv3x3_kernel[(1,)](
                y, x, pack_weight(weight), None, bias, image_bias, residual, channels, SCALE,
                pixels=2 * height * width, height=height, width=width, in_channels=channels, out_channels=channels,
                INPUT_PRECISION="ieee", SPLIT=False, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            )  # fmt: skip

            options = {"image_bias": image_bias[1:], "residual": torch.zeros_like(crop), "scale": SCALE}
            options["residual"][0, :, -1, -last:] = residual[1, :, -1, -last:]
            found = conv3x3_ref(crop, weight, bias, **options)  # stands for what no program wrote here
            found[0, :, -1, -last:] = y[1, :, -1, -last:]
            assert_close_to_exact(found, crop, weight, bias, options)
            assert not bool(y[1, :, -1, : width - last].any())

        def test_addresses_of_parts_beyond_32_bits(self, monkeypatch):
            """The last tap of the last pixels but one row, written behind 8 GiB of other taps, and read again."""
            channels, out_channels, height, width = 16, 64, 2049, 2048
            pixels = height * width
            assert 8 * pixels * out_channels > 2**31
            parts, y = promised(9 * pixels * out_channels).view(9, pixels, out_channels), promised(pixels * out_channels)
            x, weight = promised(pixels * channels).view(pixels, channels), numbers(out_channels, channels, 3, 3, seed=1)
            x[-width:] = numbers(width, channels, seed=2)
            maps = dict(pixels=pixels, out_channels=out_channels)
            last = pixels - width  # behind the last pixel of that row
            only_program(monkeypatch, last // SMALL.block_m * (out_channels // SMALL.block_n) - 1, 8)
            module._conv3x3_kernel[(1,)](
                parts, x, pack_weight(weight), None, None, None, None, 0, 1.0,
                height=height, width=width, in_channels=channels, **maps, INPUT_PRECISION="ieee", SPLIT=True,
                BLOCK_M=SMALL.block_m, BLOCK_N=SMALL.block_n, BLOCK_K=SMALL.block_k,
            )  # fmt: skip
            found = parts[8, last - SMALL.block_m : last, -SMALL.block_n :]
            below = torch.cat([x[-SMALL.block_m + 1 :], torch.zeros(1, channels)]).double()  # and to the right
            corner = weight[-SMALL.block_n :, :, 2, 2].double()
            bound = channels * 2 * U * (below.abs() @ corner.abs().T)
            assert bool(((found.double() - below @ corner.T).abs() <= bound).all())
            assert bool(found[:-1].all())

            only_program(monkeypatch, last // gpu_split.SUM_M - 1)
            gpu_split._sum_kernel[(1,)](
                y, parts, None, None, None, 0, 1.0, **maps, plane=pixels,
                PARTS=gpu_split.PARTS, BLOCK_M=gpu_split.SUM_M, BLOCK_N=gpu_split.SUM_N,
            )  # fmt: skip
            rows = slice(last - gpu_split.SUM_M, last)
            assert_same_bits(y.view(pixels, out_channels)[rows], parts[8, rows])
