"""Registers the benchmark's adapters with the server over HTTP and removes them at the end."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from pydantic import BaseModel, TypeAdapter, ValidationError

from bases import pydantic_errors
from loadtests import error_text
from loadtests.drive.peers import LlamaCpp, Manylora, Peer, PeerName, Vllm
from loadtests.drive.progress import Display
from loadtests.drive.rounds import Tick
from loadtests.errors import BadOption, ServerUnusable
from loadtests.workload.adapters import AdapterGenerator, ModelShape
from loadtests.workload.workload import adapter_name

T = TypeVar("T")

CONCURRENCY = 4
"""Adapters generated, registered or removed at the same time."""
FORBIDDEN = (401, 403)
ABSENT = 404
TAKEN = 412
REJECTED = 422
BROKEN = 500
END_SECONDS = 30.0
"""How long registrations in flight may take after Ctrl-C, and removing adapters at least."""
REMOVAL_SECONDS = 0.25
"""Added to the time for removing adapters, for each adapter."""


class _Model(BaseModel):
    """A model in ``/v1/models``."""

    id: str
    parent: str | None = None


class _ModelList(BaseModel):
    data: list[_Model]


class _Loaded(BaseModel):
    """An adapter in llama.cpp's ``/lora-adapters``."""

    id: int
    path: str


@dataclass(frozen=True, slots=True)
class AdapterSetup:
    """How the benchmark's adapters get to the server."""

    generator: AdapterGenerator
    folder: Path | None = None
    """A folder that the server can read: adapters are written there and registered by path. None uploads them."""
    present: bool = False
    """Whether the server has the adapters already. Then they are neither registered nor removed."""


@dataclass(slots=True)
class AdapterRegistrar:
    """Registers adapters with one server and keeps track of those to remove."""

    http: aiohttp.ClientSession
    peer: PeerName
    setup: AdapterSetup
    registered: set[str] = field(default_factory=set)
    """Adapters that are registered, or may be because the answer has not come."""
    unanswered: set[str] = field(default_factory=set)
    """Those of ``registered`` without an answer: a server may register one after its client has disconnected."""

    async def register(self, number: int) -> None:
        """Generate and register one adapter. Raises :class:`ServerUnusable`, also if the name is taken."""
        name, generator = adapter_name(number), self.setup.generator
        if self.setup.folder is None:
            files = await asyncio.to_thread(generator.files, number)
            content: dict[str, Any] = {"data": _form(name, files)}
        else:
            folder = await asyncio.to_thread(generator.write, self.setup.folder, number)
            fields = ("lora_name", "lora_path") if self.peer == "vllm" else ("name", "path")
            content = {"json": dict(zip(fields, (name, str(folder.resolve())), strict=True))}
        path = "v1/load_lora_adapter" if self.peer == "vllm" else "v1/adapters"
        self.registered.add(name)
        self.unanswered.add(name)
        # If-Match refuses a name that was taken since the list was read. Its adapter would be replaced, then removed.
        async with self.http.post(path, headers={"If-Match": '"0"'}, **content) as response:
            self.unanswered.discard(name)
            if not response.ok:
                self.registered.discard(name)
            if response.status == TAKEN:
                raise ServerUnusable(_taken(name))
            what = f"adapter {name}"
            if response.status == REJECTED and generator.shape == ModelShape():
                what += ", generated for the demo model (for another base give --config)"
            await _accepted(response, what)

    async def remove(self, name: str) -> None:
        """Remove an adapter of ``registered``. Raises :class:`ServerUnusable`."""
        if self.peer == "vllm":
            answer = self.http.post("v1/unload_lora_adapter", json={"lora_name": name})
        else:
            answer = self.http.delete(f"v1/adapters/{name}")
        async with answer as response:
            if response.status != ABSENT:
                await _accepted(response, f"to remove {name}")
            elif name in self.unanswered:
                raise ServerUnusable("it is not there yet, but its registration had no answer and may still happen")
        self.registered.discard(name)


