"""GroupNorm with SiLU between two convolutions: the definition, PyTorch's two operations, and the fused kernel; the transpose.

Bytes moved are the least possible: x (and residual) read, y (and h) written; the transpose reads h, gy (and gh), writes gx.
Maps of DDPM++ deep, channels last. `pytorch` is `F.group_norm`, then `F.silu`, and what autograd makes of them.
"""

import pytest
import torch
import torch.nn.functional as F

from coupfast_kernels.group_norm import group_norm_silu, group_norm_silu_ref, group_norm_silu_vjp_ref

EPS, ROOT_HALF = 1e-6, 0.5**0.5


@pytest.mark.parametrize("implementation", ["ref", "pytorch", "fused"])
@pytest.mark.parametrize("direction", ["forward", "transpose"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize(("channels", "size"), [(128, 32), (384, 32), (256, 16), (512, 4)])
@pytest.mark.parametrize("batch", [1, 64])
def test_group_norm(batch, channels, size, residual, direction, implementation, device, measure, benchmark):
    if implementation == "fused" and device.type == "cpu":
        pytest.skip("on the CPU the operator is the definition")
    generator, groups = torch.Generator().manual_seed(0), min(channels // 4, 32)
    x, added, gy, gh = (
        torch.randn(batch, channels, size, size, generator=generator).to(device, memory_format=torch.channels_last)
        for _ in range(4)
    )
    weight, bias = (torch.randn(channels, generator=generator).to(device) for _ in range(2))
    scale = ROOT_HALF if residual else 1.0
    options = dict(groups=groups, eps=EPS, scale=scale)
    some = added if residual else None
    h, _ = group_norm_silu_ref(x, weight, bias, residual=some, **options)

    def pytorch(x, residual):
        h = x if residual is None else (x + residual) * scale
        return h, F.silu(F.group_norm(h, groups, weight, bias, EPS))

    def transposed(forward):
        leaf = x.clone().requires_grad_()
        h, y = forward(leaf, some)
        outputs, gradients = ((h, y), (gh, gy)) if residual else ((y,), (gy,))
        return lambda: torch.autograd.grad(outputs, leaf, gradients, retain_graph=True)[0]

    def fused(x, residual):
        return group_norm_silu(x, weight, bias, residual=residual, **options)

    if direction == "forward":
        function = {
            "ref": lambda: group_norm_silu_ref(x, weight, bias, residual=some, **options)[1],
            "pytorch": lambda: pytorch(x, some)[1],
            "fused": lambda: fused(x, some)[1],
        }[implementation]
    elif implementation == "ref":

        def function():
            return group_norm_silu_vjp_ref(h, gy, gh if residual else None, weight, bias, **options)

    else:
        function = transposed({"pytorch": pytorch, "fused": fused}[implementation])

    exact = [tensor.double() for tensor in (h, gy, gh, weight, bias)]
    if direction == "forward":
        _, wanted = group_norm_silu_ref(exact[0], *exact[3:], groups=groups, eps=EPS)
    else:
        wanted = group_norm_silu_vjp_ref(exact[0], exact[1], exact[2] if residual else None, *exact[3:], **options)
    # Two sums over a group, one term after the other, in whatever is compared; some thirty roundings besides.
    tol = (2 * size * size * channels // groups + 30) * torch.finfo(torch.float32).eps / 2
    largest = max(float(wanted.abs().max()), float(gy.abs().max()))
    torch.testing.assert_close(function().detach().double(), wanted, rtol=0, atol=tol * largest)

    moved = (4 if residual else 2) if direction == "forward" else (4 if residual else 3)
    name = f"{direction}{', residual' if residual else ''}"
    benchmark.group = f"group_norm B={batch} {channels}x{size}x{size} fp32 {name} {device.type}"
    measure(function, bytes_moved=moved * x.nbytes)
