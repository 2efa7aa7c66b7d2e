"""Runs side by side: only what was the same work, unless told otherwise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadtests.errors import BadOption
from loadtests.figures import MEASURES
from loadtests.record import Record, WorkRecord
from loadtests.report import number

SHOWN = (
    "requests_per_s", "output_tokens_per_s", "ttft_p50_ms", "ttft_p95_ms", "tpot_p50_ms", "tpot_p95_ms", "gap_p95_ms",
    "e2e_p50_ms", "e2e_p95_ms", "e2e_p99_ms", "fairness",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Comparison:
    """Several runs' results for the workloads that all of them have."""

    labels: Sequence[str]
    rows: Mapping[str, Mapping[str, WorkRecord]]
    """Workload -> label of a run -> its results."""
    remarks: Sequence[str]
    """What was left out and what was not alike."""

    def tables(self) -> list[list[Sequence[str]]]:
        """One for each workload: a row for each figure, and for each run its value and its ratio to the first."""
        first, *others = self.labels
        header = [label for other in others for label in (other, "ratio")]
        return [
            [[name, first, *header], *(_row(figure, [row[label] for label in self.labels]) for figure in SHOWN)]
            for name, row in self.rows.items()
        ]


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
        lists = (f"{label}: {', '.join(names)}" for label, names in works.items())
        raise BadOption(f"the runs have no workload in common: {'; '.join(lists)}")
    different = []
    for label in labels[1:]:
        different += _differences(label, first["conditions"], records[label]["conditions"])
        for name in common:
            different += _differences(f"{label}, {name}", works[labels[0]][name]["asked"], works[label][name]["asked"])
    if different and not force:
        raise BadOption("the runs had different work (--force compares them all the same):\n" + "\n".join(different))
    rows = {name: {label: works[label][name] for label in labels} for name in common}
    remarks = [f"NOT THE SAME WORK: {line}" for line in different]
    return Comparison(labels, rows, [*remarks, *_asides(records, works, common)])


def _differences(where: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [
        f"{where}: {key} is {other.get(key)!r}, not {one.get(key)!r}"
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)
    ]


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
    machines = {label: record["machine"] for label, record in records.items()}
    first = next(iter(machines.values()))
    lines += [f"{label}: ran on another machine" for label, machine in machines.items() if machine != first]
    return lines


def _row(figure: str, works: Sequence[WorkRecord]) -> list[str]:
    first, *others = [work["figures"][figure] for work in works]
    cells = [MEASURES[figure].title, number(first)]
    for value in others:
        cells += [number(value), f"{value / first:.2f}x" if first and value is not None else "-"]
    return cells
