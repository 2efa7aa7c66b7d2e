"""Measures what a flood of one API key does to another one's time to first text: ``python -m loadtests.flood --help``.

In each round one client sends requests one after the other with ``--key``: first alone, then while ``--concurrency``
clients with ``--flood-key`` send theirs without a pause. Prompts are random, so that no prefix is cached. Without keys,
both are one tenant: a comparison of what fairness gains.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import aiohttp

OK = 200
SETTLE = 3.0
"""Seconds after the beginning of a flood before it is measured."""


@dataclass(frozen=True)
class Client:
    """What one side sends."""

    http: aiohttp.ClientSession
    key: str | None
    adapter: str | None
    words: int
    max_tokens: int

    async def first_text(self) -> float:
        """Send a request and read its answer. Returns the seconds to its first text."""
        prompt = " ".join(str(random.randrange(10, 100)) for _ in range(self.words))
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": self.max_tokens, "ignore_eos": True, "stream": True}
        if self.adapter:
            body["adapter"] = self.adapter
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        started, first = time.perf_counter(), None
        async with self.http.post("/v1/completions", json=body, headers=headers) as response:
            if response.status != OK:
                raise SystemExit(f"status {response.status}: {(await response.text())[:300]}")
            async for line in response.content:
                if line.startswith(b"data: {") and first is None:
                    first = time.perf_counter() - started
        if first is None:
            raise SystemExit("an answer without text")
        return first


@asynccontextmanager
async def flooded(client: Client, concurrency: int) -> AsyncIterator[None]:
    """Send requests of ``client`` all the time."""

    async def send() -> None:
        while True:
            await client.first_text()

    tasks = [asyncio.create_task(send()) for _ in range(concurrency)]
    try:
        await asyncio.sleep(SETTLE)
        yield
        for task in tasks:
            if task.done():
                task.result()  # raises
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task


async def measure(args: argparse.Namespace) -> Mapping[str, Any]:
    """Return the times to first text in milliseconds, alone and in the flood."""
    times: dict[str, list[float]] = {"alone": [], "flood": []}
    timeout = aiohttp.ClientTimeout(total=None, sock_read=300)
    async with aiohttp.ClientSession(
        args.url, timeout=timeout, connector=aiohttp.TCPConnector(limit=0), trust_env=False
    ) as http:
        light = Client(http, args.key, args.adapter, args.words, 8)
        flood = Client(http, args.flood_key, args.flood_adapter, args.flood_words, args.flood_tokens)
        for _ in range(args.rounds):
            times["alone"] += [await light.first_text() for _ in range(args.requests)]
            async with flooded(flood, args.concurrency):
                times["flood"] += [await light.first_text() for _ in range(args.requests)]
            await asyncio.sleep(1)
    figures = {
        name: {"p50_ms": median(seconds) * 1000, "p95_ms": quantiles(seconds, n=20)[-1] * 1000}
        for name, seconds in times.items()
    }
    return {**figures, "ratio_p50": median(times["flood"]) / median(times["alone"]), "options": vars(args)}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.flood",
        description="Measure what one key's flood does to another one.",
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", help="API key of the client that is measured")
    parser.add_argument("--flood-key", help="API key of the flood")
    parser.add_argument("--adapter", help="of the client that is measured; default: the base")
    parser.add_argument("--flood-adapter", help="of the flood; default: the base")
    parser.add_argument("--words", type=int, default=80, help="numbers in a prompt of the client, some 3 tokens each")
    parser.add_argument("--flood-words", type=int, default=40)
    parser.add_argument("--flood-tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--concurrency", type=int, default=64, help="streams of the flood")
    parser.add_argument("--requests", type=int, default=8, help="of the client, in each half of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    out = args.json
    del args.json
    figures = asyncio.run(measure(args))
    for name in ("alone", "flood"):
        print(f"{name}: first text p50 {figures[name]['p50_ms']:.0f} ms, p95 {figures[name]['p95_ms']:.0f} ms")
    shown = {**figures, "options": {k: v for k, v in figures["options"].items() if not k.endswith("key")}}
    print(f"ratio of the medians: {figures['ratio_p50']:.2f}")
    if out:
        out.write_text(json.dumps(shown, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
