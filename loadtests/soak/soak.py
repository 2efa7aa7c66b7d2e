"""Runs a soak: solo answers, clients of every kind, samples, and what must hold at the end."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx2

from loadtests.drive.progress import Display
from loadtests.errors import BenchError, ServerUnusable
from loadtests.soak.asking import Asking
from loadtests.soak.caller import Caller
from loadtests.soak.changing import Changing
from loadtests.soak.ledger import Ledger
from loadtests.soak.settings import Kind, SoakSettings
from loadtests.soak.verdict import BACK_TO_ZERO, Growth, growth, left_over, violations
from loadtests.soak.watch import MIB, Sample, Watch
from loadtests.soak.world import ALIASES, CHURNED, FIXED, World
from loadtests.workload.adapters import AdapterGenerator, ModelShape

SAY_SECONDS = 10.0
"""Time between two lines of progress."""
PAGE = 500
"""Adapters that are listed at once."""
PAUSE_SECONDS = 0.5
"""Pause of a client that was told that the server has too much to do."""

Deed = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a soak."""

    seconds: float
    ledger: Ledger
    samples: Sequence[Sample]
    """From the first, of the server before the soak, to the last, after it."""
    warm_up: float
    """When memory had to be flat from, in seconds of the samples."""
    growth: Growth | None
    left_out: int


