"""Attention in a trace: which of its values are queries, keys and values, and where their heads lie.

Traces have a product, a softmax and a product, with views and scalar factors between them in any order. What a chain of views
makes of a value is found by running it on the value's element numbers, so that no spelling has to be known.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from coupfast.engine.cpu.parts import Attention, Heads
from coupfast.tracing import LINEAR_VIEWS

aten = torch.ops.aten

_VIEWS = LINEAR_VIEWS | {aten.clone.default}
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.chunk.default}
_RESHAPES = {aten.view.default, aten._unsafe_view.default}
_FACTORS = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}
_FUSED = aten._scaled_dot_product_flash_attention_for_cpu.default


def attentions(nodes: list[fx.Node], active: set[fx.Node]) -> list[tuple[Attention, set[fx.Node]]]:
    """The attentions among a trace's operations, each with the operations that it stands for.

    Args:
        nodes: The trace's, in order.
        active: Those that the images reach.
    """
    found = []
    for node in nodes:
        if node in active and node.target in (aten._softmax.default, aten._safe_softmax.default, _FUSED):
            made = _fused(node, active) if node.target is _FUSED else _written_out(node, active)
            if made is not None:
                found.append(made)
    return found


def _written_out(softmax: fx.Node, active: set[fx.Node]) -> tuple[Attention, set[fx.Node]] | None:
    arguments: Any = softmax.args
    shape = softmax.meta["val"].shape
    if len(shape) not in (3, 4) or arguments[1] not in (-1, len(shape) - 1) or softmax.meta["val"].dtype != torch.float32:
        return None
    # From the scores' product to the softmax, ...
    scores, before, scale = _origin(arguments[0], with_factors=True)
    if scores.target is not aten.bmm.default:
        return None
    pairs, pixels = math.prod(shape[:-2]), shape[-1]
    if shape[-2] != pixels or scores.meta["val"].shape != (pairs, pixels, pixels):
        return None
    turned = _is_turned(_numbers(scores, before).reshape(pairs, pixels, pixels))
    # ... and from there to the product with the values.
    path, product = _forwards(softmax)
    if turned is None or product is None or product.target is not aten.bmm.default:
        return None
    last: Any = path[-1] if path else softmax
    left, right = product.args
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left is right:
        return None
    weights = _numbers(softmax, path).reshape(last.meta["val"].shape)
    weights_first = left is last
    transposed = None if weights.shape != (pairs, pixels, pixels) else _is_turned(weights)
    if transposed is None or transposed != (not weights_first):
        return None
    a, b = scores.args
    of_rows, of_columns = (a, False), (b, True)  # [pairs, pixels, size], and the same turned over
    q, k = (of_columns, of_rows) if turned else (of_rows, of_columns)
    v = (right, False) if weights_first else (left, True)
    inner = {scores, *before, softmax, *path, product}
    if not _only({scores, *before, softmax, *path}, inner):
        return None
    return _assembled((q, k, v), product, not weights_first, scale, inner, active)


def _fused(node: fx.Node, active: set[fx.Node]) -> tuple[Attention, set[fx.Node]] | None:
    arguments: Any = node.args
    given: Any = dict(zip(("dropout_p", "is_causal"), arguments[3:], strict=False)) | node.kwargs
    items = list(node.users)
    if given.get("dropout_p", 0.0) != 0.0 or given.get("is_causal", False) or given.get("attn_mask") is not None:
        return None
    if len(items) != 1 or items[0].target is not operator.getitem or items[0].args[1] != 0:
        return None
    scale = given.get("scale")
    scale = arguments[0].meta["val"].shape[-1] ** -0.5 if scale is None else float(scale)
    operands = [(argument, False) for argument in arguments[:3]]
    return _assembled(operands, items[0], False, scale, {node, items[0]}, active)


def _assembled(
    operands: Any, product: fx.Node, turned: bool, scale: float, inner: set[fx.Node], active: set[fx.Node]
) -> tuple[Attention, set[fx.Node]] | None:
    """The attention of these operands, with their views and the result's; None where a kernel cannot read or write it."""
    heads = []
    taken, number = set(inner), product.meta["val"].shape
    for index, (node, columns) in enumerate(operands):
        source, views, factor = _origin(node, with_factors=index < 2)
        if source not in active or not _is_float_by_image(source):
            return None
        found = _numbers(source, views)
        found = found.transpose(-1, -2) if columns else found
        images = source.meta["val"].shape[0]
        place = _heads(source, found.reshape(images, -1, *found.shape[-2:]))
        if place is None:
            return None
        heads.append(place)
        scale *= factor
        taken |= set(views)
    q, k, v = heads
    if not ((q.count, q.size) == (k.count, k.size) == (v.count, v.size)) or len({_pixels(h.node) for h in heads}) > 1:
        return None
    y, path = _result(product, turned, q.count, q.size, number)
    if y is None or not _can_be_transposed(heads):
        return None
    taken |= set(path)
    # Views that something else reads are made for that, too.
    while other := {node for node in taken - inner - set(path) if not set(node.users) <= taken}:
        taken -= other
    return Attention(q, k, v, scale, y), taken


