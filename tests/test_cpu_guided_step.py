"""The guided step in C++ with its noise inside: the bits of the definitions, for every instruction set that runs here."""

import ctypes
import os
import random
import shutil

import pytest
import torch
from test_guided_step import CHANNELS_LAST, CONTIGUOUS, MORE, images, more_terms, poisoned
from test_noise import KNOWN_ANSWERS, assert_same_bits, random_words, words

from coupfast_kernels import native, operations
from coupfast_kernels.guided_step import guided_step_ref
from coupfast_kernels.guided_step.cpu import guided_step_cpu, guided_step_structure, set_row
from coupfast_kernels.noise import FORWARD_NOISING_STEP, SECOND_NOISE_STEP, box_muller_ref, standard_normal_ref
from coupfast_kernels.noise.cpu import standard_normal_cpu

pytestmark = pytest.mark.skipif(
    os.name == "nt" or not any(map(shutil.which, native.COMPILERS)), reason="needs a C++ compiler; not for Windows"
)

ROW = (1.01, -0.02, 0.3, 0.4)  # no float32 among them
LONG_ROW = (*ROW, -0.7, 0.15, 1.2, -0.35)
# Whole tiles and vectors; ragged ones; planes and images that are no multiple of a Philox block; more than one tile a plane.
SHAPES = [
    *((1, 3, 32, 32), (5, 3, 17, 19), (2, 3, 16, 16), (4, 5, 4, 4), (3, 1, 3, 3), (1, 3, 1, 2), (2, 4, 1, 1), (1, 20, 5, 7)),
    *((3, 2, 257), (2, 1), (2, 67), (2, 2, 2, 3, 7)),
]
WORDS = [(0, 0), (2**64 - 1, 2**32 - 2), (2**63, 1), (0x0123456789ABCDEF, FORWARD_NOISING_STEP)]  # seeds and steps


