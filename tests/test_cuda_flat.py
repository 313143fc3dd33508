"""Flat graphs: the values of the functions they are traced from, inputs in order, nothing hidden in them."""

import pytest
import torch
import torch.nn.functional as F
from conftest import relu_classifier, silu_classifier, small_score
from cpu_networks import GRAPHS, network
from flat_networks import Functions, assert_close, channels_last, counts, dead, images
from torch import nn

from coupfast.engine.cuda.flat import VIEWS, flatten, fold_constants, writes
from coupfast.engine.cuda.halves import COPIES, split
from coupfast.engine.cuda.substitution import fuse_kernels
from coupfast.engine.cuda.traced import TracedClassifier, TracedScore
from coupfast.guidance import PiecewiseLinearGraph, scaled_logits
from coupfast.tracing import trace


class TestFlatten:
    @pytest.mark.parametrize("name", GRAPHS)
    def test_computes_what_the_function_does(self, name):
        net = Functions(network(name))
        for kind, (graph, arguments) in net.both(images(2)).items():
            (expected,) = getattr(net, kind)(*arguments, *net.constants)
            # The same operations on the same tensors, unless a library chooses by their addresses.
            assert_close(graph(*arguments)[0], expected, roundings=50)
            assert not dead(graph)
            assert not any(writes(node) for node in graph.module.graph.nodes)

    def test_inputs_that_vary_come_first(self):
        x, y, a, b = (torch.randn(2, 2) for _ in range(4))
        graph = flatten(lambda x, y, a, b: (x - 2 * y, a - 2 * b), (x, y), (a, b))
        nodes = graph.placeholders()
        assert [graph.constant_of(node) is c for node, c in zip(nodes, (None, None, a, b), strict=True)] == [True] * 4
        for found, expected in zip(graph(y, x), (y - 2 * x, a - 2 * b), strict=True):
            assert torch.equal(found, expected)

    def test_derivatives_are_traced_in_the_thread_that_asks_for_them(self):
        """Autograd has a thread for each GPU, which sees no trace; a CPU has none, so that here only the switch tells."""
        seen = []

        def function(x):
            seen.append(torch.autograd.is_multithreading_enabled())
            return (x * 2,)

        flatten(function, (torch.ones(2),), ())
        assert seen == [False] and torch.autograd.is_multithreading_enabled()

    def test_a_tensor_given_twice_is_two_inputs(self):
        x = torch.randn(2, 2)
        graph = flatten(lambda x, y, a: (x - 2 * y + 4 * a,), (x, x), (x,))
        y = torch.randn(2, 2)
        assert torch.equal(graph(x, y)[0], x - 2 * y + 4 * x)
        assert torch.equal(graph(y, x)[0], y - 2 * x + 4 * x)

    def test_a_new_constant_is_the_last_input(self):
        x, a, b = (torch.randn(2, 2) for _ in range(3))
        graph = flatten(lambda x, a: (x * a,), (x,), (a,))
        node = graph.add_constant(b)
        assert graph.placeholders()[-1] is node and graph.constant_of(node) is b
        (product,) = graph.operations()
        product.args = (product.args[0], node)
        graph.module.recompile()
        assert torch.equal(graph(x)[0], x * b)

    @pytest.mark.parametrize(
        "function",
        [lambda x: (x * GLOBAL,), lambda x: (x * torch.tensor([1.0, 2.0]),), lambda x: (x @ nn.Parameter(GLOBAL),)],
        ids=["global", "made", "parameter"],
    )
    def test_refuses_a_tensor_that_it_was_not_given(self, function):
        with pytest.raises(
            ValueError, match=r"was not given \(_\w+_constant0, which \w+ reads\); make it a parameter or a buffer"
        ):
            flatten(function, (torch.ones(2, 2),), ())

    @pytest.mark.parametrize(
        "function", [lambda x, a: (x.add_(a),), lambda x, a: (a.mul_(2.0) * x,)], ids=["state", "constant"]
    )
    def test_refuses_to_write_into_what_it_was_given(self, function):
        x, a = torch.ones(2, 2), torch.ones(2, 2)
        with pytest.raises(ValueError, match=r"writes into arg\d_1, which it was given, by aten.copy_"):
            flatten(function, (x,), (a,))
        assert torch.equal(x, a)

    def test_writes_into_nothing(self):
        """Not even into what it made itself: operations can be moved."""

        def function(x, a):
            h = x @ a
            y = h @ a
            h.mul_(2.0)
            h[:, 0].add_(1.0)
            return (y + h,)

        x, a = torch.randn(3, 3), torch.randn(3, 3)
        graph = flatten(function, (x,), (a,))
        assert not any(writes(node) for node in graph.module.graph.nodes)
        assert torch.equal(graph(x)[0], function(x, a)[0])

    def test_counts_what_launches(self):
        graph = flatten(lambda x: (F.relu(x.view(4).unsqueeze(0).transpose(0, 1)) + 1.0,), (torch.randn(2, 2),), ())
        assert len(graph.operations()) == 2
        assert not {node.target for node in graph.operations()} & VIEWS


