"""Open the registry's database, for a server or for a command that works on it directly."""

from pathlib import Path

from sqlalchemy.exc import ArgumentError, DBAPIError

from adapters.errors import AdapterError
from adapters.registry.database import Database, open_postgres, open_sqlite
from adapters.registry.schema import NewerSchema
from bases.errors import ConfigError

FILE = "registry.sqlite3"
"""The database's file under ``--data-dir``, where no PostgreSQL is given."""


def open_database(data_dir: Path, url: str | None) -> Database:
    """Open the PostgreSQL database at ``url``, or the file under ``data_dir``. Raises ConfigError."""
    option = "--data-dir" if url is None else "--database-url"
    try:
        return open_sqlite(data_dir / FILE) if url is None else open_postgres(url)
    except NewerSchema as error:
        raise ConfigError(f"{option}: the registry was made by a newer manylora (schema {error})") from error
    except DBAPIError as error:
        raise ConfigError(f"{option}: {_first_line(error.orig)}") from error
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'{option}: needs a package that is not installed ({error.name}); run: pip install "manylora[postgres]"'
        ) from error
    except (AdapterError, ArgumentError) as error:
        cause = error.__cause__
        reason = f" ({_first_line(cause.orig)})" if isinstance(cause, DBAPIError) else ""
        raise ConfigError(f"{option}: {error}{reason}") from error


def _first_line(error: BaseException | None) -> str:
    return str(error).partition("\n")[0]
