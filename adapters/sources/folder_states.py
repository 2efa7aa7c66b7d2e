"""FolderStates: the last known state of each folder in a watched folder, kept in the database across restarts."""

from dataclasses import dataclass

from sqlalchemy import delete, insert, select

from adapters.registry.database import Database, storable
from adapters.registry.schema import watched


@dataclass(frozen=True, slots=True)
class FolderState:
    """The state of a folder when it was last registered or refused."""

    signature: str
    """Changes whenever one of the adapter's files does. For ``--adapter``: the address, or the folder and this."""
    refused: str | None
    """Why it could not be registered; None if it was."""
    since: int
    """Unix time, seconds."""


class FolderStates:
    """States by the folder's full path. Each method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def load(self, root: str) -> dict[str, FolderState]:
        """Return the states of all folders below ``root``."""
        query = select(watched).where(watched.c.folder.startswith(f"{root}/", autoescape=True))
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        return {row.folder: FolderState(row.signature, row.refused, row.since) for row in rows}

    def save(self, folder: str, state: FolderState | None) -> None:
        """Replace the state of a folder; None deletes it."""
        with self._database.writing() as (connection, _):
            connection.execute(delete(watched).where(watched.c.folder == folder))
            if state is not None:
                refused = None if state.refused is None else storable(state.refused)
                values = {"signature": state.signature, "refused": refused, "since": state.since}
                connection.execute(insert(watched).values(folder=folder, **values))
