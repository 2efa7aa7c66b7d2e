"""``POST /v1/training/data``: what the trainer says of a file of rows before anybody trains on it."""

import shutil
from asyncio import Semaphore
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from adapters.errors import printable
from adapters.store.store import translate_disk_full
from server.api.http.errors import JsonResponse
from server.api.http.openapi import error_statuses, returns, schema_ref
from server.api.registry.upload import within_time
from server.api.schemas.training import DataForm, TrainingData
from server.api.service import Service, ServiceDep
from server.errors import InvalidRequest, QueueFull

router = APIRouter(prefix="/v1/training", tags=["training"])

ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
MAX_FIELDS = 16
MAX_FIELD_BYTES = 4096
MAX_NAME = 100
_FORM = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema_ref(DataForm)}}}}


@router.post(
    "/data",
    responses=returns(TrainingData) | error_statuses(400, 413, 415, 429, 503, 507),
    openapi_extra=_FORM,
)
async def examine_data(request: Request, service: ServiceDep) -> JsonResponse:
    """Examine a file of examples as `manylora train` does, without training.

    Returns the report on the data, and the first rows as the model sees them, with what is trained on. The file is not
    kept.
    """
    service.event_router.check_open()
    with service.registration_limits.counted():
        # Whoever sends slowly must not keep others from having their files examined.
        _check_free(service.data_previews)
        _check_free(service.data_uploads)
        async with service.data_uploads:
            return JsonResponse(await _examine(request, service))


def _check_free(slots: Semaphore) -> None:
    if slots.locked():
        raise QueueFull("Too many files are being examined; try again later.", code="too_many_uploads")


async def _examine(request: Request, service: Service) -> dict[str, Any]:
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise HTTPException(415, "Send the file as `multipart/form-data`, in the field `file`.")
    parser = MultiPartParser(
        request.headers,
        within_time(request.stream()),
        max_files=1,
        max_fields=MAX_FIELDS,
        max_part_size=MAX_FIELD_BYTES,
    )
    try:
        with translate_disk_full():
            form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        raise HTTPException(400, f"The body cannot be read as a form: {error}.") from error
    try:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise InvalidRequest("The form has no file in the field `file`.", param="file")
        asked = _checked([(name, value) for name, value in form.multi_items() if name != "file"], service)
        name = _name(file.filename or "")
        _check_free(service.data_previews)
        async with service.data_previews:
            found = await run_in_threadpool(_run, service, file.file, name, asked)
        return {"object": "training_data", **found}
    finally:
        await form.close()


def _run(service: Service, file: BinaryIO, name: str, asked: DataForm) -> dict[str, Any]:
    with translate_disk_full(), TemporaryDirectory(prefix="manylora-data-") as folder:
        # Not the given name: it may be too long for the disk, or mean something to the trainer.
        path = Path(folder, f"received-rows.{name.rpartition('.')[2].lower()}")
        with path.open("xb") as copy:
            shutil.copyfileobj(file, copy)
        options = asked.model_dump(exclude={"rows", "file"}, exclude_none=True)
        return service.data_preview.examine(path, name, asked.rows, options)


def _name(given: str) -> str:
    """Return the file's name without folders. Raises InvalidRequest if it has another ending than data files have."""
    name = printable(given.replace("\\", "/").rpartition("/")[2][-MAX_NAME:])
    if not name.lower().endswith(ENDINGS) or "\0" in name:
        raise InvalidRequest(f"The name of the file must end in one of {', '.join(ENDINGS)}.", param="file")
    return name


def _checked(fields: list[tuple[str, Any]], service: Service) -> DataForm:
    names = [name for name, _ in fields]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InvalidRequest("The field occurs twice in the form.", param=printable(twice))
    try:
        asked = DataForm.model_validate(dict(fields))
    except ValidationError as error:
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in error.errors()]) from error
    if asked.max_length is not None and asked.max_length > service.base.max_model_len:
        context = service.base.max_model_len
        raise InvalidRequest(f"`max_length` must be at most {context}, the context of this model.", param="max_length")
    return asked
