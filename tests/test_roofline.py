"""The counts behind the arithmetic about GPUs: by hand on a small network, and the known ones of the paper's."""

import pathlib
import sys

import pytest
import torch
from torch import nn

BENCH = str(pathlib.Path(__file__).resolve().parent.parent / "bench")


@pytest.fixture(scope="module")
def roofline():
    sys.path.insert(0, BENCH)
    import roofline

    yield roofline
    sys.path.remove(BENCH)
    sys.modules.pop("roofline", None)


def test_counts_a_small_network_as_by_hand(roofline):
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
    network.to("meta").eval().requires_grad_(False)
    found = roofline.passes(network, torch.empty(1, 3, 4, 4, device="meta"))
    x, h, y, statistics = 4 * 3 * 16, 4 * 8 * 16, 4 * 5, 4 * 2 * 2
    convolution, linear = 4 * (8 * 3 * 9 + 8), 4 * (128 * 5 + 5)
    works = [
        ("convolutions", 2 * 3 * 9 * 8 * 16, x + h, convolution),
        ("group norms", 0, 2 * h + statistics, 4 * 2 * 8),
        ("elementwise", 0, 2 * h, 0),
        ("matmuls", 2 * 128 * 5, h + y, linear),
    ]
    assert found["forward"] == [roofline.Work(*work) for work in works]
    # Biases have no part in the transposes; ReLU's reads what it made.
    works = [
        ("matmuls", 2 * 128 * 5, h + y, linear - 4 * 5),
        ("elementwise", 0, 3 * h, 0),
        ("group norms", 0, 3 * h + statistics, 4 * 8),
        ("convolutions", 2 * 3 * 9 * 8 * 16, 2 * x + h, convolution - 4 * 8),
    ]
    assert found["backward"] == [roofline.Work(*work) for work in works]


def test_an_operation_takes_the_larger_of_its_two_times(roofline):
    gpu = roofline.Gpu("", 1000.0, 100.0, "")
    assert roofline.Work("", 2000, 10, 90).seconds(gpu, 1) == 2.0
    assert roofline.Work("", 2000, 10, 390).seconds(gpu, 1) == 4.0
    assert roofline.Work("", 2000, 10, 390).seconds(gpu, 8) == 16.0


@pytest.fixture(scope="module")
def steps(roofline):
    return roofline.paper_steps()


def gmac(work, *parts):
    return sum(w.image_flop for w in work if not parts or w.part in parts) / 2e9


def test_the_papers_networks_have_their_known_counts(roofline, steps):
    """18.55 GMAC of the score network, of which 17.63 convolutions; 5.24 of the classifier, and as many for its gradient."""
    assert gmac(steps["forward"]) == pytest.approx(18.55 + 2 * 5.24, abs=0.02)
    backward = gmac(steps["backward"])
    # Attention's products have two factors that depend on x: their transposes take twice as much.
    assert backward == pytest.approx(2 * 18.55 + 2 * 5.24, rel=0.01)
    assert backward > 2 * 18.55 + 2 * 5.24
    # Attention's four projections, nine times at 16 x 16 and once at 4 x 4, run as 1 x 1 convolutions.
    projections = 4 * 256**2 * (9 * 16**2 + 4**2) / 1e9
    assert gmac(steps["forward"], "convolutions") == pytest.approx(17.63 + projections + 2 * 5.24, abs=0.02)
    # Every weight is read: 106.6 M and, twice, 36.5 M of them; again by the score network's transpose, but for the time
    # embedding's projections, some 12 M, which do not depend on x.
    weights = {name: sum(w.weight_bytes for w in work) / 4e6 for name, work in steps.items()}
    assert weights["forward"] == pytest.approx(106.6 + 2 * 36.5, rel=0.01)
    assert weights["backward"] == pytest.approx(2 * 106.6 - 12 + 2 * 36.5, rel=0.01)


def test_every_line_is_marked_and_adds_up(roofline, steps, monkeypatch, capsys):
    rows = roofline.rows(steps)
    assert len(rows) == 3 * 3 * 2
    for row in rows:
        assert row["basis"] == "arithmetic, not measured"
        assert sum(row["shares"].values()) == pytest.approx(1.0)
        assert row["shares"]["guided step"] < 1e-3
    by = {(row["gpu"], row["batch"], row["step"]): row["seconds"] for row in rows}
    # 58 GFLOP at 67 TFLOP/s are 0.87 ms; eight images read the weights once.
    assert by["H100 SXM", 1, "forward"] > 0.87e-3
    assert 0.87e-3 * 8 < by["H100 SXM", 8, "forward"] < 8 * by["H100 SXM", 1, "forward"]
    assert by["H200", 64, "backward"] < by["H100 SXM", 64, "backward"] < by["A100 SXM 80GB", 64, "backward"]

    monkeypatch.setattr(roofline, "paper_steps", lambda: steps)
    monkeypatch.setattr(sys, "argv", ["roofline.py", "--markdown"])
    roofline.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ") and "GPU" not in line]
    assert len(lines) == len(rows)
    assert all(line.endswith("arithmetic, not measured |") for line in lines)
