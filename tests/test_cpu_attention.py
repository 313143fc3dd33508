"""Attention on a CPU: the C++ kernels against float64 on awkward shapes, and how traces that spell it otherwise are read."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import under_sanitizers
from cpu_networks import Net, conv
from test_cpu_convolution import EPS, assert_within, normal, place, placed, untouched
from test_cpu_program import assert_as_good_as, bound, checked, fused, images, like
from torch import nn

from coupfast.engine.cpu.algorithms import WeightStore, tile
from coupfast.engine.cpu.network_program import NetworkProgram
from coupfast.engine.cpu.parts import Attention, Region
from coupfast.models.ddpmpp import AttentionBlock
from coupfast_kernels import native, operations
from coupfast_kernels.attention.cpu import attention_cpu, attention_vjp_cpu, scratch_floats
from coupfast_kernels.attention.definition import attention_ref, attention_vjp_ref

REASON = native.unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

# batch, heads, channels of a head, height, width
SHAPES = [
    (1, 1, 1, 1, 1),
    (3, 1, 37, 4, 4),
    (1, 3, 8, 5, 5),
    (3, 2, 16, 8, 8),
    (1, 1, 33, 16, 16),
    (2, 4, 5, 3, 9),
    (1, 1, 20, 17, 16),  # more queries than the transpose holds at a time
]


def maps(shape: tuple[int, ...], count: int) -> list[torch.Tensor]:
    batch, heads, size, height, width = shape
    return [normal(batch, heads * size, height, width, seed=seed) for seed in range(count)]


def run(kind, shape, *, threads: int = 1, block: int = 2, **tensors) -> None:
    """A kernel on scratch memory full of NaN. Maps by name, or (map, first channel, channels from head to head)."""
    batch, heads, size, height, width = shape
    structure = kind(batch=batch, heads=heads, size=size, pixels=height * width, scale=size**-0.5)
    structure.block = min(block, batch * heads)
    if kind is operations.AttentionVjp:
        structure.dy_factor = 1.0
    for name, value in tensors.items():
        if name in ("largest", "inverse"):
            setattr(structure, name, value.data_ptr())
        elif isinstance(value, float):
            setattr(structure, name, value)
        else:
            tensor, start, step = value if isinstance(value, tuple) else (value, 0, size)
            setattr(structure, name, tensor.data_ptr() + 4 * start)
            setattr(structure, f"{name}_pixel", tensor.stride(3))
            setattr(structure, f"{name}_head", step)
    scratch = torch.full((scratch_floats(structure, threads),), float("nan"))
    structure.scratch = scratch.data_ptr()
    operations.Operations([structure]).run(threads)


def statistics(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    batch, heads, _, height, width = shape
    return {name: torch.full((batch, heads, height * width), float("nan")) for name in ("largest", "inverse")}


def forward(shape, q, k, v, **options) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    y, found = place(tuple(v.shape), v.shape[1] + 3, 1), statistics(shape)
    run(operations.Attention, shape, q=placed(q), k=placed(k), v=placed(v), y=y, **found, **options)
    return y, found


def backward(shape, q, k, v, dy, found, **options) -> list[torch.Tensor]:
    results = [place(tuple(q.shape), q.shape[1] + extra, 2) for extra in (0, 1, 5)]
    given = {name: placed(t, t.shape[1] + 2, 1) for name, t in zip(("q", "k", "v", "dy"), (q, k, v, dy), strict=True)}
    outcome = dict(zip(("dq", "dk", "dv"), results, strict=True))
    run(operations.AttentionVjp, shape, **given, **outcome, **found, **options)
    return results


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, isa):
    _, heads, size, *_ = shape
    q, k, v = maps(shape, 3)
    y, found = forward(shape, q, k, v)
    assert untouched(y)
    options: dict = dict(heads=heads, scale=size**-0.5)
    split = lambda t: t.double().abs().unflatten(1, (heads, -1)).flatten(3)  # noqa: E731  [batch, heads, size, pixels]
    # Scores round in runs of 32 terms and their total; what a score is off by, weights are off by, relatively, twice (the sum).
    scores = (split(q).transpose(2, 3) @ split(k) * size**-0.5).amax(3).amax(2)[..., None, None]
    pixels = v.shape[2] * v.shape[3]
    roundings = 2 * (2 * 32 + size // 32 + 3) * scores + 2 * 32 + pixels // 32 + 10
    values = attention_ref(q.double(), k.double(), v.double().abs(), **options)
    allowed = (roundings * values.unflatten(1, (heads, -1)).flatten(3)).reshape(values.shape)
    assert_within(y, attention_ref(q.double(), k.double(), v.double(), **options), EPS * allowed)
    exact = (split_signed(q, heads).transpose(2, 3) @ split_signed(k, heads)) * size**-0.5
    torch.testing.assert_close(found["largest"].double(), exact.amax(3), rtol=0, atol=float((70 * EPS * scores).amax()))
    sums = (exact - exact.amax(3, keepdim=True)).exp().sum(3)
    torch.testing.assert_close(1.0 / found["inverse"].double(), sums, rtol=float((200 * EPS * scores).amax()) + 9 * EPS, atol=0)


def split_signed(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    return tensor.double().unflatten(1, (heads, -1)).flatten(3)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)  # of one query dq and dk are zero
def test_transposes_match_float64(shape, isa):
    q, k, v, dy = maps(shape, 4)
    options: dict = dict(heads=shape[1], scale=shape[2] ** -0.5)
    _, found = forward(shape, q, k, v)
    results = backward(shape, q, k, v, dy, found, dy_factor=-0.5)
    assert all(map(untouched, results))
    exact = attention_vjp_ref(*(t.double() for t in (q, k, v, -0.5 * dy)), **options)
    single = attention_vjp_ref(q, k, v, -0.5 * dy, **options)
    assert_as_good_as(results, single, exact)


def test_one_query_gets_its_value_back(isa):
    shape = SHAPES[0]
    q, k, v, dy = maps(shape, 4)
    y, found = forward(shape, q, k, v)
    dq, dk, dv = backward(shape, q, k, v, dy, found)
    torch.testing.assert_close(y, v, rtol=0, atol=0, check_stride=False)
    torch.testing.assert_close(dv, dy, rtol=0, atol=0, check_stride=False)
    assert float(dq) == 0.0 and float(dk) == 0.0


def test_definition_of_the_transpose_is_autograds():
    q, k, v, dy = (t.double() for t in maps((2, 3, 4, 3, 5), 4))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    expected = torch.autograd.grad(attention_ref(*leaves, heads=3, scale=0.7), leaves, dy)
    for found, wanted in zip(attention_vjp_ref(q, k, v, dy, heads=3, scale=0.7), expected, strict=True):
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-12, atol=1e-13)


def test_heads_lie_anywhere_in_a_map(isa):
    """q, k and v of a head side by side in one map, as some networks have them; cotangents in the same places."""
    shape = (2, 3, 10, 4, 5)
    q, k, v, dy = maps(shape, 4)
    pieces = [t.unflatten(1, (3, 10)) for t in (q, k, v)]
    together = placed(torch.cat(pieces, dim=2).flatten(1, 2))
    places = {name: (together, 10 * index, 30) for index, name in enumerate("qkv")}
    y, found = place(tuple(q.shape)), statistics(shape)
    run(operations.Attention, shape, **places, y=y, **found)
    expected, same = forward(shape, q, k, v)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, check_stride=False)
    gradient = place(tuple(together.shape))
    into = {f"d{name}": (gradient, 10 * index, 30) for index, name in enumerate("qkv")}
    run(operations.AttentionVjp, shape, **places, **into, dy=placed(dy), **found)
    wanted = [t.unflatten(1, (3, 10)) for t in backward(shape, q, k, v, dy, same)]
    torch.testing.assert_close(gradient, torch.cat(wanted, dim=2).flatten(1, 2), rtol=0, atol=0, check_stride=False)


@pytest.mark.parametrize("shape", [(3, 2, 16, 8, 8), (3, 1, 37, 4, 4), (2, 1, 20, 17, 16)], ids=str)
def test_threads_blocks_and_neighbours_change_no_bit(shape, isa):
    q, k, v, dy = maps(shape, 4)
    y, found = forward(shape, q, k, v)
    gradients = backward(shape, q, k, v, dy, found)
    for threads, block in ((2, 1), (3, 2), (1, 100)):
        again, same = forward(shape, q, k, v, threads=threads, block=block)
        others = backward(shape, q, k, v, dy, found, threads=threads, block=block)
        for one, other in zip((y, *found.values(), *gradients), (again, *same.values(), *others), strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=0)
    alone = (1, *shape[1:])
    for image in range(shape[0]):
        row = [t[image : image + 1] for t in (q, k, v, dy)]
        again, same = forward(alone, *row[:3])
        for one, other in zip((y, *gradients), (again, *backward(alone, *row, same)), strict=True):
            torch.testing.assert_close(other[0].contiguous(), one[image].contiguous(), rtol=0, atol=0)


def test_scores_far_apart_and_nan_stay_where_they_are(isa):
    shape = (2, 2, 8, 4, 5)
    q, k, v = maps(shape, 3)
    far, _ = forward(shape, 300.0 * q, k, v)
    exact = attention_ref(300.0 * q.double(), k.double(), v.double(), heads=2, scale=8**-0.5)
    torch.testing.assert_close(far.double(), exact, rtol=0, atol=1e-3 * float(exact.abs().max()), check_stride=False)
    k[1, 3, 2, 2] = math.nan  # the first head of the second image
    y, _ = forward(shape, q, k, v)
    assert bool(y[1, :8].isnan().all())
    assert bool(y[0].isfinite().all()) and bool(y[1, 8:].isfinite().all())


def test_functions_check_what_they_are_given():
    q, k, v, dy = maps((2, 2, 6, 3, 4), 4)
    y, found = attention_cpu(q, k, v, heads=2, scale=0.4)
    assert y.is_contiguous(memory_format=torch.channels_last) and found.shape == (2, 2, 2, 12)
    with pytest.raises(ValueError, match="`k` has the shape of `q`"):
        attention_cpu(q, k[:, :6], v, heads=2, scale=0.4)
    with pytest.raises(ValueError, match="`v` is float32 on the CPU with four axes"):
        attention_cpu(q, k, v.double(), heads=2, scale=0.4)
    with pytest.raises(ValueError, match="`heads` divides the 12 channels, got 5"):
        attention_cpu(q, k, v, heads=5, scale=0.4)
    with pytest.raises(ValueError, match="`statistics` is contiguous float32"):
        attention_vjp_cpu(q, k, v, found[:1], dy, heads=2, scale=0.4)
    with pytest.raises(NotImplementedError, match="no gradient of its own"):
        attention_cpu(q.clone().requires_grad_(), k, v, heads=2, scale=0.4)


# --- traces ---------------------------------------------------------------------------------------------------------------


def _tokens(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2).transpose(1, 2)


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    return _tokens(x).unflatten(2, (heads, -1)).transpose(1, 2)  # [batch, heads, pixels, size]


def _fused_operator(n, x):
    h = n["a"](x)
    q, k, v = (_heads(part, 2) for part in n["qkv"](h).chunk(3, dim=1))
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return n["b"](n["out"](y.transpose(1, 2).unflatten(2, x.shape[2:])) + h)


def _einsum(n, x):
    """guided-diffusion: q, k and v of a head side by side, the scale in two halves."""
    h = n["a"](x)
    batch, _, height, width = h.shape
    q, k, v = n["qkv"](h).reshape(batch * 2, 12, height * width).split(4, dim=1)
    weights = torch.softmax(torch.einsum("bct,bcs->bts", q * 4**-0.25, k * 4**-0.25), dim=-1)
    y = torch.einsum("bts,bcs->bct", weights, v).reshape(h.shape)
    return n["b"](n["out"](y) + h)


def _values_first(n, x):
    """Ho et al.'s network in PyTorch: the weights are turned over and stand behind the values."""
    h = n["a"](x)
    q, k, v = n["q"](h), n["k"](h), n["v"](h)
    batch, channels, height, width = q.shape
    weights = torch.bmm(_tokens(q), k.reshape(batch, channels, height * width)) * channels**-0.5
    weights = torch.softmax(weights, dim=2).permute(0, 2, 1)
    y = torch.bmm(v.reshape(batch, channels, height * width), weights).reshape(batch, channels, height, width)
    return n["b"](h + n["out"](y))


