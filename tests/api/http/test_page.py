"""The web page's files: who gets the page, caching, compression, and what a browser may do with it."""

import gzip
import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.access.key_spec import KeySpec
from server.api.page import FOREVER, NOT_BUILT, POLICY, Page, quality
from tests.api.live import Live, running, tiny_service

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"
DOCUMENT = b'<!doctype html><script type="module" src="/assets/index-DlF--8zV.js"></script>'
SCRIPT = b"console.log('page');\n" * 40
GZIP = gzip.compress(SCRIPT, mtime=0)  # a time would be in a test's name, and differ between workers
BROTLI = b"not really brotli: the server does not look into the file"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built page."""
    folder = tmp_path_factory.mktemp("page") / "dist"
    assets = folder / "assets"
    assets.mkdir(parents=True)
    (folder / "index.html").write_bytes(DOCUMENT)
    (folder / "index.html.gz").write_bytes(gzip.compress(DOCUMENT))
    (assets / "index-DlF--8zV.js").write_bytes(SCRIPT)
    (assets / "index-DlF--8zV.js.br").write_bytes(BROTLI)
    (assets / "index-DlF--8zV.js.gz").write_bytes(GZIP)
    (assets / "favicon.svg").write_bytes(b"<svg/>")
    (folder.parent / "secret.js").write_bytes(b"secret")
    (folder / "other.js").write_bytes(b"beside assets")
    (assets / "link.js").symlink_to(folder.parent / "secret.js")
    return folder


def serving(root: Path, folder: Path, **settings: object) -> Iterator[Live]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.api.app.Page", lambda: Page(folder))
        with running(tiny_service(root, **settings)) as live:
            yield live


@pytest.fixture(scope="module")
def paged(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with a built page."""
    yield from serving(tmp_path_factory.mktemp("paged"), built)


@pytest.mark.parametrize(
    ("accept", "page"),
    [
        (BROWSER, True),
        ("text/html", True),
        ("TEXT/HTML;Q=0.5, */*;q=0.1", True),
        ("text/*", True),
        ("text/html, application/json;q=0.9", True),
        ("*/*", False),
        ("application/json", False),
        ("text/html;q=0.5, application/json", False),
        ("text/html;q=0, */*", False),
        ("text/html;q=1.2.3", False),
        ("", False),
    ],
)
def test_who_prefers_html_gets_the_page(paged: Live, accept: str, page: bool) -> None:
    response = paged.http.get("/", headers={"accept": accept})
    assert response.status_code == 200
    assert "Accept" in response.headers["vary"]
    assert (response.content == DOCUMENT) is page
    if not page:
        assert response.json()["name"] == "manylora"


