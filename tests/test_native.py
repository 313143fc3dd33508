"""C++ kernels are built once for a user, whole or not at all, and what is loaded is what was built."""

import ctypes
import json
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from coupfast.cache import cache_directory
from coupfast_kernels import native

pytestmark = pytest.mark.skipif(
    os.name == "nt" or not any(map(shutil.which, native.COMPILERS)), reason="needs a C++ compiler; not for Windows"
)

CROSS_COMPILER = "aarch64-linux-gnu-g++"

SOURCE = """
#include "answer.h"
extern "C" int answer() { return ANSWER; }
extern "C" const char* isa() { return COUPFAST_ISA; }
extern "C" void multiply_add(int n, const float* a, const float* b, float* c) {
  for (int i = 0; i < n; ++i) c[i] = a[i] * b[i] + c[i];
}
template <int kStart> int& counter() {
  static int count = kStart;
  return count;
}
extern "C" int next() { return ++counter<0>(); }
extern "C" int features() {
#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__AVX512BW__) && defined(__FMA__)
  return 2;
#elif defined(__AVX2__) && defined(__FMA__)
  return 1;
#else
  return 0;
#endif
}
"""

# A process as users have it: what it loaded, and on stderr what it said.
CHILD = """
import json, logging, sys
from pathlib import Path
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
from coupfast_kernels import locks, native
native.SOURCES = Path(sys.argv[1])
if sys.argv[2] == "without locks":
    locks.fcntl = None
print(json.dumps({"answer": native.load().answer(), **native.describe()}))
"""


@pytest.fixture(autouse=True)
def sources(tmp_path, monkeypatch):
    """Sources that compile in a moment, an empty cache, no settings."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "kernels.cpp").write_text(SOURCE)
    (folder / "answer.h").write_text("#define ANSWER 42\n")
    for name in ("CXX", "COUPFAST_CXXFLAGS", "COUPFAST_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "SOURCES", folder)
    forget()
    yield folder
    forget()


def forget() -> None:
    """As in a new process."""
    native._load.cache_clear()
    native._failures.clear()


def entries() -> list[Path]:
    return sorted(cache_directory("native").glob("*.so"))


@pytest.fixture
def gate(tmp_path, monkeypatch):
    """A compiler that notes each compilation in `started` and waits until the file `open` exists."""
    (tmp_path / "started").touch()
    script = tmp_path / "gated compiler"
    script.write_text(f"""#!/bin/sh
cd '{tmp_path}'
case "$*" in *-shared*)
  echo >> started
  rounds=0
  while [ ! -e open ] && [ $rounds -lt 6000 ]; do sleep 0.01; rounds=$((rounds + 1)); done;;