def _products(n, x):
    """PyTorch's fused operator written out, on tokens, with one projection for all three."""
    h = n["a"](x)
    tokens = _tokens(h)
    q, k, v = n["linear"](tokens).unflatten(2, (3, 2, 4)).unbind(2)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    weights = torch.softmax((q / 2.0) @ k.transpose(-2, -1), dim=-1)
    y = (weights @ v).transpose(1, 2).reshape(tokens.shape)
    return n["b"]((y + tokens).transpose(1, 2).reshape(h.shape))


def _same_for_all(n, x):
    h = n["a"](x)
    tokens = _tokens(h)[:, None]
    y = F.scaled_dot_product_attention(tokens, tokens, tokens, scale=0.3)[:, 0]
    return n["b"](y.transpose(1, 2).reshape(h.shape))


def _shared_keys(n, x):
    """Another reader of the keys' view."""
    h = n["a"](x)
    q, k, v = (_tokens(part) for part in n["qkv"](h).chunk(3, dim=1))
    y = torch.softmax(q @ k.transpose(1, 2), dim=2) @ v
    return n["b"]((y * torch.sigmoid(k)).transpose(1, 2).reshape(h.shape))


def _read_twice(n, x):
    """The product itself is what the rest reads."""
    h = n["a"](x)
    q, k, v = (_tokens(part) for part in n["qkv"](h).chunk(3, dim=1))
    y = torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), dim=2), v)
    return n["b"]((y * torch.sigmoid(y)).transpose(1, 2).reshape(h.shape))