def test_the_document_is_asked_for_again_each_time(paged: Live) -> None:
    response = paged.http.get("/", headers={"accept": BROWSER})
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    again = paged.http.get("/", headers={"accept": BROWSER, "if-none-match": f'"x", W/{response.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == response.headers["etag"]


def test_files_with_a_hash_in_their_name_are_kept_for_ever(paged: Live) -> None:
    assert paged.http.get("/assets/index-DlF--8zV.js").headers["cache-control"] == FOREVER
    response = paged.http.get("/assets/favicon.svg")
    assert (response.content, response.headers["content-type"]) == (b"<svg/>", "image/svg+xml")
    assert response.headers["cache-control"] == "no-cache"
    assert "content-encoding" not in response.headers


@pytest.mark.parametrize(
    ("accepted", "coding", "content"),
    [
        ("br, gzip", "br", BROTLI),
        ("gzip, deflate, br;q=0", "gzip", GZIP),
        ("gzip;q=0.0", None, SCRIPT),
        ("identity", None, SCRIPT),
    ],
)
def test_compressed_twins(paged: Live, accepted: str, coding: str | None, content: bytes) -> None:
    request = paged.http.build_request("GET", "/assets/index-DlF--8zV.js", headers={"accept-encoding": accepted})
    response = paged.http.send(request, stream=True)
    try:
        raw = b"".join(response.iter_raw())
    finally:
        response.close()
    assert response.headers.get("content-encoding") == coding
    assert response.headers["content-type"] == "text/javascript; charset=utf-8"
    assert response.headers["vary"] == "Accept-Encoding"
    assert int(response.headers["content-length"]) == len(raw)
    assert raw == content or gzip.decompress(raw) == SCRIPT
    other = {"accept-encoding": "br" if coding != "br" else "gzip", "if-none-match": response.headers["etag"]}
    assert paged.http.head("/assets/index-DlF--8zV.js", headers=other).status_code == 200, "another coding, another tag"


@pytest.mark.parametrize("path", ["/", "/assets/index-DlF--8zV.js"])
def test_head_is_get_without_a_body(paged: Live, path: str) -> None:
    whole, head = (paged.http.request(method, path, headers={"accept": BROWSER}) for method in ("GET", "HEAD"))
    assert (head.status_code, head.content) == (200, b"")
    own = {"date", "x-request-id"}
    fields = [{name: value for name, value in each.headers.items() if name not in own} for each in (whole, head)]
    assert fields[0] == fields[1]


@pytest.mark.parametrize("path", ["/", "/assets/index-DlF--8zV.js", "/assets/favicon.svg"])
def test_what_a_browser_may_do_with_it(paged: Live, path: str) -> None:
    headers = paged.http.get(path, headers={"accept": BROWSER}).headers
    assert headers["content-security-policy"] == POLICY
    assert "unsafe" not in POLICY
    assert "default-src 'none'" in POLICY
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-opener-policy"] == "same-origin"


@pytest.mark.parametrize(
    "path",
    [
        *("other.js", "link.js", "../other.js", "..%2Fother.js", "%2e%2e/other.js", "../../secret.js", "nowhere.js"),
        *("", ".", "%00", "x" * 5000, "favicon.svg/", "favicon.svg%2Fx"),
    ],
)
def test_only_the_files_of_the_folder_are_served(paged: Live, path: str) -> None:
    response = paged.http.get(httpx.URL(paged.http.base_url, raw_path=f"/assets/{path}".encode()))
    if path == "favicon.svg/":  # paths lose a trailing slash everywhere
        assert response.content == b"<svg/>"
        return
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "unknown_url"


def test_a_change_on_disk_shows(paged: Live, built: Path) -> None:
    before = paged.http.get("/", headers={"accept": BROWSER, "accept-encoding": "identity"})
    (built / "index.html").write_bytes(DOCUMENT + b"<p>")
    try:
        after = paged.http.get("/", headers={"accept": BROWSER, "accept-encoding": "identity"})
    finally:
        (built / "index.html").write_bytes(DOCUMENT)
    assert after.content == DOCUMENT + b"<p>"
    assert after.headers["etag"] != before.headers["etag"]


def test_without_a_built_page_the_server_says_how_to_build_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for live in serving(tmp_path, tmp_path / "nothing"):
        assert [record.levelno for record in caplog.records if record.getMessage() == NOT_BUILT] == [logging.WARNING]
        response = live.http.get("/", headers={"accept": BROWSER})
        assert (response.status_code, response.headers["cache-control"]) == (503, "no-store")
        assert NOT_BUILT in response.text
        assert live.http.get("/").json()["name"] == "manylora"
        assert live.http.get("/assets/index-DlF--8zV.js").status_code == 404
        assert live.complete()["choices"]


def test_the_page_can_be_turned_off(tmp_path: Path, built: Path) -> None:
    for live in serving(tmp_path, built, no_page=True):
        assert live.http.get("/", headers={"accept": BROWSER}).json()["name"] == "manylora"
        assert live.http.get("/assets/index-DlF--8zV.js").status_code == 404


def test_the_page_needs_no_key_and_the_index_does(tmp_path: Path, built: Path) -> None:
    for live in serving(tmp_path, built):
        secret = live.service.keyring.store.add(KeySpec(name="any", scopes=("metrics",)))[1]
        assert live.http.get("/", headers={"accept": BROWSER}).content == DOCUMENT
        assert live.http.head("/", headers={"accept": BROWSER}).status_code == 200
        assert live.http.get("/assets/favicon.svg").status_code == 200
        assert live.http.get("/").status_code == 401
        assert live.http.get("/", headers={"x-api-key": secret}).json()["name"] == "manylora"
        assert live.http.get("/v1/models", headers={"accept": BROWSER}).status_code == 401
        assert live.http.post("/", headers={"accept": BROWSER}).status_code == 401


def test_without_keys_a_foreign_host_does_not_get_the_page(paged: Live) -> None:
    for path in ("/", "/assets/favicon.svg"):
        response = paged.http.get(path, headers={"accept": BROWSER, "host": "evil.example"})
        assert response.json()["error"]["code"] == "host_not_allowed"


def test_quality_of_the_most_specific_range() -> None:
    header = "text/*;q=0.3, text/html;q=0.7, */*;q=0.5"
    assert [quality(header, kind) for kind in ("text/html", "text/plain", "image/png")] == [0.7, 0.3, 0.5]
    assert quality("", "text/html") == 0
