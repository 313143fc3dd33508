"""A network planned for this engine's kernels, or the reason why PyTorch runs it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch

from coupfast.agreement import agree, random_images, value_and_vjp
from coupfast.engine.cpu.algorithms import WeightStore, tile
from coupfast.engine.cpu.fusion import fuse
from coupfast.engine.cpu.network_program import NetworkProgram
from coupfast.engine.cpu.parts import FusedNetwork
from coupfast.engine.cpu.placement import Workspace
from coupfast.tracing import Trace

logger = logging.getLogger(__name__)


class PlannedNetwork:
    """A fused network with its packed weights, shared by its programs."""

    def __init__(self, network: FusedNetwork, allowed: tuple[int, ...]) -> None:
        self.network = network
        self.weights = WeightStore(functools.partial(tile, allowed=allowed))


def planned(
    name: str,
    traced: Callable[[], Trace],
    function: Callable[[torch.Tensor], torch.Tensor],
    example: torch.Tensor,
    *,
    allowed: tuple[int, ...],
    label: torch.Tensor,
    gradient_tolerance: float,
) -> PlannedNetwork | None:
    """The network planned, or None (and a warning) where it has to run in PyTorch.

    Args:
        name: What messages call it.
        traced: Its trace; may raise anything.
        function: What it computes at `label`.
        example: A state.
        allowed: Algorithms that convolutions may take.
        label: Shape (1,).
        gradient_tolerance: Relative difference of transposes that is rounding.
    """
    try:
        found = PlannedNetwork(fuse(traced()), allowed)
        agrees = _agrees(found, function, example, label, gradient_tolerance)
    except Exception as error:  # a network may do anything in `forward`
        logger.warning("the %s cannot be planned and runs in PyTorch (%s: %s)", name, type(error).__name__, error)
        return None
    if not agrees:
        logger.warning("the %s does not do what its trace does (hooks, state?) and runs in PyTorch", name)
        return None
    return found


def _agrees(
    planned: PlannedNetwork,
    function: Callable[[torch.Tensor], torch.Tensor],
    example: torch.Tensor,
    label: torch.Tensor,
    gradient_tolerance: float,
) -> bool:
    """Whether one random image gets the same value and transpose: a trace shows operations, not their gradients."""
    x = random_images(example)
    value, vjp, cotangent = value_and_vjp(function, x)
    program = NetworkProgram(planned.network, 1, planned.weights, backward=True, threads=torch.get_num_threads())
    program.activations_bytes()  # what a plan will ask for: an operation that refuses it must not do so then
    program.bind(Workspace())
    program.set_label(planned.network.at_label(label))
    found = program.forward(x).clone()
    return agree(found, value, 1e-4) and agree(program.backward(cotangent), vjp, gradient_tolerance)
