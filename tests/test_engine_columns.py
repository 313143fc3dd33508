"""Tables with columns beside the first four, on every engine: forwards and in gradients those of a plain loop in float64."""

import copy
import functools
import itertools

import numpy as np
import pytest
import torch
from conftest import relu_classifier, silu_classifier
from graph_backend import StandIn
from torch import nn

from coupfast.engine import Cotangent, CounterNoise, ReplayedNoise, State, cpu, eager
from coupfast.engine.cuda import BoundCudaEngine
from coupfast.engine.cuda.networks import CudaNetworks
from coupfast.guidance import Guidance, log_confidence
from coupfast.integrate import Run, Storage, integrate
from coupfast.solvers import CoefficientTable
from coupfast_kernels import native

STEPS = 4
SUBSETS = ["".join(s) for size in range(1, 5) for s in itertools.combinations("efpq", size)]
needs_compiler = pytest.mark.skipif(native.unavailable() is not None, reason=native.unavailable() or "")


class Score(nn.Module):
    """Two convolutions with a group norm and a label in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.norm, self.time = nn.GroupNorm(2, 8), nn.Linear(1, 8)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        h = self.first(x) + self.time(labels[:, None] / 100)[:, :, None, None]
        return self.last(torch.nn.functional.silu(self.norm(h)))


@functools.cache
def networks(smooth: bool, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        score = Score().eval().requires_grad_(False)
    classifier = (silu_classifier if smooth else relu_classifier)(torch.float64)
    return copy.deepcopy(score).to(dtype), classifier.to(dtype).requires_grad_(False)


def table(columns: str, seed: int = 0) -> CoefficientTable:
    """Factors of order one, those of the step before being zero in step 0, as they have to be."""
    random = np.random.default_rng([seed, *columns.encode()])

    def column(size: float) -> np.ndarray:
        return size * random.uniform(0.5, 1.0, STEPS) * random.choice([-1.0, 1.0], STEPS)

    more = {name: column(0.4) for name in columns}
    for name in set(columns) & set("pq"):
        more[name][0] = 0.0
    if "m" in columns:  # x̂0 that lies inside of [-1, 1] for some pixels, and outside for others
        more |= {"m": 1.5 + column(0.1), "n": column(1.0)}
    return CoefficientTable(np.linspace(0.3, 0.1, STEPS + 1), column(0.9), column(0.5), column(0.3), column(0.3), **more)


def normal(*shape: int, seed: int) -> torch.Tensor:
    """float64 numbers that float32 has, too."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).double()


def plain_loop(table, score, classifier, x, x_in, z, z2):
    """The definition of a run, for autograd to go through; float64."""
    x_before, eps_before = torch.zeros_like(x), torch.zeros_like(x)
    for k in range(table.num_steps):
        a, b, c, d, e, f, p, q = (*table.row(k), 0.0, 0.0, 0.0, 0.0)[:8]
        eps_hat = score(x, torch.full((len(x),), float(table.labels[k]), dtype=x.dtype))
        point = x if x.requires_grad else x.requires_grad_()
        (g,) = torch.autograd.grad(log_confidence(classifier, point)[0].sum(), point, create_graph=True)
        if table.m is not None:
            m, n = float(table.m[k]), float(table.n[k])
            eps_hat = ((m * x + n * eps_hat).clamp(-1.0, 1.0) - m * x) / n
        x_next = a * x + b * eps_hat + c * g + d * z[k] + e * x_in + f * z2[k] + p * x_before + q * eps_before
        if table.s is not None:
            eps_hat = eps_hat + table.s[k] * g
        x, x_before, eps_before = x_next, x, eps_hat
    return x


def noises(batch: int, counted: bool):
    """As engines take it, and its rows in float64."""
    if counted:
        noise = CounterNoise(2**63 + 5, torch.arange(batch) + 7, torch.full((batch,), 3))
        like = torch.zeros(batch, 3, 8, 8)
        z, z2 = (torch.stack([one(k, like) for k in range(STEPS)]).double() for one in (noise.z, noise.z2))
        return noise, z, z2
    z, z2 = normal(STEPS, batch, 3, 8, 8, seed=11), normal(STEPS, batch, 3, 8, 8, seed=12)
    return ReplayedNoise(z, z2), z, z2