@dataclass(slots=True)
class Soak:
    """A soak of the server at ``url``."""

    settings: SoakSettings
    url: str
    pid: int | None
    display: Display
    own: bool
    """Whether the server was started for the soak, so that keys may be made for it."""
    ledger: Ledger = field(default_factory=Ledger)

    async def run(self) -> Outcome:
        """Run the soak and remove what it registered. Raises ServerUnusable if the server cannot be used at all."""
        key = self.settings.api_key
        headers = {} if key is None else {"authorization": f"Bearer {key.get_secret_value()}"}
        caller = Caller(self.url.rstrip("/"), self.ledger, headers)
        config = self.settings.config
        shape = ModelShape() if config is None else ModelShape.read(config)
        generator = AdapterGenerator(shape, self.settings.seed, self.settings.ranks)
        world = World(generator, self.settings.contents, self.settings.answer_tokens)
        watch = Watch(caller, self.pid)
        try:
            empty = await watch.sample()
            self.display.say(f"asking {self.settings.contents} adapters and the base alone ...")
            try:
                await world.prepare(caller)
                with_keys = await self._keys(caller)
                return await self._load(caller, world, watch, empty, with_keys)
            finally:
                with suppress(httpx2.TransportError):  # a server that has ended: that is known, or raised already
                    await _clean(caller)
        finally:
            await caller.http.aclose()

    async def _keys(self, caller: Caller) -> bool:
        """Return whether keys may come and go; make the first one for a server of our own."""
        response = await caller.http.get("/v1/keys")
        if response.status_code != httpx2.codes.OK:
            self.display.say("no keys come and go: the server has no /v1/keys, or not for this key")
            return False
        if self.settings.api_key is None:
            if not self.own:
                self.display.say("no keys come and go: the first one would lock others out; give an admin's --api-key")
                return False
            made = await caller.http.post("/v1/keys", json={"name": "soak-admin", "scopes": ["admin"]})
            caller.headers = {"authorization": f"Bearer {made.json()['secret']}"}
            caller.http.headers.update(caller.headers)
        return True

    async def _load(self, caller: Caller, world: World, watch: Watch, empty: Sample, with_keys: bool) -> Outcome:
        before = await watch.sample()
        began = time.monotonic()
        until = began + 60 * self.settings.minutes
        self.display.say(f"{self.settings.clients} clients for {self.settings.minutes:g} minutes ...")
        warm_up = before.at + 60 * self.settings.minutes * self.settings.warm_up
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._watch(watch, until))
                for number in range(self.settings.clients):
                    rng = random.Random(f"{self.settings.seed}/{number}")
                    group.create_task(self._client(caller, world, rng, until, with_keys))
        except* BenchError as errors:
            self.ledger.violate(str(errors.exceptions[0]))
        seconds = time.monotonic() - began
        loaded = watch.samples[2:]
        grown = growth(loaded, warm_up)
        try:
            after = await self._idle(watch)
            for reason in violations(self.settings, before, loaded, after, grown):
                self.ledger.violate(reason)
            await self._ask_all_again(caller, world)
            await _clean(caller)
            for reason in left_over(empty, await self._removed(watch, empty)):
                self.ledger.violate(reason)
        except (ServerUnusable, httpx2.TransportError) as error:
            self.ledger.violate(f"after the load: {type(error).__name__}: {error}")
        return Outcome(seconds, self.ledger, watch.samples, warm_up, grown, world.left_out)

    async def _client(self, caller: Caller, world: World, rng: random.Random, until: float, with_keys: bool) -> None:
        """Do one thing after another until the time is over."""
        deeds = self._deeds(caller, world, rng, with_keys)
        while time.monotonic() < until:
            busy = self._refused()
            (deed,) = rng.choices(list(deeds), list(deeds.values()))
            try:
                await deed()
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                # An answer without what every answer has; the soak goes on to find what else there is.
                name = getattr(deed, "__name__", "a request")
                self.ledger.violate(f"{name}: an answer of another form: {type(error).__name__} {error}")
            if self._refused() > busy:
                await asyncio.sleep(PAUSE_SECONDS)

    def _deeds(self, caller: Caller, world: World, rng: random.Random, with_keys: bool) -> dict[Deed, float]:
        """Return what a client may do, each with its weight."""
        ask, change = Asking(caller, world, rng), Changing(caller, world, rng)
        deeds: dict[Kind, tuple[Deed, float]] = {
            "whole": (ask.whole, 8), "stream": (ask.streamed, 8), "chat": (ask.chat, 6),
            "structured": (ask.structured, 2), "vector": (ask.vector, 2), "leave": (ask.leaving, 4),
            "slow": (ask.reading_slowly, 1), "half": (ask.half_sent, 1), "register": (change.register, 3),
            "roll-back": (change.roll_back, 2), "delete": (change.delete, 2), "pin": (change.pin, 0.5),
            "set-alias": (change.set_alias, 1), "remove-alias": (change.remove_alias, 0.5), "read": (change.read, 1),
            "bad": (change.send_nonsense, 6), "key": (change.key_comes_and_goes, 1 if with_keys else 0),
        }  # fmt: skip
        return dict(deeds[kind] for kind in self.settings.only or deeds)

    def _refused(self) -> int:
        return sum(count for (_, outcome), count in self.ledger.done.items() if outcome == "429")

    async def _watch(self, watch: Watch, until: float) -> None:
        said = time.monotonic()
        while time.monotonic() < until:
            sample = await watch.sample()
            if time.monotonic() - said >= SAY_SECONDS:
                said = time.monotonic()
                self.display.say(self._progress(sample, until - said))
            await asyncio.sleep(min(self.settings.sample_seconds, max(until - time.monotonic(), 0)))

    def _progress(self, sample: Sample, left: float) -> str:
        held = sample["resident_bytes"]
        memory = "" if held is None else f", {held / MIB:,.0f} MiB resident"
        wrong = f", {self.ledger.violations} VIOLATIONS" if self.ledger.violations else ""
        queue = f"{sample['running'] or 0:.0f} running, {sample['waiting'] or 0:.0f} waiting"
        return (
            f"{left / 60:.1f} minutes left: {self.ledger.requests:,} requests, {self.ledger.compared:,} answers "
            f"compared, {queue}{memory}{wrong}"
        )

    async def _idle(self, watch: Watch) -> Sample:
        """Return a sample of the idle server, or the last one before its time is over."""
        deadline = time.monotonic() + self.settings.idle_seconds
        while True:
            sample = await watch.sample()
            held = any(sample[name] for name in BACK_TO_ZERO)
            if not held and not violations(self.settings, watch.samples[1], [], sample, None):
                return sample
            if time.monotonic() > deadline:
                return sample
            await asyncio.sleep(1)

    async def _ask_all_again(self, caller: Caller, world: World) -> None:
        """Ask everything once more, alone: after the load each answer must still be the same."""
        rng = random.Random(self.settings.seed)
        asking = Asking(caller, world, rng)
        for prompt in sorted({prompt for _, prompt in world.answers}):
            for name in (None, *(f"{FIXED}{number}" for number in range(world.contents))):
                await asking.again(prompt, name)

    async def _removed(self, watch: Watch, empty: Sample) -> Sample:
        """Return a sample once the soak's adapters are gone, bytes included; or the last one in time."""
        deadline = time.monotonic() + self.settings.idle_seconds
        while True:
            sample = await watch.sample()
            if not left_over(empty, sample) or time.monotonic() > deadline:
                return sample
            await asyncio.sleep(1)


async def _clean(caller: Caller) -> None:
    """Remove what the soak registered."""
    for name in ALIASES:
        await caller.http.delete(f"/v1/aliases/{name}")
    for name in await _registered(caller):
        if name in CHURNED or name.startswith(FIXED):
            await caller.http.delete(f"/v1/adapters/{name}")


async def _registered(caller: Caller) -> list[str]:
    """Return the names of all adapters, page by page."""
    names: list[str] = []
    more = True
    while more:
        after = {"after": names[-1]} if names else {}
        page: dict[str, Any] = (await caller.http.get("/v1/adapters", params={"limit": PAGE, **after})).json()
        names += [adapter["id"] for adapter in page["data"]]
        more = page["has_more"]
    return names


def by_kind(done: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Return how often each outcome was had, by kind of request."""
    kinds: dict[str, dict[str, int]] = {}
    for (kind, outcome), count in sorted(done.items()):
        kinds.setdefault(kind, {})[outcome] = count
    return kinds
