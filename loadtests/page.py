"""Records -> one HTML page with everything in it: nothing is fetched when it is opened."""

import json
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from loadtests import plots, report
from loadtests.compare import Comparison
from loadtests.record import Record

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1150px; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto; }
th, td { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.bad { color: #b00020; font-weight: 600; }
svg { max-width: 100%; height: auto; }
pre { background: #f5f5f5; padding: 1em; overflow-x: auto; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ subtitle }}</p>
{% for table in tables %}
<table>
<tr>{% for cell in table[0] %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table[1:] %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endfor %}
<p>{{ note }}</p>
{% if verdicts %}<h2>Thresholds</h2>
<ul>{% for verdict in verdicts %}<li{% if not verdict.met %} class="bad"{% endif %}>{{ judged(verdict) }}</li>
{% endfor %}</ul>{% endif %}
{% if remarks %}<h2>Remarks</h2>
<ul>{% for remark in remarks %}<li>{{ remark }}</li>{% endfor %}</ul>{% endif %}
{% for heading, drawing in drawings %}<h2>{{ heading }}</h2>
{{ drawing }}
{% endfor %}
{% if details %}<h2>How it was run</h2>
<pre>{{ details }}</pre>{% endif %}
</body>
</html>
"""
DETAILS = ("started", "finished", "version", "server", "machine", "conditions", "settings")


def run_page(record: Record) -> str:
    """A page about one run."""
    works = record["workloads"]
    drawings = [("Latencies", plots.distributions({work["name"]: work for work in works}))]
    drawings += [(work["name"], plots.course(work)) for work in works]
    server = record["server"]
    return _render(
        title=f"Load test of {server['base']}",
        subtitle=f"{server['peer']} at {server['url']}, {record['started']}",
        tables=[report.table(record)],
        note=report.NOTE,
        verdicts=record["thresholds"],
        remarks=report.remarks(record),
        drawings=drawings,
        details=json.dumps({key: record[key] for key in DETAILS}, indent=2),
    )


def compare_page(comparison: Comparison) -> str:
    """A page that lays runs side by side."""
    drawings = [
        (name, plots.distributions({f"{label}: {work['name']}": work for label, work in row.items()}))
        for name, row in comparison.rows.items()
    ]
    return _render(
        title="Load tests compared",
        subtitle=", ".join(comparison.labels),
        tables=comparison.tables(),
        note="ratios are to the first run",
        remarks=comparison.remarks,
        drawings=drawings,
    )


def _render(drawings: Sequence[tuple[str, str]], **values: Any) -> str:
    template = Environment(autoescape=True, trim_blocks=True).from_string(_TEMPLATE)
    drawn = [(heading, Markup(drawing)) for heading, drawing in drawings]
    return template.render(drawings=drawn, judged=report.judged, **values)
