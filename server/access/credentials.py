"""Secrets of keys: how they are made, and found again among the digests that are kept of them."""

import hmac
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256

from server.access.key import ApiKey

PREFIX = "sk-ml-"
"""Begins every secret that the server makes, so that people and scanners of leaked secrets recognise it."""
SHOWN = len(PREFIX) + 6
"""Number of characters of a secret that lists show. The others still have 220 random bits."""
_INDEXED = 8
"""Number of a digest's hexadecimal digits by which it is looked up. All of them are compared then."""


def new_secret() -> str:
    """Return a new secret, with 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(secret: str) -> str:
    """Return what is kept of a secret: its SHA-256, in hexadecimal.

    Nobody can try 2**256 secrets, however fast each try is. So a slow hash, as passwords need, would protect nothing
    and cost each request its time.
    """
    return sha256(secret.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Credential:
    """What shows that a caller has a key: the digest of a secret."""

    digest: str = field(repr=False)
    key: ApiKey
    until: float | None = None
    """Unix time from which it is not accepted; None if it always is."""


class CredentialIndex:
    """Credentials by their digest. Immutable, so that any thread may use it without a lock."""

    def __init__(self, credentials: Iterable[Credential] = ()) -> None:
        self._by_start: dict[str, list[Credential]] = {}
        for credential in credentials:
            self._by_start.setdefault(credential.digest[:_INDEXED], []).append(credential)

    def find(self, digest: str, now: float) -> ApiKey | None:
        """Return the key whose secret has this digest, if it is accepted at the Unix time ``now``.

        The time that it takes says nothing of the digests: the whole of them is compared in constant time. It may say
        whether one has the same first digits, but those of a secret are not known without the secret.
        """
        found = None
        for credential in self._by_start.get(digest[:_INDEXED], ()):
            if hmac.compare_digest(credential.digest, digest) and (credential.until is None or now < credential.until):
                found = credential.key
        return found
