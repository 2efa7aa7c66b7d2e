"""Register adapters from a folder, a remote source or an upload."""

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from traceback import clear_frames

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
from server.access.key import ApiKey
from server.access.view import RegistryView
from server.api.http.errors import InvalidAdapter, status_of
from server.api.registry.upload import receive
from server.api.schemas.registry import AdapterRequest, AdapterUpload
from server.api.service import Service
from server.errors import InvalidRequest, QueueFull
from server.metrics.metrics import Metrics

log = logging.getLogger(__name__)

UPLOAD = "upload"
"""Source of uploaded adapters in their receipts."""


async def register_named(service: Service, key: ApiKey, request: AdapterRequest, expected: int | None) -> Registered:
    """Register the folder or the remote source that a JSON body names.

    Raises Draining, InvalidAdapter, InvalidRequest, or another AdapterError.
    """
    service.event_router.check_open()
    options = request.options(expected)
    if request.path is not None:
        return await register_path(service, key, request.name, request.path, options)
    try:
        return await register_source(service, key, request.name, str(request.source), options)
    except AdapterRejected as error:
        raise InvalidAdapter(error, "source") from error


async def register_source(
    service: Service, key: ApiKey, name: str, address: str, options: RegistrationOptions
) -> Registered:
    """Register the adapter at an address that ``--allow-source`` allows. Raises Draining, or an AdapterError."""
    service.event_router.check_open()
    with _failures_counted(service.metrics), service.registration_limits.counted():
        check_name(name, frozenset({service.base.name}))  # fail before a long download
        view = service.view(key)
        view.check_may_register(name)
        return await _run_to_completion(service, lambda: _fetched(service, view, name, address, options))


async def register_path(
    service: Service, key: ApiKey, name: str, path: str, options: RegistrationOptions
) -> Registered:
    """Register a folder under ``--adapter-root``. Raises Forbidden if the key may not use the name."""
    view = service.view(key)

    def register() -> Registered:
        folder = allowed_folder(service.settings.adapter_root, path)
        return view.register_folder(name, folder, options)

    with _failures_counted(service.metrics, "path"), service.registration_limits.counted():
        view.check_may_register(name)  # before anything is said about the path
        return await _run_to_completion(service, register)


async def register_upload(service: Service, key: ApiKey, request: Request, expected: int | None) -> Registered:
    """Register the files of a multipart form. Nothing remains if the client disconnects before the form is complete.

    Raises Draining, QueueFull if too many uploads are in progress, InvalidAdapter, or another AdapterError.
    """
    service.event_router.check_open()
    with _failures_counted(service.metrics, "file"), service.registration_limits.counted():
        if service.registration_limits.uploads.locked():
            raise QueueFull("Too many adapters are being uploaded; try again later.", code="too_many_uploads")
        async with service.registration_limits.uploads:
            return await _receive_and_register(service, service.view(key), request, expected)


async def _receive_and_register(
    service: Service, view: RegistryView, request: Request, expected: int | None
) -> Registered:
    staged = ExitStack()

    def register(upload: AdapterUpload, selection: Selection) -> Registered:
        with staged:
            return view.register(upload.name, staging, UPLOAD, upload.options(expected), selection)

    staging = await run_in_threadpool(staged.enter_context, service.store.stage())
    try:
        received = await receive(request, staging, service.store.limit)
        upload = _checked(received.fields)
    except BaseException:
        await run_in_threadpool(staged.close)
        raise
    return await _run_to_completion(service, lambda: register(upload, upload.with_left_out(received.selection)))


def _fetched(service: Service, view: RegistryView, name: str, address: str, options: RegistrationOptions) -> Registered:
    with service.store.stage() as staging:
        fetched = service.sources.fetch(address, staging)
        return view.register(name, staging, fetched.source, options, fetched.selection)


def _checked(fields: Mapping[str, str]) -> AdapterUpload:
    try:
        return AdapterUpload.model_validate(fields)
    except ValidationError as error:
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in error.errors()]) from error


async def _run_to_completion(service: Service, register: Callable[[], Registered]) -> Registered:
    """Register on a thread, and finish even if the client disconnects.

    Registrations wait for disks and networks, so they have threads of their own: asyncio's default threads encode
    prompts, and Starlette's serve other changes of the registry.
    """

    def registering() -> Registered:
        registered = register()
        log.info(
            "Registered %s%s",
            registered.version.name,
            "" if registered.new else " (unchanged: the name already had this content)",
        )
        service.metrics.registered("accepted" if registered.new else "same")
        return registered

    return await asyncio.shield(to_thread.run_sync(registering, limiter=service.registration_limits.registrations))


@contextmanager
def _failures_counted(metrics: Metrics, param: str | None = None) -> Iterator[None]:
    """Count failed registrations, and attach the request field ``param``, if given, to an adapter's rejection."""
    try:
        yield
    except Exception as error:
        log.info("Registration failed: %.500r", error)
        # A frame of anyio has the future that has the error that has the frame: they would stay, with all that was read
        # of the adapter, until Python looks for garbage.
        clear_frames(error.__traceback__)
        metrics.registered("refused" if status_of(error) < 500 else "failed")
        if isinstance(error, AdapterRejected) and param is not None:
            raise InvalidAdapter(error, param) from error
        raise


def allowed_folder(root: Path | None, path: str) -> Path:
    """Resolve ``path``, absolute or relative to ``root``, and all symlinks in it.

    Raises InvalidRequest if the folder does not exist, or if it or one of the adapter's files is outside ``root``.
    """
    if "://" in path:
        raise InvalidRequest(
            "This is a URL, not a path. Send it in the field `source`; the server's --allow-source must permit it.",
            param="path",
        )
    if root is None:
        raise InvalidRequest(
            "This server cannot register adapters by path because it was started without --adapter-root.", param="path"
        )
    root = root.resolve()
    try:
        folder = (root / path).resolve()
        places = [folder, *((folder / name).resolve() for name in FILES)]
        inside = all(place.is_relative_to(root) for place in places)
        exists = inside and folder.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # ValueError: a NUL
        raise InvalidRequest("The path cannot be resolved.", param="path") from error
    if not inside:
        raise InvalidRequest("The path is outside the server's --adapter-root.", param="path")
    if not exists:
        raise InvalidRequest("There is no such folder under the server's --adapter-root.", param="path")
    return folder
