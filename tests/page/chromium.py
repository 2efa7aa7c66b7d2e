"""Finds a Chromium to drive: the one of ``CHROMIUM``, the system's, or the one that ``make test`` gets from npm."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

UNPACKED = Path(__file__).parent / "node_modules" / ".chromium"


def find_chromium() -> tuple[str, Mapping[str, str]]:
    """Return the program and the variables that it needs. Raises LookupError if there is none."""
    for name in (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"):
        if name and (path := shutil.which(name)):
            return path, {}
    if (UNPACKED / "chromium").is_file():
        libraries = {"LD_LIBRARY_PATH": str(UNPACKED / "lib"), "FONTCONFIG_PATH": str(UNPACKED)}
        return str(UNPACKED / "chromium"), libraries
    raise LookupError("no Chromium: run `make test`, or install Debian's package chromium, or set CHROMIUM to one")
