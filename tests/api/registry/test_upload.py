"""Uploads: files are streamed to disk; every malformed form is refused, and nothing of it is kept."""

import asyncio
import io
import resource
import tarfile
import tracemalloc
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Message

from adapters.errors import AdapterRejected, StoreFull
from adapters.format.archive import max_bytes
from adapters.format.files import CONFIG, MAX_FILES, MAX_JSON_BYTES, ORIGIN, WEIGHTS
from adapters.format.selection import Selection
from server.api.http.body_limits import BodyLimitMiddleware
from server.api.registry.upload import MAX_FIELD_BYTES, MAX_FIELDS, Upload, receive
from server.errors import InvalidRequest, UploadTooLarge

LIMIT = 3 << 20
CONTENT = {CONFIG: b'{"r": 4}', WEIGHTS: bytes(range(256)) * 8192}
README = ("notes.md", b"# legal")
FORM = {"content-type": "multipart/form-data; boundary=cut"}

NAMED = 'Content-Disposition: form-data; name="f"'
CONFIG_HEAD = f'{NAMED}; filename="{CONFIG}"'

Part = tuple[str, tuple[str | None, bytes]]
FILES: list[Part] = [("files", (name, content)) for name, content in CONTENT.items()]


def form(parts: list[Part]) -> tuple[bytes, dict[str, str]]:
    """Return a body and its headers, as httpx builds them."""
    request = httpx.Request("POST", "http://x/v1/adapters", files=parts)
    return request.read(), dict(request.headers)


def raw(*parts: tuple[str, bytes]) -> bytes:
    """Return a body of parts with these headers, and its own headers."""
    return (
        b"".join(b"--cut\r\n" + head.encode() + b"\r\n\r\n" + data + b"\r\n" for head, data in parts) + b"--cut--\r\n"
    )


