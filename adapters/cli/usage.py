"""``manylora usage`` and ``manylora audit``: what keys have used, and who has changed what, on a running server."""

import json
from collections.abc import Sequence
from typing import Annotated

import typer

from adapters.cli.client import AdapterClient, JsonObject
from adapters.cli.connection import DEFAULT_URL, ApiKey, Url, connect
from adapters.cli.tables import moment, show_table
from bases import interrupts
from bases.command_line import APP

usage = typer.Typer(**APP)
audit = typer.Typer(**APP)

Json = Annotated[bool, typer.Option("--json", metavar="", help="print JSON, for scripts")]
Key = Annotated[str | None, typer.Option("--key", metavar="ID", help="only of this key (unset: all that yours sees)")]
COUNTS = ("requests", "prompt_tokens", "cached_tokens", "output_tokens")


@usage.command()
def show_usage(
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    start: Annotated[str | None, typer.Option(metavar="DAY", help="first day, UTC (unset: of this month)")] = None,
    end: Annotated[str | None, typer.Option(metavar="DAY", help="last day, included (unset: today)")] = None,
    key: Key = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="NAME[@VERSION]", help="only of this adapter, also in mixes (unset: all)")
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(metavar="day|key|adapter", help="what to sum by; may be repeated (unset: all three)"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show requests and tokens by key, adapter and day.

    Example: manylora usage --start 2026-11-01 --by key
    """
    wanted = {"start": start, "end": end, "key": key, "adapter": adapter, "group_by": by or None}
    rows = _rows(url, api_key, "/v1/usage", wanted)
    if as_json:
        _json(rows)
        return
    by = [name for name in ("day", "key", "adapter") if name in (by or ("day", "key", "adapter"))]
    titles = [*by, *(["name"] if "key" in by else []), *COUNTS]
    show_table([title.replace("_", " ") for title in titles], (_usage_row(row, by) for row in rows), "nothing was used")


@audit.command()
def show_audit(
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    since: Annotated[str | None, typer.Option(metavar="TIME", help="ISO 8601, UTC unless it says otherwise")] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="not included")] = None,
    key: Annotated[str | None, typer.Option(metavar="ID|NAME", help="only by this key")] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="only of this adapter, alias or key")] = None,
    action: Annotated[str | None, typer.Option(metavar="ACTION", help="such as adapter.removed")] = None,
    last: Annotated[int, typer.Option(min=1, metavar="INTEGER", help="number of changes to show at most")] = 100,
    as_json: Json = False,
) -> None:
    """Show who has changed which adapter, alias or key, the latest change first.

    Example: manylora audit --name legal --since 2026-11-01
    """
    wanted = {"since": since, "until": until, "key": key, "name": name, "action": action}
    rows = _rows(url, api_key, "/v1/audit", wanted, last)
    if as_json:
        _json(rows)
        return
    titles = ("time (UTC)", "action", "name", "detail", "by", "from", "request")
    show_table(titles, (_audit_row(row) for row in rows), "nothing was changed")


def _rows(
    url: str, api_key: str | None, path: str, wanted: JsonObject, last: int | None = None
) -> Sequence[JsonObject]:
    """Return the items of a list, ``last`` of them at most."""
    given = {name: value for name, value in wanted.items() if value is not None}
    client = connect(AdapterClient, url, api_key)
    with interrupts.sigint_raises(), client:
        return client.items(path, given, last)


def _usage_row(row: JsonObject, by: list[str]) -> list[object]:
    named = [row["key_name"]] if "key" in by else []
    adapter = {"adapter": row["adapter"] or "(base)"}
    return [*((row | adapter)[name] for name in by), *named, *(row[count] for count in COUNTS)]


def _audit_row(row: JsonObject) -> list[object]:
    detail = ", ".join(f"{name} {json.dumps(value)}" for name, value in row["detail"].items())
    who = row["key_name"]
    return [moment(row["created"]), row["action"], row["name"], detail, who, row["address"], row["request_id"]]


def _json(rows: Sequence[JsonObject]) -> None:
    typer.echo(json.dumps({"data": list(rows)}, indent=2))
