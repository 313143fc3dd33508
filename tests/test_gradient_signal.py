"""`bench/gradient_signal.py`: signal and noise of gradients whose law is known, and a tiny run."""

import json

import gradient_signal as signal
import pytest
import torch


def test_signal_and_noise_are_those_of_a_known_law():
    """Mean 2 in each of 50 values, noise of variance 9 with a correlation of 0.64 from point to point; four images."""
    draws, values = 4000, 50
    generator = torch.Generator().manual_seed(0)

    def gradients(mean):
        kept = torch.randn(1, draws, 4, values, generator=generator, dtype=torch.float64)
        own = torch.randn(2, draws, 4, values, generator=generator, dtype=torch.float64)
        return mean + 3 * (0.8 * kept + 0.6 * own)

    exact, other = gradients(2.0), gradients(torch.tensor([2.0, 0.0]).repeat(values // 2))
    found = signal.measured(exact, exact, work=10)
    ratio = 4 / 9  # 50 · 2² over 50 · 9
    assert found["signal_to_noise"] == pytest.approx(ratio, rel=0.02) and found["cosine"] == 1
    assert found["per_1000"] == pytest.approx(1000 * ratio / 10, rel=0.02)
    # New draws halve the noise of two points' mean; kept ones leave (1 + 0.64) / 2 of it. Both take twice the work.
    assert found["fresh"] == pytest.approx(1000 * ratio * 2 / 20, rel=0.02)
    assert found["common"] == pytest.approx(1000 * ratio * 2 / 1.64 / 20, rel=0.02)
    assert found["correlation"] == pytest.approx(0.64, rel=0.02)
    assert signal.measured(other, exact, work=10)["cosine"] == pytest.approx(0.5**0.5, rel=0.01)


def test_few_draws_do_not_bias_it():
    """Without any signal three draws find none, on average; the plain square of their mean would be a third of the noise."""
    g = torch.randn(1, 3, 3000, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, noise = signal.moments(g, dim=1)
    assert abs(float(found.mean())) < 0.02 * float(noise.mean()) and float(noise.mean()) == pytest.approx(20, rel=0.02)


def test_a_tiny_run(tmp_path, capsys):
    options = ["--images", 1, "--t", 0.01, "--num-steps", 3, "--coarse-steps", 2, "--ensemble", 2, "--draws", 2]
    options += ["--points", 2, "--defenses", "coup", "--batch", 3, "--json", tmp_path / "s.json"]
    assert signal.main(list(map(str, options))) == 0
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert [(row["gradient"], row["work"]) for row in rows] == [
        ("exact", 6),
        ("surrogate", 5),
        ("bpda", 3),
        ("transfer", 4),
        ("diffhammer", 12),
    ]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 6 and "common" in printed[0] and printed[5].split()[:3] == ["coup", "diffhammer", "12"]
