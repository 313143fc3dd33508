"""One guided step: the definition with its noise, and the fused kernel that makes the noise in registers.

Bytes moved are the least possible, three images read and one written (with eight columns six read), so that the share of copy
bandwidth says what a perfect kernel could still gain.
"""

import pytest
import torch

from coupfast.sde import VPSDE, time_grid
from coupfast.solvers import euler_maruyama
from coupfast_kernels.guided_step import guided_step, guided_step_ref
from coupfast_kernels.noise import SECOND_NOISE_STEP, seed_tensor, standard_normal_ref

SEED, STEP = 0x0123456789ABCDEF, 7


@pytest.mark.parametrize("implementation", ["ref", "fused"])
@pytest.mark.parametrize("add_noise", [True, False], ids=["forward", "adjoint"])
@pytest.mark.parametrize("columns", [4, 8])
@pytest.mark.parametrize("batch", [1, 256])
def test_guided_step(batch, columns, add_noise, implementation, device, measure, benchmark):
    if implementation == "fused" and device.type == "cpu":
        pytest.skip("on the CPU the operator is the definition")
    shape = (batch, 3, 32, 32)
    generator = torch.Generator().manual_seed(0)
    x, eps_hat, guidance, *more = (torch.randn(shape, generator=generator).to(device) for _ in range(3 * columns // 4))
    terms = dict(zip(("x_in", "x_before", "eps_before"), more, strict=False))
    ids, draw = torch.arange(batch, device=device), torch.zeros(batch, dtype=torch.int64, device=device)
    row = euler_maruyama(VPSDE(), time_grid(0.1), 1.0).row(STEP) + (0.5, 0.25, 1.5, -0.5)[: columns - 4]
    second = add_noise and columns == 8

    def noises():
        words = dict(seed=SEED, ids=ids, draw=0)
        z = standard_normal_ref(shape, **words, step=STEP) if add_noise else None
        return z, standard_normal_ref(shape, **words, step=SECOND_NOISE_STEP + STEP) if second else None

    def ref():
        z, z2 = noises()
        return guided_step_ref(x, eps_hat, guidance, row, z, z2=z2, **terms)

    coefficients = torch.tensor(row, device=device)
    step, noise = torch.tensor(STEP, device=device), (seed_tensor(SEED, device), ids, draw) if add_noise else None

    def fused():
        return guided_step(x, eps_hat, guidance, coefficients, step, noise=noise, second_noise=second, **terms)

    function = {"ref": ref, "fused": fused}[implementation]
    assert torch.equal(function().view(torch.int32), ref().view(torch.int32)), "other bits than the definition's"

    columns_used = f"{columns} columns, {'forward' if add_noise else 'adjoint'}"
    benchmark.group = f"guided_step B={batch} 3x32x32 fp32 {columns_used} {device.type}"
    measure(function, bytes_moved=(4 + len(terms)) * x.nbytes)
