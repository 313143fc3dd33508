"""This project's kernels in a flat graph, in place of the operations that they do at once.

    silu(GroupNorm((x + image bias + residual) · scale)), and its transpose       `coupfast::group_norm_silu`, `…_vjp`
    (3 × 3 convolution + bias + image bias + residual) · scale, and its transpose `coupfast::conv3x3`
    one behind the other, where that is faster        `coupfast::group_norm_statistics`, `coupfast::conv3x3_normed`

1 × 1 convolutions become matrix products: a map [batch, channels, height, width] in channels last is a matrix
[pixels, channels] as it lies in memory, and cuBLAS adds the bias where cuDNN leaves it to a pass of its own.

The graph computes the same, up to the rounding of sums taken in another order.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from coupfast.engine.cuda.flat import FlatGraph
from coupfast_kernels import group_norm  # noqa: F401  (registers its operators)
from coupfast_kernels.convolution import gpu_normed  # noqa: F401  (registers its operator)
from coupfast_kernels.convolution.gpu import ALGORITHMS

aten = torch.ops.aten

#: (batch, channels in, channels out, height, width) → the library as it is ("library"), the library on contiguous maps
#: ("library-contiguous"), or the algorithm of `coupfast_kernels`' `conv3x3` to take. With the groups of a norm behind these,
#: where that algorithm can norm what it reads: whether it does so ("inside").
Conv3x3Choice = Callable[..., str]
LIBRARY, CONTIGUOUS, INSIDE = "library", "library-contiguous", "inside"
#: (address, shape, strides, name of what packed it, whether transposed) → weight and packed weight. The weight is kept since
#: its address is its name: were it let go, another one could have the address next.
PackedWeights = dict[tuple[int, torch.Size, tuple[int, ...], str, bool], tuple[torch.Tensor, torch.Tensor]]

#: What this project's operators return is in channels last.
_OPERATORS = {
    torch.ops.coupfast.group_norm_silu.default,
    torch.ops.coupfast.group_norm_silu_vjp.default,
    torch.ops.coupfast.conv3x3.default,
    torch.ops.coupfast.group_norm_statistics.default,
    torch.ops.coupfast.conv3x3_normed.default,
}


def fuse_kernels(graph: FlatGraph, choose: Conv3x3Choice | None, *, norms: bool, packed: PackedWeights | None = None) -> None:
    """Replace what can be replaced, in place.

    Args:
        choose: Which convolutions; None replaces none.
        norms: Whether to replace group norms.
        packed: Packed weights, shared between graphs of the same networks; filled.
    """
    if choose is not None:
        _Convolutions(graph, choose, {} if packed is None else packed).replace()
    if norms:
        _Norms(graph).replace()
    if norms and choose is not None:
        _NormsInside(graph, choose).replace()
    _Products(graph).replace()
    _LibraryNorms(graph).guard()
    graph.module.graph.eliminate_dead_code()
    graph.module.graph.lint()
    graph.module.recompile()


class _Pass:
    def __init__(self, graph: FlatGraph) -> None:
        self.flat = graph
        self.graph = graph.module.graph
        self.order = {node: index for index, node in enumerate(self.graph.nodes)}

    def value(self, node: fx.Node) -> torch.Tensor:
        return node.meta["val"]

    def call(self, place: fx.Node, target: Any, args: tuple, value: Any, kwargs: dict | None = None) -> fx.Node:
        """A new operation just before `place`, in its stead in the order."""
        with self.graph.inserting_before(place):
            node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = value
        self.order[node] = self.order[place]
        return node

    def item(self, node: fx.Node, index: int, value: Any) -> fx.Node:
        with self.graph.inserting_after(node):
            item = self.graph.call_function(operator.getitem, (node, index))
        item.meta["val"] = value
        self.order[item] = self.order[node]
        return item

    def kernel(self, place: fx.Node, target: Any, args: tuple, value: Any) -> fx.Node:
        """One of this project's operators, which read and write maps in channels last."""
        args = tuple(self.channels_last(place, argument) if self.is_image(argument) else argument for argument in args)
        if value is not None:
            value = value.contiguous(memory_format=torch.channels_last)
        return self.call(place, target, args, value)

    def channels_last(self, place: fx.Node, node: fx.Node) -> fx.Node:
        """Which the value may have turned out to be already: strides that a trace predicts are not always those of a run."""
        producer: Any = node.args[0] if node.target is operator.getitem else node
        if producer.target in _OPERATORS:
            return node
        value = self.value(node).contiguous(memory_format=torch.channels_last)
        return self.call(place, aten.contiguous.default, (node,), value, {"memory_format": torch.channels_last})

    def is_image(self, node: Any) -> bool:
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        return isinstance(value, torch.Tensor) and value.dim() == 4 and value.dtype == torch.float32

    def is_image_bias(self, node: Any, like: torch.Tensor) -> bool:
        return self.is_image(node) and tuple(self.value(node).shape) == (*like.shape[:2], 1, 1) and like.shape[2:] != (1, 1)

    def flat_bias(self, place: fx.Node, bias: fx.Node) -> fx.Node:
        """(batch, channels) of (batch, channels, 1, 1), contiguous; (1, channels) where one row serves all."""
        if bias.target is aten.expand.default:
            row: Any = bias.args[0]
            if self.is_image(row) and self.value(row).shape[1] == self.value(bias).shape[1]:
                bias = row
        value = self.value(bias)[:, :, 0, 0].contiguous()
        rows = self.call(place, aten.reshape.default, (bias, list(value.shape)), value)
        return self.call(place, aten.contiguous.default, (rows,), value)


