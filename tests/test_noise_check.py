"""Networks that are what they are taken for, that are not, and that tell nothing."""

import math
import warnings

import pytest
import torch
from conftest import LabelTable, small_score
from torch import nn

from coupfast import LM, OneStep, Purifier
from coupfast.models.ddpmpp import DDPMpp
from coupfast.models.noise_check import check_noise_prediction
from coupfast.models.zoo import load_score
from coupfast.sde import VPSDE


def rates(labels):
    t = labels.double()[:, None, None, None] / 999
    alpha_bar = torch.exp(-0.5 * 19.9 * t**2 - 0.1 * t)
    return alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()


def linear_label(alpha_bar):
    """999 t with this ᾱ."""
    exponent = -torch.log(alpha_bar)
    return (999 * (-0.1 + torch.sqrt(0.01 + 2 * 19.9 * exponent)) / 19.9).float()


class Other(nn.Module):
    """A network of another convention, made of one that predicts the noise."""

    def __init__(self, score, convention):
        super().__init__()
        self.score, self.convention = score, convention

    def forward(self, x, labels):
        alpha, sigma = rates(labels)
        match self.convention:
            case "cosine":
                t = labels.double() / 999
                alpha_bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2).square() / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
                return self.score(x, linear_label(alpha_bar.clamp(1e-4, 1 - 1e-4)))
            case "t":
                return self.score(x, 999 * labels)
            case "reversed":
                return self.score(x, 999 - labels)
            case "4000 steps":
                return self.score(x, labels / 4)
            case "cut off":
                return self.score(x, labels.long().float())
            case "rounded":
                return self.score(x, labels.round())
        eps_hat = self.score(x, labels)
        x0 = (x - sigma * eps_hat) / alpha
        match self.convention:
            case "v":
                return alpha * eps_hat - sigma * x0
            case "x0":
                return x0
            case "score":
                return -eps_hat / sigma
            case "minus":
                return -eps_hat
        raise AssertionError(self.convention)


