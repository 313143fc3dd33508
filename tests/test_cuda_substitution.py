"""This project's kernels in flat graphs: the same values, the right operations replaced, nothing left over."""

import pytest
import torch
import torch.nn.functional as F
from conftest import small_score
from cpu_networks import GRAPHS, Net, conv, network
from flat_networks import EPS, Functions, assert_close, copied, counts, dead, flat, frozen, images
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from coupfast.engine.cuda.halves import split
from coupfast.engine.cuda.substitution import CONTIGUOUS, INSIDE, LIBRARY, fuse_kernels
from coupfast.engine.cuda.traced import TracedScore
from coupfast.tracing import trace
from coupfast_kernels.convolution.gpu import ALGORITHMS


def every(*shape):
    return "ieee"


def wide(batch, in_channels, out_channels, height, width):
    return "ieee" if in_channels > 3 and out_channels > 3 else LIBRARY


def none(*shape):
    return LIBRARY


def linear(n, out):
    return nn.Linear(n, out)


def _image_bias(n, x):
    h = n["a"](x)
    time = n["t"](x.mean(dim=(2, 3)))
    h = n["b"](F.silu(n["norm"](h))) + time[:, :, None, None]
    return n["c"](F.silu(n["norm2"](h)))


def _image_bias_and_residual(n, x):
    h = n["a"](x)
    time = n["t"](x.mean(dim=(2, 3)))
    return n["c"]((n["b"](F.silu(h)) + time[:, :, None, None] + h) / 2**0.5)


def _residual_after(n, x):
    """The residual is made after the convolution that it is added to."""
    h = n["a"](x)
    return n["c"](F.silu(h + n["b"](torch.tanh(x))))


def _two_convolutions_added(n, x):
    return n["c"](n["a"](x) + n["b"](x))


def _several_readers(n, x):
    """A sum and its scale in front of a norm, read by a norm, a convolution and a sum."""
    h = (n["a"](x) + n["b"](x)) / 2**0.5
    g = n["c"](F.silu(n["norm"](h)))
    return n["d"](h) + (g + h) * 0.5


def _sum_with_several_readers(n, x):
    """The sum itself is read, too, so that scaling it needs a pass of its own."""
    total = n["a"](x) + n["b"](x)
    return n["c"](F.silu(n["norm"](total * 0.5))) + total


def _statistics(n, x):
    h = n["a"](x)
    y, mean, _ = torch.native_group_norm(h, n["norm"].weight, n["norm"].bias, len(h), 8, h[0, 0].numel(), 4, 1e-5)
    return n["b"](F.silu(y)) + mean.mean(dim=1)[:, None, None, None]


def _normalised_twice(n, x):
    y = n["norm"](n["a"](x))
    return n["b"](F.silu(y)) + n["c"](y)


def _normed_and_read_again(n, x):
    y = F.silu(n["norm"](n["a"](x)))
    return n["b"](y) + y


def _normed_beside(n, x):
    """What is normed is added to a convolution of something else."""
    h = n["a"](x)
    return n["c"](n["b"](h) + F.silu(n["norm"](torch.tanh(h))))


def _tokens(n, x):
    h = n["a"](x)
    return n["b"](n["norm"](h.flatten(2)).view(h.shape))


def _pixels(n, x):
    h = n["a"](x).mean(dim=(2, 3), keepdim=True)
    return n["c"](F.silu(n["norm"](n["b"](h) + h)))


def _mask(n, x):
    return n["c"](n["b"](n["a"](x)) + (torch.tanh(n["a"](x)) > 0))


def _bias_of_all_channels(n, x):
    h = n["a"](x)
    bias = n["t"](torch.ones(1, 1, device=x.device))[:, :, None, None].expand(*h.shape[:2], 1, 1)
    return n["b"](F.silu(n["norm"](torch.tanh(h) + bias)))


def _bias_by_columns(n, x):
    h = n["a"](x)
    bias = (n["t"].weight @ x.mean(dim=(2, 3)).t()).t()[:, :, None, None]  # (batch, channels), images side by side
    return n["b"](F.silu(n["norm"](torch.tanh(h) + bias))) + bias