def _layers(*names: str, **more: nn.Module) -> dict[str, nn.Module]:
    made: dict[str, nn.Module] = {"a": conv(3, 8), "b": conv(8, 3)}
    for name in names:
        made[name] = conv(8, 24 if name == "qkv" else 8, 1)
    return made | more


RECOGNISED = {
    "fused operator": (lambda: _layers("qkv", "out"), _fused_operator, 2, 4),
    "einsum": (lambda: _layers("qkv", "out"), _einsum, 2, 12),
    "values first": (lambda: _layers("q", "k", "v", "out"), _values_first, 1, 8),
    "products": (lambda: _layers(linear=nn.Linear(8, 24)), _products, 2, 4),
    "one value for all": (lambda: _layers(), _same_for_all, 1, 8),
    "a product that is read twice": (lambda: _layers("qkv"), _read_twice, 1, 8),
    "keys that something else reads": (lambda: _layers("qkv"), _shared_keys, 1, 8),
    "DDPM++": (lambda: _layers(block=AttentionBlock(8)), lambda n, x: n["b"](n["block"](n["a"](x))), 1, 8),
}


def _masked(n, x):
    q, k, v = (_heads(part, 2) for part in n["qkv"](n["a"](x)).chunk(3, dim=1))
    allowed = torch.ones(x.shape[2] * x.shape[3], x.shape[2] * x.shape[3]).tril().bool()
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    return n["b"](y.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, x.shape[2:]))


