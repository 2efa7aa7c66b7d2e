"""Samples of what a server holds: its process by /proc, its queue, blocks and adapters by /metrics."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx2
import psutil
from prometheus_client.parser import text_string_to_metric_families

from loadtests.errors import ServerUnusable
from loadtests.soak.caller import Caller

MIB = 2**20
_METRICS: Mapping[str, str] = {
    "waiting": "manylora_requests_waiting",
    "running": "manylora_requests_running",
    "kv_blocks": "manylora_kv_blocks_used",
    "kv_blocks_total": "manylora_kv_blocks",
    "device_adapters": "manylora_device_adapters",
    "device_slots": "manylora_device_slots",
    "host_adapters": "manylora_host_adapters",
    "adapters": "manylora_adapters",
    "adapter_versions": "manylora_adapter_versions",
    "store_bytes": "manylora_store_bytes",
    "failed_steps": "manylora_engine_failed_steps_total",
    "healthy": "manylora_healthy",
    "resident_bytes": "process_resident_memory_bytes",
    "files": "process_open_fds",
}
"""Name in a sample -> metric of the server. A server without one has no such value."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What a server held at one moment. A value that cannot be had is missing."""

    at: float
    """Seconds since the watch began."""
    values: Mapping[str, float]

    def __getitem__(self, name: str) -> float | None:
        return self.values.get(name)


@dataclass(slots=True)
class Watch:
    """Samples of one server."""

    caller: Caller
    pid: int | None
    began: float = field(default_factory=time.monotonic)
    samples: list[Sample] = field(default_factory=list)

    async def sample(self) -> Sample:
        """Take a sample, and keep it. Raises ServerUnusable if /metrics gives none."""
        values = await self._metrics()
        if self.pid is not None:
            values |= process_values(self.pid)
        taken = Sample(time.monotonic() - self.began, values)
        self.samples.append(taken)
        return taken

    async def _metrics(self) -> dict[str, float]:
        try:
            response = await self.caller.http.get("/metrics")
        except httpx2.TransportError as error:
            raise ServerUnusable(f"the server gives no metrics any more: {type(error).__name__} {error}") from error
        if response.status_code != httpx2.codes.OK:
            raise ServerUnusable(f"/metrics: status {response.status_code}")
        found = {
            sample.name: sample.value
            for family in text_string_to_metric_families(response.text)
            for sample in family.samples
            if not sample.labels
        }
        return {name: found[metric] for name, metric in _METRICS.items() if metric in found}


def process_values(pid: int) -> dict[str, float]:
    """Return what a process holds, and the resident memory of its children. Raises ServerUnusable if it has ended."""
    try:
        process = psutil.Process(pid)
        children = 0
        for child in process.children(recursive=True):
            try:
                children += child.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return {
            "resident_bytes": process.memory_info().rss,
            "children_bytes": children,
            "files": process.num_fds(),
            "threads": process.num_threads(),
        }
    except psutil.NoSuchProcess as error:
        raise ServerUnusable(f"the server's process {pid} has ended") from error
    except psutil.AccessDenied as error:
        raise ServerUnusable(f"--pid: process {pid} may not be looked at by this user") from error