async def find_peer(http: aiohttp.ClientSession, name: PeerName, base: str | None) -> tuple[Peer, set[str]]:
    """Return the server as a peer, and the names of its adapters.

    Raises :class:`ServerUnusable`, and :class:`BadOption` if the server is not of the kind ``name`` or has no base
    ``base``.
    """
    models = (await _get(http, "v1/models", _ModelList, name)).data
    bases = [model.id for model in models if model.parent is None]
    if base is not None and bases and name != "llamacpp" and base not in bases:  # llama.cpp takes any name
        raise BadOption(f"--base: the server has no base `{base}`; it has {', '.join(bases)}")
    if base is None and not bases:
        raise ServerUnusable("/v1/models lists no base; name it with --base")
    base = base or bases[0]
    adapters = {model.id for model in models} - {base}
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
async def registered_adapters(
    registrar: AdapterRegistrar, has: set[str], count: int, display: Display
) -> AsyncIterator[list[str]]:
    """Have the first ``count`` adapters of the benchmark on the server; at the end remove those that were registered.

    ``has`` are the adapters that the server has. Gives a list that is filled at the end: a line for each adapter that
    could not be removed. Raises :class:`ServerUnusable`.
    """
    left: list[str] = []
    names = [adapter_name(number) for number in range(count)]
    given_at_start = registrar.peer == "llamacpp" or (registrar.peer == "vllm" and registrar.setup.folder is None)
    if registrar.setup.present or given_at_start:
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
    """Return the result of ``work``, which is not cancelled by a first cancellation of this task, only by a second."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling() > 1:
            work.cancel()
        with suppress(asyncio.CancelledError):
            await work
        raise


async def _remove_all(registrar: AdapterRegistrar, tick: Tick) -> list[str]:
    """Remove all registered adapters, within a time limit. Returns a line for each that could not be removed."""
    names = sorted(registrar.registered)
    seconds = END_SECONDS + REMOVAL_SECONDS * len(names)
    reasons = dict.fromkeys(names, f"the server took more than {seconds:.0f} s")
    free = asyncio.Semaphore(CONCURRENCY)

    async def remove(name: str) -> None:
        async with free:
            try:
                await registrar.remove(name)
            except (ServerUnusable, aiohttp.ClientError, OSError) as error:
                reasons[name] = str(error) if isinstance(error, ServerUnusable) else error_text.connection_error(error)
        tick()

    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await asyncio.gather(*map(remove, names))
    return [f"{name} was not removed: {reasons[name]}" for name in sorted(registrar.registered)]


async def _register_all(registrar: AdapterRegistrar, count: int, tick: Tick) -> None:
    """Register ``count`` adapters, several at a time, until one fails.

    On cancellation, registrations in flight get END_SECONDS to end: a server may complete one after the client has
    disconnected, and then removing it now would be too early.
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

    working = asyncio.gather(*(work() for _ in range(CONCURRENCY)))
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
    """Return the JSON of ``/path``. Raises :class:`BadOption` if it has not the form of this kind of server."""
    async with http.get(path) as response:
        if response.status == ABSENT:
            raise BadOption(
                f"--url, --peer: this is not a {peer} server: it has no /{path}; give --url without that path"
            )
        await _accepted(response, f"/{path}")
        content = await response.read()
    try:
        return TypeAdapter(form).validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        said = f"{pydantic_errors.path(first) or 'it'} {pydantic_errors.message(first)}"
        raise BadOption(f"--url, --peer: this is not a {peer} server: unexpected answer of /{path}: {said}") from None


async def _accepted(response: aiohttp.ClientResponse, what: str) -> None:
    """Raise :class:`ServerUnusable` unless the status is a success. ``what`` was asked for."""
    if response.ok:
        return
    said = error_text.status_error(response.status, await response.text(errors="replace"))
    if response.status in FORBIDDEN:
        sent = "Authorization" in response.request_info.headers
        advice = "it does not accept this API key" if sent else "give its API key with --api-key or in MANYLORA_API_KEY"
        raise ServerUnusable(f"the server denies access ({said}): {advice}")
    if response.status >= BROKEN:
        raise ServerUnusable(f"the server, or a proxy in front of it, fails ({what}: {said}); see its log")
    raise ServerUnusable(f"the server refused {what}: {said}")


def _taken(name: str) -> str:
    return f"the server already has an adapter {name}: use it with --registered, or remove it"


def _missing(names: Sequence[str], registrar: AdapterRegistrar) -> str:
    how = {
        "manylora": "leave out --registered to have them generated",
        "vllm": "start it with --lora-modules, or with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and give --adapter-folder",
        "llamacpp": "start it with --lora and files of `python -m loadtests.workload.adapters --gguf`",
    }[registrar.peer]
    return f"the server lacks {len(names)} adapters, e.g. {names[0]}: {how}"
