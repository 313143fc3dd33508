"""GroupNorm with SiLU: its definitions, its operators, its kernels in the interpreter (in a process of its own: test_noise)."""

import os

import pytest
import torch
import torch.nn.functional as F
from test_guided_step import CHANNELS_LAST, CONTIGUOUS, images, poisoned
from test_noise import assert_same_bits, run_interpreted
from torch import library
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from coupfast_kernels.group_norm import definition, group_norm_silu, group_norm_silu_ref, group_norm_silu_vjp_ref
from coupfast_kernels.group_norm import gpu as module
from coupfast_kernels.group_norm.gpu import group_norm_statistics

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LAYOUTS = pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=str)
U = torch.finfo(torch.float32).eps / 2  # one rounding
ROOT_HALF = 0.5**0.5

# Several groups a program, one, too many; channels of a group: a power of two, three quads, odd, one; one pixel; odd maps.
SHAPES = [
    (1, 8, 4, 4, 2),
    (2, 12, 5, 7, 3),
    (5, 24, 4, 4, 2),
    (3, 10, 3, 3, 2),
    (2, 16, 4, 8, 4),
    (1, 8, 2, 3, 8),
    (2, 6, 1, 1, 3),
    (2, 7, 5, 3, 1),
]


def case(shape, layout=CONTIGUOUS, dtype=torch.float32, seed=0):
    """x, residual, gy, gh of a shape; weight, bias, image_bias; the number of groups."""
    *image, groups = shape
    x, residual, gy, gh = images(tuple(image), 4, layout, dtype, seed)
    weight, bias = images((image[1],), 2, dtype=dtype, seed=seed + 1)
    (image_bias,) = images(tuple(image[:2]), 1, dtype=dtype, seed=seed + 2)
    return x, residual, gy, gh, 1.0 + 0.5 * weight, bias, image_bias, groups


