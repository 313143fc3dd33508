"""The CUDA engine: networks as flat compiled graphs, kernels of this project where they are better, a step as one CUDA graph.

A step consists of up to six pieces, each a flat graph of tensors (`coupfast.engine.flat`):

    score       x, step → ε̂                    evaluate    x → f(x), slopes
    score vjp   x, step, v → Jᵀv               cotangent   u, slopes → Jᵀu
                                               tangent     v, slopes → J v

Guidance and its Hessian are made of the last three where the classifier is piecewise linear (g = Jᵀ(e_ŷ − p),
H v = −Jᵀ(diag p − p pᵀ) J v), so that a step and its transpose use the same slopes to the bit, kept or rebuilt. A smooth
classifier has `gradient` (x → g) and `hvp` (x, v → H v) instead. Convolutions and group norms are replaced by this project's
kernels (`coupfast.engine.fused`), each piece is compiled, and the pieces of a step are captured together with the guided step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from coupfast.engine import CounterNoise, Keep, Noise, StepMemory
from coupfast.engine.calibration import LIBRARY, Calibration, ConvolutionShape
from coupfast.engine.eager import EagerProgram, guidance_of
from coupfast.engine.flat import FlatGraph, TracedClassifier, TracedLogits, TracedScore, flatten
from coupfast.engine.fused import Conv3x3Choice, PackedWeights, fuse_kernels
from coupfast.engine.graphs import Backend, CudaBackend, Runner
from coupfast.engine.precision import Precision, float32_precision
from coupfast.environment import driver_cuda
from coupfast.guidance import Guidance, log_confidence, pack_bits, unpack_bits
from coupfast.solvers import CoefficientTable
from coupfast.tracing import Trace, trace
from coupfast_kernels.guided_step import guided_step
from coupfast_kernels.noise import seed_tensor

#: Batches are padded up to one of these, so that a smaller last batch needs no graph of its own.
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
#: Programs that are kept: each holds graphs and their memory.
KEPT_PROGRAMS = 4
PRECISIONS = ("strict", "fast", "3xtf32", "tf32")
LEAST_CAPABILITY = (8, 0)  # what the kernels are compiled for in the tests begins here
LEAST_TRITON = (3, 5)


@dataclasses.dataclass(frozen=True)
class Options:
    """Parts of the engine that can be switched off, to find out which one is at fault.

    Attributes:
        compile: Compile every piece with torch.compile.
        graphs: Capture a step as a CUDA graph and replay it.
        triton: Use this project's convolutions and group norms where calibration chooses them.
    """

    compile: bool = True
    graphs: bool = True
    triton: bool = True

    @classmethod
    def of(cls, given: Mapping[str, bool] | None) -> Options:
        """From `engine_options`.

        Raises:
            ValueError: for an option that does not exist, or a value that is no bool.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name, value in (given or {}).items():
            if name not in known:
                raise ValueError(f"`engine_options` of the cuda engine are {', '.join(known)}; got {name!r}")
            if not isinstance(value, bool):
                raise ValueError(f"`engine_options[{name!r}]` is True or False, got {value!r}")
        return cls(**(given or {}))


@dataclasses.dataclass
class _Kept:
    """What a step leaves for its transpose: masks as bits, indices of pools, and the softmax."""

    bits: torch.Tensor | None
    indices: list[torch.Tensor]
    p: torch.Tensor


