"""Strict fp32 inside, the caller's settings outside."""

import os
import pathlib
import subprocess
import sys
import threading

import pytest
import torch
from conftest import allows_tf32

from coupfast.engine.precision import _OWNERS, float32_precision, strict_float32

ROOT = pathlib.Path(__file__).resolve().parent.parent


def settings() -> list[str]:
    return [owner.fp32_precision for owner in _OWNERS.values()] + [str(torch.is_autocast_enabled("cpu"))]


@pytest.mark.parametrize("matmul", ["highest", "high", "medium"])
def test_strict_inside_and_restored_outside(matmul):
    torch.set_float32_matmul_precision(matmul)
    try:
        before = settings()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outside = settings()
            with strict_float32("cpu"):
                assert settings() == ["ieee"] * 5 + ["False"]
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
            assert settings() == outside
        with pytest.raises(KeyError), strict_float32("cpu"):
            raise KeyError
        assert settings() == before
        assert torch.get_float32_matmul_precision() == matmul
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("fixed, by_time", [(False, False), (False, True), (True, True)])
def test_cudnn_repeats_its_bits_inside(monkeypatch, fixed, by_time):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", fixed)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", by_time)
    with strict_float32("cpu"):
        assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (True, False)
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (fixed, by_time)


def test_covers_every_backend_with_tf32():
    """A torch that grows another fp32 setting on a convolution or matmul backend must be looked at."""
    found = {
        f"{backend}.{operation}"
        for backend in ("cuda", "cudnn", "mkldnn")
        for operation in ("matmul", "conv", "rnn")
        if hasattr(getattr(getattr(torch.backends, backend), operation, None), "fp32_precision")
    }
    assert found - {"mkldnn.rnn"} == {"cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv"}


@pytest.mark.parametrize("precision", ["strict", "3xtf32", "tf32"])
@pytest.mark.parametrize("user", ["default", "highest", "high", "medium", "new setting"])
def test_what_the_compiler_reads_can_be_read(user, precision):
    """PyTorch raises where its older and its newer settings disagree; each process begins with neither set."""
    script = f"""
import torch
from coupfast.engine.precision import _OWNERS, float32_precision
user = {user!r}
if user == "new setting":
    torch.backends.cuda.matmul.fp32_precision = "tf32"
elif user != "default":
    torch.set_float32_matmul_precision(user)
before = [owner.fp32_precision for owner in _OWNERS.values()]
for _ in range(2):
    with float32_precision("cpu", {precision!r}):
        assert torch.get_float32_matmul_precision() == {"high" if precision == "tf32" else "highest"!r}
        assert torch.backends.cuda.matmul.allow_tf32 == ({precision!r} == "tf32")
        assert torch.backends.cudnn.conv.fp32_precision == {"tf32" if precision == "tf32" else "ieee"!r}
        assert torch.backends.cudnn.allow_tf32 == ({precision!r} == "tf32")
    assert [owner.fp32_precision for owner in _OWNERS.values()] == before
    if user not in ("default", "new setting"):
        assert torch.get_float32_matmul_precision() == user
"""
    path = os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels"))
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"PYTHONPATH": path})


def test_a_precision_that_does_not_exist():
    with pytest.raises(ValueError, match="`precision` is one of strict, fast, 3xtf32, tf32, got 'ieee'"):
        float32_precision("cpu", "ieee").__enter__()


class TestThreads:
    def test_one_that_ends_first_takes_nothing_from_the_others(self):
        inside, leave, left = threading.Event(), threading.Event(), threading.Event()

        def first():
            with strict_float32("cpu"):
                inside.set()
                leave.wait(60)
            left.set()

        before = settings()
        thread = threading.Thread(target=first)
        thread.start()
        assert inside.wait(60)
        with strict_float32("cpu"):
            leave.set()
            assert left.wait(60)
            assert not allows_tf32()
            assert settings() == ["ieee"] * 5 + ["False"]
        thread.join()
        assert settings() == before

    def test_another_precision_waits(self):
        order, inside = [], threading.Event()

        def other():
            inside.wait(60)
            with float32_precision("cpu", "tf32"):
                order.append(("tf32", allows_tf32()))

        thread = threading.Thread(target=other)
        thread.start()
        with strict_float32("cpu"):
            inside.set()
            thread.join(0.3)
            assert thread.is_alive()
            order.append(("strict", allows_tf32()))
        thread.join(60)
        assert order == [("strict", False), ("tf32", True)]

    def test_threads_that_go_over_to_the_same_precision_do_not_wait_for_each_other(self):
        together, seen = threading.Barrier(2), []

        def both():
            with strict_float32("cpu"):
                together.wait(60)
                with float32_precision("cpu", "tf32"):
                    seen.append(allows_tf32())
                seen.append(allows_tf32())

        threads = [threading.Thread(target=both, daemon=True) for _ in range(2)]
        before = settings()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(seen) == [False, False, True, True]
        assert settings() == before
