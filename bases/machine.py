"""What this process may use: memory, CPUs, caches and instruction sets. In a container that is less than the machine.

No other module looks these up. A container's limits are those of its control groups (Linux cgroups, version 1 or
2); they are nested, and the tightest counts. ``root`` is the folder that holds ``/proc`` and ``/sys``, so that tests
can pass their own; a file that is missing there sets no limit.
"""

import math
import os
import platform
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

ROOT = Path("/")
MANY_FILES = 65536
"""Files that a process may have open where nothing limits it."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Main memory in bytes."""

    total: int
    free: int
    """What can still be allocated. The page cache counts as free."""
    limit: Path | None = None
    """The file of the control group that sets the limit; None if the machine's memory is the limit."""


def memory(root: Path = ROOT) -> Memory:
    """Return the machine's memory, or that of the control group with the least free."""
    whole = psutil.virtual_memory()
    groups = (found for group in _groups("memory", root) for found in _group_memory(group))
    return min((Memory(whole.total, whole.available), *groups), key=lambda found: found.free)


def free_memory(device: "torch.device") -> int:
    """Return how many bytes can still be allocated on ``device``."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return memory().free


def usable_cores(root: Path = ROOT) -> int:
    """Return how many threads to compute with: the physical cores that this process may run on, within its CPU quota.

    A container whose threads use more than its quota is stopped for the rest of each period (0.1 s).
    """
    quota = cpu_quota(root)
    physical = len({_siblings(cpu, root) for cpu in cpu_affinity()})
    return physical if quota is None else max(1, min(physical, math.floor(quota)))


def cpu_affinity() -> set[int]:
    """Return the numbers of the logical CPUs that the calling thread may run on (``taskset``, cpusets)."""
    return os.sched_getaffinity(0)


def usable_cpus() -> int:
    """Return how many logical CPUs this process may run on, whatever its CPU quota."""
    return len(cpu_affinity())


def total_cpus() -> int:
    """Return how many logical CPUs the machine has, whether this process may use them or not."""
    return psutil.cpu_count() or usable_cpus()


def cpu_quota(root: Path = ROOT) -> float | None:
    """Return how many CPUs the control groups allow (``docker run --cpus``); None where they set no limit."""
    return min((quota for group in _groups("cpu", root) for quota in _group_quotas(group)), default=None)


def open_files() -> int:
    """Return how many files and connections this process may have open at once (``ulimit -n``)."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MANY_FILES if limit == resource.RLIM_INFINITY else limit


def most_open_files() -> int:
    """Return how far this process may raise that number by itself (``ulimit -Hn``), but :data:`MANY_FILES` at most."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return max(open_files(), MANY_FILES if most == resource.RLIM_INFINITY else min(most, MANY_FILES))


def allow_more_files() -> None:
    """Raise it to that. Many systems set it to 1,024, only for the sake of old programs that cannot handle more."""
    wanted = most_open_files()
    if open_files() < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def instructions(root: Path = ROOT) -> frozenset[str]:
    """Return the processor's instruction sets as Linux names them, e.g. ``amx_bf16``. Empty if it is not x86."""
    return frozenset(_cpuinfo("flags", root).split())


def processor_name(root: Path = ROOT) -> str:
    """Return the processor's name, e.g. ``AMD EPYC``, or its architecture (``aarch64``) where Linux has no name."""
    return _cpuinfo("model name", root) or platform.machine()


def vendor(root: Path = ROOT) -> str:
    """Return the maker of the processor as Linux names it, e.g. ``GenuineIntel``. Empty if it is not x86."""
    return _cpuinfo("vendor_id", root)


def caches(root: Path = ROOT) -> list[str]:
    """Return the first CPU's data caches, smallest first: ``["L1 data 48K", "L2 2048K", ...]``."""
    found = []
    for index in sorted(root.glob("sys/devices/system/cpu/cpu0/cache/index*")):
        level, kind, size = (_read(index / name).strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found.append(f"L{level} {'data ' if kind == 'Data' else ''}{size}")
    return found


def _cpuinfo(field: str, root: Path) -> str:
    """Return a field of the first CPU in ``/proc/cpuinfo``; empty if it is not there."""
    lines = _read(root / "proc/cpuinfo").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def _siblings(cpu: int, root: Path) -> str:
    """Return the logical CPUs that share a core with this one, as Linux lists them: the same text for all of them."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
    return _read(topology).strip() or f"only {cpu}"


def _group_memory(group: Path) -> Iterator[Memory]:
    """Yield the memory of a control group under each of its limits."""
    statistics = dict(line.split(maxsplit=1) for line in _read(group / "memory.stat").splitlines())
    used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
    files = sum(
        int(statistics.get(f"total_{name}", statistics.get(name, 0))) for name in ("inactive_file", "active_file")
    )
    taken = max(0, used - files)
    # Above memory.high Linux kills nothing, but slows the process down until it all but stops.
    for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
        limit = _number(group / name)
        if limit is not None:
            yield Memory(limit, max(0, limit - taken), group / name)
    # In version 1 this includes the limits of outer groups, whose files a container cannot see.
    if (outer := statistics.get("hierarchical_memory_limit")) is not None:
        yield Memory(int(outer), max(0, int(outer) - taken), group / "memory.stat")


def _group_quotas(group: Path) -> Iterator[float]:
    """Yield the CPU quotas of a control group, in CPUs (version 2, then version 1)."""
    quota, _, period = _read(group / "cpu.max").strip().partition(" ")
    if period and quota != "max":
        yield int(quota) / int(period)
    old, each = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    if old is not None and old > 0 and each:  # -1: no quota
        yield old / each


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of the control groups that this process is in, innermost first (``man 7 cgroups``)."""
    mine = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        mine.update(dict.fromkeys(controllers.split(","), path))  # version 2 names none
    for line in _read(root / "proc/self/mountinfo").splitlines():
        place, _, system = line.partition(" - ")
        _, _, _, top, point, *_ = place.split()
        kind, *_, options = system.split()
        name = {"cgroup2": "", "cgroup": controller}.get(kind)
        if name in mine and (not name or name in options.split(",")):
            folder = root / point.lstrip("/")
            own = PurePosixPath(mine[name])
            # Inside a container these can be paths of the host, which do not exist here.
            inside = own.relative_to(top) if own.is_relative_to(top) and ".." not in own.parts else PurePosixPath()
            yield from (folder / part for part in (inside, *inside.parents))


def _number(file: Path) -> int | None:
    """Return the number in a file; None if there is no such file or it says ``max``."""
    text = _read(file).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