esac
exec '{native._compiler()[0]}' "$@"
""")
    script.chmod(0o700)
    monkeypatch.setenv("CXX", f"'{script}'")
    return tmp_path


def compilations(gate: Path) -> int:
    return len((gate / "started").read_text())


def start(sources: Path, log: Path, *, locks: bool = True) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CHILD, str(sources), "with locks" if locks else "without locks"]
    with log.open("w") as stderr:
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)


def finish(process: subprocess.Popen) -> dict:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return json.loads(output)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_is_built_once_and_then_found(caplog):
    caplog.set_level(logging.INFO)
    library = native.load()
    assert library.answer() == 42
    assert native.load() is library and native.load(native.isas()[0]) is library
    built = native.describe()
    assert [record.levelname for record in caplog.records] == ["INFO"] and built["path"] in caplog.text
    assert built["isa"] == native.isas()[0] and built["build_seconds"] > 0
    assert os.path.isabs(built["compiler"]) and built["version"] and "-ffp-contract=off" in built["flags"]
    assert json.loads(json.dumps(built)) == built
    forget()
    assert native.describe() == built | {"build_seconds": None}
    assert len(caplog.records) == 1


def test_lies_in_the_users_cache_and_belongs_to_the_user_alone():
    mask = os.umask(0)
    try:
        native.load()
    finally:
        os.umask(mask)
    (entry,) = entries()
    assert entry == Path(native.describe()["path"])
    assert sorted(path.name for path in entry.parent.iterdir()) == sorted([entry.name, "lock"])  # nothing temporary is left
    assert stat.S_IMODE(entry.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(entry.stat().st_mode) == 0o700


@pytest.mark.parametrize("isa", native.isas())
def test_every_isa_of_this_machine_is_compiled_for_and_rounds_twice(isa):
    library = native.load(isa)
    library.isa.restype = ctypes.c_char_p
    assert library.isa() == isa.encode()
    if isa != "neon":
        assert library.features() == ("portable", "avx2", "avx512").index(isa)
    # (1 + 2⁻¹²)² = 1 + 2⁻¹¹ + 2⁻²⁴ rounds to 1 + 2⁻¹¹; in one rounding 2⁻²⁴ would be left.
    n = 19  # whole vectors and a rest
    a, c = (ctypes.c_float * n)(*[1 + 2.0**-12] * n), (ctypes.c_float * n)(*[-1 - 2.0**-11] * n)
    library.multiply_add(n, a, a, c)
    assert list(c) == [0.0] * n


def test_the_kernels_compile_for_neon(tmp_path):
    """For a 64-bit ARM, by a cross-compiler where there is one: as `native` compiles them there, and without a warning."""
    compiler = shutil.which(CROSS_COMPILER)
    if compiler is None:
        pytest.skip(f"NEON path compiled: no ({CROSS_COMPILER} is not on PATH; Debian has it in g++-aarch64-linux-gnu)")
    source = Path(native.__file__).parent / "csrc" / native.TRANSLATION_UNIT
    flags = (*native.FLAGS, *native.GCC_FLAGS, *native.ISA_FLAGS["neon"], '-DCOUPFAST_ISA="neon"', "-save-temps=obj")
    done = subprocess.run([compiler, str(source), "-o", "kernels.so", *flags], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    elf = (tmp_path / "kernels.so").read_bytes()
    assert elf[:5] == b"\x7fELF\x02" and int.from_bytes(elf[18:20], "little") == 183  # 64 bits, AArch64
    # Contraction is off, so these can only come from the intrinsics of the NEON path.
    (assembly,) = tmp_path.glob("*.s")
    assert re.search(r"\tfmla\tv\d+\.4s", assembly.read_text())


def test_libraries_share_no_static_variables(monkeypatch):
    first = native.load("portable")
    monkeypatch.setenv("COUPFAST_CXXFLAGS", "-DOTHER")
    forget()
    second = native.load("portable")
    assert [first.next(), first.next(), second.next()] == [1, 2, 1]


def test_threads_share_one_build(gate):
    (gate / "open").touch()
    found = []
    threads = [threading.Thread(target=lambda: found.append(native.load())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(map(id, found))) == 1
    assert compilations(gate) == 1


def test_of_two_processes_one_builds_and_one_waits(gate, sources):
    first = start(sources, gate / "first")
    wait_until(lambda: compilations(gate) == 1)
    second = start(sources, gate / "second")
    wait_until(lambda: "waiting" in (gate / "second").read_text())
    assert entries() == []
    (gate / "open").touch()
    built, found = finish(first), finish(second)
    assert built["answer"] == found["answer"] == 42
    assert built["build_seconds"] > 0 and found["build_seconds"] is None
    assert built["path"] == found["path"] and compilations(gate) == 1


def test_two_processes_without_locks_build_the_same(gate, sources):
    processes = [start(sources, gate / name, locks=False) for name in ("first", "second")]
    wait_until(lambda: compilations(gate) == 2)
    (gate / "open").touch()
    assert [finish(process)["answer"] for process in processes] == [42, 42]
    assert all(native._fault(path) is None for path in entries())


def test_a_killed_builder_leaves_no_lock_and_no_entry(gate, sources):
    first = start(sources, gate / "first")
    wait_until(lambda: compilations(gate) == 1)
    first.kill()
    first.communicate(timeout=60)
    (left,) = cache_directory("native").glob(f"{native.TEMPORARY}*")
    assert entries() == []
    second = start(sources, gate / "second")
    wait_until(lambda: compilations(gate) == 2)  # while the first one's compiler still runs
    (gate / "open").touch()
    assert finish(second)["answer"] == 42
    assert "waiting" not in (gate / "second").read_text()
    assert len(entries()) == 1

    # What the killed one left goes when it is old, and not before: it may be another machine's build.
    assert left.exists()
    wait_until(lambda: [path.name for path in left.iterdir()] == ["kernels.so"])  # its compiler is done
    os.utime(left, (0, 0))
    entries()[0].unlink()
    assert native.load().answer() == 42
    assert not left.exists()


def test_gives_up_waiting_and_builds_for_itself(gate, sources, monkeypatch, caplog):
    first = start(sources, gate / "first")
    wait_until(lambda: compilations(gate) == 1)
    monkeypatch.setattr(native, "PATIENCE_SECONDS", 0.0)
    thread = threading.Thread(target=native.load)
    thread.start()
    wait_until(lambda: compilations(gate) == 2)
    (gate / "open").touch()
    thread.join()
    assert native.load().answer() == 42
    assert "has held" in caplog.text and "for this process alone" in caplog.text
    assert Path(native.describe()["path"]).parent != cache_directory("native")
    assert finish(first)["answer"] == 42


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def emptied(data: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [truncated, flipped, emptied])
def test_a_damaged_entry_is_reported_and_built_again(damage, sources, tmp_path):
    finish(start(sources, tmp_path / "first"))
    (entry,) = entries()
    content = entry.read_bytes()
    entry.write_bytes(damage(content))
    assert finish(start(sources, tmp_path / "second"))["answer"] == 42
    assert (tmp_path / "second").read_text().count("WARNING") == 1
    assert "is damaged" in (tmp_path / "second").read_text()
    assert all(native._fault(path) is None for path in entries())
    assert finish(start(sources, tmp_path / "third"))["build_seconds"] is None
    assert (tmp_path / "third").read_text() == ""


def test_an_entry_that_others_can_write_to_is_built_again(caplog):
    native.load()
    (entry,) = entries()
    before = entry.stat().st_ino
    entry.chmod(0o770)
    kept = entry.open("rb")  # so that its inode is not used again
    forget()
    assert native.describe()["build_seconds"] > 0
    assert "can be written by others (mode 0770)" in caplog.text
    (entry,) = entries()
    assert entry.stat().st_ino != before and stat.S_IMODE(entry.stat().st_mode) == 0o700
    kept.close()


def test_a_folder_that_others_can_write_to_is_not_used(caplog):
    folder = cache_directory("native")
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert native.load().answer() == 42
    assert "can be written by others (mode 0777)" in caplog.text
    assert list(folder.iterdir()) == []


def test_a_folder_of_another_user_is_not_used(caplog, monkeypatch):
    user = os.geteuid()
    native.load()
    forget()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert native.load().answer() == 42
    assert f"belongs to user {user}, not to {user + 1}" in caplog.text
    assert Path(native.describe()["path"]) not in entries()


def test_a_cache_that_cannot_be_written_costs_a_build_each_process(sources, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # root may write to read-only folders, but not below a file
    made = finish(start(sources, tmp_path / "log"))
    assert made["answer"] == 42 and made["build_seconds"] > 0
    assert (tmp_path / "log").read_text().count("WARNING the cache cannot be used") == 1
    assert not Path(made["path"]).parent.exists()  # removed when the process ended


def test_an_entry_that_the_loader_refuses_is_built_elsewhere(caplog, monkeypatch):
    """As on a file system that is mounted without permission to execute."""
    load = ctypes.CDLL

    def refuse_the_cache(path):
        if Path(path).parent == cache_directory("native"):
            raise OSError("failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(ctypes, "CDLL", refuse_the_cache)
    assert native.load().answer() == 42
    assert "failed to map segment" in caplog.text

    forget()
    (native.SOURCES / "answer.h").write_text("int elsewhere();\n#define ANSWER elsewhere()\n")
    with pytest.raises(native.NativeUnavailable, match="cannot be built or loaded.*elsewhere"):
        native.load()


def test_without_a_compiler_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(native.NativeUnavailable, match=r"none of g\+\+, c\+\+, clang\+\+ is on PATH; install .*, e.g. g\+\+"):
        native.load()
    assert "CXX=" in native.unavailable()
    with pytest.raises(native.NativeUnavailable):
        native.describe()


def test_cxx_wins_and_may_have_arguments(monkeypatch):
    compiler = native._compiler()[0]
    monkeypatch.setenv("CXX", f"{compiler} -DUNUSED")
    assert native.describe()["compiler"] == f"{compiler} -DUNUSED"
    forget()
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert "CXX is '/nowhere/g++', which is no program" in native.unavailable()
    monkeypatch.setenv("CXX", "true")
    assert "wrote no library" in native.unavailable()
    monkeypatch.setenv("CXX", "false")
    assert "failed with status 1" in native.unavailable()
    assert entries()[1:] == []


def test_a_failing_compiler_is_quoted_and_not_asked_again(gate, sources):
    (gate / "open").touch()
    (sources / "kernels.cpp").write_text("int answer() { return nothing_here; }\n")
    with pytest.raises(native.NativeUnavailable, match="nothing_here") as caught:
        native.load()
    assert "-std=c++17" in str(caught.value) and str(sources / "kernels.cpp") in str(caught.value)
    assert native.unavailable() == str(caught.value)
    assert compilations(gate) == 1
    assert entries() == [] and not list(cache_directory("native").glob(f"{native.TEMPORARY}*"))

    (sources / "kernels.cpp").write_text(SOURCE)
    assert native.unavailable() is None
    assert native.load().answer() == 42


@pytest.mark.skipif(sys.platform != "linux", reason="symbols have versions on Linux")
@pytest.mark.parametrize("library, version", [("libstdc++.so.6", "GLIBCXX_9.9.99"), ("libm.so.6", "GLIBC_9.99")])
def test_a_compiler_newer_than_the_libraries_that_are_loaded(tmp_path, monkeypatch, library, version):
    """As conda's are often, or a module's on a cluster: no folder would help, and no second try."""
    (tmp_path / "newer.c").write_text("int coupfast_newer(void) { return 1; }")
    (tmp_path / "newer.map").write_text(f"{version} {{ global: coupfast_newer; }};")
    (tmp_path / "uses.cpp").write_text('extern "C" int coupfast_newer(); extern "C" int uses() { return coupfast_newer(); }')
    compiler, script = native._compiler()[0], tmp_path / "newer compiler"
    soname = f"-Wl,-soname,{library} -Wl,--version-script=newer.map"
    script.write_text(f"""#!/bin/sh