def _causal(n, x):
    q, k, v = (_heads(part, 2) for part in n["qkv"](n["a"](x)).chunk(3, dim=1))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return n["b"](y.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, x.shape[2:]))


def _weights_are_read(n, x):
    q, k, v = (_tokens(part) for part in n["qkv"](n["a"](x)).chunk(3, dim=1))
    weights = torch.softmax(q @ k.transpose(1, 2), dim=2)
    return n["b"]((weights @ v + weights.mean(dim=2, keepdim=True)).transpose(1, 2).unflatten(2, x.shape[2:]))


def _of_fewer_pixels(n, x):
    q, k, v = n["qkv"](n["a"](x)).chunk(3, dim=1)
    k, v = F.avg_pool2d(k, 2), F.avg_pool2d(v, 2)
    y = torch.softmax(_tokens(q) @ _tokens(k).transpose(1, 2), dim=2) @ _tokens(v)
    return n["b"](y.transpose(1, 2).unflatten(2, x.shape[2:]))


def _over_channels(n, x):
    q, k, v = (part.flatten(2) for part in n["qkv"](n["a"](x)).chunk(3, dim=1))
    return n["b"]((torch.softmax(q @ k.transpose(1, 2), dim=2) @ v).unflatten(2, x.shape[2:]))


def _half_of_a_map(n, x):
    """Channels that no head reads have no cotangent here."""
    q, k, v = (_tokens(part) for part in n["qkv"](n["a"](x))[:, :24:2].chunk(3, dim=1))
    y = torch.softmax(q @ k.transpose(1, 2), dim=2) @ v
    return n["c"](y.transpose(1, 2).unflatten(2, x.shape[2:]))