def formats(shape):
    return [CONTIGUOUS, CHANNELS_LAST] if len(shape) == 4 else [CONTIGUOUS]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestBits:
    @pytest.mark.parametrize("threads", [1, 2, 3])
    def test_step(self, shape, threads, isa):
        ids, draw = random_words(shape[0], 1), random_words(shape[0], 2)
        for layout in formats(shape):
            x, eps_hat, g = images(shape, 3, layout)
            buffer, y = poisoned(x)
            structure = guided_step_structure(y, x, eps_hat, g, ids=ids, draw=draw)
            structure.a, structure.b, structure.c, structure.d = ROW
            call = operations.Operations([structure])
            for seed, step in WORDS:
                structure.seed, structure.step = seed, step
                y.fill_(float("nan"))
                call.run(threads)
                z = standard_normal_ref(shape, seed=seed, ids=ids, draw=draw, step=step)
                assert_same_bits(y, guided_step_ref(x, eps_hat, g, ROW, z))
            assert bool(buffer[:32].isnan().all()) and bool(buffer[-32:].isnan().all())

    @pytest.mark.parametrize("threads", [1, 3])
    @pytest.mark.parametrize("noisy", [False, True])
    @pytest.mark.parametrize("present", MORE, ids=str)
    def test_step_with_eight_columns(self, shape, present, noisy, threads, isa):
        noisy = noisy or present["second"]
        ids, draw = random_words(shape[0], 1), random_words(shape[0], 2)
        for layout in formats(shape):
            (x, eps_hat, g), terms = images(shape, 3, layout), more_terms(shape, layout, present)
            buffer, y = poisoned(x)
            words = dict(ids=ids, draw=draw) if noisy else dict(ids=None, draw=None)
            structure = guided_step_structure(y, x, eps_hat, g, **words, second_noise=present["second"], **terms)
            set_row(structure, LONG_ROW)
            call = operations.Operations([structure])
            for seed, step in WORDS[1::2] if noisy and not present["second"] else [(2**64 - 1, 2**31 - 2)]:
                structure.seed, structure.step = seed, step
                call.run(threads)
                z = standard_normal_ref(shape, seed=seed, ids=ids, draw=draw, step=step) if noisy else None
                z2 = None
                if present["second"]:
                    z2 = standard_normal_ref(shape, seed=seed, ids=ids, draw=draw, step=SECOND_NOISE_STEP + step)
                assert_same_bits(y, guided_step_ref(x, eps_hat, g, LONG_ROW, z, z2=z2, **terms))
            assert bool(buffer[:32].isnan().all()) and bool(buffer[-32:].isnan().all())

    def test_without_network(self, shape, isa):
        for layout in formats(shape):
            x, x_in = images(shape, 2, layout)
            noise = dict(seed=7, ids=torch.arange(shape[0]), step=5)
            z = standard_normal_ref(shape, seed=7, ids=noise["ids"], draw=0, step=5)
            assert_same_bits(guided_step_cpu(x, None, None, ROW, seed=None), guided_step_ref(x, None, None, ROW))
            assert_same_bits(guided_step_cpu(x, None, None, ROW, **noise), guided_step_ref(x, None, None, ROW, z))
            wanted = guided_step_ref(x, None, None, LONG_ROW, z, x_in=x_in)
            assert_same_bits(guided_step_cpu(x, None, None, LONG_ROW, **noise, x_in=x_in), wanted)

    def test_noise_alone(self, shape, isa):
        ids, draw = random_words(shape[0], 1), random_words(shape[0], 2)
        for seed, step in WORDS:
            wanted = standard_normal_ref(shape, seed=seed, ids=ids, draw=draw, step=step)
            assert_same_bits(standard_normal_cpu(shape, seed=seed, ids=ids, draw=draw, step=step), wanted)

    @pytest.mark.parametrize("guided", [False, True])
    @pytest.mark.parametrize("noisy", [False, True])
    def test_terms_are_optional(self, shape, guided, noisy, isa):
        ids = random_words(shape[0], 3)
        for layout in formats(shape):
            x, eps_hat, g = images(shape, 3, layout)
            z = standard_normal_ref(shape, seed=7, ids=ids, draw=2**32 - 1, step=5) if noisy else None
            noise = dict(seed=7, ids=ids, draw=2**32 - 1, step=5) if noisy else dict(seed=None)
            y = guided_step_cpu(x, eps_hat, g if guided else None, ROW, **noise)
            assert_same_bits(y, guided_step_ref(x, eps_hat, g if guided else None, ROW, z))
            assert y.stride() == x.stride()

    def test_formats_may_differ(self, shape, isa):
        ids = random_words(shape[0], 4)
        z = standard_normal_ref(shape, seed=1, ids=ids, draw=0, step=5)
        for bits in range(2**4 if len(shape) == 4 else 1):
            tensors = [
                image.contiguous(memory_format=CHANNELS_LAST if bits >> i & 1 else CONTIGUOUS)
                for i, image in enumerate(images(shape, 4))
            ]
            x, eps_hat, g, y = tensors
            assert guided_step_cpu(x, eps_hat, g, ROW, seed=1, ids=ids, step=5, out=y) is y
            wanted = guided_step_ref(x, eps_hat, g, ROW, z)
            assert_same_bits(y, wanted)
            assert_same_bits(guided_step_cpu(x, eps_hat, g, ROW, seed=1, ids=ids, step=5, out=g), wanted)

    def test_formats_of_eight_columns_may_differ(self, shape, isa):
        ids = random_words(shape[0], 4)
        z, z2 = (standard_normal_ref(shape, seed=1, ids=ids, draw=0, step=step) for step in (5, SECOND_NOISE_STEP + 5))
        for channels_last in range(8 if len(shape) == 4 else 1):  # none, or which of them
            x, eps_hat, g, x_in, x_before, eps_before, y = (
                image.contiguous(memory_format=CHANNELS_LAST if i + 1 == channels_last else CONTIGUOUS)
                for i, image in enumerate(images(shape, 7))
            )
            terms = dict(x_in=x_in, x_before=x_before, eps_before=eps_before)
            wanted = guided_step_ref(x, eps_hat, g, LONG_ROW, z, z2=z2, **terms)
            for out in (y, x, eps_hat, g, x_in, x_before, eps_before):
                kept = out.clone()
                more = dict(seed=1, ids=ids, step=5, second_noise=True, out=out)
                assert guided_step_cpu(x, eps_hat, g, LONG_ROW, **terms, **more) is out
                assert_same_bits(out, wanted)
                out.copy_(kept)

    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_in_place(self, shape, place, isa):
        for layout in formats(shape):
            tensors = images(shape, 3, layout)
            z = standard_normal_ref(shape, seed=1, ids=torch.arange(shape[0]), draw=0, step=0)
            wanted = guided_step_ref(*tensors, ROW, z)
            guided_step_cpu(*tensors, ROW, seed=1, ids=torch.arange(shape[0]), out=tensors[place])
            assert_same_bits(tensors[place], wanted)