GLOBAL = torch.ones(2, 2)

CLASSIFIERS = {
    "relu": lambda: relu_classifier(torch.float32).requires_grad_(False),
    **{name: lambda name=name: network(name) for name in ("torchvision", "WideResNet", "DMWideResNet relu")},
}


class TestClassifier:
    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("name", CLASSIFIERS)
    def test_value_and_both_products(self, name, batch):
        classifier = CLASSIFIERS[name]()
        x, v = images(batch), images(batch, seed=2)
        found = PiecewiseLinearGraph.trace(classifier, x)
        assert found is not None
        traced = TracedClassifier(found)
        leaf = x.clone().requires_grad_()
        logits = scaled_logits(classifier, leaf)
        u = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
        (transposed,) = torch.autograd.grad(logits, leaf, u)

        constants = traced.constants
        evaluate = flatten(lambda x, *c: traced.evaluate(x, *c), (x,), constants)
        value, *slopes = evaluate(x)
        assert_close(value, logits.detach())
        assert {slope.dtype for slope in slopes} <= {torch.bool, torch.int64}
        count = len(slopes)
        cotangent = flatten(lambda u, *r: (traced.cotangent(x.shape[1:], u, r[:count], *r[count:]),), (u, *slopes), constants)
        tangent = flatten(lambda v, *r: (traced.tangent(v, r[:count], *r[count:]),), (v, *slopes), constants)
        assert_close(cotangent(u, *slopes)[0], transposed)
        # No convolution of the zeros that it is the transpose at.
        assert counts(cotangent)["convolution"] == 0 < counts(cotangent)["convolution_backward"]
        (product,) = tangent(v, *slopes)
        # ⟨u, J v⟩ = ⟨Jᵀu, v⟩, image by image.
        left, right = (u.double() * product).sum(1), (transposed.double() * v).flatten(1).sum(1)
        scale = float(transposed.flatten(1).norm(dim=1).max() * v.flatten(1).norm(dim=1).max())
        torch.testing.assert_close(left, right, rtol=0, atol=300 * torch.finfo(torch.float32).eps * scale)

    def test_constants_are_made_once(self):
        found = PiecewiseLinearGraph.trace(relu_classifier(torch.float32).requires_grad_(False), images(1))
        traced = TracedClassifier(found)
        assert all(a is b for a, b in zip(traced.constants, traced.constants, strict=True))

    def test_smooth_classifiers_have_none(self):
        assert PiecewiseLinearGraph.trace(silu_classifier(torch.float32), images(1)) is None


class TestScore:
    def traced(self, score, labels):
        return TracedScore(trace(score, lambda batch: (torch.zeros(batch, 3, 8, 8), labels[:1].expand(batch).clone())), labels)

    @pytest.mark.parametrize("batch", [1, 2])
    def test_every_step_has_its_own_label(self, batch):
        score, labels = small_score(torch.float32).requires_grad_(False), torch.tensor([900.0, 500.0, 1.0])
        traced, x = self.traced(score, labels), images(batch)
        graph = flatten(lambda x, step, *c: (traced(x, step, *c),), (x, torch.tensor(0)), traced.constants)
        for step, label in enumerate(labels):
            expected = score(x, label.expand(batch))
            assert_close(graph(x, torch.tensor(step))[0], expected)
        # All that depends on the label alone is in the tables.
        assert not any("sin" in str(node.target) or "cos" in str(node.target) for node in graph.operations())

    def test_a_step_that_the_table_lacks_is_no_other_step(self):
        traced = self.traced(small_score(torch.float32).requires_grad_(False), torch.tensor([900.0, 1.0]))
        with pytest.raises((IndexError, RuntimeError), match="out of range"):
            traced(images(1), torch.tensor(2), *traced.constants)

    def test_a_network_without_labels_has_no_tables(self):
        net, x = nn.Conv2d(3, 3, 3, padding=1).requires_grad_(False), images(2)
        traced = self.traced(lambda x, labels: net(x), torch.tensor([900.0, 1.0]))
        assert not traced.tables
        assert_close(traced(x, torch.tensor(1), *traced.constants), net(x))

    def test_images_in_another_axis(self):
        """A value of the labels that is (1, batch) cannot be found for one image and read by others."""

        def score(x, labels):
            return (x.flatten(1).t() * torch.exp(labels[None])).t().view(x.shape)

        with pytest.raises(ValueError, match="images in another axis than the first"):
            self.traced(score, torch.tensor([0.9, 0.1]))