@functools.cache
def wanted(columns: str, batch: int, counted: bool, smooth: bool):
    """x_K, and the gradients of a weighted sum of it with respect to x_0, x_in, z and z'."""
    score, classifier = networks(smooth, torch.float64)
    _, z, z2 = noises(batch, counted)
    leaves = [normal(batch, 3, 8, 8, seed=1), normal(batch, 3, 8, 8, seed=2), z.clone(), z2.clone()]
    for leaf in leaves:
        leaf.requires_grad_()
    x = plain_loop(table(columns), score, classifier, *leaves)
    gradients = torch.autograd.grad((x * normal(*x.shape, seed=6)).sum(), leaves, allow_unused=True)
    return x.detach(), gradients


def found(bound, columns: str, batch: int, counted: bool, dtype: torch.dtype, storage: Storage):
    """The same from an engine."""
    noise, *_ = noises(batch, counted)
    x, x_in = (normal(batch, 3, 8, 8, seed=seed).to(dtype).requires_grad_() for seed in (1, 2))
    leaves = [x, x_in]
    if not counted:
        noise = ReplayedNoise(noise.rows.to(dtype).requires_grad_(), noise.second.to(dtype).requires_grad_())
        leaves += [noise.rows, noise.second]
    run = Run(bound, noise, storage)
    end = integrate(x, run, gradient=True, x_in=x_in if "e" in columns else None)
    gradients = torch.autograd.grad((end * normal(*end.shape, seed=6).to(dtype)).sum(), leaves, allow_unused=True)
    with torch.no_grad():
        again = integrate(x, Run(bound, noise, storage), gradient=False, x_in=x_in if "e" in columns else None)
    assert torch.equal(again, end)
    return end.detach(), gradients


def assert_agrees(ours, theirs, roundings: float, eps: float) -> None:
    """Within so many roundings of the largest value."""
    pairs = [(ours[0], theirs[0]), *zip(ours[1], theirs[1], strict=False)]
    for a, b in pairs:
        if a is None or b is None:  # x_in, or z', which no column reads
            assert (a is None or not a.any()) and (b is None or not b.any())
            continue
        torch.testing.assert_close(a.double(), b, rtol=0, atol=roundings * eps * float(b.abs().max()))


# Four steps of a dozen products and sums each, around networks of some ten layers that sum up to a few hundred terms in
# another order.
ROUNDINGS = 500
F64, F32 = torch.finfo(torch.float64).eps, torch.finfo(torch.float32).eps

CASES = [(columns, batch, counted, False) for columns in SUBSETS for batch, counted in ((1, False), (3, True))]
CASES += [(columns, batch, counted, True) for columns in ("e", "fq", "efpq") for batch, counted in ((1, True), (3, False))]
# A clipped x̂0, and guidance in what the next step reads of this one.
CASES += [(columns, 1, False, False) for columns in ("m", "qs", "efpqms")]
CASES += [(columns, 3, True, smooth) for columns in ("m", "pqms") for smooth in (False, True)]