def _shared_bias(n, x):
    h = n["a"](x)
    time = n["t"](torch.ones(1, 3, device=x.device))[:, :, None, None].expand(len(x), -1, 1, 1)
    return n["b"](F.silu(n["norm"](torch.tanh(h) + time)))


def _one_row(n, x):
    return n["c"](F.silu(n["b"](F.silu(n["norm"](n["a"](x))))))


def _scaled_back(n, x):
    return n["b"](n["a"](x) * 3.0 / 7.0 + 0.25)


def abcd(**more):
    return {"a": conv(3, 8), "b": conv(8, 8), "c": conv(8, 5), "norm": norm()} | more


def norm(channels=8, groups=4, **options):
    return nn.GroupNorm(groups, channels, **options)


#: name → (layers, forward, image size, convolutions replaced forward, norms replaced forward)
SPECIAL = {
    "image bias": (lambda: abcd(t=linear(3, 8), norm2=norm()), _image_bias, 8, 3, 2),
    "image bias and residual": (lambda: abcd(t=linear(3, 8)), _image_bias_and_residual, 8, 3, 0),
    "residual after": (lambda: abcd(b=conv(3, 8)), _residual_after, 8, 3, 0),
    "two convolutions added": (lambda: abcd(b=conv(3, 8)), _two_convolutions_added, 8, 3, 0),
    "several readers": (lambda: abcd(b=conv(3, 8), c=conv(8, 8), d=conv(8, 8, 1)), _several_readers, 8, 3, 1),
    "sum with several readers": (lambda: abcd(b=conv(3, 8, 1), c=conv(8, 8)), _sum_with_several_readers, 8, 2, 1),
    "statistics": (lambda: abcd(), _statistics, 8, 2, 0),
    "normalised twice": (lambda: abcd(c=conv(8, 8)), _normalised_twice, 8, 3, 1),
    "normed and read again": (lambda: abcd(), _normed_and_read_again, 8, 2, 1),
    "normed beside": (lambda: abcd(), _normed_beside, 8, 3, 1),
    "tokens": (lambda: abcd(), _tokens, 8, 2, 0),
    "pixels": (lambda: abcd(norm=norm(groups=1)), _pixels, 8, 3, 1),
    "a mask": (lambda: abcd(), _mask, 8, 4, 0),
    "norm without weights": (lambda: abcd(norm=norm(affine=False)), _one_row, 8, 3, 0),
    "odd maps": (lambda: abcd(), _one_row, (5, 7), 3, 1),
    "one row": (lambda: abcd(), _one_row, (1, 9), 3, 1),
    "one pixel": (lambda: abcd(norm=norm(groups=1)), _one_row, 1, 3, 1),
    "a bias of all channels": (lambda: abcd(t=linear(1, 1)), _bias_of_all_channels, 8, 2, 1),
    "a bias by columns": (lambda: abcd(t=linear(3, 8)), _bias_by_columns, 8, 2, 1),
    "a bias of all images": (lambda: abcd(t=linear(3, 8)), _shared_bias, 8, 2, 1),
    "scales and a number": (lambda: abcd(), _scaled_back, 8, 2, 0),
    "reflected padding": (lambda: abcd(b=conv(8, 8, padding_mode="reflect")), _one_row, 8, 2, 1),
    "same padding": (lambda: abcd(b=conv(8, 8, padding="same")), _one_row, 8, 3, 1),
}


def special(name):
    layers, forward, *_ = SPECIAL[name]
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return frozen(Net(layers(), forward))


def is_3x3(module):
    options = (module.stride, module.dilation, module.groups) if isinstance(module, nn.Conv2d) else None
    return options == ((1, 1), (1, 1), 1) and module.kernel_size == (3, 3) and module.padding in ((1, 1), "same")


