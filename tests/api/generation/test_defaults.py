"""Sampling defaults of the model's generation_config.json."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bases.base import make_base
from bases.errors import ConfigError
from server.api.startup import open_service
from tests.api.live import Live, running, tiny_service
from tests.tiny import tiny_model, tiny_tokenizer

OPEN = {"prompt": "Once upon a time", "max_tokens": 12, "ignore_eos": True}


@contextmanager
def serving(folder: Path, generation_config: str = "auto", **defaults: Any) -> Iterator[Live]:
    """Serve a tiny model with these defaults."""
    model = tiny_model()
    for name, value in defaults.items():
        setattr(model.generation_config, name, value)
    with running(tiny_service(folder, model, generation_config=generation_config)) as live:
        yield live


def text(live: Live, **fields: Any) -> str:
    answer = live.http.post("/v1/completions", json={**OPEN, **fields})
    assert answer.status_code == 200, answer.text
    found: str = answer.json()["choices"][0]["text"]
    return found


def test_defaults_apply_where_the_request_says_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, temperature=1.7, top_k=1, repetition_penalty=1.5) as live:
        greedy = text(live, temperature=0)
        assert text(live) == greedy, "top_k 1"
        assert text(live, top_k=None, temperature=None) == greedy
        assert text(live, repetition_penalty=1.0) != greedy
        assert len({text(live, top_k=0, seed=seed) for seed in range(4)}) == 4
        assert text(live, top_k=0, seed=1) == text(live, top_k=0, seed=1, temperature=1.7, repetition_penalty=1.5)


def test_defaults_can_be_switched_off(tmp_path: Path) -> None:
    with serving(tmp_path, "off", top_k=1) as live:
        assert len({text(live, seed=seed) for seed in range(4)}) == 4


def test_max_new_tokens_is_the_default_limit_of_chats(tmp_path: Path) -> None:
    with serving(tmp_path, max_new_tokens=5) as live:
        chat = {"messages": [{"role": "user", "content": "Why?"}], "ignore_eos": True}
        for fields, expected in (({}, 5), ({"max_tokens": 9}, 9), ({"max_completion_tokens": 3}, 3)):
            answer = live.http.post("/v1/chat/completions", json={**chat, **fields}).json()
            assert answer["usage"]["completion_tokens"] == expected
        answer = live.http.post("/v1/chat/completions", json={**chat, "max_tokens": -1}).json()
        assert answer["usage"]["total_tokens"] == live.service.base.max_model_len


def test_the_start_says_which_defaults_apply(tmp_path: Path, shared: Live) -> None:
    model = tiny_model()
    model.generation_config.top_p = 0.8
    model.generation_config.temperature = 0.7
    settings = shared.service.settings.model_copy(update={"data_dir": tmp_path, "adapter": {}})
    said: list[str] = []
    open_service(make_base(model, tiny_tokenizer(), "tiny"), settings, said.append).close()
    assert "sampling defaults of the model's generation_config.json: temperature 0.7, top_p 0.8" in said


def test_defaults_that_no_request_could_have_stop_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"top_p.*--generation-config off"), serving(tmp_path, top_p=1.5):
        pass