def normed(h, statistics, weight, bias):
    """What the kernels make of statistics, without SiLU, operation by operation in their order."""
    mean, shift, inverse = statistics.repeat_interleave(h.shape[1] // statistics.shape[2], dim=2)[..., None, None].unbind(1)
    return (h - mean - shift) * inverse * weight[:, None, None] + bias[:, None, None]


class Bound:
    """How far float32 may be from exact, counted in roundings to first order; the exact values, from an exact h.

    Sums have a depth: each of their terms goes through so many additions. A mean is a sum times a rounded 1 / N.
    """

    def __init__(self, h, weight, bias, groups, eps, silu):
        self.shape, self.groups, self.silu = h.shape, groups, silu
        h, weight, bias = h.double(), weight.double()[:, None, None], bias.double()[:, None, None]
        self.k = (h[0, 0].numel() + h.shape[1] // groups + 2) * U
        self.n, self.deviation = definition._normalised(h, groups, eps)
        self.weight, self.a = weight, self.n * weight + bias
        self.s = torch.sigmoid(self.a)

        grouped = self.grouped(h)
        centred = (grouped - grouped.mean(2, keepdim=True)).abs()
        d = centred + self.k * grouped.abs().mean(2, keepdim=True)  # h less the first, rounded mean
        # One rounding of d and one behind it, that of the shift's product; a mean of d, its terms rounded before.
        of_centred = 2 * U * d + (self.k + 2 * U) * d.mean(2, keepdim=True)
        squares = d.square().mean(2, keepdim=True)
        # Two means of squares, each with the roundings of the terms; the sum with eps; rsqrt's two ulps.
        self.of_inverse = (self.k + 4 * U) * squares / self.deviation**2 + 6 * U
        self.of_n = (of_centred / self.deviation).reshape(h.shape) + self.n.abs() * (self.flat(self.of_inverse) + 2 * U)
        self.of_a = weight.abs() * self.of_n + 2 * U * ((self.n * weight).abs() + bias.abs())
        # exp: 2 + 1.173 |a| ulps (CUDA's __expf); one addition, two ulps of the division.
        self.of_s = self.s * ((1 - self.s) * (4 + 2.4 * self.a.abs()) + 6) * U

    def grouped(self, t):
        return t.reshape(self.shape[0], self.groups, -1)

    def flat(self, per_group):
        elements = self.shape[1] // self.groups * self.shape[2] * self.shape[3]
        return per_group.expand(-1, -1, elements).reshape(self.shape)

    def assert_close(self, found, exact, bound):
        # Second-order terms; results that are flushed to zero.
        assert bool(torch.isfinite(found).all())
        excess = (found.double() - exact).abs() / (1.01 * bound + 2.0**-126)
        assert float(excess.max()) <= 1.0, f"{float(excess.max()):.3g} times the bound"

    def check(self, y):
        if not self.silu:
            self.assert_close(y, self.a, self.of_a)
            return
        # |silu'| is below 1.1.
        self.assert_close(y, self.a * self.s, 1.1 * self.of_a + self.a.abs() * self.of_s + U * (self.a * self.s).abs())

    def check_vjp(self, gx, gy, gh, scale):
        gy = gy.double() * self.weight
        of_gn = U * gy.abs()
        gn = gy
        if self.silu:
            slope = self.s * (1 + self.a * (1 - self.s))
            gn = gy * slope
            # |silu''| is at most a half. s appears as itself and in 1 − s; four roundings of what is added.
            of_slope = 0.5 * self.of_a + (1 + 2 * self.a.abs()) * self.of_s + 4 * U * self.s * (1 + self.a.abs())
            of_gn = gy.abs() * of_slope + 2 * U * gn.abs()
        gn, of_gn, n, of_n = (self.grouped(t) for t in (gn, of_gn, self.n, self.of_n))

        def mean(t):
            return t.mean(2, keepdim=True)

        of_mean = mean(of_gn) + self.k * mean(gn.abs())
        along = mean(gn * n)
        of_along = mean(of_gn * n.abs() + gn.abs() * of_n) + (self.k + U) * mean((gn * n).abs())
        inner = gn - mean(gn) - n * along
        bound = of_gn + of_mean + n.abs() * of_along + of_n * along.abs()
        bound = bound + 3 * U * (gn.abs() + mean(gn).abs() + (n * along).abs())
        exact = inner / self.deviation
        bound = (bound / self.deviation + exact.abs() * (self.of_inverse + U)).reshape(self.shape)
        exact = exact.reshape(self.shape)
        if gh is not None:
            exact, bound = exact + gh.double(), bound + U * (exact.abs() + gh.double().abs())
        factor = float(torch.tensor(scale, dtype=torch.float32))
        self.assert_close(gx, exact * factor, abs(factor) * (bound + U * exact.abs()))


class TestDefinition:
    @pytest.mark.parametrize("silu", [True, False])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_is_pytorchs(self, shape, silu):
        x, residual, _, _, weight, bias, image_bias, groups = case(shape, dtype=torch.float64)
        h, y = group_norm_silu_ref(
            x, weight, bias, groups=groups, eps=1e-3, image_bias=image_bias, residual=residual, scale=ROOT_HALF, silu=silu
        )
        assert torch.equal(h, (x + image_bias[:, :, None, None] + residual) * ROOT_HALF)
        wanted = F.group_norm(h, groups, weight, bias, 1e-3)
        wanted = F.silu(wanted) if silu else wanted
        # Both are float64: sums of at most 128 numbers, and some ten roundings; deviations are at least the root of eps.
        torch.testing.assert_close(y, wanted, rtol=0, atol=150 * 2.0**-53 * float(h.abs().max()) / 1e-3**0.5 * 3)

    def test_adds_nothing_that_is_not_given(self):
        x, _, _, _, weight, bias, _, groups = case(SHAPES[0])
        assert group_norm_silu_ref(x, weight, bias, groups=groups, eps=1e-6)[0] is x

    @pytest.mark.parametrize("silu", [True, False])
    @pytest.mark.parametrize("with_gh", [True, False])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_transpose_is_autograds(self, shape, with_gh, silu):
        x, residual, gy, gh, weight, bias, image_bias, groups = case(shape, dtype=torch.float64)
        x.requires_grad_()
        residual.requires_grad_()
        options = dict(groups=groups, eps=1e-3, scale=ROOT_HALF, silu=silu)
        h, y = group_norm_silu_ref(x, weight, bias, image_bias=image_bias, residual=residual, **options)
        given = ((h, y), (gh, gy)) if with_gh else (y, gy)
        wanted_x, wanted_residual = torch.autograd.grad(given[0], (x, residual), given[1])
        found = group_norm_silu_vjp_ref(h.detach(), gy, gh if with_gh else None, weight, bias, **options)
        # As above; divided by a deviation, which is at least the root of eps, up to three times.
        tol = 150 * 2.0**-53 / 1e-3**1.5
        torch.testing.assert_close(found, wanted_x, rtol=0, atol=tol * float(gy.abs().max()))
        torch.testing.assert_close(found, wanted_residual, rtol=0, atol=tol * float(gy.abs().max()))


class TestOperator:
    @LAYOUTS
    @pytest.mark.parametrize("added", ["nothing", "time", "time of all", "residual", "scale", "all"])
    def test_is_the_definition_on_the_cpu(self, added, layout):
        x, residual, gy, gh, weight, bias, image_bias, groups = case(SHAPES[1], layout)
        options = dict(groups=groups, eps=1e-3)
        if added.startswith("time") or added == "all":
            options["image_bias"] = image_bias[:1] if added == "time of all" else image_bias
        if added in ("residual", "all"):
            options["residual"] = residual
        if added in ("scale", "all"):
            options["scale"] = ROOT_HALF
        h, y = group_norm_silu(x, weight, bias, **options)
        wanted_h, wanted_y = group_norm_silu_ref(x, weight, bias, **options)
        assert_same_bits(h, wanted_h)
        assert_same_bits(y, wanted_y)
        assert (h is x) == (added == "nothing")
        assert h.is_contiguous(memory_format=layout) and y.is_contiguous(memory_format=layout)

        leaf, other = x.clone().requires_grad_(), residual.clone().requires_grad_()
        if "residual" in options:
            options["residual"] = other
        h, y = group_norm_silu(leaf, weight, bias, **options)
        inputs = (leaf, other) if "residual" in options else (leaf,)
        found = torch.autograd.grad((h, y), inputs, (gh, gy))
        scale = options.get("scale", 1.0)
        # Where h is x, autograd adds what comes through it.
        through = None if added == "nothing" else gh
        wanted = group_norm_silu_vjp_ref(wanted_h, gy, through, weight, bias, groups=groups, eps=1e-3, scale=scale)
        for gradient in found:
            assert_same_bits(gradient, wanted + gh if added == "nothing" else wanted)

    @pytest.mark.parametrize("added", [True, False])
    def test_statistics_are_what_it_norms_with(self, added):
        x, residual, _, _, weight, bias, image_bias, groups = case(SHAPES[1], CHANNELS_LAST)
        options = dict(groups=groups, eps=1e-3)
        options |= dict(image_bias=image_bias, residual=residual, scale=ROOT_HALF) if added else {}
        h, statistics = group_norm_statistics(x, **options)
        wanted_h, wanted = definition.group_norm_statistics_ref(x, **options)
        assert_same_bits(h, wanted_h)
        assert_same_bits(statistics, wanted)
        assert (h is x) == (not added)
        library.opcheck(
            torch.ops.coupfast.group_norm_statistics.default,
            (x, *((image_bias, residual) if added else (None, None)), groups, 1e-3, ROOT_HALF if added else 1.0),
        )
        # In float64: means of 140 values, and what both then do to each.
        doubles = [None if t is None else t.double() for t in (x, weight, bias)]
        some = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
        h, statistics = definition.group_norm_statistics_ref(doubles[0], **some)
        found = definition.silu_normed_ref(h, statistics, *doubles[1:])
        tol = 150 * torch.finfo(torch.float64).eps
        torch.testing.assert_close(found, group_norm_silu_ref(*doubles, **some)[1], rtol=tol, atol=tol)

    def test_gradients_through_one_result(self):
        x, residual, gy, gh, weight, bias, _, groups = case(SHAPES[1], CHANNELS_LAST)
        x.requires_grad_()
        options = dict(groups=groups, eps=1e-3, scale=ROOT_HALF)
        h, y = group_norm_silu(x, weight, bias, residual=residual, **options)
        only_y = torch.autograd.grad(y, x, gy, retain_graph=True)[0]
        assert_same_bits(only_y, group_norm_silu_vjp_ref(h.detach(), gy, None, weight, bias, **options))
        assert_same_bits(torch.autograd.grad(h, x, gh, retain_graph=True)[0], gh * ROOT_HALF)
        # A gradient that autograd expands has strides of 0.
        summed = torch.autograd.grad(y.sum(), x)[0]
        assert_same_bits(summed, group_norm_silu_vjp_ref(h.detach(), torch.ones_like(h), None, weight, bias, **options))

    def test_is_two_nodes_of_a_traced_graph(self):
        x, residual, gy, gh, weight, bias, image_bias, groups = case(SHAPES[1], CHANNELS_LAST)

        def run(x, residual, gy, gh, weight, bias, image_bias):
            x = x.detach().requires_grad_()
            h, y = group_norm_silu(
                x, weight, bias, groups=groups, eps=1e-3, image_bias=image_bias, residual=residual, scale=ROOT_HALF
            )
            return h, y, torch.autograd.grad((h, y), x, (gh, gy))[0]

        arguments = (x, residual, gy, gh, weight, bias, image_bias)
        graph = make_fx(run)(*arguments)
        calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        calls = [call for call in calls if "getitem" not in call and "detach" not in call and "alias" not in call]
        assert calls == ["coupfast.group_norm_silu.default", "coupfast.group_norm_silu_vjp.default"]
        for found, wanted in zip(graph(*arguments), run(*arguments), strict=True):
            assert_same_bits(found.detach(), wanted.detach())

    @LAYOUTS
    def test_traces_for_a_device_that_is_not_there(self, layout):
        with FakeTensorMode():
            x, residual, gy = (torch.empty(4, 8, 6, 6, device="cuda", memory_format=layout) for _ in range(3))
            weight, bias, image_bias = (torch.empty(*shape, device="cuda") for shape in ((8,), (8,), (4, 8)))
            options = dict(groups=2, eps=1e-6, image_bias=image_bias)
            h, y = group_norm_silu(x, weight, bias, residual=residual, **options)
            gx = torch.ops.coupfast.group_norm_silu_vjp(h, gy, None, weight, bias, 2, 1e-6, 1.0, True)
            for result in (h, y, gx):
                assert (result.shape, result.device.type) == (x.shape, "cuda")
                assert result.stride() == x.stride()
            empty, _ = torch.ops.coupfast.group_norm_silu(x, weight, bias, None, None, 2, 1e-6, 1.0, True)
            assert tuple(empty.shape) == (0,)
            with pytest.raises(ValueError, match="`x` is on cuda.*, `residual` on cpu"):
                group_norm_silu(x, weight, bias, residual=torch.empty(4, 8, 6, 6), **options)

    @pytest.mark.parametrize("added", [True, False])
    def test_pytorch_finds_the_operators_consistent(self, added):
        x, residual, gy, gh, weight, bias, image_bias, groups = case(SHAPES[0], CHANNELS_LAST)
        x.requires_grad_()
        some = (image_bias, residual.requires_grad_()) if added else (None, None)
        options = (groups, 1e-3, ROOT_HALF if added else 1.0, True)
        library.opcheck(torch.ops.coupfast.group_norm_silu.default, (x, weight, bias, *some, *options))
        arguments = (x.detach(), gy, gh if added else None, weight, bias, *options)
        library.opcheck(torch.ops.coupfast.group_norm_silu_vjp.default, arguments)

    @pytest.mark.parametrize("name", ["weight", "bias", "image_bias"])
    def test_refuses_gradients_that_it_does_not_have(self, name):
        x, _, _, _, weight, bias, image_bias, groups = case(SHAPES[0])
        given = dict(weight=weight, bias=bias, image_bias=image_bias)
        given[name].requires_grad_()
        with pytest.raises(RuntimeError, match=f"`{name}` requires a gradient; freeze"):
            group_norm_silu(x.requires_grad_(), groups=groups, eps=1e-6, **given)
        with torch.no_grad():
            group_norm_silu(x, groups=groups, eps=1e-6, **given)

    def test_has_no_second_derivative(self):
        x, _, gy, _, weight, bias, _, groups = case(SHAPES[0])
        _, y = group_norm_silu(x.requires_grad_(), weight, bias, groups=groups, eps=1e-6)
        gx = torch.autograd.grad(y, x, gy.requires_grad_(), create_graph=True)[0]
        with pytest.raises(RuntimeError, match="group_norm_silu_vjp"):
            gx.sum().backward()

    def test_refuses(self):
        x, residual, gy, _, weight, bias, image_bias, groups = case(SHAPES[1])
        for wrong, error, message in (
            (dict(x=x.double()), TypeError, "takes float32, `x` is torch.float64"),
            (dict(weight=weight.double()), TypeError, "`weight` is torch.float64"),
            (dict(residual=residual.half()), TypeError, "`residual` is torch.float16"),
            (dict(x=x[0]), ValueError, r"`x` has shape \(batch, channels, height, width\), got \(12, 5, 7\)"),
            (dict(groups=5), ValueError, "`groups` must divide the channels, got 5 groups of 12 channels"),
            (dict(groups=0), ValueError, "got 0 groups"),
            (dict(residual=residual[:1]), ValueError, r"`residual` is \(1, 12, 5, 7\)"),
            (
                dict(residual=residual.contiguous(memory_format=CHANNELS_LAST)),
                ValueError,
                "all contiguous or all channels_last",
            ),
            (dict(x=x.transpose(2, 3), residual=None), ValueError, "all contiguous or all channels_last"),
            (dict(weight=weight[:6]), ValueError, r"`weight` must be contiguous of shape \(12,\), got shape \(6,\)"),
            (dict(bias=bias.repeat(2)[::2]), ValueError, "`bias` must be contiguous"),
            (dict(image_bias=image_bias.repeat(2, 1)), ValueError, r"shape \(2, 12\) or \(1, 12\), got shape \(4, 12\)"),
            (dict(eps=-1.0), ValueError, "`eps` is at least 0"),
            (dict(scale=float("nan")), ValueError, "`scale` finite"),
        ):
            right = dict(x=x, weight=weight, bias=bias, groups=groups, eps=1e-6, image_bias=image_bias, residual=residual)
            with pytest.raises(error, match=message):
                group_norm_silu(**(right | wrong))
        with pytest.raises(ValueError, match=r"`h` is \(2, 12, 5, 7\), `gy` is \(1, 12, 5, 7\)"):
            torch.ops.coupfast.group_norm_silu_vjp(x, gy[:1], None, weight, bias, groups, 1e-6, 1.0, True)
        with FakeTensorMode():
            x, words = torch.empty(1, 32, 2**13, 2**13), torch.empty(32)
            with pytest.raises(ValueError, match=r"fewer than 2\*\*31 elements"):
                group_norm_silu(x, words, words, groups=8, eps=1e-6)


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_kernel_in_the_interpreter():
    run_interpreted("tests/test_group_norm.py")


def test_says_that_triton_is_missing(monkeypatch):
    monkeypatch.setattr(module, "triton", None)
    x, _, gy, _, weight, bias, _, groups = case(SHAPES[0])
    for launch, arguments in (
        (module._launch, (x, weight, bias, None, None, groups, 1e-6, 1.0, True)),
        (module._launch_statistics, (x, None, None, groups, 1e-6, 1.0)),
        (module._launch_vjp, (x, gy, None, weight, bias, groups, 1e-6, 1.0, True)),
    ):
        with pytest.raises(RuntimeError, match="needs Triton, which is not installed"):
            launch(*arguments)


if INTERPRETED:

    @pytest.fixture
    def poison(monkeypatch):
        """Results come as NaN in a larger buffer of NaN; the check that nothing was written beside them."""
        buffers = []

        def empty_like(tensor):
            buffer, view = poisoned(tensor)
            buffers.append(buffer)
            return view

        empty = torch.empty

        def statistics(*shape, **options):
            return empty(*shape, **options).fill_(float("nan"))

        monkeypatch.setattr(torch, "empty_like", empty_like)
        monkeypatch.setattr(torch, "empty", statistics)
        yield
        assert buffers
        for buffer in buffers:
            assert bool(buffer[:32].isnan().all()) and bool(buffer[-32:].isnan().all())

    @pytest.fixture(params=["registers", "loop"])
    def way(request, monkeypatch):
        """Every group in registers, or none: then in parts of 128 elements."""
        if request.param == "loop":
            monkeypatch.setattr(module, "MOST_IN_REGISTERS", 0)
            monkeypatch.setattr(module, "LOOP_BLOCK", 128)
        return request.param

    def run(x, weight, bias, groups, eps, *, image_bias=None, residual=None, scale=1.0, silu=True):
        h, y = module._launch(x, weight, bias, image_bias, residual, groups, eps, scale, silu)
        return (x if h.numel() == 0 else h), y

    @pytest.mark.usefixtures("poison", "way")
    class TestInterpreted:
        @pytest.mark.parametrize("shape", SHAPES, ids=str)
        @LAYOUTS
        def test_is_the_definition(self, shape, layout):
            number = SHAPES.index(shape)
            self.check(shape, layout, "nothing", eps=1e-6, silu=number % 2 == 0)
            self.check(shape, layout, "all", eps=0.3, silu=number % 2 == 1, scale=ROOT_HALF)

        @pytest.mark.parametrize("silu", [True, False])
        @pytest.mark.parametrize(
            ("added", "scale"),
            [("time", 1.0), ("time of all", 1.0), ("nothing", -3.0), ("residual", 1.0), ("residual", ROOT_HALF)],
        )
        def test_of_every_sum(self, added, scale, silu):
            self.check(SHAPES[0], CHANNELS_LAST, added, eps=1e-3, silu=silu, scale=scale)

        def check(self, shape, layout, added, *, eps, silu, scale=1.0):
            x, residual, gy, gh, weight, bias, image_bias, groups = case(shape, layout)
            some = dict(
                image_bias={"time": image_bias, "time of all": image_bias[:1], "all": image_bias}.get(added),
                residual=residual if added in ("residual", "all") else None,
            )
            before = [tensor.clone() for tensor in (x, residual)]
            h, y = run(x, weight, bias, groups, eps, silu=silu, scale=scale, **some)
            wanted, _ = group_norm_silu_ref(x, weight, bias, groups=groups, eps=eps, silu=silu, scale=scale, **some)
            assert_same_bits(h, wanted)
            bound = Bound(h, weight, bias, groups, eps, silu)
            bound.check(y)
            found, statistics = module._launch_statistics(x, some["image_bias"], some["residual"], groups, eps, scale)
            assert_same_bits(x if found.numel() == 0 else found, h)
            plain = y if not silu else run(x, weight, bias, groups, eps, silu=False, scale=scale, **some)[1]
            assert_same_bits(normed(h, statistics, weight, bias), plain)
            through = None if added == "time" else gh
            gx = module._launch_vjp(h, gy, through, weight, bias, groups, eps, scale, silu)
            bound.check_vjp(gx, gy, through, scale)
            assert_same_bits(x, before[0])
            assert_same_bits(residual, before[1])
            assert y.stride() == gx.stride() == x.stride()

        def test_a_large_mean_costs_nothing(self):
            """A mean of 10³ and a deviation of 10⁻²: rounded means alone would move n by up to a hundredth."""
            x, _, gy, _, weight, bias, _, groups = case((1, 8, 9, 5, 2), CHANNELS_LAST)
            x = 1e3 + 1e-2 * x
            _, y = run(x, weight, bias, groups, 1e-6)
            bound = Bound(x, weight, bias, groups, 1e-6, True)
            bound.check(y)
            assert float(bound.of_n.max()) < 1e-3
            bound.check_vjp(module._launch_vjp(x, gy, None, weight, bias, groups, 1e-6, 1.0, True), gy, None, 1.0)

        @pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1e3, 1e18])
        def test_constant_groups_give_the_bias(self, value):
            x, _, gy, _, weight, bias, _, groups = case((1, 8, 5, 3, 2), CHANNELS_LAST)
            x = torch.full_like(x, value, memory_format=torch.preserve_format)
            _, y = run(x, weight, bias, groups, 1e-6)
            bound = Bound(x, weight, bias, groups, 1e-6, True)
            bound.check(y)
            if abs(value) <= 1e3:
                torch.testing.assert_close(y, F.silu(bias)[:, None, None].expand_as(y), rtol=0, atol=1e-4)
            gx = module._launch_vjp(x, gy, None, weight, bias, groups, 1e-6, 1.0, True)
            bound.check_vjp(gx, gy, None, 1.0)

        @pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e15, 1e17])
        def test_tiny_and_huge_values(self, factor):
            x, _, gy, _, weight, bias, _, groups = case((1, 8, 5, 3, 2), CHANNELS_LAST)
            x = x * factor
            _, y = run(x, weight, bias, groups, 1e-6)
            bound = Bound(x, weight, bias, groups, 1e-6, True)
            bound.check(y)
            bound.check_vjp(module._launch_vjp(x, gy, None, weight, bias, groups, 1e-6, 1.0, True), gy, None, 1.0)

        def test_saturated_silu(self):
            x, _, gy, _, _, bias, _, groups = case((1, 8, 5, 3, 2), CHANNELS_LAST)
            weight = torch.full((8,), 300.0)
            _, y = run(x, weight, bias, groups, 1e-6)
            bound = Bound(x, weight, bias, groups, 1e-6, True)
            assert float(bound.a.min()) < -200 and float(bound.a.max()) > 200
            bound.check(y)
            bound.check_vjp(module._launch_vjp(x, gy, None, weight, bias, groups, 1e-6, 1.0, True), gy, None, 1.0)

        @pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
        def test_nan_and_overflow_stay_in_their_group(self, value):
            x, _, gy, _, weight, bias, _, groups = case((2, 12, 5, 3, 3), CHANNELS_LAST)
            clean = run(x, weight, bias, groups, 1e-6)[1]
            clean_vjp = module._launch_vjp(x, gy, None, weight, bias, groups, 1e-6, 1.0, True)
            x[1, 5, 2, 1] = value
            _, y = run(x, weight, bias, groups, 1e-6)
            gx = module._launch_vjp(x, gy, None, weight, bias, groups, 1e-6, 1.0, True)
            for found, wanted in ((y, clean), (gx, clean_vjp)):
                assert bool(found[1, 4:8].isnan().all())
                assert_same_bits(found[0], wanted[0])
                assert_same_bits(found[1, :4], wanted[1, :4])
                assert_same_bits(found[1, 8:], wanted[1, 8:])

        @LAYOUTS
        def test_an_image_has_the_same_bits_in_every_batch(self, layout):
            x, residual, gy, gh, weight, bias, image_bias, groups = case((3, 8, 5, 3, 2), layout)

            def both(images):
                added = dict(image_bias=image_bias[images], residual=residual[images], scale=ROOT_HALF)
                h, y = run(x[images], weight, bias, groups, 1e-6, **added)
                gx = module._launch_vjp(h, gy[images], gh[images], weight, bias, groups, 1e-6, ROOT_HALF, True)
                return h, y, gx

            together = both(slice(0, 3))
            for i in range(3):
                for found, wanted in zip(both(slice(i, i + 1)), together, strict=True):
                    assert_same_bits(found[0], wanted[i])

        @pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)], ids=str)
        def test_no_images(self, shape):
            x, word = torch.empty(shape), torch.ones(8)
            for added in ({}, dict(residual=x)):
                h, y = run(x, word, word, 2, 1e-6, **added)
                assert h.shape == y.shape == x.shape
            assert module._launch_statistics(x, None, None, 2, 1e-6, 1.0)[1].shape == (shape[0], 3, 2)
            assert module._launch_vjp(x, x, x, word, word, 2, 1e-6, 1.0, True).shape == x.shape
