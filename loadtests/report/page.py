"""Records -> one HTML page with everything in it: nothing is fetched when it is opened."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from loadtests.report import plots
from loadtests.report import table as report
from loadtests.report.compare import Comparison
from loadtests.report.plots import Style
from loadtests.report.record import Record, WorkRecord

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --text: #1f2328; --page: #fff; --line: #d1d9e0; --code: #f3f4f6; --bad: #b00020; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e8eb; --page: #15181d; --line: #3a4048; --code: #20242b; --bad: #ff8a90; }
}
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1500px; padding: 0 1.2em;
  color: var(--text); background: var(--page); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .7em; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
@media (max-width: 1100px) { table { font-size: 13px; } th, td { padding: .25em .4em; } }
.bad { color: var(--bad); font-weight: 600; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(370px, 100%), 1fr)); gap: 1em; }
.plots svg { width: 100%; max-width: 560px; height: auto; }
.legend { display: flex; flex-wrap: wrap; gap: .1em 1.4em; padding: 0; list-style: none; font-size: 13px; }
.legend svg { width: 32px; height: 8px; margin-right: .4em; vertical-align: middle; }
pre { background: var(--code); padding: 1em; overflow-x: auto; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ subtitle }}</p>
{% for table in tables %}
<div class="scroll"><table>
<tr>{% for cell in table[0] %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table[1:] %}<tr>{% for cell in row %}<td>{{ unbroken(cell) }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% endfor %}
<p>{{ note }}</p>
{% if verdicts %}<h2>Thresholds</h2>
<ul>{% for verdict in verdicts %}<li{% if not verdict.met %} class="bad"{% endif %}>{{ judged(verdict) }}</li>
{% endfor %}</ul>{% endif %}
{% if remarks %}<h2>Remarks</h2>
<ul>{% for remark in remarks %}<li>{{ remark }}</li>{% endfor %}</ul>{% endif %}
{% for part in parts %}<h2>{{ part.heading }}</h2>
{% if part.legend %}<ul class="legend">{% for label, style in part.legend %}<li>
<svg viewBox="0 0 32 8"><line x1="0" y1="4" x2="32" y2="4" stroke="{{ style.colour }}" stroke-width="2.5"
{% if style.dashes %} stroke-dasharray="{{ sample(style) }}"{% endif %}/></svg>{{ label }}</li>
{% endfor %}</ul>
{% endif %}<div class="plots">{% for plot in part.plots %}{{ plot }}{% endfor %}</div>
{% endfor %}
{% if details %}<h2>How it was run</h2>
<pre>{{ details }}</pre>{% endif %}
</body>
</html>
"""
DETAILS = ("started", "finished", "version", "server", "machine", "conditions", "settings")


@dataclass(frozen=True, slots=True)
class _Part:
    """Plots that belong together, under a heading."""

    heading: str
    plots: Sequence[Markup]
    legend: Sequence[tuple[str, Style]] = ()


def run_page(record: Record) -> str:
    """A page about one run."""
    works = record["workloads"]
    server = record["server"]
    return _render(
        title=f"Load test of {server['base']}",
        subtitle=f"{server['peer']} at {server['url']}, {record['started']}, measured from {_machine(record)}",
        tables=[report.table(record)],
        note=report.NOTE,
        verdicts=record["thresholds"],
        remarks=report.remarks(record),
        parts=[_distributions("Latencies", {work["name"]: work for work in works}), *map(_course, works)],
        details=json.dumps({key: record[key] for key in DETAILS}, indent=2),
    )


def compare_page(comparison: Comparison) -> str:
    """A page that lays runs side by side."""
    return _render(
        title="Load tests compared",
        subtitle=", ".join(comparison.labels),
        tables=comparison.tables(),
        note="ratios are to the first run",
        remarks=comparison.remarks,
        parts=[_distributions(name, row) for name, row in comparison.rows.items()],
    )


def _distributions(heading: str, curves: plots.Curves) -> _Part:
    return _Part(heading, [*map(Markup, plots.distributions(curves))], plots.legend(list(curves)))


def _course(work: WorkRecord) -> _Part:
    rounds = [f"round {number}" for number in range(1, len(work["rounds"]) + 1)]
    # Of more rounds than colours nobody tells the curves apart; a single curve needs no name.
    named = 1 < len(rounds) <= len(plots.COLOURS)
    legend = [(name, Style(colour)) for name, colour in zip(rounds, plots.COLOURS, strict=False)] if named else []
    if any("error" in request for run in work["rounds"] for request in run["requests"]):
        legend.append(("a request failed", Style(plots.FAILURE)))
    return _Part(work["name"], [*map(Markup, plots.course(work))], legend)


def _machine(record: Record) -> str:
    machine = record["machine"]
    return f"a machine with {machine['cores']} cores ({machine['processor']})"


def _sample(style: Style) -> str:
    """The dashes of a legend's line, as SVG says them."""
    return " ".join(f"{length * 2:g}" for length in style.dashes)


def _unbroken(cell: str) -> str:
    """A narrow page breaks ``1,116 / 1,228`` after a slash, and ``0 of 96`` nowhere."""
    return cell.replace(" / ", "\N{NO-BREAK SPACE}/ ").replace(" of ", "\N{NO-BREAK SPACE}of\N{NO-BREAK SPACE}")


def _render(**values: Any) -> str:
    template = Environment(autoescape=True, trim_blocks=True).from_string(_TEMPLATE)
    return template.render(judged=report.judged, sample=_sample, unbroken=_unbroken, **values)