class TestSpecialNetworks:
    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("name", SPECIAL)
    def test_agrees_with_autograd(self, name, batch):
        net, (*_, size, convolutions, norms) = Functions(special(name)), SPECIAL[name]
        x = images(batch, size=size)
        for kind, (graph, arguments) in net.both(x).items():
            (expected,) = getattr(net, kind)(*arguments, *net.constants)
            before = counts(graph)
            for choose, with_norms in ((every, True), (wide, True), (every, False), (None, True)):
                fused = copied(graph)
                fuse_kernels(fused, choose, norms=with_norms)
                assert_close(fused(*arguments)[0], expected)
                assert not dead(fused)
                found = counts(fused)
                assert found["conv3x3"] == 0 or choose is not None
                if kind == "forward":
                    if choose is every:
                        assert found["conv3x3"] == convolutions
                    assert found["group_norm_silu"] == (norms if with_norms else 0)
                    products = sum(found[name] - before[name] for name in ("addmm", "mm"))
                    assert found["conv3x3"] + found["convolution"] + products == before["convolution"]
                    assert found["group_norm_silu"] + found["native_group_norm"] == before["native_group_norm"]


def test_a_map_that_is_written_over():
    """A convolution's input is no longer there when what it is added to is ready; the kernel stands where the sum did."""

    def function(x, weight):
        z = x + 1.0
        h = F.conv2d(z, weight, padding=1)
        z.mul_(0.25)
        return (h + torch.tanh(z),)

    x, weight = images(2, channels=8), torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    graph = flat(function, (x,), [weight])
    fuse_kernels(graph, every, norms=True)
    assert counts(graph)["conv3x3"] == 1
    assert_close(graph(x)[0], function(x, weight)[0])


@pytest.mark.parametrize("on", ["cpu", "gpu"])
@pytest.mark.parametrize("name", GRAPHS)
def test_ordinary_networks(name, on):
    """In the forward direction exactly the 3 x 3 convolutions and affine norms of maps that the network calls; in the other all
    that PyTorch has, too."""
    made = network(name)
    calls, ours = [], set()
    net, x = Functions(made), images(1 + len(name) % 3)
    for path, module in made.named_modules():
        if isinstance(module, (nn.Conv2d, nn.GroupNorm)):
            module.register_forward_hook(lambda module, *_: calls.append(module))
        if is_3x3(module):
            ours.add(net.constants[net.names.index(f"{path}.weight")].data_ptr())
    with torch.no_grad():
        made(x)
    convolutions = sum(map(is_3x3, calls)) - (name == "dead ends")
    norms = sum(isinstance(module, nn.GroupNorm) for module in calls)
    place_of_weight = {torch.ops.aten.convolution.default: 1, torch.ops.aten.convolution_backward.default: 2}

    def eligible(graph):
        found = [node for node in graph.operations() if node.target in place_of_weight]
        return sum(graph.constant_of(node.args[place_of_weight[node.target]]).data_ptr() in ours for node in found)

    for kind, (graph, arguments) in net.both(x, on).items():
        (expected,) = getattr(net, kind)(*arguments, *net.constants)
        before = eligible(graph)
        fuse_kernels(graph, every, norms=True)
        assert_close(graph(*arguments)[0], expected)
        assert not dead(graph) and not eligible(graph)
        found = counts(graph)
        if kind == "forward":
            assert (found["conv3x3"], found["group_norm_silu"]) == (convolutions, norms)
        else:
            assert found["group_norm_silu_vjp"] == norms
            # A convolution whose result only PyTorch's transposes read, for its shape, is no longer there.
            assert convolutions <= found["conv3x3"] <= before or name == "a detached part"


