"""Recorded traffic: a file of JSON lines with ``prompt_tokens``, ``output_tokens`` and, where it has them, ``arrival``
(seconds, from any zero) and ``adapter`` (any name; null or left out is the base).
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests import plain
from loadtests.bounds import MOST_ADAPTERS, MOST_SECONDS, MOST_TOKENS, within
from loadtests.errors import BadOption

LATEST = 1e12
"""Of arrivals, in seconds: beyond any clock, and where a float still tells milliseconds apart."""
FIELDS = {"prompt_tokens", "output_tokens", "arrival", "adapter"}


@dataclass(frozen=True, slots=True)
class Row:
    """One request as it was recorded."""

    prompt_tokens: int
    output_tokens: int
    at: float | None
    """Seconds after the first row; None where the file has no times."""
    adapter: int | None
    """The trace's adapters are numbered as they first appear; None is the base."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A whole file."""

    rows: tuple[Row, ...]
    adapters: int
    digest: str
    """SHA-256 of the file: what two runs must have in common."""

    @property
    def timed(self) -> bool:
        return self.rows[0].at is not None

    @property
    def rate(self) -> float:
        """Requests per second from the first arrival to the last; NaN for a single one or without times."""
        last = self.rows[-1].at
        return (len(self.rows) - 1) / last if last else math.nan


def read_trace(path: Path) -> Trace:
    """Read all of it. Raises :class:`BadOption` with the line that is wrong."""
    try:
        content = path.read_bytes()
        # Only this ends a line of JSON: `splitlines` would also split a name at U+2028.
        lines = content.decode().split("\n")
    except OSError as error:
        raise BadOption(f"--trace: {path}: {plain.of_file(error)}") from None
    except UnicodeDecodeError as error:
        raise BadOption(f"--trace: {path}: {plain.of_json(error)}") from None
    numbers: dict[str, int] = {}
    rows: list[Row] = []
    first = 0.0
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                values = _values(line)
                first = first if rows else values.get("arrival") or 0.0
                rows.append(_row(values, first, numbers, rows))
            except json.JSONDecodeError as error:
                raise BadOption(f"{path}:{number}: is not JSON, or breaks off, at column {error.colno}") from None
            except RecursionError as error:
                raise BadOption(f"{path}:{number}: {plain.of_json(error)}") from None
            except (ValueError, BadOption) as error:
                raise BadOption(f"{path}:{number}: {error}") from None
    if not rows:
        raise BadOption(f"--trace: {path}: has no rows")
    within(f"{path}: adapters", len(numbers), 0, MOST_ADAPTERS)
    return Trace(tuple(rows), len(numbers), hashlib.sha256(content).hexdigest())


def _values(line: str) -> dict[str, Any]:
    values = json.loads(line)
    if not isinstance(values, dict):
        raise BadOption("must be a JSON object")
    if unknown := sorted(values.keys() - FIELDS):
        raise ValueError(f"`{unknown[0]}` is none of {', '.join(sorted(FIELDS))}")
    for field in ("prompt_tokens", "output_tokens"):
        if type(values.get(field)) is not int or values[field] < 1:
            raise ValueError(f"`{field}` must be a whole number of at least 1 (got {values.get(field)!r})")
        within(f"`{field}`", values[field], 1, MOST_TOKENS)
    arrival = values.get("arrival")
    if arrival is not None and (type(arrival) not in (int, float) or not abs(arrival) < LATEST):
        raise ValueError(f"`arrival` must be a number of seconds, below {LATEST:g} (got {arrival!r})")
    if not isinstance(values.get("adapter"), str | None):
        raise BadOption(f"`adapter` must be a name or null (got {values['adapter']!r})")
    return values


def _row(values: dict[str, Any], first: float, numbers: dict[str, int], before: list[Row]) -> Row:
    arrival = values.get("arrival")
    at = None if arrival is None else arrival - first
    if before and (at is None) != (before[-1].at is None):
        raise ValueError("`arrival` must be in every row or in none")
    if at is not None and before and at < (before[-1].at or 0.0):
        raise ValueError(f"`arrival` is {arrival}, before that of the row above")
    if at is not None:
        within("`arrival`, in seconds after the first,", at, 0, MOST_SECONDS)
    adapter = values.get("adapter")
    number = None if adapter is None else numbers.setdefault(adapter, len(numbers))
    return Row(values["prompt_tokens"], values["output_tokens"], at, number)