LEFT = {
    "mask": (lambda: _layers("qkv"), _masked),
    "causal": (lambda: _layers("qkv"), _causal),
    "weights that something else reads": (lambda: _layers("qkv"), _weights_are_read),
    "fewer keys than queries": (lambda: _layers("qkv"), _of_fewer_pixels),
    "over channels": (lambda: _layers("qkv"), _over_channels),
    "half of a map": (lambda: _layers("qkv", c=conv(4, 3)), _half_of_a_map),
}


def made(layers, function) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = Net(layers(), function)
        for parameter in network.parameters():  # a zero weight would hide what stands behind it
            nn.init.normal_(parameter, 0.0, parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.4)
    return network.eval().requires_grad_(False)


def check_program(network: nn.Module, batch: int) -> None:
    """Values and transposes in memory that held NaN, against PyTorch's in float64, twice."""
    x = images(batch)
    v = like(network(x))
    program = NetworkProgram(fused(network), batch, WeightStore(tile), backward=True, threads=2)
    workspace = bound(program)
    found = checked(program, network, x, v)
    workspace.arena.fill(float("nan"))
    torch.testing.assert_close(program.forward(x), found[0], rtol=0, atol=0)
    torch.testing.assert_close(program.backward(v), found[1], rtol=0, atol=0)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", RECOGNISED)
def test_is_recognised(name, batch):
    layers, function, heads, step = RECOGNISED[name]
    network = made(layers, function)
    (part,) = (part for part in fused(network).parts if isinstance(part, Attention))
    assert (part.q.count, part.q.step) == (heads, step)
    left = {str(o.node.target) for p in fused(network).parts if isinstance(p, Region) for o in p.operations}
    assert not any("softmax" in target or "attention" in target for target in left)
    check_program(network, batch)


@pytest.mark.parametrize("name", LEFT)
def test_is_left_to_pytorch(name):
    network = made(*LEFT[name])
    assert not any(isinstance(part, Attention) for part in fused(network).parts)
    check_program(network, 2)


# --- memory ---------------------------------------------------------------------------------------------------------------


def test_under_sanitizers():
    """Kernels on maps that end with their memory, under AddressSanitizer and UndefinedBehaviorSanitizer."""
    done = under_sanitizers("import test_cpu_attention; test_cpu_attention.for_sanitizers()")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "all kernels ran" in done.stdout


def for_sanitizers() -> None:
    for shape in SHAPES:
        q, k, v, dy = maps(shape, 4)
        for threads, block in ((1, 1), (2, 3)):
            _, found = forward(shape, q, k, v, threads=threads, block=block)
            backward(shape, q, k, v, dy, found, threads=threads, block=block)
    print("all kernels ran")
