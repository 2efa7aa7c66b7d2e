"""``--fetch-on-request``: register adapters whose addresses requests name, as in ``"adapter": "hf://org/legal"``.

The first request for an address fetches it, with all checks of a registration, under the name that
:func:`adapters.sources.address.registered_name` derives from it. Later requests use the active version of that name.
They never fetch again: to refresh it, register the same source under that name, or remove the adapter.
"""

from collections.abc import Sequence
from typing import Protocol

from starlette.concurrency import run_in_threadpool

from adapters.errors import (
    AdapterConflict,
    AdapterNameError,
    AdapterRejected,
    RevisionMismatch,
    SourceRefused,
    UnknownAdapter,
)
from adapters.registry.registration import RegistrationOptions
from adapters.sources.address import is_address, registered_name
from server.access.key import ANONYMOUS, ApiKey
from server.access.view import hide_other
from server.api.http.errors import CODES, InvalidAdapter
from server.api.registry.registration import register_source
from server.api.schemas.generation import MixEntry
from server.api.service import Service
from server.errors import InvalidRequest, UnknownModel

NEW = RegistrationOptions(expected=0)
OFF = "; this server does not fetch adapters on request, which whoever runs it allows with --fetch-on-request"


class NamesAdapters(Protocol):
    """A request that may name adapters."""

    @property
    def model(self) -> str | None:
        """The base, or an adapter."""

    @property
    def adapter(self) -> Sequence[MixEntry] | None:
        """The adapters of a mix."""


async def fetch_named(service: Service, key: ApiKey, request: NamesAdapters) -> None:
    """Register the adapters whose addresses ``request`` names, unless they are registered already.

    Returns at once if it names none. Raises UnknownModel or UnknownAdapter if fetching is off, InvalidAdapter and
    InvalidRequest for what is refused, Draining, QueueFull, and the errors of a registration.
    """
    named = [(request.model or "", "model"), *((entry.name, "adapter") for entry in request.adapter or ())]
    for name, param in dict.fromkeys(named):
        if is_address(name):
            await _fetch(service, key, name, param)


async def _fetch(service: Service, key: ApiKey, text: str, param: str) -> None:
    if not service.settings.fetch_on_request:
        raise _unknown(text, param, OFF)
    try:
        address = service.sources.allowed(text)
        name = registered_name(address)
        if not key.sees(name):
            raise _unknown(text, param)
        if not _is_current(service, name):
            await service.fetches.run(name, lambda: _register(service, text, name, str(address)))
    except AdapterRejected as error:
        raise InvalidAdapter(error, param) from error
    except AdapterConflict as error:
        raise hide_other(error, key) from None
    except AdapterNameError as error:
        raise InvalidRequest(str(hide_other(error, key)), param=param, code=CODES[AdapterNameError]) from error
    except SourceRefused as error:
        raise InvalidRequest(str(error), param=param, code=CODES[SourceRefused]) from error


def _unknown(text: str, param: str, hint: str = "") -> UnknownModel | UnknownAdapter:
    return UnknownModel(text, hint=hint) if param == "model" else UnknownAdapter(text, hint=hint)


def _is_current(service: Service, name: str) -> bool:
    """Whether ``name`` is registered, and its active version is known to come from its address."""
    try:
        return service.registry.version(name).name == service.fetches.versions.get(name)
    except UnknownAdapter:
        return False


async def _register(service: Service, text: str, name: str, address: str) -> str:
    try:
        found = await run_in_threadpool(_registered, service, name, address)
        return found or (await register_source(service, ANONYMOUS, name, text, NEW)).version.name
    except RevisionMismatch:  # somebody else, such as another server, has registered it in the meantime
        await run_in_threadpool(service.registry.refresh)
        found = await run_in_threadpool(_registered, service, name, address)
        if found is None:
            raise
        return found


def _registered(service: Service, name: str, address: str) -> str | None:
    """Return the active version of ``name``, None if there is no such adapter. Queries the database.

    Raises AdapterConflict if it comes from elsewhere than ``address``.
    """
    try:
        entry = service.registry.entry(name)
    except UnknownAdapter:
        return None
    version = entry.current
    if version is None:
        raise AdapterConflict(f"`{name}`, the adapter of {address}, has no active version", code="no_active_version")
    receipt = service.registry.receipt(version) or {}
    if not str(receipt.get("source")).startswith((f"{address}@", f"{address}#")):
        raise AdapterConflict(
            f"`{name}`, the name for the adapter of {address}, has another adapter as its active version",
            code="name_taken",
        )
    return version.name