def check_in_silence(score, x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_noise_prediction(score, x)


def test_a_noise_predictor_is_served(trained, photos):
    for start in range(0, 20, 4):  # other images, other errors
        check_in_silence(trained, photos[start:])
    check_in_silence(trained.to(torch.float32), photos[:1])


@pytest.mark.parametrize(
    ("convention", "message"),
    [
        ("v", r"but v = .*load_score\(network, prediction='v_prediction'\)"),
        ("x0", r"but the image x₀.*load_score\(network, prediction='sample'\)"),
        ("score", "other sign"),
        ("minus", "other sign"),
        ("t", r"better at other labels than 999 t.* at t in \[0, 1\]"),
        ("reversed", "time reversed"),
        ("4000 steps", "a schedule of 4000"),
    ],
)
def test_other_predictors_are_refused(convention, message, trained, photos):
    for start in (0, 4, 14):
        with pytest.raises(ValueError, match=message):
            check_noise_prediction(Other(trained, convention), photos[start:])


@pytest.mark.parametrize("kind", ["noise", "two tones", "flat", "black"])
@pytest.mark.parametrize(
    ("convention", "message"),
    [("v", "v_prediction"), ("x0", "'sample'"), ("minus", "other sign"), ("reversed", "time reversed")],
)
def test_images_that_tell_nothing_hide_nothing(kind, convention, message, trained):
    """Of noise and blanks every predictor makes the same: the check then looks at a picture of its own."""
    with pytest.raises(ValueError, match=message):
        check_noise_prediction(Other(trained, convention), unusual(kind))


def unusual(kind):
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {"noise": x, "flat": 0 * x + 0.4, "black": 0 * x, "two tones": (x > 0.5).float()}[kind]


def test_a_cosine_schedule_is_mentioned(trained, photos):
    # The shipped network knows few times, and heeds its labels less than a large one: its error hardly doubles.
    for start in (0, 8, 16):
        with pytest.warns(UserWarning, match="better at other labels .* the steps of the cosine schedule"):
            check_noise_prediction(Other(trained, "cosine"), photos[start:])


@pytest.mark.parametrize(("convention", "message"), [("cut off", "cuts off .* whole_labels"), ("rounded", "rounds fractions")])
def test_whole_labels_are_mentioned(convention, message, trained, photos):
    with pytest.warns(UserWarning, match=message):
        check_noise_prediction(Other(trained, convention), photos)
    check_in_silence(load_score(Other(trained, convention), whole_labels=True), photos)  # known by now


def test_adapted_networks_are_served(trained, photos):
    for convention, prediction in (("v", "v_prediction"), ("x0", "sample")):
        check_in_silence(load_score(Other(trained, convention), prediction=prediction), photos)


@pytest.mark.parametrize(("convention", "prediction", "right"), [
    (None, "v_prediction", "epsilon"), (None, "sample", "epsilon"), ("v", "sample", "v_prediction")
])  # fmt: skip
def test_a_wrong_adapter_is_noticed(convention, prediction, right, trained, photos):
    network = load_score(trained if convention is None else Other(trained, convention), prediction=prediction)
    for start in range(0, 20, 4):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises((ValueError, UserWarning), match=rf"load_score\(network, prediction='{right}'\) takes it so"):
                check_noise_prediction(network, photos[start:])


def test_a_class_that_was_made_again_is_looked_at_again(trained, photos):
    """With the name and the weights of the one before, as where a cell of a notebook runs twice."""

    def purifier(sign):
        class Network(nn.Module):
            def __init__(self):
                super().__init__()
                self.score = trained

            def forward(self, x, labels):
                return sign * self.score(x, labels)

        return Purifier(Network().eval(), method="one-step", engine="eager")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        purifier(1.0)(photos[:1], seed=0)
    with pytest.warns(UserWarning, match="the noise with the other sign"):
        purifier(-1.0)(photos[:1], seed=0)


def test_a_network_is_looked_at_on_the_schedule_of_its_method(trained, photos):
    slow = VPSDE(0.1, 5.0)

    class Slow(nn.Module):
        """Trained on that schedule."""

        def __init__(self):
            super().__init__()
            self.score = trained

        def forward(self, x, labels):
            return self.score(x, linear_label(torch.from_numpy(slow.alpha_bar(labels.double().numpy() / 999))))

    for method in (OneStep(sde=slow), LM(num_steps=1, sde=slow)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Purifier(Slow().eval(), method=method, engine="eager")(photos[:1], seed=0)
    with pytest.warns(UserWarning, match="better at other labels"):
        Purifier(Slow().eval(), method=OneStep(), engine="eager")(photos[:1], seed=0)


def test_a_table_of_time_steps_is_named():
    x = torch.rand(2, 3, 8, 8)
    with pytest.raises(TypeError, match=r"whole labels only .*load_score\(network, whole_labels=True\)"):
        check_noise_prediction(LabelTable(), x)
    check_in_silence(load_score(LabelTable(), whole_labels=True), x)


class Simple(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, labels):
        return self.function(x)


@pytest.mark.parametrize("seed", range(3))
def test_random_networks_are_not_refused(seed, photos):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        small = DDPMpp(8, (1, 2), 1, (4,), 8).redraw_small_layers(torch.Generator().manual_seed(seed)).eval()
        convolution = Simple(nn.Conv2d(3, 3, 3, padding=1))
    check_in_silence(small, torch.nn.functional.avg_pool2d(photos, 4))
    check_in_silence(convolution, photos)
    check_in_silence(load_score("cifar10-tiny", weights="random", seed=seed), photos)


@pytest.mark.parametrize("scale", [1.0, -1.0, 0.1, -0.1, 0.0])
def test_what_passes_its_input_on_is_not_refused(scale, photos):
    for x in (photos, unusual("noise"), unusual("black")):
        check_in_silence(Simple(lambda x: scale * x), x)


@pytest.mark.parametrize("kind", ["noise", "flat", "black", "two tones"])
def test_images_of_another_kind_are_not_held_against_a_network(kind, trained):
    check_in_silence(trained, unusual(kind))


def test_float64_and_one_channel():
    check_in_silence(small_score(), torch.rand(2, 3, 8, 8, dtype=torch.float64))
    check_in_silence(DDPMpp(8, (1,), 1, (), 8, channels=1).eval(), torch.rand(1, 1, 8, 8))
