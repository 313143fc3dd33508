"""The guided step in C++ with its noise inside, beside the definitions that it equals to the bit. CPU only.

`call` is `guided_step_cpu` with its checks, `structure` one filled before and run again, as among the operations of a network.
Bytes moved are the least possible, three images read (with eight columns six) and one written.
"""

import pytest
import torch

from coupfast.sde import VPSDE, time_grid
from coupfast.solvers import euler_maruyama
from coupfast_kernels.guided_step import guided_step_ref
from coupfast_kernels.guided_step.cpu import guided_step_cpu, guided_step_structure, set_row
from coupfast_kernels.noise import SECOND_NOISE_STEP, standard_normal_ref
from coupfast_kernels.operations import Operations

SEED, STEP = 0x0123456789ABCDEF, 7


@pytest.mark.parametrize("implementation", ["ref", "call", "structure"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("add_noise", [True, False], ids=["forward", "adjoint"])
@pytest.mark.parametrize("columns", [4, 8])
@pytest.mark.parametrize("batch", [1, 8])
def test_cpu_guided_step(batch, columns, add_noise, layout, implementation, device, measure, benchmark):
    if device.type != "cpu":
        pytest.skip("these kernels are for the CPU")
    shape = (batch, 3, 32, 32)
    generator = torch.Generator().manual_seed(0)
    x, eps_hat, guidance, *more = (
        torch.randn(shape, generator=generator).contiguous(memory_format=layout) for _ in range(3 * columns // 4)
    )
    terms = dict(zip(("x_in", "x_before", "eps_before"), more, strict=False))
    second = add_noise and columns == 8
    ids, draw = torch.arange(batch), torch.zeros(batch, dtype=torch.int64)
    row = euler_maruyama(VPSDE(), time_grid(0.1), 1.0).row(STEP) + (0.5, 0.25, 1.5, -0.5)[: columns - 4]
    y = torch.empty_like(x)

    def ref():
        words = dict(seed=SEED, ids=ids, draw=0)
        z = standard_normal_ref(shape, **words, step=STEP) if add_noise else None
        z2 = standard_normal_ref(shape, **words, step=SECOND_NOISE_STEP + STEP) if second else None
        return guided_step_ref(x, eps_hat, guidance, row, z, z2=z2, **terms)

    def call():
        noise = dict(seed=SEED, ids=ids, draw=draw, step=STEP) if add_noise else dict(seed=None)
        return guided_step_cpu(x, eps_hat, guidance, row, **noise, second_noise=second, **terms)

    words = dict(ids=ids, draw=draw) if add_noise else dict(ids=None, draw=None)
    filled = guided_step_structure(y, x, eps_hat, guidance, **words, second_noise=second, **terms)
    set_row(filled, row)
    filled.seed, filled.step = SEED, STEP
    operations, threads = Operations([filled]), torch.get_num_threads()

    def structure():
        operations.run(threads)
        return y

    function = {"ref": ref, "call": call, "structure": structure}[implementation]
    assert torch.equal(function().view(torch.int32), ref().view(torch.int32)), "other bits than the definition's"

    name = f"{columns} columns, {'forward' if add_noise else 'adjoint'}"
    benchmark.group = f"guided_step B={batch} 3x32x32 fp32 {name} {str(layout).removeprefix('torch.')} cpu"
    measure(function, bytes_moved=(4 + len(terms)) * x.nbytes)
