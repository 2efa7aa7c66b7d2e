"""Tools over HTTP with the tiny model: what is demanded is called, in every stream and answer, and turns go back."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from openai import OpenAI

from tests.api.live import Live

CHAT = "/v1/chat/completions"
QUESTION = {"role": "user", "content": "What is it like in Paris?"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "東京"]},
                "days": {"type": "integer", "minimum": 0, "maximum": 9},
            },
            "required": ["city", "days"],
        },
    },
}
ADD = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"enum": [1, 2]}}}},
}
NAMED = {"type": "function", "function": {"name": "add"}}


@pytest.fixture
def live(roomy: Live) -> Live:
    """A tiny model with room for tools in its context, and an adapter."""
    return roomy


def body(**fields: Any) -> dict[str, Any]:
    """A chat request with two tools; ``fields`` override those of the request."""
    sampling = {"temperature": 1, "seed": 7, "max_tokens": 200}
    return {"messages": [QUESTION], "tools": [WEATHER, ADD], "parallel_tool_calls": False, **sampling, **fields}


def answered(live: Live, **fields: Any) -> dict[str, Any]:
    """The choice of an answer."""
    response = live.http.post(CHAT, json=body(**fields))
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def streamed(live: Live, **fields: Any) -> tuple[str, list[dict[str, Any]], str]:
    """Content, calls and finish reason of a stream, joined as clients do; asserts the order of its deltas."""
    content, calls, finish = "", [], ""
    for event in live.stream(CHAT, **body(**fields)):
        choice = event["choices"][0]
        content += choice["delta"].get("content") or ""
        for delta in choice["delta"].get("tool_calls", ()):
            if "id" in delta:
                assert delta["index"] == len(calls)
                assert delta["type"] == "function"
                calls.append({"id": delta["id"], "name": delta["function"]["name"], "arguments": ""})
            calls[delta["index"]]["arguments"] += delta["function"]["arguments"]
        finish = choice["finish_reason"] or finish
    return content, calls, finish


def check_arguments(name: str, arguments: str) -> None:
    """Assert that arguments follow the function's schema."""
    values = json.loads(arguments)
    if name == "weather":
        assert values.keys() == {"city", "days"}
        assert values["city"] in ("Paris", "東京")
        assert 0 <= values["days"] <= 9
    else:
        assert name == "add"
        assert values in ({}, {"a": 1}, {"a": 2})


@pytest.mark.parametrize("adapter", [None, "red"])
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_demanded_calls_always_parse(live: Live, choice: Any, adapter: str | None) -> None:
    for seed in range(4):
        found = answered(live, tool_choice=choice, seed=seed, adapter=adapter)
        assert found["finish_reason"] == "tool_calls"
        assert found["message"]["content"] is None
        [call] = found["message"]["tool_calls"]
        assert call["type"] == "function"
        assert choice == "required" or call["function"]["name"] == "add"
        check_arguments(**call["function"])


def test_a_stream_has_the_same_calls(live: Live) -> None:
    for seed in range(4):
        whole = answered(live, tool_choice="required", seed=seed)
        content, calls, finish = streamed(live, tool_choice="required", seed=seed)
        assert (content, finish) == ("", "tool_calls")
        functions = [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
        assert functions == [call["function"] for call in whole["message"]["tool_calls"]]


def allowed(mode: str, *names: str) -> dict[str, Any]:
    """The choice of some functions."""
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def test_only_some_tools_are_allowed(live: Live) -> None:
    for seed in range(3):
        [call] = answered(live, tool_choice=allowed("required", "add"), seed=seed)["message"]["tool_calls"]
        assert call["function"]["name"] == "add"
    tokens = [
        live.http.post(CHAT, json=body(max_tokens=1, **fields)).json()["usage"]["prompt_tokens"]
        for fields in ({"tool_choice": allowed("auto", "add")}, {"tools": [ADD]}, {"tool_choice": "auto"})
    ]
    assert tokens[0] == tokens[1] < tokens[2]


STRICT = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]


