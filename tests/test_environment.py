import platform
import types
from pathlib import Path

import torch

from coupfast import environment


def test_versions():
    assert environment.version("torch") == torch.__version__
    assert environment.version("no-such-distribution") is None


def test_processor_is_the_first_model_named_or_the_architecture(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self, **_: "vendor_id\t: A\nmodel name\t: A: B\nmodel name\t: C\n")
    assert environment.processor() == environment.machine()["processor"] == "A: B"
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    monkeypatch.setattr(Path, "read_text", lambda self, **_: "hart\t: 0\n")
    assert environment.processor() == "riscv64"

    def missing(self, **_):
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", missing)
    assert environment.processor() == "riscv64"


def test_machine_counts_the_cores_of_this_process(monkeypatch):
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    monkeypatch.setattr(environment.os, "cpu_count", lambda: 11)
    assert environment.machine()["cores"] == 3
    monkeypatch.delattr(environment.os, "sched_getaffinity")
    assert environment.machine()["cores"] == 11


def test_the_newest_cuda_of_the_driver(monkeypatch):
    class Library:
        def __init__(self, name):
            assert name == "libcuda.so.1"

        def cuDriverGetVersion(self, pointer):
            pointer._obj.value = 12080
            return 0

    monkeypatch.setattr(environment.ctypes, "CDLL", Library)
    assert environment.driver_cuda() == (12, 8)
    monkeypatch.setattr(Library, "cuDriverGetVersion", lambda self, pointer: 999)
    assert environment.driver_cuda() is None

    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(environment.ctypes, "CDLL", missing)
    assert environment.driver_cuda() is None


def test_other_sources_have_another_hash(tmp_path):
    def hashed(*names):
        packages = []
        for name in names:
            package = types.ModuleType(name)
            package.__path__ = [str(tmp_path / name)]
            packages.append(package)
        return environment.sources_sha256(*packages)

    for name in ("one", "two"):
        (tmp_path / name / "inner").mkdir(parents=True)
    found = [hashed("one")]
    for change in (
        lambda: (tmp_path / "one" / "a.py").write_text("x = 1"),
        lambda: (tmp_path / "one" / "a.py").write_text("x = 2"),
        lambda: (tmp_path / "one" / "a.py").rename(tmp_path / "one" / "b.py"),
        lambda: (tmp_path / "one" / "b.py").rename(tmp_path / "one" / "inner" / "b.py"),
        lambda: (tmp_path / "one" / "a.h").write_text("#define X"),
    ):
        change()
        found.append(hashed("one"))
    assert len(set(found)) == len(found)
    (tmp_path / "one" / "results.json").write_text("{}")
    assert hashed("one") == found[-1]
    (tmp_path / "two" / "a.py").write_text("")
    assert hashed("one", "two") != hashed("one")
