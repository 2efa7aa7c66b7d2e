"""Benchmark a running server, or one it starts itself, over HTTP: ``python -m loadtests.run --help``.

Closed loop: each of N clients sends its next request when the last is answered. Every prompt is new, so no prompt cache
helps. Reported are output tokens per second, time to the first token and time between tokens as a client sees them.
"""

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import httpx

from loadtests import report
from loadtests.adapters import Geometry, write_adapters
from loadtests.client import RequestFailed, Target, Timing, complete
from loadtests.spawned import ServerDidNotStart, spawned
from loadtests.workload import CASES, Case, Plan, Request, Shape, requests

TIMEOUT = httpx.Timeout(300, connect=10)
WARM_UP_TOKENS = 16


def main() -> int:
    """Benchmark a server. Exit status: 0, 1 if a request failed, 2 if the server cannot be measured."""
    args = _arguments()
    plan = _plan(args)
    try:
        with _server(args) as (url, folder), _prepared(url, folder, plan, args) as target:
            rows = asyncio.run(_measure(url, target, plan))
    except (httpx.HTTPError, ServerDidNotStart) as error:
        _say(f"cannot measure this server: {error}")
        return 2
    return _report(rows, args)


@contextmanager
def _server(args: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """The server's URL and the folder to make adapters in."""
    if args.spawn is None:
        yield args.url, args.adapter_dir or Path()
        return
    with tempfile.TemporaryDirectory(prefix="loadtests-") as folder, spawned(args.spawn, Path(folder)) as url:
        yield url, Path(folder)


@contextmanager
def _prepared(url: str, folder: Path, plan: Plan, args: argparse.Namespace) -> Iterator[Target]:
    """The server with its adapters registered; they are removed again afterwards."""
    with httpx.Client(base_url=url, timeout=TIMEOUT, trust_env=False) as http:
        cards = http.get("/v1/models").raise_for_status().json()["data"]
        target = Target(args.peer, next(card["id"] for card in cards if card.get("parent") is None))
        _say(f"{url} serves `{target.base}`")
        if args.peer == "vllm":
            yield target
            return
        geometry = Geometry.read(args.config) if args.config else Geometry()
        _say(f"making and registering {plan.adapters} adapters")
        folders = write_adapters(folder.resolve(), geometry, plan.adapters, args.adapter_seed)
        try:
            _register(http, folders)
            yield target
        finally:
            for name in folders:
                http.delete(f"/v1/adapters/{name}")


def _register(http: httpx.Client, folders: Mapping[str, Path]) -> None:
    for name, folder in folders.items():
        answer = http.post("/v1/adapters", json={"name": name, "path": str(folder)})
        if answer.is_error:
            raise httpx.HTTPStatusError(f"adapter {name}: {answer.text}", request=answer.request, response=answer)


async def _measure(url: str, target: Target, plan: Plan) -> list[report.Figures]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits, trust_env=False) as http:
        return [
            await _measure_case(http, target, plan, case, clients)
            for case in plan.cases
            for clients in plan.concurrency
        ]


async def _measure_case(
    http: httpx.AsyncClient, target: Target, plan: Plan, case: Case, clients: int
) -> report.Figures:
    title = f"{case.title}, {clients} concurrent"
    _say(f"{title}: warm-up")
    tokens = min(plan.shape.output_tokens, WARM_UP_TOKENS)
    brief = replace(plan.shape, output_tokens=tokens, requests_at_least=case.adapters)
    warm_up = await _round(http, target, requests(case, brief, clients, f"{plan.seed}/warm-up"))
    rounds = []
    for repeat in range(plan.repeats):
        run = await _round(http, target, requests(case, plan.shape, clients, f"{plan.seed}/{repeat}"))
        rounds.append(run)
        _say(f"{title}: run {repeat + 1} of {plan.repeats}: {_summary(run)}")
    row = report.figures(case.title, clients, rounds)
    return replace(row, failures=row.failures + warm_up.failures, requests=row.requests + len(warm_up.failures))


