"""Traces: recorded traffic as a file of JSON lines.

Each line has ``prompt_tokens`` and ``output_tokens``, and may have ``arrival`` (seconds, from any start) and
``adapter`` (any name; without it, or with null, the request is to the base).
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests import error_text
from loadtests.errors import BadOption
from loadtests.limits import MAX_ADAPTERS, MAX_SECONDS, MAX_TOKENS, check_range

LATEST = 1e12
"""Upper limit of arrivals in seconds: later than any clock, and floats still resolve milliseconds."""
FIELDS = {"prompt_tokens", "output_tokens", "arrival", "adapter"}


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    """One line of a trace."""

    prompt_tokens: int
    output_tokens: int
    at: float | None
    """Seconds after the first request; None if the trace has no arrivals."""
    adapter: int | None
    """Adapters are numbered in the order in which they first appear; None is the base."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace."""

    requests: tuple[RecordedRequest, ...]
    adapters: int
    digest: str
    """SHA-256 of the file, to tell whether two runs used the same trace."""

    @property
    def timed(self) -> bool:
        return self.requests[0].at is not None

    @property
    def rate(self) -> float:
        """Requests per second from the first arrival to the last; NaN without arrivals or with one request."""
        last = self.requests[-1].at
        return (len(self.requests) - 1) / last if last else math.nan


def read_trace(path: Path) -> Trace:
    """Read a trace. Raises :class:`BadOption`, naming the line that is wrong."""
    try:
        content = path.read_bytes()
        # Not `splitlines`: it would also split a name at U+2028.
        lines = content.decode().split("\n")
    except OSError as error:
        raise BadOption(f"--trace: {path}: {error_text.file_error(error)}") from None
    except UnicodeDecodeError as error:
        raise BadOption(f"--trace: {path}: {error_text.json_error(error)}") from None
    numbers: dict[str, int] = {}
    requests: list[RecordedRequest] = []
    first = 0.0
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                values = _values(line)
                first = first if requests else values.get("arrival") or 0.0
                requests.append(_request(values, first, numbers, requests))
            except json.JSONDecodeError as error:
                raise BadOption(f"{path}:{number}: is not JSON, or is cut short, at column {error.colno}") from None
            except RecursionError as error:
                raise BadOption(f"{path}:{number}: {error_text.json_error(error)}") from None
            except (ValueError, BadOption) as error:
                raise BadOption(f"{path}:{number}: {error}") from None
    if not requests:
        raise BadOption(f"--trace: {path}: has no requests")
    check_range(f"{path}: adapters", len(numbers), 0, MAX_ADAPTERS)
    return Trace(tuple(requests), len(numbers), hashlib.sha256(content).hexdigest())


def _values(line: str) -> dict[str, Any]:
    values = json.loads(line)
    if not isinstance(values, dict):
        raise BadOption("must be a JSON object")
    if unknown := sorted(values.keys() - FIELDS):
        raise ValueError(f"unknown field `{unknown[0]}`; the fields are {', '.join(sorted(FIELDS))}")
    for field in ("prompt_tokens", "output_tokens"):
        if type(values.get(field)) is not int or values[field] < 1:
            raise ValueError(f"`{field}` must be a whole number of at least 1 (got {values.get(field)!r})")
        check_range(f"`{field}`", values[field], 1, MAX_TOKENS)
    arrival = values.get("arrival")
    if arrival is not None and (type(arrival) not in (int, float) or not abs(arrival) < LATEST):
        raise ValueError(f"`arrival` must be a number of seconds, below {LATEST:g} (got {arrival!r})")
    if not isinstance(values.get("adapter"), str | None):
        raise BadOption(f"`adapter` must be a name or null (got {values['adapter']!r})")
    return values


def _request(
    values: dict[str, Any], first: float, numbers: dict[str, int], before: list[RecordedRequest]
) -> RecordedRequest:
    arrival = values.get("arrival")
    at = None if arrival is None else arrival - first
    if before and (at is None) != (before[-1].at is None):
        raise ValueError("`arrival` must be in every line or in none")
    if at is not None and before and at < (before[-1].at or 0.0):
        raise ValueError(f"`arrival` is {arrival}, which is before that of the previous line")
    if at is not None:
        check_range("`arrival`, in seconds after the first,", at, 0, MAX_SECONDS)
    adapter = values.get("adapter")
    number = None if adapter is None else numbers.setdefault(adapter, len(numbers))
    return RecordedRequest(values["prompt_tokens"], values["output_tokens"], at, number)
