"""Steps of the cuda engine and their transposes for one bucket of batch sizes: static buffers, pieces, and their graphs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from coupfast.engine.cuda.capture import Runner
from coupfast.engine.cuda.check import Piece, check_piece
from coupfast.engine.cuda.networks import CudaNetworks
from coupfast.engine.cuda.order import Order
from coupfast.engine.precision import float32_precision
from coupfast.engine.protocol import Cotangent, Keep, State
from coupfast.guidance import confidence_cotangent, hessian_cotangent, pack_bits, unpack_bits
from coupfast.noise import CounterNoise, Noise
from coupfast_kernels.guided_step import guided_step
from coupfast_kernels.noise import seed_tensor


@dataclasses.dataclass
class _Kept:
    """What a step leaves for its transpose: masks as bits, indices of pools, the softmax; the score network's activations."""

    bits: torch.Tensor | None = None
    indices: list[torch.Tensor] = dataclasses.field(default_factory=list)
    p: torch.Tensor | None = None
    activations: list[torch.Tensor] | None = None


KEEPING = ", keeping activations"  # at the end of a step's name


class CudaProgram:
    """Steps of up to `bucket` images, on static buffers."""

    def __init__(self, networks: CudaNetworks, bucket: int) -> None:
        self.networks, self.bucket, self.table = networks, bucket, networks.table
        example = networks.example
        shape = (bucket, *example.shape[1:])

        def image() -> torch.Tensor:
            return torch.zeros(shape, device=example.device).contiguous(memory_format=torch.channels_last)

        def words(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int64, device=example.device)

        self.x, self.v, self.x_back = image(), image(), image()
        self.step_index, self.step_back = words(), words()
        self.seed, self.ids, self.draw = words(), words(bucket), words(bucket)
        state = [self.x, self.v, self.x_back, self.step_index, self.step_back, self.seed, self.ids, self.draw]
        state += self._more_buffers(image)
        backend = None if networks.backend is None else networks.backend()
        # What guidance finds on a second stream, beside the score network; None: it has none, and comes after it.
        self._beside = image() if backend is not None and networks.runs_beside(bucket) else None
        results = [] if self._beside is None else [self._beside]  # slopes and p, too, when they are made
        self._results = results
        # Activations, by the recording that leaves them. What is captured later gets none of their memory as long as they are
        # here; what was captured before may write there, so nothing else is replayed until they have been read.
        left: dict[str, list[torch.Tensor]] = {}
        self._left = left
        self._found: list[torch.Tensor] | None = None  # some of them, which the way back finds those of a step in
        self.runner = Runner(state, backend, functools.partial(_needs, networks, bucket), lambda: _told(results, left))
        self._pieces: dict[str, Piece] = {}
        self._turn = threading.RLock()
        self._order = Order(example.device)
        self._slopes: list[torch.Tensor] = []
        self._p: torch.Tensor | None = None
        # Where the last call left the buffers, so that the next one need not load them.
        self._forward: Continuation | None = None
        self._backward: Continuation | None = None
        self._order.record()  # the buffers are there for whichever stream comes first

    def __del__(self) -> None:
        # The allocator would give the buffers' memory to others while a stream that it knows nothing of still works on it.
        if hasattr(self, "_order"):
            self._order.finish()

    def _more_buffers(self, image: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        """Buffers that work on other tables needs; those that it writes are returned."""
        return []

    # --- a step -----------------------------------------------------------------------------------------------------------

    def step(
        self, k: int, x_k: torch.Tensor, noise: Noise, keep: Keep = "nothing", *, more: State | None = None
    ) -> tuple[Any, ...]:
        batch = len(x_k)
        counter = self._counter(noise)
        with self._exclusively():
            before, self._forward = self._forward, None  # after an error nobody knows what the buffers hold
            if before is None or not before.leads_to(k, noise, x_k):
                self._load(k, x_k, counter)
            name = self._make_step(counter is not None, keep)
            self._run_step(name, counter is not None)
            d = self.table.row(k)[3]
            if counter is None and d != 0.0:
                self.x[:batch].copy_(self.x[:batch] + d * noise.z(k, x_k))
            x_next = self.x[:batch].clone(memory_format=torch.contiguous_format)
            self._forward = Continuation(k + 1, noise, x_next)
            kept = self._keep(keep, name)
        return x_next, kept

    def step_vjp(self, k: int, x_k: torch.Tensor, saved: Any, v: torch.Tensor, *, more: Cotangent | None = None) -> Any:
        with self._exclusively():
            before, self._backward = self._backward, None
            if before is None or not before.leads_to(k, None, v):
                self._put(self.v, v)
                self.step_back.fill_(k)
            self._run_back(x_k, saved)
            v_k = self.v[: len(x_k)].clone(memory_format=torch.contiguous_format)
            self._backward = Continuation(k - 1, None, v_k)
        return v_k

    def _counter(self, noise: Noise) -> CounterNoise | None:
        """The noise, if it is one that the step's own kernel makes."""
        return noise if isinstance(noise, CounterNoise) and self.networks.noisy else None

    def _make_step(self, counted: bool, keep: Keep) -> str:
        """Make the pieces of a step; returns the step's name."""
        keeping = keep == "activations"
        self._make(self._guided("score keeping" if keeping else "score", "evaluate", "cotangent", smooth="gradient"))
        return f"step{' with noise' if counted else ''}{KEEPING if keeping else ''}"

    def _run_step(self, name: str, counted: bool) -> None:
        try:
            self.runner.run(name, lambda: self._step(counted, name))
        except BaseException:
            if not self.runner.has(name):
                self._left.pop(name, None)  # which may lie in memory of a capture that came to nothing
            raise

    def _run_back(self, x_k: torch.Tensor, saved: _Kept | None) -> None:
        """The transpose at `x_k` of what the buffers hold."""
        networks = self.networks
        self._put(self.x_back, x_k)
        curved = networks.guidance is not None and networks.differentiate_guidance
        at_kept = saved is not None and saved.activations is not None
        score = "score vjp kept" if at_kept else "score vjp"
        self._make(self._guided(score, "evaluate", "tangent", "cotangent", smooth="hvp") if curved else [score])
        rebuilds = curved and networks.pieces.piecewise_linear and (saved is None or saved.p is None)
        if saved is not None:
            self._restore(saved)
        name = f"{'step and transpose' if rebuilds else 'transpose'}{' at kept activations' if at_kept else ''}"
        self.runner.run(name, lambda: self._transpose(curved, rebuilds=rebuilds, at_kept=at_kept))

    # --- what is captured -------------------------------------------------------------------------------------------------

    def _step(self, counted: bool, name: str = "") -> None:
        eps_hat, g = self._eps_hat_and_guidance(name)
        noise = (self.seed, self.ids, self.draw) if counted else None
        guided_step(self.x, eps_hat, g, self.networks.coefficients, self.step_index, noise=noise, out=self.x)
        self.step_index.add_(1)

    def _eps_hat_and_guidance(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """ε̂ and g at `x`, in its format; activations stay where the recording of this name leaves them, if it is to."""

        def score() -> torch.Tensor:
            if not name.endswith(KEEPING):
                return _aligned(self._piece("score")(self.x, self.step_index)[0])
            eps_hat, *self._left[name] = self._piece("score keeping")(self.x, self.step_index)
            return _aligned(eps_hat)

        def guide() -> torch.Tensor:
            piecewise_linear = self.networks.pieces.piecewise_linear
            return _aligned(self._guide(self.x) if piecewise_linear else self._piece("gradient")(self.x)[0])

        return self._both(score, None if self.networks.guidance is None else guide)

    def _both(
        self, score: Callable[[], torch.Tensor], guidance: Callable[[], torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What both find, which read nothing of each other: at once, where the second stream is there for it."""
        if self._beside is None or guidance is None:
            return score(), None if guidance is None else guidance()
        backend, buffer = self.runner.backend, self._beside
        assert backend is not None
        return backend.both(score, lambda: buffer.copy_(guidance())), buffer

    def _guide(self, x: torch.Tensor) -> torch.Tensor:
        """g = Jᵀ(e_ŷ − p) at x; slopes and p stay in their buffers."""
        p = self._evaluate(x)
        return self._piece("cotangent")(confidence_cotangent(p, p.argmax(dim=1)), *self._slopes)[0]

    def _evaluate(self, x: torch.Tensor) -> torch.Tensor:
        logits, *slopes = self._piece("evaluate")(x)
        p = torch.softmax(logits, dim=1)
        if self._p is None:
            self._p, self._slopes = torch.zeros_like(p), [torch.zeros_like(slope) for slope in slopes]
            self._results += [self._p, *self._slopes]
        self._p.copy_(p)
        torch._foreach_copy_(self._slopes, slopes)
        return self._p

    def _transpose(self, curved: bool, *, rebuilds: bool, at_kept: bool = False) -> None:
        u, w = self._both(lambda: self._score_vjp(self.v, at_kept), self._hvp(curved, self.v, rebuilds=rebuilds))
        guided_step(self.v, u, w, self.networks.coefficients, self.step_back, out=self.v)
        self.step_back.sub_(1)

    def _score_vjp(self, u: torch.Tensor, at_kept: bool) -> torch.Tensor:
        """J_ε(x_back)ᵀ u."""
        piece, kept = ("score vjp kept", self._found or []) if at_kept else ("score vjp", [])
        return _aligned(self._piece(piece)(self.x_back, self.step_back, u, *kept)[0])

    def _hvp(self, curved: bool, v: torch.Tensor, *, rebuilds: bool) -> Callable[[], torch.Tensor] | None:
        """What finds H(x_back) v, with slopes that are there or are found again."""
        if not curved:
            return None
        if not self.networks.pieces.piecewise_linear:
            return lambda: _aligned(self._piece("hvp")(self.x_back, v)[0])

        def piecewise_linear() -> torch.Tensor:
            if rebuilds:
                self._evaluate(self.x_back)
            assert self._p is not None
            (q,) = self._piece("tangent")(v, *self._slopes)
            return _aligned(self._piece("cotangent")(hessian_cotangent(self._p, q), *self._slopes)[0])

        return piecewise_linear

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

    def _keep(self, keep: Keep, name: str) -> _Kept | None:
        """What the last step, of this name, leaves for its transpose."""
        kept = _Kept()
        if keep == "activations" and self.runner.backend is None:
            kept.activations = self._left.pop(name)  # the next call makes others
        elif keep == "activations":
            kept.activations = [tensor.clone() for tensor in self._left[name]]
        if keep != "nothing" and self._p is not None and self.networks.differentiate_guidance:
            masks = [slope for slope in self._slopes if slope.dtype == torch.bool]
            kept.bits = pack_bits(torch.cat([mask.reshape(-1) for mask in masks])) if masks else None
            kept.indices = [slope.clone() for slope in self._slopes if slope.dtype != torch.bool]
            kept.p = self._p.clone()
        return None if kept.activations is None and kept.p is None else kept

    def _restore(self, kept: _Kept) -> None:
        if kept.activations is not None and self.runner.backend is None:
            self._found = kept.activations
        elif kept.activations is not None:
            if self._found is None:
                self._found = next(iter(self._left.values()), None) or list(map(torch.empty_like, kept.activations))
            torch._foreach_copy_(self._found, kept.activations)
        if kept.p is None:
            return
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
        if self.networks.guidance is None:
            return [score]
        return [score, *(piecewise_linear if self.networks.pieces.piecewise_linear else [smooth])]

    def _make(self, names: Sequence[str]) -> None:
        """Make pieces, and the buffers of slopes, before anything that uses them is captured: a piece that is wrong is wrong
        without graphs, too."""
        for name in names:
            if name == "evaluate" and self._p is None:
                self._evaluate(self.x)
            self._piece(name)

    def _piece(self, name: str) -> Piece:
        """A piece, compiled, and compared with PyTorch's own result before it is first used."""
        if name not in self._pieces:
            networks = self.networks
            graph, compiler = networks.pieces.make(name, self.bucket), networks.compiler
            run = graph.module if compiler is None else compiler(graph.module, graph.example_inputs())
            piece = lambda *inputs: run(*inputs, *graph.constants)  # noqa: E731
            whole, as_a_whole = piece, name
            if name == "score vjp kept":
                whole, as_a_whole = functools.partial(_both_ways, self._piece("score keeping"), piece), "score vjp"
            tf32 = networks.precision == "tf32"
            check_piece(as_a_whole, whole, networks.eager, self.bucket, self._slopes, tf32=tf32)
            self._pieces[name] = piece
        return self._pieces[name]

    @contextlib.contextmanager
    def _exclusively(self) -> Iterator[None]:
        with float32_precision(self.x.device.type, self.networks.precision), self._turn, self._order, torch.no_grad():
            yield


def _both_ways(keeping: Piece, back: Piece, x: torch.Tensor, step: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Jᵀv by way of the activations."""
    return back(x, step, v, *keeping(x, step)[1:])


def _needs(networks: CudaNetworks, bucket: int) -> str:
    forward, transpose, _ = networks.peaks(bucket)
    return (
        f"a step of {bucket} images is predicted to need up to {forward / 2**20:.0f} MiB, its transpose "
        f"{transpose / 2**20:.0f} MiB, above weights and what is kept"
    )


def _told(results: list[torch.Tensor], left: dict[str, list[torch.Tensor]]) -> list[torch.Tensor]:
    """What a step leaves; of activations, which would be a copy of them all, what their sums tell."""
    sums = [[tensor.sum(dtype=torch.float64) for tensor in tensors] for tensors in left.values()]
    return [*results, *(torch.stack(each) for each in sums if each)]


class Continuation:
    """The call that would go on where the last one stopped.

    Args:
        k: Its step.
        noise: Its noise; None on the way back.
        tensors: What it would be given.
    """

    def __init__(self, k: int, noise: Noise | None, *tensors: torch.Tensor | None) -> None:
        self.k, self.noise = k, noise
        self._tensors = [(tensor, None if tensor is None else tensor._version) for tensor in tensors]

    def leads_to(self, k: int, noise: Noise | None, *tensors: torch.Tensor | None) -> bool:
        """Whether a call is that one, nothing having been written to its tensors since."""
        if k != self.k or noise is not self.noise:
            return False
        pairs = zip(tensors, self._tensors, strict=True)
        return all(given is known and (given is None or given._version == version) for given, (known, version) in pairs)


def _aligned(image: torch.Tensor) -> torch.Tensor:
    """In the format of the state: a network may end in another."""
    return image.contiguous(memory_format=torch.channels_last)