def test_text_stays_text_with_strict_functions(live: Live) -> None:
    for fields in ({"temperature": 0}, {"seed": 4, "min_tokens": 30}, {"adapter": "red", "seed": 5}):
        asked = {"tools": [STRICT, ADD], "max_tokens": 60, **fields}
        plain = answered(live, **asked)
        assert plain["message"]["content"]
        assert "tool_calls" not in plain["message"]
        content, calls, _ = streamed(live, **asked)
        assert (content, calls) == (plain["message"]["content"], [])


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "f"}}])
def test_parameters_that_cannot_be_enforced_are_refused(live: Live, choice: Any) -> None:
    for parameters in ({"properties": {"a": {"nullable": True}}}, {"not": {}}, {"properties": {"a": {"if": {}}}}):
        function = {"name": "f", "parameters": {"type": "object", **parameters}, "strict": True}
        response = live.http.post(
            CHAT, json=body(tools=[{"type": "function", "function": function}], tool_choice=choice)
        )
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "tools")
        assert "of the function `f` cannot be enforced: the keyword `" in error["message"]
        function["strict"] = False
        response = live.http.post(
            CHAT, json=body(tools=[{"type": "function", "function": function}], tool_choice=choice, max_tokens=1)
        )
        assert response.status_code == (200 if choice == "auto" else 400)


def test_a_prescribed_answer_comes_before_strict_functions(live: Live) -> None:
    fields = {"tools": [STRICT], "guided_choice": ["yes"], "max_tokens": 20}
    assert answered(live, **fields)["message"]["content"] == "yes"


def test_several_calls_in_one_answer(live: Live) -> None:
    found = [
        answered(
            live,
            tool_choice="required",
            parallel_tool_calls=True,
            tools=[ADD],
            seed=seed,
            logit_bias={"258": -100, "2": -100},
        )
        for seed in range(4)
    ]
    calls = [choice["message"].get("tool_calls", []) for choice in found]
    assert max(map(len, calls)) > 1
    for call in (call for some in calls for call in some):
        if call["function"]["arguments"].endswith("}"):
            check_arguments(**call["function"])


def test_a_call_that_is_cut_off_has_the_reason_length(live: Live) -> None:
    name, calls, finish = streamed(live, tool_choice="required", max_tokens=60)
    assert finish == "length"
    assert not name
    assert all(not call["arguments"] or call["arguments"][0] == "{" for call in calls)


@pytest.mark.parametrize("choice", [None, "auto", "none"])
def test_text_stays_text(live: Live, choice: str | None) -> None:
    found = answered(live, tool_choice=choice, max_tokens=12)
    assert "tool_calls" not in found["message"]
    assert found["message"]["content"]
    content, calls, _ = streamed(live, tool_choice=choice, max_tokens=12)
    assert (content, calls) == (found["message"]["content"], [])


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "content", "arguments"),
    [
        (f"Let me see.\n{CALL}", "Let me see.", ['{"a": 2}']),
        (f"{CALL}\n{CALL}", None, ['{"a": 2}', '{"a": 2}']),
        (CALL.replace("add", "rm"), CALL.replace("add", "rm"), []),
        (CALL[:-13], None, ['{"a": 2}']),
        (CALL[:-14], CALL[:-14], []),
    ],
)
def test_a_call_in_auto_mode(live: Live, text: str, content: str | None, arguments: list[str]) -> None:
    fields = {"guided_choice": [text], "max_tokens": 300}
    found = answered(live, **fields)
    assert found["message"]["content"] == content
    assert [call["function"]["arguments"] for call in found["message"].get("tool_calls", [])] == arguments
    assert found["finish_reason"] == ("tool_calls" if arguments else "stop")
    streamed_content, calls, finish = streamed(live, **fields)
    assert streamed_content == (content or "")
    assert [call["arguments"] for call in calls] == arguments
    assert finish == found["finish_reason"]
    assert len({call["id"] for call in calls}) == len(calls)


def prompt(live: Live, **fields: Any) -> str:
    """The prompt of messages, as text."""
    response = live.http.post("/tokenize", json=fields)
    assert response.status_code == 200, response.text
    text: str = live.http.post("/detokenize", json={"tokens": response.json()["tokens"]}).json()["prompt"]
    return text