class CudaPrograms:
    """The engine bound to networks, a table and a shape of images; one `CudaProgram` per bucket of batch sizes.

    Made by `prepare`, which checks the device. Everything here runs on any device: tests run it on the CPU with a stand-in for
    graph capture.

    Args:
        backend: Makes what captures graphs; None runs pieces call by call.
        compiler: Compiles a piece; None runs its operations one by one.
        choose: Which algorithm a convolution takes; None leaves all to the library.
    """

    engine = "cuda"
    largest_batch: int | None = BUCKETS[-1]

    def __init__(
        self,
        score: nn.Module,
        guidance: Guidance | None,
        table: CoefficientTable,
        example: torch.Tensor,
        differentiate_guidance: bool,
        *,
        precision: str = "strict",
        backend: Callable[[], Backend] | None = None,
        compiler: Callable[[torch.fx.GraphModule], Callable] | None = None,
        choose: Conv3x3Choice | None = None,
        fuse_norms: bool = False,
    ) -> None:
        self.score, self.guidance, self.table = score, guidance, table
        self.differentiate_guidance = differentiate_guidance
        self.precision, self.backend, self.compiler = precision, backend, compiler
        self.choose, self.fuse_norms = choose, fuse_norms
        self.example = torch.zeros_like(example[:1])
        self.eager = EagerProgram(score, guidance, table, example, differentiate_guidance)
        #: Slopes, label and p of a smooth classifier are its own business.
        self.piecewise_linear = guidance is not None and guidance.graph is not None
        self.coefficients = table.tensor(dtype=torch.float32, device=example.device)
        self.noisy = bool((table.d != 0.0).any())
        self._traced_score: TracedScore | None = None
        self._traced_classifier: TracedClassifier | None = None
        self._traced_logits: TracedLogits | None = None
        self._programs: OrderedDict[int, CudaProgram] = OrderedDict()
        self._packed: PackedWeights = {}
        self._lock = threading.RLock()

    def for_batch(self, batch: int) -> CudaProgram:
        """The program of the smallest bucket that holds so many images.

        Also where a larger one is there already: what a batch gives must not depend on which batches came before it.

        Raises:
            ValueError: for more images than the largest bucket.
        """
        bucket = bucket_of(batch)
        with self._lock:
            if bucket not in self._programs:
                self._programs[bucket] = CudaProgram(self, bucket)
                while len(self._programs) > KEPT_PROGRAMS:
                    self._programs.popitem(last=False)
            self._programs.move_to_end(bucket)
            return self._programs[bucket]

    def memory(self, batch: int) -> StepMemory:
        """As PyTorch would need it operation by operation for the bucket, which is more than compiled pieces take."""
        eager = self.eager.memory(bucket_of(batch))
        return StepMemory(eager.forward, eager.forward, eager.transpose, eager.transpose, eager.slopes, eager.slopes)

    def weights_bytes(self, batch: int, *, gradient: bool) -> int:
        """Copies of weights, as far as they are made: in channels last, and packed for this project's convolutions."""
        networks = [self.score] + ([] if self.guidance is None else [self.guidance.classifier])
        own = {weight.data_ptr() for network in networks for weight in [*network.parameters(), *network.buffers()]}
        traces = (self._traced_score, self._traced_classifier, self._traced_logits)
        made = [traced.constants for traced in traces if traced is not None]
        copies = [packed for _, packed in self._packed.values()] + [constant for constants in made for constant in constants]
        return sum({copy.data_ptr(): copy.nbytes for copy in copies if copy.data_ptr() not in own}.values())

    def evaluations(self) -> dict[str, dict[str, int]]:
        kinds = self.eager.evaluations()
        return kinds | {"activations": kinds["slopes"]}

    # --- pieces -----------------------------------------------------------------------------------------------------------

    def piece_names(self) -> list[str]:
        names = ["score", "score vjp"]
        if self.guidance is not None:
            names += ["evaluate", "cotangent"] if self.piecewise_linear else ["gradient"]
            if self.differentiate_guidance:
                names += ["tangent"] if self.piecewise_linear else ["hvp"]
        return names

    def piece(self, name: str, bucket: int) -> FlatGraph:
        """One flat graph of a bucket, with this project's kernels in it, not compiled."""
        x = self.example.new_zeros(bucket, *self.example.shape[1:]).contiguous(memory_format=torch.channels_last)
        with self._lock:  # traces and packed weights are all programs'
            if name.startswith("score"):
                flat = self._score_piece(name, x)
            elif self.piecewise_linear:
                flat = self._piecewise_linear_piece(name, x)
            else:
                flat = self._smooth_piece(name, x)
            fuse_kernels(flat, self.choose, norms=self.fuse_norms, packed=self._packed)
        return flat

    def _score_piece(self, name: str, x: torch.Tensor) -> FlatGraph:
        score = self._score_trace()
        step = torch.zeros((), dtype=torch.int64, device=x.device)

        def evaluate(x: torch.Tensor, step: torch.Tensor, *constants: torch.Tensor) -> tuple[torch.Tensor, ...]:
            with torch.no_grad():
                return (score(x, step, *constants),)

        def vjp(x: torch.Tensor, step: torch.Tensor, v: torch.Tensor, *constants: torch.Tensor) -> tuple[torch.Tensor, ...]:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                eps_hat = score(leaf, step, *constants)
                if not eps_hat.requires_grad:  # constant in x: its transpose is zero
                    return (torch.zeros_like(v),)
                return torch.autograd.grad(eps_hat, leaf, v)

        if name == "score":
            return flatten(evaluate, (x, step), score.constants)
        return flatten(vjp, (x, step, x), score.constants)

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
            example, labels = self.example, self.eager.labels

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


