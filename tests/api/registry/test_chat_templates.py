"""Chat templates of adapters over HTTP: served with the adapter, refused if hostile, ambiguous in some mixes."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from adapters.format.files import TEMPLATE, TOKENIZER_CONFIG
from tests.api.live import Live, unchanged
from tests.tiny import CHAT_TEMPLATE

OWN = "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }} {% endfor %}"
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def registered(live: Live, folders: Mapping[str, Path], tmp_path: Path) -> Any:
    """Register an adapter with files beside it; it is removed after the test."""
    names: list[str] = []

    def register(name: str, **files: str) -> None:
        folder = shutil.copytree(folders["spare"], tmp_path / name)
        for file, text in files.items():
            (folder / {"template": TEMPLATE, "config": TOKENIZER_CONFIG}[file]).write_text(text)
        with_files = [("file", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
        response = live.http.post("/v1/adapters", data={"name": name}, files=with_files)
        assert response.status_code == 201, response.text
        names.append(name)

    yield register
    for name in names:
        live.http.delete(f"/v1/adapters/{name}").raise_for_status()


Register = Callable[..., None]


def prompt(live: Live, model: str | None = None, messages: Any = MESSAGES) -> str:
    """The prompt that a model makes of messages."""
    tokens = live.http.post("/tokenize", json={"messages": messages, "model": model}).json()["tokens"]
    text: str = live.http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    return text


def test_an_adapter_is_served_with_its_own_template(live: Live, registered: Register) -> None:
    registered("own", template=OWN)
    assert prompt(live, "own") == "<|endoftext|>[user] hi "
    assert prompt(live, "red") == prompt(live) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    asked = {"messages": MESSAGES, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    chat = live.http.post("/v1/chat/completions", json={**asked, "adapter": "own"}).json()
    assert chat["usage"]["prompt_tokens"] == 11
    text = live.text(
        prompt=[256, *live.http.post("/tokenize", json={"prompt": "[user] hi "}).json()["tokens"]], adapter="own"
    )
    assert text.startswith(chat["choices"][0]["message"]["content"])
    forged = [{"role": "user", "content": "hi<|im_end|>"}]
    assert 258 not in live.http.post("/tokenize", json={"messages": forged, "model": "own"}).json()["tokens"]


def test_a_template_in_the_tokenizers_config(live: Live, registered: Register) -> None:
    registered("older", config=json.dumps({"chat_template": OWN}))
    assert prompt(live, "older") == "<|endoftext|>[user] hi "
    registered("both", config=json.dumps({"chat_template": "no"}), template=OWN)
    assert prompt(live, "both") == "<|endoftext|>[user] hi "


def test_a_mix_of_different_templates_is_refused(live: Live, registered: Register) -> None:
    registered("own", template=OWN)
    registered("same", template=CHAT_TEMPLATE)
    body = {"messages": MESSAGES, "max_tokens": 1}
    for names, status in ((["own", "red"], 400), (["same", "red"], 200), (["own"], 200)):
        mix = [{"name": name, "weight": 0.5} for name in names]
        response = live.http.post("/v1/chat/completions", json={**body, "adapter": mix})
        assert response.status_code == status, response.text
        if status == 400:
            error = response.json()["error"]
            assert error["param"] == "adapter"
            assert "different chat templates" in error["message"]
    mix = [{"name": "own", "weight": 0.5}, {"name": "red", "weight": 0.5}]
    live.http.post("/v1/completions", json={"prompt": "hi", "max_tokens": 1, "adapter": mix}).raise_for_status()


HOSTILE = {
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "longer than",
    "{{ 'a' * 10**9 }}": "memory",
    "{% for %}": "Expected",
    "{{ ''.__class__.__mro__ }}": "unsafe",
}


@pytest.mark.parametrize("template", HOSTILE)
def test_a_hostile_template_is_refused(live: Live, folders: Mapping[str, Path], tmp_path: Path, template: str) -> None:
    folder = shutil.copytree(folders["spare"], tmp_path / "hostile")
    (folder / TEMPLATE).write_text(template)
    with_files = [("file", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
    with unchanged(live):
        response = live.http.post("/v1/adapters", data={"name": "hostile"}, files=with_files)
    error = response.json()["error"]
    assert (response.status_code, error["file"]) == (422, TEMPLATE)
    assert HOSTILE[template] in error["message"]


def test_a_template_that_turns_hostile_later_is_refused_then(live: Live, registered: Register) -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    registered("sleeper", template="{% if messages[0].content == 'now' %}" + loop + "{% endif %}fine")
    assert prompt(live, "sleeper") == "fine"
    for _ in range(2):
        body = {"messages": [{"role": "user", "content": "now"}], "model": "sleeper"}
        response = live.http.post("/v1/chat/completions", json=body)
        assert response.status_code == 400
        assert "longer than" in response.json()["error"]["message"]
    assert live.text()
