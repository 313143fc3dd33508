"""Counter-based noise: the definition and the fused kernel. Writes one float an element and reads next to nothing."""

import pytest
import torch

from coupfast_kernels.noise import philox_4x32_10_ref, seed_tensor, standard_normal, standard_normal_ref

SEED, STEP = 0x0123456789ABCDEF, 7

# Known answers of the generator's authors (Random123): counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("implementation", ["ref", "fused"])
@pytest.mark.parametrize("batch", [1, 256])
def test_standard_normal(batch, implementation, device, measure, benchmark):
    if implementation == "fused" and device.type == "cpu":
        pytest.skip("on the CPU the operator is the definition")
    shape = (batch, 3, 32, 32)
    ids, draw = torch.arange(batch, device=device), torch.zeros(batch, dtype=torch.int64, device=device)

    def ref():
        return standard_normal_ref(shape, seed=SEED, ids=ids, draw=0, step=STEP)

    seed, step = seed_tensor(SEED, device), torch.tensor(STEP, device=device)

    def fused():
        return standard_normal(shape, seed=seed, ids=ids, draw=draw, step=step)

    function = {"ref": ref, "fused": fused}[implementation]
    z = function()
    for counter, key, words in KNOWN:
        assert tuple(int(word) for word in philox_4x32_10_ref(counter, key)) == words
    on_cpu = standard_normal_ref(shape, seed=SEED, ids=ids.cpu(), draw=0, step=STEP)
    assert torch.equal(z.cpu(), on_cpu), "the noise has other bits than the definition on the CPU"

    benchmark.group = f"noise B={batch} 3x32x32 {device.type}"
    measure(function, bytes_moved=z.nbytes)
