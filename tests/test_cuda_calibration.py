"""The choice of a convolution, with candidates and clocks that the tests make; the package's own need a GPU."""

import dataclasses
import functools
import itertools
import logging
import os
import stat
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from graph_backend import StandIn, aten

from coupfast.engine.cuda import calibration as module
from coupfast.engine.cuda.calibration import Calibration, Choice, ConvolutionShape
from coupfast.engine.precision import strict_float32
from coupfast_kernels.convolution.gpu import ALGORITHMS

SHAPE = ConvolutionShape(2, 5, 4, 6, 7)
CPU = torch.device("cpu")
THREE_PRODUCTS = ("tf32x3", "tf32x3-halves", "tf32x3-halves-split", "winograd-tf32x3-halves")


def right(x, weight, bias):
    return F.conv2d(x, weight, bias, padding=1)


def off_by(relative):
    """Every value wrong by this much of itself: that is its error in the Euclidean norm, too."""
    return lambda x, weight, bias: (F.conv2d(x.double(), weight.double(), bias.double(), padding=1) * (1.0 + relative)).float()


def raises(x, weight, bias):
    raise RuntimeError("no kernel image is available\nand more lines")


class Clock:
    """Seconds by candidate, whichever of the calls it is handed."""

    def __init__(self, calibration_candidates, seconds):
        self.names = {id(function): name for name, function in calibration_candidates.items()}
        self.seconds, self.calls = seconds, []

    def __call__(self, call):
        name = self.names[id(call.func)]
        self.calls.append(name)
        found = self.seconds[name]
        return found.pop(0) if isinstance(found, list) else found


@pytest.fixture
def calibrate(tmp_path):
    """A calibration of these candidates, which take these seconds; its clock is `.timer`."""

    def make(candidates, seconds=None, **options):
        seconds = seconds or {name: 1.0 + index for index, name in enumerate(candidates)}
        options = {"folder": tmp_path / "calibration"} | options
        return Calibration(CPU, candidates=candidates, timer=Clock(candidates, seconds), **options)

    return make


