"""Compares records side by side, by default only if their workloads were the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadtests.errors import BadOption
from loadtests.report.metrics import METRICS
from loadtests.report.record import Record, WorkRecord
from loadtests.report.table import number, share

SHOWN = (
    "requests_per_s", "output_tokens_per_s", "ttft_p50_ms", "ttft_p95_ms", "tpot_p50_ms", "tpot_p95_ms", "gap_p95_ms",
    "e2e_p50_ms", "e2e_p95_ms", "e2e_p99_ms", "fairness",
)  # fmt: skip
RUN_HEADER = ("run", "server", "its version", "base", "client's version", "started")


@dataclass(frozen=True, slots=True)
class Comparison:
    """The results of several runs for the workloads that all of them have."""

    labels: Sequence[str]
    runs: Mapping[str, Sequence[str]]
    """Label of a run -> its server, versions and start: the columns of :data:`RUN_HEADER`."""
    rows: Mapping[str, Mapping[str, WorkRecord]]
    """Workload -> label of a run -> its results."""
    remarks: Sequence[str]
    """What was left out and what differed, a line each."""

    def tables(self) -> list[list[Sequence[str]]]:
        """Return a table of the runs, and one for each workload.

        A workload's table has a row for each metric that any run has: every run's value, its spread over the rounds and
        its ratio to the first run's.
        """
        first, *others = self.labels
        header = [first, "spread", *(word for label in others for word in (label, "spread", "ratio"))]
        tables: list[list[Sequence[str]]] = [[RUN_HEADER, *([label, *run] for label, run in self.runs.items())]]
        for name, row in self.rows.items():
            workloads = [row[label] for label in self.labels]
            measured = (
                metric for metric in SHOWN if any(work["figures"].get(metric) is not None for work in workloads)
            )
            tables.append([[name, *header], *(_row(metric, workloads) for metric in measured)])
        return tables


def compare(records: Mapping[str, Record], force: bool) -> Comparison:
    """Compare the records of runs, by label.

    Raises :class:`BadOption` if their workloads or conditions differ, which is a remark with ``force``, or if they have
    no workload in common.
    """
    labels = list(records)
    first = records[labels[0]]
    workloads = {label: {work["name"]: work for work in record["workloads"]} for label, record in records.items()}
    common = [name for name in workloads[labels[0]] if all(name in workloads[label] for label in labels)]
    if not common:
        lists = (f"{label} has {', '.join(names)}" for label, names in workloads.items())
        raise BadOption(
            "the runs have no workload in common, so there is nothing to compare; measure again with the same "
            f"--adapters and --arrivals ({'; '.join(lists)})"
        )
    different = []
    for label in labels[1:]:
        different += _differences(label, labels[0], first["conditions"], records[label]["conditions"])
        for name in common:
            asked = [workloads[run][name]["asked"] for run in (labels[0], label)]
            different += _differences(f"{label}, {name}", labels[0], *asked)
    if different and not force:
        raise BadOption(
            "the runs had different workloads, so their metrics cannot be compared; measure again with the same "
            "options, or compare anyway with --force:\n" + "\n".join(different)
        )
    rows = {name: {label: workloads[label][name] for label in labels} for name in common}
    runs = {label: _run(record) for label, record in records.items()}
    remarks = [f"DIFFERENT WORKLOADS: {line}" for line in different]
    return Comparison(labels, runs, rows, [*remarks, *_remarks(records, workloads, common)])


def _run(record: Record) -> list[str]:
    server = record["server"]
    return [server["peer"], server["version"] or "-", server["base"], record["version"], record["started"]]


def _differences(where: str, first: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [
        f"{where}: {key} is {_option_value(other.get(key))}, in {first} {_option_value(one.get(key))}"
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)
    ]


def _option_value(value: object) -> str:
    """Return an option's value as it is given on the command line."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "not set" if value is None else str(value)


def _remarks(
    records: Mapping[str, Record], workloads: Mapping[str, Mapping[str, WorkRecord]], common: Sequence[str]
) -> list[str]:
    lines = []
    for label in records:
        if left := [name for name in workloads[label] if name not in common]:
            lines.append(f"{label}: not in all runs: {', '.join(left)}")
        for name in common:
            if failed := workloads[label][name]["failed"]:
                lines.append(f"{label}, {name}: {failed} of {workloads[label][name]['requests']} requests FAILED")
    first, *others = records
    for label in others:
        one, other = records[first], records[label]
        for key in ("peer", "version", "base"):
            if one["server"][key] != other["server"][key]:
                said = (other["server"][key] or "unknown", one["server"][key] or "unknown")
                lines.append(f"{label}: the server's {key} is {said[0]}, in {first} {said[1]}")
        if one["version"] != other["version"]:
            lines.append(f"{label}: measured by version {other['version']}, {first} by {one['version']}")
        if one["machine"] != other["machine"]:
            lines.append(f"{label}: was measured from a different machine than {first}")
    return lines


def _row(metric: str, workloads: Sequence[WorkRecord]) -> list[str]:
    first, *others = [(work["figures"].get(metric), work["spread"].get(metric)) for work in workloads]
    cells = [METRICS[metric].title, number(first[0]), share(first[1])]
    for value, spread in others:
        ratio = f"{value / first[0]:.2f}x" if first[0] and value is not None else "-"
        cells += [number(value), share(spread), ratio]
    return cells
