"""Tables and remarks of a record."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from loadtests.report.record import Record, WorkRecord

HEADER = (
    "workload", "req/s", "output tok/s", "spread", "first text ms", "per token ms", "between texts ms", "end to end ms",
    "fairness", "failed",
)  # fmt: skip
NOTE = "latencies are p50 / p95 / p99"
SEVERAL = 1.05
"""Tokens per event above which a remark says that the time between texts is not that between tokens."""
BUSY = 0.5
"""CPUs of the client above which a remark says that the client may limit the result."""
LATE_MS = 50.0
"""Delay of requests in an open loop above which the report has a remark."""


def table(record: Record) -> list[Sequence[str]]:
    """Return the header and a row for each workload."""
    return [HEADER, *(_row(work) for work in record["workloads"])]


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return a table for a terminal, the first column left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    header, *rows = lines
    ruled = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled)


def printed(lines: Sequence[Sequence[str]], form: Literal["plain", "markdown"]) -> str:
    """Return a table in the format of ``--table``."""
    return markdown(lines) if form == "markdown" else aligned(lines)


def remarks(record: Record) -> list[str]:
    """Return what limits the metrics of a run, a line each: failures, cached prompts, a client that was too slow."""
    lines = list(record["server"].get("left_behind", ()))
    for work in record["workloads"]:
        lines += [f"{work['name']}: {line}" for line in _remarks(work)]
    return lines


def threshold_line(checked: Mapping[str, Any]) -> str:
    """Return a line about a threshold of a record."""
    outcome = "met" if checked["met"] else "MISSED"
    return f"{checked['work']}: {number(checked['value'])}: {outcome}: fail if {checked['threshold']}"


def number(value: float | None, digits: int = 3) -> str:
    """Return a value with about ``digits`` significant digits; `-` if it was not measured."""
    if value is None or math.isnan(value):
        return "-"
    decimals = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(decimals, 0)}f}"


def share(value: float | None) -> str:
    """Return a value as a percentage; `-` if it was not measured."""
    return "-" if value is None else f"{value:.0%}"


def counted(number: int, what: str) -> str:
    """Return ``"1 request"``, ``"2 requests"``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def percentiles(metrics: Mapping[str, Any], name: str) -> str:
    """Return the p50, p95 and p99 of a latency, as ``"331 / 849 / 901"``."""
    return " / ".join(number(metrics[f"{name}_p{percent}_ms"]) for percent in (50, 95, 99))


def _row(work: WorkRecord) -> list[str]:
    metrics, spread = work["figures"], work["spread"]["output_tokens_per_s"]
    return [
        work["name"],
        number(metrics["requests_per_s"]),
        number(metrics["output_tokens_per_s"]),
        share(spread),
        *(percentiles(metrics, name) for name in ("ttft", "tpot", "gap", "e2e")),
        number(metrics["fairness"]),
        f"{work['failed']} of {work['requests']}",
    ]


def _remarks(work: WorkRecord) -> list[str]:
    metrics = work["figures"]
    lines = [f"failed, {counted(times, 'time')}: {reason}" for reason, times in work["failures"].items()]
    if (tokens := metrics["tokens_per_event"]) and tokens > SEVERAL:
        lines.append(f"{tokens:.2f} tokens per event: the time between texts is not the time between tokens")
    if metrics["cached_tokens"]:
        lines.append(f"{metrics['cached_tokens']:.0f} prompt tokens of a round came from the server's prefix cache")
    if (busy := metrics["client_cpu"]) and busy > BUSY:
        lines.append(f"the client used {busy:.0%} of a CPU, so it may limit the result")
    if (late := metrics["late_p99_ms"]) and late > LATE_MS:
        lines.append(f"requests were sent late, p99 {late:.0f} ms, because the client could not keep up")
    if (asked := metrics["asked_rate"]) and (sent := metrics["sent_rate"]):
        lines.append(f"{asked:.3g} requests/s requested, {sent:.3g} sent, {metrics['requests_per_s']:.3g} answered")
        mean, most = number(metrics["in_flight_mean"]), number(metrics["in_flight_most"])
        lines.append(f"{mean} requests in flight on average, {most} at most")
    if cold := work["wanted"] - work["warmed"]:
        lines.append(f"{cold} of {work['wanted']} adapters were not warmed up, so their first requests were cold")
    if work["adapters"] and metrics["fairness"] is not None:
        worst = work["adapters"][0]
        speed = number(worst["speed"])
        lines.append(f"slowest adapter {worst['adapter']}, {speed} tok/s in {counted(worst['requests'], 'request')}")
    return lines
