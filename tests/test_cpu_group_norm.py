"""GroupNorm, sums and masked maps on a CPU as functions of tensors: formats, threads, neighbours, and what they refuse.

`test_cpu_convolution.py` has the kernels themselves on awkward places, `test_kernels.py` their cases.
"""

import pytest
import torch
import torch.nn.functional as F
from test_cpu_convolution import normal
from test_cpu_program import assert_as_good_as

from coupfast_kernels import native
from coupfast_kernels.elementwise.cpu import masked_cpu, pack_mask, sum_cpu
from coupfast_kernels.elementwise.definition import masked_ref, sum_ref
from coupfast_kernels.group_norm.cpu import group_norm_affine_cpu, group_norm_vjp_cpu
from coupfast_kernels.group_norm.definition import group_norm_affine_ref

REASON = native.unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

OPTIONS: dict = dict(groups=4, eps=1e-5)


def inputs(batch: int = 3, channels: int = 20, height: int = 5, width: int = 7) -> tuple[torch.Tensor, ...]:
    """x, its result's cotangent, another of x, weight and bias."""
    maps = [normal(batch, channels, height, width, seed=seed) + 0.3 for seed in range(3)]
    return (*maps, 1.0 + 0.3 * normal(channels, seed=4), normal(channels, seed=5))


def gradient(x, gy, gx, weight, bias, silu: bool = True, **options) -> torch.Tensor:
    affine = group_norm_affine_cpu(x, weight, bias, **OPTIONS | options)
    groups = (OPTIONS | options)["groups"]
    return group_norm_vjp_cpu(x, gy, gx, weight, affine, groups=groups, factor=0.5, silu=silu)


def test_the_affine_map_is_group_norm():
    x, *_, weight, bias = inputs()
    for dtype in (torch.float64, torch.float32):
        found = group_norm_affine_ref(*(t.to(dtype) for t in (x, weight, bias)), **OPTIONS)
        subtract, multiply, add, inverse = (t[:, :, None, None] for t in found)
        expected = F.group_norm(x.to(dtype), 4, weight.to(dtype), bias.to(dtype), 1e-5)
        torch.testing.assert_close((x - subtract) * multiply + add, expected)
        torch.testing.assert_close(inverse * weight.to(dtype)[:, None, None], multiply)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("channels", "groups", "size"), [(128, 32, 16), (96, 8, 9), (21, 21, 8), (300, 2, 6)])
def test_error_is_within_four_times_that_of_pytorch(channels, groups, size, silu, isa):
    x, gy, gx, weight, bias = inputs(2, channels, size, size)

    def autograd(dtype: torch.dtype) -> torch.Tensor:
        leaf = x.to(dtype).requires_grad_()
        y = F.group_norm(leaf, groups, weight.to(dtype), bias.to(dtype), 1e-5)
        (found,) = torch.autograd.grad(F.silu(y) if silu else y, leaf, gy.to(dtype))
        return found + 0.5 * gx.to(dtype)

    found = gradient(x, gy, gx, weight, bias, silu, groups=groups)
    assert_as_good_as([found], [autograd(torch.float32)], [autograd(torch.float64)])


def test_formats_threads_and_neighbours_change_no_bit(isa, monkeypatch):
    x, gy, gx, weight, bias = inputs(channels=100)
    expected = gradient(x, gy, gx, weight, bias)
    affine = torch.stack(group_norm_affine_cpu(x, weight, bias, **OPTIONS))
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        last = [t.contiguous(memory_format=torch.channels_last) for t in (x, gy, gx)]
        torch.testing.assert_close(gradient(*last, weight, bias), expected, rtol=0, atol=0)
        for image in range(3):
            alone = [t[image : image + 1] for t in (x, gy, gx)]
            torch.testing.assert_close(gradient(*alone, weight, bias)[0], expected[image], rtol=0, atol=0)
            found = torch.stack(group_norm_affine_cpu(alone[0], weight, bias, **OPTIONS))
            torch.testing.assert_close(found[:, 0], affine[:, image], rtol=0, atol=0)


def test_group_norm_says_what_it_takes():
    x, gy, gx, weight, bias = inputs()
    affine = group_norm_affine_cpu(x, weight, bias, **OPTIONS)
    with pytest.raises(ValueError, match="`groups` divides the 20 channels, got 3"):
        group_norm_affine_cpu(x, weight, bias, groups=3, eps=1e-5)
    with pytest.raises(ValueError, match="`x` is float32 with four axes"):
        group_norm_affine_cpu(x.double(), weight, bias, **OPTIONS)
    with pytest.raises(ValueError, match="`bias` is float32 with 20 values"):
        group_norm_affine_cpu(x, weight, bias[:5], **OPTIONS)
    with pytest.raises(ValueError, match="`gy` is float32 with four axes, like `x`"):
        group_norm_vjp_cpu(x, gy[:1], None, weight, affine, groups=4)
    with pytest.raises(ValueError, match="`affine` is four float32 tensors"):
        group_norm_vjp_cpu(x, gy, gx, weight, affine[:3], groups=4)
    with pytest.raises(NotImplementedError, match="call group_norm_vjp_cpu"):
        group_norm_affine_cpu(x.clone().requires_grad_(), weight, bias, **OPTIONS)


def test_sums_and_masks_say_what_they_take():
    a, b, *_, multiply, _ = inputs()
    bits = pack_mask(a > 0)
    torch.testing.assert_close(sum_cpu(a, 2.0, b, -0.5), sum_ref(a, 2.0, b, -0.5))
    torch.testing.assert_close(masked_cpu(a, bits, multiply, b, 0.5), masked_ref(a, a > 0, multiply, b, 0.5))
    torch.testing.assert_close(masked_cpu(a, bits), a.relu(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="`b` is a float32 map on the CPU, of the other's shape"):
        sum_cpu(a, 1.0, b[:2], 1.0)
    with pytest.raises(ValueError, match="`bits` is contiguous uint8 \\(3, 5, 7, 3\\)"):
        masked_cpu(a, a > 0)
    with pytest.raises(ValueError, match="`multiply` is float32 with 20 values"):
        masked_cpu(a, bits, multiply[:3])
    with pytest.raises(NotImplementedError, match="wants a gradient"):
        sum_cpu(a.clone().requires_grad_(), 1.0)
