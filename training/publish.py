"""Publishing: the next version of a name on a running server, and an alias that means it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from adapters.client import AdapterClient, RemoteError
from adapters.errors import AdapterError
from adapters.snapshot import Target
from adapters.unreachable import no_answer
from bases.errors import ConfigError, ManyloraError

Say = Callable[[str], None]
Progress = Callable[[int, int], None]

SECONDS = 10.0
"""How long a server may take to say what its base is."""


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


def check_server(server: Server, fingerprint: str) -> None:
    """Ask the server, before anything slow, whether it serves this base.

    Its short fingerprint comes with every answer, so it is asked for one token. Raises ConfigError where nobody
    answers there, or another base does; a server that says nothing of a fingerprint judges at the upload.
    """
    shown = _shown(server)
    found = _short_fingerprint(server, shown)
    if found is not None and found != f"fp_{fingerprint[:12]}":
        raise ConfigError(
            f"--publish: {shown} serves another base ({found}) than the one trained on (fp_{fingerprint[:12]}); "
            "compare its --model, --quantization and --dtype with these"
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
    try:
        with _http(server) as http:
            return http.get(path).is_success
    except httpx.RequestError as error:
        raise ConfigError(f"--publish: {no_answer(_shown(server), error)}") from error


def _http(server: Server) -> httpx.Client:
    headers = {} if server.api_key is None else {"Authorization": f"Bearer {server.api_key}"}
    return httpx.Client(base_url=server.url, headers=headers, timeout=SECONDS)


def _short_fingerprint(server: Server, shown: str) -> str | None:
    """The ``system_fingerprint`` of the server's answers."""
    try:
        with _http(server) as http:
            models = http.get("/v1/models", params={"limit": 1}).raise_for_status().json()
            asked = {"model": models["data"][0]["id"], "prompt": "a", "max_tokens": 1}
            answer = http.post("/v1/completions", json=asked).raise_for_status().json()
    except httpx.RequestError as error:
        raise ConfigError(f"--publish: {no_answer(shown, error)}") from error
    except httpx.HTTPStatusError as error:
        question = f"{error.request.method} {error.request.url.path}"
        raise ConfigError(f"--publish: {shown}: {question} is answered with {error.response.status_code}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"--publish: what answers at {shown} is no server of models") from error
    found = answer.get("system_fingerprint")
    return found if isinstance(found, str) else None


def _shown(server: Server) -> str:
    """The address without the password that it may hold."""
    client = server.client()
    client.close()
    return client.url
