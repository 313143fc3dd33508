"""The pieces of a step as flat graphs, not compiled.

    score       x, step → ε̂                    evaluate    x → f(x), slopes
    score vjp   x, step, v → Jᵀv               cotangent   u, slopes → Jᵀu
                                               tangent     v, slopes → J v

Where a step keeps its activations, `score keeping` (x, step → ε̂, activations) and `score vjp kept` (x, step, v, activations →
Jᵀv) take the place of the first two: the same operations, none of them done again on the way back (`halves`).

Guidance and its Hessian are made of the last three where the classifier is piecewise linear (g = Jᵀ(e_ŷ − p),
H v = −Jᵀ(diag p − p pᵀ) J v), so that a step and its transpose use the same slopes to the bit, kept or rebuilt. A smooth
classifier has `gradient` (x → g) and `hvp` (x, v → H v) instead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from coupfast.engine.cuda.flat import FlatGraph, Folded, flatten, fold_constants
from coupfast.engine.cuda.halves import split
from coupfast.engine.cuda.order import Order
from coupfast.engine.cuda.substitution import Conv3x3Choice, PackedWeights, fuse_kernels
from coupfast.engine.cuda.traced import TracedClassifier, TracedLogits, TracedScore
from coupfast.engine.rows import clipped
from coupfast.guidance import Guidance, log_confidence
from coupfast.tracing import Trace, trace

#: The pieces of a step that keeps its activations, and what they are made of.
HALVES = ("score keeping", "score vjp kept")
JOINT = "score and vjp"


class Pieces:
    """Makes the pieces of two networks; traces and packed weights are shared by all of them.

    Args:
        score, guidance: The networks; `guidance` is None where nothing guides.
        labels: 999 t of every step, shape (steps,).
        example: A state.
        differentiate_guidance: Whether Hessians are wanted.
        clip: Factors m and n of every step, shape (steps, 2): ε̂ is that of clip(m x + n ε̂, ±1); None: it is the network's.
        choose: Which algorithm a convolution takes; None leaves all to the library.
        fuse_norms: Whether this project's group norms replace the library's.

    Attributes:
        piecewise_linear: Whether the classifier is.
        order: Of streams that make graphs: constants of one may be those that another stream made.
        packed, folded: Packed weights, and results of operations on weights alone, made so far.
    """

    def __init__(
        self,
        score: nn.Module,
        guidance: Guidance | None,
        labels: torch.Tensor,
        example: torch.Tensor,
        differentiate_guidance: bool,
        *,
        clip: torch.Tensor | None = None,
        choose: Conv3x3Choice | None = None,
        fuse_norms: bool = False,
    ) -> None:
        self.clip = clip
        self.score, self.guidance, self.labels = score, guidance, labels
        self.example = torch.zeros_like(example[:1])
        self.differentiate_guidance = differentiate_guidance
        self.choose, self.fuse_norms = choose, fuse_norms
        self.piecewise_linear = guidance is not None and guidance.graph is not None
        self.packed: PackedWeights = {}
        self.folded: Folded = {}
        self._traced_score: TracedScore | None = None
        self._traced_classifier: TracedClassifier | None = None
        self._traced_logits: TracedLogits | None = None
        self._joint: tuple[int, FlatGraph] | None = None  # ε̂ and Jᵀv of a bucket, no kernels in it
        self._halves: dict[tuple[str, int], FlatGraph] = {}  # the other one of a pair that was made
        self._kept: tuple[int, int] | None = None  # a bucket, and the bytes that its step keeps
        self._lock, self.order = threading.RLock(), Order(example.device)

    def __del__(self) -> None:
        # As of a program's buffers: what was folded or packed on one stream may still read what another one had made.
        if hasattr(self, "order"):
            self.order.finish()

    def weights_bytes(self) -> int:
        """Copies of weights made so far: in channels last, and packed for this project's convolutions."""
        networks = [self.score] + ([] if self.guidance is None else [self.guidance.classifier])
        own = {weight.data_ptr() for network in networks for weight in [*network.parameters(), *network.buffers()]}
        traces = (self._traced_score, self._traced_classifier, self._traced_logits)
        copies = [made for _, made in [*self.packed.values(), *self.folded.values()]]
        copies += [constant for traced in traces if traced is not None for constant in traced.constants]
        return sum({copy.data_ptr(): copy.nbytes for copy in copies if copy.data_ptr() not in own}.values())

    def names(self) -> list[str]:
        names = ["score", "score vjp"]
        if self.guidance is not None:
            names += ["evaluate", "cotangent"] if self.piecewise_linear else ["gradient"]
            if self.differentiate_guidance:
                names += ["tangent"] if self.piecewise_linear else ["hvp"]
        return names

    def make(self, name: str, bucket: int) -> FlatGraph:
        """One flat graph of a bucket, with this project's kernels in it, not compiled."""
        with self._lock, self.order:  # traces and packed weights are shared
            x = self.example.new_zeros(bucket, *self.example.shape[1:]).contiguous(memory_format=torch.channels_last)
            if name in HALVES:
                return self._half(name, bucket)
            if name.startswith("score"):
                flat = self._score_piece(name, x)
            elif self.piecewise_linear:
                flat = self._piecewise_linear_piece(name, x)
            else:
                flat = self._smooth_piece(name, x)
            fold_constants(flat, self.folded)
            fuse_kernels(flat, self.choose, norms=self.fuse_norms, packed=self.packed)
        return flat

    def kept_bytes(self, bucket: int) -> int:
        """Activations of the score network that a step keeps, in proportion to those of the bucket that was first asked for."""
        with self._lock, self.order:
            if self._kept is None:
                graph = self._joint_graph(bucket)
                fuse_kernels(graph, None, norms=self.fuse_norms)  # which convolutions there are changes nothing that is kept
                self._kept = bucket, split(graph).kept_bytes()
            known, size = self._kept
            return -(-size * bucket // known)

    def _half(self, name: str, bucket: int) -> FlatGraph:
        if (name, bucket) not in self._halves:
            graph = self._joint_graph(bucket)
            fuse_kernels(graph, self.choose, norms=self.fuse_norms, packed=self.packed)
            halves = split(graph)
            self._joint = None  # both are there
            self._halves = {(HALVES[0], bucket): halves.forward, (HALVES[1], bucket): halves.backward}
        return self._halves.pop((name, bucket))

    def _joint_graph(self, bucket: int) -> FlatGraph:
        if self._joint is None or self._joint[0] != bucket:
            x = self.example.new_zeros(bucket, *self.example.shape[1:]).contiguous(memory_format=torch.channels_last)
            graph = self._score_piece(JOINT, x)
            fold_constants(graph, self.folded)
            self._joint = bucket, graph
        return self._joint[1].copy()

    def _score_piece(self, name: str, x: torch.Tensor) -> FlatGraph:
        traced = self._score_trace()
        own = traced.constants if self.clip is None else [self.clip, *traced.constants]
        step = torch.zeros((), dtype=torch.int64, device=x.device)

        def score(x: torch.Tensor, step: torch.Tensor, *constants: torch.Tensor) -> torch.Tensor:
            if self.clip is None:
                return traced(x, step, *constants)
            m, n = constants[0].index_select(0, step.view(1))[0].unbind()
            return clipped(x, traced(x, step, *constants[1:]), m, n)[0]

        def evaluate(x: torch.Tensor, step: torch.Tensor, *constants: torch.Tensor) -> tuple[torch.Tensor, ...]:
            with torch.no_grad():
                return (score(x, step, *constants),)

        def both(x: torch.Tensor, step: torch.Tensor, v: torch.Tensor, *constants: torch.Tensor) -> tuple[torch.Tensor, ...]:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                eps_hat = score(leaf, step, *constants)
                if not eps_hat.requires_grad:  # constant in x: its transpose is zero
                    return eps_hat, torch.zeros_like(v)
                return eps_hat.detach(), torch.autograd.grad(eps_hat, leaf, v)[0]

        if name == "score":
            return flatten(evaluate, (x, step), own)
        if name == JOINT:
            return flatten(both, (x, step, x), own)
        return flatten(lambda *inputs: both(*inputs)[1:], (x, step, x), own)

    def _piecewise_linear_piece(self, name: str, x: torch.Tensor) -> FlatGraph:
        assert self.guidance is not None and self.guidance.graph is not None
        if self._traced_classifier is None:
            self._traced_classifier = TracedClassifier(self.guidance.graph)
        classifier = self._traced_classifier
        constants = classifier.constants
        logits, *slopes = (torch.zeros_like(like, device=x.device) for like in self._results(classifier, x))
        count = len(slopes)

        def evaluate(x: torch.Tensor, *constants: torch.Tensor) -> tuple[torch.Tensor, ...]:
            with torch.no_grad():
                return classifier.evaluate(x, *constants)

        def tangent(v: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
            with torch.no_grad():
                return (classifier.tangent(v, rest[:count], *rest[count:]),)

        def cotangent(u: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (classifier.cotangent(x.shape[1:], u, rest[:count], *rest[count:]),)

        if name == "evaluate":
            return flatten(evaluate, (x,), constants)
        if name == "tangent":
            return flatten(tangent, (x, *slopes), constants)
        return flatten(cotangent, (logits, *slopes), constants)

    def _results(self, classifier: TracedClassifier, x: torch.Tensor) -> list[torch.Tensor]:
        """Shapes and strides of a value and its slopes; a run of the trace itself would hold all of its activations."""
        with FakeTensorMode() as mode, torch.no_grad():
            return list(classifier.evaluate(*(mode.from_tensor(tensor) for tensor in (x, *classifier.constants))))

    def _smooth_piece(self, name: str, x: torch.Tensor) -> FlatGraph:
        assert self.guidance is not None
        if self._traced_logits is None:
            classifier, example = self.guidance.classifier, self.example
            self._traced_logits = TracedLogits(
                self._trace("classifier", classifier, lambda batch: (example.new_zeros(batch, *example.shape[1:]),))
            )
        logits = self._traced_logits

        def confidence(x: torch.Tensor, constants: Sequence[torch.Tensor]) -> torch.Tensor:
            return log_confidence(lambda image: logits(image, *constants), x)[0].sum()  # type: ignore[arg-type]

        def gradient(x: torch.Tensor, *constants: torch.Tensor) -> tuple[torch.Tensor, ...]:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                return torch.autograd.grad(confidence(leaf, constants), leaf)

        def hvp(x: torch.Tensor, v: torch.Tensor, *constants: torch.Tensor) -> tuple[torch.Tensor, ...]:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                (g,) = torch.autograd.grad(confidence(leaf, constants), leaf, create_graph=True)
                return torch.autograd.grad(g, leaf, v)

        if name == "gradient":
            return flatten(gradient, (x,), logits.constants)
        return flatten(hvp, (x, x), logits.constants)

    def _score_trace(self) -> TracedScore:
        if self._traced_score is None:
            example, labels = self.example, self.labels

            def arguments(batch: int) -> tuple[torch.Tensor, ...]:
                return example.new_zeros(batch, *example.shape[1:]), labels[:1].expand(batch).clone()

            self._traced_score = TracedScore(self._trace("score net", self.score, arguments), labels)
        return self._traced_score

    def _trace(self, name: str, network: nn.Module, arguments: Callable[[int], tuple[torch.Tensor, ...]]) -> Trace:
        # Fused attention is another operation on every device, and has no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            try:
                return trace(lambda *inputs: network(*inputs), arguments)
            except Exception as error:
                raise ValueError(
                    f"the {name} cannot be made a graph for the cuda engine ({type(error).__name__}: {error}); engine='eager' "
                    "runs it as it is"
                ) from error
