"""Address: where an adapter is, on a model hub, S3 or Google Cloud Storage, and the name it gets if none is given."""

import hashlib
import re
from dataclasses import dataclass

from adapters.errors import SourceRefused
from adapters.registry.names import is_possible_name

_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9._=+,-]*[A-Za-z0-9_=+])?"
_HUB = re.compile(rf"hf://({_NAME}(?:/{_NAME})?)/?(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,199}}))?")
_BUCKET = re.compile(rf"(s3|gs)://({_NAME}(?:/{_NAME})*)/?")
_GRAMMAR = (
    "is not hf://OWNER/NAME, hf://OWNER/NAME@REVISION, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX "
    "(ASCII letters, digits and . _ - = + , only; no empty parts)"
)
_DIGITS = 32
"""Hexadecimal digits of a digest in a name."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where an adapter is, or a prefix of such addresses."""

    scheme: str
    parts: tuple[str, ...]
    """The repository's owner and name, or the bucket and the parts of the key."""
    revision: str | None = None
    """A branch, tag or commit of a repository on the hub."""

    def __str__(self) -> str:
        return f"{self.scheme}://{'/'.join(self.parts)}"

    def within(self, allowed: "Address") -> bool:
        """Return whether this is ``allowed`` itself, or below it."""
        return self.scheme == allowed.scheme and self.parts[: len(allowed.parts)] == allowed.parts


def is_address(text: str) -> bool:
    """Return whether the text is meant as an address. No name of an adapter can be."""
    return "://" in text


def registered_name(address: Address) -> str:
    """Return the name under which the adapter at ``address`` is registered if nobody gives it one.

    ``hf://org/legal@v1`` becomes ``hf/org/legal/at/v1``; addresses that make no valid name, a digest. Two addresses
    never have the same name.
    """
    parts = [address.scheme, *address.parts, *(["at", address.revision] if address.revision else [])]
    name = "/".join(parts)
    if is_possible_name(name):
        return name
    return f"{address.scheme}/{hashlib.sha256(name.encode()).hexdigest()[:_DIGITS]}"


def local_name(text: str) -> str:
    """Return the name in the registry that a request means: ``text`` itself, or the one of the address that it is."""
    try:
        return registered_name(parse_address(text)) if is_address(text) else text
    except SourceRefused:
        return text


def parse_address(text: str) -> Address:
    """Parse an address. Raises :class:`SourceRefused`, without the text: it may contain a password."""
    if found := _HUB.fullmatch(text):
        revision = found[2]
        if revision is None or not {"", ".", ".."} & set(revision.split("/")):
            return Address("hf", tuple(found[1].split("/")), revision)
    elif found := _BUCKET.fullmatch(text):
        return Address(found[1], tuple(found[2].split("/")))
    raise SourceRefused(f"the source {_GRAMMAR}")


def parse_prefix(entry: str) -> Address:
    """Parse an address or a prefix of some. Raises :class:`ValueError`."""
    try:
        address = parse_address(entry)
    except SourceRefused:
        raise ValueError(f"{entry!r} {_GRAMMAR}, nor a prefix of one") from None
    if address.revision is not None:
        raise ValueError(f"{entry!r} has a revision: only a whole repository can be allowed; leave out @REVISION")
    return address
