"""RequestLog: one log line about each request."""

import logging
from collections.abc import Callable
from typing import Any

from starlette.types import Scope

from server.api.telemetry.work import Work, phases

log = logging.getLogger(__name__)

PROBES = frozenset({"/livez", "/readyz", "/health", "/metrics"})
"""Paths that monitoring polls every few seconds. Their requests are logged at debug level only."""
MAX_PATH = 200
"""Maximum number of characters of a path in the log."""
MAX_METHOD = 20

TextOf = Callable[[list[int]], str]
"""From token ids to text."""


class RequestLog:
    """Logs one line about each request when it has ended.

    Without anything that may be secret: no texts, no headers, no query string. The path is logged in its escaped form.
    """

    def __init__(self, text_of: TextOf | None = None) -> None:
        """With ``text_of``, prompts and answers are logged, too."""
        self._text_of = text_of

    def write(self, scope: Scope, status: int, seconds: float, trace_id: str | None) -> None:
        """Log a request with the fields that docs/metrics.md lists."""
        level = logging.DEBUG if scope["path"].rstrip("/") in PROBES else logging.INFO
        if not log.isEnabledFor(level):
            return
        method, path = scope["method"][:MAX_METHOD], scope["raw_path"].decode("latin-1")[:MAX_PATH]
        state = scope["state"]
        key, client, work = state.get("key"), scope.get("client"), state.get("generation")
        fields = {
            "request_id": state["request_id"],
            "key": key.name if key is not None and key.id else None,  # without an id: the server has no keys
            "method": method,
            "path": path,
            "route": state.get("route"),
            "status": status,
            "seconds": round(seconds, 3),
            "client": client and client[0],
            "trace_id": trace_id,
        }
        if work is not None:
            fields |= _of_work(work)
            if self._text_of is not None:
                fields["prompts"] = [self._text_of(tokens) for tokens in work.prompts]
                fields["answers"] = [self._text_of(tokens) for tokens in work.answers]
        known = {name: value for name, value in fields.items() if value is not None}
        log.log(level, "%s %s %d in %.0f ms", method, path, status, seconds * 1000, extra=known)


def _of_work(work: Work) -> dict[str, Any]:
    applied = [f"{each.alias}={each.name}" if each.alias else each.name for each in work.adapters.applied]
    spent = {} if work.spent is None else phases(work.spent[1])
    return {
        "answer_id": work.id,
        "adapter": " + ".join(applied) or None,
        "prompt_tokens": work.prompt_tokens,
        "cached_tokens": work.cached_tokens,
        "output_tokens": work.output_tokens,
        "first_text_seconds": None if work.first_token is None else round(work.first_token, 3),
        **{f"{phase}_seconds": round(seconds, 3) for phase, seconds in spent.items()},
        "finish": ", ".join(work.finishes) or None,
        "outcome": work.outcome,
    }
