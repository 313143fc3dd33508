"""Strict fp32 inside, the caller's settings outside."""

import pytest
import torch

from coupfast.engine.precision import _OWNERS, strict_float32


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


def test_covers_every_backend_with_tf32():
    """A torch that grows another fp32 setting on a convolution or matmul backend must be looked at."""
    found = {
        f"{backend}.{operation}"
        for backend in ("cuda", "cudnn", "mkldnn")
        for operation in ("matmul", "conv", "rnn")
        if hasattr(getattr(getattr(torch.backends, backend), operation, None), "fp32_precision")
    }
    assert found - {"mkldnn.rnn"} == {"cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv"}
