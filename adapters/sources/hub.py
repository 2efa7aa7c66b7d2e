"""Download an adapter from a Hugging Face hub over plain HTTP.

Each file has a size limit, and redirects are followed only to the hub itself and to public addresses. huggingface_hub
is not used for downloads because it follows any redirect and may switch to another protocol (Xet).
"""

import ipaddress
import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from adapters.errors import SourceRefused
from adapters.format.files import FILES, MAX_FILES, MAX_JSON_BYTES, REQUIRED, WEIGHTS
from adapters.format.foreign_formats import foreign_format_hint
from adapters.store.remote_store import receive

if TYPE_CHECKING:
    from httpx2 import URL, Client, Request, Response

_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_REDIRECTS = 5
_TIMEOUT_SECONDS = 30.0
_DOWNLOAD_SECONDS = 3600.0
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_STATUS_REASONS = {401: "does not exist, or is private", 403: "is private or gated", 404: "does not exist"}


def download(repository: str, revision: str, staging: Path, limit: int) -> tuple[str, list[str]]:
    """Download the adapter's files at a branch, tag or commit into the empty folder ``staging``.

    ``repository``: ``owner/name``; ``limit``: maximum size of the weights file in bytes. Returns the commit, and the
    paths of all files in it if the hub lists them. The hub and the token are those of huggingface_hub (HF_ENDPOINT,
    HF_TOKEN). Raises :class:`SourceRefused`, and :class:`AdapterRejected` for a file that is too large.
    """
    hub = _Hub(repository)
    commit, paths = hub.resolve(revision)
    for name in FILES:
        with hub.get(f"{repository}/resolve/{commit}/{name}") as response:
            if response.status_code == 404:
                if name in REQUIRED:
                    raise SourceRefused(f"hf://{repository}@{commit} has no {name}{foreign_format_hint(paths)}")
                continue
            receive(hub.body(response), staging / name, limit if name == WEIGHTS else MAX_JSON_BYTES)
    return commit, paths


class _Hub:
    """Requests to the hub about one repository, with one deadline for all of them."""

    def __init__(self, repository: str) -> None:
        import httpx2
        from huggingface_hub import constants, get_token

        if constants.is_offline_mode():
            raise SourceRefused(
                "this server does not download from the hub: HF_HUB_OFFLINE is set; upload the adapter instead, or "
                "start the server without it"
            )
        self._repository = repository
        self._endpoint = httpx2.URL(constants.ENDPOINT)
        self._token = get_token()
        self._deadline = time.monotonic() + _DOWNLOAD_SECONDS

    def resolve(self, revision: str) -> tuple[str, list[str]]:
        """Return the commit that a revision refers to now, and the paths of its files."""
        with self.get(f"api/models/{self._repository}/revision/{quote(revision, safe='')}") as response:
            data = bytearray()
            for chunk in self.body(response):
                data += chunk
                if len(data) > MAX_JSON_BYTES:
                    raise self._refused(f"the hub's answer is longer than {MAX_JSON_BYTES >> 20} MiB")
        try:
            found = json.loads(data)
            commit, repository = found["sha"], found.get("id", self._repository)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise self._refused("the hub's answer names no commit") from None
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise self._refused("the hub's answer names no commit")
        if str(repository).lower() != self._repository.lower():
            raise self._refused("the repository has moved; give its new name")
        return commit, _file_paths(found.get("siblings"))

    @contextmanager
    def get(self, path: str) -> "Iterator[Response]":
        """Follow redirects and yield the final response, of any status, before its body is read."""
        import httpx2

        # Connections are made to an IP address, which two hosts may share: never reuse one.
        limits = httpx2.Limits(max_keepalive_connections=0)
        url = httpx2.URL(f"{str(self._endpoint).rstrip('/')}/{path}")
        with httpx2.Client(timeout=_TIMEOUT_SECONDS, limits=limits, follow_redirects=False) as client:
            for _ in range(_MAX_REDIRECTS + 1):
                with self._translate_errors():
                    response = client.send(self._request(client, url), stream=True)
                with closing(response):
                    if not response.has_redirect_location:
                        yield response
                        return
                    with self._translate_errors():
                        url = url.join(response.headers["location"])
                self._check_redirect(url)
        raise self._refused(f"more than {_MAX_REDIRECTS} redirects")

    def body(self, response: "Response") -> Iterator[bytes]:
        """Yield the bytes of a response. Raises :class:`SourceRefused` for any status but 200."""
        status = response.status_code
        if status != 200:
            raise self._refused(_STATUS_REASONS.get(status, f"the hub answers with status {status}"))
        if response.headers.get("content-encoding", "identity") != "identity":
            raise self._refused("the hub compresses the file although it was asked not to")
        chunks = response.iter_raw()
        while True:
            with self._translate_errors():
                chunk = next(chunks, None)
            if chunk is None:
                return
            if time.monotonic() > self._deadline:
                raise self._refused(f"the download takes longer than {_DOWNLOAD_SECONDS:.0f} seconds")
            yield chunk

    def _request(self, client: "Client", url: "URL") -> "Request":
        """Build the request for ``url``: with the token for the hub, otherwise without, to a public IP address."""
        headers = {"accept-encoding": "identity"}
        if self._is_hub(url):
            if self._token:
                headers["authorization"] = f"Bearer {self._token}"
            return client.build_request("GET", url, headers=headers)
        # Connect to the address that was checked: the name may resolve to another one a moment later.
        headers["host"] = url.netloc.decode("ascii")
        resolved = url.copy_with(host=self._public_address(url), username=None, password=None)
        return client.build_request("GET", resolved, headers=headers, extensions={"sni_hostname": url.host})

    def _is_hub(self, url: "URL") -> bool:
        return (url.scheme, url.netloc) == (self._endpoint.scheme, self._endpoint.netloc)

    def _check_redirect(self, url: "URL") -> None:
        if self._is_hub(url):
            # Only this repository is allowed, not the one it was renamed to.
            if f"/{self._repository}/".lower() not in url.path.lower():
                raise self._refused("the repository has moved; give its new name")
        elif url.scheme not in {"https", self._endpoint.scheme}:
            raise self._refused("the hub redirects to an address that is not https")

    def _public_address(self, url: "URL") -> str:
        """Resolve the URL's host; return one of its IP addresses. Raises SourceRefused unless all are public."""
        try:
            found = socket.getaddrinfo(url.host, url.port or 443, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise self._refused(f"the hub redirects to {url.host}, whose name cannot be resolved") from error
        addresses = [str(entry[4][0]) for entry in found]
        if not all(_is_public(ipaddress.ip_address(address)) for address in addresses):
            raise self._refused(f"the hub redirects to {url.host}, which is not a public address")
        return addresses[0]

    def _refused(self, reason: str) -> SourceRefused:
        return SourceRefused(f"hf://{self._repository}: {reason}")

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        import httpx2

        try:
            yield
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            # Name only the exception's type: its message may contain a signed URL.
            raise self._refused(f"the download failed ({type(error).__name__}); try again later") from error


def _file_paths(siblings: object) -> list[str]:
    """Return the paths in the hub's list of files, which are only used in messages; skip malformed entries."""
    entries = siblings[:MAX_FILES] if isinstance(siblings, list) else []
    paths = [entry.get("rfilename") for entry in entries if isinstance(entry, dict)]
    return [path for path in paths if isinstance(path, str)]


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Return whether an address is on the public internet; look into IPv6 addresses that embed an IPv4 one."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return _is_public(inner)
        if address.is_site_local:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved
