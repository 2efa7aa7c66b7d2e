"""The options that name a running server, and the client that they make: the same for every command that asks one."""

from collections.abc import Callable
from typing import Annotated, TypeVar

import typer

DEFAULT_URL = "http://127.0.0.1:8000"
"""The default address of ``manylora serve``."""

Url = Annotated[str, typer.Option(envvar="MANYLORA_URL", metavar="URL", help="the server's address")]
ApiKey = Annotated[
    str | None, typer.Option(envvar="MANYLORA_API_KEY", metavar="KEY", help="API key of the server, or of its proxy")
]

Client = TypeVar("Client")


def connect(client: Callable[..., Client], url: str, api_key: str | None) -> Client:
    """Return a client of the server. Raises BadParameter for an address or a key that no request can have."""
    try:
        return client(url, api_key=api_key or None)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--url, --api-key") from None
