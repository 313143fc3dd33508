"""The guided step: its definition, its operator, and its kernel in the interpreter (in a process of its own: test_noise)."""

import mmap
import os

import pytest
import torch
from test_noise import assert_same_bits, random_words, run_interpreted
from torch import library
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from coupfast_kernels.guided_step import gpu as module
from coupfast_kernels.guided_step import guided_step, guided_step_ref
from coupfast_kernels.noise import (
    FORWARD_NOISING_STEP,
    SECOND_NOISE_STEP,
    box_muller_ref,
    philox_4x32_10_ref,
    seed_tensor,
    standard_normal_ref,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


def images(shape, count, layout=CONTIGUOUS, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).contiguous(memory_format=layout)
        for _ in range(count)
    ]


def table(steps=6, seed=5, columns=4):
    return torch.randn(steps, columns, generator=torch.Generator().manual_seed(seed))


def device_noise(batch, seed=2**64 - 5):
    return seed_tensor(seed, "cpu"), random_words(batch, 1), random_words(batch, 2)


# Which of x_in, the second noise, x_before and eps_before are in the sum.
MORE = [dict(zip(("x_in", "second", "x_before", "eps_before"), map(bool, bits), strict=True)) for bits in (
    (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 1, 1), (1, 1, 1, 1)
)]  # fmt: skip


def more_terms(shape, layout, present):
    """The images of the last four terms that are there, but the noise, which a kernel makes itself."""
    names = ("x_in", "x_before", "eps_before")
    return {name: image for name, image in zip(names, images(shape, 3, layout, seed=9), strict=True) if present[name]}


