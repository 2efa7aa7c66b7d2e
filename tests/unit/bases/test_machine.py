"""Limits of a process, read from cgroup trees as Linux writes them, and from real cgroups."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from bases import machine

MIB = 2**20
V2 = "30 23 0:26 / /sys/fs/cgroup ro,nosuid,nodev,noexec,relatime - cgroup2 cgroup rw,nsdelegate\n"
V1 = (
    "32 31 0:29 /docker/0a1b /sys/fs/cgroup/cpu,cpuacct ro,nosuid master:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 /docker/0a1b /sys/fs/cgroup/memory ro,nosuid master:10 - cgroup cgroup rw,memory\n"
)
UNLIMITED = "9223372036854771712\n"


def tree(root: Path, groups: str, mounts: str, files: Mapping[str, str]) -> Path:
    """A root folder whose process is in ``groups``; ``files`` are under ``/sys/fs/cgroup``."""
    proc = root / "proc" / "self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(groups)
    (proc / "mountinfo").write_text(f"23 1 254:1 / / rw,relatime shared:1 - ext4 /dev/root rw\n{mounts}")
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def statistics(*, inactive: int, active: int) -> str:
    return f"anon 1\nfile {inactive + active}\ninactive_file {inactive}\nactive_file {active}\n"


def test_limits_of_cgroup_v2(tmp_path: Path) -> None:
    files = {
        "memory.max": f"{300 * MIB}\n",
        "memory.high": "max\n",
        "memory.current": f"{250 * MIB}\n",
        "memory.stat": statistics(inactive=100 * MIB, active=20 * MIB),
        "cpu.max": "250000 100000\n",
    }
    root = tree(tmp_path, "0::/\n", V2, files)
    found = machine.memory(root)
    assert (found.total, found.free) == (300 * MIB, (300 - 250 + 120) * MIB)
    assert found.limit == root / "sys/fs/cgroup/memory.max"
    assert machine.cpu_quota(root) == 2.5


def test_memory_high_is_a_limit(tmp_path: Path) -> None:
    files = {"memory.max": f"{300 * MIB}\n", "memory.high": f"{200 * MIB}\n", "memory.current": f"{250 * MIB}\n"}
    found = machine.memory(tree(tmp_path, "0::/\n", V2, files))
    assert (found.free, found.limit and found.limit.name) == (0, "memory.high")


def test_limits_of_parent_cgroups_apply(tmp_path: Path) -> None:
    files = {
        "pods/memory.max": f"{100 * MIB}\n",
        "pods/memory.current": f"{90 * MIB}\n",
        "pods/cpu.max": "50000 100000\n",
        "pods/one/memory.max": f"{80 * MIB}\n",
        "pods/one/memory.current": f"{20 * MIB}\n",
        "pods/one/cpu.max": "max 100000\n",
    }
    root = tree(tmp_path, "0::/pods/one\n", V2, files)
    assert machine.memory(root).free == 10 * MIB
    assert machine.cpu_quota(root) == 0.5
    assert machine.usable_cores(root) == 1


def test_limits_of_cgroup_v1_with_host_paths(tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": f"{400 * MIB}\n",
        "memory/memory.usage_in_bytes": f"{200 * MIB}\n",
        "memory/memory.stat": f"inactive_file 0\nhierarchical_memory_limit {350 * MIB}\n"
        f"total_inactive_file {50 * MIB}\ntotal_active_file {10 * MIB}\n",
        "cpu,cpuacct/cpu.cfs_quota_us": "150000\n",
        "cpu,cpuacct/cpu.cfs_period_us": "50000\n",
    }
    root = tree(tmp_path, "5:memory:/docker/0a1b\n2:cpu,cpuacct:/docker/0a1b\n", V1, files)
    assert machine.memory(root).free == (350 - 140) * MIB
    assert machine.cpu_quota(root) == 3


def test_without_limits_the_whole_machine_is_reported(tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": UNLIMITED,
        "memory/memory.usage_in_bytes": f"{200 * MIB}\n",
        "memory/memory.stat": f"hierarchical_memory_limit {UNLIMITED}",
        "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    }
    for root in (tree(tmp_path / "limits", "5:memory:/x\n2:cpu,cpuacct:/x\n", V1, files), tmp_path / "nothing"):
        found = machine.memory(root)
        assert (found.total, found.limit) == (psutil.virtual_memory().total, None)
        assert machine.cpu_quota(root) is None
        assert machine.usable_cores(root) == len(os.sched_getaffinity(0))


def test_hyperthreads_count_as_one_core(tmp_path: Path) -> None:
    usable = sorted(os.sched_getaffinity(0))
    for processor in usable:
        topology = tmp_path / f"sys/devices/system/cpu/cpu{processor}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{usable[0]}-{usable[-1]}\n")
    assert machine.usable_cores(tmp_path) == 1
    assert machine.usable_cpus() == len(usable) <= machine.total_cpus()


def test_instruction_sets_and_caches(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(
        "processor\t: 0\nmodel name\t: X\nflags\t\t: fpu avx2 amx_bf16\nbugs\t: none\n"
    )
    assert machine.instructions(tmp_path) == {"fpu", "avx2", "amx_bf16"}
    assert machine.processor_name(tmp_path) == "X"
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd\n")
    assert machine.instructions(tmp_path) == frozenset()
    assert machine.processor_name(tmp_path) == platform.machine()
    for index, (level, kind, size) in enumerate(
        [(1, "Data", "48K"), (1, "Instruction", "32K"), (2, "Unified", "2048K")]
    ):
        cache = tmp_path / f"sys/devices/system/cpu/cpu0/cache/index{index}"
        cache.mkdir(parents=True)
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (cache / name).write_text(f"{text}\n")
    assert machine.caches(tmp_path) == ["L1 data 48K", "L2 2048K"]


@pytest.fixture
def real_group() -> Iterator[Path]:
    """A memory cgroup (v1) inside this process's own, if this machine allows creating one."""
    own = next(machine._groups("memory", machine.ROOT), None)
    if own is None or not (own / "memory.limit_in_bytes").exists():
        pytest.skip("no memory control group of version 1")
    group = own / f"manylora-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("control groups cannot be made here")
    yield group
    group.rmdir()


def test_real_cgroup_limit(real_group: Path) -> None:
    (real_group / "memory.limit_in_bytes").write_text(str(512 * MIB))
    code = (
        "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid()))\n"
        "from bases import machine; held = b'1' * (128 << 20); found = machine.memory(); print(found.total, found.free)"
    )
    words = [sys.executable, "-c", code, str(real_group / "cgroup.procs")]
    said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout
    total, free = map(int, said.split())
    assert total == 512 * MIB
    assert 200 * MIB < free < (512 - 128) * MIB