def _origin(node: Any, *, with_factors: bool) -> tuple[fx.Node, list[fx.Node], float]:
    """What a chain of views (and scalar factors) begins with; the chain, first to last; the product of the factors."""
    views: list[fx.Node] = []
    factor = 1.0
    while True:
        source: Any = node.args[0] if node.args else None
        is_piece = node.target is operator.getitem and source.target in _SPLITS
        if is_piece or node.target in _VIEWS or node.target in _SPLITS:
            views.append(node)
        elif with_factors and (number := _factor(node)) is not None:
            views.append(node)
            factor *= number
        else:
            return node, views[::-1], factor
        node = source


def _factor(node: fx.Node) -> float | None:
    """The number that an operation multiplies its one tensor with; None if it is no such operation."""
    if node.target not in _FACTORS or node.kwargs or len(node.args) != 2 or not isinstance(node.args[0], fx.Node):
        return None
    number = node.args[1]
    if not isinstance(number, (int, float)) or number == 0:
        return None
    return float(number) if node.target in (aten.mul.Tensor, aten.mul.Scalar) else 1.0 / number


def _forwards(node: fx.Node) -> tuple[list[fx.Node], fx.Node | None]:
    """The views behind a value that has one reader each, and what reads the last of them."""
    path: list[fx.Node] = []
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.target not in _VIEWS:
            return path, user
        path.append(user)
        node = user
    return path, None


def _numbers(source: fx.Node, views: list[fx.Node]) -> torch.Tensor:
    """The element of `source`, by its number, that each element of the last view is."""
    shape = source.meta["val"].shape
    values: dict[fx.Node, Any] = {source: torch.arange(math.prod(shape)).view(shape)}
    with torch.no_grad():
        for node in views:
            if node.target in _FACTORS:
                values[node] = values[node.args[0]]  # type: ignore[index]
                continue
            target: Callable[..., Any] = aten.reshape.default if node.target in _RESHAPES else node.target  # type: ignore[assignment]
            values[node] = target(values[node.args[0]], *node.args[1:], **node.kwargs)  # type: ignore[index]
    return values[views[-1] if views else source]


def _is_turned(numbers: torch.Tensor) -> bool | None:
    """Whether square matrices are the transposes of those that they are made of; None if they are neither."""
    plain = torch.arange(numbers.numel()).view(numbers.shape)
    if torch.equal(numbers, plain):
        return False
    return True if torch.equal(numbers, plain.transpose(-1, -2)) else None


def _only(nodes: Any, readers: set[fx.Node]) -> bool:
    return all(user in readers for node in nodes for user in node.users)


def _is_float_by_image(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32 and node.meta.get("images") == "first"


def _pixels(node: fx.Node) -> int:
    """How many pixels the map has, or the list of tokens."""
    shape = node.meta["val"].shape
    return shape[2] * shape[3] if len(shape) == 4 else shape[1]


def _elements(node: fx.Node) -> torch.Tensor | None:
    """Element numbers of a map or of tokens as [images, pixels, channels]; None for values of another kind."""
    shape = node.meta["val"].shape
    numbers = torch.arange(math.prod(shape)).view(shape)
    if len(shape) == 4:
        return numbers.flatten(2).transpose(1, 2)
    return numbers if len(shape) == 3 else None


def _heads(source: fx.Node, numbers: torch.Tensor) -> Heads | None:
    """The channels of `source` that [images, heads, pixels, size] element numbers are; None if they lie otherwise."""
    elements = _elements(source)
    count, pixels, size = numbers.shape[1:]
    if elements is None or pixels != elements.shape[1]:
        return None
    channels = {int(number): channel for channel, number in enumerate(elements[0, 0])}
    starts = [channels.get(int(number)) for number in numbers[0, :, 0, 0]]
    start = starts[0]
    if start is None or starts[-1] is None:
        return None
    step = (starts[-1] - start) // (count - 1) if count > 1 else size
    if step < size or start + (count - 1) * step + size > elements.shape[2]:
        return None
    expected = torch.stack([elements[:, :, start + h * step : start + h * step + size] for h in range(count)], dim=1)
    return Heads(source, start, step, count, size) if torch.equal(numbers, expected) else None


def _result(
    product: fx.Node, turned: bool, heads: int, size: int, shape: torch.Size
) -> tuple[fx.Node | None, list[fx.Node]]:
    """The result's last view that is a map or tokens with the heads side by side, and the views that lead there."""
    path, _ = _forwards(product)
    numbers = torch.arange(math.prod(shape)).view(shape)
    numbers = numbers.transpose(-1, -2) if turned else numbers
    images = product.meta["val"].shape[0] if len(shape) == 4 else shape[0] // heads
    tokens = numbers.reshape(images, heads, -1, size).transpose(1, 2).flatten(2)  # [images, pixels, channels]
    for end in range(len(path), -1, -1):
        node, views = [product, *path][end], path[:end]
        value = node.meta["val"]
        if node.meta.get("images") != "first" or value.dim() not in (3, 4) or value.numel() != tokens.numel():
            continue
        found = _numbers(product, views)
        found = found.flatten(2).transpose(1, 2) if value.dim() == 4 else found
        if torch.equal(found, tokens):
            return node, views
    return None, []


def _can_be_transposed(heads: list[Heads]) -> bool:
    """Whether cotangents have places: what is read of a value is all of it, each channel once; or all of it by each reader."""
    for source in {each.node for each in heads}:
        readers = [each for each in heads if each.node is source]
        read = [channel for each in readers for channel in each.channels()]
        whole = list(range(source.meta["val"].shape[1 if source.meta["val"].dim() == 4 else 2]))
        if sorted(read) != whole and not all(sorted(each.channels()) == whole for each in readers):
            return False
    return True
