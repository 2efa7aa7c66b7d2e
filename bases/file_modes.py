"""File modes. safetensors writes through temporary files, which only their owner may read."""

import stat
from pathlib import Path


def apply_umask(folder: Path) -> None:
    """Give every file in ``folder`` and its subfolders the mode of a new file under the process's umask."""
    new = folder / ".mode"
    new.unlink(missing_ok=True)  # may be left by a killed process
    new.touch()  # reading the umask itself would change it for a moment, for all threads
    mode = stat.S_IMODE(new.stat().st_mode)
    new.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)
