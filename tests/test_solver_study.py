"""`bench/solvers.py`: its distances, its rows, and that it goes on."""

import importlib
import json

import numpy as np
import pytest
import torch
from conftest import small_score

from coupfast.models.wide_resnet import WideResNet


@pytest.fixture
def study(monkeypatch):
    """The benchmark on small networks and 8 x 8 images."""
    module = importlib.import_module("solvers")
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        classifier = WideResNet(10, 1).eval().requires_grad_(False)
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(module, "load_images", lambda name, limit: (x[:limit], classifier(x[:limit]).argmax(1)))
    monkeypatch.setattr(module.coupfast, "load_score", lambda name: small_score(torch.float32))
    monkeypatch.setattr(module.coupfast, "load_classifier", lambda name: classifier)
    yield module
    torch.set_num_threads(threads)


def test_distances(study):
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, 200, 2, 3))
    assert abs(study.distances(a, b)["energy_distance"]) < 0.02
    # Two points a distance D apart, each by itself a law without spread but for ε: 2 D relative to 2 ε/√π a pixel.
    apart = study.distances(1e-3 * a[:, :, :1] + 1.0, 1e-3 * b[:, :, :1])["energy_distance"]
    assert apart == pytest.approx(2.0 / (1e-3 * 2.0 / np.sqrt(np.pi)), rel=0.1)


def test_differences_are_paired_and_from_the_most_steps(study):
    counts = {1: [0, 2, 2], 5: [2, 2, 0], 9: [1, 2, 0]}
    rows = [
        {"method": "coup", "solver": "euler-maruyama", "steps": steps, "exact": 0.0, "exact_of_each_image": of}
        for steps, of in counts.items()
    ]
    first, second, baseline = study.with_differences([*rows, rows[0] | {"method": "diffpure"}], draws=2)[:3]
    assert {row["baseline_steps"] for row in (first, second, baseline)} == {9}
    assert first["exact_difference"] == pytest.approx(100 * (-1 + 0 + 2) / 6) and "clean_difference" not in first
    assert second["exact_difference"] == pytest.approx(100 / 6) and second["exact_difference_95"] == [0.0, 50.0]
    assert [row["exact_difference_p"] for row in (first, second, baseline)] == [1.0] * 3
    # Three images that differ alike do so by two of eight choices of signs, whatever ends a resampled interval has.
    alike = [rows[0] | {"exact_of_each_image": [0] * 3}, rows[2] | {"exact_of_each_image": [2] * 3}]
    found = study.with_differences(alike, draws=2)[0]
    assert found["exact_difference_95"] == [-100.0, -100.0] and found["exact_difference_p"] == pytest.approx(0.25, abs=0.02)
    assert baseline["exact_difference_95"] == [0.0, 0.0]


def test_goes_on(study, tmp_path, monkeypatch, capsys):
    options = ["--out", str(tmp_path), "--images", "2", "--draws", "2", "--steps", "1", "2", "--reference-steps", "3"]
    options += ["--iterations", "1", "--solvers", "ddim", "reverse-diffusion", "sde-dpm-solver++-2m", "--t", "0.3"]
    options += ["--methods", "coup"]
    assert study.main(options) == 0
    found = json.loads((tmp_path / "solvers.json").read_text())
    # One step of β h = 1.8 is too long for the reverse-diffusion predictor, and one of two is on the other grids.
    assert len(found["rows"]) == 2 * 3 - 1 and len(found["gaussian"]) == 3 * 2 * 2 + 1
    for row in found["rows"]:
        assert "baseline_steps" not in row  # Euler-Maruyama is not among them
        assert all(0.0 <= row[name] <= 100.0 for name in ("clean", "transfer", "exact"))
        for name in ("clean", "transfer", "exact"):
            assert np.mean(row[f"{name}_of_each_image"]) == pytest.approx(row[name] / 100 * 2)
            assert row[f"{name}_95"][0] <= row[name] <= row[f"{name}_95"][1]
        assert np.isfinite(row["energy_distance"]) and row["cpu_seconds_an_image"] > 0.0
    assert set(found["floor"]) == {"coup"} and (tmp_path / "solvers.md").read_text().count("| coup") == 6
    first = (tmp_path / "solvers.json").read_text()
    monkeypatch.setattr(study.coupfast, "Purifier", lambda *_, **__: pytest.fail("what is there is not run again"))
    monkeypatch.setattr(study, "SOLVERS", {name: study.SOLVERS[name] for name in ("ddim", "sde-dpm-solver++-2m")})
    again = [word for word in options if word != "reverse-diffusion"]
    assert study.main(again) == 0
    rows = [row for row in json.loads(first)["rows"] if row["solver"] != "reverse-diffusion"]
    assert json.loads((tmp_path / "solvers.json").read_text())["rows"] == rows
    next(tmp_path.glob("coup-ddim-2-*.json")).unlink()
    assert study.main([*again, "--kept"]) == 0  # and what is not there is left out
    kept = json.loads((tmp_path / "solvers.json").read_text())["rows"]
    assert kept == [row for row in rows if (row["solver"], row["steps"]) != ("ddim", 2)]
    others = [*again, "--kept", "--methods"]
    assert study.main([*others, "coup", "diffpure"]) == 0  # and so is DiffPure, of which there is nothing
    assert set(json.loads((tmp_path / "solvers.json").read_text())["floor"]) == {"coup"}
    with pytest.raises(SystemExit, match="has no row of these options"):
        study.main([*others, "diffpure"])
    assert study.main([*again, "--gaussian"]) == 0
    assert "| sde-dpm-solver++-2m | log-snr" in capsys.readouterr().out


def test_gaussian_data_tell_first_order_from_second(study, tmp_path):
    assert study.main(["--out", str(tmp_path), "--gaussian", "--t", "0.1"]) == 0
    rows = json.loads((tmp_path / "solvers.json").read_text())["gaussian"]
    found = {(row["solver"], row["grid"], row["steps"]): row["wasserstein"] for row in rows}
    assert found["dpm-solver++-2m", "time", 10] < 0.05 * found["ddim", "time", 10]
    assert found["sde-dpm-solver++-2m", "time", 20] < 0.25 * found["ancestral", "time", 20]
    assert found["euler-maruyama", "time", 100] == pytest.approx(0.5 * found["euler-maruyama", "time", 50], rel=0.02)
