"""Clients that ask for answers: whole, streamed, structured, as vectors; that leave early, or read slowly."""

import asyncio
import json
import random
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2

from loadtests.drive.streams import Json
from loadtests.soak.caller import Caller
from loadtests.soak.world import ALIASES, CHURNED, FIXED, MOST_PROMPTS, PROMPTS, World, cosine
from loadtests.workload.workload import words

NEAR = 0.999
"""Least cosine of two embeddings of one text: beside others, their sums may be rounded in another order on a GPU."""
SLOW_BYTES, SLOW_SECONDS, SLOW_PAUSES = 256, 0.05, 60
"""A slow reader reads so much, then waits so long, so often; then it reads the rest."""
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome", "Oslo"]}, "count": {"type": "integer", "maximum": 99}},
    "required": ["city", "count"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class Asking:
    """The requests for answers of one client."""

    caller: Caller
    world: World
    rng: random.Random

    def _prompt(self) -> str:
        return self.rng.choice(PROMPTS[:MOST_PROMPTS])

    def name(self) -> tuple[str | None, tuple[int, ...]]:
        """Return an adapter to ask, and the statuses that may come: others may have deleted it."""
        gone = (200, 404)
        churned = self.rng.choice(CHURNED)
        kinds: Sequence[tuple[str | None, tuple[int, ...]]] = (
            (None, (200,)),
            (f"{FIXED}{self.rng.randrange(self.world.contents)}", (200,)),
            (churned, gone),
            (f"{churned}@{self.rng.randint(1, 9)}", gone),
            (self.rng.choice(ALIASES), gone),
        )
        return self.rng.choices(kinds, (1, 4, 3, 1, 2))[0]

    async def whole(self) -> None:
        """Ask for a whole answer, and compare it with its solo run."""
        prompt, (name, allowed) = self._prompt(), self.name()
        body = self.world.question(prompt, name)
        status, answer = await self.caller.call("whole", "POST", "/v1/completions", allowed, json=body)
        if status == httpx2.codes.OK:
            self._compare("whole", prompt, [answer])

    async def streamed(self) -> None:
        """Ask for a stream, and compare its text with its solo run."""
        prompt, (name, allowed) = self._prompt(), self.name()
        async with self.caller.stream("stream", "/v1/completions", self.world.question(prompt, name), allowed) as got:
            if got is not None:
                self._compare("stream", prompt, [event async for event in got])

    async def again(self, prompt: str, name: str | None) -> None:
        """Ask for one answer of a fixed adapter, and compare it with its solo run."""
        body = self.world.question(prompt, name)
        status, answer = await self.caller.call("again, alone", "POST", "/v1/completions", json=body)
        if status == httpx2.codes.OK:
            self._compare("again, alone", prompt, [answer])

    def _compare(self, kind: str, prompt: str, events: Sequence[Json]) -> None:
        served = events[0]["adapter"]
        if any(event["adapter"] != served for event in events):
            self.caller.ledger.violate(f"{kind}: the adapter changed within one answer, from {served}")
        text = "".join(choice["text"] for event in events for choice in event["choices"])
        self.caller.ledger.compared += self.world.comparable(prompt, served)
        if (wrong := self.world.wrong(prompt, served, text)) is not None:
            self.caller.ledger.violate(f"{kind}: {wrong}")

    async def chat(self) -> None:
        """Ask for several sampled choices to a prompt that no cache knows."""
        name, allowed = self.name()
        body: Json = {
            "messages": [{"role": "user", "content": words(self.rng, self.rng.randint(4, 120))}],
            "max_tokens": self.rng.randint(1, 48),
            "n": self.rng.randint(1, 3),
            "temperature": 1,
            **({} if name is None else {"adapter": name}),
        }
        if self.rng.random() < 0.5:
            async with self.caller.stream("chat stream", "/v1/chat/completions", body, allowed) as got:
                if got is not None:
                    async for _ in got:
                        pass
            return
        status, answer = await self.caller.call("chat", "POST", "/v1/chat/completions", allowed, json=body)
        if status == httpx2.codes.OK and len(answer["choices"]) != body["n"]:
            self.caller.ledger.violate(f"chat: {len(answer['choices'])} choices instead of {body['n']}")

    async def structured(self) -> None:
        """Ask for JSON of a schema."""
        schema = SCHEMA if self.rng.random() < 0.7 else _new_schema(self.rng)
        body: Json = {
            "messages": [{"role": "user", "content": f"A city and a number, please: {words(self.rng, 3)}"}],
            "max_tokens": 64,
            "response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
        }
        status, answer = await self.caller.call("structured", "POST", "/v1/chat/completions", json=body)
        if status != httpx2.codes.OK or answer["choices"][0]["finish_reason"] != "stop":
            return
        try:
            found = json.loads(answer["choices"][0]["message"]["content"])
            right = set(found) == set(schema["required"])
        except (ValueError, TypeError):
            right = False
        if not right:
            self.caller.ledger.violate(f"structured: not of its schema: {answer['choices'][0]['message']['content']!r}")

    async def vector(self) -> None:
        """Ask for an embedding, and compare it with its solo run."""
        prompt = self._prompt()
        status, answer = await self.caller.call("embedding", "POST", "/v1/embeddings", json={"input": prompt})
        if status == httpx2.codes.OK and (alone := self.world.vectors.get(prompt)):
            self.caller.ledger.compared += 1
            if (near := cosine(answer["data"][0]["embedding"], alone)) < NEAR:
                self.caller.ledger.violate(f"embedding: cosine {near:.4f} with the solo run of {prompt!r}")

    async def leaving(self) -> None:
        """Leave at a random moment: before the first text, within a stream, or before a whole answer."""
        name, _ = self.name()
        body = {**self.world.question(self._prompt(), name), "max_tokens": 64, "stream": self.rng.random() < 0.7}
        http = self.caller.new_client()
        try:
            async with asyncio.timeout(self.rng.random() ** 2 * 3):
                await http.post("/v1/completions", json=body)
            self.caller.ledger.count("leaving", "stayed")
        except TimeoutError:
            self.caller.ledger.count("leaving", "left")
        except httpx2.TransportError as error:
            self.caller.lost("leaving", "/v1/completions", error)
        finally:
            await http.aclose()

    async def reading_slowly(self) -> None:
        """Ask for a stream over a socket with a small buffer, and read it in small bites with pauses."""
        body = json.dumps({**self.world.question(self._prompt(), None), "max_tokens": 64, "stream": True})
        reader, writer = await self._connect()
        try:
            writer.write(self._head("/v1/completions", len(body)) + body.encode())
            received = b""
            for _ in range(SLOW_PAUSES):
                bite = await reader.read(SLOW_BYTES)
                received += bite
                if not bite:
                    break
                await asyncio.sleep(SLOW_SECONDS)
            received += await reader.read()
        except OSError as error:
            self.caller.lost("slow reader", "/v1/completions", error)
            return
        finally:
            writer.close()
        head, _, text = received.partition(b"\r\n\r\n")
        status = int(head[9:12]) if head[9:12].isdigit() else 0
        self.caller.check("slow reader", "/v1/completions", status, text.decode(errors="replace"), (200,))
        if status == httpx2.codes.OK and b"[DONE]" not in text:
            self.caller.ledger.violate("slow reader: its stream ended without [DONE]")

    async def half_sent(self) -> None:
        """Send a part of a request, or nonsense, and go away."""
        try:
            _, writer = await self._connect()
            whole = self._head("/v1/completions", 1000) + b'{"prompt": "' + b"x" * 500
            what = whole[: self.rng.randint(1, len(whole))] if self.rng.random() < 0.8 else self.rng.randbytes(300)
            writer.write(what)
            await asyncio.sleep(self.rng.random())
            writer.close()
        except OSError as error:
            self.caller.lost("half sent", "/v1/completions", error)
            return
        self.caller.ledger.count("half sent", "left")

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        address = urlsplit(self.caller.url)
        raw = socket.socket()
        raw.setblocking(False)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        try:
            await asyncio.get_running_loop().sock_connect(raw, (address.hostname, address.port or 80))
        except OSError:
            raw.close()
            raise
        return await asyncio.open_connection(sock=raw, limit=4096)

    def _head(self, path: str, length: int) -> bytes:
        lines = [f"POST {path} HTTP/1.1", f"host: {urlsplit(self.caller.url).netloc}", "connection: close"]
        lines += ["content-type: application/json", f"content-length: {length}"]
        lines += [f"{name}: {value}" for name, value in self.caller.headers.items()]
        return "\r\n".join([*lines, "", ""]).encode()


def _new_schema(rng: random.Random) -> dict[str, Any]:
    """Return a schema that no cache of grammars knows."""
    name = f"field_{rng.randrange(10**9)}"
    return {**SCHEMA, "properties": {name: {"type": "boolean"}}, "required": [name]}