class TestFolding:
    def test_what_constants_alone_decide_is_found_once(self):
        """For all graphs that have them; not what grows with the batch."""

        def function(x, a, b):
            both = torch.cat([a, b]).t()  # [3, 4]
            return (x @ (both * torch.rsqrt(b.square().sum() + 1.0)) + a.sum(dim=0).repeat(len(x), 2)[:, :4],)

        x, a, b = torch.randn(16, 3), torch.randn(2, 3), torch.randn(2, 3)
        graph, folded = flatten(function, (x,), (a, b)), {}
        expected = graph(x)[0]
        fold_constants(graph, folded)
        assert_close(graph(x)[0], expected)
        assert set(counts(graph)) == {"mm", "repeat", "add"} and not dead(graph)
        results = [result for _, result in folded.values()]
        again = flatten(function, (x,), (a, b))
        fold_constants(again, folded)
        assert len(folded) == len(results) and {id(c) for c in again.constants} <= {id(c) for c in [a, b, *results]}
        other = flatten(function, (x,), (a, 2 * b))
        fold_constants(other, folded)
        assert_close(other(x)[0], function(x, a, 2 * b)[0])

    def test_all_values_of_a_step_are_gathered_at_once(self):
        score, labels = small_score(torch.float32).requires_grad_(False), torch.tensor([900.0, 500.0, 1.0])
        traced, x = TestScore().traced(score, labels), images(1)
        (table,) = traced.tables
        graph = flatten(lambda x, step, *c: (traced(x, step, *c),), (x, torch.tensor(0)), traced.constants)
        assert counts(graph)["index_select"] == 1 and len(table) == 3
        # Where a value begins, four floats can be read at once.
        starts = [node.args[2] for node in graph.module.graph.nodes if node.target is torch.ops.aten.slice.Tensor]
        assert len(starts) > 5 and all(start % 4 == 0 for start in starts)


def test_formats_of_weights():
    """Maps of weights are in channels last, all else is the network's own memory."""
    net = network("torchvision")
    traced = TracedClassifier(PiecewiseLinearGraph.trace(net, images(1)))
    own = {weight.data_ptr() for weight in [*net.parameters(), *net.buffers()]}
    for constant in traced.constants:
        if constant.dim() == 4:
            assert constant.is_contiguous(memory_format=torch.channels_last) and channels_last(constant) is constant
        else:
            assert constant.data_ptr() in own


class TestHalves:
    """A value and its derivative in one graph, and in two."""

    @pytest.mark.parametrize("name", GRAPHS)
    def test_compute_what_the_whole_does(self, name):
        net, x = Functions(network(name)), images(2)

        def both(x, v, *constants):
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                value = net._call(leaf, constants)
                return value.detach(), torch.autograd.grad(value, leaf, v)[0]

        v = channels_last(torch.randn(net.network(x).shape, generator=torch.Generator().manual_seed(2)))
        whole = flatten(both, (x, v), net.constants)
        fuse_kernels(whole, lambda *shape: "ieee", norms=True)
        before = str(whole.module.graph)
        halves = split(whole)
        value, *kept = halves.forward(x)
        (derivative,) = halves.backward(x, v, *kept)
        for found, expected in zip((value, derivative), whole(x, v), strict=True):
            assert torch.equal(found, expected)
        assert str(whole.module.graph) == before
        # Every operation is in one half alone, and what is kept is memory of its own.
        ours = [counts(half) for half in (halves.forward, halves.backward)]
        copies = {str(copy).split(".")[1] for copy in COPIES}
        assert {n: c for n, c in (ours[0] + ours[1]).items() if n not in copies} == {
            n: c for n, c in counts(whole).items() if n not in copies
        }
        assert not dead(halves.forward) and not dead(halves.backward)
        assert halves.kept_bytes() == sum(tensor.nbytes for tensor in kept)
        kept = [tensor for tensor in kept if tensor.numel()]
        memory = {tensor.untyped_storage().data_ptr() for tensor in kept}
        assert len(memory) == len(kept) and x.untyped_storage().data_ptr() not in memory

    def test_of_what_does_not_depend_on_the_input(self):
        x = torch.randn(2, 3)
        halves = split(flatten(lambda x, v, a: (a * 2.0, torch.zeros_like(v)), (x, x), (x.clone(),)))
        value, *kept = halves.forward(x)
        assert not kept and torch.equal(halves.backward(x, x + 1.0)[0], torch.zeros_like(x))
