"""Fields that go to the chat template, and reasoning that its markers separate."""

from typing import Any

import pytest

from server.text.chat_template import TemplateSources
from server.text.template_environment import render
from tests.api.live import Live

USER = {"role": "user", "content": "hi"}
CHAT = "/v1/chat/completions"


@pytest.fixture
def template(live: Live, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace the base's template."""

    def replace(source: str) -> None:
        codec = live.service.codec
        monkeypatch.setattr(codec, "template", codec.make_template(TemplateSources(source), render))

    return replace


def prompt(live: Live, **fields: Any) -> str:
    """The prompt of a request, as text."""
    response = live.http.post("/tokenize", json={"messages": [USER], **fields})
    assert response.status_code == 200, response.text
    text: str = live.http.post("/detokenize", json={"tokens": response.json()["tokens"]}).json()["prompt"]
    return text


def test_variables_of_the_template(live: Live, template: Any) -> None:
    template("{{ messages[0].content }}{{ mood|default('!') }}{% if enable_thinking %}?{% endif %}")
    assert prompt(live) == "hi!"
    assert prompt(live, chat_template_kwargs={"mood": ".", "enable_thinking": True}) == "hi.?"
    refused = live.http.post(CHAT, json={"messages": [USER], "chat_template_kwargs": {"tools": []}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "chat_template_kwargs")


def test_documents(live: Live, template: Any) -> None:
    template(
        "{% for each in documents or [] %}{{ each.title }}: {{ each.text }}\n{% endfor %}{{ messages[0].content }}"
    )
    assert prompt(live, documents=[{"title": "a", "text": "b"}]) == "a: b\nhi"
    assert prompt(live) == "hi"


def test_reasoning_effort(live: Live, template: Any) -> None:
    template("{{ messages[0].content }}{{ reasoning_effort|default('') }}")
    assert prompt(live, reasoning_effort="high") == "hihigh"
    template("{{ messages[0].content }}{% if enable_thinking is defined and not enable_thinking %}</think>{% endif %}")
    assert prompt(live, reasoning_effort="none") == "hi</think>"
    assert prompt(live, reasoning_effort="low") == prompt(live) == "hi"


def test_fields_of_the_template_need_messages(live: Live) -> None:
    response = live.http.post("/tokenize", json={"prompt": "hi", "documents": [{"title": "a"}]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "documents")


def test_reasoning_is_not_content(live: Live, template: Any) -> None:
    template("{{ messages[0].content }}<think>\n{# </think> #}")
    asked = {"messages": [USER], "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    message = live.http.post(CHAT, json=asked).json()["choices"][0]["message"]
    assert message["content"] == ""
    assert message["reasoning_content"] == message["reasoning"] != ""
    deltas = [chunk["choices"][0]["delta"] for chunk in live.stream(CHAT, **asked)]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == message["reasoning_content"]
    assert "".join(delta.get("content", "") for delta in deltas) == ""
    template("{{ messages[0].content }}<think>\n</think>\n\n")
    message = live.http.post(CHAT, json=asked).json()["choices"][0]["message"]
    assert message["content"]
    assert "reasoning" not in message


def test_a_prescribed_answer_has_no_reasoning(live: Live, template: Any) -> None:
    template("{{ messages[0].content }}<think>\n{# </think> #}")
    asked = {"messages": [USER], "max_tokens": 16, "guided_choice": ["yes", "no"]}
    message = live.http.post(CHAT, json=asked).json()["choices"][0]["message"]
    assert message["content"] in ("yes", "no")