async def _round(http: httpx.AsyncClient, target: Target, plans: Sequence[Sequence[Request]]) -> report.Round:
    timings: list[Timing] = []
    failures: list[str] = []
    total = sum(map(len, plans))

    async def client(plan: Sequence[Request]) -> None:
        for request in plan:
            try:
                timings.append(await complete(http, target, request))
            except RequestFailed as failure:
                failures.append(str(failure))
            _tick(len(timings) + len(failures), total)

    started = time.perf_counter()
    await asyncio.gather(*(client(plan) for plan in plans))
    return report.Round(time.perf_counter() - started, tuple(timings), tuple(failures))


def _report(rows: Sequence[report.Figures], args: argparse.Namespace) -> int:
    print(f"\n{report.aligned(rows)}\n\n{report.markdown(rows)}")
    if args.json:
        args.json.write_text(json.dumps(_record(rows, args), indent=2) + "\n")
    if cached := sum(row.cached_tokens for row in rows):
        _say(f"{cached} prompt tokens came from the server's prompt cache: use another --seed for figures to compare")
    failures = Counter(reason for row in rows for reason in row.failures)
    for reason, times in failures.most_common():
        _say(f"failed, {times} times: {reason}")
    return 1 if failures else 0


def _record(rows: Sequence[report.Figures], args: argparse.Namespace) -> dict[str, object]:
    return {
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "machine": {"system": platform.platform(), "cores": os.cpu_count()},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "figures": [asdict(row) for row in rows],
    }


def _summary(run: report.Round) -> str:
    failed = f"; {len(run.failures)} FAILED" if run.failures else ""
    return (
        f"{report.rate(run):.0f} tok/s, first {report.first_ms(run, 50):.0f}/{report.first_ms(run, 95):.0f} ms, "
        f"between {report.gap_ms(run, 50):.1f}/{report.gap_ms(run, 95):.1f} ms{failed}"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _tick(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"  {done} of {total} requests", end="\r" if done < total else "\n", file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.run", description=main.__doc__)
    server = parser.add_mutually_exclusive_group()
    server.add_argument("--url", default="http://127.0.0.1:8000", help="a running server (default: %(default)s)")
    server.add_argument("--spawn", metavar="COMMAND", help="start and stop it: 'manylora serve --threads 2'")
    parser.add_argument("--peer", choices=["manylora", "vllm"], default="manylora", help="how adapters are addressed")
    parser.add_argument(
        "--adapter-dir", type=Path, help="where to make the adapters: under the server's --adapter-root"
    )
    parser.add_argument("--adapter-seed", type=int, default=0)
    parser.add_argument("--config", type=Path, help="config.json of the base (default: the demo model's shape)")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["base", "single", "distinct"])
    parser.add_argument("--concurrency", nargs="+", type=_positive, default=[1, 16])
    parser.add_argument("--prompt-tokens", type=_positive, default=128, help="about, in words (default: %(default)s)")
    parser.add_argument("--output-tokens", type=_positive, default=64)
    parser.add_argument("--requests-per-client", type=_positive, default=2)
    parser.add_argument("--repeats", type=_positive, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts; a server that saw it may have them cached")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    if args.spawn and args.peer != "manylora":
        parser.error("--spawn starts manylora; start another server yourself and give its --url")
    if args.adapter_dir is None and args.spawn is None and args.peer == "manylora" and args.cases != ["base"]:
        parser.error("--adapter-dir is needed with --url: a folder under the server's --adapter-root")
    return args


def _plan(args: argparse.Namespace) -> Plan:
    return Plan(
        cases=tuple(CASES[name] for name in args.cases),
        concurrency=tuple(args.concurrency),
        shape=Shape(args.prompt_tokens, args.output_tokens, args.requests_per_client),
        repeats=args.repeats,
        seed=args.seed,
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1 (got {value})")
    return value


if __name__ == "__main__":
    sys.exit(main())
