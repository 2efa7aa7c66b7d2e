"""Plots of records as SVG elements for a page. matplotlib is imported when the first is drawn.

Each plot is an element of its own, so that a narrow page can stack them. Text and axes have the page's text colour and
there is no background, so that the page may be light or dark.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from loadtests.report.record import WorkRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 60
"""Number of points of a curve over time."""
MAX_ADAPTERS = 16
"""Most bars in a plot. Of more adapters, half of the bars are the slowest and half the quickest."""

COLOURS = ("#3a7fc1", "#d1700f", "#2b9350", "#9a6dc7", "#a8734b", "#d055a5", "#1592a3", "#858a1c", "#7c8288")
"""Each contrasts with a white page and with a dark one."""
FAILURE = "#e5484d"
DASHES: Sequence[tuple[float, ...]] = ((), (4, 1.5), (1, 1.2), (6, 1.5, 1, 1.5), (2, 2), (8, 3), (1, 3), (8, 2, 2, 2))
"""Lengths of dashes and gaps, in widths of the line; empty for a solid line."""
WIDTH = 1.6
"""Of a line, in points."""
LETTERS = "#010203"
"""Placeholder for the page's text colour, which matplotlib cannot express."""

Curves = Mapping[str, WorkRecord]
"""Label -> a workload of some run."""


@dataclass(frozen=True, slots=True)
class Style:
    """How a curve and its sample in the legend are drawn."""

    colour: str
    dashes: tuple[float, ...] = ()


def legend(labels: Sequence[str]) -> list[tuple[str, Style]]:
    """Return the style of each curve of :func:`distributions`. Up to 72 curves have different styles."""
    rows = (divmod(index, len(COLOURS)) for index in range(len(labels)))
    kinds = [Style(COLOURS[colour], DASHES[(colour + repeat) % len(DASHES)]) for repeat, colour in rows]
    return list(zip(labels, kinds, strict=True))


def distributions(curves: Curves) -> list[str]:
    """Draw the cumulative distributions of TTFT, TPOT and end-to-end latency, with a curve for each workload."""
    panels = {"ttft": "Time to first text", "tpot": "Time per token", "e2e": "End to end"}
    return [_distribution(curves, field, title) for field, title in panels.items()]


def over_time(work: WorkRecord) -> list[str]:
    """Draw a workload's time to first text and throughput over time, and its adapters' speeds if it has adapters."""
    drawn = [_first_texts(work), _throughput(work)]
    return [*drawn, _adapters(work["adapters"])] if work["adapters"] else drawn


def throughput(answered: Sequence[Mapping[str, Any]], seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """Return times [BINS] and output tokens per second [BINS], each answer's tokens spread evenly over its time."""
    edges = np.linspace(0, seconds, BINS + 1)
    rate = np.zeros(BINS)
    for request in answered:
        begin, end = request["started"] + request["ttft"], request["started"] + request["e2e"]
        # An answer that arrived all at once must still fall into a bin.
        end = max(end, begin + 1e-6)
        overlap = np.clip(np.minimum(edges[1:], end) - np.maximum(edges[:-1], begin), 0, None)
        rate += request["output_tokens"] * overlap / (end - begin)
    return (edges[:-1] + edges[1:]) / 2, rate / (edges[1] - edges[0])


def _distribution(curves: Curves, field: str, title: str) -> str:
    def draw(axes: "Axes") -> None:
        for (_, style), work in zip(legend(list(curves)), curves.values(), strict=True):
            values = np.sort(_values(work, field)) * 1000
            shares = np.arange(1, len(values) + 1) / max(len(values), 1)
            (line,) = axes.step(values, shares, where="post", color=style.colour)
            if style.dashes:
                line.set_dashes(style.dashes)
        axes.set_xlabel("ms")
        axes.set_ylabel("share of requests")
        axes.set_ylim(0, 1.02)

    return _svg(title, draw)


def _first_texts(work: WorkRecord) -> str:
    def draw(axes: "Axes") -> None:
        for run, colour in zip(work["rounds"], cycle(COLOURS), strict=False):
            answered = [request for request in run["requests"] if "error" not in request]
            first = [request["ttft"] * 1000 for request in answered]
            axes.plot([request["started"] for request in answered], first, ".", color=colour)
            for request in run["requests"]:
                if "error" in request:
                    axes.axvline(request["started"], color=FAILURE, alpha=0.6, linewidth=1)
        axes.set_ylabel("ms")
        axes.set_xlabel("sent at, s")
        axes.set_ylim(bottom=0)

    return _svg("Time to first text", draw)


def _throughput(work: WorkRecord) -> str:
    def draw(axes: "Axes") -> None:
        for run, colour in zip(work["rounds"], cycle(COLOURS), strict=False):
            answered = [request for request in run["requests"] if "error" not in request]
            axes.plot(*throughput(answered, run["seconds"]), color=colour)
        axes.set_ylabel("output tokens/s, all requests")
        axes.set_xlabel("s")
        axes.set_ylim(bottom=0)

    return _svg("Throughput", draw)


def _adapters(adapters: Sequence[Mapping[str, Any]]) -> str:
    """Draw the adapters' speeds. ``adapters`` are sorted from the slowest to the quickest."""
    shown, places, half = [*adapters], [*range(len(adapters))], MAX_ADAPTERS // 2
    if len(adapters) > MAX_ADAPTERS:
        shown = [*adapters[:half], *adapters[-half:]]
        places = [*range(half), *range(half + 1, MAX_ADAPTERS + 1)]  # a gap for those left out

    def draw(axes: "Axes") -> None:
        bars = axes.barh(places, [adapter["speed"] for adapter in shown], height=0.75, color=COLOURS[0])
        axes.bar_label(bars, fmt="{:.3g}", padding=2, fontsize=7)
        axes.set_yticks(places, [_shortened(adapter["adapter"]) for adapter in shown], fontsize=7)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("tokens/s of a request, mean")
        if len(shown) < 4:
            axes.set_ylim(3.5, -0.5)  # a lone bar would fill the plot

    left_out = "" if len(shown) == len(adapters) else f": slowest and quickest {half} of {len(adapters)}"
    return _svg(f"Adapters by speed{left_out}", draw)


def _shortened(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:22]}..."


def _values(work: WorkRecord, field: str) -> np.ndarray:
    """Return a latency of every answered request, in seconds."""
    requests = (request for run in work["rounds"] for request in run["requests"])
    return np.array([request[field] for request in requests if request.get(field) is not None], dtype=float)


def _svg(title: str, draw: Callable[["Axes"], None]) -> str:
    """Return a plot as an ``<svg>`` element, without XML header and metadata."""
    import matplotlib
    from matplotlib.figure import Figure

    coloured = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    looks: dict[Any, Any] = {**dict.fromkeys(coloured, LETTERS), "svg.fonttype": "none", "svg.hashsalt": "manylora"}
    looks |= {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.titlesize": "medium"}
    looks |= {"lines.linewidth": WIDTH}
    text = io.StringIO()
    with matplotlib.rc_context(looks):
        figure = Figure(figsize=(4.6, 3.1), layout="constrained")
        axes = figure.subplots()
        axes.grid(alpha=0.3)
        draw(axes)
        axes.set_title(title)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    drawn = text.getvalue().replace(LETTERS, "currentColor")
    return drawn[drawn.index("<svg") :]
