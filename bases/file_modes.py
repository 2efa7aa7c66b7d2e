"""The modes of files. What safetensors writes begins as a temporary file, which only its owner may read."""

import stat
from pathlib import Path


def apply_umask(folder: Path) -> None:
    """Give every file in ``folder``, and below it, the mode that the process's umask gives new files."""
    new = folder / ".mode"
    new.unlink(missing_ok=True)  # left by a process that was killed here
    new.touch()  # the umask can only be asked for by changing it, for all threads
    mode = stat.S_IMODE(new.stat().st_mode)
    new.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)