def test_fresh_words(isa):
    """Other ones in every run; what failed is in the captured output."""
    generator = random.SystemRandom()
    for _ in range(20):
        batch, seed, step = generator.randint(1, 5), generator.getrandbits(64), generator.getrandbits(32)
        shape = (batch, 3, generator.randint(1, 24), generator.randint(1, 24))
        ids, draw = (torch.tensor([generator.getrandbits(32) for _ in range(batch)]) for _ in range(2))
        print(dict(shape=shape, seed=seed, step=step, ids=ids, draw=draw))
        z = standard_normal_ref(shape, seed=seed, ids=ids, draw=draw, step=step)
        assert_same_bits(standard_normal_cpu(shape, seed=seed, ids=ids, draw=draw, step=step), z)
        x, eps_hat, g = images(shape, 3, generator.choice([CONTIGUOUS, CHANNELS_LAST]))
        y = guided_step_cpu(x, eps_hat, g, ROW, seed=seed, ids=ids, draw=draw, step=step)
        assert_same_bits(y, guided_step_ref(x, eps_hat, g, ROW, z))


def test_zeros_and_subnormals(isa):
    """Signs of zero, gradual underflow and coefficients of zero are the definition's."""
    values = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e-39, -3e-39, 1e-38, 2.0])
    x, eps_hat, g = (t.reshape(1, 1, 32, 16) for t in torch.meshgrid(values, values, values, indexing="ij"))
    x, eps_hat, g = (t.contiguous() for t in (x, eps_hat, g))
    ids = torch.tensor([9])
    z = standard_normal_ref((1, 1, 32, 16), seed=3, ids=ids, draw=0, step=0)
    for row in ((0.5, -0.25, 0.3, 1e-40), (1.0, -1.0, 0.0, 0.0), (-0.0, 0.0, -0.0, -0.0), (1.0, 1e-3, -1.0, 1e-46)):
        assert_same_bits(guided_step_cpu(x, eps_hat, g, row, seed=3, ids=ids), guided_step_ref(x, eps_hat, g, row, z))
        assert_same_bits(guided_step_cpu(x, eps_hat, g, row, seed=None), guided_step_ref(x, eps_hat, g, row))


def test_one_structure_serves_a_run(isa):
    """Coefficients, step, seed, and what the tensors hold, change between runs of one list of operations."""
    x, eps_hat, g = images((2, 3, 8, 8), 3, CHANNELS_LAST)
    ids, draw = torch.tensor([3, 4]), torch.tensor([0, 1])
    structure = guided_step_structure(x, x, eps_hat, g, ids=ids, draw=draw)
    call = operations.Operations([structure, structure])  # twice: the second reads what the first wrote
    generator = random.Random(1)
    for step in range(4):
        row = tuple(generator.uniform(-1, 1) for _ in range(4))
        seed = generator.getrandbits(64)
        ids += 1
        structure.a, structure.b, structure.c, structure.d = row
        structure.seed, structure.step = seed, step
        z = standard_normal_ref(tuple(x.shape), seed=seed, ids=ids, draw=draw, step=step)
        wanted = guided_step_ref(guided_step_ref(x, eps_hat, g, row, z), eps_hat, g, row, z)
        call.run(2)
        assert_same_bits(x, wanted)


