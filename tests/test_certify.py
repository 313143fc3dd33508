"""Denoised smoothing: the method against its definition, the bound against exact numbers, certificates of known classifiers."""

import json
import math
import statistics

import numpy as np
import pytest
import torch
from conftest import relu_classifier, small_score
from torch import nn

import coupfast
from coupfast import Certification, DenoisedSmoothing, PurifiedClassifier, Purifier, certify
from coupfast.cli import main
from coupfast.evaluation.certify import CertifiedImage, lower_bound
from coupfast.sde import VPSDE


class TestMethod:
    @pytest.mark.parametrize("clip", [False, True])
    @pytest.mark.parametrize("batch", [1, 3])
    def test_its_certificate_of_the_gradient_says_exact(self, images, batch, clip):
        purifier = Purifier(small_score(), method="denoised-smoothing", sigma=0.2, clip_denoised=clip)
        defense = PurifiedClassifier(purifier, relu_classifier(), seed=5)
        found = coupfast.check_gradient(defense, images[:batch], images=batch, draws=0, directions=batch % 3)
        assert found.verdict == "exact" and found.relative_error < 1e-12 and found.forward_error < 1e-12
        assert all(row.norm_float64 > 0 for row in found.images)

    def test_gradcheck_on_four_pixels(self):
        class Smooth(nn.Module):
            def forward(self, x, labels):
                return torch.tanh(1.5 * x + 0.1 * x.flip(-1) + labels[:, None, None, None] / 500)

        x = 0.2 + 0.6 * torch.rand(3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        purifier = Purifier(Smooth().eval(), method=DenoisedSmoothing(sigma=0.1, clamp=False))
        assert torch.autograd.gradcheck(lambda x: purifier(x, seed=1), x.requires_grad_())

    @pytest.mark.parametrize("sigma", [0.05, 0.25, 1.0])
    def test_the_network_sees_its_own_states(self, images, sigma):
        """At the time of sigma the scaled, noised image has the signal and the noise of that time."""
        method = DenoisedSmoothing(sigma=sigma)
        table = method.recipe().table
        alpha_bar = float(VPSDE().alpha_bar(method.t))
        assert math.sqrt((1 - alpha_bar) / alpha_bar) == pytest.approx(2 * sigma, rel=1e-12)
        assert table.a[0] == pytest.approx(math.sqrt(alpha_bar), rel=1e-12)
        assert table.d[0] == pytest.approx(math.sqrt(1 - alpha_bar), rel=1e-12)
        assert table.labels[1] == 999 * method.t

    def test_a_network_that_says_the_noise_gives_the_image_back(self, images):
        z = torch.randn(2, *images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

        class Knows(nn.Module):
            def forward(self, x, labels):
                return z[0, : len(x)] + 0 * x

        purified = Purifier(Knows().eval(), method="denoised-smoothing", sigma=0.5)(images, noise=z)
        torch.testing.assert_close(purified, images, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize(
        ("knobs", "message"),
        [
            ({"sigma": 0.0}, "`sigma` is finite and above 0"),
            ({"sigma": 1e3}, "the schedule is so noisy at t = 1.*above 1"),
            ({"clip_denoised": "yes"}, "`clip_denoised` is True or False"),
            ({"sde": 3}, "`sde` is a coupfast.VPSDE"),
        ],
    )
    def test_knobs_out_of_range(self, knobs, message):
        with pytest.raises((TypeError, ValueError), match=message):
            DenoisedSmoothing(**knobs)


class TestBound:
    @pytest.mark.parametrize(("successes", "trials"), [(1, 5), (73, 100), (99, 100), (4000, 10000)])
    @pytest.mark.parametrize("alpha", [0.001, 0.05])
    def test_it_is_where_so_many_successes_are_that_rare(self, successes, trials, alpha):
        """P(X >= successes) = alpha at p = the bound, by the binomial sum itself."""
        p = lower_bound(successes, trials, alpha)
        total = 0.0
        for i in range(successes, trials + 1):
            choose = math.lgamma(trials + 1) - math.lgamma(i + 1) - math.lgamma(trials - i + 1)
            total += math.exp(choose + i * math.log(p) + (trials - i) * math.log1p(-p))
        assert total == pytest.approx(alpha, rel=1e-7)

    def test_all_and_none(self):
        assert lower_bound(0, 10, 0.01) == 0.0
        assert lower_bound(1000, 1000, 0.001) == pytest.approx(0.001 ** (1 / 1000), rel=1e-12)

    @pytest.mark.parametrize("arguments", [(3, 2, 0.1), (-1, 2, 0.1), (0, 0, 0.1), (1, 2, 0.0), (1, 2, 1.0)])
    def test_what_has_no_bound(self, arguments):
        with pytest.raises(ValueError, match="a bound needs|`alpha` is between"):
            lower_bound(*arguments)


class Half(nn.Module):
    """Class 1 where the mean of the image is above ½: of x + σ z its probability is Φ((mean − ½) sqrt(n)/σ), exactly."""

    def forward(self, x):
        above = x.mean(dim=(1, 2, 3)) - 0.5
        return torch.stack([-above, above], dim=1)


class Blind(nn.Module):
    """ε̂ = 0: what comes out of the smoothing is the noised image."""

    def forward(self, x, labels):
        return 0.0 * x


def defense(sigma=0.5, seed=3, classifier=None):
    # Without the clip the classifier sees x + σ z, whose law is known.
    purifier = Purifier(Blind().eval(), method=DenoisedSmoothing(sigma=sigma, clamp=False), gradient="none")
    return PurifiedClassifier(purifier, (classifier or Half()).eval(), seed=seed)


def flat(*values):
    return torch.stack([torch.full((1, 4, 4), value, dtype=torch.float64) for value in values])


class TestCertify:
    def test_of_a_linear_classifier_the_radius_is_the_distance(self):
        """Its true radius is the distance to the plane, (mean − ½) sqrt(n); the certified one is below, and not by much."""
        x = flat(0.55, 0.6, 0.45, 0.502)
        found = certify(defense(), x, [1, 1, 1, 1], draws=4000, selection_draws=50)
        distances = [0.05 * 4, 0.1 * 4, 0.05 * 4]
        for image, distance in zip(found.images, distances, strict=False):
            assert 0.7 * distance < image.radius < distance
        assert [image.predicted for image in found.images] == [1, 1, 0, -1]
        assert found.images[3].radius == 0.0 and found.abstained == 0.25
        # The votes are binomial of a known probability: within five standard deviations.
        for image, distance in zip(found.images, distances, strict=False):
            p = statistics.NormalDist().cdf(distance / 0.5)
            assert abs(image.votes - 4000 * p) < 5 * math.sqrt(4000 * p * (1 - p))
        assert found.accuracy() == 0.5
        assert found.accuracy(0.2) == 0.25
        assert found.accuracy(found.largest_radius) == 0.0
        assert found.curve()[0] == (0.0, 0.5) and len(found.curve()) == 3
        assert Certification.from_dict(json.loads(found.to_json())) == found

    def test_it_depends_on_neither_batch_nor_neighbours(self):
        x = flat(0.52, 0.56, 0.48)
        whole = certify(defense(), x, [1, 1, 0], draws=300, selection_draws=20, batch=64)
        assert certify(defense(), x, [1, 1, 0], draws=300, selection_draws=20, batch=300) == whole
        one = certify(defense(), x[1:2], [1], draws=300, selection_draws=20, ids=[1])
        assert one.images == whole.images[1:2]
        other = certify(defense(seed=4), x, [1, 1, 0], draws=300, selection_draws=20)
        assert other.images != whole.images

    def test_it_goes_on_where_it_was_stopped(self, tmp_path):
        x, arguments = flat(0.52, 0.56), {"draws": 2500, "selection_draws": 30, "batch": 100}
        expected = certify(defense(), x, [1, 1], **arguments)

        class Stops(Half):
            left = 40

            def forward(self, x):
                if len(x) > 2:  # not a first look
                    self.left -= 1
                    if self.left < 0:
                        raise KeyboardInterrupt
                return super().forward(x)

        stopping, journal = Stops(), tmp_path / "votes"
        with pytest.raises(KeyboardInterrupt):
            certify(defense(classifier=stopping), x, [1, 1], journal=journal, **arguments)
        stopping.left = 10**6
        found = certify(defense(classifier=stopping), x, [1, 1], journal=journal, **arguments)
        assert found == expected
        # 51 batches in all; at most those of one record are done again.
        assert 10**6 - stopping.left < 52 - 40 + 11
        with pytest.raises(OSError, match="is of another configuration"):
            certify(defense(sigma=0.4), x, [1, 1], journal=journal, **arguments)

    def test_images_that_share_their_noise_keep_their_own_votes(self, tmp_path):
        x, arguments = flat(0.4, 0.6), {"draws": 200, "selection_draws": 20, "ids": [7, 7]}
        found = certify(defense(), x, [0, 1], journal=tmp_path / "votes", **arguments)
        assert found == certify(defense(), x, [0, 1], **arguments)
        assert [image.predicted for image in found.images] == [0, 1]

    def test_it_goes_on_with_what_was_decided_when_it_began(self, tmp_path, monkeypatch):
        engines, journal, call = [], tmp_path / "votes", {"draws": 20, "selection_draws": 5}

        class Seen(type(defense().purifier)):
            def settle(self, settings):
                engines.append(settings.engine.options)
                return super().settle(settings)

        def smoothed():
            small = Purifier(small_score(torch.float32), method="denoised-smoothing", sigma=0.5, gradient="none", engine="cpu")
            small.__class__ = Seen
            return PurifiedClassifier(small, relu_classifier(torch.float32), seed=3)

        x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        for free in (2**40, 2**10):
            monkeypatch.setattr("coupfast.engine.cpu.options.available_bytes", lambda device, free=free: free)
            certify(smoothed(), x, [0], journal=journal, **call)
        assert [options["largest_tile"] for options in engines] == [4, 4]

    def test_it_does_not_go_on_where_bits_may_be_others(self, tmp_path, monkeypatch):
        call = {"draws": 20, "selection_draws": 5, "journal": tmp_path / "votes"}
        certify(defense(), flat(0.5), [1], **call)
        monkeypatch.setenv("COUPFAST_CPU_ISA", "another")
        with pytest.raises(OSError, match="is of another configuration: about.environment.kernels_isa"):
            certify(defense(), flat(0.5), [1], **call)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"draws": 0}, "`draws` is at least 1, got 0"),
            ({"selection_draws": 0}, "`selection_draws` is at least 1, got 0"),
            ({"alpha": 1.0}, "`alpha` is between 0 and 1"),
            ({"batch": 0}, "`batch` is at least 1"),
            ({"y": [1, 1]}, "`y` are 1 classes"),
            ({"ids": [1, 2]}, "`ids` are 1 numbers"),
            ({"x": flat(1.5)}, "images have values in"),
        ],
    )
    def test_bad_arguments(self, arguments, message):
        given = {"x": flat(0.5), "y": [1], **arguments}
        with pytest.raises((TypeError, ValueError), match=message):
            certify(defense(), given.pop("x"), given.pop("y"), **given)

    def test_only_smoothing_is_certified(self, images):
        other = PurifiedClassifier(Purifier(small_score(), method="reverse-sde"), relu_classifier())
        with pytest.raises(ValueError, match="method 'denoised-smoothing', got 'reverse-sde'"):
            certify(other, images, [0] * 5)
        with pytest.raises(TypeError, match="PurifiedClassifier"):
            certify(relu_classifier(), images, [0] * 5)


