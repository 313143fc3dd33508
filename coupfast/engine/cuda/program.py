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
from coupfast.engine.precision import float32_precision
from coupfast.engine.protocol import Cotangent, Keep, State
from coupfast.guidance import confidence_cotangent, hessian_cotangent, pack_bits, unpack_bits
from coupfast.noise import CounterNoise, Noise
from coupfast_kernels.guided_step import guided_step
from coupfast_kernels.noise import seed_tensor


@dataclasses.dataclass
class _Kept:
    """What a step leaves for its transpose: masks as bits, indices of pools, and the softmax."""

    bits: torch.Tensor | None
    indices: list[torch.Tensor]
    p: torch.Tensor


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
        results: list[torch.Tensor] = []  # slopes and p, when they are made
        self._results = results
        self.runner = Runner(state, backend, functools.partial(_needs, networks, bucket), lambda: results)
        self._pieces: dict[str, Piece] = {}
        self._turn = threading.RLock()
        self._order = _Order(example.device)
        self._slopes: list[torch.Tensor] = []
        self._p: torch.Tensor | None = None
        # Where the last call left the buffers, so that the next one need not load them.
        self._forward: Continuation | None = None
        self._backward: Continuation | None = None

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
            self._make(self._guided("score", "evaluate", "cotangent", smooth="gradient"))
            name = "step" if counter is None else "step with noise"
            self.runner.run(name, lambda: self._step(counter is not None))
            d = self.table.row(k)[3]
            if counter is None and d != 0.0:
                self.x[:batch].copy_(self.x[:batch] + d * noise.z(k, x_k))
            x_next = self.x[:batch].clone(memory_format=torch.contiguous_format)
            self._forward = Continuation(k + 1, noise, x_next)
            kept = self._keep(keep)
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

    def _run_back(self, x_k: torch.Tensor, saved: Any) -> None:
        """The transpose at `x_k` of what the buffers hold."""
        networks = self.networks
        self._put(self.x_back, x_k)
        curved = networks.guidance is not None and networks.differentiate_guidance
        if curved:
            self._make(self._guided("score vjp", "evaluate", "tangent", "cotangent", smooth="hvp"))
        else:
            self._make(["score vjp"])
        rebuilds = curved and networks.pieces.piecewise_linear and saved is None
        if curved and networks.pieces.piecewise_linear and not rebuilds:
            self._restore(saved)
        name = "step and transpose" if rebuilds else "transpose"
        self.runner.run(name, lambda: self._transpose(curved, rebuilds=rebuilds))

    # --- what is captured -------------------------------------------------------------------------------------------------

    def _step(self, counted: bool) -> None:
        eps_hat, g = self._eps_hat_and_guidance()
        noise = (self.seed, self.ids, self.draw) if counted else None
        guided_step(self.x, eps_hat, g, self.networks.coefficients, self.step_index, noise=noise, out=self.x)
        self.step_index.add_(1)

    def _eps_hat_and_guidance(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """ε̂ and g at `x`, in its format."""
        networks = self.networks
        (eps_hat,) = self._piece("score")(self.x, self.step_index)
        g = None
        if networks.guidance is not None:
            if networks.pieces.piecewise_linear:
                g = self._guide(self.x)
            else:
                (g,) = self._piece("gradient")(self.x)
        return _aligned(eps_hat), None if g is None else _aligned(g)

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

    def _transpose(self, curved: bool, *, rebuilds: bool) -> None:
        if rebuilds:
            self._evaluate(self.x_back)
        u, w = self._score_vjp(self.v), self._hvp(curved, self.v)
        guided_step(self.v, u, w, self.networks.coefficients, self.step_back, out=self.v)
        self.step_back.sub_(1)

    def _score_vjp(self, u: torch.Tensor) -> torch.Tensor:
        """J_ε(x_back)ᵀ u."""
        return _aligned(self._piece("score vjp")(self.x_back, self.step_back, u)[0])

    def _hvp(self, curved: bool, v: torch.Tensor) -> torch.Tensor | None:
        """H(x_back) v."""
        networks, w = self.networks, None
        if curved and networks.pieces.piecewise_linear:
            assert self._p is not None
            (q,) = self._piece("tangent")(v, *self._slopes)
            (w,) = self._piece("cotangent")(hessian_cotangent(self._p, q), *self._slopes)
        elif curved:
            (w,) = self._piece("hvp")(self.x_back, v)
        return None if w is None else _aligned(w)

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

    def _keep(self, keep: Keep) -> _Kept | None:
        """What the last step leaves for its transpose."""
        if keep == "nothing" or self._p is None or not self.networks.differentiate_guidance:
            return None
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
            check_piece(name, piece, networks.eager, self.bucket, self._slopes, tf32=networks.precision == "tf32")
            self._pieces[name] = piece
        return self._pieces[name]

    @contextlib.contextmanager
    def _exclusively(self) -> Iterator[None]:
        with float32_precision(self.x.device.type, self.networks.precision), self._turn, self._order, torch.no_grad():
            yield


def _needs(networks: CudaNetworks, bucket: int) -> str:
    memory = networks.memory(bucket)
    return (
        f"a step of {bucket} images is predicted to need up to {memory.forward / 2**20:.0f} MiB, its transpose "
        f"{memory.transpose / 2**20:.0f} MiB, above weights"
    )


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
