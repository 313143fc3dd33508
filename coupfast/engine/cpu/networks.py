"""The networks of a run as the cpu engine has them: planned where its planner can follow, and what all batch sizes share."""

from __future__ import annotations

import functools
import threading

import torch
from torch import fx, nn

from coupfast.engine.cpu.options import Options
from coupfast.engine.cpu.placement import Workspace
from coupfast.engine.cpu.planned import PlannedNetwork, planned
from coupfast.engine.eager import EagerProgram
from coupfast.engine.memory import AllocationAccount
from coupfast.guidance import Guidance, scaled_logits
from coupfast.solvers import CoefficientTable
from coupfast.tracing import Trace, trace


class CpuNetworks:
    """A score network and what guides, for one table and one shape of images.

    Attributes:
        score, classifier: Planned; None where PyTorch runs the network, or where there is none.
        linear: `classifier` where it is piecewise linear, and its Hessians are taken by its linear part.
        eager: What runs where the planner cannot follow a network, and Hessians of smooth classifiers.
        options: What was chosen, and decided where it was left open.
        workspace: Memory of all programs, which run one at a time: `turn` is theirs to take.
    """

    def __init__(
        self,
        score: nn.Module,
        guidance: Guidance | None,
        table: CoefficientTable,
        example: torch.Tensor,
        differentiate_guidance: bool,
        options: Options = Options(),  # noqa: B008  (frozen)
    ) -> None:
        self.guidance, self.table, self.differentiate_guidance = guidance, table, differentiate_guidance
        self.example = torch.zeros_like(example[:1])
        self.eager = EagerProgram(score, guidance, table, example, differentiate_guidance)
        self.options = options.decided(score, None if guidance is None else guidance.classifier)
        self.score = self._planned_score()
        self.classifier = None if guidance is None else self._planned_classifier(guidance)
        self.linear = self.classifier if guidance is not None and guidance.graph is not None else None
        self.workspace, self.turn = Workspace(), threading.Lock()
        self._label_values: dict[int, dict[fx.Node, torch.Tensor]] = {}

    def label_values(self, k: int) -> dict[fx.Node, torch.Tensor]:
        """What step k's label alone decides in the score network, for one image; found once per step."""
        if k not in self._label_values:
            assert self.score is not None
            self._label_values[k] = self.score.network.at_label(self.eager.labels[k].view(1))
        return self._label_values[k]

    @functools.cached_property
    def hvp_bytes(self) -> int:
        """What PyTorch takes for one image's Hessian-vector product; 0 where the engine's own programs find it."""
        if self.guidance is None or self.linear is not None or not self.differentiate_guidance:
            return 0
        classifier, x = self.guidance.classifier, self.example
        self.guidance.route  # noqa: B018  (found out once, and no part of a product)
        with torch.no_grad(), AllocationAccount([x, *classifier.parameters(), *classifier.buffers()]) as account:
            self.guidance.hvp(x, x)
        return account.peak

    def _planned_score(self) -> PlannedNetwork | None:
        score, labels = self.eager.score, self.eager.labels

        def arguments(batch: int) -> tuple[torch.Tensor, ...]:
            return self.example.new_zeros(batch, *self.example.shape[1:]), labels[:1].expand(batch).clone()

        return planned(
            "score net",
            lambda: trace(lambda x, labels: score(x, labels), arguments),
            lambda x: score(x, labels[-1:]),
            self.example,
            allowed=self.options.tiles(),
            # Not the label that was traced: one that was read behind the trace's back would show.
            label=labels[-1:],
            gradient_tolerance=1e-4,
        )

    def _planned_classifier(self, guidance: Guidance) -> PlannedNetwork | None:
        def logits(x: torch.Tensor) -> torch.Tensor:
            return scaled_logits(guidance.classifier, x)

        def traced() -> Trace:
            if guidance.graph is not None:
                return guidance.graph.traced
            return trace(logits, lambda batch: (self.example.new_zeros(batch, *self.example.shape[1:]),))

        return planned(
            "classifier",
            traced,
            logits,
            self.example,
            allowed=self.options.tiles(),
            label=self.eager.labels[-1:],
            # A ReLU within rounding of its kink may fall on either side, and one of a layer's many is that much of it.
            gradient_tolerance=3e-2,
        )
