"""The noise: its definition against independent ones, its operator, and its kernel in Triton's interpreter.

Triton reads TRITON_INTERPRET when a kernel is decorated, so the last class exists in a process of its own, which
`test_kernel_in_the_interpreter` starts; `TRITON_INTERPRET=1 pytest tests/test_noise.py` runs it by hand.
"""

import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from coupfast_kernels.noise import (
    FORWARD_NOISING_STEP,
    box_muller_ref,
    definition,
    gpu,
    philox_4x32_10_ref,
    seed_tensor,
    standard_normal,
    standard_normal_ref,
)

ROOT = Path(__file__).resolve().parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EPS = 2.0**-24  # half an ulp of a float32 in [1, 2)

# Random123's known answers: counter, key, words.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


def philox_in_integers(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox as Salmon et al. 2011 draw it: two multipliers, a Weyl sequence of keys; Python's integers do not overflow."""
    left, right = divmod(counter[1] * 2**32 + counter[0], 2**32), divmod(counter[3] * 2**32 + counter[2], 2**32)
    for r in range(10):
        keys = [(k + r * weyl) % 2**32 for k, weyl in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)]
        high_0, low_0 = divmod(0xD2511F53 * left[1], 2**32)
        high_1, low_1 = divmod(0xCD9E8D57 * right[1], 2**32)
        left, right = (low_1, high_1 ^ left[0] ^ keys[0]), (low_0, high_0 ^ right[0] ^ keys[1])
    return left[1], left[0], right[1], right[0]