class CudaProgram:
    """Steps of up to `bucket` images, on static buffers."""

    def __init__(self, programs: CudaPrograms, bucket: int) -> None:
        self.programs, self.bucket, self.table = programs, bucket, programs.table
        example = programs.example
        shape = (bucket, *example.shape[1:])

        def image() -> torch.Tensor:
            return torch.zeros(shape, device=example.device).contiguous(memory_format=torch.channels_last)

        def words(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int64, device=example.device)

        self.x, self.v, self.x_back = image(), image(), image()
        self.step_index, self.step_back = words(), words()
        self.seed, self.ids, self.draw = words(), words(bucket), words(bucket)
        state = [self.x, self.v, self.x_back, self.step_index, self.step_back, self.seed, self.ids, self.draw]
        backend = None if programs.backend is None else programs.backend()
        self.runner = Runner(state, backend, functools.partial(_needs, programs, bucket))
        self._pieces: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {}
        self._turn = threading.RLock()
        self._order = _Order(example.device)
        self._slopes: list[torch.Tensor] = []
        self._p: torch.Tensor | None = None
        # Where the last call left the buffers, so that the next one need not load them.
        self._forward: _Continuation | None = None
        self._backward: _Continuation | None = None

    def __del__(self) -> None:
        # The allocator would give the buffers' memory to others while a stream that it knows nothing of still works on it.
        if hasattr(self, "_order"):
            self._order.finish()

    # --- a step -----------------------------------------------------------------------------------------------------------

    def step(self, k: int, x_k: torch.Tensor, noise: Noise, keep: Keep = "nothing") -> tuple[torch.Tensor, Any]:
        batch = len(x_k)
        counter = noise if isinstance(noise, CounterNoise) and self.programs.noisy else None
        with self._exclusively():
            before, self._forward = self._forward, None  # after an error nobody knows what the buffers hold
            if before is None or not before.leads_to(k, x_k, noise):
                self._load(k, x_k, counter)
            self._make(self._guided("score", "evaluate", "cotangent", smooth="gradient"))
            name = "step" if counter is None else "step with noise"
            self.runner.run(name, lambda: self._step(counter is not None))
            d = self.table.row(k)[3]
            if counter is None and d != 0.0:
                self.x[:batch].copy_(self.x[:batch] + d * noise.z(k, x_k))
            x_next = self.x[:batch].clone(memory_format=torch.contiguous_format)
            self._forward = _Continuation(k + 1, x_next, x_next._version, noise)
            kept = None
            if keep != "nothing" and self._p is not None and self.programs.differentiate_guidance:
                kept = self._keep()
        return x_next, kept

    def step_vjp(self, k: int, x_k: torch.Tensor, saved: Any, v: torch.Tensor) -> torch.Tensor:
        batch = len(x_k)
        programs = self.programs
        with self._exclusively():
            before, self._backward = self._backward, None
            if before is None or not before.leads_to(k, v, None):
                self._put(self.v, v)
                self.step_back.fill_(k)
            self._put(self.x_back, x_k)
            curved = programs.guidance is not None and programs.differentiate_guidance
            if curved:
                self._make(self._guided("score vjp", "evaluate", "tangent", "cotangent", smooth="hvp"))
            else:
                self._make(["score vjp"])
            rebuilds = curved and programs.piecewise_linear and saved is None
            if curved and programs.piecewise_linear and not rebuilds:
                self._restore(saved)
            name = "step and transpose" if rebuilds else "transpose"
            self.runner.run(name, lambda: self._transpose(curved, rebuilds=rebuilds))
            v_k = self.v[:batch].clone(memory_format=torch.contiguous_format)
            self._backward = _Continuation(k - 1, v_k, v_k._version, None)
        return v_k

    # --- what is captured -------------------------------------------------------------------------------------------------

    def _step(self, counted: bool) -> None:
        programs = self.programs
        (eps_hat,) = self._piece("score")(self.x, self.step_index)
        g = None
        if programs.guidance is not None:
            if programs.piecewise_linear:
                g = self._guide(self.x)
            else:
                (g,) = self._piece("gradient")(self.x)
        noise = (self.seed, self.ids, self.draw) if counted else None
        g = None if g is None else _aligned(g)
        guided_step(self.x, _aligned(eps_hat), g, programs.coefficients, self.step_index, noise=noise, out=self.x)
        self.step_index.add_(1)

    def _guide(self, x: torch.Tensor) -> torch.Tensor:
        """g = Jᵀ(e_ŷ − p) at x; slopes and p stay in their buffers."""
        p = self._evaluate(x)
        e = torch.zeros_like(p).scatter_(1, p.argmax(dim=1, keepdim=True), 1.0)
        return self._piece("cotangent")(e - p, *self._slopes)[0]

    def _evaluate(self, x: torch.Tensor) -> torch.Tensor:
        logits, *slopes = self._piece("evaluate")(x)
        p = torch.softmax(logits, dim=1)
        if self._p is None:
            self._p, self._slopes = torch.zeros_like(p), [torch.zeros_like(slope) for slope in slopes]
        self._p.copy_(p)
        torch._foreach_copy_(self._slopes, slopes)
        return self._p

    def _transpose(self, curved: bool, *, rebuilds: bool) -> None:
        programs = self.programs
        if rebuilds:
            self._evaluate(self.x_back)
        (u,) = self._piece("score vjp")(self.x_back, self.step_back, self.v)
        w = None
        if curved and programs.piecewise_linear:
            assert self._p is not None
            (q,) = self._piece("tangent")(self.v, *self._slopes)
            cotangent = self._p * ((self._p * q).sum(dim=1, keepdim=True) - q)  # −(diag p − p pᵀ) J v
            (w,) = self._piece("cotangent")(cotangent, *self._slopes)
        elif curved:
            (w,) = self._piece("hvp")(self.x_back, self.v)
        w = None if w is None else _aligned(w)
        guided_step(self.v, _aligned(u), w, programs.coefficients, self.step_back, out=self.v)
        self.step_back.sub_(1)

    # --- buffers ----------------------------------------------------------------------------------------------------------

    def _load(self, k: int, x_k: torch.Tensor, noise: CounterNoise | None) -> None:
        batch = len(x_k)
        self._put(self.x, x_k)
        self.step_index.fill_(k)
        if noise is not None:
            self.seed.copy_(seed_tensor(noise.seed, self.seed.device))
            self.ids[:batch].copy_(noise.ids)
            self.draw[:batch].copy_(noise.draw)

    def _put(self, buffer: torch.Tensor, values: torch.Tensor) -> None:
        if values.dtype != buffer.dtype or values.device != buffer.device or values.shape[1:] != buffer.shape[1:]:
            raise ValueError(
                f"this program runs {buffer.dtype} states of shape {tuple(buffer.shape[1:])} on {buffer.device}, got "
                f"{values.dtype}, {tuple(values.shape[1:])}, {values.device}"
            )
        if len(values) > self.bucket:
            raise ValueError(f"this program runs up to {self.bucket} images, got {len(values)}")
        buffer[: len(values)].copy_(values)
        buffer[len(values) :].zero_()  # what was left there could grow without bound over many runs

    def _keep(self) -> _Kept:
        assert self._p is not None
        masks = [slope for slope in self._slopes if slope.dtype == torch.bool]
        bits = pack_bits(torch.cat([mask.reshape(-1) for mask in masks])) if masks else None
        return _Kept(bits, [slope.clone() for slope in self._slopes if slope.dtype != torch.bool], self._p.clone())

    def _restore(self, kept: _Kept) -> None:
        assert self._p is not None
        self._p.copy_(kept.p)
        masks = [slope for slope in self._slopes if slope.dtype == torch.bool]
        if kept.bits is not None:
            sizes = [mask.numel() for mask in masks]
            flat = unpack_bits(kept.bits, torch.Size([sum(sizes)])).split(sizes)
            torch._foreach_copy_(masks, [part.view(mask.shape) for part, mask in zip(flat, masks, strict=True)])
        for slope, indices in zip((s for s in self._slopes if s.dtype != torch.bool), kept.indices, strict=True):
            slope.copy_(indices)

    # --- pieces -----------------------------------------------------------------------------------------------------------

    def _guided(self, score: str, *piecewise_linear: str, smooth: str) -> list[str]:
        """Names of pieces, by the kind of guidance."""
        if self.programs.guidance is None:
            return [score]
        return [score, *(piecewise_linear if self.programs.piecewise_linear else [smooth])]

    def _make(self, names: Sequence[str]) -> None:
        """Make pieces, and the buffers of slopes, before anything that uses them is captured: a piece that is wrong is wrong
        without graphs, too."""
        for name in names:
            if name == "evaluate" and self._p is None:
                self._evaluate(self.x)
            self._piece(name)

    def _piece(self, name: str) -> Callable[..., tuple[torch.Tensor, ...]]:
        """A piece, compiled, and compared with PyTorch's own result before it is first used."""
        if name not in self._pieces:
            graph, compiler = self.programs.piece(name, self.bucket), self.programs.compiler
            run = graph.module if compiler is None else compiler(graph.module)
            piece = lambda *inputs: run(*inputs, *graph.constants)  # noqa: E731
            self._check(name, piece)
            self._pieces[name] = piece
        return self._pieces[name]

    def _check(self, name: str, piece: Callable[..., tuple[torch.Tensor, ...]]) -> None:
        """RuntimeError if a piece differs from what PyTorch finds by more than rounding does."""
        programs, guidance = self.programs, self.programs.guidance
        generator = torch.Generator().manual_seed(0)

        def random(like: torch.Tensor) -> torch.Tensor:
            return torch.randn(like.shape, generator=generator).to(like.device).contiguous(memory_format=torch.channels_last)

        x, v = random(self.x), random(self.x)
        as_given = x.contiguous()  # a network may ask for it, by a `view`
        with torch.enable_grad():
            if name.startswith("score"):
                # The last step's label: one that was read behind the trace's back would show.
                k = self.table.num_steps - 1
                leaf = as_given.clone().requires_grad_()
                eps_hat = programs.score(leaf, programs.eager.labels[k].expand(self.bucket))
                step = torch.full((), k, dtype=torch.int64, device=x.device)
                wanted = eps_hat.detach()
                inputs: tuple[torch.Tensor, ...] = (x, step)
                if name == "score vjp":
                    wanted = torch.autograd.grad(eps_hat, leaf, v)[0] if eps_hat.requires_grad else torch.zeros_like(v)
                    inputs = (x, step, v)
            elif name in ("gradient", "hvp"):
                assert guidance is not None
                wanted = guidance.gradient(as_given)[0] if name == "gradient" else guidance.hvp(as_given, v)
                inputs = (x,) if name == "gradient" else (x, v)
            else:
                assert guidance is not None and guidance.graph is not None
                logits, slopes = guidance.graph.evaluate(as_given, keep_slopes=True)
                wanted, inputs = logits.detach(), (x,)
                if name != "evaluate":
                    # In the strides of the buffers that the piece will read: it is compiled for its inputs' strides.
                    pairs = zip(self._slopes, slopes, strict=True)
                    sides = [torch.empty_like(buffer).copy_(slope.side()) for buffer, slope in pairs]
                    leaf = v.contiguous().requires_grad_()
                    product = guidance.graph.linear(leaf, slopes)
                    wanted, inputs = product.detach(), (v, *sides)
                    if name == "cotangent":
                        u = torch.randn(logits.shape, generator=generator).to(logits)
                        (wanted,) = torch.autograd.grad(product, leaf, u)
                        inputs = (u, *sides)
        found, *sides = piece(*inputs)
        # TF32 keeps 11 bits; in float32 a ReLU on its kink may fall on either side where slopes are not given.
        at_kinks = 3e-2
        limit = at_kinks if programs.precision == "tf32" or name in ("gradient", "hvp") else 1e-4
        self._require_close(name, found, wanted, limit)
        if name == "evaluate":
            assert guidance is not None and guidance.graph is not None
            # Slopes by what they make of a tangent: of a maximum of equal values either index is right.
            with torch.no_grad():
                self._require_close("slopes", guidance.graph.linear(v, sides), guidance.graph.linear(v, slopes), at_kinks)

    def _require_close(self, name: str, found: torch.Tensor, wanted: torch.Tensor, limit: float) -> None:
        difference = float((found - wanted).norm() / wanted.norm().clamp_min(torch.finfo(torch.float32).tiny))
        if not difference <= limit:
            raise RuntimeError(
                f"the cuda engine's {name!r} differs from PyTorch's on this device: relative difference {difference:.3g}, "
                f"allowed {limit:g}. `coupfast doctor` finds the part that is wrong, engine_options={{'triton': False}} (or "
                f"'compile') leaves it out, engine='eager' does without all"
            )

    @contextlib.contextmanager
    def _exclusively(self) -> Iterator[None]:
        precision: Precision = "tf32" if self.programs.precision == "tf32" else "ieee"
        with float32_precision(self.x.device.type, precision), self._turn, self._order, torch.no_grad():
            yield


