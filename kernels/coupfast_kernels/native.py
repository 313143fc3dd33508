"""The C++ kernels of `csrc/`: compiled at first use, kept in the user's cache, loaded with ctypes.

    key = SHA-256(sources, compiler's path and version, flags, ISA, machine)
    $XDG_CACHE_HOME/coupfast/native/<key>-<SHA-256 of the library>.so, by default below ~/.cache

The library's hash is part of its name, so that one rename makes a complete entry and a damaged one is noticed. A lock file
lets one process build while others wait for its result. The lock saves work only: where a file system has no locks, two
processes build the same and each renames its own.

A shared library is code that runs as the user. So the folder is made with mode 0700, and a folder that belongs to someone else
or that others can write to is not used at all: what is needed is then built in a new folder for this process alone, as it is
where the cache cannot be written. An entry with such an owner or mode is removed and built again.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import json
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coupfast_kernels.files import put_in_place
from coupfast_kernels.locks import locked

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
TRANSLATION_UNIT = "kernels.cpp"  # includes the other files

COMPILERS = ("g++", "c++", "clang++")
# No contraction: a * b + c in one rounding would be another number, and the noise is defined to the bit. The other two lose
# no bit; they let loops with comparisons and square roots be vectorised.
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"),
)
# GCC makes a static variable of a template or an inline function one for the whole process, even among libraries that share
# nothing else: one ISA's table of functions would serve another's kernels. Clang does not, and lacks the flag.
GCC_FLAGS = ("-fno-gnu-unique",)
AVX512 = ("avx512f", "avx512dq", "avx512vl", "avx512bw")
AVX2 = ("avx2", "fma")
#: The compiler's flags for an ISA, beside `FLAGS`.
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "avx512": (*(f"-m{name}" for name in AVX512), "-mfma", "-mavx2", "-mprefer-vector-width=512"),
    "avx2": tuple(f"-m{name}" for name in AVX2),
    "neon": (),  # part of every 64-bit ARM
    "portable": (),
}

KEY_DIGITS = 32  # with the library's 64 a name below the 143 bytes that an encrypted home may have
TEMPORARY = "building-"
STALE_SECONDS = 3600.0  # a temporary folder of this age was left by a process that was killed
PATIENCE_SECONDS = 600.0  # wait for another process's build so long, then build without it
OUTPUT_LINES = 20
ATTEMPTS = 3

_one_thread = threading.Lock()
_failures: dict[str, str] = {}  # by key: what is not tried again in this process


class NativeUnavailable(RuntimeError):
    """The C++ kernels cannot be built or cannot run here; the message says why and what to do."""


class _SourcesChanged(Exception):
    """What was compiled is not what the key says."""


@dataclass(frozen=True)
class _Recipe:
    """All that decides what the compiler makes."""

    isa: str
    compiler: tuple[str, ...]
    version: str
    flags: tuple[str, ...]
    key: str


@dataclass(frozen=True)
class _Loaded:
    recipe: _Recipe
    path: Path
    seconds: float | None
    kernels: ctypes.CDLL


def load(isa: str | None = None) -> ctypes.CDLL:
    """The compiled kernels, built if this user has not built them before; later calls give the same object.

    Args:
        isa: One of `isas()`. None takes the environment variable COUPFAST_CPU_ISA, or without it the first of `isas()`.

    Raises:
        NativeUnavailable: no compiler, a compiler that fails, an ISA that this machine lacks, or Windows.

    The compiler is CXX (arguments may follow), else the first of g++, c++ and clang++ on PATH. COUPFAST_CXXFLAGS comes after
    all other flags and is meant for sanitizers: flags that change rounding change what the kernels compute. These variables
    are read at the first use of an ISA in a process; only COUPFAST_CPU_ISA is read at every call.

    A new entry of the cache is logged at INFO; a damaged entry or an unusable cache is a warning (see the module).
    """
    return _loaded(isa).kernels


def unavailable(isa: str | None = None) -> str | None:
    """Why `load(isa)` would raise, or None. Builds it, since nothing less tells; a failed build is not repeated."""
    try:
        load(isa)
    except NativeUnavailable as error:
        return str(error)
    return None


def describe(isa: str | None = None) -> dict[str, Any]:
    """What `load(isa)` is and where it came from, for records; builds it if needed and raises as it does.

    Returns:
        `isa`, `compiler` (path, with arguments if CXX has some), `version` (its first line), `flags` (a list), `path` of the
        library and `build_seconds`, None if this process found it in the cache.
    """
    return _description(_loaded(isa))


def isas() -> tuple[str, ...]:
    """The instruction sets that this machine runs, best first; "portable" is what every machine of its kind has.

    "avx512" is AVX-512 F, DQ, VL and BW, "avx2" is AVX2 with FMA, "neon" is 64-bit ARM.
    """
    machine = platform.machine().lower()
    found = []
    if machine in ("x86_64", "amd64"):
        features = _cpu_features()
        if features.issuperset((*AVX512, *AVX2)):
            found.append("avx512")
        if features.issuperset(AVX2):
            found.append("avx2")
    elif machine in ("aarch64", "arm64"):
        found.append("neon")
    return (*found, "portable")


@functools.cache
def _cpu_features() -> frozenset[str]:
    """What the CPU has and the operating system lets programs use, in Linux's names; empty where neither source exists."""
    if platform.system() == "Darwin":
        listing = subprocess.run(["/usr/sbin/sysctl", "hw.optional"], capture_output=True, text=True).stdout
        pairs = [line.removeprefix("hw.optional.").split(":") for line in listing.splitlines() if ":" in line]
        return frozenset(name.removesuffix("_0") for name, value in pairs if value.strip() == "1")  # "avx2_0: 1"
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))


