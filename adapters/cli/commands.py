"""``manylora adapters``: manages the adapters of a running server.

Exit status: 0; 1 if the server refuses or cannot be reached, or the folder holds no adapter; 2 for a bad option.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from adapters.cli.client import AdapterClient, JsonObject, Pushed
from adapters.cli.connection import DEFAULT_URL, ApiKey, Url, connect
from adapters.cli.tables import minute, show_fields, show_table
from adapters.cli.upload_bar import upload_bar
from adapters.registry.names import check_name, parse_reference
from adapters.registry.snapshot import Target
from bases import interrupts
from bases.command_line import APP
from bases.errors import one_line

NO_ADAPTERS = "no adapters are registered; upload one with: manylora adapters push DIR --name NAME"
NO_ALIASES = "there are no aliases; make one with: manylora adapters alias set ALIAS NAME"

adapters = typer.Typer(no_args_is_help=True, **APP)
alias = typer.Typer(
    help="List, set and remove aliases: names that mean one of several versions, by weight.",
    no_args_is_help=True,
    **APP,
)
adapters.add_typer(alias, name="alias")


@dataclass(frozen=True, slots=True)
class _Connection:
    """Options of ``manylora adapters`` itself, before the sub-command."""

    url: str
    api_key: str | None


def _connect(context: typer.Context, url: str | None) -> AdapterClient:
    """Return a client of the server that the sub-command's or the group's ``--url`` names."""
    given: _Connection = context.obj
    client = connect(AdapterClient, given.url if url is None else url, given.api_key)
    context.call_on_close(client.close)
    return client


def _targets(words: Sequence[str]) -> list[Target]:
    """Parse ``["legal@1=90", "legal@2=10"]``; the default weight is 1."""
    targets = []
    for word in words:
        reference, equals, weight = word.partition("=")
        parsed = parse_reference(reference)
        try:
            value = float(weight) if equals else 1.0
        except ValueError:
            value = math.nan
        if not (value > 0 and math.isfinite(value)):
            raise typer.BadParameter(
                f"{word!r} is not NAME[@VERSION]=WEIGHT with a weight above 0", param_hint="TARGET"
            )
        targets.append(Target(parsed.name, parsed.version, value))
    return targets


Server = Annotated[
    AdapterClient,
    typer.Option(
        "--url", metavar="URL", parser=str, callback=_connect, default_factory=lambda: None, show_default=False,
        help="the server's address",
    ),
]  # fmt: skip
Name = Annotated[str, typer.Argument(metavar="NAME", help="name of an adapter", show_default=False)]
AliasName = Annotated[str, typer.Argument(metavar="ALIAS", help="name of the alias", show_default=False)]
ReferenceWord = Annotated[
    str, typer.Argument(metavar="NAME[@VERSION]", help="an adapter, or one of its versions", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", metavar="", help="print JSON, for scripts")]
Yes = Annotated[bool, typer.Option("--yes", "-y", metavar="", help="do not ask for confirmation")]

# Of ``push``
Folder = Annotated[
    Path,
    typer.Argument(
        exists=True, file_okay=False, metavar="DIR", help="the adapter's folder, as PEFT or a trainer saves it",
        show_default=False,
    ),
]  # fmt: skip
PushName = Annotated[
    str | None, typer.Option("--name", metavar="NAME", help="the adapter's name (unset: the folder's)")
]
NoActivate = Annotated[
    bool, typer.Option("--no-activate", metavar="", help="store the version without making it the active one")
]
Pin = Annotated[bool, typer.Option("--pin", metavar="", help="keep the adapter on the device")]
Preload = Annotated[bool, typer.Option("--preload", metavar="", help="load the adapter to the device at once")]
AllowBaseMismatch = Annotated[
    bool,
    typer.Option("--allow-base-mismatch", metavar="", help="accept an adapter that was trained on another base"),
]
AllowUnknownFields = Annotated[
    bool,
    typer.Option("--allow-unknown-fields", metavar="", help="accept an adapter whose config has unknown fields"),
]
PushAlias = Annotated[
    str | None, typer.Option("--alias", metavar="NAME", help="alias to point to the new version alone")
]


@adapters.callback()
def connection(
    context: typer.Context,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """List, push, activate and remove the adapters of a running server.

    Example: manylora adapters list --url http://127.0.0.1:8000
    """
    context.with_resource(interrupts.sigint_raises())
    context.obj = _Connection(url, api_key)


@adapters.command("list")
def list_adapters(server: Server, as_json: Json = False) -> None:
    """List all adapters.

    Also list the refused folders in the watched folder, with the reason.
    """
    listing = server.list()
    if as_json:
        _json({"data": listing.adapters, "refused": listing.refused, "store": listing.store})
        return
    columns = ("name", "version", "versions", "rank", "size", "residency", "pinned", "status")
    show_table(columns, (_row(item) for item in listing.adapters), NO_ADAPTERS)
    if listing.refused:
        typer.echo("\nrefused in the watched folder:")
        show_table(
            ("name", "source", "reason"), ((bad["name"], bad["source"], bad["reason"]) for bad in listing.refused)
        )
    quota = listing.store["quota_bytes"]
    typer.echo(f"\nstored: {decimal(listing.store['bytes'])}" + (f" of {decimal(quota)}" if quota else ""))


@adapters.command()
def show(server: Server, name: ReferenceWord, as_json: Json = False) -> None:
    """Show an adapter or version, with its receipt.

    The receipt has the results of the checks at registration. On a terminal digests are shortened.
    """
    answer = server.show(name)
    if as_json:
        _json(answer)
        return
    versions = answer.get("version_details")
    listed_below = {"object", "version_details", *(["versions"] if versions is not None else [])}
    show_fields({key: value for key, value in answer.items() if key not in listed_below})
    if versions is not None:
        typer.echo()
        columns = ("version", "created (UTC)", "rank", "size", "residency", "status", "content")
        show_table(columns, (_version(each) for each in versions))


@adapters.command()
def push(
    server: Server,
    folder: Folder,
    name: PushName = None,
    no_activate: NoActivate = False,
    pin: Pin = False,
    preload: Preload = False,
    allow_base_mismatch: AllowBaseMismatch = False,
    allow_unknown_fields: AllowUnknownFields = False,
    to: PushAlias = None,
    as_json: Json = False,
) -> None:
    """Upload DIR as the next version of a name.

    Example: manylora adapters push ./legal --name legal --alias prod
    """
    name = name or folder.resolve().name
    if to is not None:
        check_name(to)  # before the upload, not after it
    with upload_bar(name) as progress:
        pushed = server.push(
            folder,
            name,
            activate=not no_activate,
            pinned=pin or None,
            preload=preload,
            allow_base_mismatch=allow_base_mismatch,
            allow_unknown_fields=allow_unknown_fields,
            progress=progress,
        )
    if not as_json:
        typer.echo(_registered(name, pushed))
        if pushed.selection.others:
            others = ", ".join(pushed.selection.others)
            typer.echo(one_line(f"taken from the top of {folder}; left out, the other adapters in it: {others}"))
    if to is not None:
        server.put_alias(to, [Target(name, pushed.version, 1.0)])
        if not as_json:
            typer.echo(f"{to} means {name}@{pushed.version}")
    if as_json:
        _json({**pushed.adapter, "new": pushed.new})


@adapters.command()
def pin(
    server: Server,
    name: Name,
    off: Annotated[bool, typer.Option("--off", metavar="", help="unpin the adapter")] = False,
) -> None:
    """Keep an adapter on the device."""
    answer = server.pin(name, not off)
    typer.echo(f"{name} is {'pinned' if answer['pinned'] else 'not pinned'}")


@adapters.command()
def activate(
    server: Server,
    name: ReferenceWord,
    version: Annotated[
        int | None, typer.Argument(min=1, metavar="VERSION", help="number of the version", show_default=False)
    ] = None,
) -> None:
    """Make another version of an adapter the active one.

    Example: manylora adapters activate legal 1
    """
    reference = parse_reference(name)
    match reference.version, version:
        case (int(number), None) | (None, int(number)):
            answer = server.activate(reference.name, number)
            typer.echo(f"{reference.name} means {reference.name}@{answer['active']}")
        case _:
            raise typer.BadParameter("give the version once, as NAME@VERSION or as NAME VERSION", param_hint="VERSION")


@adapters.command()
def rm(server: Server, name: ReferenceWord, yes: Yes = False) -> None:
    """Remove an adapter, or one version.

    Asks for confirmation; without a terminal it needs --yes.
    """
    if not yes:
        if not sys.stdin.isatty():
            reason = "rm asks before it removes, and there is no terminal to ask on: give --yes"
            raise typer.BadParameter(reason, param_hint="--yes")
        versions = len(server.show(name)["versions"])
        what = name if "@" in name or versions < 2 else f"{name} and its {versions} versions"
        typer.confirm(f"Remove {what}?", abort=True, err=True)
    server.remove(name)
    typer.echo(f"removed {name}")


@alias.command("list")
def list_aliases(server: Server, as_json: Json = False) -> None:
    """List all aliases with their targets."""
    aliases = server.aliases()
    if as_json:
        _json({"data": aliases})
        return
    targets = ((item["id"], target) for item in aliases for target in item["targets"])
    show_table(
        ("alias", "target", "weight", "serves"),
        ([name, each["adapter"], f"{each['weight']:g}", each["serves"]] for name, each in targets),
        NO_ALIASES,
    )


@alias.command("set")
def set_alias(
    server: Server,
    name: AliasName,
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME[@VERSION]=WEIGHT", help="adapters or versions; the default weight is 1", show_default=False
        ),
    ],
) -> None:
    """Point an alias to one or more versions, by weight.

    Example: manylora adapters alias set prod legal@1=90 legal@2=10
    """
    answer = server.put_alias(name, _targets(targets))
    shown_targets = (f"{target['adapter']}={target['weight']:g}" for target in answer["targets"])
    typer.echo(f"{name} means {', '.join(shown_targets)}")


@alias.command("rm")
def remove_alias(server: Server, name: AliasName) -> None:
    """Remove an alias.

    Its targets stay.
    """
    server.remove_alias(name)
    typer.echo(f"removed {name}")


def _row(item: JsonObject) -> list[object]:
    """Return an adapter's row of the list."""
    versions = len(item["versions"])
    pinned = "pinned" if item["pinned"] else None
    return [item["id"], item["active"], versions, item["rank"], _size(item), item["residency"], pinned, _status(item)]


def _version(item: JsonObject) -> list[object]:
    """Return a version's row of an adapter's list."""
    of_content = (item["rank"], _size(item), item["residency"], _status(item), item["content"])
    return [item["version"], minute(item["created"]), *of_content]


def _size(item: JsonObject) -> str | None:
    size = item["size_bytes"]
    return None if size is None else decimal(size)


def _status(item: JsonObject) -> str:
    return f"{item['status']}: {item['reason']}" if item.get("reason") else str(item["status"])


def _registered(name: str, pushed: Pushed) -> str:
    """Return the result of an upload as a sentence."""
    version, active = f"{name}@{pushed.version}", pushed.adapter["active"]
    done = f"registered {version}" if pushed.new else f"{version} has this content already"
    means = f"{name} means {name}@{active}" if active else f"{name} means none of its versions yet"
    return f"{done}; {means}"


def _json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2))
