"""``manylora keys``: make, list, rotate and revoke API keys, in the database itself. No server needs to run.

Exit status: 0; 1 if there is no such key or the database cannot be reached; 2 for a bad option.
"""

import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from adapters.cli.tables import minute, show_table
from adapters.registry.audit import COMMAND_LINE, acting
from bases import interrupts
from bases.command_line import APP
from bases.errors import ConfigError
from bases.options import default_data_dir
from bases.pydantic_errors import message
from server.access.key import KeyLimits
from server.access.key_spec import KeySpec
from server.access.key_store import KeyStore, StoredKey
from server.database import open_database

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_DURATION = re.compile(r"([1-9][0-9]{0,8})([smhdw])")
MAX_SECONDS = 100 * 366 * 86400
NO_KEYS = "there are no keys, and so every request is served; make one with: manylora keys add NAME --scope admin"
_SHORT_LIMITS = {
    "requests_per_minute": "rpm",
    "tokens_per_minute": "tpm",
    "parallel_requests": "parallel",
    "tokens_per_month": "tokens a month",
}

keys = typer.Typer(no_args_is_help=True, **APP)


@contextmanager
def _open(data_dir: Path | None, database_url: str | None) -> Iterator[KeyStore]:
    """Open the store of keys. Raises ConfigError, and AdapterError if the database cannot be reached."""
    folder = default_data_dir() if data_dir is None else data_dir.expanduser()
    try:
        if database_url is None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--data-dir: {folder} cannot be written: {error.strerror or error}") from error
    database = open_database(folder, database_url)
    try:
        with acting(COMMAND_LINE):
            yield KeyStore(database)
    finally:
        database.close()


def seconds_of(text: str) -> int:
    """Return the seconds of a duration, as ``90s``, ``15m``, ``12h``, ``30d`` or ``8w``. Raises typer.BadParameter."""
    match = _DURATION.fullmatch(text)
    seconds = int(match[1]) * _UNITS[match[2]] if match else 0
    if not 0 < seconds <= MAX_SECONDS:
        raise typer.BadParameter(f"{text!r} is not a duration such as 90s, 15m, 12h, 30d or 8w")
    return seconds


Word = Annotated[str, typer.Argument(metavar="NAME|ID", help="a key, by its name or its id", show_default=False)]
Json = Annotated[bool, typer.Option("--json", metavar="", help="print JSON, for scripts")]


DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir", "--data", envvar=["MANYLORA_DATA_DIR", "MANYLORA_DATA"], metavar="FOLDER", show_default=False,
        help="the server's --data-dir (unset: a server's default)",
    ),
]  # fmt: skip
DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        envvar="MANYLORA_DATABASE_URL", metavar="URL", show_default=False, help="the server's --database-url, if any"
    ),
]

# Of ``add``
Name = Annotated[str, typer.Argument(metavar="NAME", help="what people call the key", show_default=False)]
ScopeWords = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SCOPE", help="infer (unset), adapters, train, metrics or admin; may be repeated", show_default=False
    ),
]
AdapterWords = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME|PREFIX*", show_default=False,
        help="adapter or alias that the key sees, or e.g. acme/* (unset: all); may be repeated",
    ),
]  # fmt: skip
BaseOnly = Annotated[bool, typer.Option("--base-only", metavar="", help="the key sees no adapter at all")]
Expires = Annotated[
    str | None, typer.Option(metavar="TIME", help="how long it is valid, as 12h or 30d, or a date, as 2027-01-31")
]
Rpm = Annotated[int | None, typer.Option(metavar="COUNT", help="requests a minute")]
Tpm = Annotated[int | None, typer.Option(metavar="COUNT", help="tokens a minute, of prompts and answers")]
Parallel = Annotated[int | None, typer.Option(metavar="COUNT", help="requests at the same time")]
TokensPerMonth = Annotated[int | None, typer.Option(metavar="COUNT", help="tokens in a calendar month")]
Weight = Annotated[float, typer.Option(metavar="NUMBER", help="share of the server's time, against other keys")]


@keys.callback()
def group(context: typer.Context) -> None:
    """Make, list, rotate and revoke the API keys of a server, in its database.

    As soon as there is a key, every request needs one. A server that runs notices changes within a second.

    Example: manylora keys add alice --scope infer --adapter 'acme/*' --expires 30d
    """
    context.with_resource(interrupts.sigint_raises())


@keys.command()
def add(
    name: Name,
    scope: ScopeWords = None,
    adapter: AdapterWords = None,
    base_only: BaseOnly = False,
    expires: Expires = None,
    rpm: Rpm = None,
    tpm: Tpm = None,
    parallel: Parallel = None,
    tokens_per_month: TokensPerMonth = None,
    weight: Weight = 1.0,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    as_json: Json = False,
) -> None:
    """Make a key, and print its secret: this once only.

    The secret alone goes to the standard output: KEY=$(manylora keys add ci --scope adapters)
    """
    fields = {
        "name": name,
        "scopes": [each for word in scope or ["infer"] for each in word.split(",")],
        "adapters": [] if base_only else adapter or None,
        "limits": {
            "requests_per_minute": rpm,
            "tokens_per_minute": tpm,
            "parallel_requests": parallel,
            "tokens_per_month": tokens_per_month,
        },
        "weight": weight,
        "expires": None if expires is None else _expiry(expires),
    }
    if base_only and adapter:
        raise typer.BadParameter("give one of --adapter and --base-only", param_hint="--base-only")
    spec = _spec(fields)
    with _open(data_dir, database_url) as store:
        stored, secret = store.add(spec)
    _print_secret(stored, secret, f"made the key {name} ({stored.key.id}); its secret is not shown again", as_json)


