"""Jobs: what a dry run checks; each row is read, rendered and packed once."""

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bases.errors import ConfigError
from tests.training.tiny_run import ROWS, tiny_settings
from training.data import files, packing
from training.data.conversation import Conversation
from training.data.rendering import Example, Renderer
from training.run.job import Job


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"^--out: .* exists already"),
        ({"out_": "new", "early_stopping": 1, "eval_steps": 2, "save_steps": 4}, "^--save-steps: "),
    ],
)
def test_dry_run_refuses_the_same_settings(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    out = tmp_path / settings.pop("out_", "taken")
    with pytest.raises(ConfigError, match=message):
        Job(tiny_settings(tmp_path, out=out, dry_run=True, **settings), Console(file=io.StringIO())).run()


def test_unreachable_server_is_reported_before_the_base_is_loaded(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, publish="http://127.0.0.1:9")
    said = io.StringIO()
    with pytest.raises(ConfigError, match=r"^--publish: no answer from http://127.0.0.1:9"):
        Job(settings, Console(file=said)).run()
    assert said.getvalue() == ""
    assert not settings.data_dir.exists()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dry_run", [True, False])
def test_job_renders_each_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry_run: bool, packed: bool
) -> None:
    rendered: Counter[str] = Counter()
    joined: Counter[str] = Counter()
    opened: Counter[str] = Counter()
    render_all, join, read_rows = Renderer.render_all, packing._join, files._json_lines

    def counted_render(self: Renderer, conversations: Sequence[Conversation], *args: Any) -> list[Example]:
        rendered.update(conversation.source for conversation in conversations)
        return render_all(self, conversations, *args)

    def counted_join(examples: Sequence[Example]) -> packing.PackedRow:
        joined.update(example.source for example in examples)
        return join(examples)

    def counted_read(path: Path, file: Any) -> Any:
        opened[str(path)] += 1
        return read_rows(path, file)

    monkeypatch.setattr(Renderer, "render_all", counted_render)
    monkeypatch.setattr(packing, "_join", counted_join)
    monkeypatch.setitem(files._READERS, ".jsonl", counted_read)
    settings = tiny_settings(tmp_path, dry_run=dry_run, packing=packed, eval_share=0.25, judge_tokens=2)
    Job(settings, Console(file=io.StringIO())).run()
    sources = [f"{tmp_path / 'rows.jsonl'}:{row}" for row in range(1, ROWS + 1)]
    ours = set(sources)
    assert {source: count for source, count in rendered.items() if source in ours} == dict.fromkeys(sources, 1)
    assert {source: count for source, count in joined.items() if source in ours} == dict.fromkeys(sources, 1)
    assert opened[str(tmp_path / "rows.jsonl")] == 1