def assert_same_bits(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal bit patterns: unlike `torch.equal`, tells −0 from 0."""
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype == torch.float32
    same = found.contiguous().view(torch.int32) == wanted.contiguous().view(torch.int32)
    if not bool(same.all()):
        first = tuple(int(i) for i in (~same).nonzero()[0])
        pair = f"{float(found[first]).hex()} for {float(wanted[first]).hex()}"
        pytest.fail(f"{int((~same).sum())} of {same.numel()} floats differ, the first at {first}: {pair}")


def random_words(count: int, seed: int) -> torch.Tensor:
    """Words in [0, 2³²), the ends among them."""
    found = torch.randint(0, 2**32, (count,), generator=torch.Generator().manual_seed(seed))
    found[: min(2, count)] = torch.tensor([2**32 - 1, 0])[: min(2, count)]
    return found


class TestPhilox:
    @pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
    def test_known_answers(self, counter, key, expected):
        found = philox_4x32_10_ref(words(counter), words(key))
        assert tuple(int(word) for word in found) == words(expected)
        assert philox_in_integers(words(counter), words(key)) == words(expected)

    def test_against_python_integers(self):
        generator = random.Random(1)
        for _ in range(50):
            key = tuple(generator.getrandbits(32) for _ in range(2))
            counters = [tuple(generator.getrandbits(32) for _ in range(4)) for _ in range(8)]
            found = philox_4x32_10_ref(tuple(torch.tensor(counters).unbind(1)), key)
            assert [tuple(row) for row in torch.stack(found, 1).tolist()] == [philox_in_integers(c, key) for c in counters]


class TestBoxMuller:
    """Over all 2²³ arguments, since there are no more."""

    def test_log(self):
        n = 2 * torch.arange(2**23) + 1
        exact = np.log(n.numpy() * 2.0**-24)
        found = definition._log_of_odd(n).double().numpy()
        # 2 ulp: half of one each for the last sum, for exponent · ln 2, for f + tail, and for ln 2 itself and P together.
        assert float(np.max(np.abs(found / exact - 1.0))) <= 2 * 2 * EPS

    def test_cos_and_sin(self):
        n = 2 * torch.arange(2**23) + 1
        angle = 2.0 * np.pi * (n.numpy() * 2.0**-24)
        cosine, sine = (values.double().numpy() for values in definition._cos_sin_of_odd(n))
        # The last rounding (½ ulp below 1: ½ · 2⁻²⁴), the last product's (the same), and the rest of the polynomial.
        assert float(np.max(np.abs(cosine - np.cos(angle)))) <= 1.5 * EPS
        assert float(np.max(np.abs(sine - np.sin(angle)))) <= 1.5 * EPS

    def test_normals(self):
        w0, w1 = random_words(200_000, 1), random_words(200_000, 2)
        u0, u1 = ((2 * (w >> 9) + 1).double() * 2.0**-24 for w in (w0, w1))
        radius = torch.sqrt(-2.0 * torch.log(u0))
        for found, exact in zip(
            box_muller_ref(w0, w1),
            (radius * torch.cos(2 * math.pi * u1), radius * torch.sin(2 * math.pi * u1)),
            strict=True,
        ):
            # Relative: half of the logarithm's 2 ulp, one ulp of a careless square root, half of one of the product.
            bound = 2 * EPS * (1 + 1 + 0.5) * exact.abs() + 1.5 * EPS * radius
            assert float(((found.double() - exact).abs() / bound).max()) <= 1.0

    def test_the_square_root_is_correctly_rounded(self):
        """At angle 2⁻²⁴ of a turn the cosine is 1 in float32, so that the first normal is the radius itself."""
        w0 = random_words(200_000, 1)
        radius, _ = box_muller_ref(w0, torch.zeros_like(w0))
        squared = (-2.0 * definition._log_of_odd(2 * (w0 >> 9) + 1)).numpy()
        assert_same_bits(radius, torch.from_numpy(np.sqrt(squared)))


class TestDefinition:
    IDS = torch.tensor([3, 0, 2**32 - 1, 7, 12345])
    DRAW = torch.tensor([0, 1, 5, 2**32 - 1, 0])
    SHAPE = (5, 3, 7, 5)

    def test_counts_elements_in_row_major_order(self):
        z = standard_normal_ref(self.SHAPE, seed=2**64 - 3, ids=self.IDS, draw=self.DRAW, step=9)
        element = (2 * 7 + 3) * 5 + 4
        w = philox_in_integers((element // 4, 9, int(self.DRAW[3]), int(self.IDS[3])), (2**32 - 3, 2**32 - 1))
        pair = torch.tensor(w[2:] if element % 4 >= 2 else w[:2])
        expected = box_muller_ref(pair[:1], pair[1:])[element % 2]
        assert_same_bits(z[3, 2, 3, 4], expected[0])

    def test_does_not_depend_on_the_batch(self):
        whole = standard_normal_ref(self.SHAPE, seed=1, ids=self.IDS, draw=self.DRAW, step=9)
        order = torch.tensor([4, 2, 0, 3, 1])
        shuffled = standard_normal_ref(self.SHAPE, seed=1, ids=self.IDS[order], draw=self.DRAW[order], step=9)
        assert_same_bits(shuffled, whole[order])
        for piece in (slice(0, 1), slice(1, 4), slice(4, 5)):
            ids, draw = self.IDS[piece], self.DRAW[piece]
            assert_same_bits(standard_normal_ref((len(ids), 3, 7, 5), seed=1, ids=ids, draw=draw, step=9), whole[piece])

    def test_does_not_depend_on_the_size_of_its_own_pieces(self, monkeypatch):
        arguments = dict(seed=1, ids=self.IDS, draw=self.DRAW, step=torch.tensor([0, 4]))
        whole = standard_normal_ref(self.SHAPE, **arguments)
        monkeypatch.setattr(definition, "ELEMENTS_AT_ONCE", 2 * 3 * 7 * 5)
        assert_same_bits(standard_normal_ref(self.SHAPE, **arguments), whole)

    def test_many_steps_at_once(self):
        steps = torch.tensor([0, 7, FORWARD_NOISING_STEP])
        together = standard_normal_ref(self.SHAPE, seed=1, ids=self.IDS, draw=2, step=steps)
        for k, step in enumerate(steps.tolist()):
            assert_same_bits(together[k], standard_normal_ref(self.SHAPE, seed=1, ids=self.IDS, draw=2, step=step))

    def test_a_shorter_image_has_the_start_of_a_longer_one(self):
        longer = standard_normal_ref((5, 23), seed=1, ids=self.IDS, draw=0, step=0)
        assert_same_bits(standard_normal_ref((5, 6), seed=1, ids=self.IDS, draw=0, step=0), longer[:, :6])


@pytest.fixture(scope="module")
def z():
    z = standard_normal_ref((64, TestDistribution.N // 64), seed=20240605, ids=torch.arange(64), draw=0, step=0)
    return z.double()


class TestDistribution:
    """One fixed seed. For another one, each assertion would fail with the probability that stands beside it."""

    N = 2**20

    def test_kolmogorov_smirnov(self, z):
        values = z.flatten().sort().values
        cdf = 0.5 * torch.erfc(-values / math.sqrt(2.0))
        ranks = torch.arange(self.N, dtype=torch.float64) / self.N
        distance = float(torch.maximum(cdf - ranks, ranks + 1.0 / self.N - cdf).max())
        assert distance * math.sqrt(self.N) <= 2.2  # 2 exp(−2 · 2.2²) = 1.3e-4

    def test_moments(self, z):
        # Means of z^p over n draws have variance (E z^2p − (E z^p)²) / n; 4.5 sigma, twice 3.4e-6 each.
        for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
            assert abs(float((z**power).mean()) - mean) <= 4.5 * math.sqrt(variance / self.N)

    def test_tails(self, z):
        largest = float(z.abs().max())
        # u is at least 2⁻²⁴, so no |z| exceeds 5.77; of 2²⁰ the largest is below 4.3 with probability 1.7e-8.
        assert 4.3 <= largest <= math.sqrt(48.0 * math.log(2.0))

    @pytest.mark.parametrize("other", ["step", "draw", "id", "seed", "neighbour", "pair"])
    def test_paths_are_uncorrelated(self, z, other):
        ids, draw, step, seed = torch.arange(64), 0, 0, 20240605
        if other == "neighbour":
            a, b = z[:, :-1], z[:, 1:]
        elif other == "pair":  # the two of one Box-Muller radius: squares, too
            a, b = z[:, ::2] ** 2 - 1.0, z[:, 1::2] ** 2 - 1.0
        else:
            step, draw, seed = int(other == "step"), int(other == "draw"), seed + int(other == "seed")
            a, b = z, standard_normal_ref(tuple(z.shape), seed=seed, ids=ids + (other == "id"), draw=draw, step=step).double()
        correlation = float((a * b).mean() / (a.std() * b.std()))
        assert abs(correlation) <= 4.5 / math.sqrt(a.numel())  # twice 3.4e-6


class TestOperator:
    def test_is_the_definition_on_the_cpu(self):
        ids, draw = random_words(3, 1), random_words(3, 2)
        for seed, step in ((0, 0), (2**63, 5), (2**64 - 1, FORWARD_NOISING_STEP)):
            found = standard_normal((3, 5, 2), seed=seed_tensor(seed, "cpu"), ids=ids, draw=draw, step=torch.tensor(step))
            assert_same_bits(found, standard_normal_ref((3, 5, 2), seed=seed, ids=ids, draw=draw, step=step))

    def test_traces_for_a_device_that_is_not_there(self):
        with FakeTensorMode():
            words = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in range(2)]
            ids = torch.zeros(3, dtype=torch.int64, device="cuda")
            z = standard_normal((3, 5, 2), seed=words[0], ids=ids, draw=ids, step=words[1])
        assert (tuple(z.shape), z.dtype, z.device.type) == ((3, 5, 2), torch.float32, "cuda")

    def test_refuses(self):
        ids, zero = torch.arange(3), torch.tensor(0)
        with pytest.raises(ValueError, match=r"`draw` must be contiguous int64 of shape \(3,\)"):
            standard_normal((3, 4), seed=zero, ids=ids, draw=zero, step=zero)
        with pytest.raises(ValueError, match=r"`step` must be contiguous int64 of shape \(\), got torch.int32"):
            standard_normal((3, 4), seed=zero, ids=ids, draw=ids, step=zero.int())
        with pytest.raises(ValueError, match=r"2\*\*34 elements"):
            standard_normal((3, 2**34), seed=zero, ids=ids, draw=ids, step=zero)
        with pytest.raises(ValueError, match=r"`seed` is in \[0, 2\*\*64\), got -1"):
            seed_tensor(-1, "cpu")


def test_imports_without_triton():
    program = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import coupfast_kernels.convolution.gpu, coupfast_kernels.group_norm, coupfast_kernels.guided_step, coupfast_kernels.noise
assert coupfast_kernels.noise.gpu.triton is None and coupfast_kernels.guided_step.gpu.triton is None
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run_interpreted(file: str) -> None:
    """Runs the classes of a test file that need the interpreter, which must be chosen before a kernel is decorated."""
    pytest.importorskip("triton", reason="Triton is not installed: its kernels are NOT tested here")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", "Interpreted"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_kernel_in_the_interpreter():
    run_interpreted("tests/test_noise.py")


if INTERPRETED:
    import triton
    import triton.language as tl

    from coupfast_kernels.noise.gpu import box_muller_kernel, philox_4x32_10_kernel

    @triton.jit
    def _words_kernel(out_ptr, c0_ptr, c1_ptr, c2_ptr, c3_ptr, k0, k1, n, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        mask = i < n
        w0, w1, w2, w3 = philox_4x32_10_kernel(
            tl.load(c0_ptr + i, mask=mask).to(tl.uint32),
            tl.load(c1_ptr + i, mask=mask).to(tl.uint32),
            tl.load(c2_ptr + i, mask=mask).to(tl.uint32),
            tl.load(c3_ptr + i, mask=mask).to(tl.uint32),
            k0.to(tl.uint32),
            k1.to(tl.uint32),
        )
        tl.store(out_ptr + i, w0.to(tl.int64), mask=mask)
        tl.store(out_ptr + n + i, w1.to(tl.int64), mask=mask)
        tl.store(out_ptr + 2 * n + i, w2.to(tl.int64), mask=mask)
        tl.store(out_ptr + 3 * n + i, w3.to(tl.int64), mask=mask)

    @triton.jit
    def _box_muller_kernel(cosine_ptr, sine_ptr, w0_ptr, w1_ptr, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        cosine, sine = box_muller_kernel(tl.load(w0_ptr + i).to(tl.uint32), tl.load(w1_ptr + i).to(tl.uint32))
        tl.store(cosine_ptr + i, cosine)
        tl.store(sine_ptr + i, sine)

    class TestInterpreted:
        @pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
        def test_known_answers(self, counter, key, expected):
            out = torch.full((4, 1), -1)
            _words_kernel[(1,)](out, *(torch.tensor([c]) for c in words(counter)), *words(key), 1, BLOCK=1)
            assert tuple(out.flatten().tolist()) == words(expected)

        def test_words_equal_the_definition(self):
            for k in range(4):
                counter = tuple(random_words(1000, 10 * k + j) for j in range(4))
                key = tuple(random_words(7, 100 + k)[-2:].tolist()) if k else (2**32 - 1, 0)
                out = torch.full((4, 1000), -1)
                _words_kernel[(1,)](out, *counter, *key, 1000, BLOCK=1024)
                assert torch.equal(out, torch.stack(philox_4x32_10_ref(counter, key)))

        def test_all_radii_and_all_angles(self):
            """Each of the 2²³ logarithms with its root, and each of the 2²³ angles, once; in another order each."""
            radius_word = torch.arange(2**23) << 9
            angle_word = ((torch.arange(2**23) * 5_592_405 + 1) % 2**23) << 9
            cosine, sine = (torch.full((2**23,), math.nan) for _ in range(2))
            _box_muller_kernel[(8,)](cosine, sine, radius_word, angle_word, BLOCK=2**20)
            wanted = box_muller_ref(radius_word, angle_word)
            assert_same_bits(cosine, wanted[0])
            assert_same_bits(sine, wanted[1])

        @pytest.mark.parametrize("shape", [(1, 3, 32, 32), (5, 3, 17, 19), (2, 1), (3, 514), (4, 2, 3)], ids=str)
        @pytest.mark.parametrize(("seed", "step"), [(0, 0), (2**64 - 2, FORWARD_NOISING_STEP)])
        def test_noise_equals_the_definition(self, shape, seed, step):
            ids, draw = random_words(shape[0], 3), random_words(shape[0], 4)
            found = gpu._launch(list(shape), seed_tensor(seed, "cpu"), ids, draw, torch.tensor(step))
            assert_same_bits(found, standard_normal_ref(shape, seed=seed, ids=ids, draw=draw, step=step))