@keys.command("list")
def list_keys(
    every: Annotated[bool, typer.Option("--all", metavar="", help="the revoked ones, too")] = False,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    as_json: Json = False,
) -> None:
    """List the keys, without their secrets."""
    with _open(data_dir, database_url) as store:
        found, any_key = store.stored(revoked=every), store.any
    if as_json:
        typer.echo(json.dumps({"data": [stored.to_json() for stored in found]}, indent=2))
        return
    columns = ("name", "id", "secret", "scopes", "adapters", "limits", "weight", "created (UTC)", "expires", "state")
    none = "every key is revoked; a server with this database serves none" if any_key else NO_KEYS
    show_table(columns, (_row(stored) for stored in found), none)


@keys.command()
def revoke(key: Word, data_dir: DataDir = None, database_url: DatabaseUrl = None) -> None:
    """End a key for ever.

    A server that runs accepts it no more within a second.
    """
    with _open(data_dir, database_url) as store:
        stored = store.revoke(store.named(key).key.id)
    typer.echo(f"revoked {stored.key.name} ({stored.key.id})")


@keys.command()
def rotate(
    key: Word,
    overlap: Annotated[
        str | None, typer.Option(metavar="TIME", help="how long the old secret is accepted, too (unset: not at all)")
    ] = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    as_json: Json = False,
) -> None:
    """Give a key another secret, and print it: this once only."""
    seconds = 0 if overlap is None else seconds_of(overlap)
    with _open(data_dir, database_url) as store:
        stored, secret = store.rotate(store.named(key).key.id, seconds)
    old = f"the old secret is accepted for {overlap}" if seconds else "the old secret is not accepted any more"
    _print_secret(stored, secret, f"{stored.key.name} ({stored.key.id}) has another secret; {old}", as_json)


def _spec(fields: dict[str, Any]) -> KeySpec:
    """Return the spec. Raises typer.BadParameter for the first bad value."""
    flags = {"name": "NAME", "scopes": "--scope", "adapters": "--adapter"}
    limits = {"requests_per_minute": "--rpm", "tokens_per_minute": "--tpm", "parallel_requests": "--parallel"}
    try:
        return KeySpec.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"]]
        field = (place[1:2] if place[:1] == ["limits"] else place[:1] or ["adapters"])[0]
        reason = message(first)
        if first["type"] == "string_pattern_mismatch":
            reason = "must be 1 to 64 letters, digits and . _ @ -, and begin with a letter or a digit"
        hint = (flags | limits).get(field, f"--{field.replace('_', '-')}")
        raise typer.BadParameter(reason, param_hint=hint) from None


def _expiry(text: str) -> datetime:
    """Return the moment that a duration from now or a date means. Raises typer.BadParameter."""
    if _DURATION.fullmatch(text):
        return datetime.fromtimestamp(int(time.time()) + seconds_of(text), UTC)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is neither a duration, as 30d, nor a date", param_hint="--expires"
        ) from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    if moment.timestamp() <= time.time():
        raise typer.BadParameter(f"{text} is in the past", param_hint="--expires")
    return moment


def _print_secret(stored: StoredKey, secret: str, sentence: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({**stored.to_json(), "secret": secret}, indent=2))
        return
    typer.echo(sentence, err=True)
    typer.echo(secret)
    if stored.key.scopes == {"infer"} and sys.stdout.isatty():
        typer.echo(f"try: curl http://127.0.0.1:8000/v1/models -H 'Authorization: Bearer {secret}'", err=True)


def _row(stored: StoredKey) -> list[object]:
    key = stored.key
    adapters = "all" if key.adapters is None else ", ".join(key.adapters) or "none"
    expires = None if key.expires is None else minute(key.expires.timestamp())
    about = (key.name, key.id, f"{stored.prefix}...", ", ".join(sorted(key.scopes)), adapters, _limits(key.limits))
    return [*about, key.weight, minute(stored.created), expires, _state(stored)]


def _limits(limits: KeyLimits) -> str:
    return ", ".join(f"{value} {_SHORT_LIMITS[name]}" for name, value in asdict(limits).items() if value is not None)


def _state(stored: StoredKey) -> str:
    if stored.revoked is not None:
        return f"revoked {minute(stored.revoked)}"
    expires = stored.key.expires
    if expires is not None and expires.timestamp() <= time.time():
        return "expired"
    if stored.old_until is not None and stored.old_until > time.time():
        return f"old secret until {minute(stored.old_until)}"
    return "valid"
