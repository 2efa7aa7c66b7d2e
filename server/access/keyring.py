"""Keyring: all keys that a server accepts, those of the database, of a file and of the environment."""

import logging
import time

from server.access.credentials import digest_of
from server.access.key import ApiKey
from server.access.key_file import GivenKeys
from server.access.key_store import KeyStore
from server.follower import Follower

_log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
"""Seconds between two looks for keys that other servers, the command line or a new file have changed."""


class Keyring:
    """Finds the key of a secret. Needs no database, so that no request waits for one. Any thread may use it."""

    def __init__(self, store: KeyStore, given: GivenKeys) -> None:
        """``given``: keys that are not in the database."""
        self.store = store
        self._given = given
        stale = "Keys cannot be read, so those of the last reading stay valid"
        self._follower = Follower("keys", self._refresh, POLL_SECONDS, stale, _log)

    @property
    def required(self) -> bool:
        """Whether requests need a key: there is one, or was one."""
        return self._given.any or self.store.any

    def find(self, secret: str) -> ApiKey | None:
        """Return the key of a secret; None if it is unknown, expired or revoked."""
        digest, now = digest_of(secret), time.time()
        return self._given.index.find(digest, now) or self.store.index.find(digest, now)

    def start(self) -> None:
        """Start the thread that follows changes of others."""
        self._follower.start()

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._follower.close()

    def _refresh(self) -> None:
        self._given.refresh()
        self.store.refresh()
