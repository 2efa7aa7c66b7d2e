"""Publishing: the next version of a name on a running server, and an alias that means it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from adapters.cli.client import AdapterClient, RemoteError
from adapters.cli.connection_errors import no_answer
from adapters.errors import AdapterError
from adapters.format.spec import BaseLayout
from adapters.registry.snapshot import Target
from bases.errors import ConfigError, ManyloraError
from training.settings import API_KEY

Say = Callable[[str], None]
Progress = Callable[[int, int], None]

SECONDS = 10.0
"""How long a server may take to say what its base is."""
BUSY_TIMEOUT_SECONDS = 60.0
"""How long it may say that it is busy or not ready yet."""
RETRY_SECONDS = 2.0
_BUSY = (429, 503)


@dataclass(frozen=True, slots=True)
class Server:
    """Where to publish."""

    url: str
    api_key: str | None = None

    def client(self) -> AdapterClient:
        """Raises ConfigError for an address or a key that cannot be one."""
        try:
            return AdapterClient(self.url, api_key=self.api_key)
        except ValueError as error:
            raise ConfigError(f"--publish: {error}") from None


class PublishFailed(ManyloraError):
    """The server did not take the adapter, or the alias. The folder is what it was."""


@dataclass(frozen=True, slots=True)
class Published:
    """What came of it."""

    version: str
    """``legal@2``."""
    new: bool
    """False where the server had this content already."""
    alias: str | None


def served_base(server: Server, say: Say = lambda _: None) -> str | None:
    """The fingerprint of the base that the server serves, asked before anything slow; None where it does not say.

    Waits for a server that is busy. Raises ConfigError where no server of models answers.
    """
    shown = _shown(server)
    with _http(server) as http:
        models = _get(http, "/v1/models", shown, say)
        if not models.is_success:
            asked, status = models.request.url.path, models.status_code
            hint = f"; it wants a key that it knows: --api-key or {API_KEY}" if status in (401, 403) else ""
            raise ConfigError(f"--publish: GET {asked} of {shown} is answered with {status}{hint}")
        if not isinstance(_json(models).get("data"), list):
            raise ConfigError(f"--publish: what answers at {shown} is no server of models")
        version = _get(http, "/version", shown, say)
    found = _json(version).get("base_fingerprint") if version.is_success else None
    return found if isinstance(found, str) else None


def check_base(server: Server, served: str | None, layout: BaseLayout) -> None:
    """Raise ConfigError where the server serves another base. One that does not say which judges at the upload."""
    if served is not None and served not in (layout.fingerprint, *layout.equivalents):
        raise ConfigError(
            f"--publish: {_shown(server)} serves another base ({_short(served)}) than the one to be trained on "
            f"({_short(layout.fingerprint)}); compare its --model, --quantization and --dtype with these"
        )


def check_names(server: Server, name: str, alias: str | None) -> None:
    """Ask the server, before anything slow, whether its names leave room for an adapter and an alias.

    Raises ConfigError. A server that has no such lists judges at the upload.
    """
    if _answers(server, f"/v1/aliases/{name}"):
        raise ConfigError(f"--name: {name} is an alias on that server; an adapter needs a name of its own")
    if alias is not None and _answers(server, f"/v1/adapters/{alias}"):
        raise ConfigError(f"--alias: {alias} is an adapter on that server; an alias needs a name of its own")


def publish(
    server: Server,
    folder: Path,
    name: str,
    alias: str | None,
    say: Say = lambda _: None,
    progress: Progress | None = None,
) -> Published:
    """Upload ``folder`` as the next version of ``name``; ``alias`` then means exactly that version.

    Raises PublishFailed with the server's own words.
    """
    with server.client() as client:
        try:
            pushed = client.push(folder, name, progress=progress)
        except (RemoteError, AdapterError) as error:
            raise PublishFailed(f"not published: {error}; the adapter is in {folder}") from error
        version = f"{name}@{pushed.version}"
        done = f"published as {version}" if pushed.new else f"{version} has this content already"
        active = pushed.card["active"]
        say(f"{done}; {name} means {name}@{active}" if active else f"{done}; {name} means none of its versions yet")
        if alias is not None:
            try:
                client.put_alias(alias, [Target(name, pushed.version, 1.0)])
            except (RemoteError, AdapterError) as error:
                raise PublishFailed(f"{version} is published, but {alias} does not mean it: {error}") from error
            say(f"{alias} means {version}")
    return Published(version, pushed.new, alias)


def _answers(server: Server, path: str) -> bool:
    """Whether there is something at ``path``."""
    with _http(server) as http:
        return _get(http, path, _shown(server)).is_success


def _http(server: Server) -> httpx.Client:
    headers = {} if server.api_key is None else {"Authorization": f"Bearer {server.api_key}"}
    return httpx.Client(base_url=server.url, headers=headers, timeout=SECONDS)


def _get(http: httpx.Client, path: str, shown: str, say: Say = lambda _: None) -> httpx.Response:
    """The server's answer, once it is not too busy to give one. Raises ConfigError."""
    deadline = time.monotonic() + BUSY_TIMEOUT_SECONDS
    told = False
    while True:
        try:
            response = http.get(path)
        except httpx.RequestError as error:
            raise ConfigError(f"--publish: {no_answer(shown, error)}") from error
        if response.status_code not in _BUSY:
            return response
        left = deadline - time.monotonic()
        if left <= 0:
            raise ConfigError(f"--publish: {shown} is busy or starting ({response.status_code}); try again later")
        if not told:
            say(f"{shown} is busy or starting ({response.status_code}); waiting up to {left:.0f} s for it")
            told = True
        time.sleep(min(RETRY_SECONDS, left))


def _json(response: httpx.Response) -> dict[str, Any]:
    """Empty for what is no JSON object."""
    try:
        found = response.json()
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _shown(server: Server) -> str:
    """The address without the password that it may hold."""
    client = server.client()
    client.close()
    return client.url


def _short(fingerprint: str) -> str:
    return f"fp_{fingerprint[:12]}"