case "$*" in *-shared*)
  echo >> '{tmp_path}/asked'
  (cd '{tmp_path}' && '{compiler}' -shared -fPIC -x c newer.c {soname} -o newer.so) || exit 1
  exec '{compiler}' "$@" '{tmp_path}/uses.cpp' '{tmp_path}/newer.so';;
esac
exec '{compiler}' "$@"
""")
    script.chmod(0o700)
    monkeypatch.setenv("CXX", f"'{script}'")
    for _ in range(2):
        with pytest.raises(native.NativeUnavailable) as raised:
            native.load()
        said = str(raised.value)
        assert f"what {script} compiles needs newer run-time libraries than this process has loaded" in said
        assert f"version `{version}' not found" in said
        assert "set CXX to the compiler that belongs to them" in said and "'-static-libstdc++ -static-libgcc'" in said
        assert "XDG_CACHE_HOME" not in said and "TMPDIR" not in said
    assert len((tmp_path / "asked").read_text()) == 1


def test_sources_that_change_while_they_are_compiled_are_compiled_again(gate, sources):
    answers = []
    thread = threading.Thread(target=lambda: answers.append(native.load().answer()))
    thread.start()
    wait_until(lambda: compilations(gate) == 1)
    (sources / "answer.h").write_text("#define ANSWER 43\n")
    (gate / "open").touch()
    thread.join()
    assert answers == [43] and compilations(gate) == 2
    assert [path.name.partition("-")[0] for path in entries()] == [native._recipe(native.isas()[0]).key]


def test_a_compiler_that_never_says_the_same_is_refused(monkeypatch):
    versions = map(str, range(100))
    monkeypatch.setattr(native, "_version", lambda compiler: next(versions))
    assert "changes all the time" in native.unavailable()
    assert entries() == []


def test_missing_sources(sources):
    (sources / "kernels.cpp").unlink()
    assert "reinstall" in native.unavailable()


def test_another_source_compiler_or_flag_is_another_key(sources, monkeypatch):
    recipe = native._recipe("portable")
    assert native._recipe("portable") == recipe
    keys = {recipe.key}

    def is_new() -> bool:
        before = len(keys)
        keys.add(native._recipe("portable").key)
        return len(keys) > before

    (sources / "answer.h").write_text("#define ANSWER 43\n")
    assert is_new()
    (sources / "unused.h").touch()
    assert is_new()
    (sources / "unused.h").rename(sources / "other.h")
    assert is_new()
    monkeypatch.setenv("COUPFAST_CXXFLAGS", "-g -DNAME='a b'")
    assert is_new()
    assert native._recipe("portable").flags[-2:] == ("-g", "-DNAME=a b")
    monkeypatch.setattr(native, "_version", lambda compiler: "g++ 99")
    assert is_new()
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert is_new()
    monkeypatch.setenv("COUPFAST_CXXFLAGS", "-march=native")
    assert is_new()
    monkeypatch.setattr(native, "_cpu_features", lambda: frozenset({"a new one"}))
    assert is_new()


def test_a_changed_source_is_built_and_loaded(sources):
    assert native.load().answer() == 42
    (sources / "answer.h").write_text("#define ANSWER 43\n")
    forget()
    assert native.load().answer() == 43
    assert len(entries()) == 2


ALL = {*native.AVX512, *native.AVX2}


@pytest.mark.parametrize(
    "machine, features, found",
    [
        ("x86_64", ALL, ("avx512", "avx2", "portable")),
        ("AMD64", ALL - {"avx512bw"}, ("avx2", "portable")),
        ("x86_64", ALL - {"fma"}, ("portable",)),
        ("x86_64", set(), ("portable",)),
        ("aarch64", set(), ("neon", "portable")),
        ("arm64", set(), ("neon", "portable")),
        ("riscv64", ALL, ("portable",)),
    ],
)
def test_isas_best_first(machine, features, found, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(native, "_cpu_features", lambda: frozenset(features))
    assert native.isas() == found
    assert native._choose(None) == found[0]


def test_macos_names_its_features_otherwise(monkeypatch):
    listing = "hw.optional.floatingpoint: 1\nhw.optional.avx2_0: 1\nhw.optional.fma: 1\nhw.optional.avx512f: 0\n"
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: subprocess.CompletedProcess(args, 0, listing))
    assert native._cpu_features.__wrapped__() == {"floatingpoint", "avx2", "fma"}


def test_an_isa_that_the_cpu_lacks_is_refused(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(native, "_cpu_features", lambda: frozenset(native.AVX2))
    with pytest.raises(native.NativeUnavailable, match="`isa` asks for .*'avx512', this x86_64 machine runs avx2, portable"):
        native.load("avx512")
    monkeypatch.setenv("COUPFAST_CPU_ISA", "neon")
    with pytest.raises(native.NativeUnavailable, match="COUPFAST_CPU_ISA asks for .*'neon'"):
        native.load()
    assert "avx1024" in native.unavailable("avx1024")


def test_the_variable_chooses_where_the_caller_does_not(monkeypatch):
    monkeypatch.setenv("COUPFAST_CPU_ISA", "portable")
    assert native.describe()["isa"] == "portable"
    assert native.describe(native.isas()[0])["isa"] == native.isas()[0]
    monkeypatch.setenv("COUPFAST_CPU_ISA", "")
    assert native.describe()["isa"] == native.isas()[0]


def test_windows_is_refused(monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Windows")
    assert "not on Windows" in native.unavailable()
