"""Records -> tables."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from loadtests.report.record import Record, WorkRecord

HEADER = (
    "work", "req/s", "output tok/s", "spread", "first text ms", "per token ms", "between texts ms", "end to end ms",
    "fairness", "failed",
)  # fmt: skip
NOTE = "latencies are p50 / p95 / p99"
SEVERAL = 1.05
"""Tokens of an event from which on the time between texts is not that between tokens."""
BUSY = 0.5
"""Processors the client keeps busy from which on it may be what is measured."""
LATE_MS = 50.0
"""How late a request may be sent in an open loop."""


def table(record: Record) -> list[Sequence[str]]:
    """The header and a row for each workload."""
    return [HEADER, *(_row(work) for work in record["workloads"])]


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """A table for a terminal, its first column to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """The same table for a page."""
    header, *rows = lines
    ruled = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled)


def printed(lines: Sequence[Sequence[str]], form: Literal["plain", "markdown"]) -> str:
    """As the option says."""
    return markdown(lines) if form == "markdown" else aligned(lines)


def remarks(record: Record) -> list[str]:
    """What a reader of the figures must know, a line each: failures, caches, a client that was too slow."""
    lines = list(record["server"].get("left_behind", ()))
    for work in record["workloads"]:
        lines += [f"{work['name']}: {line}" for line in _remarks(work)]
    return lines


def judged(verdict: Mapping[str, Any]) -> str:
    """One line on a threshold of a record."""
    outcome = "met" if verdict["met"] else "MISSED"
    return f"{verdict['work']}: {number(verdict['value'])}: {outcome}: fail if {verdict['threshold']}"


def number(value: float | None, digits: int = 3) -> str:
    """With about so many significant digits; `-` for what was not measured."""
    if value is None or math.isnan(value):
        return "-"
    decimals = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(decimals, 0)}f}"


def share(value: float | None) -> str:
    """As a percentage; `-` for what was not measured."""
    return "-" if value is None else f"{value:.0%}"


def counted(number: int, what: str) -> str:
    """``"1 request"``, ``"2 requests"``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def percentiles(figures: Mapping[str, Any], name: str) -> str:
    """``"331 / 849 / 901"``."""
    return " / ".join(number(figures[f"{name}_p{percent}_ms"]) for percent in (50, 95, 99))


def _row(work: WorkRecord) -> list[str]:
    figures, spread = work["figures"], work["spread"]["output_tokens_per_s"]
    return [
        work["name"],
        number(figures["requests_per_s"]),
        number(figures["output_tokens_per_s"]),
        share(spread),
        *(percentiles(figures, name) for name in ("ttft", "tpot", "gap", "e2e")),
        number(figures["fairness"]),
        f"{work['failed']} of {work['requests']}",
    ]


def _remarks(work: WorkRecord) -> list[str]:
    figures = work["figures"]
    lines = [f"failed, {counted(times, 'time')}: {reason}" for reason, times in work["failures"].items()]
    if (tokens := figures["tokens_per_event"]) and tokens > SEVERAL:
        lines.append(f"{tokens:.2f} tokens in a text: the time per token, not that between texts, speaks of tokens")
    if figures["cached_tokens"]:
        lines.append(f"{figures['cached_tokens']:.0f} prompt tokens of a round came from the server's prompt cache")
    if (busy := figures["client_cpu"]) and busy > BUSY:
        lines.append(f"the client itself kept {busy:.0%} of a processor busy")
    if (late := figures["late_p99_ms"]) and late > LATE_MS:
        lines.append(f"requests were sent late, p99 {late:.0f} ms: the client could not keep up")
    if (asked := figures["asked_rate"]) and (sent := figures["sent_rate"]):
        lines.append(f"{asked:.3g} requests/s asked for, {sent:.3g} sent, {figures['requests_per_s']:.3g} answered")
        mean, most = number(figures["in_flight_mean"]), number(figures["in_flight_most"])
        lines.append(f"{mean} requests under way on average, {most} at most")
    if cold := work["wanted"] - work["warmed"]:
        lines.append(f"{cold} of {work['wanted']} adapters were not asked for before: their first requests were cold")
    if work["adapters"] and figures["fairness"] is not None:
        worst = work["adapters"][0]
        speed = number(worst["speed"])
        lines.append(f"slowest adapter {worst['adapter']}, {speed} tok/s in {counted(worst['requests'], 'request')}")
    return lines
