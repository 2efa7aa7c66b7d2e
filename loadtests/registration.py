"""The benchmark's adapters on the server: made, registered over HTTP, and removed again."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from loadtests.adapters import Recipe
from loadtests.drive import Tick
from loadtests.errors import ServerUnusable
from loadtests.peers import LlamaCpp, Manylora, Peer, PeerName, Vllm
from loadtests.progress import Display
from loadtests.workload import adapter_name

T = TypeVar("T")

AT_ONCE = 4
"""Adapters made and sent at the same time."""
ABSENT = 404
TAKEN = 412
ANSWER_LENGTH = 500
"""Characters of a server's refusal that are told."""


@dataclass(frozen=True, slots=True)
class Supply:
    """How the server comes by its adapters."""

    recipe: Recipe
    folder: Path | None = None
    """One that the server reads too: adapters are written there and registered by path. None uploads them."""
    present: bool = False
    """The server has them already and keeps them."""


@dataclass(slots=True)
class Registrar:
    """Registers adapters with one server and knows which it has to remove."""

    http: aiohttp.ClientSession
    peer: PeerName
    supply: Supply
    registered: set[str] = field(default_factory=set)
    """Or may be: the answer has not come."""

    async def register(self, number: int) -> None:
        """Make and register one adapter. Raises :class:`ServerUnusable`; nobody else's adapter is replaced."""
        name, recipe = adapter_name(number), self.supply.recipe
        if self.supply.folder is None:
            files = await asyncio.to_thread(recipe.files, number)
            content: dict[str, Any] = {"data": _form(name, files)}
        else:
            folder = await asyncio.to_thread(recipe.write, self.supply.folder, number)
            fields = ("lora_name", "lora_path") if self.peer == "vllm" else ("name", "path")
            content = {"json": dict(zip(fields, (name, str(folder.resolve())), strict=True))}
        path = "/v1/load_lora_adapter" if self.peer == "vllm" else "/v1/adapters"
        self.registered.add(name)
        # The name may have been taken since the list was read, and removing it afterwards would be somebody's loss.
        async with self.http.post(path, headers={"If-Match": '"0"'}, **content) as response:
            if not response.ok:
                self.registered.discard(name)
            if response.status == TAKEN:
                raise ServerUnusable(_taken(name))
            await _accepted(response, f"adapter {name}")

    async def remove(self, name: str) -> None:
        """Remove one that was registered, or may have been. Raises :class:`ServerUnusable`."""
        if self.peer == "vllm":
            answer = self.http.post("/v1/unload_lora_adapter", json={"lora_name": name})
        else:
            answer = self.http.delete(f"/v1/adapters/{name}")
        async with answer as response:
            if response.status != ABSENT:
                await _accepted(response, f"removing {name}")
        self.registered.discard(name)


async def find_peer(http: aiohttp.ClientSession, name: PeerName, base: str | None) -> tuple[Peer, set[str]]:
    """The server as a peer, and the adapters it has. Raises :class:`ServerUnusable`."""
    cards = (await _get(http, "/v1/models"))["data"]
    bases = [card["id"] for card in cards if card.get("parent") is None]
    if base is None and not bases:
        raise ServerUnusable("/v1/models lists no base; name it with --base")
    base = base or bases[0]
    adapters = {card["id"] for card in cards} - {base}
    match name:
        case "manylora":
            return Manylora(base), adapters
        case "vllm":
            return Vllm(base), adapters
        case "llamacpp":
            numbers = {Path(card["path"]).stem: card["id"] for card in await _get(http, "/lora-adapters")}
            return LlamaCpp(base, numbers), set(numbers)


@asynccontextmanager
async def supplied(registrar: Registrar, has: set[str], count: int, display: Display) -> AsyncIterator[list[str]]:
    """The server with the first ``count`` adapters of the benchmark; what was registered is removed at the end.

    Gives a list that then holds why adapters could not be removed, a line each. Raises :class:`ServerUnusable`.
    """
    left: list[str] = []
    names = [adapter_name(number) for number in range(count)]
    given_at_start = registrar.peer == "llamacpp" or (registrar.peer == "vllm" and registrar.supply.folder is None)
    if registrar.supply.present or given_at_start:
        if missing := [name for name in names if name not in has]:
            raise ServerUnusable(_missing(missing, registrar))
        yield left
        return
    if taken := [name for name in names if name in has]:
        raise ServerUnusable(_taken(taken[0]))
    try:
        with display.counting("registering adapters", count) as tick:
            await _each(registrar.register, range(count), tick)
        yield left
    finally:
        with display.counting("removing adapters", len(registrar.registered)) as tick:
            left += await _finished(_remove_all(registrar, tick))
        for line in left:
            display.say(line)


async def _finished(work: Coroutine[None, None, T]) -> T:
    """What ``work`` gives, come to its end in spite of a cancellation."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


async def _remove_all(registrar: Registrar, tick: Tick) -> list[str]:
    """One that cannot be removed does not keep the others. Returns a line for each."""
    failures: list[str] = []

    async def remove(name: str) -> None:
        try:
            await registrar.remove(name)
        except (ServerUnusable, aiohttp.ClientError, OSError) as error:
            failures.append(f"{name} was not removed: {str(error) or type(error).__name__}")

    await _each(remove, sorted(registrar.registered), tick)
    return failures


async def _each(do: Callable[[T], Awaitable[None]], things: Iterable[T], tick: Tick) -> None:
    """Several at a time. After a failure or a cancellation none is begun, and those under way are waited for: a server
    may do what it was asked after the client has gone, so a removal could come too early.
    """
    left, errors, ended = iter(things), list[Exception](), asyncio.Event()

    async def work() -> None:
        for thing in left:
            try:
                await do(thing)
            except Exception as error:  # raised below
                errors.append(error)
                ended.set()
            tick()
            if ended.is_set():
                return

    working = asyncio.gather(*(work() for _ in range(AT_ONCE)))
    try:
        await asyncio.shield(working)
    except asyncio.CancelledError:
        ended.set()
        await working
        raise
    if errors:
        raise errors[0]


def _form(name: str, files: Mapping[str, bytes]) -> aiohttp.FormData:
    form = aiohttp.FormData()
    form.add_field("name", name)
    for file, content in files.items():
        form.add_field("file", content, filename=file, content_type="application/octet-stream")
    return form


async def _get(http: aiohttp.ClientSession, path: str) -> Any:
    async with http.get(path) as response:
        await _accepted(response, path)
        try:
            return await response.json(content_type=None)
        except ValueError:
            raise ServerUnusable(f"{path}: the answer is no JSON") from None


async def _accepted(response: aiohttp.ClientResponse, what: str) -> None:
    if not response.ok:
        raise ServerUnusable(f"{what}: status {response.status}: {(await response.text())[:ANSWER_LENGTH]}")


def _taken(name: str) -> str:
    return f"the server has an adapter {name} already: measure it with --registered, or remove it"


def _missing(names: Sequence[str], registrar: Registrar) -> str:
    how = {
        "manylora": "leave --registered out to have them made",
        "vllm": "start it with --lora-modules, or with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and give --adapter-folder",
        "llamacpp": "start it with --lora and files of `python -m loadtests.adapters --gguf`",
    }[registrar.peer]
    return f"the server lacks {len(names)} adapters, {names[0]} among them: {how}"