def tgz(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def receives(
    staging: Path, body: bytes, headers: dict[str, str], piece: int = 65536, end: Message | None = None
) -> Upload:
    """Call ``receive`` with a body in pieces; ``end`` replaces its last message."""
    pieces = [body[start : start + piece] for start in range(0, len(body), piece)] or [b""]
    messages: list[Message] = [{"type": "http.request", "body": each, "more_body": True} for each in pieces]
    messages.append(end or {"type": "http.request", "body": b"", "more_body": False})

    async def next_message() -> Message:
        return messages.pop(0)

    raw_headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    request = Request({"type": "http", "method": "POST", "path": "/", "headers": raw_headers}, next_message)
    return asyncio.run(receive(request, staging, LIMIT))


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    (tmp_path / "staging").mkdir()
    return tmp_path / "staging"


def content(staging: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in staging.iterdir()}


@pytest.mark.parametrize("piece", [1 << 20, 1000, 7])
def test_files_and_fields_in_any_order(staging: Path, piece: int) -> None:
    parts: list[Part] = [
        ("name", (None, b"legal")),
        ("a", (CONFIG, CONTENT[CONFIG])),
        ("pinned", (None, "wä\r\n--x".encode())),
        ("b", (ORIGIN, b"\r\n--\r\n\r")),
        ("empty", (None, b"")),
        ("c", README),
        ("d", (WEIGHTS, CONTENT[WEIGHTS][:100_000])),
        ("preload", (None, b"true")),
    ]
    upload = receives(staging, *form(parts), piece)
    fields = {"name": "legal", "pinned": "wä\r\n--x", "empty": "", "preload": "true"}
    assert upload == Upload(fields, Selection(ignored=("notes.md",), ignored_count=1))
    assert content(staging) == {
        CONFIG: CONTENT[CONFIG],
        ORIGIN: b"\r\n--\r\n\r",
        WEIGHTS: CONTENT[WEIGHTS][:100_000],
    }


@pytest.mark.parametrize("pack", [tgz, zipped])
@pytest.mark.parametrize("name", ["legal.tar.gz", "legal.tgz", "LEGAL.ZIP", "a/b.tar"])
def test_one_archive(staging: Path, pack: Callable[[dict[str, bytes]], bytes], name: str) -> None:
    """The content determines the format, not the file name."""
    body = form([("file", (name, pack({**CONTENT, "notes.md": b""}))), ("name", (None, b"legal"))])
    assert receives(staging, *body) == Upload({"name": "legal"}, Selection("", ("notes.md",), 1))
    assert content(staging) == CONTENT


def test_files_with_folder_paths(staging: Path) -> None:
    """As browsers send a folder. A checkpoint that comes first is not selected."""
    names = ["run/checkpoint-1/" + name for name in CONTENT] + ["run/notes.md", *["run/" + name for name in CONTENT]]
    parts = [("files", (name, CONTENT.get(name.removeprefix("run/"), b"other"))) for name in names]
    upload = receives(staging, *form(parts))
    assert upload.selection == Selection("run", tuple(names[:3]), 3, ("run/checkpoint-1",))
    assert content(staging) == CONTENT


def test_ignored_files_may_be_large_and_repeat(staging: Path) -> None:
    large = ("f", ("tokenizer.json", bytes(LIMIT + MAX_JSON_BYTES)))
    upload = receives(staging, *form([large, *FILES, large]))
    assert upload.selection == Selection(ignored=("tokenizer.json",) * 2, ignored_count=2)
    assert content(staging) == CONTENT


REFUSED: dict[str, tuple[list[Part], str | None, str]] = {
    "something else": ([("f", ("weights", b"x"))], "weights", "is neither one of an adapter's files"),
    "no adapter": ([("f", ("optimizer.pt", b"x")), ("f", README)], CONFIG, "is missing"),
    "no weights": ([FILES[0], ("f", README)], WEIGHTS, "is missing"),
    "no config": ([FILES[1]], CONFIG, "is missing"),
    "pickle": ([FILES[0], ("f", ("adapter_model.bin", b"x"))], "adapter_model.bin", "is a pickle, .* save_pretrained"),
    "other packer": ([("f", ("legal.rar", b"Rar!"))], "legal.rar", "pack the adapter's folder as .tar.gz or .zip"),
    "path": ([*FILES, ("f", ("../notes.md", b"x"))], "../notes.md", "leads out of its folder"),
    "backslash": ([*FILES, ("f", ("a\\notes.md", b"x"))], "a\\notes.md", "is not a relative path"),
    "absolute": ([("f", (f"/tmp/{CONFIG}", b"x"))], f"/tmp/{CONFIG}", "is not a relative path"),
    "twice": ([*FILES, FILES[0]], CONFIG, "occurs twice"),
    "several": (
        [("f", (f"{folder}/{name}", b"x")) for folder in ("a", "b") for name in CONTENT],
        None,
        "there are 2 adapters in it: a, b; send one at a time",
    ),
    "two archives": ([("f", ("a.zip", zipped(CONTENT))), ("f", ("b.zip", b""))], "b.zip", "comes with other files"),
    "archive after files": ([*FILES, ("f", ("a.zip", b""))], "a.zip", "comes with other files"),
    "files after archive": ([("f", ("a.zip", b"")), *FILES], CONFIG, "comes with other files"),
    "large config": ([("f", (CONFIG, bytes(MAX_JSON_BYTES + 1)))], CONFIG, "is larger than 4194304 bytes"),
    "large weights": ([("f", (WEIGHTS, bytes(LIMIT + 1)))], WEIGHTS, f"is larger than {LIMIT} bytes"),
    "bad archive": ([("f", ("a.zip", b"PK\3\4"))], "a.zip", "is no .tar, .tar.gz or .zip archive"),
    "bad member": ([("f", ("a.zip", zipped({"../x": b""})))], "../x", "leads out of its folder"),
    "name as an archive": ([("f", ("..\n.zip", b"x"))], "..%0A.zip", "is no .tar, .tar.gz or .zip archive"),
    "pickle in an archive": (
        [("f", ("a.zip", zipped({CONFIG: b"{}", "adapter_model.bin": b"x"})))],
        "adapter_model.bin",
        "is a pickle, .* save_pretrained",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_are_refused(staging: Path, case: str) -> None:
    parts, file, reason = REFUSED[case]
    with pytest.raises(AdapterRejected, match=reason) as refusal:
        receives(staging, *form(parts))
    assert refusal.value.file == file
    assert {path.name for path in staging.parent.iterdir()} == {"staging"}
    assert {path.name for path in staging.iterdir()} <= {CONFIG, WEIGHTS, ".received"}


def test_too_many_files(staging: Path) -> None:
    with pytest.raises(AdapterRejected, match="more than 4096 files: send only adapter_config"):
        receives(staging, raw(*[(f'{NAMED}; filename="{index}"', b"") for index in range(MAX_FILES + 1)]), FORM)


def test_form_with_an_empty_file_field(staging: Path) -> None:
    with pytest.raises(AdapterRejected, match="a file without a name"):
        receives(staging, raw((f'{NAMED}; filename=""', b"")), FORM)


@pytest.mark.parametrize(
    ("parts", "field", "reason"),
    [
        ([("name", (None, b"a")), *FILES, ("name", (None, b"b"))], "name", "occurs twice"),
        ([("name", (None, b"x" * (MAX_FIELD_BYTES + 1)))], "name", f"{MAX_FIELD_BYTES} bytes"),
        ([("name", (None, b"\xff"))], "name", "UTF-8"),
        ([(f"field{index}", (None, b"")) for index in range(MAX_FIELDS + 1)], "field16", "at most 16 fields"),
    ],
    ids=["twice", "long", "binary", "many"],
)
def test_fields_that_are_refused(staging: Path, parts: list[Part], field: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as refusal:
        receives(staging, *form(parts))
    assert refusal.value.param == field


@pytest.mark.parametrize(
    ("body", "headers", "reason"),
    [
        (b"{}", {"content-type": "application/json"}, "is not multipart/form-data with a boundary"),
        (b"{}", {}, "is not multipart/form-data with a boundary"),
        (b"", {"content-type": "multipart/form-data"}, "with a boundary"),
        (b"", {"content-type": "multipart/form-data; boundary="}, "with a boundary"),
        (b"", {"content-type": f"multipart/form-data; boundary={'x' * 1000}"}, "exceeds maximum"),
        (b"", FORM, "ends before its last boundary"),
        (b"--cut\r\n", FORM, "ends before its last boundary"),
        (raw((CONFIG_HEAD, b"{}"))[:-8], FORM, "ends before its last boundary"),
        (raw((CONFIG_HEAD, b"{}")).replace(b"cut", b"mut"), FORM, "cannot be read as a form"),
        (raw(("Content-Type: text/plain", b"{}")), FORM, "no Content-Disposition"),
        (raw(("Content-Disposition: form-data", b"{}")), FORM, "no Content-Disposition"),
        (raw(('Content-Disposition: attachment; name="f"', b"{}")), FORM, "no Content-Disposition"),
        (raw((f"{CONFIG_HEAD}\r\nContent-Transfer-Encoding: base64", b"e30=")), FORM, "Content-Transfer-Encoding"),
        (raw((f"{NAMED}; x={'x' * 10_000}", b"{}")), FORM, "Maximum header size"),
        (raw(("\r\n".join([NAMED, *["X-Y: z"] * 50]), b"{}")), FORM, "Maximum header count"),
        (raw(("no header", b"{}")), FORM, "cannot be read as a form"),
    ],
)
def test_malformed_forms(staging: Path, body: bytes, headers: dict[str, str], reason: str) -> None:
    with pytest.raises(HTTPException, match=reason) as refusal:
        receives(staging, body, headers)
    assert refusal.value.status_code == 400


@pytest.mark.parametrize("length", [0, 10, 300, 50_000])
def test_disconnect_during_an_upload(staging: Path, length: int) -> None:
    body, headers = form(FILES)
    with pytest.raises(ClientDisconnect):
        receives(staging, body[:length], headers, end={"type": "http.disconnect"})


def test_disconnect_after_a_refusal(staging: Path) -> None:
    body, headers = form([("f", ("optimizer.pt", bytes(3 << 20)))])
    with pytest.raises(ClientDisconnect):
        receives(staging, body, headers, end={"type": "http.disconnect"})


@pytest.fixture
def little_room() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("little_room")
@pytest.mark.parametrize("parts", [FILES, [("f", ("a.zip", zipped(CONTENT)))], [("f", ("a.tgz", tgz(CONTENT)))]])
def test_a_full_disk(staging: Path, parts: list[Part]) -> None:
    with pytest.raises(StoreFull, match="no room"):
        receives(staging, *form(parts))


def test_it_takes_little_memory(staging: Path) -> None:
    """About three chunks of a megabyte, for any length of the body."""
    head = f'--cut\r\n{NAMED}; filename="{WEIGHTS}"\r\n\r\n'.encode()
    sent = 0

    async def next_message() -> Message:
        nonlocal sent
        sent += 1
        if sent > 600:
            return {"type": "http.request", "body": b"\r\n" + raw((CONFIG_HEAD, b"{}")), "more_body": False}
        return {"type": "http.request", "body": head if sent == 1 else bytes(65536), "more_body": True}

    request = Request(
        {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-type", FORM["content-type"].encode())]},
        next_message,
    )
    tracemalloc.start()
    try:
        asyncio.run(receive(request, staging, 64 << 20))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (staging / WEIGHTS).stat().st_size == 599 * 65536
    assert peak < 8 << 20


def test_cancelled_upload_ends_before_its_folder_is_deleted(staging: Path) -> None:
    async def cancel_in_the_middle() -> list[str]:
        waiting = asyncio.Event()
        messages: list[Message] = [
            {"type": "http.request", "body": raw((CONFIG_HEAD, bytes(3 << 20)))[:-10], "more_body": True}
        ]

        async def next_message() -> Message:
            if messages:
                return messages.pop()
            waiting.set()
            await asyncio.Event().wait()
            raise AssertionError

        headers = [(b"content-type", FORM["content-type"].encode())]
        request = Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, next_message)
        task = asyncio.create_task(receive(request, staging, LIMIT))
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return [path.name for path in staging.iterdir()]

    assert asyncio.run(cancel_in_the_middle()) == [".received"]


# Maximum size of a body


async def _measure(request: Request) -> JSONResponse:
    return JSONResponse(sum([len(chunk) async for chunk in request.stream()]))


def _app(endpoint: Any = _measure) -> Starlette:
    routes = [Route(path, endpoint, methods=["POST", "PUT"]) for path in ("/v1/adapters", "/v1/completions")]
    return Starlette(
        routes=routes,
        middleware=[Middleware(BodyLimitMiddleware, limit=1000, upload_limits={"/v1/adapters": 5000}, seconds=60)],
    )


async def _in_pieces(size: int) -> AsyncIterator[bytes]:
    for start in range(0, size, 100):
        yield bytes(min(100, size - start))


def sends(size: int, content_type: str, path: str = "/v1/adapters", method: str = "POST") -> int:
    async def send() -> int:
        transport = httpx.ASGITransport(_app())
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            headers = {"content-type": content_type}
            answer = await client.request(method, path, content=_in_pieces(size), headers=headers)
            assert answer.status_code != 200 or answer.json() == size
            return answer.status_code

    return asyncio.run(send())


def test_an_upload_may_be_larger_than_other_bodies() -> None:
    assert sends(5000, "multipart/form-data; boundary=x") == 200
    assert sends(5000, "Multipart/Form-Data") == 200
    assert sends(5001, "multipart/form-data; boundary=x") == 413
    assert sends(1000, "application/json") == 200
    assert sends(1001, "application/json") == 413
    assert sends(1001, "multipart/form-datax") == 413
    assert sends(1001, "multipart/form-data", path="/v1/completions") == 413
    assert sends(1001, "multipart/form-data", method="PUT") == 413


@pytest.mark.parametrize("declared", [True, False])
def test_upload_larger_than_any_adapter(staging: Path, monkeypatch: pytest.MonkeyPatch, declared: bool) -> None:
    monkeypatch.setattr("adapters.format.archive.AROUND_BYTES", 1 << 20)
    limit = max_bytes(LIMIT)
    body, headers = raw((CONFIG_HEAD, b"{}")), {**FORM, "content-length": str(limit + 1)}
    if not declared:
        body, headers = raw((f'{NAMED}; filename="notes.md"', bytes(limit))), FORM
    with pytest.raises(UploadTooLarge, match=f"larger than {limit} bytes: pack only the adapter's own files: adapter_"):
        receives(staging, body, headers)
