"""The rates are what was moved or multiplied over the time it took."""

import pytest
import torch

from coupfast.engine import rates

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Every call takes these seconds in turn; returns the calls."""
    calls = []

    def seconds(function, device):
        function()
        calls.append(device)
        return [4.0, 2.0, 8.0][len(calls) - 1]

    monkeypatch.setattr(rates, "device_seconds", seconds)
    return calls


def test_a_copy_reads_and_writes(clock):
    assert rates.copy_bandwidth(CPU, megabytes=1, repeats=3) == 2 * 2**20 / 2.0
    assert clock == [CPU] * 3


def test_a_product_multiplies_and_adds(clock, monkeypatch):
    seen = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: seen.append(torch.backends.cuda.matmul.fp32_precision) or real(a, b))
    assert rates.matmul_rate(CPU, size=16, repeats=3) == 2 * 16**3 / 2.0
    assert seen == ["ieee"] * 4  # one to warm up


def test_seconds_of_a_call():
    called = []
    assert rates.device_seconds(lambda: called.append(1), CPU) >= 0.0
    assert called == [1]
