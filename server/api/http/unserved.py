"""Say why there is nothing at a path: an endpoint of OpenAI's that is not served, or a wrong base URL."""

from starlette.types import Scope

from server.api.http.paths import allowed_methods

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
MAX_PARTS = 8
"""Maximum number of parts of a path for which a similar one is looked for."""

MAX_SHOWN = 200
"""Maximum number of characters of the path in the message."""


def not_found_message(scope: Scope) -> str:
    """Return the message of a 404 for the path of ``scope``, which no route has."""
    method, path = scope["method"][:20], scope["path"][:MAX_SHOWN]
    parts = [part for part in scope["path"].split("/") if part]
    if parts[:1] == ["v1"] and len(parts) > 1 and parts[1] in NOT_SERVED:
        return f"This server does not have OpenAI's `/v1/{parts[1]}`: {method} {path} is not served here."
    similar = _similar(scope, parts)
    hint = f" Did you mean {similar}? A client's base URL ends in `/v1`." if similar else ""
    return f"There is no {method} {path} here.{hint}"


def _similar(scope: Scope, parts: list[str]) -> str | None:
    """Return the path that a client means whose base URL has too much before it, or lacks ``/v1``."""
    if len(parts) <= MAX_PARTS:
        for start in range(len(parts)):
            path = "/v1/" + "/".join(parts[start:])
            if scope["method"] in allowed_methods({**scope, "path": path}):
                return path
    return None
