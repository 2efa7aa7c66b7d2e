"""What a dry run finds out: everything that would stop the run before its first step."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bases.errors import ConfigError
from tests.training.tiny_run import tiny_settings
from training.run.job import Job


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"^--out: .* is there already"),
        ({"out_": "new", "early_stopping": 1, "eval_steps": 2, "save_steps": 4}, "^--save-steps: "),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    out = tmp_path / settings.pop("out_", "taken")
    with pytest.raises(ConfigError, match=message):
        Job(tiny_settings(tmp_path, out=out, dry_run=True, **settings), Console(file=io.StringIO())).run()


def test_a_server_that_is_not_there_is_told_before_the_base_is_opened(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, publish="http://127.0.0.1:9")
    said = io.StringIO()
    with pytest.raises(ConfigError, match=r"^--publish: no answer from http://127.0.0.1:9"):
        Job(settings, Console(file=said)).run()
    assert said.getvalue() == ""
    assert not settings.data_dir.exists()