class TestContiguousMaps:
    """The library's convolutions on contiguous maps between others on channels last."""

    @pytest.mark.parametrize("on", ["cpu", "gpu"])
    @pytest.mark.parametrize("direction", ["forward", "vjp"])
    def test_same_values_and_formats_outside(self, direction, on):
        functions, x = Functions(frozen(Net(abcd(t=linear(3, 8)), _image_bias_and_residual))), images(2)
        graph, given = functions.both(x, on)[direction]
        expected, formats = graph(*given), []

        class Convolutions(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func in (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default):
                    formats.append([tensor.is_contiguous() for tensor in args[:2]])
                return func(*args, **(kwargs or {}))

        packed = {}
        fuse_kernels(graph, lambda *shape: CONTIGUOUS, norms=False, packed=packed)
        with Convolutions():
            found = graph(*given)
        assert len(formats) >= 3 and all(map(all, formats))
        assert not dead(graph) and {name for *_, name, _ in packed} == {"contiguous"}
        assert_close(found[0], expected[0])
        assert "convolution_backward" not in counts(graph)

    def test_a_transpose_is_the_convolution_that_is_timed(self):
        shapes = []
        functions, x = Functions(frozen(Net(abcd(t=linear(3, 8), norm2=norm()), _image_bias))), images(2)
        graph, _ = functions.both(x)["vjp"]
        fuse_kernels(graph, lambda *shape: shapes.append(shape) or CONTIGUOUS, norms=False, packed={})
        convolutions = [node for node in graph.operations() if node.target is torch.ops.aten.convolution.default]
        made = [(*node.args[0].meta["val"].shape, len(node.args[1].meta["val"])) for node in convolutions]
        assert sorted((b, i, o, h, w) for b, i, h, w, o in made) == sorted(shapes)


class TestNormsInside:
    """Convolutions that norm what they read."""

    #: Of each network: norms that are applied there, of how many.
    NETWORKS = {
        "image bias": (2, 2),
        "several readers": (1, 1),
        "a bias by columns": (1, 1),
        "odd maps": (1, 1),
        "one pixel": (1, 1),
        "normed and read again": (0, 1),
        "normed beside": (0, 1),
        "normalised twice": (0, 1),
        "tokens": (0, 0),
    }

    @staticmethod
    def choice(asked, answer=INSIDE):
        def choose(*shape):
            if len(shape) < 6:
                return "winograd"
            asked.append(shape)
            return answer

        return choose

    @pytest.mark.parametrize("name", NETWORKS)
    def test_same_values_as_apart(self, name):
        net, (inside, norms), (*_, size, _, _) = Functions(special(name)), self.NETWORKS[name], SPECIAL[name]
        x = images(2, size=size)
        for kind, (graph, arguments) in net.both(x).items():
            apart, asked = copied(graph), []
            fuse_kernels(apart, self.choice([], "apart"), norms=True)
            fuse_kernels(graph, self.choice(asked), norms=True)
            found, before = counts(graph), counts(apart)
            assert not dead(graph)
            assert_close(graph(*arguments)[0], apart(*arguments)[0])
            assert found["group_norm_statistics"] == len(asked)
            assert found["conv3x3_normed"] + found["conv3x3"] == before["conv3x3"]
            assert found["group_norm_statistics"] + found["group_norm_silu"] == before["group_norm_silu"]
            assert found["group_norm_silu_vjp"] == before["group_norm_silu_vjp"]
            if kind == "forward":
                assert (found["group_norm_statistics"], before["group_norm_silu"]) == (inside, norms)
            values = [node for node in graph.operations() if node.target is torch.ops.coupfast.conv3x3_normed.default]
            for shape, node in zip(asked, values, strict=True):
                batch, channels, height, width = node.args[0].meta["val"].shape
                groups = node.args[1].meta["val"].shape[2]
                assert shape == (batch, channels, node.meta["val"].shape[1], height, width, groups)

    def test_only_of_what_calibration_says(self):
        """Neither another answer nor another algorithm, of which it is not even asked."""
        net, x = Functions(special("image bias")), images(2)
        for choose in (self.choice([], "apart"), every, lambda *shape: INSIDE if len(shape) == 6 else "ieee-split"):
            graph, arguments = net.both(x)["forward"]
            fuse_kernels(graph, choose, norms=True)
            assert not {"group_norm_statistics", "conv3x3_normed"} & set(counts(graph))
            assert_close(graph(*arguments)[0], net.forward(x, *net.constants)[0])

    def test_what_a_step_keeps_for_its_transpose_stays(self):
        net, x, v, kept = Functions(special("image bias")), images(2), images(2, channels=5, seed=2), []

        def both(x, v, *constants):
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                value = net._call(leaf, constants)
                return value.detach(), torch.autograd.grad(value, leaf, v)[0]

        for answer in (INSIDE, "apart"):
            whole = flat(both, (x, v), net.constants)
            fuse_kernels(whole, self.choice([], answer), norms=True)
            halves = split(whole)
            value, *left = halves.forward(x)
            for found, expected in zip((value, *halves.backward(x, v, *left)), whole(x, v), strict=True):
                assert torch.equal(found, expected)
            kept.append(halves.kept_bytes())
        assert counts(halves.forward)["group_norm_silu"] == 2 and kept[0] == kept[1] > 0

    def test_without_this_projects_norms_there_is_nothing_to_apply(self):
        graph, arguments = Functions(special("image bias")).both(images(2))["forward"]
        asked = []
        fuse_kernels(graph, self.choice(asked), norms=False)
        assert not asked and counts(graph)["native_group_norm"] == 2


class TestProducts:
    """1 x 1 convolutions as matrix products."""

    @pytest.mark.parametrize("on", ["cpu", "gpu"])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("size", [8, (5, 7), 1], ids=str)
    def test_same_values_without_a_copy(self, size, bias, on):
        functions = Functions(frozen(Net({"a": conv(24, 40, 1, bias=bias)}, lambda n, x: n["a"](x))))
        x, products = images(3, channels=24, size=size), {"forward": "addmm" if bias else "mm", "vjp": "mm"}
        weight, *biases = (tensor.double() for tensor in functions.constants)
        for kind, (graph, arguments) in functions.both(x, on).items():
            fuse_kernels(graph, None, norms=False)
            assert counts(graph) == {products[kind]: 1} and not dead(graph)
            given, read = arguments[-1], []

            class Read(TorchDispatchMode):
                def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                    if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                        read.append(args[-2].data_ptr())  # noqa: B023
                    return func(*args, **(kwargs or {}))

            with Read():
                (found,) = graph(*arguments)
            assert read == [given.data_ptr()]
            assert found.is_contiguous(memory_format=torch.channels_last)
            matrix = weight[:, :, 0, 0] if kind == "forward" else weight[:, :, 0, 0].t()
            terms = [given.double().movedim(1, -1), matrix.t()]
            expected, size_of_terms = terms[0] @ terms[1], terms[0].abs() @ terms[1].abs()
            if kind == "forward" and bias:
                expected, size_of_terms = expected + biases[0], size_of_terms + biases[0].abs()
            # A product and a sum for each channel, and the bias's sum: each rounds half a unit of no more than all terms.
            error = (found.double().movedim(1, -1) - expected).abs()
            assert bool((error <= (matrix.shape[1] + 1) * EPS * size_of_terms).all())

    @pytest.mark.parametrize("options", [dict(stride=2), dict(padding=1), dict(groups=2)], ids=str)
    def test_others_are_left(self, options):
        functions = Functions(frozen(Net({"a": nn.Conv2d(4, 6, 1, **options)}, lambda n, x: n["a"](x))))
        for kind, (graph, arguments) in functions.both(images(2, channels=4)).items():
            fuse_kernels(graph, None, norms=False)
            assert counts(graph) == {"convolution" if kind == "forward" else "convolution_backward": 1}
            assert_close(graph(*arguments)[0], getattr(functions, kind)(*arguments, *functions.constants)[0])

    def test_transposed_ones_and_contiguous_maps_are_left(self):
        transposed = Functions(frozen(Net({"a": nn.ConvTranspose2d(4, 6, 1)}, lambda n, x: n["a"](x))))
        graph, (x,) = transposed.both(images(2, channels=4))["forward"]
        fuse_kernels(graph, None, norms=False)
        assert counts(graph) == {"convolution": 1}
        weight = torch.randn(6, 4, 1, 1, generator=torch.Generator().manual_seed(0))
        graph = flat(lambda x, weight: (F.conv2d(x, weight),), (x.contiguous(),), [weight])
        fuse_kernels(graph, None, norms=False)
        assert counts(graph) == {"convolution": 1}


class TestPackedWeights:
    def test_belong_to_all_graphs_of_a_network(self):
        net = Functions(special("image bias"))
        packed = {}
        for graph, _ in net.both(images(2)).values():
            before = graph.varying + len(graph.constants)
            fuse_kernels(graph, every, norms=True, packed=packed)
            nodes = graph.placeholders()
            assert len(nodes) == graph.varying + len(graph.constants)
            for node, constant in zip(nodes[before:], graph.constants[before - graph.varying :], strict=True):
                assert graph.constant_of(node) is constant
                assert any(constant is made for _, made in packed.values())
        # Three convolutions, and their transposes.
        assert sorted(transposed for *_, transposed in packed) == [False] * 3 + [True] * 3

    def test_a_weight_is_not_taken_for_one_that_had_its_address(self):
        """Networks one after the other, each let go before the next is made: their weights are likely to lie in one place."""
        packed = {}
        for seed in range(8):
            weight = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(seed))
            x = images(1, channels=8)
            graph = flat(lambda x, weight: (F.conv2d(x, weight, padding=1),), (x,), [weight])
            fuse_kernels(graph, every, norms=False, packed=packed)
            assert_close(graph(x)[0], F.conv2d(x, weight, padding=1))
            del graph, weight

    def test_each_algorithm_has_its_own(self):
        """One weight taken by several, as calibration may choose for maps of different sizes."""
        weight = torch.randn(16, 16, 3, 3, generator=torch.Generator().manual_seed(0))
        x, packed = images(2, channels=16), {}
        for algorithm in ALGORITHMS:
            graph = flat(lambda x, weight: (F.conv2d(x, weight, padding=1),), (x,), [weight])
            fuse_kernels(graph, lambda *shape, algorithm=algorithm: algorithm, norms=False, packed=packed)
            assert_close(graph(x)[0], F.conv2d(x, weight, padding=1))
            (node,) = (node for node in graph.operations() if node.target is torch.ops.coupfast.conv3x3.default)
            assert node.args[-1] == algorithm
        assert len(packed) == len({algorithm.pack for algorithm in ALGORITHMS.values()}) == 4

    def test_a_weight_and_its_transpose_in_one_place(self):
        weight = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(0))
        x = images(2, channels=8)

        def both(x, a, b):
            return F.conv2d(x, a, padding=1), F.conv2d(x, b, padding=1)

        graph = flat(both, (x,), [weight, weight.transpose(0, 1)])
        fuse_kernels(graph, every, norms=False, packed={})
        for found, expected in zip(graph(x), both(x, *graph.constants[:2]), strict=True):
            assert_close(found, expected)


