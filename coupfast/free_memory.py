"""How much of the host's memory a process could still take: free memory, its control groups' limits, its own limits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process could still take.

    On Linux the least of what the system has available, what is left in each control group that the process is in, from its
    own (a SLURM job's, a systemd scope's, a container's) up to the outermost, and what its own limits leave (`ulimit -v`).
    Cached files, which give way, count as free. Elsewhere a quarter of what is built in.

    Args:
        root: Where /proc and /sys are.
    """
    available = _system(root)
    if available is None:
        # No account of free memory here (macOS, Windows).
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4 if hasattr(os, "sysconf") else 2 * 2**30
    return max(0, min([available, *_groups(root), *_own_limits(root)]))


def _system(root: Path) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


# Files of a control group of version 2, then 1: its limit, what it uses, and what of that are cached files.
_VERSIONS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def _groups(root: Path) -> Iterator[int]:
    """What is left in each control group with a limit."""
    try:
        membership = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        membership = []
    for controller, limit_file, used_file, cached in _VERSIONS:
        top = root / "sys/fs/cgroup" / controller
        # "0::/path" is version 2, "7:cpu,memory:/path" the memory controller of version 1.
        paths = [
            path
            for _, controllers, path in (line.split(":", 2) for line in membership if line.count(":") >= 2)
            if (controllers == "" if not controller else controller in controllers.split(","))
        ]
        for path in paths or ["/"]:
            # A path that a container does not see is none of its limits' places: the outermost one that it sees is.
            parts = [part for part in path.split("/") if part not in ("", "..", ".")]
            for depth in range(len(parts), -1, -1):
                left = _left(top.joinpath(*parts[:depth]), limit_file, used_file, cached)
                if left is not None:
                    yield left


def _left(group: Path, limit_file: str, used_file: str, cached: str) -> int | None:
    try:
        limit, used = (group / limit_file).read_text().strip(), int((group / used_file).read_text())
        if limit == "max":
            return None
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(limit) - used + int(statistics.get(cached, 0))
    except (OSError, ValueError):
        return None


def _own_limits(root: Path) -> Iterator[int]:
    try:
        import resource
    except ImportError:  # Windows
        return
    try:
        lines = (root / "proc/self/status").read_text().splitlines()
        sizes = {line.split()[0]: 1024 * int(line.split()[1]) for line in lines if line.startswith(("VmSize:", "VmData:"))}
    except (OSError, ValueError, IndexError):
        return
    for kind, size in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY and size in sizes:
            yield limit - sizes[size]
