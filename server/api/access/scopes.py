"""What each route asks of the key of a request. A test checks that every route is here."""

import re
from collections.abc import Mapping
from typing import Literal

from starlette.routing import compile_path

from server.access.key import Scope

Access = Scope | Literal["open", "any"]
"""A scope; ``any``: every key has access; ``open``: no key is needed."""

ROUTES: Mapping[str, Access] = {
    # Probes: Kubernetes sends no key. They say one word.
    "GET /livez": "open",
    "GET /readyz": "open",
    "GET /health": "open",
    # The web page's files, which hold nothing secret
    "GET /assets/{path:path}": "open",
    # The server
    "GET /": "any",  # the page itself is open
    "GET /version": "any",
    "GET /v1/whoami": "any",
    "GET /docs": "any",
    "GET /docs/oauth2-redirect": "any",
    "GET /openapi.json": "any",
    "GET /static-offline-docs/{path:path}": "any",
    "GET /metrics": "metrics",
    # Training
    "POST /v1/training/data": "train",
    "GET /v1/training/runs": "train",
    "GET /v1/training/runs/{name:path}": "train",
    # Answers
    "POST /v1/chat/completions": "infer",
    "POST /v1/completions": "infer",
    "POST /v1/responses": "infer",
    "POST /v1/messages": "infer",
    "POST /v1/messages/count_tokens": "infer",
    "POST /v1/embeddings": "infer",
    "POST /v1/score": "infer",
    "POST /tokenize": "infer",
    "POST /detokenize": "infer",
    "GET /tokenizer_info": "infer",
    # What there is, as far as the key sees it
    "GET /v1/models": "any",
    "GET /v1/models/{name:path}": "any",
    "GET /v1/adapters": "any",
    "GET /v1/adapters/{reference:path}": "any",
    "GET /v1/aliases": "any",
    "GET /v1/aliases/{name:path}": "any",
    # Changes of it
    "POST /v1/adapters": "adapters",
    "POST /v1/adapters/{name:path}/activate": "adapters",
    "POST /v1/adapters/{name:path}/pin": "adapters",
    "DELETE /v1/adapters/{reference:path}": "adapters",
    "PUT /v1/aliases/{name:path}": "adapters",
    "DELETE /v1/aliases/{name:path}": "adapters",
    "POST /v1/load_lora_adapter": "adapters",
    "POST /v1/unload_lora_adapter": "adapters",
    # Who has used and changed what: keys without the scope admin see their own use
    "GET /v1/usage": "any",
    "GET /v1/audit": "admin",
    # Keys
    "POST /v1/keys": "admin",
    "GET /v1/keys": "admin",
    "GET /v1/keys/{id}": "admin",
    "DELETE /v1/keys/{id}": "admin",
    "POST /v1/keys/{id}/rotate": "admin",
}
"""Method and path of a route -> who has access."""

_FIXED = {route: access for route, access in ROUTES.items() if "{" not in route}


def _patterns() -> list[tuple[str, re.Pattern[str], Access]]:
    split = ((*route.partition(" ")[::2], access) for route, access in ROUTES.items() if route not in _FIXED)
    return [(method, compile_path(path)[0], access) for method, path, access in split]


_PATTERNS = _patterns()


def access_of(method: str, path: str) -> Access:
    """Return who has access to a path, as the router reads it. A path that no route has asks for any key."""
    fixed = _FIXED.get(f"{method} {path}")
    if fixed is not None:
        return fixed
    return next((access for each, regex, access in _PATTERNS if each == method and regex.match(path)), "any")
