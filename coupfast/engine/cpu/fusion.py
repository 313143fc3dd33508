"""Which operations of a trace become one: convolutions with what stands around them, attention, concatenations, the rest."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from coupfast.engine.cpu.attention import attentions
from coupfast.engine.cpu.parts import Attention, Concatenation, Convolution, FusedNetwork, GroupNorm, Part, Region
from coupfast.engine.memory import aligned
from coupfast.engine.partition import Partition, is_tensor
from coupfast.tracing import Operation, Trace

aten = torch.ops.aten

_BATCH_NORMS = {aten._native_batch_norm_legit_no_training.default, aten.native_batch_norm.default}


def fuse(traced: Trace) -> FusedNetwork:
    """Find the parts of a trace of (images) or (images, labels).

    Raises:
        ValueError: if the output does not depend on the images, or if a value between two parts is not float32 with the images
            as its first axis: a program keeps those in one piece of memory.
    """
    return _Fusion(traced).network()


class _Fusion:
    def __init__(self, traced: Trace) -> None:
        self.traced = traced
        self.nodes = [operation.node for operation in traced.operations]
        self.order = {node: index for index, node in enumerate(self.nodes)}
        self.partition = Partition(traced, self._given(traced))
        self.active, self.timely = self.partition.of_images, self.partition.of_labels
        self.constants = self.partition.constants
        self.taken: set[fx.Node] = set()  # nodes that a convolution or an attention took in

    def _given(self, traced: Trace) -> dict[fx.Node, torch.Tensor]:
        """The trace's constants, so that what PyTorch makes of them does not depend on where the caller's weights lie.

        Weights of convolutions, which are large, stay as they are: kernels read them packed, and the few that PyTorch reads
        are aligned when that is known.
        """

        def is_read_packed(node: fx.Node) -> bool:
            return all(user.target is aten.convolution.default and user.args[1] is node for user in node.users)

        return {node: value if is_read_packed(node) else aligned(value) for node, value in traced.constants.items()}

    def network(self) -> FusedNetwork:
        attention = self._attention()
        convolutions = {node: self._convolution(node) for node in self.nodes if self._is_convolution(node)}
        parts: list[Part] = []
        pending: list[Operation] = []
        for operation in self.traced.operations:
            node = operation.node
            if node in convolutions:
                self._flush(pending, parts)
                parts.append(convolutions[node])
            elif node in attention:
                self._flush(pending, parts)
                parts.append(attention[node])
            elif node.op != "call_function" or node not in self.active or node in self.taken:
                continue
            elif self._is_concatenation(node):
                self._flush(pending, parts)
                parts.append(Concatenation(node, list(node.args[0])))  # type: ignore[arg-type]
            else:
                pending.append(operation)
        self._flush(pending, parts)
        self._check(parts)
        for region in (part for part in parts if isinstance(part, Region)):
            for node in {used for operation in region.operations for used in operation.node.all_input_nodes}:
                if isinstance(self.constants.get(node), torch.Tensor):
                    self.constants[node] = aligned(self.constants[node])
        return FusedNetwork(
            self.partition,
            self.partition.frontier({node for part in parts for node in self._reads(part)}),
            parts,
            {node: tuple(self._value(node).shape[1:]) for node in self.active if is_tensor(node)},
        )

    def _check(self, parts: list[Part]) -> None:
        if self.partition.output not in self.active:
            raise ValueError("its output does not depend on the images")
        between = [value for part in parts for value in (*part.inputs, *part.outputs)]
        for node in dict.fromkeys([self.partition.output, *between]):
            value = self._value(node)
            if value.dtype != torch.float32 or node.meta["images"] != "first":
                raise ValueError(
                    f"{node} ({node.target}) is {value.dtype} of shape {tuple(value.shape)} at two images, and not float32 "
                    f"with one row an image"
                )

    def _value(self, node: fx.Node) -> Any:
        return node.meta["val"]

    def _reads(self, part: Part) -> set[fx.Node]:
        if isinstance(part, Region):
            return {used for operation in part.operations for used in operation.node.all_input_nodes}
        extra = [part.image_bias] if isinstance(part, Convolution) and part.image_bias is not None else []
        return {*part.inputs, *extra}

    def _attention(self) -> dict[fx.Node, Attention]:
        found = {}
        for attention, operations in attentions(self.nodes, self.active):
            self.taken |= operations
            found[attention.y] = attention
        return found

    # --- convolutions ---------------------------------------------------------------------------------------------------

    def _is_convolution(self, node: fx.Node) -> bool:
        if node.target is not aten.convolution.default or node not in self.active:
            return False
        arguments: Any = node.args
        x, weight, _, stride, padding, dilation, transposed, _, groups = arguments
        return bool(
            x in self.active
            and weight in self.constants
            and (arguments[2] is None or arguments[2] in self.constants)
            and self.constants[weight].dim() == 4
            and self.constants[weight].dtype == torch.float32
            and not transposed
            and groups == 1
            and set(dilation) == {1}
            and len(set(stride)) == 1
            and len(set(padding)) == 1
            and self.constants[weight].shape[2] == self.constants[weight].shape[3]
        )

    def _convolution(self, node: fx.Node) -> Convolution:
        arguments: Any = node.args
        x, weight, bias, stride, padding = arguments[:5]
        bias_value = None if bias is None else self.constants[bias].contiguous()
        if stride[0] != 1:  # PyTorch takes its transpose
            self.constants[weight] = aligned(self.constants[weight])
        conv = Convolution(x, self.constants[weight], bias_value, stride[0], padding[0], node)
        self.taken.add(node)
        self._take_norm(conv)
        while self._take_next(conv, self.order[node]):
            pass
        self._take_relu(conv)
        return conv

    def _take_norm(self, conv: Convolution) -> None:
        """Only where nothing else reads the normalised map: otherwise it would be made twice. Strides leave its transpose
        to PyTorch, which does not stop at a norm."""
        if conv.stride != 1:
            return
        silu = conv.x if conv.x.target is aten.silu.default and len(conv.x.users) == 1 else None
        item = conv.x if silu is None else silu.args[0]
        if not isinstance(item, fx.Node) or item.target is not operator.getitem or item.args[1] != 0 or len(item.users) != 1:
            return
        norm = item.args[0]
        if not isinstance(norm, fx.Node) or norm.target is not aten.native_group_norm.default or len(norm.users) != 1:
            return
        arguments: Any = norm.args
        x, weight, bias, _, channels, _, groups, eps = arguments
        if weight not in self.constants or bias not in self.constants or x not in self.active:
            return
        conv.x = x
        conv.norm = GroupNorm(
            x,
            int(groups),
            self.constants[weight].contiguous(),
            self.constants[bias].contiguous(),
            float(eps),
            "identity" if silu is None else "silu",
        )
        self.taken |= {item, norm} | ({silu} if silu is not None else set())

    def _take_next(self, conv: Convolution, position: int) -> bool:
        """Take in the one operation that reads y, if it is one of the epilogue's; whether it was."""
        users = list(conv.y.users)
        if len(users) != 1 or users[0] not in self.active or users[0] in self.taken:
            return False
        user = users[0]
        if user.target in (aten.div.Tensor, aten.mul.Tensor) and user.args[0] is conv.y:
            number = user.args[1]
            if not isinstance(number, (int, float)) or user.kwargs or number == 0:
                return False
            conv.scale *= 1.0 / number if user.target is aten.div.Tensor else number
        elif user.target is aten.add.Tensor and conv.scale == 1.0 and not user.kwargs:
            other = user.args[1] if user.args[0] is conv.y else user.args[0]
            if not isinstance(other, fx.Node) or other is conv.y:
                return False
            if self._is_image_bias(other, conv):
                conv.image_bias = other
            elif (
                conv.residual is None
                and other in self.active
                and self.order[other] < position
                and self._value(other).shape == self._value(conv.y).shape
            ):
                conv.residual = other
            else:
                return False
        elif self._is_batch_norm(user) and conv.residual is None and conv.image_bias is None and conv.scale == 1.0:
            item = next(iter(user.users))
            if any(after.target is aten.relu.default for after in item.users):
                return False  # z takes it, at no cost, and the sum stays in float32
            multiply, add = self._affine(user)
            conv.weight = (conv.weight.double() * multiply[:, None, None, None]).float()
            bias = 0.0 if conv.bias is None else conv.bias.double()
            conv.bias = (bias * multiply + add).float()
            self.taken.add(user)
            user = item
        else:
            return False
        self.taken.add(user)
        conv.y = user
        return True

    def _is_image_bias(self, node: fx.Node, conv: Convolution) -> bool:
        if node not in self.timely or conv.image_bias is not None or conv.residual is not None:
            return False
        shape = self._value(node).shape
        return len(shape) == 4 and tuple(shape[1:]) == (conv.weight.shape[0], 1, 1)

    def _is_batch_norm(self, node: fx.Node) -> bool:
        if node.target not in _BATCH_NORMS:
            return False
        arguments: Any = node.args
        training = node.target is aten.native_batch_norm.default and bool(arguments[5])
        items = list(node.users)
        return bool(
            not training
            and all(argument is None or argument in self.constants for argument in arguments[1:5])
            and len(items) == 1
            and items[0].target is operator.getitem
            and items[0].args[1] == 0
        )

    def _affine(self, norm: fx.Node) -> tuple[torch.Tensor, torch.Tensor]:
        """Batch norm as multiplier and addend, in float64."""
        arguments: Any = norm.args
        weight, bias, mean, variance = (None if a is None else self.constants[a].double() for a in arguments[1:5])
        assert mean is not None and variance is not None
        multiply = torch.rsqrt(variance + arguments[-1])
        if weight is not None:
            multiply = multiply * weight
        add = -mean * multiply if bias is None else bias - mean * multiply
        return multiply, add

    def _take_relu(self, conv: Convolution) -> None:
        for user in conv.y.users:
            if user in self.taken or user not in self.active:
                continue
            relu = None
            if user.target is aten.relu.default:
                relu = user
            elif self._is_batch_norm(user) and user.args[0] is conv.y:
                item = next(iter(user.users))
                if len(item.users) == 1 and next(iter(item.users)).target is aten.relu.default:
                    relu = next(iter(item.users))
                    multiply, add = self._affine(user)
                    conv.z_multiply, conv.z_add = multiply.float(), add.float()
                    self.taken |= {user, item}
            if relu is not None:
                conv.z = relu
                self.taken.add(relu)
                break
        conv.keeps_y = any(user not in self.taken for user in conv.y.users) or self._feeds_taken(conv)

    def _feeds_taken(self, conv: Convolution) -> bool:
        """Whether y is read by something that was taken in, other than z's own batch norm and ReLU."""
        own = {conv.z}
        if conv.z is not None and conv.z.args[0] is not conv.y:
            item: Any = conv.z.args[0]
            own.add(item.args[0])
        return any(user in self.taken and user not in own for user in conv.y.users)

    def _is_concatenation(self, node: fx.Node) -> bool:
        if node.target is not aten.cat.default or self._value(node).dim() != 4:
            return False
        dimension = node.args[1] if len(node.args) > 1 else 0
        return dimension in (1, -3) and all(part in self.active for part in node.args[0])  # type: ignore[union-attr]

    def _flush(self, pending: list[Operation], parts: list[Part]) -> None:
        if not pending:
            return
        inside = {operation.node for operation in pending}
        inputs, outputs = [], []
        for operation in pending:
            for used in operation.node.all_input_nodes:
                if used not in inside and used in self.active and used not in inputs:
                    inputs.append(used)
            if any(user not in inside for user in operation.node.users) and is_tensor(operation.node):
                outputs.append(operation.node)
        parts.append(Region(list(pending), inputs, outputs))
        pending.clear()