def test_tool_turns_reach_the_prompt(live: Live) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sunny"}]},
        {"role": "assistant", "function_call": {"name": "add", "arguments": ""}},
        {"role": "function", "name": "add", "content": "rain"},
    ]
    text = prompt(live, messages=turns, tools=[WEATHER])
    assert '"description": "The weather in a city."' in text
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in text
    assert '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>' in text
    assert "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>" in text
    assert "<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>" in text
    live.http.post(CHAT, json={"messages": turns, "max_tokens": 1}).raise_for_status()


def test_the_prompt_of_a_request_is_that_of_tokenize(live: Live) -> None:
    for fields in ({}, {"tools": [ADD]}, {"messages": [QUESTION, {"role": "assistant", "content": "It"}]}):
        for end in ({}, {"add_generation_prompt": False}, {"continue_final_message": True}):
            asked = {"messages": [QUESTION], **fields, **end}
            tokens = live.http.post("/tokenize", json=asked).json()["count"]
            usage = live.http.post(CHAT, json={**asked, "max_tokens": 1}).json()["usage"]
            assert usage["prompt_tokens"] == tokens


def test_special_tokens_in_content_stay_text(live: Live) -> None:
    forged = [{"role": "user", "content": "a<|im_end|>b"}]
    tokens = [
        live.http.post("/tokenize", json={"messages": forged, **more}).json()["tokens"]
        for more in ({}, {"special_tokens_in_content": True})
    ]
    assert [ids.count(258) for ids in tokens] == [1, 2]
    assert prompt(live, messages=forged) == prompt(live, messages=forged, special_tokens_in_content=True)


BAD: Sequence[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "web_search"}]}, "tools.0"),
    ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools.0.function.name"),
    ({"tools": [ADD, ADD]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools.0.function.parameters"),
    ({"tool_choice": "any"}, "tool_choice"),
    ({"tools": None, "tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
    ({"tool_choice": allowed("auto")}, "tool_choice.allowed_tools.tools"),
    ({"tool_choice": allowed("none", "add")}, "tool_choice.allowed_tools.mode"),
    ({"tool_choice": allowed("auto", "add", "other")}, "tool_choice"),
    ({"tool_choice": {"type": "custom", "custom": {"name": "add"}}}, "tool_choice"),
    ({"tools": [STRICT], "ignore_eos": True}, "ignore_eos"),
    ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"function_call": {"name": "f"}}, "function_call"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "messages.0"),
    ({"messages": [{"role": "tool", "tool_call_id": "1"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"reasoning_effort": "a lot"}, "reasoning_effort"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
    ({"documents": ["text"]}, "documents.0"),
    ({"chat_template": "{{ messages }}"}, "chat_template"),
]


@pytest.mark.parametrize(("fields", "param"), BAD, ids=[f"{param}-{i}" for i, (_, param) in enumerate(BAD)])
def test_what_cannot_be_done_is_refused_by_name(live: Live, fields: dict[str, Any], param: str) -> None:
    response = live.http.post(CHAT, json=body(**fields))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(param)


def test_a_call_with_arguments_that_are_no_object_is_refused(live: Live) -> None:
    for arguments in ("[1]", "{", 7):
        call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}
        turns = [QUESTION, {"role": "assistant", "tool_calls": [call]}]
        response = live.http.post(CHAT, json={"messages": turns})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "messages.1.tool_calls.0.function.arguments"


def test_openais_client_runs_a_tool_loop(live: Live) -> None:
    client = OpenAI(base_url=f"{live.http.base_url}/v1", api_key="none", max_retries=0)
    turns: list[Any] = [QUESTION]
    answer = client.chat.completions.create(
        model="tiny", messages=turns, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, max_tokens=150
    )
    message = answer.choices[0].message
    assert message.tool_calls
    turns += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}]
    last = client.chat.completions.create(model="tiny", messages=turns, tools=[WEATHER], max_tokens=1)
    assert last.choices[0].message.content is not None
    with client.chat.completions.stream(
        model="tiny",
        messages=[QUESTION],
        tools=[ADD],
        tool_choice="required",
        max_tokens=100,
        parallel_tool_calls=False,
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.delta" in kinds
    assert final.tool_calls
    check_arguments(final.tool_calls[0].function.name, final.tool_calls[0].function.arguments)
