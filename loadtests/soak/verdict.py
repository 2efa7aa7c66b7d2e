"""What the samples of a soak say: whether memory grows, and what is left over at the end."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from loadtests.soak.settings import SoakSettings
from loadtests.soak.watch import MIB, Sample

LEAST_SAMPLES = 3
"""Samples after the warm-up without which nothing is said about growth."""
BACK_TO_ZERO = ("waiting", "running", "kv_blocks")
NEVER_ABOVE = (("kv_blocks", "kv_blocks_total"), ("device_adapters", "device_slots"))


@dataclass(frozen=True, slots=True)
class Growth:
    """How the resident memory of a server and its children changed after the warm-up."""

    mib: float
    """Median of the last fifth of the samples, less that of the first."""
    mib_per_hour: float
    """Slope of a straight line through the samples."""
    resident_mib: float
    """Median of the last fifth."""


def growth(samples: Sequence[Sample], warm_up: float) -> Growth | None:
    """Return the growth of memory after ``warm_up`` seconds; None if there are too few samples."""
    known = [
        (sample.at, resident + (sample["children_bytes"] or 0.0))
        for sample in samples
        if sample.at >= warm_up and (resident := sample["resident_bytes"]) is not None
    ]
    if len(known) < LEAST_SAMPLES:
        return None
    at, held = (np.array(column, dtype=float) for column in zip(*known, strict=True))
    fifth = max(len(known) // 5, 1)
    first, last = median(held[:fifth]), median(held[-fifth:])
    slope = float(np.polyfit(at, held, 1)[0]) if np.ptp(at) else 0.0
    return Growth(float(last - first) / MIB, slope * 3600 / MIB, float(last) / MIB)


def violations(
    settings: SoakSettings, before: Sample, samples: Sequence[Sample], after: Sample, grown: Growth | None
) -> list[str]:
    """Return what was violated, a sentence each.

    ``before``: idle, with the soak's adapters. ``samples``: under load. ``after``: idle again.
    """
    found = []
    if grown is not None and grown.mib > settings.memory_growth_mib:
        found.append(
            f"memory grew by {grown.mib:.0f} MiB after the warm-up ({grown.mib_per_hour:+.0f} MiB an hour); "
            f"--memory-growth-mib allows {settings.memory_growth_mib:g}"
        )
    found += [f"{name}: {after[name]:.0f} at the end, when nothing is asked" for name in BACK_TO_ZERO if after[name]]
    for name, most in NEVER_ABOVE:
        above = [s for s in samples if s[name] is not None and s[most] is not None and (s[name] or 0) > (s[most] or 0)]
        if above:
            found.append(f"{name}: {above[0][name]:.0f}, more than the {above[0][most]:.0f} that there are")
    for name, spare in (("files", settings.spare_files), ("threads", settings.spare_threads)):
        was, now = before[name], after[name]
        if was is not None and now is not None and now > was + spare:
            found.append(f"{name}: {now:.0f} at the end, {was:.0f} before the soak; --spare-{name} allows {spare} more")
    if after["failed_steps"] != before["failed_steps"]:
        found.append(f"failed steps: {after['failed_steps']}, {before['failed_steps']} before the soak")
    if after["healthy"] == 0:
        found.append("the server says that it is not healthy")
    return found


def left_over(empty: Sample, cleaned: Sample) -> list[str]:
    """Return what remains of the soak's adapters after they were removed, against the sample before they came."""
    names = ("adapters", "adapter_versions", "store_bytes")
    more = [name for name in names if (cleaned[name] or 0) > (empty[name] or 0)]
    return [f"{name}: {cleaned[name]:.0f} left, {empty[name]:.0f} before" for name in more]
