"""DataPreview: examines files of training data with the trainer's own program, which runs as a process of its own.

The server imports nothing of the trainer. The process may take any time and memory for a hostile file, so it has
limits.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

from transformers import PreTrainedTokenizerBase

from bases.extras import MissingExtra, require
from server.errors import EngineError, InvalidRequest

ROUTE = "POST /v1/training/data"
MAX_BYTES = 64 << 20
"""Maximum size of a file."""
MAX_UPLOADS = 16
"""Maximum number of files that are received or examined at a time."""
MAX_RUNNING = 2
"""Maximum number of files that are examined at a time."""
CPU_SECONDS = 120
"""CPU time for one file."""
SECONDS = 600
_ENVIRONMENT = ("PATH", "HOME", "LD_LIBRARY_PATH", "TZ", "LANG", "LC_ALL")
_PROGRAM = "training.data.preview"
_ROOT = Path(__file__).parents[1]
KILLED = (
    "The file cannot be examined: it needs more than {seconds} s or too much memory. Send a part of it: the first "
    "thousands of rows say as much."
)


def available() -> bool:
    """Return whether the trainer's packages are installed."""
    try:
        require("train", ROUTE)
    except MissingExtra:
        return False
    return True


class DataPreview:
    """Examines files of rows for one base. Methods may be called on any thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._lock = Lock()
        self._saved: TemporaryDirectory[str] | None = None

    def examine(self, file: Path, name: str, rows: int, options: dict[str, Any]) -> dict[str, Any]:
        """Return the trainer's report, and the first rows as the model sees them; they call the file ``name``.

        ``options`` are those of ``manylora train``. Raises InvalidRequest for data that cannot be trained on, or if the
        extra ``train`` is missing.
        """
        try:
            require("train", ROUTE)
        except MissingExtra as error:
            raise InvalidRequest(str(error)) from error
        asked = {
            "file": file.name,
            "tokenizer": self._folder(),
            "max_model_len": self._max_model_len,
            "rows": rows,
            "cpu_seconds": CPU_SECONDS,
            "options": options,
        }
        answer = _run(json.dumps(asked), file.parent)

        def renamed(text: str) -> str:
            # Once a line: what follows the file's name may be a row that has it, too.
            return "\n".join(line.replace(file.name, name, 1) for line in text.split("\n"))

        if "error" in answer:
            raise InvalidRequest(renamed(answer["error"]), param="file")
        report = answer["report"]
        report["bad"] = [renamed(line) for line in report["bad"]]
        for each in report["files"]:
            each["file"] = name
        for row in answer["rows"]:
            row["source"] = renamed(row["source"])
        return answer

    def close(self) -> None:
        """Remove the tokenizer's files."""
        with self._lock:
            if self._saved is not None:
                self._saved.cleanup()
                self._saved = None

    def _folder(self) -> str:
        """Return a folder with the tokenizer, which is written once."""
        with self._lock:
            if self._saved is None:
                folder = TemporaryDirectory(prefix="manylora-tokenizer-")
                self._tokenizer.save_pretrained(folder.name)
                self._saved = folder
            return self._saved.name


def _run(request: str, folder: Path) -> dict[str, Any]:
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    offline = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(_ROOT), "PYTHONSAFEPATH": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", _PROGRAM],
            input=request.encode(),
            capture_output=True,
            cwd=folder,
            env={**environment, **offline},
            timeout=SECONDS,
            start_new_session=True,  # Ctrl-C at the server's terminal is not for it
        )
    except subprocess.TimeoutExpired as error:
        raise InvalidRequest(KILLED.format(seconds=SECONDS), param="file") from error
    if done.returncode < 0 or b"MemoryError" in done.stderr[-2000:]:
        raise InvalidRequest(KILLED.format(seconds=CPU_SECONDS), param="file")
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise EngineError(f"The file could not be examined: {last[:200]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
