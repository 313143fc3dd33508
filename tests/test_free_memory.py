"""Free memory within the limits of control groups, as SLURM, systemd and containers nest them."""

import os
import subprocess
import sys

import pytest

from coupfast.free_memory import free_memory

GIB = 2**30


def machine(root, membership, groups, available=64 * GIB):
    """Files of a machine: `groups` are folder → (limit, used, cached)."""
    files = {
        "proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {available // 1024} kB\n",
        "proc/self/cgroup": membership,
        "proc/self/status": "VmSize: 1 kB\nVmData: 1 kB\n",
    }
    for folder, (limit, used, cached) in groups.items():
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if not folder.startswith("memory"):
            names = ("memory.max", "memory.current", "inactive_file")
        place = f"sys/fs/cgroup/{folder}"
        files |= {f"{place}/{names[0]}": str(limit), f"{place}/{names[1]}": str(used)}
        files[f"{place}/memory.stat"] = f"anon 5\n{names[2]} {cached}\n"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


SLURM = "system.slice/slurmstepd.scope/job_7/step_0/user"


@pytest.mark.parametrize(
    ("membership", "groups", "expected"),
    [
        ("0::/\n", {}, 64 * GIB),
        ("0::/\n", {"": ("max", 0, 0)}, 64 * GIB),
        ("0::/\n", {"": (8 * GIB, 3 * GIB, 1 * GIB)}, 6 * GIB),  # a container, whose group is the outermost that it sees
        # The limit is where the job is, and none is above or below.
        (f"0::/{SLURM}\n", {"system.slice/slurmstepd.scope/job_7": (4 * GIB, GIB, 0), SLURM: ("max", GIB, 0)}, 3 * GIB),
        # The least of several.
        ("0::/a/b\n", {"a/b": (9 * GIB, 0, 0), "a": (5 * GIB, 2 * GIB, 0), "": ("max", 0, 0)}, 3 * GIB),
        ("0::/../../b\n", {"": (2 * GIB, 0, 0)}, 2 * GIB),
        ("12:cpuset:/x\n4:cpu,memory:/slurm/uid_0/job_9\n1:name=systemd:/y\n", {"memory/slurm/uid_0/job_9": (GIB, 0, 0)}, GIB),
        ("4:memory:/\n", {"memory": (2**63 - 4096, 0, 0)}, 64 * GIB),  # what version 1 says for no limit
        ("0::/a\n", {"a": (GIB, 2 * GIB, 0)}, 0),  # over its limit already
        ("nonsense", {"": (8 * GIB, 0, 0)}, 8 * GIB),
    ],
)
def test_the_least_of_all_limits(tmp_path, membership, groups, expected):
    assert free_memory(machine(tmp_path, membership, groups)) == expected


def test_less_is_free_than_the_limit_allows(tmp_path):
    assert free_memory(machine(tmp_path, "0::/a\n", {"a": (90 * GIB, 0, 0)}, available=3 * GIB)) == 3 * GIB


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no account of free memory")
def test_the_limit_of_the_process_itself():
    code = """
import resource
from coupfast.free_memory import free_memory
resource.setrlimit(resource.RLIMIT_AS, (20 * 2**30, 20 * 2**30))
before = free_memory()
resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
print(before, free_memory())
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert 0 < after <= 8 * 2**30 and after <= before
