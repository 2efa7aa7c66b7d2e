"""The benchmark's adapters on the server: made, registered over HTTP, and removed again."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from pydantic import BaseModel, TypeAdapter, ValidationError

from bases import pydantic_errors
from loadtests import plain
from loadtests.drive.peers import LlamaCpp, Manylora, Peer, PeerName, Vllm
from loadtests.drive.progress import Display
from loadtests.drive.rounds import Tick
from loadtests.errors import BadOption, ServerUnusable
from loadtests.workload.adapters import Geometry, Recipe
from loadtests.workload.workload import adapter_name

T = TypeVar("T")

AT_ONCE = 4
"""Adapters made and sent at the same time."""
FORBIDDEN = (401, 403)
ABSENT = 404
TAKEN = 412
REJECTED = 422
BROKEN = 500
END_SECONDS = 30.0
"""What registrations under way get after Ctrl-C, and removing adapters gets at least."""
REMOVAL_SECONDS = 0.25
"""More that each adapter's removal gets."""


class _Card(BaseModel):
    """What ``/v1/models`` tells of a model."""

    id: str
    parent: str | None = None


class _Cards(BaseModel):
    data: list[_Card]


class _Loaded(BaseModel):
    """What llama.cpp tells of an adapter."""

    id: int
    path: str


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
    unanswered: set[str] = field(default_factory=set)
    """Of these: a server may still be about to register one after its client has gone."""

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
        path = "v1/load_lora_adapter" if self.peer == "vllm" else "v1/adapters"
        self.registered.add(name)
        self.unanswered.add(name)
        # The name may have been taken since the list was read, and removing it afterwards would be somebody's loss.
        async with self.http.post(path, headers={"If-Match": '"0"'}, **content) as response:
            self.unanswered.discard(name)
            if not response.ok:
                self.registered.discard(name)
            if response.status == TAKEN:
                raise ServerUnusable(_taken(name))
            what = f"adapter {name}"
            if response.status == REJECTED and recipe.geometry == Geometry():
                what += ", made for the demo model (another base needs --config)"
            await _accepted(response, what)

    async def remove(self, name: str) -> None:
        """Remove one that was registered, or may have been. Raises :class:`ServerUnusable`."""
        if self.peer == "vllm":
            answer = self.http.post("v1/unload_lora_adapter", json={"lora_name": name})
        else:
            answer = self.http.delete(f"v1/adapters/{name}")
        async with answer as response:
            if response.status != ABSENT:
                await _accepted(response, f"to remove {name}")
            elif name in self.unanswered:
                raise ServerUnusable("it was not there, but its registration had no answer and may still come")
        self.registered.discard(name)


async def find_peer(http: aiohttp.ClientSession, name: PeerName, base: str | None) -> tuple[Peer, set[str]]:
    """The server as a peer, and the adapters it has.

    Raises :class:`ServerUnusable`, and :class:`BadOption` where what answers is no such server.
    """
    cards = (await _get(http, "v1/models", _Cards, name)).data
    bases = [card.id for card in cards if card.parent is None]
    if base is not None and bases and name != "llamacpp" and base not in bases:  # llama.cpp takes any name
        raise BadOption(f"--base: the server has no base `{base}`; it has {', '.join(bases)}")
    if base is None and not bases:
        raise ServerUnusable("/v1/models lists no base; name it with --base")
    base = base or bases[0]
    adapters = {card.id for card in cards} - {base}
    match name:
        case "manylora":
            return Manylora(base), adapters
        case "vllm":
            return Vllm(base), adapters
        case "llamacpp":
            loaded = await _get(http, "lora-adapters", list[_Loaded], name)
            numbers = {Path(one.path).stem: one.id for one in loaded}
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
            await _register_all(registrar, count, tick)
        yield left
    finally:
        try:
            with display.counting("removing adapters", len(registrar.registered)) as tick:
                left += await _finished(asyncio.ensure_future(_remove_all(registrar, tick)))
        except asyncio.CancelledError:
            if registrar.registered:
                display.say(f"LEFT ON THE SERVER: {', '.join(sorted(registrar.registered))}")
            raise
        for line in left:
            display.say(line)


async def _finished(work: asyncio.Future[T]) -> T:
    """What ``work`` gives, in spite of a first cancellation; whatever comes after that ends it."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling() > 1:
            work.cancel()
        with suppress(asyncio.CancelledError):
            await work
        raise


async def _remove_all(registrar: Registrar, tick: Tick) -> list[str]:
    """One that cannot be removed does not keep the others, and all of them have some time. Returns a line for each that
    is left.
    """
    names = sorted(registrar.registered)
    seconds = END_SECONDS + REMOVAL_SECONDS * len(names)
    reasons = dict.fromkeys(names, f"the server took more than {seconds:.0f} s")
    free = asyncio.Semaphore(AT_ONCE)

    async def remove(name: str) -> None:
        async with free:
            try:
                await registrar.remove(name)
            except (ServerUnusable, aiohttp.ClientError, OSError) as error:
                reasons[name] = str(error) if isinstance(error, ServerUnusable) else plain.of_connection(error)
        tick()

    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await asyncio.gather(*map(remove, names))
    return [f"{name} was not removed: {reasons[name]}" for name in sorted(registrar.registered)]


async def _register_all(registrar: Registrar, count: int, tick: Tick) -> None:
    """Several at a time. After a failure or a cancellation none is begun, and those under way get some time: a server
    may do what it was asked after the client has gone, so a removal could come too early.
    """
    left, errors, ended = iter(range(count)), list[Exception](), asyncio.Event()

    async def work() -> None:
        for number in left:
            try:
                await registrar.register(number)
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
        with suppress(TimeoutError):
            async with asyncio.timeout(END_SECONDS):
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


async def _get(http: aiohttp.ClientSession, path: str, form: type[T], peer: PeerName) -> T:
    """The answer in a form that only this kind of server gives it."""
    async with http.get(path) as response:
        if response.status == ABSENT:
            raise BadOption(
                f"--url, --peer: this is no {peer} server: it has no /{path}; --url is the address before that"
            )
        await _accepted(response, f"/{path}")
        content = await response.read()
    try:
        return TypeAdapter(form).validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        said = f"{pydantic_errors.path(first) or 'it'} {pydantic_errors.message(first)}"
        raise BadOption(f"--url, --peer: this is no {peer} server: /{path} gives another answer: {said}") from None


async def _accepted(response: aiohttp.ClientResponse, what: str) -> None:
    """Raises :class:`ServerUnusable` where the server says no to ``what``."""
    if response.ok:
        return
    said = plain.of_status(response.status, await response.text(errors="replace"))
    if response.status in FORBIDDEN:
        sent = "Authorization" in response.request_info.headers
        advice = "it does not take this key" if sent else "give its key with --api-key, or in MANYLORA_API_KEY"
        raise ServerUnusable(f"the server does not let us in ({said}): {advice}")
    if response.status >= BROKEN:
        raise ServerUnusable(f"the server, or a proxy before it, does not work ({what}: {said}); see what its log says")
    raise ServerUnusable(f"the server refused {what}: {said}")


def _taken(name: str) -> str:
    return f"the server has an adapter {name} already: measure it with --registered, or remove it"


def _missing(names: Sequence[str], registrar: Registrar) -> str:
    how = {
        "manylora": "leave --registered out to have them made",
        "vllm": "start it with --lora-modules, or with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and give --adapter-folder",
        "llamacpp": "start it with --lora and files of `python -m loadtests.workload.adapters --gguf`",
    }[registrar.peer]
    return f"the server lacks {len(names)} adapters, {names[0]} among them: {how}"
