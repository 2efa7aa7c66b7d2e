"""What this process may use: memory, processor cores, instruction sets. In a container that is less than the machine.

A container's limits are those of its control groups (Linux cgroups, version 1 or 2), each of which lies within others
that may be tighter. Functions take ``root``, under which ``/proc`` and ``/sys`` are looked for, so that tests can bring
their own; what is missing there limits nothing.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class Memory:
    """Main memory, in bytes."""

    total: int
    free: int
    """What can still be taken; pages of files that the system only keeps in case they are read again count as free."""
    limit: Path | None = None
    """The file that sets the limit, where a control group and not the machine does."""


def memory(root: Path = ROOT) -> Memory:
    """The machine's memory, or that of the control group which has the least left."""
    machine = psutil.virtual_memory()
    groups = (found for group in _groups("memory", root) for found in _group_memory(group))
    return min((Memory(machine.total, machine.available), *groups), key=lambda found: found.free)


def free_memory(device: "torch.device") -> int:
    """Bytes that can still be taken on ``device``."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return memory().free


def cores(root: Path = ROOT) -> int:
    """Physical cores that this process may keep busy: those it may run on, and no more than its share of time.

    With more threads than its share of time is worth, a container is stopped for the rest of each tenth of a second.
    """
    usable = os.sched_getaffinity(0)
    share = cpu_share(root)
    physical = len({_siblings(processor, root) for processor in usable})
    return physical if share is None else max(1, min(physical, math.floor(share)))


def cpu_share(root: Path = ROOT) -> float | None:
    """Processors' worth of time that the control groups allow (``docker run --cpus``), None where they do not say."""
    return min((share for group in _groups("cpu", root) for share in _group_shares(group)), default=None)


def instructions(root: Path = ROOT) -> frozenset[str]:
    """Instruction sets of this processor as Linux names them, e.g. ``amx_bf16``. Empty where it is no x86."""
    lines = _read(root / "proc/cpuinfo").splitlines()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def caches(root: Path = ROOT) -> list[str]:
    """The first processor's caches, smallest first: ``["L1 data 48K", "L2 2048K", ...]``."""
    found = []
    for index in sorted(root.glob("sys/devices/system/cpu/cpu0/cache/index*")):
        level, kind, size = (_read(index / name).strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found.append(f"L{level} {'data ' if kind == 'Data' else ''}{size}")
    return found


def _siblings(processor: int, root: Path) -> str:
    """A name for the core that a logical processor is part of."""
    topology = root / f"sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list"
    return _read(topology).strip() or f"only {processor}"


def _group_memory(group: Path) -> Iterator[Memory]:
    """One for each limit of a control group."""
    statistics = dict(line.split(maxsplit=1) for line in _read(group / "memory.stat").splitlines())
    used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
    files = sum(
        int(statistics.get(f"total_{name}", statistics.get(name, 0))) for name in ("inactive_file", "active_file")
    )
    taken = max(0, used - files)
    # memory.high does not kill, but what is over it is slowed down until nothing moves.
    for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
        limit = _number(group / name)
        if limit is not None:
            yield Memory(limit, max(0, limit - taken), group / name)
    # Version 1 tells the limits of groups that a container does not see here.
    if (around := statistics.get("hierarchical_memory_limit")) is not None:
        yield Memory(int(around), max(0, int(around) - taken), group / "memory.stat")


def _group_shares(group: Path) -> Iterator[float]:
    quota, _, period = _read(group / "cpu.max").strip().partition(" ")
    if period and quota != "max":
        yield int(quota) / int(period)
    old, each = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    if old is not None and old > 0 and each:  # -1: no quota
        yield old / each


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of the control groups that this process is in, from its own outwards (``man 7 cgroups``)."""
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
            # In a container's own namespace the paths are those of the machine outside, and lead nowhere here.
            inside = own.relative_to(top) if own.is_relative_to(top) and ".." not in own.parts else PurePosixPath()
            yield from (folder / part for part in (inside, *inside.parents))


def _number(file: Path) -> int | None:
    """What a file of one number says; None for no such file, or ``max``."""
    text = _read(file).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