def _needs(programs: CudaPrograms, bucket: int) -> str:
    memory = programs.memory(bucket)
    return (
        f"a step of {bucket} images is predicted to need up to {memory.forward / 2**20:.0f} MiB, its transpose "
        f"{memory.transpose / 2**20:.0f} MiB, above weights"
    )


@dataclasses.dataclass
class _Continuation:
    """The call that would go on where the last one stopped."""

    k: int
    state: torch.Tensor
    version: int
    noise: Noise | None

    def leads_to(self, k: int, state: torch.Tensor, noise: Noise | None) -> bool:
        return k == self.k and state is self.state and state._version == self.version and noise is self.noise


class _Order:
    """Calls from several streams, one after the other: they share buffers."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._last: torch.cuda.Event | None = None

    def __enter__(self) -> None:
        if self.device.type == "cuda" and self._last is not None:
            torch.cuda.current_stream(self.device).wait_event(self._last)

    def finish(self) -> None:
        """Wait for the last call's work."""
        if self._last is not None:
            with contextlib.suppress(RuntimeError):  # a device that has failed, or is gone with the interpreter
                self._last.synchronize()

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self._last = torch.cuda.Event()
            self._last.record(torch.cuda.current_stream(self.device))


def _aligned(image: torch.Tensor) -> torch.Tensor:
    """In the format of the state: a network may end in another."""
    return image.contiguous(memory_format=torch.channels_last)


