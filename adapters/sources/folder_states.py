"""FolderState: what folders in a watched folder were like when they were last looked into. Survives a restart."""

from dataclasses import dataclass

from sqlalchemy import delete, insert, select

from adapters.registry.database import Database, storable
from adapters.registry.schema import watched


@dataclass(frozen=True, slots=True)
class FolderState:
    """One folder at one time."""

    signature: str
    """Differs when the adapter's files do."""
    refused: str | None
    """Why it was not registered."""
    since: int
    """Unix time, seconds."""


class FolderStates:
    """What was seen, by the folder's full path, in a database. Each method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def under(self, root: str) -> dict[str, FolderState]:
        """All folders in ``root``."""
        query = select(watched).where(watched.c.folder.startswith(f"{root}/", autoescape=True))
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        return {row.folder: FolderState(row.signature, row.refused, row.since) for row in rows}

    def put(self, folder: str, seen: FolderState | None) -> None:
        """Keep what a folder was like; None forgets it."""
        with self._database.writing() as (connection, _):
            connection.execute(delete(watched).where(watched.c.folder == folder))
            if seen is not None:
                refused = None if seen.refused is None else storable(seen.refused)
                values = {"signature": seen.signature, "refused": refused, "since": seen.since}
                connection.execute(insert(watched).values(folder=folder, **values))