def test_a_plot(tmp_path):
    images = tuple(CertifiedImage(1, 1, 90, 0.8, radius) for radius in (0.2, 0.4)) + (CertifiedImage(1, -1, 50, 0.4, 0.0),)
    Certification(0.5, 10, 100, 0.001, 0, images).plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[1:4] == b"PNG"


def test_the_command(tmp_path, capsys):
    words = ["certify", "cifar10-20", "--limit=2", f"--out={tmp_path}", "--sigma=0.12", "--draws=30", "--selection-draws=5"]
    assert main([*words, "--seed=4"]) == 0
    assert "certified accuracy of 2 images" in capsys.readouterr().out
    report = json.loads((tmp_path / "certify.json").read_text())
    found = Certification.from_dict(report["certification"])
    assert found.sigma == 0.12 and found.draws == 30 and found.seed == 4 and len(found.images) == 2
    assert report["settings"]["method"]["name"] == "denoised-smoothing"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["certify.json", "certify.png"]
    assert main(words) == 2 and "certify.json exists" in capsys.readouterr().err
    assert main([*words, "--force", "--seed=4"]) == 0
    again = json.loads((tmp_path / "certify.json").read_text())
    assert again["certification"] == report["certification"]


def test_images_without_labels_are_refused(tmp_path, capsys):
    np.savez(tmp_path / "images.npz", images=np.zeros((1, 3, 32, 32), dtype=np.float32))
    assert main(["certify", str(tmp_path / "images.npz"), f"--out={tmp_path / 'out'}"]) == 2
    assert "has no labels" in capsys.readouterr().err