@pytest.mark.parametrize(("columns", "batch", "counted", "smooth"), CASES, ids=str)
def test_eager_in_float64(columns, batch, counted, smooth):
    score, classifier = networks(smooth, torch.float64)
    bound = eager.prepare(score, classifier, table(columns), torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    for storage in (Storage(batch), Storage(batch, slopes=True, kept_steps=2)):
        ours = found(bound, columns, batch, counted, torch.float64, storage)
        assert_agrees(ours, wanted(columns, batch, counted, smooth), ROUNDINGS, F64)


@needs_compiler
@pytest.mark.parametrize(("columns", "batch", "counted", "smooth"), [*CASES, ("efpq", 3, False, False)], ids=str)
def test_cpu(columns, batch, counted, smooth):
    score, classifier = networks(smooth, torch.float32)
    bound = cpu.prepare(score, classifier, table(columns), torch.zeros(1, 3, 8, 8))
    for storage in (Storage(batch), Storage(batch, slopes=True)):
        ours = found(bound, columns, batch, counted, torch.float32, storage)
        assert_agrees(ours, wanted(columns, batch, counted, smooth), ROUNDINGS, F32)
    if batch > 1:
        ours = found(bound, columns, batch, counted, torch.float32, Storage(2))
        assert_agrees(ours, wanted(columns, batch, counted, smooth), ROUNDINGS, F32)


@needs_compiler
@pytest.mark.parametrize(("columns", "batch", "counted"), [("m", 3, True), ("efpqms", 1, False)], ids=str)
def test_cpu_with_activations(columns, batch, counted):
    """Where x̂0 was not clipped is kept with them."""
    bound = cpu.prepare(*networks(False, torch.float32), table(columns), torch.zeros(1, 3, 8, 8))
    ours = found(bound, columns, batch, counted, torch.float32, Storage(batch, slopes=True, kept_steps=3))
    assert_agrees(ours, wanted(columns, batch, counted, False), ROUNDINGS, F32)


PIECES: dict = {}


def bound_cuda(columns: str | CoefficientTable, smooth: bool) -> BoundCudaEngine:
    """On the CPU, with graphs that a stand-in records; pieces, which depend on no factor, are traced once."""
    score, classifier = networks(smooth, torch.float32)
    example, chosen = torch.zeros(1, 3, 8, 8), table(columns) if isinstance(columns, str) else columns
    made = CudaNetworks(score, Guidance(classifier, example), chosen, example, True, backend=StandIn, beside=2)
    if chosen.m is None:  # its pieces have the table's own numbers
        made.pieces = PIECES.setdefault(smooth, made.pieces)
    return BoundCudaEngine(made)


@pytest.mark.parametrize(("columns", "batch", "counted", "smooth"), [*CASES, ("efpq", 3, False, False)], ids=str)
def test_cuda(columns, batch, counted, smooth):
    bound = bound_cuda(columns, smooth)
    for storage in (Storage(batch), Storage(batch, slopes=True)):
        ours = found(bound, columns, batch, counted, torch.float32, storage)
        assert_agrees(ours, wanted(columns, batch, counted, smooth), ROUNDINGS, F32)


@pytest.mark.parametrize(
    ("columns", "batch", "counted", "smooth"),
    [("efpq", 1, True, False), ("efpq", 3, False, False), ("pqms", 3, True, True)],
    ids=str,
)
def test_cuda_with_activations(columns, batch, counted, smooth):
    ours = found(bound_cuda(columns, smooth), columns, batch, counted, torch.float32, Storage(batch, slopes=True, kept_steps=2))
    assert_agrees(ours, wanted(columns, batch, counted, smooth), ROUNDINGS, F32)


ENGINES = {
    "eager": lambda table, *networks: eager.prepare(*networks, table, torch.zeros(1, 3, 8, 8)),
    "cpu": lambda table, *networks: cpu.prepare(*networks, table, torch.zeros(1, 3, 8, 8)),
}


@needs_compiler
@pytest.mark.parametrize("engine", ENGINES)
def test_a_network_is_asked_where_somebody_reads_it(engine):
    """b = 0 and q ≠ 0 in the step after: ε̂ is needed; b = c = 0 and nobody after it: nothing is."""
    made = table("q")
    b, c = made.b.copy(), made.c.copy()
    b[0] = b[2] = c[2] = c[0] = 0.0
    q = made.q.copy()
    q[3] = 0.0
    mixed = CoefficientTable(made.t, made.a, b, c, made.d, q=q)
    score, classifier = networks(False, torch.float32)
    double = networks(False, torch.float64)
    calls = []
    counting = copy.deepcopy(score)
    counting.register_forward_hook(lambda module, inputs, output: calls.append(1))
    bound = ENGINES[engine](mixed, counting if engine == "eager" else score, classifier)
    noise, z, z2 = noises(2, True)
    x = normal(2, 3, 8, 8, seed=1)
    end = integrate(x.float(), Run(bound, noise, Storage(2)), gradient=False)
    leaf = x.clone().requires_grad_()
    expected = plain_loop(mixed, *double, leaf, x, z, z2)
    assert_agrees((end, ()), (expected.detach(), ()), ROUNDINGS, F32)
    if engine == "eager":
        assert len(calls) == 3
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    leaf = x.float().requires_grad_()
    end = integrate(leaf, Run(bound, noise, Storage(2)), gradient=True)
    assert_agrees((torch.autograd.grad(end.sum(), leaf)[0], ()), (gradient, ()), ROUNDINGS, F32)


@needs_compiler
@pytest.mark.parametrize("engine", [*ENGINES, "cuda"])
def test_what_a_step_reads_must_be_given(engine):
    pair = networks(False, torch.float32)
    bound = bound_cuda("epq", False) if engine == "cuda" else ENGINES[engine](table("epq"), *pair)
    program, (noise, *_) = bound.for_batch(1), noises(1, True)
    x = normal(1, 3, 8, 8, seed=1).float()
    with pytest.raises(ValueError, match="step 0 of this table reads x_in; give them in `more`"):
        program.step(0, x, noise)
    with pytest.raises(ValueError, match="step 1 of this table reads x_before, eps_before"):
        program.step(1, x, noise, more=State(x, x))
    x_next, kept, eps_hat = program.step(1, x, noise, more=State(x, x, x, x))
    assert kept is None and x_next.shape == eps_hat.shape == x.shape
    back = program.step_vjp(1, x, None, x, more=Cotangent(x, x))
    assert isinstance(back, Cotangent)
    row = table("epq").row(1)
    for ours, theirs in zip(back[1:], (x + row[4] * x, row[6] * x, row[7] * x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=4 * F32, atol=4 * F32)


@pytest.mark.parametrize("engine", [*ENGINES, "cuda"])
def test_memory_is_planned(engine):
    """For a table whose first row asks no network at all."""
    made = table("ep")
    b, c = made.b.copy(), made.c.copy()
    b[0] = c[0] = 0.0
    mixed = CoefficientTable(made.t, made.a, b, c, made.d, e=made.e, p=made.p)
    ordinary = CoefficientTable(made.t, made.a, made.b, made.c, made.d)
    found, expected = (
        eager.prepare(*networks(False, torch.float32), one, torch.zeros(1, 3, 8, 8)).memory(1) for one in (mixed, ordinary)
    )
    assert found.slopes == expected.slopes > 0
    assert expected.forward <= found.forward <= expected.forward + 4 * 4 * 3 * 8 * 8  # a product for each term more


def test_cuda_loads_nothing_between_steps():
    """State, input and the step before stay in the engine's buffers."""
    bound = bound_cuda("efpq", False)
    program, (noise, *_) = bound.for_batch(1), noises(1, True)
    x = normal(1, 3, 8, 8, seed=1).float()
    loads = []
    put = program._put
    program._put = lambda buffer, values: (loads.append(1), put(buffer, values))
    state = State(x, x.clone())
    for k in range(STEPS):
        x_next, _, eps_hat = program.step(k, state.x, noise, more=state)
        state = State(x_next, state.x_in, state.x, eps_hat)
    assert len(loads) == 2  # x_0 and x_in
    state.x_before.mul_(0.5)
    x_next, _, _ = program.step(3, state.x, noise, more=state)
    assert len(loads) == 6


def test_cuda_multiplies_behind_the_network_where_nothing_else_flows_into_it():
    """As the eager engine: b Jᵀ v in the last step, Jᵀ(b v + v_eps) before it; and the same in a walk as call by call."""
    made = table("q")
    q = made.q.copy()
    q[2] = 0.0  # nothing flows into step 1 either
    made = CoefficientTable(made.t, made.a, made.b, made.c, made.d, q=q)
    plain = bound_cuda(CoefficientTable(made.t, made.a, made.b, made.c, made.d), False).for_batch(2)
    program, alone = bound_cuda(made, False).for_batch(2), bound_cuda(made, False).for_batch(2)
    x, v = normal(2, 3, 8, 8, seed=1).float(), Cotangent(normal(2, 3, 8, 8, seed=2).float())
    for k in reversed(range(STEPS)):
        before, v = v, program.step_vjp(k, x, None, v.x, more=v)
        if k in (3, 1):
            assert before.eps_before is None
            assert torch.equal(v.x, plain.step_vjp(k, x, None, before.x))
        else:
            assert before.eps_before.any()
        again = alone.step_vjp(k, x, None, before.x.clone(), more=before)
        assert torch.equal(v.x, again.x)