def test_uses_pytorch_threads_and_empty_batches(isa):
    x, eps_hat = images((3, 3, 17, 19), 2)
    threads = torch.get_num_threads()
    alone = guided_step_cpu(x, eps_hat, None, ROW, seed=5, ids=torch.arange(3))
    try:
        torch.set_num_threads(2)
        assert_same_bits(guided_step_cpu(x, eps_hat, None, ROW, seed=5, ids=torch.arange(3)), alone)
    finally:
        torch.set_num_threads(threads)
    assert guided_step_cpu(x[:0], eps_hat[:0], None, ROW, seed=5, ids=torch.arange(0)).shape == (0, 3, 17, 19)
    assert standard_normal_cpu((2, 0), seed=5, ids=torch.arange(2), draw=0, step=0).shape == (2, 0)


PARTS = """
#include "guided_step.h"
using namespace coupfast;
extern "C" void normals(int64_t count, const uint32_t* w0, const uint32_t* w1, float* z0, float* z1) {
  for (int64_t i = 0; i < count; i += kLanes) {
    Words a, b;
    std::memcpy(&a, w0 + i, sizeof a);
    std::memcpy(&b, w1 + i, sizeof b);
    Vector cosine, sine;
    box_muller(a, b, &cosine, &sine);
    store(z0 + i, cosine);
    store(z1 + i, sine);
  }
}
extern "C" void philox_words(uint32_t* counter, uint32_t key0, uint32_t key1) {
  Words w[4];
  for (int i = 0; i < 4; ++i) w[i] = Words{} + counter[i];
  philox(w, key0, key1);
  for (int i = 0; i < 4; ++i) counter[i] = w[i][kLanes - 1];
}
"""


class TestParts:
    """The functions of `guided_step.h` at arguments of one's choice."""

    @pytest.fixture
    def parts(self, isa, tmp_path, monkeypatch):
        folder = tmp_path / "csrc"
        folder.mkdir()
        for name in ("guided_step.h", "parallel.h", "vector.h"):
            shutil.copy(native.SOURCES / name, folder)
        (folder / "kernels.cpp").write_text(PARTS)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(native, "SOURCES", folder)
        native._load.cache_clear()
        yield native.load(isa)
        native._load.cache_clear()

    def test_all_radii_and_all_angles(self, parts):
        """Each of the 2²³ logarithms with its root, and each of the 2²³ angles, once; in another order each."""
        w0 = torch.arange(2**23) << 9
        w1 = ((torch.arange(2**23) * 5_592_405 + 1) % 2**23) << 9
        z0, z1 = (torch.full((2**23,), float("nan")) for _ in range(2))
        as_c = [w.to(torch.uint32) for w in (w0, w1)]
        parts.normals(ctypes.c_int64(2**23), *(ctypes.c_void_p(t.data_ptr()) for t in (*as_c, z0, z1)))
        for piece in torch.arange(2**23).split(2**18):
            cosine, sine = box_muller_ref(w0[piece], w1[piece])
            assert_same_bits(z0[piece], cosine)
            assert_same_bits(z1[piece], sine)

    def test_known_answers(self, parts):
        for counter, key, expected in KNOWN_ANSWERS:
            found = (ctypes.c_uint32 * 4)(*words(counter))
            parts.philox_words(found, *map(ctypes.c_uint32, words(key)))
            assert tuple(found) == words(expected)


