import math

import pytest
import torch
import torch.nn.functional as F
from ddpmpp_table import deep_parameters
from torch.fx.experimental.proxy_tensor import make_fx

from coupfast.models.ddpmpp import DDPMpp

EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps


def small_network(dtype=torch.float64, seed=0, **options):
    """Two levels, attention at the lower one; every kind of block, weights of ordinary size, biases and scales too."""
    torch.manual_seed(seed)
    options = {"nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,), "image_size": 8} | options
    model = DDPMpp(**options).eval().redraw_small_layers(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.to(dtype)


def small_inputs(batch=2, dtype=torch.float64, size=8):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.linspace(1.0, 90.0, batch, dtype=dtype)


def test_parameters_of_the_public_network():
    with torch.device("meta"):
        model = DDPMpp()
    found = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert found == deep_parameters()
    assert len(found) == 956
    assert sum(math.prod(shape) for _, shape in found) == 106_632_579
    assert list(model.state_dict()) == [name for name, _ in found]  # no buffers
    assert sum(operation == "join" for operation, _ in model.plan) == 36
    assert all(m.eps == 1e-6 for m in model.modules() if isinstance(m, torch.nn.GroupNorm))


@pytest.mark.parametrize(("nf", "groups"), [(8, 2), (32, 8), (128, 32), (256, 32)])
def test_group_norm_groups(nf, groups):
    with torch.device("meta"):
        model = DDPMpp(nf, (1,), 1, ())
    assert model.all_modules[-2].num_groups == groups


def by_hand(w, x, labels):
    """`small_network` by its formulas, without a module: one batch entry, one block at a time."""

    def norm(h, i, n):
        c = h.shape[0]
        grouped = h.reshape(min(c // 4, 32), -1)
        grouped = (grouped - grouped.mean(1, keepdim=True)) / (grouped.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
        scale, shift = w[f"all_modules.{i}.{n}weight"], w[f"all_modules.{i}.{n}bias"]
        return grouped.reshape(h.shape) * scale[:, None, None] + shift[:, None, None]

    def conv(h, key):
        weight = w[key + "weight"]
        return F.conv2d(h[None], weight, w[key + "bias"], padding=weight.shape[-1] // 2)[0]

    def silu(h):
        return h / (1 + torch.exp(-h))

    def halve(h):
        return (h[:, ::2, ::2] + h[:, ::2, 1::2] + h[:, 1::2, ::2] + h[:, 1::2, 1::2]) / 4

    def double(h):
        return h.repeat_interleave(2, 1).repeat_interleave(2, 2)

    def res(i, h, temb, move=lambda h: h):
        key = f"all_modules.{i}."
        out = conv(move(silu(norm(h, i, "GroupNorm_0."))), key + "Conv_0.")
        out = out + (w[key + "Dense_0.weight"] @ silu(temb) + w[key + "Dense_0.bias"])[:, None, None]
        out = conv(silu(norm(out, i, "GroupNorm_1.")), key + "Conv_1.")
        skip = conv(move(h), key + "Conv_2.") if key + "Conv_2.weight" in w else h
        return (skip + out) / math.sqrt(2)

    def attention(i, h):
        def nin(n, a):
            return (
                torch.einsum("ij,ihw->jhw", w[f"all_modules.{i}.NIN_{n}.W"], a) + w[f"all_modules.{i}.NIN_{n}.b"][:, None, None]
            )

        normed = norm(h, i, "GroupNorm_0.")
        q, k, v = (nin(n, normed) for n in range(3))
        scores = torch.einsum("chw,cij->hwij", q, k) / math.sqrt(h.shape[0])
        weights = torch.exp(scores) / torch.exp(scores).sum(dim=(2, 3), keepdim=True)
        return (h + nin(3, torch.einsum("hwij,cij->chw", weights, v))) / math.sqrt(2)

    out = []
    for image, label in zip(x, labels, strict=True):
        k = torch.arange(4)
        angle = label.float() * torch.exp(k * (-math.log(10000) / 3))
        temb = torch.cat([angle.sin(), angle.cos()]).to(x.dtype)
        temb = w["all_modules.0.weight"] @ temb + w["all_modules.0.bias"]
        temb = w["all_modules.1.weight"] @ silu(temb) + w["all_modules.1.bias"]
        a = conv(image, "all_modules.2.")
        b = res(3, a, temb)
        c = res(4, b, temb, halve)
        d = attention(6, res(5, c, temb))
        h = res(9, attention(8, res(7, d, temb)), temb)
        h = res(10, torch.cat([h, d]), temb)
        h = attention(12, res(11, torch.cat([h, c]), temb))
        h = res(13, h, temb, double)
        h = res(14, torch.cat([h, b]), temb)
        h = res(15, torch.cat([h, a]), temb)
        out.append(conv(silu(norm(h, 16, "")), "all_modules.17."))
    return torch.stack(out)


def test_matches_the_formulas():
    model, (x, labels) = small_network(), small_inputs()
    expected = by_hand(model.state_dict(), x, labels)
    # Some 20 layers in a row, sums of up to 288 terms in another order, GroupNorm divides by spreads of order one.
    tol = 20 * math.sqrt(288) * EPS64
    torch.testing.assert_close(model(x, labels), expected, rtol=tol, atol=tol * expected.abs().max().item())


def test_float32_is_float64_rounded():
    x, labels = small_inputs(dtype=torch.float32)
    model = small_network(torch.float32)
    found = model(x, labels)
    expected = model.double()(x.double(), labels.double())
    tol = 20 * math.sqrt(288) * EPS32
    torch.testing.assert_close(found.double(), expected, rtol=tol, atol=tol * expected.abs().max().item())


def test_time_is_embedded_in_float32():
    model = small_network()
    labels = torch.tensor([99.9, 3.3], dtype=torch.float64)
    # float64 labels that differ below float32 resolution are the same time.
    torch.testing.assert_close(model.time_embedding(labels), model.time_embedding(labels.float()), rtol=0, atol=0)
    assert model.time_embedding(labels).dtype == torch.float64
    assert small_network(torch.bfloat16).time_embedding(labels).dtype == torch.bfloat16


def test_projections_can_be_computed_beforehand():
    model, (x, _) = small_network(), small_inputs()
    projections = model.time_projections(torch.tensor([42.0]))
    assert len(projections) == sum(operation == "res" for operation, _ in model.plan)
    once = model.denoise(x, projections)
    torch.testing.assert_close(model(x, torch.tensor([42.0])), once, rtol=0, atol=0)
    # A batched product may sum in another order than a single one.
    tol = 64 * EPS64 * once.abs().max().item()
    torch.testing.assert_close(model(x, torch.tensor([42.0, 42.0])), once, rtol=0, atol=tol)


def test_derivatives():
    model, (x, labels) = small_network(), small_inputs(batch=1)
    model.requires_grad_(False)
    x.requires_grad_()

    def f(x):
        return model(x, labels)

    assert torch.autograd.gradcheck(f, (x,), fast_mode=True, check_forward_ad=True, check_batched_grad=False)
    assert torch.autograd.gradgradcheck(f, (x,), fast_mode=True)


def test_jvp_and_vjp_are_transposes():
    model, (x, labels) = small_network(), small_inputs()
    u, v = torch.randn(2, *x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def f(x):
        return model(x, labels)

    _, jvp = torch.func.jvp(f, (x,), (u,))
    _, vjp = torch.func.vjp(f, x)
    left, right = (v * jvp).sum(), (vjp(v)[0] * u).sum()
    tol = 40 * math.sqrt(288) * EPS64
    torch.testing.assert_close(left, right, rtol=tol, atol=tol * (v.norm() * jvp.norm()).item())


def test_traces_without_in_place_operations():
    model, (x, labels) = small_network().requires_grad_(False), small_inputs()
    graph = make_fx(lambda x, labels: model(x, labels))(x, labels)
    names = {node.target.__name__ for node in graph.graph.nodes if node.op == "call_function"}
    assert not any(name.partition(".")[0].endswith("_") for name in names), names


def test_initial_network_is_silent_and_a_redrawn_one_is_not():
    torch.manual_seed(0)
    model = DDPMpp(32, (1, 2), 1, (16,)).eval()
    x = torch.randn(2, 3, 32, 32)
    labels = torch.tensor([10.0, 50.0])
    with torch.no_grad():
        assert model(x, labels).abs().max() < 1e-3
        model.redraw_small_layers(torch.Generator().manual_seed(0))
        assert 0.2 < model(x, labels).std() < 3.0


def test_redrawing_depends_on_the_generator_only():
    weights = []
    for dtype in (torch.float32, torch.float64):
        model = DDPMpp(8, (1, 2), 1, (16,)).to(dtype)
        model.redraw_small_layers(torch.Generator().manual_seed(5))
        weights.append(model.all_modules[-1].weight.float())
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_dropout_in_training_mode_only():
    model, (x, labels) = small_network(), small_inputs()
    torch.testing.assert_close(model(x, labels), model(x, labels), rtol=0, atol=0)
    model.train()
    assert not torch.equal(model(x, labels), model(x, labels))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nf": 6}, "multiple of 4"),
        ({"ch_mult": ()}, "ch_mult"),
        ({"ch_mult": (1, 0)}, "ch_mult"),
        ({"num_res_blocks": 0}, "num_res_blocks"),
        ({"image_size": 30}, "multiple of 8"),
        ({"attn_resolutions": (16, 7)}, r"\[7\] do not occur"),
        ({"channels": 0}, "channels"),
        ({"dropout": 1.0}, "dropout"),
    ],
    ids=str,
)
def test_refuses_arguments(options, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        DDPMpp(**options)


@pytest.mark.parametrize(
    ("x_shape", "labels_shape", "message"),
    [
        ((2, 3, 16, 16), (2,), r"\(batch, 3, 8, 8\), got \(2, 3, 16, 16\)"),
        ((2, 1, 8, 8), (2,), r"got \(2, 1, 8, 8\)"),
        ((3, 8, 8), (3,), r"got \(3, 8, 8\)"),
        ((2, 3, 8, 8), (3,), r"labels.*\(2,\).*got \(3,\)"),
        ((2, 3, 8, 8), (), r"got \(\)"),
    ],
    ids=str,
)
def test_refuses_shapes(x_shape, labels_shape, message):
    model = small_network()
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(x_shape, dtype=torch.float64), torch.zeros(labels_shape))