class TestChoice:
    def test_the_fastest_of_the_right_ones(self, calibrate):
        candidates = {"library": right, "slow": off_by(0.0), "fast": lambda x, weight, bias: right(x, weight, bias)}
        found = calibrate(candidates, {"library": 2.0, "slow": 3.0, "fast": 1.0}).choose(SHAPE)
        assert (found.candidate, found.seconds, found.refused) == ("fast", {"library": 2.0, "slow": 3.0, "fast": 1.0}, {})
        assert set(found.errors) == set(candidates)
        # A sum of 45 products; `slow` is the float64 result rounded once.
        assert 0 < found.errors["slow"] <= 2.0**-24 < 45 * 2.0**-24
        assert found.errors["library"] == found.errors["fast"] < 45 * 2.0**-24

    def test_equally_fast_means_library(self, calibrate):
        candidates = {"other": off_by(0.0), "library": right}
        assert calibrate(candidates, {"library": 1.0, "other": 1.0}).choose(SHAPE).candidate == "other"
        candidates = {"library": right, "other": off_by(0.0)}
        shape = dataclasses.replace(SHAPE, batch=3)
        assert calibrate(candidates, {"library": 1.0, "other": 1.0}).choose(shape).candidate == "library"

    def test_medians_of_turns(self, calibrate):
        candidates = {"library": right, "noisy": off_by(0.0)}
        # One timing in three is disturbed: the mean would choose the library.
        seconds = {"library": [2.0] * 9, "noisy": [90.0, 1.0, 1.0] * 3}
        calibration = calibrate(candidates, seconds)
        found = calibration.choose(SHAPE)
        assert (found.candidate, found.seconds["noisy"]) == ("noisy", 1.0)
        assert calibration.timer.calls[:4] == ["library", "noisy", "noisy", "library"]

    @pytest.mark.parametrize(
        ("bad", "reason"),
        [
            (off_by(1e-4), "its error against float64 is 1.00e-04, over"),
            (raises, "RuntimeError: no kernel image is available"),
            (lambda x, w, b: right(x, w, b) * float("nan"), "ValueError: it gives 336 of 336 values that are not finite"),
            (lambda x, w, b: right(x, w, b)[:1], "not float32 of (2, 4, 6, 7)"),
            (lambda x, w, b: right(x, w, b).double(), "it gives torch.float64"),
            (lambda x, w, b: F.conv2d(x, w.flip(2, 3), b, padding=1), "its error against float64 is"),
            (lambda x, w, b: F.conv2d(F.pad(x, (1, 1, 1, 1), "replicate"), w, b), "its error against float64 is"),
        ],
        ids=["wrong", "raises", "nan", "shape", "dtype", "turned over", "borders"],
    )
    def test_one_that_is_wrong_is_named_and_never_used(self, calibrate, caplog, bad, reason):
        calibration = calibrate({"library": right, "bad": bad}, {"library": 2.0, "bad": 1.0})
        found = calibration.choose(SHAPE)
        assert found.candidate == "library"
        assert set(found.seconds) == {"library"}
        assert reason in found.refused["bad"]
        assert "\n" not in found.refused["bad"]
        (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert "'bad' is not used" in record.getMessage()
        assert reason in record.getMessage()
        assert "bad" not in calibration.timer.calls

    def test_one_value_wrong_in_one_image(self, calibrate):
        def one_off(x, weight, bias):
            y = right(x, weight, bias)
            y[1, 2, 3, 4] += 1e-3 * y.abs().max()
            return y

        assert "its error" in calibrate({"library": right, "bad": one_off}).choose(SHAPE).refused["bad"]

    def test_values_that_are_not_written(self, calibrate):
        """A result in memory that a right one left behind must not pass for it."""

        def nothing(x, weight, bias):
            return torch.empty(SHAPE.batch, SHAPE.out_channels, SHAPE.height, SHAPE.width)

        assert "lazy" in calibrate({"library": right, "lazy": nothing}).choose(SHAPE).refused

    def test_one_that_fails_while_it_is_timed(self, calibrate):
        class Tired:
            calls = 0

            def __call__(self, x, weight, bias):
                self.calls += 1
                if self.calls > 3:
                    raise RuntimeError("tired")
                return right(x, weight, bias)

        folder = calibrate({"library": right}).folder
        calibration = Calibration(CPU, candidates={"library": right, "tired": Tired()}, folder=folder)
        found = calibration.choose(SHAPE)  # with the wall clock
        assert (found.candidate, found.refused) == ("library", {"tired": "RuntimeError: tired"})
        assert found.seconds["library"] > 0

    def test_a_clock_that_is_broken(self, calibrate):
        found = calibrate({"library": right, "other": off_by(0.0)}, {"library": 1.0, "other": float("nan")}).choose(SHAPE)
        assert (found.candidate, found.refused) == ("library", {"other": "ValueError: its time is nan s"})

    @pytest.mark.parametrize("library", [raises, off_by(1e-3)], ids=["raises", "wrong"])
    def test_nothing_is_chosen_if_the_library_fails(self, calibrate, library):
        calibration = calibrate({"library": library, "other": right, "bad": raises})
        with pytest.raises(RuntimeError, match=r"PyTorch's own convolution 2x5x6x7 -> 4 fails .* bad: RuntimeError: no kernel"):
            calibration.choose(SHAPE)
        assert not calibration.folder.exists()

    def test_one_whose_bits_change_from_call_to_call(self, calibrate, caplog):
        """As sums in whatever order threads come: right, fast, and nothing that a purification can be repeated with."""
        turns = itertools.count()

        def restless(x, weight, bias):
            return right(x, weight, bias) * (1.0 + 2.0**-23 * (next(turns) % 2))

        found = calibrate({"library": right, "restless": restless}, {"library": 2.0, "restless": 1.0}).choose(SHAPE)
        assert (found.candidate, found.refused) == ("library", {"restless": "it gives other bits at a second call"})
        calibrate({"library": restless, "other": right}).choose(dataclasses.replace(SHAPE, batch=3))
        assert "PyTorch's own convolution 3x5x6x7 -> 4 gives other bits at every call here" in caplog.text

    def test_what_is_shorter_than_a_launch_is_timed_within_a_graph(self, tmp_path):
        """Where calls take turns to be launched, the one that launches less looks faster than it is."""
        slow = lambda x, weight, bias: right(x, weight, bias) * 1.0  # noqa: E731
        backend, seconds = StandIn(), {right: 6e-6, slow: 5e-6}
        candidates = {"library": right, "launched sooner": slow}

        def clock(call):
            if isinstance(call, functools.partial):
                return seconds[call.func]
            return 20 * (9e-6 if aten.mul.Tensor in call.__self__.operations else 3e-6)

        options = dict(candidates=candidates, timer=clock, folder=tmp_path)
        assert Calibration(CPU, **options).choose(SHAPE).candidate == "launched sooner"
        found = Calibration(CPU, **options | {"folder": tmp_path / "graphs"}, backend=backend).choose(SHAPE)
        assert (found.candidate, found.seconds) == ("library", {"library": 3e-6, "launched sooner": 9e-6})
        assert backend.graphs and all(graph.operations.count(aten.convolution.default) == 20 for graph in backend.graphs)
        seconds[right] = seconds[slow] = 1e-3
        longer = StandIn()
        Calibration(CPU, **options | {"folder": tmp_path / "longer"}, backend=longer).choose(SHAPE)
        assert not longer.graphs

    def test_where_nothing_can_be_captured_single_calls_are_timed(self, tmp_path, caplog):
        class Broken(StandIn):
            def capture(self, function):
                raise RuntimeError("no capture here")

        other = lambda x, weight, bias: right(x, weight, bias)  # noqa: E731
        seconds = {right: 6e-6, other: 5e-6}
        options = dict(candidates={"library": right, "other": other}, timer=lambda call: seconds[call.func], folder=tmp_path)
        found = Calibration(CPU, **options, backend=Broken()).choose(SHAPE)
        assert (found.candidate, found.seconds, found.refused) == ("other", {"library": 6e-6, "other": 5e-6}, {})
        assert "cannot be captured (RuntimeError: no capture here)" in caplog.text

    def test_its_transpose_is_another_shape(self, calibrate):
        """A kernel may be right one way only."""

        def one_way(x, weight, bias):
            return right(x, weight, bias) * (2.0 if x.shape[1] == SHAPE.out_channels else 1.0)

        calibration = calibrate({"library": right, "one way": one_way}, {"library": 2.0, "one way": 1.0})
        transposed = dataclasses.replace(SHAPE, in_channels=SHAPE.out_channels, out_channels=SHAPE.in_channels)
        assert [calibration.choose(shape).candidate for shape in (SHAPE, transposed)] == ["one way", "library"]

    @pytest.mark.parametrize("precision, conv", [("strict", "ieee"), ("fast", "ieee"), ("3xtf32", "ieee"), ("tf32", "tf32")])
    def test_candidates_get_channels_last_and_what_the_engine_computes_in(self, calibrate, precision, conv):
        seen = []

        def looks(x, weight, bias):
            seen.append((x.is_contiguous(memory_format=torch.channels_last), torch.backends.cudnn.conv.fp32_precision))
            assert not torch.is_grad_enabled()
            return right(x, weight, bias)

        before = torch.backends.cudnn.conv.fp32_precision
        calibrate({"library": right, "looks": looks}, precision=precision).choose(SHAPE)
        assert set(seen) == {(True, conv)}
        assert torch.backends.cudnn.conv.fp32_precision == before


class TestPrecision:
    @pytest.mark.parametrize(
        ("precision", "within", "beyond"),
        [("fast", 0.9e-5, 1.2e-5), ("3xtf32", 0.9e-5, 1.2e-5), ("tf32", 1.9e-3, 2.1e-3)],
    )
    def test_its_limit(self, calibrate, precision, within, beyond):
        candidates = {"library": right, "within": off_by(within), "beyond": off_by(beyond)}
        found = calibrate(candidates, precision=precision).choose(SHAPE)
        assert set(found.refused) == {"beyond"}
        assert found.errors["within"] == pytest.approx(within, rel=0.01)

    def test_strict_is_four_times_the_library(self, calibrate):
        """The yardstick is PyTorch's own convolution, whatever calls itself library."""
        with strict_float32("cpu"):
            x, weight, bias = module._example(SHAPE, CPU)
            error = module._error(right(x, weight, bias), F.conv2d(x.double(), weight.double(), bias.double(), padding=1))
        limit = 4.0 * max(error, 2.0**-24)
        # Each is rounded to float32 on top, by 2⁻²⁴ of itself at most.
        candidates = {"library": off_by(0.0), "within": off_by(limit - 2.0**-24), "beyond": off_by(limit + 2.0**-24)}
        assert set(calibrate(candidates).choose(SHAPE).refused) == {"beyond"}

    def test_a_library_without_error_leaves_room_for_rounding(self, calibrate, monkeypatch):
        calibration = calibrate({"library": right})
        assert calibration._limit(0.0) == 4.0 * 2.0**-24
        assert calibration._limit(1e-6) == 4e-6

    def test_tf32_rounding_is_within_its_limit_and_over_the_others(self, calibrate):
        """Factors rounded or truncated to 11 bits; and split in two such parts each, without small · small."""

        def to_tf32(t):
            return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

        def truncated(t):
            return (t.view(torch.int32) & ~0x1FFF).view(torch.float32)

        def tf32(x, weight, bias, part=to_tf32):
            return F.conv2d(part(x).double(), part(weight).double(), bias.double(), padding=1).float()

        def tf32x3(x, weight, bias):
            x_big, w_big = to_tf32(x), to_tf32(weight)
            x_small, w_small = to_tf32(x - x_big), to_tf32(weight - w_big)
            pairs = ((x_small, w_big), (x_big, w_small), (x_big, w_big))
            products = sum(F.conv2d(a.double(), b.double(), padding=1) for a, b in pairs)
            return (products + bias.double().view(1, -1, 1, 1)).float()

        cut = lambda x, weight, bias: tf32(x, weight, bias, truncated)  # noqa: E731
        candidates = {"library": right, "tf32": tf32, "truncated": cut, "tf32x3": tf32x3}
        shape = ConvolutionShape(1, 64, 8, 6, 6)  # enough of everything for errors to be their mean
        found = {p: calibrate(candidates, precision=p).choose(shape) for p in ("strict", "3xtf32", "tf32")}
        assert {precision: set(choice.refused) for precision, choice in found.items()} == {
            "strict": {"tf32", "truncated"},
            "3xtf32": {"tf32", "truncated"},
            "tf32": set(),
        }
        errors = found["tf32"].errors
        assert errors["tf32"] == pytest.approx(3e-4, rel=0.2)
        assert errors["truncated"] == pytest.approx(8e-4, rel=0.2)

    @pytest.mark.parametrize(
        ("precision", "names"),
        [
            ("strict", set()),
            ("fast", set()),
            ("3xtf32", {f"triton-{way}" for way in THREE_PRODUCTS}),
            ("tf32", {"triton-tf32"}),
        ],
    )
    def test_candidates_of_a_gpu(self, precision, names):
        names = names | {"library", "library-contiguous", "triton-ieee", "triton-ieee-split", "triton-winograd"}
        assert set(module._candidates(torch.device("cuda"), precision, None)) == names
        assert set(module._candidates(torch.device("cuda"), precision, lambda module, inputs: module)) == names | {"compiled"}
        assert set(module._candidates(CPU, precision, None)) == {"library", "library-contiguous"}

    def test_the_library_is_compiled_once_a_shape_as_a_piece_is(self, tmp_path):
        compiled, ran = [], []

        def compiler(graph, inputs):
            compiled.append(graph)
            return lambda *inputs: ran.append(1) or graph(*inputs)

        calibration = Calibration(CPU, folder=tmp_path, compiler=compiler)
        for channels in range(1, 4):
            found = calibration.choose(dataclasses.replace(SHAPE, in_channels=channels))
            assert found.refused == {} and set(found.seconds) == {"library", "library-contiguous", "compiled"}
        assert len(compiled) == 3 < len(ran)
        targets = {node.target for node in compiled[0].graph.nodes if node.op == "call_function"}
        assert targets == {torch.ops.aten.convolution.default}

    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_the_kernel_packs_a_weight_once(self, algorithm, monkeypatch):
        """On the CPU the operator is its definition."""
        packed, used = [], []
        right_pack, convolve = ALGORITHMS[algorithm].pack, module.conv3x3

        def recorded(*arguments, algorithm):
            used.append(algorithm)
            return convolve(*arguments, algorithm=algorithm)

        def pack(weight):
            packed.append(weight)
            return right_pack(weight)

        monkeypatch.setitem(module.ALGORITHMS, algorithm, dataclasses.replace(ALGORITHMS[algorithm], pack=pack))
        monkeypatch.setattr(module, "conv3x3", recorded)
        kernel = module._Triton(algorithm)
        x, weight, bias = module._example(SHAPE, CPU)
        # Two sums of 45 products and a bias each; some roundings of weights split, or transformed and back.
        tol = (2 * 46 + 8) * 2.0**-24 * float(F.conv2d(x.abs(), weight.abs(), bias.abs(), padding=1).max())
        for _ in range(2):
            torch.testing.assert_close(kernel(x, weight, bias), right(x, weight, bias), rtol=0, atol=tol)
        doubled = kernel(x, 2 * weight, 2 * bias)
        torch.testing.assert_close(doubled, 2 * right(x, weight, bias), rtol=0, atol=2 * tol)
        assert (len(packed), set(used)) == (2, {algorithm})

    def test_few_channels_are_not_tried_where_they_are_less_exact_or_less_than_a_pass(self, tmp_path):
        """On the CPU the operator is its definition, and every time is the same: what comes first is chosen, if it is there."""
        candidates = {f"triton-{name}": module._Triton(name) for name in ("winograd", "ieee-split")} | {"library": right}
        calibration = Calibration(CPU, folder=tmp_path, candidates=candidates, timer=lambda call: 1.0)
        for channels, chosen in ((15, "library"), (16, "triton-winograd")):
            found = calibration.choose(dataclasses.replace(SHAPE, in_channels=channels))
            assert found.candidate == chosen
            assert set(found.seconds | found.errors | found.refused) == ({"library"} if channels == 15 else set(candidates))
        kept = Calibration(CPU, folder=tmp_path, candidates=candidates)
        assert kept.choose(dataclasses.replace(SHAPE, in_channels=16)) == found

    @pytest.mark.parametrize(("height", "tried"), [(127 * 64, True), (127 * 64 + 1, False)])
    def test_sums_are_not_split_where_results_fill_a_card(self, tmp_path, height, tried):
        candidates = {"triton-ieee-split": module._Triton("ieee-split"), "library": right}
        calibration = Calibration(CPU, folder=tmp_path, candidates=candidates, timer=lambda call: 1.0)
        found = calibration.choose(ConvolutionShape(1, 16, 64, height, 1))
        assert found.candidate == ("triton-ieee-split" if tried else "library")
        assert set(found.seconds) == {"library"} | ({"triton-ieee-split"} if tried else set())

    def test_what_it_refuses(self, tmp_path):
        with pytest.raises(ValueError, match="one of strict, fast, 3xtf32, tf32, got 'half'"):
            Calibration(CPU, precision="half")
        with pytest.raises(ValueError, match="must have 'library'"):
            Calibration(CPU, candidates={"mine": right}, folder=tmp_path)
        with pytest.raises(ValueError, match="`height` of a convolution is an int of at least 1, got 0"):
            ConvolutionShape(1, 2, 3, 0, 5)


class TestNormInFront:
    """Of a convolution by Winograd's there is a second choice: on the CPU its operators are their definitions."""

    SHAPE = ConvolutionShape(2, 16, 4, 6, 7, groups=4)

    def calibration(self, tmp_path, seconds, candidates=None):
        calls = []

        def clock(call):
            calls.append(call.func)
            return seconds.get(type(call.func), 1.0)

        candidates = {"library": right, "triton-winograd": module._Triton("winograd")} if candidates is None else candidates
        found = Calibration(CPU, folder=tmp_path, candidates=candidates, timer=clock)
        return found, calls

    @pytest.mark.parametrize(("inside", "chosen"), [(0.5, "inside"), (2.0, "apart")])
    def test_it_is_taken_where_it_is_faster(self, tmp_path, inside, chosen):
        seconds = {module._Triton: 0.5, module._Inside: inside, module._Apart: 1.0}
        calibration, calls = self.calibration(tmp_path, seconds)
        found = calibration.choose(self.SHAPE)
        assert (found.candidate, found.seconds, found.refused) == (chosen, {"apart": 1.0, "inside": inside}, {})
        assert max(found.errors.values()) < 9 * 16 * 2.0**-24
        kept, again = self.calibration(tmp_path, {})
        assert kept.choose(self.SHAPE) == found and not again
        assert kept.choose(dataclasses.replace(self.SHAPE, groups=0)).candidate == "triton-winograd" and not again

    def test_the_convolution_is_the_one_of_its_own_shape(self, tmp_path):
        """Where that is none of Winograd's there is nothing to choose."""
        calibration, calls = self.calibration(tmp_path, {module._Triton: 2.0})
        found = calibration.choose(self.SHAPE)
        assert (found.candidate, set(found.seconds)) == ("apart", {"apart"})
        assert calls[-1].convolution is right

    def test_one_that_is_wrong_is_never_used(self, tmp_path, monkeypatch, caplog):
        """As where what is outside of an image were normed, too."""

        def normed(x, statistics, weight, bias, *others, algorithm):
            y = module.conv3x3(module.group_norm_silu(x, weight, bias, groups=4, eps=1e-6)[1], others[0], None, others[1],
                               algorithm=algorithm)  # fmt: skip
            y[:, :, 0] += 0.1
            return y

        monkeypatch.setattr(module, "conv3x3_normed", normed)
        calibration, _ = self.calibration(tmp_path, {module._Triton: 0.5, module._Inside: 0.5})
        found = calibration.choose(self.SHAPE)
        assert found.candidate == "apart"
        assert "its error against float64 is" in found.refused["inside"]
        assert "2x16x6x7 -> 4, normed in 4 groups" in caplog.text

    def test_nothing_is_chosen_if_the_norm_fails(self, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "group_norm_silu", raises)
        calibration, _ = self.calibration(tmp_path, {module._Triton: 0.5})
        with pytest.raises(RuntimeError, match="A norm before the convolution 2x16x6x7 -> 4, normed in 4 groups fails on"):
            calibration.choose(self.SHAPE)

    def test_groups_divide_the_channels(self):
        with pytest.raises(ValueError, match="divide its channels, got 3 of 16"):
            dataclasses.replace(self.SHAPE, groups=3)
        with pytest.raises(ValueError, match="`groups` of a convolution is an int of at least 0, got -1"):
            dataclasses.replace(self.SHAPE, groups=-1)


class TestFile:
    def test_a_second_instance_times_nothing_and_chooses_the_same(self, calibrate):
        candidates = {"library": right, "other": off_by(0.0)}
        first = calibrate(candidates, {"library": 2.0, "other": 1.0})
        wanted = first.choose(SHAPE)
        assert wanted.candidate == "other"
        second = calibrate(candidates, {"library": 1.0, "other": 2.0})
        assert second.choose(SHAPE) == wanted
        assert second.timer.calls == []

    def test_in_memory_the_file_is_not_asked_again(self, calibrate):
        calibration = calibrate({"library": right})
        found = calibration.choose(SHAPE)
        calibration.file.unlink()
        assert calibration.choose(SHAPE) is found
        assert len(calibration.timer.calls) == module.REPEATS

    @pytest.mark.parametrize("part", ["device", "capability", "driver", "torch", "triton", "cudnn", "kernels"])
    def test_another_machine_or_version_measures_anew(self, calibrate, monkeypatch, part):
        first = calibrate({"library": right})
        first.choose(SHAPE)
        real = module.machine_key
        assert part in real(CPU)
        monkeypatch.setattr(module, "machine_key", lambda device: real(device) | {part: "another"})
        other = calibrate({"library": right})
        other.choose(SHAPE)
        assert other.timer.calls
        assert other.file != first.file
        assert len(list(first.folder.glob("*.json"))) == 2

    def test_another_precision_or_set_of_candidates_measures_anew(self, calibrate):
        files = [
            calibrate({"library": right}).file,
            calibrate({"library": right}, precision="fast").file,
            calibrate({"library": right, "other": right}).file,
        ]
        assert len(set(files)) == 3

    @pytest.mark.parametrize(
        "damage",
        [
            lambda text: "",
            lambda text: text[: len(text) // 2],
            lambda text: "[]",
            lambda text: "\udcff\x00",
            lambda text: text.replace('"candidate": "library"', '"candidate": "unheard-of"'),
            lambda text: text.replace('"candidate": "library"', '"candidate": "bad"'),
            lambda text: text.replace('"seconds"', '"hours"'),
            lambda text: text.replace('"batch": 2', '"batch": "2"'),
            lambda text: text.replace('"library": 1.0', '"library": NaN'),
            lambda text: text.replace(f'"format": {module.FORMAT}', '"format": 0'),
            lambda text: text.replace('"precision": "strict"', '"precision": "tf32"'),
        ],
        ids=["empty", "half", "list", "bytes", "candidate", "refused", "field", "type", "nan", "format", "key"],
    )
    def test_a_damaged_file_is_said_once_and_made_anew(self, calibrate, caplog, damage):
        candidates = {"library": right, "bad": off_by(1.0)}
        first = calibrate(candidates)
        wanted = first.choose(SHAPE)
        text = first.file.read_text()
        assert damage(text) != text
        first.file.write_bytes(damage(text).encode(errors="surrogateescape"))
        caplog.clear()
        second = calibrate(candidates)
        assert second.choose(SHAPE) == wanted
        assert second.timer.calls
        messages = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
        assert len(messages) == 1
        assert str(first.file) in messages[0]
        third = calibrate(candidates)
        assert third.choose(SHAPE) == wanted
        assert third.timer.calls == []

    @pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
    def test_a_folder_without_permission(self, calibrate, caplog):
        calibration = calibrate({"library": right})
        calibration.folder.mkdir()
        calibration.folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
        assert calibration.choose(SHAPE).candidate == "library"
        assert "cannot be kept" in caplog.text
        calibration.folder.chmod(stat.S_IRWXU)

    def test_a_folder_that_cannot_be_made_is_said_once(self, calibrate, tmp_path, caplog):
        (tmp_path / "file").write_text("")
        calibration = calibrate({"library": right}, folder=tmp_path / "file" / "calibration")
        shapes = [dataclasses.replace(SHAPE, batch=batch) for batch in (1, 2, 3)]
        found = [calibration.choose(shape) for shape in shapes]
        assert [choice.candidate for choice in found] == ["library"] * 3
        assert caplog.text.count("cannot be kept") == 1
        assert calibration.choose(shapes[0]) is found[0]

    def test_what_another_process_wrote_meanwhile_holds(self, calibrate):
        candidates = {"library": right, "other": off_by(0.0)}
        faster = calibrate(candidates, {"library": 1.0, "other": 2.0})

        class Late(Clock):
            def __call__(self, call):
                faster.choose(SHAPE)  # another process ends first, and finds the other order
                return super().__call__(call)

        slower = calibrate(candidates)
        slower.timer = Late(candidates, {"library": 2.0, "other": 1.0})
        found = slower.choose(SHAPE)
        assert found.candidate == "library"
        assert found == faster.choose(SHAPE)

    def test_many_at_once_lose_nothing_and_agree(self, calibrate, caplog):
        shapes = [dataclasses.replace(SHAPE, batch=1, out_channels=1 + index) for index in range(6)]
        candidates = {"library": right, "other": off_by(0.0)}
        # Half of them find the one faster, half the other; all begin with another shape.
        each = [calibrate(candidates, {"library": 1.0 + i % 2, "other": 1.5}) for i in range(6)]

        def work(index):
            for shape in shapes[index:] + shapes[:index]:
                each[index].choose(shape)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(each))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for shape in shapes:
            assert len({calibration.choose(shape).candidate for calibration in each}) == 1
        fresh = calibrate(candidates)
        assert [fresh.choose(shape) for shape in shapes] == [each[0].choose(shape) for shape in shapes]
        assert fresh.timer.calls == []
        assert caplog.text == "" or "damaged" not in caplog.text
        assert not list(fresh.folder.glob("*.tmp"))

    def test_threads_of_one_instance_measure_once(self, calibrate):
        calibration = calibrate({"library": right})
        threads = [threading.Thread(target=calibration.choose, args=(SHAPE,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(calibration.timer.calls) == module.REPEATS

    def test_a_lock_that_is_never_given_back(self, calibrate, monkeypatch, caplog):
        fcntl = pytest.importorskip("fcntl")
        calibration = calibrate({"library": right})
        calibration.folder.mkdir()
        monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.05)
        with open(calibration.file.with_suffix(".lock"), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            started = time.monotonic()
            assert calibration.choose(SHAPE).candidate == "library"
            assert time.monotonic() - started < 30
        assert "another process has held" in caplog.text

    def test_a_refusal_for_want_of_memory_is_not_kept(self, calibrate):
        def hungry(x, weight, bias):
            raise torch.cuda.OutOfMemoryError("tried to allocate 20 GiB")

        calibration = calibrate({"library": right, "hungry": hungry})
        assert "20 GiB" in calibration.choose(SHAPE).refused["hungry"]
        assert not calibration.file.exists()
        calibrate({"library": right, "hungry": right}).choose(SHAPE)
        assert calibration.file.exists()


class TestCapture:
    def test_is_refused_until_the_choice_is_in_memory(self, calibrate, monkeypatch):
        calibration = calibrate({"library": right})
        monkeypatch.setattr(module, "_capturing", lambda device: True)
        with pytest.raises(RuntimeError, match="call `choose` for every shape before the capture"):
            calibration.choose(SHAPE)
        monkeypatch.undo()
        found = calibration.choose(SHAPE)
        monkeypatch.setattr(module, "_capturing", lambda device: True)
        assert calibration.choose(SHAPE) is found

    def test_asks_the_current_stream_of_a_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert module._capturing(torch.device("cuda"))
        assert not module._capturing(CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestGpu:
    def test_a_shape_of_the_networks(self, tmp_path):
        pytest.importorskip("triton")
        calibration = Calibration("cuda", folder=tmp_path)
        found = calibration.choose(ConvolutionShape(1, 256, 256, 16, 16))
        assert found.refused == {}
        assert set(found.seconds) == set(calibration.candidates)
        assert isinstance(found, Choice)
