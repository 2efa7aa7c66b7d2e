"""Records: the results of a run as JSON, from which reports and comparisons are made.

``schema`` changes when a reader of the old format would misread the new one. Latencies of single requests are in
seconds; metrics (``figures`` in the JSON) have their unit in their name; null means not measured.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, FiniteFloat, ValidationError

from bases import pydantic_errors
from loadtests import error_text
from loadtests.drive.client import Timing
from loadtests.drive.rounds import Failure, Round
from loadtests.errors import BadOption
from loadtests.report.metrics import WorkloadMetrics
from loadtests.report.thresholds import ThresholdResult
from loadtests.workload.workload import Workload

SCHEMA = 1
KIND = "manylora-bench"
WANTED = "give a file that `manylora bench --json FILE` wrote"
DIGITS = 6
"""Decimals of seconds in a record."""

Record = dict[str, Any]
"""A run."""
WorkRecord = dict[str, Any]
"""One workload of a run."""


class _RequestSchema(BaseModel):
    ttft: FiniteFloat | None = None
    tpot: FiniteFloat | None = None
    e2e: FiniteFloat


class _RoundSchema(BaseModel):
    requests: list[_RequestSchema]


class _WorkSchema(BaseModel):
    name: str
    asked: dict[str, Any]
    requests: int
    failed: int
    figures: dict[str, FiniteFloat | None]
    spread: dict[str, FiniteFloat | None]
    rounds: list[_RoundSchema]


class _ServerSchema(BaseModel):
    peer: str
    base: str
    version: str | None


class _RecordSchema(BaseModel):
    """The fields of a record that comparing needs."""

    version: str
    started: str
    server: _ServerSchema
    machine: dict[str, Any]
    conditions: dict[str, Any]
    workloads: list[_WorkSchema]


@dataclass(frozen=True, slots=True)
class WorkloadResult:
    """A workload with its rounds and metrics."""

    work: Workload
    rounds: Sequence[Round]
    metrics: WorkloadMetrics
    warmed: int = 0
    """Number of adapters that the warm-up named."""


def make_record(
    results: Sequence[WorkloadResult],
    thresholds: Sequence[ThresholdResult],
    conditions: Mapping[str, Any],
    about: Mapping[str, Any],
) -> Record:
    """Return the record of a run.

    ``conditions`` must be equal in runs that are compared; ``about``, the rest that is known of the run, need not be.
    """
    return {
        "schema": SCHEMA,
        "kind": KIND,
        **about,
        "conditions": dict(conditions),
        "workloads": [_work(result) for result in results],
        "thresholds": [_plain(asdict(checked)) for checked in thresholds],
    }


def write_record(record: Record, path: Path) -> None:
    """Write a record as JSON on one line: most of it are numbers of single requests."""
    path.write_text(json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n")


def read_record(path: Path) -> Record:
    """Read a record. Raises :class:`BadOption` if the file is not a record, or one of another schema."""
    try:
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise BadOption(f"{path}: {error_text.file_error(error)}; {WANTED}") from None
    except (ValueError, RecursionError) as error:
        raise BadOption(f"{path}: {error_text.json_error(error)}; {WANTED}") from None
    if not isinstance(record, dict) or record.get("kind") != KIND:
        raise BadOption(f"{path}: is JSON, but not of manylora bench; {WANTED}")
    if record.get("schema") != SCHEMA:
        raise BadOption(
            f"{path}: was written by a version of manylora with another record format (schema "
            f"{record.get('schema')}, this version reads {SCHEMA}): measure again"
        )
    try:
        _RecordSchema.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"`{pydantic_errors.path(first)}` {pydantic_errors.message(first)}"
        raise BadOption(f"{path}: is damaged: {problem}; measure again") from None
    return record


def _work(result: WorkloadResult) -> WorkRecord:
    metrics = result.metrics
    return {
        "name": result.work.name,
        "asked": result.work.identity(),
        "wanted": len(set(result.work.by_popularity) - {None}),
        "warmed": result.warmed,
        "requests": metrics.requests,
        "failed": metrics.failures.total(),
        "failures": dict(metrics.failures.most_common()),
        "figures": _plain(metrics.values),
        "spread": _plain(metrics.spread),
        "adapters": [_plain(asdict(stats)) for stats in metrics.adapters],
        "rounds": [_round(run) for run in result.rounds],
    }


def _round(run: Round) -> dict[str, Any]:
    items: list[Timing | Failure] = [*run.timings, *run.failures]
    items.sort(key=lambda item: item.started)
    return {"seconds": run.seconds, "requests": [_request(item, run.began) for item in items]}


def _request(item: Timing | Failure, began: float) -> dict[str, Any]:
    common = {"adapter": item.adapter, "started": round(item.started - began, DIGITS)}
    if isinstance(item, Failure):
        return {**common, "e2e": round(item.ended - item.started, DIGITS), "error": item.reason}
    return {
        **common,
        "ttft": round(item.ttft, DIGITS),
        "e2e": round(item.e2e, DIGITS),
        "tpot": None if item.tpot is None else round(item.tpot, DIGITS),
        "gaps": [round(gap, DIGITS) for gap in item.gaps],
        "prompt_tokens": item.prompt_tokens,
        "cached_tokens": item.cached_tokens,
        "output_tokens": item.output_tokens,
    }


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with None for NaN, which JSON does not have."""
    return {key: None if _missing(value) else value for key, value in values.items()}


def _missing(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