def _number(argument: Any) -> float | None:
    return float(argument) if isinstance(argument, (int, float)) and not isinstance(argument, bool) and argument != 0 else None


def _scaling(node: fx.Node) -> float | None:
    """The factor of a product with, or quotient by, a number."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor) or node.kwargs or len(node.args) != 2:
        return None
    number = _number(node.args[1])
    if number is None:
        return None
    return number if node.target is aten.mul.Tensor else 1.0 / number


def _original(node: Any) -> Any:
    """What a node is a copy of in another memory format, if it is one: this project's operators make what copies they need."""
    while isinstance(node, fx.Node) and node.target in (aten.clone.default, aten.contiguous.default):
        node = node.args[0]
    return node


def _sum(node: fx.Node) -> tuple[Any, Any] | None:
    return node.args if node.target is aten.add.Tensor and not node.kwargs and len(node.args) == 2 else None  # type: ignore[return-value]


def _added_to(node: fx.Node, user: fx.Node) -> Any:
    """What a user of a node adds to it; None if it is no sum, or one of the node with itself."""
    terms = _sum(user)
    if terms is None or terms[0] is terms[1]:
        return None
    return terms[1] if terms[0] is node else terms[0]


class _Convolutions(_Pass):
    def __init__(self, graph: FlatGraph, choose: Conv3x3Choice, packed: PackedWeights) -> None:
        super().__init__(graph)
        self.choose, self.packed = choose, packed
        self._nodes: dict[Any, fx.Node] = {}

    def replace(self) -> None:
        for node in list(self.graph.nodes):
            if node.target is aten.convolution.default:
                self._forward(node)
            elif node.target is aten.convolution_backward.default:
                self._transpose(node)

    def _is_3x3(self, weight: torch.Tensor | None, options: tuple) -> bool:
        stride, padding, dilation, transposed, _, groups = options
        return bool(
            weight is not None
            and weight.dim() == 4
            and weight.dtype == torch.float32
            and tuple(weight.shape[2:]) == (3, 3)
            and set(stride) == {1}
            and set(padding) == {1}
            and set(dilation) == {1}
            and not transposed
            and groups == 1
        )

    def _forward(self, node: fx.Node) -> None:
        arguments: Any = node.args
        x, weight, bias, *options = arguments
        constant = self.flat.constant_of(weight)
        if not self.is_image(x) or not self._is_3x3(constant, tuple(options)):
            return
        assert isinstance(x, fx.Node) and constant is not None
        batch, _, height, width = self.value(x).shape
        choice = self.choose(batch, constant.shape[1], constant.shape[0], height, width)
        if choice == LIBRARY:
            return
        if choice == CONTIGUOUS:
            node.replace_all_uses_with(self._on_contiguous_maps(node, x, weight, bias, transposed=False))
            return
        image_bias, residual, scale, last = None, None, 1.0, node
        while len(last.users) == 1:
            (user,) = last.users
            other, factor = _added_to(last, user), _scaling(user)
            if factor is not None and user.args[0] is last:
                scale *= factor
            elif other is not None and scale == 1.0:
                if image_bias is None and residual is None and self.is_image_bias(other, self.value(node)):
                    image_bias = other
                elif residual is None and self.is_image(other) and self.value(other).shape == self.value(node).shape:
                    residual = other
                else:
                    break
            else:
                break
            last = user
        # Where the last of the epilogue stands, everything that it reads is there.
        flat_bias = None if image_bias is None else self.flat_bias(last, image_bias)
        packed = self._packed(weight, constant, choice, transposed=False)
        args = (x, packed, None, bias, flat_bias, residual, scale, choice)
        new = self.kernel(last, torch.ops.coupfast.conv3x3.default, args, self.value(last))
        last.replace_all_uses_with(new)

    def _transpose(self, node: fx.Node) -> None:
        arguments: Any = node.args
        gy, x, weight, _, *options, mask = arguments
        constant = self.flat.constant_of(weight)
        if list(mask) != [True, False, False] or not self._is_3x3(constant, tuple(options)):
            return
        assert isinstance(x, fx.Node) and constant is not None
        batch, _, height, width = self.value(x).shape
        choice = self.choose(batch, constant.shape[0], constant.shape[1], height, width)
        if choice == LIBRARY:
            return
        if choice == CONTIGUOUS:
            new = self._on_contiguous_maps(node, gy, weight, None, transposed=True)
        else:
            packed = self._packed(weight, constant, choice, transposed=True)
            args = (gy, packed, None, None, None, None, 1.0, choice)
            new = self.kernel(node, torch.ops.coupfast.conv3x3.default, args, self.value(x))
        for item in list(node.users):
            item.replace_all_uses_with(new)
            self.graph.erase_node(item)
        self.graph.erase_node(node)

    def _on_contiguous_maps(self, place: fx.Node, x: Any, weight: Any, bias: Any, *, transposed: bool) -> fx.Node:
        """The library's convolution there, its result in channels last; the transpose as the convolution that was timed."""
        constant = self.flat.constant_of(weight)
        assert constant is not None
        turned = self._packed(weight, constant, CONTIGUOUS, transposed=transposed)
        batch, _, height, width = self.value(x).shape
        value = self.value(x).new_empty(batch, constant.shape[1 if transposed else 0], height, width)
        given = self.call(place, aten.contiguous.default, (x,), self.value(x).contiguous())
        arguments = (given, turned, bias, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
        result = self.call(place, aten.convolution.default, arguments, value)
        last = {"memory_format": torch.channels_last}
        return self.call(place, aten.contiguous.default, (result,), value.contiguous(**last), last)

    def _packed(self, weight: Any, constant: torch.Tensor, choice: str, *, transposed: bool) -> fx.Node:
        pack = torch.Tensor.contiguous if choice == CONTIGUOUS else ALGORITHMS[choice].pack
        if (weight, pack, transposed) not in self._nodes:
            key = (constant.data_ptr(), constant.shape, constant.stride(), pack.__name__, transposed)
            if key not in self.packed:
                turned = constant.flip(2, 3).transpose(0, 1) if transposed else constant
                self.packed[key] = constant, pack(turned.contiguous())
            self._nodes[weight, pack, transposed] = self.flat.add_constant(self.packed[key][1])
        return self._nodes[weight, pack, transposed]


class _Norms(_Pass):
    def replace(self) -> None:
        nodes = list(self.graph.nodes)
        for node in nodes:
            if node.target is aten.native_group_norm_backward.default:
                self._transpose(node)
        for node in nodes:
            if node.target is aten.native_group_norm.default:
                self._forward(node)

    def _transpose(self, node: fx.Node) -> None:
        arguments: Any = node.args
        gy, x, mean, _, weight, _, _, _, groups, mask = arguments
        assert isinstance(mean, fx.Node)
        norm = mean.args[0] if mean.target is operator.getitem else None
        # Where the trace is of a GPU, PyTorch's formula makes both maps contiguous before it calls its kernel.
        gy, x = _original(gy), _original(x)
        if list(mask) != [True, False, False] or not isinstance(norm, fx.Node) or weight is None:
            return
        if norm.target is not aten.native_group_norm.default or not self.is_image(x) or norm.args[2] is None:
            return
        if x is not _original(norm.args[0]):
            return
        silu = isinstance(gy, fx.Node) and gy.target is aten.silu_backward.default and self._is_output(gy.args[1], norm)
        if silu:
            gy = gy.args[0]
        place, gh = node, None
        (item,) = node.users
        if len(item.users) == 1:
            (user,) = item.users
            other = _added_to(item, user)
            if self.is_image(other) and self.value(other).shape == self.value(x).shape:
                gh, place, item = other, user, user
        args = (x, gy, gh, weight, norm.args[2], groups, norm.args[7], 1.0, bool(silu))
        new = self.kernel(place, torch.ops.coupfast.group_norm_silu_vjp.default, args, self.value(x))
        item.replace_all_uses_with(new)
        self.graph.erase_node(item)
        if place is not node:
            for left in list(node.users):
                self.graph.erase_node(left)
        self.graph.erase_node(node)
        self.graph.eliminate_dead_code()  # so that the forward's norm has one reader again

    def _is_output(self, node: Any, norm: fx.Node) -> bool:
        return isinstance(node, fx.Node) and node.target is operator.getitem and node.args == (norm, 0)

    def _forward(self, node: fx.Node) -> None:
        if len(node.users) != 1:  # its statistics are read
            return
        arguments: Any = node.args
        x, weight, bias, _, _, _, groups, eps = arguments
        x = _original(x)
        if weight is None or bias is None or not self.is_image(x):
            return
        (item,) = node.users
        if item.args[1] != 0:
            return
        users = list(item.users)
        silu = len(users) == 1 and users[0].target is aten.silu.default
        last = users[0] if silu else item
        assert isinstance(x, fx.Node)
        base, image_bias, residual, scale = self._in_front(x)
        value = self.value(x)
        place = node if base is x else x
        if base is not x and any(self.order[argument] > self.order[x] for argument in (weight, bias)):
            base, image_bias, residual, scale, place = x, None, None, 1.0, node
        flat_bias = None if image_bias is None else self.flat_bias(place, image_bias)
        args = (base, weight, bias, flat_bias, residual, groups, eps, scale, silu)
        new = self.kernel(place, torch.ops.coupfast.group_norm_silu.default, args, None)
        value = value.contiguous(memory_format=torch.channels_last)
        last.replace_all_uses_with(self.item(new, 1, value))
        if base is not x:
            x.replace_all_uses_with(self.item(new, 0, value))

    def _in_front(self, x: fx.Node) -> tuple[fx.Node, fx.Node | None, fx.Node | None, float]:
        """What is added to and multiplied on the way into the norm: its kernel reads x once anyway."""
        base, scale = x, 1.0
        factor = _scaling(base)
        if factor is not None and isinstance(base.args[0], fx.Node):
            below = base.args[0]
            if _sum(below) is not None and len(below.users) == 1:
                base, scale = below, factor
        terms = _sum(base)
        if terms is None:
            return x, None, None, 1.0
        first, second = terms
        if self.is_image_bias(second, self.value(x)) and self.is_image(first):
            return first, second, None, scale
        if self.is_image(first) and self.is_image(second) and self.value(first).shape == self.value(second).shape:
            return first, None, second, scale
        return x, None, None, 1.0


class _NormsInside(_Pass):
    """Norms whose results nothing but convolutions reads, each of which can apply them to what it reads, and is faster so."""

    def __init__(self, graph: FlatGraph, choose: Conv3x3Choice) -> None:
        super().__init__(graph)
        self.choose = choose

    def replace(self) -> None:
        self.graph.eliminate_dead_code()  # what has been replaced still reads
        for node in list(self.graph.nodes):
            if node.target is torch.ops.coupfast.group_norm_silu.default:
                self._norm(node)

    def _norm(self, node: fx.Node) -> None:
        arguments: Any = node.args
        x, weight, bias, image_bias, residual, groups, eps, scale, silu = arguments
        normed = [item for item in node.users if item.args[1] == 1]
        convolutions = [reader for item in normed for reader in self._readers(item)]
        if not silu or not convolutions or not all(self._is_faster(reader, normed, groups) for reader in convolutions):
            return
        statistics = torch.ops.coupfast.group_norm_statistics.default
        made = self.call(node, statistics, (x, image_bias, residual, groups, eps, scale), None)
        values = self.item(made, 1, self.value(x).new_empty(len(self.value(x)), 3, groups))
        h = x
        if image_bias is not None or residual is not None or scale != 1.0:
            h = self.item(made, 0, self.value(x).contiguous(memory_format=torch.channels_last))
            for item in [item for item in node.users if item.args[1] == 0]:
                item.replace_all_uses_with(h)
        for reader in convolutions:
            _, packed, _, *others = reader.args
            target = torch.ops.coupfast.conv3x3_normed.default
            new = self.call(reader, target, (h, values, weight, bias, packed, *others), self.value(reader))
            reader.replace_all_uses_with(new)
            self.graph.erase_node(reader)

    def _readers(self, node: fx.Node) -> list[fx.Node]:
        """Those of its copies in another memory format, too, which this project's operators do not need."""
        found: list[fx.Node] = []
        for user in node.users:
            found += self._readers(user) if _original(user) is not user else [user]
        return found

    def _is_faster(self, node: fx.Node, normed: list[fx.Node], groups: int) -> bool:
        if node.target is not torch.ops.coupfast.conv3x3.default:
            return False
        arguments: Any = node.args
        x, _, _, _, _, residual, _, algorithm = arguments
        # What is normed on its way into the sum exists nowhere as a residual, its own or another convolution's.
        if ALGORITHMS[algorithm].way != "winograd" or _original(x) not in normed or _original(residual) in normed:
            return False
        batch, channels, height, width = self.value(x).shape
        return self.choose(batch, channels, self.value(node).shape[1], height, width, groups) == INSIDE


class _Products(_Pass):
    """1 × 1 convolutions of maps in channels last; of others a product would have to copy the map first."""

    def replace(self) -> None:
        for node in list(self.graph.nodes):
            if node.target is aten.convolution.default:
                x, weight, bias, *options = node.args
                if self._is_1x1(x, weight, options):
                    node.replace_all_uses_with(self._product(node, x, weight, bias, transposed=False))
            elif node.target is aten.convolution_backward.default:
                gy, _, weight, _, *options, mask = node.args
                if list(mask) == [True, False, False] and self._is_1x1(gy, weight, options):
                    new = self._product(node, gy, weight, None, transposed=True)
                    for item in list(node.users):
                        item.replace_all_uses_with(new)
                        self.graph.erase_node(item)
                    self.graph.erase_node(node)

    def _is_1x1(self, x: Any, weight: Any, options: Sequence[Any]) -> bool:
        stride, padding, _, transposed, _, groups = options  # whatever the dilation, there is nothing to dilate
        return (
            self.is_image(x)
            and self.value(x).is_contiguous(memory_format=torch.channels_last)
            and tuple(self.value(weight).shape[2:]) == (1, 1)
            and set(stride) == {1}
            and set(padding) == {0}
            and not transposed
            and groups == 1
        )

    def _product(self, place: fx.Node, x: Any, weight: Any, bias: Any, *, transposed: bool) -> fx.Node:
        batch, channels, height, width = self.value(x).shape
        out = self.value(weight).shape[1 if transposed else 0]
        rows = self._view(place, self.channels_last(place, x), aten.permute.default, [0, 2, 3, 1])
        rows = self._view(place, rows, aten.reshape.default, [batch * height * width, channels])
        matrix = self._view(place, weight, aten.reshape.default, list(self.value(weight).shape[:2]))  # [out, in] of the network
        if not transposed:
            matrix = self._view(place, matrix, aten.permute.default, [1, 0])
        value = self.value(x).new_empty(batch * height * width, out)
        target, args = (aten.mm.default, (rows, matrix)) if bias is None else (aten.addmm.default, (bias, rows, matrix))
        result = self.call(place, target, args, value)
        result = self._view(place, result, aten.reshape.default, [batch, height, width, out])
        return self._view(place, result, aten.permute.default, [0, 3, 1, 2])

    def _view(self, place: fx.Node, node: fx.Node, target: Any, shape: list[int]) -> fx.Node:
        return self.call(place, target, (node, shape), target(self.value(node), shape))


class _LibraryNorms(_Pass):
    """Group norms that stay with PyTorch, whose kernels for GPUs want contiguous maps."""

    def guard(self) -> None:
        for node in list(self.graph.nodes):
            if node.target in (aten.native_group_norm.default, aten.native_group_norm_backward.default):
                maps = 1 if node.target is aten.native_group_norm.default else 2
                node.args = (*(self._contiguous(node, argument) for argument in node.args[:maps]), *node.args[maps:])
                for item in list(node.users):
                    if item.args[1] == 0:
                        self._restore(item)

    def _contiguous(self, place: fx.Node, node: Any) -> fx.Node:
        return self.call(place, aten.contiguous.default, (node,), self.value(node).contiguous())

    def _restore(self, item: fx.Node) -> None:
        """The strides that what follows was traced with."""
        value = self.value(item)
        if value.is_contiguous() or not value.is_contiguous(memory_format=torch.channels_last):
            return
        with self.graph.inserting_after(item):
            clone = self.graph.call_function(aten.contiguous.default, (item,), {"memory_format": torch.channels_last})
        clone.meta["val"] = value
        item.replace_all_uses_with(clone, delete_user_cb=lambda user: user is not clone)
