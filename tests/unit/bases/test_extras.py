"""Serving needs no package of an extra; a command whose extra is missing says how to install it."""

import subprocess
import sys
from pathlib import Path

import pytest

import manylora
from bases.extras import EXTRAS

ROOT = Path(__file__).parents[3]
SERVING = "import server.api.serve, server.doctor, server.api.commands, adapters.cli.commands"


def run_without(missing: set[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these packages made unimportable."""
    script = f"import sys\nsys.modules.update(dict.fromkeys({missing!r}))\n{code}"
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_serving_needs_no_extra() -> None:
    done = run_without({name for names in EXTRAS.values() for name in names}, SERVING)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("command", "extra"), [("train", "train"), ("export", "train"), ("bench", "bench")])
def test_a_missing_extra_is_one_sentence(
    command: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bases.extras.find_spec", lambda name: None if name == EXTRAS[extra][0] else object())
    assert manylora.main([command, "--help"]) == 1
    assert capsys.readouterr().err == (
        f"manylora: {command} needs packages that are not installed ({EXTRAS[extra][0]}); install them with: "
        f'pip install "manylora[{extra}]"\n'
    )
