"""Registration: from a folder, an address or an upload to a version of an adapter."""

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from anyio import to_thread
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from adapters.errors import AdapterRejected
from adapters.format.files import FILES
from adapters.format.selection import Selection
from adapters.registry.names import check_name
from adapters.registry.registration import Registered, RegistrationOptions
from server.api.http.errors import Refusal, status_of
from server.api.registry.upload import receive
from server.api.schemas.registry import AdapterRequest, AdapterUpload
from server.api.service import Service
from server.errors import InvalidRequest, QueueFull
from server.metrics import Metrics

log = logging.getLogger(__name__)

UPLOAD = "upload"
"""What a receipt calls the source of an upload."""


async def register_named(service: Service, request: AdapterRequest, expected: int | None) -> Registered:
    """Register what a JSON body names. Raises Refusal, or what stands in the way."""
    service.event_router.check_open()
    options = request.options(expected)
    if request.path is not None:
        return await register_path(service, request.name, request.path, options)
    with _outcome(service.metrics, "source"), service.intake.counted():
        check_name(request.name, frozenset({service.base.name}))  # before a long download
        return await _to_the_end(service, lambda: _fetched(service, request.name, str(request.source), options))


async def register_path(service: Service, name: str, path: str, options: RegistrationOptions) -> Registered:
    """Register a folder under ``adapter_root``."""

    def register() -> Registered:
        folder = allowed_folder(service.settings.adapter_root, path)
        return service.registry.register_folder(name, folder, options)

    with _outcome(service.metrics, "path"), service.intake.counted():
        return await _to_the_end(service, register)


async def register_upload(service: Service, request: Request, expected: int | None) -> Registered:
    """Register what a form brings. A client that leaves before it is complete leaves nothing behind.

    Raises QueueFull where too many are bringing some already.
    """
    service.event_router.check_open()
    with _outcome(service.metrics, "file"), service.intake.counted():
        if service.intake.uploads.locked():
            raise QueueFull("Too many adapters are being uploaded; try again later.", code="too_many_uploads")
        async with service.intake.uploads:
            return await _receive_and_register(service, request, expected)


async def _receive_and_register(service: Service, request: Request, expected: int | None) -> Registered:
    staged = ExitStack()

    def register(upload: AdapterUpload, selection: Selection) -> Registered:
        with staged:
            return service.registry.register(upload.name, staging, UPLOAD, upload.options(expected), selection)

    staging = await run_in_threadpool(staged.enter_context, service.store.stage())
    try:
        received = await receive(request, staging, service.store.limit)
        upload = _checked(received.fields)
    except BaseException:
        await run_in_threadpool(staged.close)
        raise
    return await _to_the_end(service, lambda: register(upload, upload.after(received.selection)))


def _fetched(service: Service, name: str, address: str, options: RegistrationOptions) -> Registered:
    with service.store.stage() as staging:
        fetched = service.sources.fetch(address, staging)
        return service.registry.register(name, staging, fetched.source, options, fetched.selection)


def _checked(fields: Mapping[str, str]) -> AdapterUpload:
    try:
        return AdapterUpload.model_validate(fields)
    except ValidationError as error:
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in error.errors()]) from error


async def _to_the_end(service: Service, register: Callable[[], Registered]) -> Registered:
    """Register on a thread, although the client may leave before it is done.

    Not on asyncio's own few threads, where prompts are encoded, nor on those that other changes take: registrations
    wait for disks and networks.
    """

    def registering() -> Registered:
        registered = register()
        log.info("Registered %s%s", registered.version.name, "" if registered.new else ", which it was already")
        service.metrics.registered("accepted" if registered.new else "same")
        return registered

    return await asyncio.shield(to_thread.run_sync(registering, limiter=service.intake.registrations))


@contextmanager
def _outcome(metrics: Metrics, param: str) -> Iterator[None]:
    """Counts a registration that comes to nothing; says of a rejected adapter by which field it came."""
    try:
        yield
    except Exception as error:
        log.info("Registered nothing: %.500r", error)
        metrics.registered("refused" if status_of(error) < 500 else "failed")
        if isinstance(error, AdapterRejected):
            raise Refusal(error, param) from error
        raise


def allowed_folder(root: Path | None, path: str) -> Path:
    """The folder that ``path``, absolute or relative to ``root``, leads to through all symlinks.

    Raises InvalidRequest where it, or one of the adapter's files in it, is not under ``root``.
    """
    if "://" in path:
        raise InvalidRequest(
            "This is an address, not a path: it goes in the field `source`, from where --allow-source lets this server "
            "fetch adapters.",
            param="path",
        )
    if root is None:
        raise InvalidRequest(
            "This server takes no adapters by path: it was started without --adapter-root.", param="path"
        )
    root = root.resolve()
    try:
        folder = (root / path).resolve()
        places = [folder, *((folder / name).resolve() for name in FILES)]
        inside = all(place.is_relative_to(root) for place in places)
        exists = inside and folder.is_dir()
    except (OSError, RuntimeError) as error:
        raise InvalidRequest("The path cannot be followed.", param="path") from error
    if not inside:
        raise InvalidRequest("The path leads out of the server's --adapter-root.", param="path")
    if not exists:
        raise InvalidRequest("There is no such folder under the server's --adapter-root.", param="path")
    return folder
