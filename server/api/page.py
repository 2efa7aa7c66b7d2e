"""The web page: the files that ``make page`` builds, and which requests ask for them."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

BUILT = Path(__file__).parents[1] / "page" / "dist"
INDEX = "index.html"
ASSETS = "assets"
_HASHED = re.compile(r".*-[\w-]{8}\.\w+")
"""Names that contain a hash of the content, as Vite makes them: such a file never changes."""
NOT_BUILT = (
    "The web page is not built. In a checkout of the source, `make page` builds it; the wheels and images of releases "
    "have it built."
)
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data: blob:",
        "font-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""Content-Security-Policy: a model's answer must not run as script, whatever it is, nor send what the page shows."""
HEADERS: Mapping[str, str] = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    # uvicorn and the gateway add x-content-type-options to every response
}
FOREVER = "public, max-age=31536000, immutable"
TWINS: Mapping[str, str] = {"br": ".br", "gzip": ".gz"}
"""Content coding -> ending of a compressed file beside the plain one, the best first."""
TYPES: Mapping[str, str] = {
    ".css": "text/css; charset=utf-8",
    ".gif": "image/gif",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".jpg": "image/jpeg",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".map": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".wasm": "application/wasm",
    ".webp": "image/webp",
    ".woff2": "font/woff2",
}
"""Not those of the mimetypes module, which differ with files of the system."""
_OTHER_TYPE = "application/octet-stream"
_QUALITY = re.compile(r";\s*q\s*=\s*([0-9.]+)", re.IGNORECASE)


class Page:
    """The built page. Files are read when they are first asked for, and again when they have changed."""

    def __init__(self, folder: Path = BUILT) -> None:
        self._folder = folder

    @property
    def built(self) -> bool:
        """Whether there is a page to serve."""
        return (self._folder / INDEX).is_file()

    def wanted(self, scope: Scope) -> bool:
        """Whether a request asks for the page's document, not for the JSON index of the same path."""
        if (scope["method"], scope["path"]) != ("GET", "/"):
            return False
        accept = ", ".join(Headers(scope=scope).getlist("accept"))
        return quality(accept, "text/html") > quality(accept, "application/json")

    def document(self, headers: Headers) -> Response:
        """Return the document, or status 503 and how to build it."""
        if not self.built:
            text = f"<!doctype html><title>manylora</title><p>{NOT_BUILT}</p>\n"
            return Response(text, 503, {**HEADERS, "cache-control": "no-store"}, media_type=TYPES[".html"])
        return _answer(self._folder / INDEX, headers, "no-cache", "Accept, Accept-Encoding")

    def asset(self, path: str, headers: Headers) -> Response:
        """Return a file of the folder ``assets``. Raises HTTPException 404."""
        folder = self._folder / ASSETS
        try:
            file = (folder / path).resolve()
            found = file.is_relative_to(folder.resolve()) and file.is_file()
        except (OSError, ValueError):  # a name that no file can have
            found = False
        if not found:
            raise HTTPException(404)
        return _answer(file, headers, FOREVER if _HASHED.fullmatch(file.name) else "no-cache", "Accept-Encoding")


def quality(header: str, choice: str) -> float:
    """Return how much ``Accept`` or a header like it wants ``choice``, by its most specific range; 0 for not at all."""
    ranges = (choice, f"{choice.partition('/')[0]}/*", "*/*")
    wanted = dict(_wanted(header))
    return next((wanted[each] for each in ranges if each in wanted), 0.0)


def _wanted(header: str) -> Iterator[tuple[str, float]]:
    """Yield each value of a header with its quality."""
    for part in header.lower().split(","):
        value, _, parameters = part.partition(";")
        given = _QUALITY.search(f";{parameters}")
        try:
            yield value.strip(), 1.0 if given is None else float(given[1])
        except ValueError:  # several points
            yield value.strip(), 0.0


def _answer(file: Path, headers: Headers, caching: str, vary: str) -> Response:
    coding, content, tag = _encoded(file, ", ".join(headers.getlist("accept-encoding")))
    answered = {**HEADERS, "cache-control": caching, "vary": vary, "etag": tag}
    if _has(headers.get("if-none-match", ""), tag):
        return Response(status_code=304, headers=answered)
    if coding is not None:
        answered["content-encoding"] = coding
    return Response(content, headers=answered, media_type=TYPES.get(file.suffix, _OTHER_TYPE))


def _encoded(file: Path, accepted: str) -> tuple[str | None, bytes, str]:
    """Return the best accepted coding of a file, its bytes in it, and its ETag."""
    for coding, ending in TWINS.items():
        twin = file.with_name(file.name + ending)
        if quality(accepted, coding) > 0 and twin.is_file():
            return (coding, *_content(twin))
    return (None, *_content(file))


def _content(file: Path) -> tuple[bytes, str]:
    state = file.stat()
    return _read(file, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=128)
def _read(file: Path, changed: int, size: int) -> tuple[bytes, str]:
    """Return a file's bytes and ETag: of its content, since the times of installed files may be those of others."""
    content = file.read_bytes()
    return content, f'"{hashlib.sha256(content).hexdigest()[:32]}"'


def _has(if_none_match: str, tag: str) -> bool:
    return tag in {each.strip().removeprefix("W/") for each in if_none_match.split(",")} or if_none_match.strip() == "*"
