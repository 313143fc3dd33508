"""What each value of a network's trace depends on: the images, the labels alone, or neither.

Neither is computed once, what the labels alone decide once for every step of a grid, one image's worth each: all images of a
step have one label.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from coupfast.tracing import Operation, PerImage, Trace


class Partition:
    """The values of a trace of (images) or (images, labels).

    Args:
        traced: The trace.
        given: Values to take for the tensors that it found ready; None takes those tensors.

    Attributes:
        image, label: The placeholders; `label` is None where there is none.
        output: The value that is returned.
        of_images, of_labels: What the images reach, and what the labels alone reach; placeholders included.
        label_operations: Operations of `of_labels`, in order.
        constants: Values that neither reaches, and that are the same at every batch size.
        batch_operations: What makes those that neither reaches and that grow with the batch, in order.
    """

    def __init__(self, traced: Trace, given: dict[fx.Node, torch.Tensor] | None = None) -> None:
        self.traced = traced
        nodes = [operation.node for operation in traced.operations]
        placeholders = [node for node in nodes if node.op == "placeholder"]
        self.image, self.label = placeholders[0], placeholders[1] if len(placeholders) > 1 else None
        self.output = next(node for node in nodes if node.op == "output").all_input_nodes[0]
        self.of_images = _reached(nodes, self.image)
        self.of_labels = set() if self.label is None else _reached(nodes, self.label) - self.of_images
        self.label_operations = [
            operation
            for operation in traced.operations
            if operation.node in self.of_labels and operation.node.op == "call_function"
        ]
        self.constants: dict[fx.Node, Any] = {}
        self.batch_operations: list[Operation] = []
        self._find_constants(traced.constants if given is None else given)

    def frontier(self, read: set[fx.Node]) -> list[fx.Node]:
        """Those of the values `read` that the labels alone decide, in order.

        Raises:
            ValueError: if one of them has its images in another axis than the first: it cannot be found for one image.
        """
        found = [
            operation.node
            for operation in self.traced.operations
            if operation.node in self.of_labels and operation.node in read and is_tensor(operation.node)
        ]
        for node in found:
            if node.meta.get("images") == "elsewhere":
                raise ValueError(
                    f"{node} ({node.target}), a value of the labels, has its images in another axis than the first"
                )
        return found

    def at_label(self, label: torch.Tensor, wanted: list[fx.Node]) -> dict[fx.Node, torch.Tensor]:
        """Values of the labels for one image.

        Args:
            label: 999 t, shape (1,).
            wanted: As `frontier` found them.
        """
        values: dict[fx.Node, Any] = dict(self.constants)
        if self.label is not None:
            values[self.label] = label
        with torch.no_grad():
            for operation in (*self.batch_operations, *self.label_operations):
                args, kwargs = operation.arguments(values, 1)
                values[operation.node] = operation.node.target(*args, **kwargs)  # type: ignore[operator]
        return {node: values[node].clone() for node in wanted}

    def for_images(self, values: dict[fx.Node, torch.Tensor], batch: int) -> dict[fx.Node, torch.Tensor]:
        """One image's values of the labels as those of so many images, without a copy."""
        return {
            node: value.expand(batch, *value.shape[1:]) if node.meta["images"] == "first" else value
            for node, value in values.items()
        }

    def at_batch(self, batch: int) -> dict[fx.Node, Any]:
        """All values that neither images nor labels reach, for so many images."""
        values = dict(self.constants)
        with torch.no_grad():
            for operation in self.batch_operations:
                args, kwargs = operation.arguments(values, batch)
                values[operation.node] = operation.node.target(*args, **kwargs)  # type: ignore[operator]
        return values

    def _find_constants(self, given: dict[fx.Node, torch.Tensor]) -> None:
        growing: set[fx.Node] = set()
        with torch.no_grad():
            for operation in self.traced.operations:
                node = operation.node
                if node.op == "get_attr":
                    self.constants[node] = given[node]
                elif node.op == "call_function" and node not in self.of_images and node not in self.of_labels:
                    per_image = any(isinstance(leaf, PerImage) for leaf in operation.leaves)
                    if per_image or growing.intersection(node.all_input_nodes):
                        growing.add(node)
                        self.batch_operations.append(operation)
                    else:
                        args, kwargs = operation.arguments(self.constants, 1)
                        self.constants[node] = node.target(*args, **kwargs)  # type: ignore[operator]


def is_tensor(node: fx.Node) -> bool:
    """Whether a node's value is one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def _reached(nodes: list[fx.Node], start: fx.Node) -> set[fx.Node]:
    reached = {start}
    for node in nodes:
        if node.op == "call_function" and any(used in reached for used in node.all_input_nodes):
            reached.add(node)
    return reached