class TestDefinition:
    @pytest.mark.parametrize("with_guidance", [False, True])
    @pytest.mark.parametrize("with_noise", [False, True])
    def test_rounds_every_operation_from_left_to_right(self, with_guidance, with_noise):
        x, eps_hat, g, z = images((2, 3, 5, 7), 4)
        a, b, c, d = (1.01, -0.02, 0.3, 0.4)
        found = guided_step_ref(x, eps_hat, g if with_guidance else None, (a, b, c, d), z if with_noise else None)

        def rounded(value):
            return value.float().double()  # a sum or product of two float32 is exact enough in float64 to round once

        a, b, c, d = (float(torch.tensor(value, dtype=torch.float32)) for value in (a, b, c, d))
        y = rounded(rounded(a * x.double()) + rounded(b * eps_hat.double()))
        if with_guidance:
            y = rounded(y + rounded(c * g.double()))
        if with_noise:
            y = rounded(y + rounded(d * z.double()))
        assert_same_bits(found, y.float())

    @pytest.mark.parametrize("absent", [(), ("eps_hat",), ("guidance", "z"), ("x_in",), ("z2",), ("x_before", "eps_before")])
    def test_rounds_eight_terms_from_left_to_right(self, absent):
        names = ("x", "eps_hat", "guidance", "z", "x_in", "z2", "x_before", "eps_before")
        row = (1.01, -0.02, 0.3, 0.4, -0.7, 0.15, 1.2, -0.35)
        terms = dict(zip(names, images((2, 3, 5, 7), 8), strict=True))
        given = {name: None if name in absent else term for name, term in terms.items()}
        first = [given.pop(name) for name in ("x", "eps_hat", "guidance")]
        found = guided_step_ref(*first, row, given.pop("z"), **given)

        wanted = None
        for name, coefficient in zip(names, row, strict=True):
            if name not in absent:
                product = (float(torch.tensor(coefficient, dtype=torch.float32)) * terms[name].double()).float()
                wanted = product if wanted is None else (wanted.double() + product.double()).float()
        assert_same_bits(found, wanted)

    @pytest.mark.parametrize("extra", ["x_in", "z2", "x_before", "eps_before"])
    def test_four_coefficients_are_four_terms(self, extra):
        (x,) = images((2, 3, 5, 7), 1)
        with pytest.raises(ValueError, match=r"or with any of x_in, z2, x_before, eps_before \(a, b, c, d, e, f, p, q\)"):
            guided_step_ref(x, None, None, (1.0, 0.0, 0.0, 0.0), **{extra: x})
        with pytest.raises(ValueError, match=r"got \(1.0, 0.0, 0.0\)"):
            guided_step_ref(x, None, None, (1.0, 0.0, 0.0))

    def test_the_transpose_of_eight_columns_is_four_such_steps(self):
        """Against autograd, by the lines of the module's header."""
        shape, size = (2, 3, 2, 3), 18
        x, x_in, x_before, eps_before, v, v_next = images(shape, 6, dtype=torch.float64)
        a, b, c, d, e, f, p, q = row = (1.01, -0.02, 0.3, 0.4, -0.7, 0.15, 1.2, -0.35)
        score, hessian = images((size, size), 2, dtype=torch.float64, seed=1)
        hessian = hessian + hessian.T
        z, z2 = images(shape, 2, dtype=torch.float64, seed=2)

        def apply(matrix, image):
            return (image.reshape(2, size) @ matrix).view_as(image)

        def step(x, x_in, x_before, eps_before):
            """The next state, and what the step after it sees of this one."""
            eps_hat = apply(score.T, x)
            more = dict(x_in=x_in, z2=z2, x_before=x_before, eps_before=eps_before)
            return guided_step_ref(x, eps_hat, apply(hessian, x), row, z, **more), x_in, x, eps_hat

        v_in, v_before, v_eps = v_next, v.flip(1), v.flip(2)
        _, expected = torch.autograd.functional.vjp(step, (x, x_in, x_before, eps_before), (v, v_in, v_before, v_eps))
        ones = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0)
        u = guided_step_ref(v, None, None, (b, *ones[1:]), x_before=v_eps)
        found = (
            guided_step_ref(v, apply(score, u), apply(hessian, v), (a, 1.0, c, *ones[3:]), x_before=v_before),
            guided_step_ref(v_in, None, None, ones, x_before=e * v),
            p * v,
            q * v,
        )
        # Sums of 18 products of normal numbers, in another order perhaps, twice, and five more terms.
        tol = 50 * torch.finfo(torch.float64).eps
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=tol, atol=tol * float(other.abs().max()))

    def test_its_transpose_is_itself_without_noise(self):
        x, eps_hat, g, v = images((2, 3, 5, 7), 4, dtype=torch.float64)
        row = (1.01, -0.02, 0.3, 0.4)
        score, hessian = images((105, 105), 2, dtype=torch.float64, seed=1)

        def step(state):
            flat = state.reshape(2, 105)
            return guided_step_ref(state, (flat @ score.T).view_as(x), (flat @ (hessian + hessian.T)).view_as(x), row, g)

        _, expected = torch.autograd.functional.vjp(step, x, v)
        flat = v.reshape(2, 105)
        found = guided_step_ref(v, (flat @ score).view_as(x), (flat @ (hessian + hessian.T)).view_as(x), row)
        # Sums of 105 products of normal numbers, in another order perhaps, and three more terms.
        tol = 108 * torch.finfo(torch.float64).eps
        torch.testing.assert_close(found, expected, rtol=tol, atol=tol * float(expected.abs().max()))


