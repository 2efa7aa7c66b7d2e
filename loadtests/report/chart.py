"""Draws the chart of docs/performance.md from the numbers in docs/performance.json.

``python -m loadtests.report.chart`` writes it, in a checkout. Pages show it as an image, which they cannot style, so it
has its own background: light or dark, by the reader's system.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment

DOCS = Path(__file__).parents[2] / "docs"
WIDTH = 760
LEFT = 170
"""Where the bars start; the names of the workloads are to the left."""
BAR = 15
GROUP = 68
TOP = 88

_TEMPLATE = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {{ width }} {{ height }}" width="{{ width }}" \
height="{{ height }}" role="img" aria-labelledby="title">
<title id="title">{{ title }}: {{ summary }}</title>
<style>
svg { color-scheme: light dark; font-family: system-ui, -apple-system, "Segoe UI", sans-serif; font-size: 13px; }
.page { fill: #ffffff; stroke: #d1d9e0; } text { fill: #1f2328; } .note { fill: #59636e; font-size: 12px; }
.heading { font-size: 16px; font-weight: 600; }
.bar0 { fill: #0b7a57; } .bar1 { fill: #3a7fc1; } .bar2 { fill: #c26a12; }
@media (prefers-color-scheme: dark) {
.page { fill: #0d1117; stroke: #3d444d; } text { fill: #e6edf3; } .note { fill: #9198a1; }
.bar0 { fill: #2fbf8f; } .bar1 { fill: #6cabe8; } .bar2 { fill: #e59a4c; }
}
</style>
<rect class="page" x="0.5" y="0.5" width="{{ width - 1 }}" height="{{ height - 1 }}" rx="6"/>
<text class="heading" x="20" y="30">{{ title }}</text>
<text class="note" x="20" y="49">{{ unit }}</text>
{% for server in servers %}
<rect class="bar{{ loop.index0 }}" x="{{ left + loop.index0 * 170 }}" y="62" width="12" height="12"/>\
<text x="{{ left + loop.index0 * 170 + 18 }}" y="73">{{ server }}</text>
{% endfor %}
{% for group in groups %}
<text x="{{ left - 10 }}" y="{{ group.middle }}" text-anchor="end">{{ group.name }}</text>
{% for bar in group.bars %}
<rect class="bar{{ loop.index0 }}" x="{{ left }}" y="{{ bar.y }}" width="{{ bar.width }}" height="{{ size - 2 }}"/>\
<text x="{{ left + bar.width + 6 }}" y="{{ bar.y + 11 }}">{{ bar.value }}</text>
{% endfor %}
{% endfor %}
{% for note in notes %}
<text class="note" x="20" y="{{ notes_at + loop.index0 * 17 }}">{{ note }}</text>
{% endfor %}
</svg>
"""


def chart(figures: Mapping[str, Any]) -> str:
    """Return the SVG. ``figures`` is the content of docs/performance.json."""
    work, servers = figures["work"], figures["servers"]
    most = max(max(values) for values in work.values())
    groups = [_group(figures, name, TOP + index * GROUP, most) for index, name in enumerate(work)]
    notes_at = TOP + len(work) * GROUP + 12
    summary = "; ".join(
        f"{name}: " + ", ".join(f"{server} {value}" for server, value in zip(servers, values, strict=True))
        for name, values in work.items()
    )
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_TEMPLATE)
    return template.render(
        {**figures, "groups": groups, "notes_at": notes_at, "summary": summary},
        width=WIDTH,
        height=notes_at + len(figures["notes"]) * 17,
        left=LEFT,
        size=BAR,
    )


def _group(figures: Mapping[str, Any], name: str, top: int, most: float) -> dict[str, Any]:
    """Return the bars of one workload, one for each server."""
    marked = figures["marked"].get(name, {})
    bars = [
        {
            "y": top + 4 + index * (BAR + 2),
            "width": round((WIDTH - LEFT - 80) * value / most),
            "value": marked.get(server, value),
        }
        for index, (server, value) in enumerate(zip(figures["servers"], figures["work"][name], strict=True))
    ]
    return {"name": name, "middle": top + 32, "bars": bars}


def main() -> None:
    """Write docs/performance.svg."""
    figures = json.loads((DOCS / "performance.json").read_text())
    (DOCS / "performance.svg").write_text(chart(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
