"""``manylora ray``: start or join Ray, run the application, and end it with the command."""

import os
import signal
import threading
import time

import ray
from ray import serve as ray_serve
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client  # nothing public tells with which options Ray Serve runs

from bases.errors import ConfigError
from bases.model_source import find_source, on_hub
from server.access.key_file import GivenKeys
from server.access.key_store import KeyStore
from server.access.keyring import Keyring
from server.api.serve import print_line, require_keys
from server.database import open_database
from server.listener import bind
from server.ray.application import build, needs
from server.ray.settings import RaySettings

NAME = "manylora"
END_MARGIN_SECONDS = 30.0
"""Seconds that the replicas get to end after the last of their requests."""
POLL_SECONDS = 0.2
FLAGS = {
    "host": "--host",
    "port": "--port",
    "keep_alive_timeout_s": "--keep-alive-seconds",
    "ssl_certfile": "--tls-cert",
    "ssl_keyfile": "--tls-key",
}
"""Options by their field of HTTPOptions."""


def serve(settings: RaySettings) -> None:
    """Serve until SIGTERM or SIGINT; a second one ends at once what the first lets finish.

    Raises ConfigError before anything starts, and if the replicas do not start.
    """
    port = check_address(settings)
    if not on_hub(settings.model):  # replicas would try again and again; from a hub it is they that download
        find_source(settings.model)
    ray.init(include_dashboard=False, configure_logging=False)
    stopped, forced, news = threading.Event(), threading.Event(), threading.Event()

    def stop(*_: object) -> None:
        if stopped.is_set():
            forced.set()
        stopped.set()
        news.set()

    for number in (signal.SIGTERM, signal.SIGINT):  # now, because ray.init sets its own
        signal.signal(number, stop)
    try:
        start_http(http_options(settings, port))
        warn_of_few_cores(settings)
        try:
            # On a thread, so that a signal ends a start, which may take minutes, like it ends all that follows.
            start = Start(settings, news)
            start.start()
            news.wait()
            if not stopped.is_set():
                if start.failure is not None:
                    raise ConfigError(f"the replicas do not start: {start.failure}") from start.failure
                address = f"{'http' if settings.tls_cert is None else 'https'}://{settings.host}:{port}"
                print_line(f"serving {settings.model} by {settings.replicas} replicas on {address}")
                stopped.wait()
            print_line("finishing what is in progress")
        finally:  # also after a failed start: in a cluster that goes on it would be tried again and again
            end(settings.drain_seconds + END_MARGIN_SECONDS, forced)
    finally:
        ray.shutdown()


def http_options(settings: RaySettings, port: int) -> HTTPOptions:
    """Return what Ray's proxy is told."""
    return HTTPOptions(
        host=settings.host,
        port=port,
        keep_alive_timeout_s=settings.keep_alive_seconds,
        ssl_certfile=None if settings.tls_cert is None else str(settings.tls_cert),
        ssl_keyfile=None if settings.tls_key is None else str(settings.tls_key),
    )


def start_http(options: HTTPOptions) -> None:
    """Start Ray Serve. Raises ConfigError if it runs with other options, which it would keep with a mere warning."""
    running = _get_global_client(raise_if_no_controller_running=False)
    if running is not None and (other := differences(options, running.http_config)):
        raise ConfigError(f"Ray Serve already runs in this cluster with other options: {other}; end it: serve shutdown")
    ray_serve.start(http_options=options)


def differences(wanted: HTTPOptions, there: HTTPOptions) -> str:
    """Name the options of which Ray Serve has other values; "" if none."""
    pairs = [(flag, getattr(wanted, field), getattr(there, field)) for field, flag in FLAGS.items()]
    return ", ".join(f"{flag} {had} (not {value})" for flag, value, had in pairs if value != had)


def end(seconds: float, forced: threading.Event) -> None:
    """Delete the application, and end Ray Serve unless it has others. Running requests get ``seconds``.

    If ``forced`` is set, return: what this process has started ends with it, and a cluster goes on deleting by itself.
    """
    ray_serve.delete(NAME, _blocking=False)  # blocking ends after a minute; shutdown() would end the proxy at once
    until = time.monotonic() + seconds
    while NAME in ray_serve.status().applications:
        if forced.wait(POLL_SECONDS):
            return
        if time.monotonic() > until:
            print_line(f"the replicas have not ended in {seconds:.0f} seconds")
            break
    if not set(ray_serve.status().applications) - {NAME}:  # somebody else's in the cluster go on
        ray_serve.shutdown()


class Start(threading.Thread):
    """Deploys the application, and sets ``news`` when it runs or has failed."""

    def __init__(self, settings: RaySettings, news: threading.Event) -> None:
        super().__init__(name="start", daemon=True)
        self.failure: Exception | None = None
        self._settings = settings
        self._news = news

    def run(self) -> None:
        """Return when the replicas run."""
        try:
            ray_serve.run(build(self._settings), name=NAME, route_prefix="/")
        except Exception as error:
            self.failure = error
        self._news.set()


def warn_of_few_cores(settings: RaySettings) -> None:
    """Say so if Ray cannot start all replicas with the machines that it has now."""
    kind, each = needs(settings)
    there = int(ray.cluster_resources().get(kind, 0))
    if there < each * settings.replicas:
        needed = each * settings.replicas
        print_line(f"Ray has {there} {kind}, and the replicas need {needed}: some start only when there are more")


def check_address(settings: RaySettings) -> int:
    """Return the port to listen on. Raises ConfigError if it is taken, or if there must be keys and are none."""
    given = GivenKeys(settings.api_key_file, os.environ)
    url = settings.database_url
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    database = open_database(settings.data_dir, None if url is None else url.get_secret_value())
    try:
        with bind(settings.host, settings.port) as listener:
            require_keys(settings, listener, Keyring(KeyStore(database), given))
            port: int = listener.getsockname()[1]
            return port
    finally:
        database.close()
