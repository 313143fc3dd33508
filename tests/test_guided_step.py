"""The guided step: its definition, its operator, and its kernel in the interpreter (in a process of its own: test_noise)."""

import mmap
import os

import pytest
import torch
from test_noise import assert_same_bits, random_words, run_interpreted
from torch import library
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from coupfast_kernels import guided_step as module
from coupfast_kernels.guided_step import guided_step, guided_step_ref
from coupfast_kernels.noise import (
    FORWARD_NOISING_STEP,
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


def table(steps=6, seed=5):
    return torch.randn(steps, 4, generator=torch.Generator().manual_seed(seed))


def device_noise(batch, seed=2**64 - 5):
    return seed_tensor(seed, "cpu"), random_words(batch, 1), random_words(batch, 2)


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
        classifier_input = torch.full_like(x, float("nan"))
        y = guided_step(
            x, eps_hat, g if guided else None, table(), torch.tensor(4), noise=noise, classifier_input=classifier_input
        )
        z = None if seed is None else standard_normal_ref(shape, seed=seed, ids=ids, draw=draw, step=4)
        assert_same_bits(y, guided_step_ref(x, eps_hat, g if guided else None, tuple(table()[4].tolist()), z))
        assert_same_bits(classifier_input, (y + 1) / 2)
        assert y.is_contiguous(memory_format=layout)

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
            x, eps_hat, g, y, image = (torch.empty(4, 3, 8, 8, device="cuda", memory_format=CHANNELS_LAST) for _ in range(5))
            coefficients, step = torch.empty(6, 4, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
            ids = torch.empty(4, dtype=torch.int64, device="cuda")
            assert guided_step(x, eps_hat, g, coefficients, step, noise=(step, ids, ids), out=y, classifier_input=image) is y
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
        arguments = (torch.empty_like(x), torch.empty_like(x), x, eps_hat, g, table(), torch.tensor(1), *device_noise(2))
        library.opcheck(torch.ops.coupfast.guided_step_out.default, arguments)

    def test_refuses(self):
        x, eps_hat, g = images((2, 3, 4, 4), 3)
        step, seed, ids, draw = torch.tensor(1), *device_noise(2)
        for wrong, error, message in (
            (dict(x=x.double()), TypeError, "`y` is torch.float64|`x` is torch.float64"),
            (dict(eps_hat=eps_hat[:1]), ValueError, r"`eps_hat` is \(1, 3, 4, 4\)"),
            (dict(guidance=g.contiguous(memory_format=CHANNELS_LAST)), ValueError, "all contiguous or all channels_last"),
            (dict(coefficients=table()[:, :3]), TypeError, "contiguous float32"),
            (dict(coefficients=table()[:, :3].contiguous()), ValueError, r"shape \(steps, 4\) or \(4,\)"),
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
    arguments = (torch.empty_like(x), None, x, eps_hat, None, table(), torch.tensor(1), None, None, None)
    with pytest.raises(RuntimeError, match="need Triton, which is not installed"):
        module._launch(*arguments)


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
        @pytest.mark.parametrize("way", ["forward", "forward, classifier's input", "forward, unguided", "adjoint", "no hvp"])
        def test_equals_the_definition(self, shape, layout, way):
            x, eps_hat, g = images(shape, 3, layout)
            g = None if way in ("forward, unguided", "no hvp") else g
            noise = device_noise(shape[0]) if way.startswith("forward") else (None, None, None)
            row = tuple(table()[4].tolist())
            z = None
            if noise[0] is not None:
                z = standard_normal_ref(shape, seed=2**64 - 5, ids=noise[1], draw=noise[2], step=4)
            wanted = guided_step_ref(x, eps_hat, g, row, z)

            buffer, y = poisoned(x)
            input_buffer, classifier_input = poisoned(x) if way.endswith("input") else (None, None)
            before = [tensor.clone() for tensor in (x, eps_hat)]
            module._launch(y, classifier_input, x, eps_hat, g, table(), torch.tensor(4), *noise)
            assert_same_bits(y, wanted)
            assert_same_bits(x, before[0])
            assert_same_bits(eps_hat, before[1])
            if classifier_input is not None:
                assert_same_bits(classifier_input, (wanted + 1) / 2)
            for padded in (buffer, input_buffer):
                if padded is not None:
                    assert bool(padded[:32].isnan().all())
                    assert bool(padded[-32:].isnan().all())

        def test_flat_states(self):
            x, eps_hat, g = images((3, 515), 3)
            y = torch.full_like(x, float("nan"))
            module._launch(y, None, x, eps_hat, g, table(), torch.tensor(0), *device_noise(3))
            assert_same_bits(y, guided_step(x, eps_hat, g, table(), torch.tensor(0), noise=device_noise(3)))

        @pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=str)
        def test_in_place(self, layout):
            x, eps_hat, g = images((2, 3, 8, 8), 3, layout)
            wanted = guided_step(x, eps_hat, g, table(), torch.tensor(3), noise=device_noise(2))
            module._launch(x, None, x, eps_hat, g, table(), torch.tensor(3), *device_noise(2))
            assert_same_bits(x, wanted)

        def test_the_forward_noising_has_a_row_of_its_own(self):
            x, eps_hat = images((2, 3, 8, 8), 2)
            step, y = torch.tensor(FORWARD_NOISING_STEP), torch.full_like(x, float("nan"))
            module._launch(y, None, x, eps_hat, None, table()[2], step, *device_noise(2))
            assert_same_bits(y, guided_step(x, eps_hat, None, table()[2], step, noise=device_noise(2)))

        @pytest.mark.parametrize("step", [6, -1, FORWARD_NOISING_STEP])
        def test_a_step_outside_of_the_table_gives_nan(self, step):
            x, eps_hat = images((2, 3, 4, 4), 2)
            y = torch.zeros_like(x)
            module._launch(y, None, x, eps_hat, None, table(), torch.tensor(step), None, None, None)
            assert bool(y.isnan().all())

        def test_no_images(self):
            x = torch.empty(0, 3, 4, 4)
            module._launch(x, None, x, x, None, table(), torch.tensor(0), None, None, None)

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
                y, None, x, x, None, table(), torch.tensor(4), seed, ids, draw,
                rows=6, elements=elements, groups=groups, tiles=tiles, channels=channels, pixels=elements // channels,
                TABLE=True, ADD_GUIDANCE=False, ADD_NOISE=True, WRITE_CLASSIFIER_INPUT=False,
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