def bucket_of(batch: int) -> int:
    """The smallest bucket for so many images; ValueError if there is none."""
    for bucket in BUCKETS:
        if batch <= bucket:
            return bucket
    raise ValueError(f"the cuda engine runs up to {BUCKETS[-1]} images at a time, got {batch}; split the batch")


def unavailable(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why this engine cannot run networks of this kind here, or None."""
    if device.type != "cuda" or dtype != torch.float32:
        return f"the cuda engine runs float32 on a GPU, not {dtype} on {device.type}"
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA (for ROCm?), which the cuda engine's graphs and kernels are made for"
    driver = driver_cuda()
    if driver is not None and driver[0] < int(torch.version.cuda.split(".")[0]):
        return (
            f"the NVIDIA driver serves CUDA {driver[0]}.{driver[1]}, and this PyTorch is built with {torch.version.cuda}: "
            f"update the driver, or install a PyTorch for CUDA {driver[0]}"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}; the cuda engine's "
            f"kernels are made and checked for {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} and later"
        )
    return _triton_unavailable()


def _triton_unavailable() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"the cuda engine needs Triton ({error}); PyTorch's builds for CUDA on Linux bring it"
    version = triton.__version__
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < LEAST_TRITON:
        return f"the cuda engine needs Triton {LEAST_TRITON[0]}.{LEAST_TRITON[1]} or later, found {version}"
    return None


def prepare(
    score: nn.Module,
    classifier: nn.Module | None,
    table: CoefficientTable,
    example: torch.Tensor,
    *,
    differentiate_guidance: bool = True,
    precision: str = "strict",
    options: Mapping[str, bool] | None = None,
) -> CudaPrograms:
    """Programs for states like `example`; the first arguments are those of the eager engine.

    Args:
        precision: One of `PRECISIONS`: "strict" and "fast" compute in IEEE float32 (calibration allows errors of four times the
            library's, and up to 1e-5); "3xtf32" takes 3x3 convolutions on tensor cores, with every product split in three;
            "tf32" allows TF32 in all convolutions and matrix products.
        options: Parts to switch off, see `Options`.

    Raises:
        ValueError: for a dtype or device that is not this engine's, or options that do not exist or contradict each other.
        RuntimeError: where the device, PyTorch or Triton is not up to it.
    """
    chosen = Options.of(options)
    if precision == "3xtf32" and not chosen.triton:
        raise ValueError("precision='3xtf32' is a precision of this project's convolutions: it needs engine_options 'triton'")
    reason = unavailable(example.dtype, example.device)
    if reason is not None:
        if example.device.type == "cuda" and example.dtype == torch.float32:
            raise RuntimeError(f"{reason}; engine='eager' runs without")
        raise ValueError(f"{reason}; engine='eager' does")
    compiler = functools.partial(torch.compile, fullgraph=True, dynamic=False) if chosen.compile else None
    choose = None
    if chosen.triton:
        calibration = Calibration(example.device, precision=precision, compiler=compiler)

        def choose(batch: int, in_channels: int, out_channels: int, height: int, width: int) -> str:
            shape = ConvolutionShape(batch, in_channels, out_channels, height, width)
            kind, _, precision = calibration.choose(shape).candidate.partition("triton-")
            return LIBRARY if kind else precision

    return CudaPrograms(
        score,
        guidance_of(classifier, table, example),
        table,
        example,
        differentiate_guidance,
        precision=precision,
        backend=(lambda: CudaBackend(example.device)) if chosen.graphs else None,
        compiler=compiler,
        choose=choose,
        fuse_norms=chosen.triton,
    )
