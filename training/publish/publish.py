"""Publishes an adapter to a running server as the next version of a name, and points an alias to it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from adapters.cli.client import AdapterClient, RemoteError
from adapters.cli.connection_errors import no_answer
from adapters.errors import AdapterError
from adapters.format.spec import BaseLayout
from adapters.registry.snapshot import Target
from bases.errors import ConfigError, ManyloraError
from training.progress_bar import Say
from training.settings import API_KEY

Progress = Callable[[int, int], None]

SECONDS = 10.0
"""Timeout of a request before training."""
BUSY_TIMEOUT_SECONDS = 60.0
"""How long to wait for a server that is busy or starting."""
RETRY_SECONDS = 2.0
_BUSY = (429, 503)


@dataclass(frozen=True, slots=True)
class PublishTarget:
    """The server to publish to."""

    url: str
    api_key: str | None = None

    def client(self) -> AdapterClient:
        """Return a client. Raises ConfigError for an invalid address or key."""
        try:
            return AdapterClient(self.url, api_key=self.api_key)
        except ValueError as error:
            raise ConfigError(f"--publish: {error}") from None


class PublishFailed(ManyloraError):
    """The server refused the adapter or the alias. The adapter's folder is unchanged."""


@dataclass(frozen=True, slots=True)
class Published:
    """A published version."""

    version: str
    """``legal@2``."""
    new: bool
    """False if the server had this content already."""
    alias: str | None


def served_base(server: PublishTarget, say: Say = lambda _: None) -> str | None:
    """Return the fingerprint of the server's base, or None if the server does not give it.

    Waits for a busy server. Raises ConfigError if there is no model server at the address.
    """
    shown = _shown(server)
    with _http(server) as http:
        models = _get(http, "/v1/models", shown, say)
        if not models.is_success:
            asked, status = models.request.url.path, models.status_code
            hint = f"; set a valid API key with --api-key or {API_KEY}" if status in (401, 403) else ""
            raise ConfigError(f"--publish: {shown} answers GET {asked} with status {status}{hint}")
        if not isinstance(_json(models).get("data"), list):
            raise ConfigError(f"--publish: {shown} is not a model server: its /v1/models is not a list of models")
        version = _get(http, "/version", shown, say)
    found = _json(version).get("base_fingerprint") if version.is_success else None
    return found if isinstance(found, str) else None


def check_base(server: PublishTarget, served: str | None, layout: BaseLayout) -> None:
    """Raise ConfigError if the server serves another base; if that is unknown, it is checked at the upload."""
    if served is not None and served not in (layout.fingerprint, *layout.equivalents):
        raise ConfigError(
            f"--publish: {_shown(server)} serves another base ({_short(served)}) than the one to train on "
            f"({_short(layout.fingerprint)}); use the server's --model, --quantization and --dtype"
        )


def check_names(server: PublishTarget, name: str, alias: str | None) -> None:
    """Raise ConfigError if the adapter's name is an alias on the server, or the alias is an adapter there.

    For a server that lists neither, this is checked at the upload.
    """
    if _answers(server, f"/v1/aliases/{name}"):
        raise ConfigError(f"--name: {name} is an alias on that server; choose another name for the adapter")
    if alias is not None and _answers(server, f"/v1/adapters/{alias}"):
        raise ConfigError(f"--alias: {alias} is an adapter on that server; choose another alias")


def publish(
    server: PublishTarget,
    folder: Path,
    name: str,
    alias: str | None,
    say: Say = lambda _: None,
    progress: Progress | None = None,
) -> Published:
    """Upload ``folder`` as the next version of ``name``, and point ``alias`` to exactly that version.

    Raises PublishFailed with the server's message.
    """
    with server.client() as client:
        try:
            pushed = client.push(folder, name, progress=progress)
        except (RemoteError, AdapterError) as error:
            raise PublishFailed(f"not published: {error}; the adapter is in {folder}") from error
        version = f"{name}@{pushed.version}"
        done = f"published as {version}" if pushed.new else f"{version} has this content already"
        active = pushed.adapter["active"]
        say(f"{done}; {name} now serves {name}@{active}" if active else f"{done}; {name} has no active version yet")
        if alias is not None:
            try:
                client.put_alias(alias, [Target(name, pushed.version, 1.0)])
            except (RemoteError, AdapterError) as error:
                raise PublishFailed(
                    f"{version} is published, but the alias {alias} could not be set: {error}"
                ) from error
            say(f"the alias {alias} now points to {version}")
    return Published(version, pushed.new, alias)


def _answers(server: PublishTarget, path: str) -> bool:
    """Return whether GET ``path`` succeeds."""
    with _http(server) as http:
        return _get(http, path, _shown(server)).is_success


def _http(server: PublishTarget) -> httpx2.Client:
    headers = {} if server.api_key is None else {"Authorization": f"Bearer {server.api_key}"}
    return httpx2.Client(base_url=server.url, headers=headers, timeout=SECONDS)


def _get(http: httpx2.Client, path: str, shown: str, say: Say = lambda _: None) -> httpx2.Response:
    """Return the response to GET ``path``, retrying while the server is busy. Raises ConfigError."""
    deadline = time.monotonic() + BUSY_TIMEOUT_SECONDS
    waiting = False
    while True:
        try:
            response = http.get(path)
        except httpx2.RequestError as error:
            raise ConfigError(f"--publish: {no_answer(shown, error)}") from error
        if response.status_code not in _BUSY:
            return response
        left = deadline - time.monotonic()
        if left <= 0:
            raise ConfigError(f"--publish: {shown} is busy or starting ({response.status_code}); try again later")
        if not waiting:
            say(f"{shown} is busy or starting ({response.status_code}); waiting up to {left:.0f} s for it")
            waiting = True
        time.sleep(min(RETRY_SECONDS, left))


def _json(response: httpx2.Response) -> dict[str, Any]:
    """Return the body if it is a JSON object, else an empty dict."""
    try:
        found = response.json()
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _shown(server: PublishTarget) -> str:
    """Return the server's address without a password."""
    client = server.client()
    client.close()
    return client.url


def _short(fingerprint: str) -> str:
    return f"fp_{fingerprint[:12]}"
