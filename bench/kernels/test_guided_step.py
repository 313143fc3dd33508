"""One guided step: the definition with its noise, and the fused kernel that makes the noise in registers.

Bytes moved are the least possible, three images read and one written, so that the share of copy bandwidth says what a
perfect kernel could still gain.
"""

import pytest
import torch

from coupfast.sde import VPSDE, time_grid
from coupfast.solvers import euler_maruyama
from coupfast_kernels.guided_step import guided_step, guided_step_ref
from coupfast_kernels.noise import seed_tensor, standard_normal_ref

SEED, STEP = 0x0123456789ABCDEF, 7


@pytest.mark.parametrize("implementation", ["ref", "fused"])
@pytest.mark.parametrize("add_noise", [True, False], ids=["forward", "adjoint"])
@pytest.mark.parametrize("batch", [1, 256])
def test_guided_step(batch, add_noise, implementation, device, measure, benchmark):
    if implementation == "fused" and device.type == "cpu":
        pytest.skip("on the CPU the operator is the definition")
    shape = (batch, 3, 32, 32)
    generator = torch.Generator().manual_seed(0)
    x, eps_hat, guidance = (torch.randn(shape, generator=generator).to(device) for _ in range(3))
    ids, draw = torch.arange(batch, device=device), torch.zeros(batch, dtype=torch.int64, device=device)
    table = euler_maruyama(VPSDE(), time_grid(0.1), 1.0)

    def ref():
        z = standard_normal_ref(shape, seed=SEED, ids=ids, draw=0, step=STEP) if add_noise else None
        return guided_step_ref(x, eps_hat, guidance, table.row(STEP), z)

    coefficients = table.tensor(dtype=torch.float32, device=device)
    step, noise = torch.tensor(STEP, device=device), (seed_tensor(SEED, device), ids, draw)

    def fused():
        return guided_step(x, eps_hat, guidance, coefficients, step, noise=noise if add_noise else None)

    function = {"ref": ref, "fused": fused}[implementation]
    y = function()
    z = standard_normal_ref(shape, seed=SEED, ids=ids, draw=0, step=STEP).double() if add_noise else None
    exact = guided_step_ref(x.double(), eps_hat.double(), guidance.double(), table.row(STEP), z)
    # Four products of rounded coefficients and three sums: at most eleven roundings of the largest term.
    tol = 11 * torch.finfo(torch.float32).eps / 2
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=tol * float(exact.abs().max().clamp_min(x.abs().max())))

    benchmark.group = f"guided_step B={batch} 3x32x32 fp32 {'forward' if add_noise else 'adjoint'} {device.type}"
    measure(function, bytes_moved=4 * x.nbytes)
