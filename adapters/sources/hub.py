"""An adapter from a model hub, by plain HTTP: its two routes, a limit on every file, and no way to a private network.

The hub's own client is not used to download: it follows any redirect, and has a second protocol of its own.
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
from adapters.format.files import FILES, MAX_FILES, MAX_JSON_BYTES, ORIGIN, WEIGHTS
from adapters.format.foreign_formats import instead
from adapters.store.remote_store import receive

if TYPE_CHECKING:
    from httpx2 import URL, Client, Request, Response

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REDIRECTS = 5
_WAIT_SECONDS = 30.0
_DOWNLOAD_SECONDS = 3600.0
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_REFUSALS = {401: "does not exist, or is private", 403: "is private or gated", 404: "does not exist"}


def download(repository: str, revision: str, staging: Path, limit: int) -> tuple[str, list[str]]:
    """Download the adapter's files at a branch, tag or commit into the empty folder ``staging``.

    Returns the commit, and the paths of all files in it, as far as the hub tells them.
    ``repository``: ``owner/name``; ``limit``: largest weights file in bytes. The hub and the token are those of
    huggingface_hub (HF_ENDPOINT, HF_TOKEN). Raises :class:`SourceRefused`, and :class:`AdapterRejected` for a file
    that is too large.
    """
    hub = _Hub(repository)
    commit, paths = hub.look(revision)
    for name in FILES:
        with hub.get(f"{repository}/resolve/{commit}/{name}") as response:
            if response.status_code == 404:
                if name != ORIGIN:
                    raise SourceRefused(f"hf://{repository}@{commit} has no {name}{instead(paths)}")
                continue
            receive(hub.body(response), staging / name, limit if name == WEIGHTS else MAX_JSON_BYTES)
    return commit, paths


class _Hub:
    """The hub, as far as one repository goes."""

    def __init__(self, repository: str) -> None:
        import httpx2
        from huggingface_hub import constants, get_token

        if constants.is_offline_mode():
            raise SourceRefused("this server is told to be offline (HF_HUB_OFFLINE)")
        self._repository = repository
        self._endpoint = httpx2.URL(constants.ENDPOINT)
        self._token = get_token()
        self._deadline = time.monotonic() + _DOWNLOAD_SECONDS

    def look(self, revision: str) -> tuple[str, list[str]]:
        """The commit that a revision means now, and the paths of its files."""
        with self.get(f"api/models/{self._repository}/revision/{quote(revision, safe='')}") as response:
            data = bytearray()
            for chunk in self.body(response):
                data += chunk
                if len(data) > MAX_JSON_BYTES:
                    raise self._refused("the hub's answer is too long")
        try:
            found = json.loads(data)
            commit, repository = found["sha"], found.get("id", self._repository)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise self._refused("the hub's answer names no commit") from None
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise self._refused("the hub's answer names no commit")
        if str(repository).lower() != self._repository.lower():
            raise self._refused("has moved; give its new name")
        return commit, _paths(found.get("siblings"))

    @contextmanager
    def get(self, path: str) -> "Iterator[Response]":
        """The answer at the end of the redirects, its body not yet read and its status not yet looked at."""
        import httpx2

        # No connection is used twice: it is made to an address, and two hosts may share that.
        limits = httpx2.Limits(max_keepalive_connections=0)
        url = httpx2.URL(f"{str(self._endpoint).rstrip('/')}/{path}")
        with httpx2.Client(timeout=_WAIT_SECONDS, limits=limits, follow_redirects=False) as client:
            for _ in range(_REDIRECTS + 1):
                with self._reached():
                    response = client.send(self._request(client, url), stream=True)
                with closing(response):
                    if not response.has_redirect_location:
                        yield response
                        return
                    with self._reached():
                        url = url.join(response.headers["location"])
                self._check_redirect(url)
        raise self._refused(f"more than {_REDIRECTS} redirects")

    def body(self, response: "Response") -> Iterator[bytes]:
        """The bytes of an answer of status 200."""
        status = response.status_code
        if status != 200:
            raise self._refused(_REFUSALS.get(status, f"the hub answers with status {status}"))
        if response.headers.get("content-encoding", "identity") != "identity":
            raise self._refused("the hub compresses what it was asked to send as it is")
        chunks = response.iter_raw()
        while True:
            with self._reached():
                chunk = next(chunks, None)
            if chunk is None:
                return
            if time.monotonic() > self._deadline:
                raise self._refused(f"takes longer than {_DOWNLOAD_SECONDS:.0f} seconds")
            yield chunk

    def _request(self, client: "Client", url: "URL") -> "Request":
        """The request for an address: with the token where that is the hub, else to a public address and without."""
        headers = {"accept-encoding": "identity"}
        if self._is_hub(url):
            if self._token:
                headers["authorization"] = f"Bearer {self._token}"
            return client.build_request("GET", url, headers=headers)
        # Connect to the very address that was looked at: the name may mean another one a moment later.
        headers["host"] = url.netloc.decode("ascii")
        pinned = url.copy_with(host=self._public_address(url), username=None, password=None)
        return client.build_request("GET", pinned, headers=headers, extensions={"sni_hostname": url.host})

    def _is_hub(self, url: "URL") -> bool:
        return (url.scheme, url.netloc) == (self._endpoint.scheme, self._endpoint.netloc)

    def _check_redirect(self, url: "URL") -> None:
        if self._is_hub(url):
            # A moved repository is not the one that is allowed.
            if f"/{self._repository}/".lower() not in url.path.lower():
                raise self._refused("has moved; give its new name")
        elif url.scheme not in {"https", self._endpoint.scheme}:
            raise self._refused("the hub redirects to an address that is not https")

    def _public_address(self, url: "URL") -> str:
        """An address of the host, all of whose addresses are public."""
        try:
            found = socket.getaddrinfo(url.host, url.port or 443, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise self._refused(f"the hub redirects to {url.host}, which has no address") from error
        addresses = [str(entry[4][0]) for entry in found]
        if not all(_is_public(ipaddress.ip_address(address)) for address in addresses):
            raise self._refused(f"the hub redirects to {url.host}, which is no public address")
        return addresses[0]

    def _refused(self, reason: str) -> SourceRefused:
        return SourceRefused(f"hf://{self._repository}: {reason}")

    @contextmanager
    def _reached(self) -> Iterator[None]:
        import httpx2

        try:
            yield
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            # Its kind only: redirects go to signed addresses.
            raise self._refused(f"cannot be downloaded: {type(error).__name__}") from error


def _paths(siblings: object) -> list[str]:
    """Out of the hub's list of files. It only helps to explain: what is not as it should be is passed over."""
    entries = siblings[:MAX_FILES] if isinstance(siblings, list) else []
    paths = [entry.get("rfilename") for entry in entries if isinstance(entry, dict)]
    return [path for path in paths if isinstance(path, str)]


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is on the public internet, also one that is written as an IPv6 address."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return _is_public(inner)
        if address.is_site_local:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved
