"""Suggest the known name that a client may mean whose name of a model or an adapter does not exist."""

from collections.abc import Iterable
from difflib import get_close_matches

from starlette.requests import Request

from adapters.errors import UnknownAdapter
from server.access.key import ApiKey
from server.api.service import Service
from server.errors import UnknownModel

MAX_COMPARED = 200
"""Names that are compared with the unknown one, those that begin alike first: comparing is slow."""
MAX_LENGTH = 256
"""Characters of an unknown name that is compared at all."""
ALIKE = 0.7
"""How similar a name must be, from 0 to 1, as :mod:`difflib` measures it."""


def near_name(name: str, visible: Iterable[str]) -> str | None:
    """Return the name among ``visible`` that is most like ``name``, a reference to a model; None if none is.

    One that differs in case or lacks its path, as in ``blue`` for ``team/blue``, is first.
    """
    if not name or len(name) > MAX_LENGTH:
        return None
    wanted = name.partition("@")[0].casefold()
    alike: dict[str, str] = {}
    for known in visible:
        folded = known.casefold()
        if wanted == folded or folded.endswith(f"/{wanted}"):
            return known
        if abs(len(folded) - len(wanted)) <= max(2, len(wanted) // 2):
            alike.setdefault(folded, known)
    compared = sorted(alike, key=lambda folded: folded[:2] != wanted[:2])[:MAX_COMPARED]
    return next((alike[folded] for folded in get_close_matches(wanted, compared, 1, ALIKE)), None)


def visible_names(request: Request, *, base: bool) -> list[str]:
    """Return the adapters and aliases that the caller sees, in order; with ``base``, the base's name is the first."""
    service: Service = request.app.state.service
    key: ApiKey = request.state.key
    names = [name for name, _ in service.registry.names(versions=False) if key.sees(name)]
    return [service.base.name, *names] if base else names


def suggestion(request: Request, error: UnknownModel | UnknownAdapter) -> str:
    """Return a sentence for the message of ``error`` that names what the client may mean; empty if nothing is alike."""
    near = near_name(error.name, visible_names(request, base=isinstance(error, UnknownModel)))
    return f" Did you mean `{near}`?" if near is not None else ""
