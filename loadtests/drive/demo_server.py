"""The command that starts a server of the demo model with this Python."""

import shlex
import sys
from pathlib import Path


def demo_server(data: Path) -> str:
    """Return the command, with ``data`` as its folder for bases and adapters."""
    return shlex.join([sys.executable, "-m", "manylora", "serve", "--data-dir", str(data)])
