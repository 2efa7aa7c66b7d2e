"""One frame of ``manylora top``: what a server does now, as rich's tables."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from adapters.cli.top.scrape import Change, Scrape
from bases.errors import one_line

Sort = Literal["requests", "tokens", "latency", "name"]
SORT_KEYS: Mapping[str, Sort] = {"r": "requests", "t": "tokens", "l": "latency", "n": "name"}
"""Key on the terminal -> the column by which adapters are sorted."""

NOTHING = "-"
SHARES = (0.5, 0.9, 0.99)
LATENCIES = {
    "in the queue": "manylora_queue_seconds",
    "waiting for an adapter": "manylora_adapter_wait_seconds",
    "first text": "manylora_time_to_first_token_seconds",
    "between tokens": "manylora_time_between_tokens_seconds",
    "end to end": "manylora_request_seconds",
}
SCRAPED = "/metrics"
BY_ADAPTER = "manylora_adapter_requests_total"
FIRST_TEXT = "manylora_adapter_time_to_first_token_seconds"


@dataclass(frozen=True, slots=True)
class Row:
    """What one adapter did. Rates are per second."""

    name: str
    requests: float
    failed: float
    """Requests with a status of 400 and above."""
    output_tokens: float
    prompt_tokens: float
    first_text: float | None
    """Mean, in seconds."""
    requests_in_all: float
    resident: bool


def frame(change: Change, url: str, sort: Sort, rows: int, trouble: str | None = None) -> RenderableType:
    """Return a frame. ``rows``: most adapters shown. ``trouble``: why there are no newer metrics."""
    now = change.now
    parts: list[RenderableType] = [_title(now, url, change.seconds)]
    if trouble is not None:
        parts.append(Text(one_line(trouble), style="bold red"))
    parts += [_server(change), _latencies(change), _adapters(change, sort, rows)]
    if missing := _missing(now):
        parts.append(Text(f"this server has no {', '.join(missing)}: shown as {NOTHING}", style="dim"))
    return Group(*parts)


def adapter_rows(change: Change) -> list[Row]:
    """Return a row for each adapter of which the server has series."""
    now = change.now
    requests = change.rate_by(BY_ADAPTER, "adapter")
    resident = {name.partition("@")[0] for name in (now.label("vllm:lora_requests_info", RESIDENT) or "").split(",")}
    output = change.rate_by("manylora_adapter_output_tokens_total", "adapter")
    prompt = change.rate_by("manylora_adapter_prompt_tokens_total", "adapter")
    in_all = now.by(BY_ADAPTER, "adapter")
    return [
        Row(
            name,
            rate,
            _failures(change, name),
            output.get(name, 0.0),
            prompt.get(name, 0.0),
            change.mean(FIRST_TEXT, adapter=name),
            in_all[name],
            name in resident,
        )
        for name, rate in requests.items()
    ]


RESIDENT = "running_lora_adapters"
_ORDER: Mapping[Sort, Callable[[Row], tuple[float, str]]] = {
    "requests": lambda row: (-row.requests, row.name),
    "tokens": lambda row: (-row.output_tokens, row.name),
    "latency": lambda row: (-(row.first_text or 0.0), row.name),
    "name": lambda row: (0.0, row.name),
}


def _failures(change: Change, name: str) -> float:
    statuses = {labels["status"] for labels, _ in change.now.series.get(BY_ADAPTER, ()) if "status" in labels}
    bad = (status for status in statuses if status >= "400")
    return sum(change.rate(BY_ADAPTER, adapter=name, status=status) or 0.0 for status in bad)


def _title(now: Scrape, url: str, seconds: float) -> Text:
    version, base = now.label("manylora_build_info", "version"), now.label("manylora_build_info", "base")
    said = " ".join(filter(None, ("manylora", version, "at", url))) + (f", base {base}" if base else "")
    title = Text(one_line(f"{said}; last {seconds:.0f} s"), style="bold")
    if now.value("manylora_healthy") == 0:
        title.append("  NOT HEALTHY", style="bold red")
    return title


def _server(change: Change) -> Table:
    """Return what the whole server does: a line each for requests, tokens, memory, adapters."""
    now, rate = change.now, change.rate
    table = _table("", "")
    table.show_header = False
    table.columns[1].justify = "left"
    requests = "manylora_http_requests_total"
    broken = {status for status in now.by(requests, "status") if status.startswith("5")}
    failing = sum(rate(requests, status=status) or 0.0 for status in broken) if now.has(requests) else None
    running, waiting = now.value("manylora_requests_running"), now.value("manylora_requests_waiting")
    all_requests = rate(requests)
    if all_requests is not None:
        all_requests -= rate(requests, route=SCRAPED) or 0.0  # this command's own, and Prometheus'
    said = f"{_number(all_requests)}/s, {_number(running)} running, {_number(waiting)} waiting"
    _line(table, "requests", f"{said}; 429: {_number(rate(requests, status='429'))}/s, 5xx: {_number(failing)}/s")
    prompt, cached = rate("manylora_computed_prompt_tokens_total"), rate("manylora_cached_prompt_tokens_total")
    said = f"{_number(rate('manylora_sampled_tokens_total'))}/s out, {_number(prompt)}/s in"
    steps = _number(rate("manylora_engine_steps_total"))
    _line(table, "tokens", f"{said}, {_percent(_ratio(cached, prompt))} of prompts cached; {steps} steps/s")
    used, blocks = now.value("manylora_kv_blocks_used"), now.value("manylora_kv_blocks")
    said = f"{_number(used)} of {_number(blocks)}, {_percent(_share(used, blocks))} used"
    said += f", {_number(now.value('manylora_kv_blocks_cached'))} cached"
    _line(table, "KV blocks", f"{said}; {_number(rate('manylora_preemptions_total'))} preemptions/s")
    slots, held = now.value("manylora_device_slots"), now.value("manylora_device_adapters")
    loads, evictions = rate("manylora_adapter_loads_total"), rate("manylora_adapter_evictions_total")
    said = f"{_number(held)} of {_number(slots)}; {_number(loads)} loads/s, {_number(evictions)} evictions/s"
    _line(table, "slots", f"{said}, {_milliseconds(change.mean('manylora_adapter_load_seconds'))} a load")
    size, most = now.value("manylora_host_cache_bytes"), now.value("manylora_host_cache_capacity_bytes")
    hits = _ratio(rate("manylora_host_cache_hits_total"), rate("manylora_host_cache_misses_total"))
    said = f"{_number(now.value('manylora_host_adapters'))} adapters, {_bytes(size)} of {_bytes(most)}"
    _line(table, "host cache", f"{said}, {_percent(hits)} hits")
    stored = _bytes(now.value("manylora_store_bytes"))
    _line(table, "registry", f"{_number(now.value('manylora_adapters'))} adapters, {stored}")
    return table


def _latencies(change: Change) -> Table:
    table = _table("latency, ms", *(f"p{share * 100:g}" for share in SHARES), "mean")
    for label, name in LATENCIES.items():
        quantiles = (_milliseconds(change.quantile(name, share), unit="") for share in SHARES)
        _line(table, label, *quantiles, _milliseconds(change.mean(name), unit=""))
    return table


def _adapters(change: Change, sort: Sort, most: int) -> RenderableType:
    if not change.now.has(BY_ADAPTER):
        return Text(f"by adapter: this server has no {BY_ADAPTER}", style="dim")
    rows = sorted(adapter_rows(change), key=_ORDER[sort])
    columns = ("adapter", "req/s", "failed/s", "out tok/s", "in tok/s", "first ms", "requests", "slot")
    table = _table(*(f"{column} ▼" if column.startswith(_SORTED[sort]) else column for column in columns))
    for row in rows[:most]:
        _line(
            table, row.name, _number(row.requests), _number(row.failed), _number(row.output_tokens),
            _number(row.prompt_tokens), _milliseconds(row.first_text, unit=""), _number(row.requests_in_all),
            "yes" if row.resident else "no",
        )  # fmt: skip
    if len(rows) > most:
        _line(table, f"... and {len(rows) - most} more", *[""] * 7)
    return table


_SORTED: Mapping[Sort, str] = {
    "requests": "req/s",
    "tokens": "out tok/s",
    "latency": "first ms",
    "name": "adapter",
}


def _missing(now: Scrape) -> list[str]:
    """Return the metrics of a frame that the server does not have."""
    shown = [
        *(f"{name}_count" for name in LATENCIES.values()), "manylora_device_slots", "manylora_kv_blocks_cached",
        "manylora_host_cache_bytes", "manylora_host_cache_hits_total", "manylora_adapter_load_seconds_count",
    ]  # fmt: skip
    return [name.removesuffix("_count") for name in shown if not now.has(name)]


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        # On a narrow terminal names are shortened, not figures.
        least = len(column) if index else None
        justify: Literal["right", "left"] = "right" if index else "left"
        table.add_column(column, justify=justify, no_wrap=True, header_style="bold", min_width=least)
    return table


def _line(table: Table, *cells: str) -> None:
    table.add_row(*(Text(one_line(cell)) for cell in cells))  # a name is no markup


def _number(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2g}"


def _bytes(value: float | None) -> str:
    return NOTHING if value is None else decimal(int(value))


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{share:.0%}"


def _milliseconds(seconds: float | None, unit: str = " ms") -> str:
    return NOTHING if seconds is None else f"{seconds * 1000:,.{1 if seconds < 0.1 else 0}f}{unit}"


def _share(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def _ratio(part: float | None, rest: float | None) -> float | None:
    return None if part is None or rest is None else _share(part, part + rest)
