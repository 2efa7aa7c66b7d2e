"""Runs side by side: only what was the same work, unless told otherwise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadtests.errors import BadOption
from loadtests.report.figures import MEASURES
from loadtests.report.record import Record, WorkRecord
from loadtests.report.table import number, share

SHOWN = (
    "requests_per_s", "output_tokens_per_s", "ttft_p50_ms", "ttft_p95_ms", "tpot_p50_ms", "tpot_p95_ms", "gap_p95_ms",
    "e2e_p50_ms", "e2e_p95_ms", "e2e_p99_ms", "fairness",
)  # fmt: skip
RUN_HEADER = ("run", "server", "its version", "base", "client's version", "started")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Several runs' results for the workloads that all of them have."""

    labels: Sequence[str]
    runs: Mapping[str, Sequence[str]]
    """Label of a run -> what was measured, and by what: the columns of :data:`RUN_HEADER`."""
    rows: Mapping[str, Mapping[str, WorkRecord]]
    """Workload -> label of a run -> its results."""
    remarks: Sequence[str]
    """What was left out and what was not alike."""

    def tables(self) -> list[list[Sequence[str]]]:
        """One of the runs, and one for each workload: a row for each figure that any run has, with every run's value,
        spread over its rounds, and ratio to the first run's.
        """
        first, *others = self.labels
        header = [first, "spread", *(word for label in others for word in (label, "spread", "ratio"))]
        tables: list[list[Sequence[str]]] = [[RUN_HEADER, *([label, *run] for label, run in self.runs.items())]]
        for name, row in self.rows.items():
            works = [row[label] for label in self.labels]
            measured = (figure for figure in SHOWN if any(work["figures"].get(figure) is not None for work in works))
            tables.append([[name, *header], *(_row(figure, works) for figure in measured)])
        return tables


def compare(records: Mapping[str, Record], force: bool) -> Comparison:
    """Lay runs, by label, side by side.

    Raises :class:`BadOption` where the work was not the same, or they have no workload in common; with ``force`` the
    former is a remark.
    """
    labels = list(records)
    first = records[labels[0]]
    works = {label: {work["name"]: work for work in record["workloads"]} for label, record in records.items()}
    common = [name for name in works[labels[0]] if all(name in works[label] for label in labels)]
    if not common:
        lists = (f"{label} has {', '.join(names)}" for label, names in works.items())
        raise BadOption(
            "the runs have no workload in common, so there is nothing to compare; measure both with the same "
            f"--adapters and --arrivals ({'; '.join(lists)})"
        )
    different = []
    for label in labels[1:]:
        different += _differences(label, labels[0], first["conditions"], records[label]["conditions"])
        for name in common:
            asked = [works[run][name]["asked"] for run in (labels[0], label)]
            different += _differences(f"{label}, {name}", labels[0], *asked)
    if different and not force:
        raise BadOption(
            "the runs did different work, so their figures say nothing of each other; measure again with the same "
            "options, or compare them all the same with --force:\n" + "\n".join(different)
        )
    rows = {name: {label: works[label][name] for label in labels} for name in common}
    runs = {label: _run(record) for label, record in records.items()}
    remarks = [f"NOT THE SAME WORK: {line}" for line in different]
    return Comparison(labels, runs, rows, [*remarks, *_asides(records, works, common)])


def _run(record: Record) -> list[str]:
    server = record["server"]
    return [server["peer"], server["version"] or "-", server["base"], record["version"], record["started"]]


def _differences(where: str, first: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [
        f"{where}: {key} is {_told(other.get(key))}, in {first} {_told(one.get(key))}"
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)
    ]


def _told(value: object) -> str:
    """An option's value, as it is given."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "not set" if value is None else str(value)


def _asides(
    records: Mapping[str, Record], works: Mapping[str, Mapping[str, WorkRecord]], common: Sequence[str]
) -> list[str]:
    lines = []
    for label in records:
        if left := [name for name in works[label] if name not in common]:
            lines.append(f"{label}: not in all runs: {', '.join(left)}")
        for name in common:
            if failed := works[label][name]["failed"]:
                lines.append(f"{label}, {name}: {failed} of {works[label][name]['requests']} requests FAILED")
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
            lines.append(f"{label}: was measured from another machine than {first}")
    return lines


def _row(figure: str, works: Sequence[WorkRecord]) -> list[str]:
    first, *others = [(work["figures"].get(figure), work["spread"].get(figure)) for work in works]
    cells = [MEASURES[figure].title, number(first[0]), share(first[1])]
    for value, spread in others:
        ratio = f"{value / first[0]:.2f}x" if first[0] and value is not None else "-"
        cells += [number(value), share(spread), ratio]
    return cells