class TestOperator:
    @pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=str)
    @pytest.mark.parametrize("seed", [None, 0, 2**64 - 1])
    @pytest.mark.parametrize("guided", [False, True])
    def test_is_the_definition_on_the_cpu(self, layout, seed, guided):
        shape = (3, 3, 4, 5)
        x, eps_hat, g = images(shape, 3, layout)
        _, ids, draw = device_noise(3)
        noise = None if seed is None else (seed_tensor(seed, "cpu"), ids, draw)
        y = guided_step(x, eps_hat, g if guided else None, table(), torch.tensor(4), noise=noise)
        z = None if seed is None else standard_normal_ref(shape, seed=seed, ids=ids, draw=draw, step=4)
        assert_same_bits(y, guided_step_ref(x, eps_hat, g if guided else None, tuple(table()[4].tolist()), z))
        assert y.is_contiguous(memory_format=layout)

    @pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=str)
    @pytest.mark.parametrize("present", MORE, ids=str)
    @pytest.mark.parametrize("one_row", [False, True])
    def test_is_the_definition_with_eight_columns(self, layout, present, one_row):
        shape, k = (3, 3, 4, 5), 4
        x, eps_hat, g = images(shape, 3, layout)
        noise, rows, terms = device_noise(3), table(columns=8), more_terms(shape, layout, present)
        coefficients = rows[k] if one_row else rows
        y = guided_step(
            x, eps_hat, g, coefficients, torch.tensor(k), noise=noise, second_noise=present["second"], **terms
        )
        words = dict(seed=2**64 - 5, ids=noise[1], draw=noise[2])
        z2 = standard_normal_ref(shape, **words, step=SECOND_NOISE_STEP + k) if present["second"] else None
        z = standard_normal_ref(shape, **words, step=k)
        assert_same_bits(y, guided_step_ref(x, eps_hat, g, tuple(rows[k].tolist()), z, z2=z2, **terms))

    def test_a_step_without_network(self):
        (x,) = images((2, 3, 4, 4), 1)
        y = guided_step(x, None, None, table(), torch.tensor(1))
        assert_same_bits(y, guided_step_ref(x, None, None, tuple(table()[1].tolist())))

    def test_one_row_serves_any_step(self):
        x, eps_hat = images((2, 3, 4, 4), 2)
        seed, ids, draw = device_noise(2)
        y = guided_step(x, eps_hat, None, table()[2], torch.tensor(FORWARD_NOISING_STEP), noise=(seed, ids, draw))
        z = standard_normal_ref(tuple(x.shape), seed=2**64 - 5, ids=ids, draw=draw, step=FORWARD_NOISING_STEP)
        assert_same_bits(y, guided_step_ref(x, eps_hat, None, tuple(table()[2].tolist()), z))

    def test_in_place(self):
        x, eps_hat, g = images((2, 3, 4, 4), 3)
        wanted = guided_step(x, eps_hat, g, table(), torch.tensor(1), noise=device_noise(2))
        assert guided_step(x, eps_hat, g, table(), torch.tensor(1), noise=device_noise(2), out=x) is x
        assert_same_bits(x, wanted)

    def test_traces_for_a_device_that_is_not_there(self):
        """As the CUDA engine does: fake CUDA tensors, every result in a buffer that was given, no value read."""
        with FakeTensorMode():
            x, eps_hat, g, y = (torch.empty(4, 3, 8, 8, device="cuda", memory_format=CHANNELS_LAST) for _ in range(4))
            coefficients, step = torch.empty(6, 4, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
            ids = torch.empty(4, dtype=torch.int64, device="cuda")
            assert guided_step(x, eps_hat, g, coefficients, step, noise=(step, ids, ids), out=y) is y
            more = dict(x_in=g, second_noise=True, x_before=y, eps_before=g)
            eight = torch.empty(6, 8, device="cuda")
            assert guided_step(x, None, g, eight, step, noise=(step, ids, ids), out=y, **more) is y
            new = guided_step(x, eps_hat, None, coefficients, step)
            assert new.is_contiguous(memory_format=CHANNELS_LAST)
            with pytest.raises(ValueError, match="`eps_hat` is .* on cpu"):
                guided_step(x, torch.empty(4, 3, 8, 8), None, coefficients, step)

    def test_is_one_node_of_a_traced_graph(self):
        x, eps_hat, g = images((2, 3, 4, 4), 3)
        coefficients, step, noise = table(), torch.tensor(1), device_noise(2)

        def run(x, eps_hat, g, coefficients, step, seed, ids, draw):
            return guided_step(x, eps_hat, g, coefficients, step, noise=(seed, ids, draw), out=x)

        graph = make_fx(run)(x.clone(), eps_hat, g, coefficients, step, *noise)
        calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        assert calls == [torch.ops.coupfast.guided_step_out.default]
        wanted = guided_step(x, eps_hat, g, coefficients, step, noise=noise)
        assert_same_bits(graph(x.clone(), eps_hat, g, coefficients, step, *noise), wanted)
        # The other direction: functionalised, as torch.compile does with what mutates its arguments.
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        buffer = x.clone()
        assert_same_bits(compiled(buffer, eps_hat, g, coefficients, step, *noise), wanted)
        assert_same_bits(buffer, wanted)

    def test_pytorch_finds_the_operator_consistent(self):
        x, eps_hat, g = images((2, 3, 4, 4), 3)
        arguments = (torch.empty_like(x), x, eps_hat, g, table(columns=8), torch.tensor(1), *device_noise(2))
        library.opcheck(torch.ops.coupfast.guided_step_out.default, (*arguments, x, True, x, None))

    def test_refuses(self):
        x, eps_hat, g = images((2, 3, 4, 4), 3)
        step, seed, ids, draw = torch.tensor(1), *device_noise(2)
        for wrong, error, message in (
            (dict(x=x.double()), TypeError, "`y` is torch.float64|`x` is torch.float64"),
            (dict(eps_hat=eps_hat[:1]), ValueError, r"`eps_hat` is \(1, 3, 4, 4\)"),
            (dict(guidance=g.contiguous(memory_format=CHANNELS_LAST)), ValueError, "all contiguous or all channels_last"),
            (dict(coefficients=table()[:, :3]), TypeError, "contiguous float32"),
            (dict(coefficients=table()[:, :3].contiguous()), ValueError, r"shape \(steps, 4\), \(steps, 8\), \(4,\) or \(8,\)"),
            (dict(x_in=x, x_before=x), ValueError, r"x_in, x_before need rows of 8 coefficients, got \(6, 4\)"),
            (dict(second_noise=True), ValueError, "second_noise need rows of 8"),
            (dict(coefficients=table(columns=8), eps_before=x[:1]), ValueError, r"`eps_before` is \(1, 3, 4, 4\)"),
            (dict(coefficients=table(columns=8), second_noise=True, noise=None), ValueError, "missing: seed, ids, draw"),
            (dict(coefficients=table(columns=8)[0], second_noise=True, step=torch.tensor(2**31 - 1)), ValueError, "2147483647"),
            (dict(coefficients=table().double()), TypeError, "contiguous float32, got torch.float64"),
            (dict(step=torch.tensor([1])), ValueError, r"`step` must be contiguous int64 of shape \(\)"),
            (dict(step=torch.tensor(6)), IndexError, "steps 0 … 5, `step` is 6"),
            (dict(step=torch.tensor(-1)), IndexError, "`step` is -1"),
            (dict(noise=(seed, ids[:1], draw)), ValueError, r"`ids` must be contiguous int64 of shape \(2,\)"),
            (dict(noise=(seed, ids, None)), ValueError, "missing: draw"),
        ):
            right = dict(x=x, eps_hat=eps_hat, guidance=g, coefficients=table(), step=step, noise=(seed, ids, draw))
            with pytest.raises(error, match=message):
                guided_step(**(right | wrong))


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_kernel_in_the_interpreter():
    run_interpreted("tests/test_guided_step.py")


def test_says_that_triton_is_missing(monkeypatch):
    monkeypatch.setattr(module, "triton", None)
    x, eps_hat = images((2, 3, 4, 4), 2)
    arguments = (torch.empty_like(x), x, eps_hat, None, table(), torch.tensor(1), None, None, None, None, False, None, None)
    with pytest.raises(RuntimeError, match="need Triton, which is not installed"):
        module._launch(*arguments)


def launch(y, x, eps_hat, g, coefficients, step, noise=None, **more):
    """`guided_step`, as it is launched for CUDA."""
    last = dict(x_in=None, second_noise=False, x_before=None, eps_before=None) | more
    module._launch(y, x, eps_hat, g, coefficients, torch.tensor(step), *(noise or (None,) * 3), *last.values())


def poisoned(like):
    """A NaN tensor like another one, inside of a NaN buffer that shows what was written beside it."""
    buffer = torch.full((like.numel() + 64,), float("nan"))
    return buffer, buffer[32:-32].as_strided(like.shape, like.stride(), 32)


# Contiguous and ragged; channels-last of three and four channels (four pixels together), of too many, of odd planes.
SHAPES = [(2, 3, 16, 16), (1, 3, 4, 4), (3, 4, 8, 6), (2, 2, 2, 6), (5, 3, 17, 19), (2, 5, 4, 4), (3, 1, 3, 3), (1, 3, 1, 2)]


if INTERPRETED:

    class TestInterpreted:
        @pytest.mark.parametrize("shape", SHAPES, ids=str)
        @pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=str)
        @pytest.mark.parametrize("way", ["forward", "forward, unguided", "forward, no network", "adjoint", "no hvp"])
        def test_equals_the_definition(self, shape, layout, way):
            x, eps_hat, g = images(shape, 3, layout)
            g = g if way in ("forward", "adjoint") else None
            eps_hat = None if way == "forward, no network" else eps_hat
            noise = device_noise(shape[0]) if way.startswith("forward") else None
            z = None
            if noise is not None:
                z = standard_normal_ref(shape, seed=2**64 - 5, ids=noise[1], draw=noise[2], step=4)
            wanted = guided_step_ref(x, eps_hat, g, tuple(table()[4].tolist()), z)

            buffer, y = poisoned(x)
            launch(y, x, eps_hat, g, table(), 4, noise)
            assert_same_bits(y, wanted)
            for tensor, before in zip((x, eps_hat), images(shape, 2, layout), strict=True):
                if tensor is not None:
                    assert_same_bits(tensor, before)
            assert bool(buffer[:32].isnan().all())
            assert bool(buffer[-32:].isnan().all())

        @pytest.mark.parametrize("shape", [(1, 3, 4, 4), (2, 4, 2, 6), (2, 3, 5, 7)], ids=str)
        @pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=str)
        @pytest.mark.parametrize(
            ("present", "first_noise"),
            [*((which, False) for which in MORE if not which["second"]), *((MORE[i], True) for i in (0, 1, 5))],
            ids=str,
        )
        def test_equals_the_definition_with_eight_columns(self, shape, layout, present, first_noise):
            x, eps_hat, g = images(shape, 3, layout)
            terms, rows, k = more_terms(shape, layout, present), table(columns=8), 4
            noise = device_noise(shape[0]) if first_noise else None
            z = z2 = None
            if noise is not None:
                words = dict(seed=2**64 - 5, ids=noise[1], draw=noise[2])
                z = standard_normal_ref(shape, **words, step=k)
                z2 = standard_normal_ref(shape, **words, step=SECOND_NOISE_STEP + k) if present["second"] else None
            wanted = guided_step_ref(x, eps_hat, g, tuple(rows[k].tolist()), z, z2=z2, **terms)

            buffer, y = poisoned(x)
            launch(y, x, eps_hat, g, rows, k, noise, second_noise=present["second"], **terms)
            assert_same_bits(y, wanted)
            assert bool(buffer[:32].isnan().all())
            assert bool(buffer[-32:].isnan().all())
            *_, place = (x, *terms.values())  # over what is read last, too
            launch(place, x, eps_hat, g, rows, k, noise, second_noise=present["second"], **terms)
            assert_same_bits(place, wanted)

        def test_flat_states(self):
            x, eps_hat, g = images((3, 515), 3)
            y = torch.full_like(x, float("nan"))
            launch(y, x, eps_hat, g, table(), 0, device_noise(3))
            assert_same_bits(y, guided_step(x, eps_hat, g, table(), torch.tensor(0), noise=device_noise(3)))

        @pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=str)
        def test_in_place(self, layout):
            x, eps_hat, g = images((2, 3, 8, 8), 3, layout)
            wanted = guided_step(x, eps_hat, g, table(), torch.tensor(3), noise=device_noise(2))
            launch(x, x, eps_hat, g, table(), 3, device_noise(2))
            assert_same_bits(x, wanted)

        def test_the_forward_noising_has_a_row_of_its_own(self):
            x, eps_hat = images((2, 3, 8, 8), 2)
            y = torch.full_like(x, float("nan"))
            launch(y, x, eps_hat, None, table()[2], FORWARD_NOISING_STEP, device_noise(2))
            step = torch.tensor(FORWARD_NOISING_STEP)
            assert_same_bits(y, guided_step(x, eps_hat, None, table()[2], step, noise=device_noise(2)))

        @pytest.mark.parametrize("step", [6, -1, FORWARD_NOISING_STEP])
        def test_a_step_outside_of_the_table_gives_nan(self, step):
            x, eps_hat = images((2, 3, 4, 4), 2)
            for columns in (4, 8):
                y = torch.zeros_like(x)
                launch(y, x, eps_hat, None, table(columns=columns), step)
                assert bool(y.isnan().all())

        def test_no_images(self):
            x = torch.empty(0, 3, 4, 4)
            launch(x, x, x, None, table(), 0)

        @pytest.mark.parametrize(("interleaved", "channels"), [(1, 1), (3, 3)])
        def test_addresses_beyond_32_bits(self, monkeypatch, interleaved, channels):
            """The last program of the second of two images of 16 GiB: memory that is promised, and almost none touched."""
            from triton.runtime import interpreter

            elements = 2**32 + 8 + 12 * 128  # a multiple of 12
            try:
                maps = [mmap.mmap(-1, 8 * elements, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000) for _ in "xy"]
            except OSError as error:
                pytest.skip(f"this machine promises no 64 GiB of memory ({error}): 64-bit addresses are NOT tested here")
            x, y = (torch.frombuffer(memory, dtype=torch.float32) for memory in maps)
            block = 128
            groups = elements // (4 * interleaved)
            tiles = -(-groups // block)
            left = (groups - (tiles - 1) * block) * 4 * interleaved  # elements of the last program
            x[-left:] = images((left,), 1)[0]

            # One program of 2²⁵: the interpreter would run them all, and then copy the storage onto itself.
            program = interpreter.TensorHandle(
                interpreter.np.array([2 * tiles - 1], dtype=interpreter.np.int32), module.tl.int32
            )
            monkeypatch.setattr(interpreter.interpreter_builder, "create_get_program_id", lambda axis: program)
            monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *arguments: None)
            seed, ids, draw = device_noise(2)
            module._guided_step_kernel[(1,)](
                y, x, x, None, table(), torch.tensor(4), seed, ids, draw, None, None, None,
                rows=6, elements=elements, groups=groups, tiles=tiles, channels=channels, pixels=elements // channels,
                TABLE=True, COLUMNS=4, ADD_NOISE=True, ADD_SECOND_NOISE=False,
                INTERLEAVED=interleaved, STRIDED=False, BLOCK=block,
            )  # fmt: skip

            first = elements - left + torch.arange(left)  # where they lie in memory
            number = first % channels * (elements // channels) + first // channels  # channel, row, column
            key = ((2**64 - 5) % 2**32, (2**64 - 5) >> 32)
            w = torch.stack(philox_4x32_10_ref((number // 4, 4, draw[1], ids[1]), key))
            z = torch.stack([*box_muller_ref(w[0], w[1]), *box_muller_ref(w[2], w[3])])
            z = z.gather(0, number[None] % 4)[0]
            assert_same_bits(y[-left:], guided_step_ref(x[-left:], x[-left:], None, tuple(table()[4].tolist()), z))
            assert not bool(y[-left - 4096 : -left].any())
