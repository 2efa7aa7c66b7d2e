"""Ctrl-C at any moment of any command prints no traceback and exits with 130."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[3]
IMPORTING = """
import signal, sys

class Interrupt:
    seen = 0

    def find_spec(self, name, path=None, target=None):
        self.seen += 1
        if self.seen == at:
            signal.raise_signal(signal.SIGINT)

import manylora
at = int(sys.argv.pop(1))
sys.meta_path.insert(0, Interrupt())
sys.exit(manylora.main())
"""
"""A program that runs the command line, with a Ctrl-C when the n-th module is imported."""
RAISED = """
import signal, sys, time
from bases import interrupts

class Finalizer:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

def compiled():
    exec("signal.raise_signal(signal.SIGINT)")

def swallowed():
    Finalizer()
    time.sleep(60)

def imported():
    sys.meta_path.insert(0, Finder())
    import colorsys
    time.sleep(60)

class Finder:
    def find_spec(self, name, path=None, target=None):
        signal.raise_signal(signal.SIGINT)
        print("found out", flush=True)

interrupts.exit_on_sigint()
try:
    with interrupts.sigint_raises():
        try:
            {name}()
        finally:
            print("put away", flush=True)
except KeyboardInterrupt:
    sys.exit(interrupts.STATUS)
"""


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """A shell's background jobs ignore SIGINT; so would the children here."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run(code: str, *words: str) -> tuple[int, str, str]:
    """Run a process; return exit status, stdout and stderr."""
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("at", [1, 10, 80])
@pytest.mark.parametrize("command", ["train", "export", "adapters", "keys", "bench", "top", "doctor", "serve"])
def test_interrupt_while_a_command_is_imported(command: str, at: int) -> None:
    assert run(IMPORTING, str(at), command, "--help") == (130, "", "")


@pytest.mark.parametrize("at", [400, 2500])
def test_while_the_libraries_are_imported(at: int, tmp_path: Path) -> None:
    words = ("serve", "--port", "0", "--data-dir", str(tmp_path), "--model", str(tmp_path))
    assert run(IMPORTING, str(at), *words) == (130, "", "")
    assert list(tmp_path.iterdir()) == []


def test_sigint_stays_ignored_if_it_was() -> None:
    """As in a shell's background jobs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    status, out, err = run(IMPORTING, "10", "train", "--help")
    assert (status, err) == (0, "")
    assert "--data-dir" in out


# By default Python would: exit by the signal; print the error and continue; raise it within the import.
@pytest.mark.parametrize(("name", "said"), [("compiled", ""), ("swallowed", ""), ("imported", "found out\n")])
def test_interrupt_runs_cleanup_and_exits_130(name: str, said: str) -> None:
    assert run(RAISED.format(name=name)) == (130, f"{said}put away\n", "")


def serve_until(line: str, folder: Path) -> tuple[int, str]:
    """Return status and stderr of a server that gets a Ctrl-C when it prints a line that starts with ``line``."""
    model = folder / "model"
    tiny_model().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    command = [
        sys.executable,
        "-m",
        "manylora",
        "serve",
        "--port",
        "0",
        "--data-dir",
        str(folder),
        "--model",
        str(model),
        "--cpu",
        "torch",  # the kernels do not take this model, and that is a warning
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert any(said.startswith(line) for said in process.stdout)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=120)
        finally:
            process.kill()
    return process.returncode, err


def test_interrupted_base_leaves_no_files(tmp_path: Path) -> None:
    assert serve_until("quantising", tmp_path) == (130, "")
    assert [path.name for path in (tmp_path / "bases").iterdir()] == ["lock"]


def test_no_progress_bars_without_a_terminal(tmp_path: Path) -> None:
    status, err = serve_until("curl", tmp_path)
    assert status == 0
    assert all(re.match(r"\d{4}-\d\d-\d\d .* INFO ", line) for line in err.splitlines()), err


ENDED = """
import sys, tempfile, time
from bases import interrupts

interrupts.exit_on_sigint()
try:
    with interrupts.sigint_raises(), interrupts.sigterm_raises(), tempfile.TemporaryDirectory(dir=sys.argv[1]):
        print("working", flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    sys.exit(interrupts.STATUS)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_terminated_command_deletes_partial_files(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", ENDED, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    assert list(tmp_path.iterdir())
    process.send_signal(number)
    assert process.wait(60) == 130
    process.stdout.close()
    assert not list(tmp_path.iterdir())
