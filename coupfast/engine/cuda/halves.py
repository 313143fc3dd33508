"""A flat graph of a value and its derivative in two: one up to the value, and one that goes back from what the first one keeps.

The same operations as in the whole, in the same order, so that what is kept changes no bit of what they find.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx

from coupfast.engine.cuda.flat import VIEWS, FlatGraph

#: What computes nothing, whether it copies or not.
COPIES = VIEWS | {torch.ops.aten.clone.default}


@dataclasses.dataclass
class Halves:
    """Both halves of (*inputs, v) → (value, derivative).

    Attributes:
        forward: inputs → value, *kept
        backward: inputs, v, *kept → derivative
    """

    forward: FlatGraph
    backward: FlatGraph

    def kept_bytes(self) -> int:
        """What lies between the two."""
        (output,) = (node for node in self.forward.module.graph.nodes if node.op == "output")
        return sum(node.meta["val"].nbytes for node in output.args[0][1:])


def split(whole: FlatGraph) -> Halves:
    """A graph in two, its last varying input being the cotangent that the derivative begins with; it stays as it is."""
    *inputs, v = whole.placeholders()[: whole.varying]
    constants = whole.placeholders()[whole.varying :]
    nodes = list(whole.module.graph.nodes)
    (output,) = (node for node in nodes if node.op == "output")
    value, derivative = output.args[0]  # type: ignore[misc]
    late = _following(nodes, [v])
    varies = _following(nodes, inputs)

    def is_found_again(node: fx.Node) -> bool:
        """Whether the way back finds it from what it has: it is other memory's values in another format, or of constants."""
        source: Any = node.args[0] if node.target is operator.getitem else node
        return node not in varies or source.target in COPIES

    kept: dict[fx.Node, None] = {}  # in the order in which the way back first reads them
    again: set[fx.Node] = set()

    def reads(node: Any) -> None:
        if node in late or node in again or node in inputs or node in constants:
            return
        if is_found_again(node):
            again.add(node)
            for used in node.all_input_nodes:
                reads(used)
        else:
            kept[node] = None

    for node in (n for n in nodes if n in late and n is not v and n is not output):
        for used in node.all_input_nodes:
            reads(used)
    if isinstance(derivative, fx.Node):
        reads(derivative)
    forward = _part(whole, nodes, inputs, [], {n for n in nodes if n not in late and n.op == "call_function"}, [value, *kept])
    backward = _part(whole, nodes, [*inputs, v], list(kept), (late - {v, output}) | again, [derivative])
    return Halves(forward, backward)


def _following(nodes: list[fx.Node], first: list[fx.Node]) -> set[fx.Node]:
    """Nodes, and all that depends on them."""
    found = set(first)
    for node in nodes:
        if any(used in found for used in node.all_input_nodes):
            found.add(node)
    return found


def _part(
    whole: FlatGraph, nodes: list[fx.Node], inputs: list[fx.Node], kept: list[fx.Node], operations: set[fx.Node], outputs: list
) -> FlatGraph:
    graph, made = fx.Graph(), {}
    for number, node in enumerate([*inputs, *kept]):
        made[node] = graph.placeholder(node.name if node.op == "placeholder" else f"kept_{number}")
        made[node].meta["val"] = node.meta["val"]
    for node in [*whole.placeholders()[whole.varying :], *(n for n in nodes if n in operations)]:
        made[node] = graph.node_copy(node, lambda used: made[used])
    graph.output(tuple(made[node] for node in outputs)).meta["val"] = None
    graph.eliminate_dead_code()  # of operations: constants stay, which both halves are called with
    graph.lint()
    return FlatGraph(fx.GraphModule(torch.nn.Module(), graph), len(inputs) + len(kept), list(whole.constants))
