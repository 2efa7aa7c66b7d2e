"""Records -> plots, as SVG to put into a page. matplotlib is loaded when the first is drawn."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loadtests.record import WorkRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 60
"""Points of a curve over time."""
MOST_ADAPTERS = 64
"""Bars in a plot: of more, the slowest and the quickest halves of so many."""

LEGEND_COLUMNS = 4
COLOURS = 10
"""In the default cycle; of more curves each has a colour from a scale."""
LINES = ("-", "--", "-.", ":")

Curves = Mapping[str, WorkRecord]
"""Label -> a workload of some run."""


def distributions(curves: Curves) -> str:
    """Cumulative distributions of three latencies over all requests, a curve for each workload."""
    figure = _figure(11, 3.0 + 0.2 * -(-len(curves) // LEGEND_COLUMNS))
    panels = {"ttft": "time to first text, ms", "tpot": "time per token, ms", "e2e": "end to end, ms"}
    for axes, (field, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for (label, work), style in zip(curves.items(), styles(len(curves)), strict=True):
            values = np.sort(_values(work, field)) * 1000
            axes.step(values, np.arange(1, len(values) + 1) / max(len(values), 1), where="post", label=label, **style)
        axes.set_xlabel(title)
        axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("share of requests")
    drawn = figure.axes[0].get_legend_handles_labels()
    figure.legend(*drawn, loc="outside lower center", ncols=LEGEND_COLUMNS, fontsize="small")
    return _svg(figure)


def styles(count: int) -> list[dict[str, Any]]:
    """A colour and a kind of line for each of ``count`` curves, no two alike."""
    from matplotlib import colormaps

    few = [f"C{index}" for index in range(min(count, COLOURS))]
    colours = few if count <= COLOURS else list(colormaps["turbo"](np.linspace(0, 1, count)))
    return [{"color": colour, "linestyle": LINES[index % len(LINES)]} for index, colour in enumerate(colours)]


def course(work: WorkRecord) -> str:
    """Of one workload: time to first text and throughput over time, and the adapters' speeds."""
    figure = _figure(11, 2.8)
    first, rate, adapters = figure.subplots(1, 3)
    for index, (run, style) in enumerate(zip(work["rounds"], styles(len(work["rounds"])), strict=True), 1):
        answered = [request for request in run["requests"] if "error" not in request]
        started = [request["started"] for request in answered]
        first.plot(started, [request["ttft"] * 1000 for request in answered], ".", color=style["color"])
        rate.plot(*throughput(answered, run["seconds"]), label=f"round {index}", **style)
        for request in run["requests"]:
            if "error" in request:
                first.axvline(request["started"], color="red", alpha=0.4)
    first.set_ylabel("time to first text, ms")
    rate.set_ylabel("output tokens/s")
    first.set_xlabel("sent at, s (red: failed)")
    rate.set_xlabel("s")
    if 1 < len(work["rounds"]) <= COLOURS:
        rate.legend(fontsize="x-small")
    for axes in (first, rate):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    _draw_adapters(adapters, work["adapters"])
    return _svg(figure)


def throughput(answered: Sequence[Mapping[str, Any]], seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """Times [BINS] and output tokens per second [BINS], each answer's tokens spread evenly over its time."""
    edges = np.linspace(0, seconds, BINS + 1)
    rate = np.zeros(BINS)
    for request in answered:
        begin, end = request["started"] + request["ttft"], request["started"] + request["e2e"]
        # An answer that came all at once still has to fall into some bin.
        end = max(end, begin + 1e-6)
        overlap = np.clip(np.minimum(edges[1:], end) - np.maximum(edges[:-1], begin), 0, None)
        rate += request["output_tokens"] * overlap / (end - begin)
    return (edges[:-1] + edges[1:]) / 2, rate / (edges[1] - edges[0])


def _draw_adapters(axes: "Axes", adapters: Sequence[Mapping[str, Any]]) -> None:
    shown = list(adapters)
    if len(shown) > MOST_ADAPTERS:
        shown = shown[: MOST_ADAPTERS // 2] + shown[-MOST_ADAPTERS // 2 :]
    axes.bar(range(len(shown)), [adapter["speed"] for adapter in shown])
    few = "" if len(shown) == len(adapters) else f", slowest and quickest {MOST_ADAPTERS // 2}"
    axes.set_xlabel(f"{len(adapters)} adapters by speed{few}" if adapters else "no adapters")
    axes.set_ylabel("tokens/s of a request, mean")
    axes.set_xticks([])


def _values(work: WorkRecord, field: str) -> np.ndarray:
    """A latency of every answered request, in seconds."""
    requests = (request for run in work["rounds"] for request in run["requests"])
    return np.array([request[field] for request in requests if request.get(field) is not None], dtype=float)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: "Figure") -> str:
    """Only the element: no XML header, no date, no address of who drew it."""
    import matplotlib

    text = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "manylora"}):
        figure.savefig(text, format="svg", metadata=nothing)
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :]