def test_step_refuses():
    x, eps_hat, g = images((2, 3, 4, 4), 3)
    ids = torch.arange(2)
    wide = torch.zeros(3, 3, 4, 4)
    for wrong, error, message in (
        (dict(x=x.double()), TypeError, "`out` is torch.float64 on cpu"),
        (dict(g=g.double()), TypeError, "take float32 on the CPU, `g` is torch.float64"),
        (dict(eps_hat=eps_hat.to("meta")), TypeError, "`eps_hat` is torch.float32 on meta"),
        (dict(eps_hat=eps_hat[:1]), ValueError, r"`out` is \(2, 3, 4, 4\), `eps_hat` is \(1, 3, 4, 4\)"),
        (dict(g=g.transpose(2, 3)), ValueError, r"`g` must be contiguous or channels_last.*strides \(48, 16, 1, 4\)"),
        (dict(eps_hat=wide[:2, :, :, ::2].expand(2, 3, 4, 2)), ValueError, r"`eps_hat` is \(2, 3, 4, 2\)"),
        (dict(x=wide[:2], out=wide[1:]), ValueError, "`out` overlaps `x`; it may be `x` itself, or must lie elsewhere"),
        (dict(seed=None), ValueError, "`seed` is missing"),
        (dict(ids=None), ValueError, "`ids` is missing"),
        (dict(seed=-1), ValueError, r"`seed` is in \[0, 2\*\*64\), got -1"),
        (dict(seed=2**64), ValueError, r"`seed` is in \[0, 2\*\*64\)"),
        (dict(step=2**32), ValueError, r"`step` is in \[0, 2\*\*32\), got 4294967296"),
        (dict(draw=-1), ValueError, r"`draw` is in \[0, 2\*\*32\), got -1"),
        (dict(draw=torch.tensor([0, 2**32])), ValueError, r"`draw` are in \[0, 2\*\*32\), got 4294967296"),
        (dict(ids=ids.int()), ValueError, r"`ids` must be contiguous int64 of shape \(2,\) on the CPU, got torch.int32"),
        (dict(ids=torch.arange(3)), ValueError, r"`ids` must be .* got torch.int64 of shape \(3,\)"),
        (dict(ids=torch.arange(4)[::2]), ValueError, "`ids` must be contiguous"),
        (dict(row=ROW[:3]), ValueError, r"`row` is \(a, b, c, d\), or .* got \(1.01, -0.02, 0.3\)"),
        (dict(x_in=x), ValueError, r"or with any of x_in, second_noise, x_before, eps_before \(a, b, c, d, e, f, p, q\)"),
        (dict(second_noise=True), ValueError, "or with any of x_in, second_noise"),
        (dict(row=LONG_ROW, eps_before=x[:1]), ValueError, r"`eps_before` is \(1, 3, 4, 4\)"),
        (dict(row=LONG_ROW, second_noise=True, seed=None, ids=None), ValueError, "a second noise needs the first one's `ids`"),
        (dict(row=LONG_ROW, second_noise=True, step=2**31 - 1), ValueError, r"in \[0, 2\*\*31 - 1\), got 2147483647"),
    ):
        right = dict(x=x, eps_hat=eps_hat, g=g, row=ROW, seed=1, ids=ids, draw=0, step=0)
        with pytest.raises(error, match=message):
            guided_step_cpu(**(right | wrong))


def test_noise_and_structure_refuse():
    ids = torch.arange(2)
    with pytest.raises(ValueError, match=r"`ids` must be contiguous int64 of shape \(3,\)"):
        standard_normal_cpu((3, 4), seed=1, ids=ids, draw=0, step=0)
    with pytest.raises(ValueError, match=r"`step` is in \[0, 2\*\*32\), got -1"):
        standard_normal_cpu((2, 4), seed=1, ids=ids, draw=0, step=-1)
    with pytest.raises(ValueError, match=r"shape \(batch, …\).*, got \(\)"):
        standard_normal_cpu((), seed=1, ids=ids, draw=0, step=0)
    y = torch.empty(2, 3)
    with pytest.raises(ValueError, match="a step needs `x`"):
        guided_step_structure(y, None, y, None, ids=ids, draw=ids)
    with pytest.raises(ValueError, match="neither an image nor a second noise"):
        guided_step_structure(y, None, None, None, ids=ids, draw=ids, second_noise=True)
    with pytest.raises(ValueError, match="noise alone needs `ids` and `draw`"):
        guided_step_structure(y, None, None, None, ids=None, draw=None)
    with pytest.raises(ValueError, match="`draw` is missing"):
        guided_step_structure(y, y, y, None, ids=ids, draw=None)
    with pytest.raises(ValueError, match=r"`ids` must be .* got torch.int64 of shape \(2,\) on meta"):
        guided_step_structure(y, y, y, None, ids=ids.to("meta"), draw=ids)
