"""The file of what was typed, which only its owner may read."""

import os
from pathlib import Path

from prompt_toolkit.history import FileHistory, History, InMemoryHistory

LARGEST = 4 << 20
"""Bytes above which the older part of the file is dropped."""
KEPT = 1 << 20
_ENTRY = b"\n# "
"""Begins an entry, as prompt_toolkit writes it."""


def history_path() -> Path:
    """Return the file in the user's folder for state (XDG). Raises RuntimeError if the user has no home folder."""
    given = os.environ.get("XDG_STATE_HOME")
    return (Path(given) if given else Path.home() / ".local" / "state") / "manylora" / "chat-history"


def open_history() -> tuple[History, str | None]:
    """Return the history, and why it is not kept if its file cannot be written."""
    try:
        path = history_path()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b") as file:
            os.fchmod(file.fileno(), 0o600)
            if os.fstat(file.fileno()).st_size > LARGEST:
                file.seek(-KEPT, os.SEEK_END)
                newest = file.read()
                file.seek(0)
                file.write(newest[max(newest.find(_ENTRY), 0) :])
                file.truncate()
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return InMemoryHistory(), f"what you type is not kept after this session: {reason}"
    return FileHistory(path), None
