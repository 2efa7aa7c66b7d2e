"""EngineReplica: one engine with its application, as a deployment of Ray Serve runs it."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import SecretStr
from starlette.types import Message

from bases.openmp import set_spin_count
from server.access.key_file import VARIABLE
from server.ray.exchange import Call, Calls, Feed
from server.ray.settings import RaySettings

TRIM_SECONDS = 60


class EngineReplica:
    """Serves calls of the gateway with the application of ``manylora serve``. Its methods are Ray's and the gateway's.

    Each replica of a machine has a data folder of its own, the first of ``replicas/0``, ``replicas/1``, ... under
    ``--data-dir`` that no other uses: after a restart it finds copies of adapters there. Bases are shared.
    """

    def __init__(self, settings: RaySettings, keys: SecretStr | None = None) -> None:
        """Load the base and start the engine, which is slow. Raises ConfigError or BaseRejected.

        ``keys``: those of the environment of the process that deploys. Ray calls this on the event loop that runs the
        calls.
        """
        from ray import serve

        if keys is not None:
            os.environ[VARIABLE] = keys.get_secret_value()
        self._resources = ExitStack()
        self._trimming: asyncio.Task[None] | None = None
        self._service = self._open(settings)
        from server.api.app import create_app
        from server.compute.cpu.memory import trim_memory
        from server.garbage import keep_start_from_collector

        # What the application's lifespan would do, for Ray runs none for a deployment without an ingress.
        self._service.event_router.bind()
        self._resources.callback(self._service.close)
        self._id: str = serve.get_replica_context().replica_id.unique_id
        self._calls = Calls(create_app(self._service), self._id)
        keep_start_from_collector()
        trim_memory()
        self._trimming = asyncio.get_running_loop().create_task(trim_often())

    def _open(self, settings: RaySettings) -> Any:
        """Open the service, as ``manylora serve`` does, in a folder of its own."""
        set_spin_count()  # before torch is imported
        import torch

        from bases import machine
        from bases.base import load_base
        from server.api.startup import open_resources, open_service
        from server.logs import set_up_logs

        set_up_logs(settings.log_level, settings.log_format)
        torch.set_num_threads(1)  # on this thread, for the reason Engine.start gives
        machine.allow_more_files()
        with ExitStack() as opened:
            folder = opened.enter_context(own_folder(settings.data_dir / "replicas"))
            own_paths = {"data_dir": folder, "runs": settings.runs_folder}
            own = settings.model_copy(update=own_paths) if settings.database_url is not None else settings
            resources = opened.enter_context(open_resources(own))
            base = load_base(settings.base, print)
            service = open_service(base, own, print, resources)
            self._resources.enter_context(opened.pop_all())
        return service

    async def call(self, call: Call) -> AsyncIterator[list[Message]]:
        """Run a call; yield the messages of its answer."""
        async for messages in self._calls.run(call):
            yield messages

    async def feed(self, feed: Feed) -> None:
        """Hand a part of a body to its call."""
        await self._calls.feed(feed)

    async def whole(self, call: Call) -> tuple[str, list[Message]]:
        """Return this replica's id, and its whole answer."""
        return self._id, await self._calls.whole(call)

    async def refresh(self) -> None:
        """Read what is registered and which keys are valid. Raises RegistryUnavailable."""
        await asyncio.to_thread(self._service.registry.refresh)
        await asyncio.to_thread(self._service.keyring.store.refresh)

    def record_routing_stats(self) -> dict[str, Any]:
        """Return what this replica holds and how many requests it has; Ray brings it to the routers."""
        stats = self._service.engine.stats()
        return {
            "device": frozenset(stats.device_adapters),
            "host": frozenset(stats.host_adapters),
            "requests": len(self._service.event_router),
        }

    def check_health(self) -> None:
        """Raise RuntimeError if Ray should replace this replica, as ``/livez`` says to Kubernetes."""
        if not self._service.engine.stats().healthy:
            raise RuntimeError("the engine has stopped, or keeps failing")

    async def __del__(self) -> None:
        """Stop the engine, after Ray has waited for the requests that run; or what has started of it."""
        if self._trimming is not None:
            self._trimming.cancel()
        await asyncio.to_thread(self._resources.close)


async def trim_often() -> None:
    """Return freed memory to the system once a minute, for the reason that ``server.api.serve`` gives."""
    from server.compute.cpu.memory import trim_memory

    while True:
        await asyncio.sleep(TRIM_SECONDS)
        await asyncio.to_thread(trim_memory)


@contextmanager
def own_folder(root: Path) -> Iterator[Path]:
    """Give the first folder ``0``, ``1``, ... under ``root`` that no other process has."""
    for number in count():
        folder = root / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        try:
            yield folder
        finally:
            lock.release()
        return
