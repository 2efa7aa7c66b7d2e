"""Serves the demo model and two adapters, ``red`` and ``green``, on a free port.

Run by the server's own Python, in the repository's root: the tests' Python has the clients and no server.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, "")

from tests.adapter_folders import DEMO_LAYOUT, write_adapter


def main() -> None:
    """Write the adapters and become ``manylora serve``."""
    root = Path(sys.argv[1])
    words = ["serve", "--port", "0", "--data-dir", str(root / "data"), "--max-model-len", "2048"]
    words += ["--log-level", "warning"]
    for seed, name in enumerate(("red", "green")):
        folder = write_adapter(root / name, DEMO_LAYOUT, seed=seed, lora_alpha=0.5)
        words += ["--adapter", f"{name}={folder}"]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "manylora.py", *words])


if __name__ == "__main__":
    main()