def _loaded(isa: str | None) -> _Loaded:
    chosen = _choose(isa)
    with _one_thread:
        return _load(chosen)


def _choose(isa: str | None) -> str:
    if platform.system() == "Windows":
        raise NativeUnavailable("the C++ kernels are built on Linux and macOS, not on Windows; run in WSL")
    origin = "`isa`"
    if isa is None and os.environ.get("COUPFAST_CPU_ISA"):
        isa, origin = os.environ["COUPFAST_CPU_ISA"], "COUPFAST_CPU_ISA"
    here = isas()
    if isa is None:
        return here[0]
    if isa not in here:
        raise NativeUnavailable(
            f"{origin} asks for the instruction set {isa!r}, this {platform.machine()} machine runs {', '.join(here)}; "
            "choose one of these, or none for the first"
        )
    return isa


@functools.cache
def _load(isa: str) -> _Loaded:
    for _ in range(ATTEMPTS):
        try:
            return _build_or_load(_recipe(isa))
        except _SourcesChanged:
            logger.info("%s or the compiler changed while the C++ kernels were compiled; compiling again", SOURCES)
    raise NativeUnavailable(f"{SOURCES} or what the compiler says of its version changes all the time; tried {ATTEMPTS} times")


def _build_or_load(recipe: _Recipe) -> _Loaded:
    if recipe.key in _failures:
        raise NativeUnavailable(_failures[recipe.key])
    try:
        try:
            path, seconds = _from_cache(recipe, _cache_folder())
            loaded = _Loaded(recipe, path, seconds, _open(path, recipe))
        except OSError as error:  # of the folder, or of the loader: libraries cannot be loaded from every file system
            logger.warning("the cache cannot be used for the C++ kernels: %s; building them for this process alone", error)
            folder = Path(tempfile.mkdtemp(prefix="coupfast-native-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            path, seconds = _build(recipe, folder)
            loaded = _Loaded(recipe, path, seconds, _open(path, recipe))
    except OSError as error:
        raise NativeUnavailable(
            f"the C++ kernels cannot be built or loaded: {error}; set XDG_CACHE_HOME or TMPDIR to a folder of your own "
            "from which libraries can be loaded"
        ) from error
    except NativeUnavailable as error:
        _failures[recipe.key] = str(error)
        raise
    if loaded.seconds is not None:
        logger.info("built the C++ kernels in %.1f s: %s", loaded.seconds, _description(loaded))
    return loaded


def _open(path: Path, recipe: _Recipe) -> ctypes.CDLL:
    """The library, loaded.

    Raises:
        OSError: if libraries cannot be loaded from there.
        NativeUnavailable: if the process has loaded older run-time libraries than the compiler's; no folder would help.
    """
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        if not any(name in str(error) for name in ("GLIBCXX_", "CXXABI_", "GLIBC_")):
            raise
        raise NativeUnavailable(
            f"what {recipe.compiler[0]} compiles needs newer run-time libraries than this process has loaded ({error}); set "
            "CXX to the compiler that belongs to them (in a conda environment its own, from the package gxx), or "
            "COUPFAST_CXXFLAGS='-static-libstdc++ -static-libgcc'"
        ) from error


def _description(loaded: _Loaded) -> dict[str, Any]:
    return {
        "isa": loaded.recipe.isa,
        "compiler": shlex.join(loaded.recipe.compiler),
        "version": loaded.recipe.version.partition("\n")[0],
        "flags": list(loaded.recipe.flags),
        "path": str(loaded.path),
        "build_seconds": loaded.seconds,
    }


def _recipe(isa: str) -> _Recipe:
    compiler = _compiler()
    version = _version(compiler)
    extra = shlex.split(os.environ.get("COUPFAST_CXXFLAGS", ""))
    gcc = GCC_FLAGS if "Free Software Foundation" in version else ()
    flags = (*FLAGS, *gcc, *ISA_FLAGS[isa], f'-DCOUPFAST_ISA="{isa}"', *extra)
    parts = [_sources(), compiler, version, flags, isa, platform.machine()]
    if any("native" in word for word in (*compiler, *flags)):  # -march=native is another ISA on another CPU
        parts.append(sorted(_cpu_features()))
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:KEY_DIGITS]
    return _Recipe(isa, compiler, version, flags, key)


def _sources() -> list[tuple[str, str]]:
    """(path, SHA-256) of every file of `SOURCES`."""
    try:
        with (SOURCES / TRANSLATION_UNIT).open("rb"):
            files = sorted(path for path in SOURCES.rglob("*") if path.is_file())
        return [(path.relative_to(SOURCES).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    except OSError as error:
        raise NativeUnavailable(f"the sources of the C++ kernels cannot be read: {error}; reinstall coupfast") from error


def _compiler() -> tuple[str, ...]:
    """The command that compiles, its program as an absolute path."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    for program, *arguments in [wanted] if wanted else [[name] for name in COMPILERS]:
        path = shutil.which(program)
        if path is not None:
            return (os.path.abspath(path), *arguments)
    found = f"CXX is {shlex.join(wanted)!r}, which is no program" if wanted else f"none of {', '.join(COMPILERS)} is on PATH"
    raise NativeUnavailable(
        f"the C++ kernels need a compiler and {found}; install a C++17 compiler, e.g. g++, or set CXX=/path/to/compiler"
    )


def _version(compiler: tuple[str, ...]) -> str:
    done = _run([*compiler, "--version"])
    if done.returncode != 0:
        raise NativeUnavailable(_failure(done))
    return done.stdout.strip()


def _run(command: list[str], temporary: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LC_ALL": "C"}  # the version is part of the key
    if temporary is not None:
        environment["TMPDIR"] = str(temporary)  # else a compiler that is killed leaves its files in the system's folder
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
        )
    except OSError as error:
        raise NativeUnavailable(f"the C++ compiler cannot be run: {error}; set CXX=/path/to/compiler") from error


def _failure(done: subprocess.CompletedProcess[str]) -> str:
    last = "\n".join(done.stdout.strip().splitlines()[-OUTPUT_LINES:]) or "(no output)"
    what = f"failed with status {done.returncode}" if done.returncode else "wrote no library"
    return f"the C++ compiler {what}; it must be a C++17 compiler, e.g. g++, or CXX=...\n{shlex.join(done.args)}\n{last}"


def _cache_folder() -> Path:
    """Where libraries are kept, made if need be: `coupfast.cache.cache_directory("native")`, which this package cannot import.

    Raises:
        OSError: if it cannot be made, or if others could put a library there.
    """
    try:
        chosen = Path(os.environ.get("XDG_CACHE_HOME", "")).expanduser()  # empty or relative counts as unset: XDG's rule
        folder = (chosen if chosen.is_absolute() else Path("~/.cache").expanduser()) / "coupfast" / "native"
    except RuntimeError as error:  # a user without a home
        raise FileNotFoundError(str(error)) from error
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    fault = _ownership_fault(folder.stat())
    if fault is not None:
        raise PermissionError(f"{folder} {fault}, so others could put a library there; make it yours alone (mode 0700)")
    return folder


def _ownership_fault(status: os.stat_result) -> str | None:
    if status.st_uid != os.geteuid():
        return f"belongs to user {status.st_uid}, not to {os.geteuid()}"
    if status.st_mode & 0o022:
        return f"can be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def _from_cache(recipe: _Recipe, folder: Path) -> tuple[Path, float | None]:
    """The library and, if it had to be built, the seconds that took."""
    for path in _entries(recipe, folder):
        if _fault(path) is None:
            return path, None
    with locked(folder / "lock", work="builds C++ kernels", patience=PATIENCE_SECONDS):
        for path in _entries(recipe, folder):  # another process may have been faster
            fault = _fault(path)
            if fault is None:
                return path, None
            logger.warning("the compiled C++ kernels %s %s; removing and building them again", path, fault)
            path.unlink(missing_ok=True)
        _remove_stale(folder)
        return _build(recipe, folder)


def _entries(recipe: _Recipe, folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{recipe.key}-*.so"))


def _fault(path: Path) -> str | None:
    """Why an entry must not be loaded."""
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            return "is no plain file"
        if (fault := _ownership_fault(status)) is not None:
            return fault
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        return f"cannot be read: {error}"
    return None if found == path.stem.partition("-")[2] else f"is damaged: its SHA-256 is {found}, not that in its name"


def _remove_stale(folder: Path) -> None:
    """Remove what killed builders left. By age: a lock may not be seen by the other machines that share the folder."""
    for path in folder.glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _build(recipe: _Recipe, folder: Path) -> tuple[Path, float]:
    """Compile, in a temporary folder inside `folder`, and move the complete library to its name."""
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder))
    try:
        made, started = temporary / "kernels.so", time.perf_counter()
        # Flags come last, since a linker reads libraries after what needs them.
        done = _run([*recipe.compiler, str(SOURCES / TRANSLATION_UNIT), "-o", str(made), *recipe.flags], temporary)
        seconds = time.perf_counter() - started
        if _recipe(recipe.isa).key != recipe.key:
            raise _SourcesChanged
        if done.returncode != 0 or not made.is_file():
            raise NativeUnavailable(_failure(done))
        if done.stdout.strip():
            logger.debug("the C++ compiler says:\n%s", done.stdout.strip())
        made.chmod(0o700)  # a umask may let the group write
        path = folder / f"{recipe.key}-{hashlib.sha256(made.read_bytes()).hexdigest()}.so"
        put_in_place(made, path)
        return path, seconds
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
