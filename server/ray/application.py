"""The application of Ray Serve: gateways in front of engines."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from pydantic import SecretStr
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator
from starlette.types import Message

from adapters.errors import AdapterError
from server.access.key_file import VARIABLE
from server.database import open_database
from server.ray.exchange import Call, Feed
from server.ray.gateway import AllFull, Gateway, ReplicaLost
from server.ray.names import STALE, Names
from server.ray.replica import EngineReplica
from server.ray.router import AdapterRouter
from server.ray.settings import RaySettings

_log = logging.getLogger(__name__)

STATS_SECONDS = 1.0
"""Seconds between two reports of what a replica holds."""
REFRESH_SECONDS = 5.0
"""Seconds that a change waits for all replicas to know of it; the others look by themselves every half second."""
MANY = 1_000_000
"""Requests of a gateway, which has no limit of its own."""


def needs(settings: RaySettings) -> tuple[str, int]:
    """Return what a replica takes of a machine, by Ray's name for it: ``("GPU", 1)``, or its cores."""
    return ("GPU", 1) if settings.device == "cuda" else ("CPU", settings.cpu_threads)


def environment_keys() -> SecretStr | None:
    """Return this process's keys, without which the replicas would serve everybody.

    Not as a runtime environment, which Ray writes to its logs and puts into command lines.
    """
    keys = os.environ.get(VARIABLE)
    return None if keys is None else SecretStr(keys)


def build(settings: RaySettings) -> serve.Application:
    """Return the application for ``serve.run``."""
    kind, each = needs(settings)
    scale: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.most_replicas > settings.replicas:
        scale = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=settings.replicas,
                max_replicas=settings.most_replicas,
                target_ongoing_requests=settings.target_requests,
                upscale_delay_s=settings.upscale_delay_seconds,
                downscale_delay_s=settings.downscale_delay_seconds,
            )
        }
    engines = serve.deployment(EngineReplica).options(
        name="engine",
        max_ongoing_requests=settings.max_ongoing,
        max_queued_requests=settings.max_queue,
        request_router_config=RequestRouterConfig(
            request_router_class=AdapterRouter,
            request_router_kwargs=asdict(settings.policy),
            request_routing_stats_period_s=STATS_SECONDS,
        ),
        ray_actor_options={f"num_{kind.lower()}s": each},
        graceful_shutdown_timeout_s=settings.drain_seconds,
        graceful_shutdown_wait_loop_s=0.2,
        **scale,
    )
    gateways = serve.deployment(GatewayReplica).options(
        name="gateway",
        num_replicas=settings.gateways,
        max_ongoing_requests=MANY,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=settings.drain_seconds,
        graceful_shutdown_wait_loop_s=0.2,
    )
    return gateways.bind(settings, engines.bind(settings, environment_keys()))


@serve.ingress()
class GatewayReplica:
    """Runs a :class:`Gateway` behind Ray's proxy."""

    def __init__(self, settings: RaySettings, engines: DeploymentHandle) -> None:
        self._names: Names | None = None  # one replica without a shared registry: there is nothing to choose
        if settings.database_url is not None:
            self._names = Names(open_database(settings.data_dir, settings.database_url.get_secret_value()))
            self._names.start()
        self._gateway = Gateway(
            RayReplicas(engines),
            self._contents,
            self._refresh,
            max_body=int(settings.max_body_mib * 2**20),
            body_seconds=settings.request_timeout_seconds,
            proxys_header="x-request-id",
        )

    def _contents(self, names: Sequence[str], user: str | None) -> tuple[str, ...]:
        return () if self._names is None else self._names.contents(names, user)

    async def _refresh(self) -> None:
        """Read the names again. The change that asks for it is made: if the database fails now, it is only logged."""
        if self._names is not None:
            try:
                await asyncio.to_thread(self._names.refresh)
            except AdapterError as error:
                _log.warning("%s: %s", STALE, error)

    def __serve_build_asgi_app__(self) -> Gateway:
        """Return the application, as ``serve.ingress`` asks for."""
        return self._gateway


@contextmanager
def _followed(response: DeploymentResponse[Any] | DeploymentResponseGenerator[Any]) -> Iterator[None]:
    """Raise the gateway's errors for Ray's, and cancel a response that the block does not follow to its end."""
    ended = False
    try:
        yield
        ended = True
    except (RayActorError, DeploymentUnavailableError) as error:
        raise ReplicaLost from error
    except BackPressureError as error:
        raise AllFull from error
    finally:
        if not ended:
            response.cancel()


class RayReplicas:
    """The way to the engines by a handle of Ray. See :class:`server.ray.gateway.Replicas`."""

    def __init__(self, engines: DeploymentHandle) -> None:
        self._engines = engines
        self._calls = engines.options(method_name="call", stream=True)
        self._feeds = engines.options(method_name="feed")

    async def call(self, call: Call) -> AsyncIterator[list[Message]]:
        response = self._calls.remote(call)
        with _followed(response):
            async for messages in response:
                yield messages

    async def feed(self, feed: Feed) -> None:
        response = self._feeds.remote(feed)
        with _followed(response):
            await response

    async def everywhere(self, call: Call) -> dict[str, list[Message]]:
        return dict(await self._broadcast("whole", call))

    async def refresh(self) -> None:
        await self._broadcast("refresh")

    async def _broadcast(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of all replicas; leave out those that fail, which may have died, and log why."""
        try:
            response = self._engines.broadcast(method, *arguments)
            answers = await response.results_async(timeout_s=REFRESH_SECONDS, return_exceptions=True)
        except (TimeoutError, DeploymentUnavailableError) as error:
            _log.warning("The replicas did not all answer to %s: %r", method, error)
            return []
        for answer in answers:
            if isinstance(answer, BaseException):
                _log.warning("A replica did not answer to %s: %r", method, answer)
        return [answer for answer in answers if not isinstance(answer, BaseException)]
