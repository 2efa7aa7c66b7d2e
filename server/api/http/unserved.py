"""Say why there is nothing at a path: an endpoint of OpenAI's that is not served, a wrong base URL, a misspelt path."""

from difflib import get_close_matches

from starlette.types import Scope

from server.api.http.paths import allowed_methods, plain_paths

NOT_SERVED = frozenset(
    {
        "assistants",
        "audio",
        "batches",
        "chatkit",
        "containers",
        "conversations",
        "evals",
        "files",
        "fine_tuning",
        "images",
        "moderations",
        "organization",
        "realtime",
        "skills",
        "threads",
        "uploads",
        "vector_stores",
        "videos",
    }
)
"""Names after ``/v1/`` of the endpoints of OpenAI that this server does not have."""
NOT_KEPT = {"responses": "responses", "chat/completions": "completions"}
"""Paths after ``/v1/`` below which OpenAI has what was stored -> what that is."""
MAX_PARTS = 8
"""Maximum number of parts of a path for which a similar one is looked for."""

MAX_SHOWN = 200
"""Maximum number of characters of the path in the message."""
ALIKE = 0.85
"""How similar a path must be to be suggested, from 0 to 1, as :mod:`difflib` measures it."""


def not_found_message(scope: Scope) -> str:
    """Return the message of a 404 for the path of ``scope``, which no route has."""
    method, path = scope["method"][:20], scope["path"][:MAX_SHOWN]
    parts = [part for part in scope["path"].split("/") if part]
    if parts[:1] == ["v1"] and len(parts) > 1 and parts[1] in NOT_SERVED:
        return f"This server does not have OpenAI's `/v1/{parts[1]}`: {method} {path} is not served here."
    if parts[:3] == ["v1", "messages", "batches"]:
        return f"This server does not have Anthropic's `/v1/messages/batches`: {method} {path} is not served here."
    kept = next((what for below, what in NOT_KEPT.items() if scope["path"].startswith(f"/v1/{below}/")), None)
    if kept is not None and method in ("GET", "DELETE"):
        return f"This server keeps no {kept}: {method} {path} is not served here."
    if (moved := _moved(scope, parts)) is not None:
        return f"There is no {method} {path} here. Did you mean {moved}? A client's base URL ends in `/v1`."
    near = _near(scope, parts)
    return f"There is no {method} {path} here.{f' Did you mean {near}?' if near else ''}"


def _moved(scope: Scope, parts: list[str]) -> str | None:
    """Return the path that a client means whose base URL has too much before it, or lacks ``/v1``."""
    return next((path for path in _endings(parts) if scope["method"] in allowed_methods({**scope, "path": path})), None)


def _near(scope: Scope, parts: list[str]) -> str | None:
    """Return the path that is most like a misspelt one, also under another base URL."""
    if len(scope["path"]) > MAX_SHOWN:
        return None
    known = plain_paths(scope["app"], scope["method"])
    near = (get_close_matches(path, known, 1, ALIKE) for path in [scope["path"], *_endings(parts)])
    return next((found[0] for found in near if found), None)


def _endings(parts: list[str]) -> list[str]:
    """Return the ends of a path, the longest first, each behind ``/v1/``."""
    if len(parts) > MAX_PARTS:
        return []
    return ["/v1/" + "/".join(parts[start:]) for start in range(len(parts))]
