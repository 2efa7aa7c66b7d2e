"""What a soak found: a summary for the terminal, a record, a plot of memory over time."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtests.machine import client_machine, client_version
from loadtests.report.table import aligned
from loadtests.soak.settings import SoakSettings
from loadtests.soak.soak import Outcome, by_kind
from loadtests.soak.watch import MIB

WATCHED = (
    "resident_bytes", "children_bytes", "files", "threads", "running", "waiting", "kv_blocks", "device_adapters",
    "host_adapters", "adapters", "adapter_versions",
)  # fmt: skip


def summary(outcome: Outcome) -> str:
    """Return tables of requests and of what was watched, and the violations."""
    ledger = outcome.ledger
    requests = [("request", "outcomes")]
    for kind, outcomes in by_kind(ledger.done).items():
        requests.append((kind, "  ".join(f"{name}: {count:,}" for name, count in outcomes.items())))
    width = max(len(kind) for kind, _ in requests)
    lines = [f"{kind:<{width}}  {outcomes}" for kind, outcomes in requests]
    lines += ["", aligned(_watched(outcome)), "", *_sentences(outcome)]
    return "\n".join(lines)


def record(settings: SoakSettings, outcome: Outcome) -> dict[str, Any]:
    """Return everything as JSON."""
    grown = outcome.growth
    return {
        "version": client_version(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": client_machine(),
        "settings": settings.model_dump(mode="json", exclude={"url", "api_key", "spawn"}),
        "seconds": outcome.seconds,
        "requests": outcome.ledger.requests,
        "outcomes": by_kind(outcome.ledger.done),
        "compared": outcome.ledger.compared,
        "left_out": outcome.left_out,
        "growth": grown and {"mib": grown.mib, "mib_per_hour": grown.mib_per_hour, "resident_mib": grown.resident_mib},
        "violations": outcome.ledger.violations,
        "reasons": outcome.ledger.reasons,
        "samples": [{"at": sample.at, **sample.values} for sample in outcome.samples],
    }


def draw_memory(outcome: Outcome, file: Path) -> None:
    """Draw resident memory, and the requests that ran, over time. Needs the extra ``bench``."""
    from matplotlib.figure import Figure

    known = [sample for sample in outcome.samples if sample["resident_bytes"] is not None]
    minutes = [sample.at / 60 for sample in known]
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(minutes, [(sample["resident_bytes"] or 0) / MIB for sample in known], label="server")
    axes.plot(minutes, [(sample["children_bytes"] or 0) / MIB for sample in known], label="its children")
    axes.axvline(outcome.warm_up / 60, color="grey", linestyle=":", label="end of warm-up")
    axes.set_xlabel("minutes")
    axes.set_ylabel("resident memory, MiB")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(file)


def _watched(outcome: Outcome) -> Sequence[Sequence[str]]:
    samples = outcome.samples
    rows: list[Sequence[str]] = [("watched", "before", "after warm-up", "most", "last")]
    warm = next((sample for sample in samples if sample.at >= outcome.warm_up), samples[-1])
    for name in WATCHED:
        values = [value for sample in samples if (value := sample[name]) is not None]
        if values:
            shown = (samples[0][name], warm[name], max(values), samples[-1][name])
            label = f"{name.removesuffix('_bytes')}, MiB" if name.endswith("_bytes") else name.replace("_", " ")
            rows.append((label, *(_value(name, value) for value in shown)))
    return rows


def _value(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value / MIB:,.0f}" if name.endswith("_bytes") else f"{value:,.0f}"


def _sentences(outcome: Outcome) -> list[str]:
    ledger, grown = outcome.ledger, outcome.growth
    lines = [
        f"{ledger.requests:,} requests in {outcome.seconds / 60:.1f} minutes; {ledger.compared:,} answers compared "
        f"with their solo runs ({outcome.left_out} questions were left out: two tokens nearly as likely)"
    ]
    if grown is None:
        lines.append("memory: too few samples after the warm-up to say anything")
    else:
        lines.append(
            f"memory: {grown.mib:+.1f} MiB after the warm-up, {grown.mib_per_hour:+.1f} MiB an hour, "
            f"{grown.resident_mib:,.0f} MiB at the end"
        )
    if not ledger.violations:
        return [*lines, "nothing was violated"]
    more = ledger.violations - len(ledger.reasons)
    return [*lines, f"VIOLATED {ledger.violations} times:", *(f"  {reason}" for reason in ledger.reasons)] + (
        [f"  ... and {more} more"] if more else []
    )
