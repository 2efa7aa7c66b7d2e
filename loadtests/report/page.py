"""Reports of records as one self-contained HTML page."""

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
{% if thresholds %}<h2>Thresholds</h2>
<ul>{% for checked in thresholds %}<li{% if not checked.met %} class="bad"{% endif %}>{{ threshold_line(checked) }}</li>
{% endfor %}</ul>{% endif %}
{% if remarks %}<h2>Remarks</h2>
<ul>{% for remark in remarks %}<li>{{ remark }}</li>{% endfor %}</ul>{% endif %}
{% for section in sections %}<h2>{{ section.heading }}</h2>
{% if section.legend %}<ul class="legend">{% for label, style in section.legend %}<li>
<svg viewBox="0 0 32 8"><line x1="0" y1="4" x2="32" y2="4" stroke="{{ style.colour }}" stroke-width="2.5"
{% if style.dashes %} stroke-dasharray="{{ sample(style) }}"{% endif %}/></svg>{{ label }}</li>
{% endfor %}</ul>
{% endif %}<div class="plots">{% for plot in section.plots %}{{ plot }}{% endfor %}</div>
{% endfor %}
{% if details %}<h2>How it was run</h2>
<pre>{{ details }}</pre>{% endif %}
</body>
</html>
"""
DETAILS = ("started", "finished", "version", "server", "machine", "conditions", "settings")


@dataclass(frozen=True, slots=True)
class _Section:
    """A heading with plots and their legend."""

    heading: str
    plots: Sequence[Markup]
    legend: Sequence[tuple[str, Style]] = ()


def run_page(record: Record) -> str:
    """Return the page of one run."""
    workloads = record["workloads"]
    server = record["server"]
    return _render(
        title=f"Load test of {server['base']}",
        subtitle=f"{server['peer']} at {server['url']}, {record['started']}, measured from {_machine(record)}",
        tables=[report.table(record)],
        note=report.NOTE,
        thresholds=record["thresholds"],
        remarks=report.remarks(record),
        sections=[_distributions("Latencies", {work["name"]: work for work in workloads}), *map(_over_time, workloads)],
        details=json.dumps({key: record[key] for key in DETAILS}, indent=2),
    )


def compare_page(comparison: Comparison) -> str:
    """Return the page of a comparison."""
    return _render(
        title="Load tests compared",
        subtitle=", ".join(comparison.labels),
        tables=comparison.tables(),
        note="ratios are to the first run",
        remarks=comparison.remarks,
        sections=[_distributions(name, row) for name, row in comparison.rows.items()],
    )


def _distributions(heading: str, curves: plots.Curves) -> _Section:
    return _Section(heading, [*map(Markup, plots.distributions(curves))], plots.legend(list(curves)))


def _over_time(work: WorkRecord) -> _Section:
    rounds = [f"round {number}" for number in range(1, len(work["rounds"]) + 1)]
    # With more rounds than colours the curves cannot be distinguished; a single curve needs no legend.
    named = 1 < len(rounds) <= len(plots.COLOURS)
    legend = [(name, Style(colour)) for name, colour in zip(rounds, plots.COLOURS, strict=False)] if named else []
    if any("error" in request for run in work["rounds"] for request in run["requests"]):
        legend.append(("a request failed", Style(plots.FAILURE)))
    return _Section(work["name"], [*map(Markup, plots.over_time(work))], legend)


def _machine(record: Record) -> str:
    machine = record["machine"]
    return f"a machine with {machine['cores']} cores ({machine['processor']})"


def _sample(style: Style) -> str:
    """Return a style's dashes as SVG's ``stroke-dasharray``, for the legend."""
    return " ".join(f"{length * 2:g}" for length in style.dashes)


def _unbroken(cell: str) -> str:
    """Let a narrow page break ``1,116 / 1,228`` after a slash, and ``0 of 96`` nowhere."""
    return cell.replace(" / ", "\N{NO-BREAK SPACE}/ ").replace(" of ", "\N{NO-BREAK SPACE}of\N{NO-BREAK SPACE}")


def _render(**values: Any) -> str:
    template = Environment(autoescape=True, trim_blocks=True).from_string(_TEMPLATE)
    return template.render(threshold_line=report.threshold_line, sample=_sample, unbroken=_unbroken, **values)
