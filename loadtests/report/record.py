"""A whole run as JSON: what reports are made from, and what runs are compared by.

``schema`` changes when a reader of the old form would misread the new one. Latencies of single requests are in seconds,
figures say their unit in their name, and what could not be measured is null.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, FiniteFloat, ValidationError

from bases import pydantic_errors
from loadtests import plain
from loadtests.drive.client import Timing
from loadtests.drive.rounds import Failure, Round
from loadtests.errors import BadOption
from loadtests.report.figures import Figures
from loadtests.report.thresholds import Verdict
from loadtests.workload.workload import Workload

SCHEMA = 1
KIND = "manylora-bench"
WANTED = "give a file that `manylora bench --json FILE` wrote"
DIGITS = 6
"""Of seconds that are written down."""

Record = dict[str, Any]
"""A run."""
WorkRecord = dict[str, Any]
"""One workload of a run."""


class _RequestShape(BaseModel):
    ttft: FiniteFloat | None = None
    tpot: FiniteFloat | None = None
    e2e: FiniteFloat


class _RoundShape(BaseModel):
    requests: list[_RequestShape]


class _WorkShape(BaseModel):
    name: str
    asked: dict[str, Any]
    requests: int
    failed: int
    figures: dict[str, FiniteFloat | None]
    spread: dict[str, FiniteFloat | None]
    rounds: list[_RoundShape]


class _ServerShape(BaseModel):
    peer: str
    base: str
    version: str | None


class _RecordShape(BaseModel):
    """What has to be in a record for runs to be compared."""

    version: str
    started: str
    server: _ServerShape
    machine: dict[str, Any]
    conditions: dict[str, Any]
    workloads: list[_WorkShape]


@dataclass(frozen=True, slots=True)
class Result:
    """A workload, what was measured, and its figures."""

    work: Workload
    rounds: Sequence[Round]
    figures: Figures
    warmed: int = 0
    """Adapters that were asked for before the first round."""


def make_record(
    results: Sequence[Result], verdicts: Sequence[Verdict], conditions: Mapping[str, Any], about: Mapping[str, Any]
) -> Record:
    """Everything about a run. ``conditions`` of all workloads must be equal where runs are compared; ``about`` need
    not be.
    """
    return {
        "schema": SCHEMA,
        "kind": KIND,
        **about,
        "conditions": dict(conditions),
        "workloads": [_work(result) for result in results],
        "thresholds": [_plain(asdict(verdict)) for verdict in verdicts],
    }


def write_record(record: Record, path: Path) -> None:
    """As JSON, on one line: most of it is numbers of single requests."""
    path.write_text(json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n")


def read_record(path: Path) -> Record:
    """Raises :class:`BadOption` for what is no record, or one of another schema."""
    try:
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise BadOption(f"{path}: {plain.of_file(error)}; {WANTED}") from None
    except (ValueError, RecursionError) as error:
        raise BadOption(f"{path}: {plain.of_json(error)}; {WANTED}") from None
    if not isinstance(record, dict) or record.get("kind") != KIND:
        raise BadOption(f"{path}: is JSON of another kind; {WANTED}")
    if record.get("schema") != SCHEMA:
        raise BadOption(
            f"{path}: was written by a version of manylora whose figures mean something else (schema "
            f"{record.get('schema')}, this version reads {SCHEMA}): measure again"
        )
    try:
        _RecordShape.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"`{pydantic_errors.path(first)}` {pydantic_errors.message(first)}"
        raise BadOption(f"{path}: is damaged: {problem}; measure again") from None
    return record


def _work(result: Result) -> WorkRecord:
    figures = result.figures
    return {
        "name": result.work.name,
        "asked": result.work.identity(),
        "wanted": len(set(result.work.wanted) - {None}),
        "warmed": result.warmed,
        "requests": figures.requests,
        "failed": figures.failures.total(),
        "failures": dict(figures.failures.most_common()),
        "figures": _plain(figures.values),
        "spread": _plain(figures.spread),
        "adapters": [_plain(asdict(treatment)) for treatment in figures.adapters],
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
        "ttft": round(item.first, DIGITS),
        "e2e": round(item.whole, DIGITS),
        "tpot": None if item.per_token is None else round(item.per_token, DIGITS),
        "gaps": [round(gap, DIGITS) for gap in item.gaps],
        "prompt_tokens": item.prompt_tokens,
        "cached_tokens": item.cached_tokens,
        "output_tokens": item.output_tokens,
    }


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """NaN as null: JSON has no word for it."""
    return {key: None if _missing(value) else value for key, value in values.items()}


def _missing(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
