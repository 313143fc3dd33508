"""Downloads go where the user's cache is."""

from pathlib import Path

import pytest

from coupfast.cache import cache_directory


def test_follows_the_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory("data") == tmp_path / "coupfast" / "data"
    assert not cache_directory("data").exists()


def test_default_is_below_home(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory("data") == Path.home() / ".cache" / "coupfast" / "data"


@pytest.mark.parametrize("value", ["", "relative/folder", "."])
def test_a_variable_that_is_no_absolute_path_counts_as_unset(monkeypatch, value):
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert cache_directory("data") == Path.home() / ".cache" / "coupfast" / "data"
