"""``python -m loadtests.soak``. Exit status: 0; 1 if something was violated; 2 for a bad option; 130 after Ctrl-C."""

import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from bases import interrupts
from bases.command_line import parse
from bases.errors import ManyloraError
from loadtests import cancellation
from loadtests.drive.demo_server import demo_server
from loadtests.drive.progress import Display
from loadtests.drive.server_process import ServerProcess, spawned
from loadtests.errors import BadOption
from loadtests.soak.report import draw_memory, record, summary
from loadtests.soak.settings import SoakSettings
from loadtests.soak.soak import Outcome, Soak

PROGRAM = "python -m loadtests.soak"
OPTIONS = "--kv-memory-gib 0.25 --host-cache-gib 0.05 --max-device-adapters 4 --max-model-len 2048"
"""Of a server that is started: little memory, so that it is full soon, and fewer slots than adapters."""


def main(words: Sequence[str]) -> int:
    """Run a soak and report what it found. Returns the exit status."""
    try:
        settings = SoakSettings(**parse(SoakSettings, words, PROGRAM))
        _check_writable(settings)
        outcome = _run(settings)
    except ManyloraError as error:
        for line in error.terminal_lines():
            print(f"soak: {line}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return interrupts.STATUS
    if settings.json_file:
        settings.json_file.write_text(json.dumps(record(settings, outcome), indent=2) + "\n", encoding="utf-8")
    if settings.plot:
        draw_memory(outcome, settings.plot)
    print(f"\n{summary(outcome)}", flush=True)
    return 1 if outcome.ledger.violations else 0


def _run(settings: SoakSettings) -> Outcome:
    display = Display(Console(stderr=True))
    with ExitStack() as stack:
        stack.enter_context(interrupts.sigterm_raises())
        server = ServerProcess(settings.url or "", settings.pid or 0)
        if settings.url is None:
            root = Path(stack.enter_context(TemporaryDirectory(prefix="soak-")))
            command = settings.spawn or f"{demo_server(root / 'data')} {OPTIONS}"
            server = stack.enter_context(spawned(command, root))
        soak = Soak(settings, server.url, server.pid or None, display, own=settings.url is None)
        return cancellation.run_cancellable(soak.run())


def _check_writable(settings: SoakSettings) -> None:
    """Raise BadOption for an output that cannot be written, before the soak and not after it."""
    for option, path in {"--json": settings.json_file, "--plot": settings.plot}.items():
        if path is not None and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
            raise BadOption(f"{option}: {path} cannot be written")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