class Copied(TorchDispatchMode):
    """Shapes of what is copied while it is active."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.clone.default:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("on", ["cpu", "gpu"])
def test_score_network(on):
    """The one that all this is for: every norm, and every 3 x 3 convolution, wherever it was traced."""
    score = small_score(torch.float32).requires_grad_(False)
    labels = torch.tensor([900.0, 500.0, 1.0])
    traced = TracedScore(trace(score, lambda batch: (torch.zeros(batch, 3, 8, 8), labels[:1].expand(batch).clone())), labels)
    calls = []
    for module in score.modules():
        if isinstance(module, (nn.Conv2d, nn.GroupNorm)):
            module.register_forward_hook(lambda module, *_: calls.append(module))
    score(torch.zeros(1, 3, 8, 8), labels[:1])
    convolutions = sum(map(is_3x3, calls))
    norms = sum(isinstance(module, nn.GroupNorm) for module in calls)

    def forward(x, step, *constants):
        with torch.no_grad():
            return (traced(x, step, *constants),)

    def vjp(x, step, v, *constants):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(traced(leaf, step, *constants), leaf, v)

    x, v, step = images(2), images(2, seed=2), torch.tensor(1)
    for function, arguments in ((forward, (x, step)), (vjp, (x, step, v))):
        constants = traced.constants
        graph = flat(function, arguments, constants, on)
        fuse_kernels(graph, every, norms=True)
        found = counts(graph)
        (expected,) = function(*arguments, *constants)
        with Copied() as copied_in_a_run:
            assert_close(graph(*arguments)[0], expected)
        # Of what the time decides there is one row for all images, which kernels read as it is.
        assert not [shape for shape in copied_in_a_run.shapes if len(shape) == 2]
        assert not dead(graph)
        assert not {"native_group_norm", "native_group_norm_backward", "silu_backward"} & set(found)
        if function is forward:
            assert (found["conv3x3"], found["group_norm_silu"]) == (convolutions, norms)
        else:
            assert found["group_norm_silu_vjp"] == norms
            assert found["group_norm_silu"] == norms - 1  # nothing of the last one's output is needed
            assert found["conv3x3"] == 2 * convolutions - 1
