"""Requests of the Responses API and of Anthropic's Messages API to chat requests."""

from typing import Any

import pytest
from pydantic import ValidationError

from server.api.conversion import anthropic, responses_api
from server.api.schemas.anthropic.requests import MessagesRequest
from server.api.schemas.responses_api.requests import ResponsesRequest

Json = dict[str, Any]

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "weather", "description": "The weather.", "parameters": PARAMETERS, "strict": True}


def of_response(**fields: Any) -> Json:
    return responses_api.chat_fields(ResponsesRequest.model_validate({"input": "Hi", **fields}))


HI = {"role": "user", "content": "Hi"}


def of_message(*turns: Json, **fields: Any) -> Json:
    body = {"max_tokens": 5, "messages": list(turns), **fields}
    return anthropic.chat_fields(MessagesRequest.model_validate(body))


# --- OpenAI's Responses API


def test_a_text_is_a_message_of_the_user() -> None:
    assert of_response() == {"messages": [{"role": "user", "content": "Hi"}]}
    assert of_response(instructions="Be brief.")["messages"] == [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]


def test_items_of_a_tool_loop() -> None:
    items = [
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "Is it "}, {"type": "input_text", "text": "cold?"}],
        },
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Ask."}]},
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}],
        },
        {
            "type": "function_call",
            "id": "fc_1",
            "call_id": "a",
            "name": "weather",
            "arguments": "{}",
            "status": "completed",
        },
        {"type": "function_call", "call_id": "b", "name": "time", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "cold"},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "noon"}]},
        {"role": "assistant", "content": "Yes."},
        {"role": "assistant", "content": "Very."},
        {"role": "user", "content": "Thanks."},
    ]
    calls = [
        {"id": id_, "type": "function", "function": {"name": name, "arguments": "{}"}}
        for id_, name in (("a", "weather"), ("b", "time"))
    ]
    assert of_response(input=items)["messages"] == [
        {"role": "user", "content": "Is it cold?"},
        {"role": "assistant", "reasoning_content": "Ask.", "content": "I look.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "a", "content": "cold"},
        {"role": "tool", "tool_call_id": "b", "content": "noon"},
        {"role": "assistant", "content": "Yes."},
        {"role": "assistant", "content": "Very."},
        {"role": "user", "content": "Thanks."},
    ]


def test_tools_and_their_choice() -> None:
    tools = [{"type": "function", **FUNCTION}, {"type": "function", "name": "time", "parameters": None, "strict": None}]
    chat = [{"type": "function", "function": FUNCTION}, {"type": "function", "function": {"name": "time"}}]
    assert of_response(tools=tools)["tools"] == chat
    for choice in ("none", "auto", "required"):
        assert of_response(tools=tools, tool_choice=choice)["tool_choice"] == choice
    named = of_response(tools=tools, tool_choice={"type": "function", "name": "time"})
    assert named["tool_choice"] == {"type": "function", "function": {"name": "time"}}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "time"}]}
    some = of_response(tools=tools, tool_choice=allowed, parallel_tool_calls=False)
    assert some["tools"] == chat
    functions = [{"type": "function", "function": {"name": "time"}}]
    assert some["tool_choice"] == {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": functions},
    }
    assert some["parallel_tool_calls"] is False


def test_formats_of_text() -> None:
    assert of_response(text={"format": {"type": "json_object"}})["response_format"] == {"type": "json_object"}
    schema = {"type": "json_schema", "name": "answer", "schema": PARAMETERS, "strict": True}
    assert of_response(text={"format": schema, "verbosity": "medium"})["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": PARAMETERS, "strict": True},
    }


def test_other_fields() -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "user": "me",
        "adapter": "red",
        "model": "tiny",
        "seed": 5,
        "stream": True,
    }
    found = of_response(
        **fields,
        max_output_tokens=7,
        reasoning={"effort": "low", "summary": "auto"},
        store=False,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
    )
    assert found.pop("adapter") == [{"name": "red", "weight": 1.0}]
    del found["messages"]
    assert found == {
        **{name: value for name, value in fields.items() if name != "adapter"},
        "max_tokens": 7,
        "reasoning_effort": "low",
        "logprobs": True,
        "top_logprobs": 2,
    }


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"store": True}, "keeps no responses"),
        ({"previous_response_id": "resp_1"}, "earlier items"),
        ({"conversation": {"id": "conv_1"}}, "keeps no conversations"),
        ({"background": True}, "fetched later"),
        ({"prompt": {"id": "pmpt_1"}}, "keeps no prompts"),
        ({"truncation": "auto"}, "never shortened"),
        ({"tools": [{"type": "web_search"}]}, "`web_search` are not supported"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "`mcp` are not supported"),
        ({"tool_choice": "any"}, "must be none, auto, required"),
        ({"tool_choice": {"type": "web_search"}}, "must be none, auto, required"),
        ({"tool_choice": {"type": "function"}}, "Field required, in `name`"),
        ({"tool_choice": {"type": []}}, "must be none, auto, required"),
        ({"tools": [5]}, "`None` are not supported"),
        ({"include": [{}]}, "is not supported"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "`item_reference` are not supported"),
        ({"input": [{"type": "computer_call_output"}]}, "`computer_call_output` are not supported"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "`input_image` are not",
        ),
        ({"input": []}, "at least 1"),
        ({"input": [5]}, "`None` are not supported"),
        ({"input": 5}, "valid list"),
        ({"include": ["message.output_text.logits"]}, "only `message.output_text.logprobs`, "),
        ({"top_logprobs": 3}, "needs `include` to have"),
        ({"top_logprobs": 21, "include": ["message.output_text.logprobs"]}, "less than or equal to 20"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "`schema` is missing"),
        ({"text": {"verbosity": "low"}}, '`verbosity` is not supported; only `"medium"` is accepted'),
        ({"max_output_tokens": 0}, "greater than or equal to 1"),
        ({"max_tokens": 5}, "Unknown field"),
        ({"metadata": {"a": "b" * 513}}, "at most 512"),
    ],
    ids=str,
)
def test_what_a_response_cannot_have(fields: Json, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        of_response(**fields)


def test_what_clients_send_for_nothing() -> None:
    nothing = {
        "store": None, "previous_response_id": None, "conversation": None, "background": False, "include": [],
        "tools": [], "truncation": "disabled", "metadata": {}, "service_tier": "auto", "prompt_cache_key": "x",
        "top_logprobs": 0, "text": {"format": {"type": "text"}},
        "stream_options": {"include_obfuscation": False}, "context_management": [],
    }  # fmt: skip
    found = of_response(**nothing)
    assert found.pop("response_format") == {"type": "text"}
    assert found == of_response()


# --- Anthropic's Messages API


def test_texts_of_a_conversation() -> None:
    blocks = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}]
    found = of_message(
        {"role": "user", "content": blocks}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"},
        system=[{"type": "text", "text": "Be brief."}],
    )  # fmt: skip
    assert found == {
        "max_tokens": 5,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "ab"},
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": "d"},
        ],
    }


def test_blocks_of_a_tool_loop() -> None:
    found = of_message(
        {"role": "user", "content": "Is it cold?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Ask.", "signature": ""},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "a", "name": "weather", "input": {"city": "Köln"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "a",
                    "content": [{"type": "text", "text": "cold"}],
                    "is_error": False,
                },
                {"type": "text", "text": "Well?"},
            ],
        },
    )
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
    assert found["messages"] == [
        {"role": "user", "content": "Is it cold?"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "Ask.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "cold"},
        {"role": "user", "content": "Well?"},
    ]


def test_anthropics_tools_and_their_choice() -> None:
    tool = {"name": "weather", "description": "The weather.", "input_schema": PARAMETERS}
    function = {"name": "weather", "description": "The weather.", "parameters": PARAMETERS}
    for given, wanted in (("auto", "auto"), ("any", "required"), ("none", "none")):
        found = of_message(HI, tools=[tool], tool_choice={"type": given})
        assert found["tools"] == [{"type": "function", "function": function}]
        assert found["tool_choice"] == wanted
    found = of_message(
        HI, tools=[tool], tool_choice={"type": "tool", "name": "weather", "disable_parallel_tool_use": True}
    )
    assert found["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert found["parallel_tool_calls"] is False


def test_anthropics_other_fields() -> None:
    found = of_message(
        HI, stop_sequences=["x"], temperature=0.5, top_k=3, stream=True, metadata={"user_id": "me"}, adapter="red",
        thinking={"type": "enabled", "budget_tokens": 1024}, service_tier="auto",
        output_config={"effort": "low", "format": {"type": "json_schema", "schema": PARAMETERS}},
    )  # fmt: skip
    del found["messages"]
    assert found == {
        "max_tokens": 5,
        "stop": ["x"],
        "temperature": 0.5,
        "top_k": 3,
        "stream": True,
        "user": "me",
        "adapter": [{"name": "red", "weight": 1.0}],
        "chat_template_kwargs": {"enable_thinking": True},
        "reasoning_effort": "low",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": PARAMETERS, "strict": True},
        },
    }
    assert of_message(HI, thinking={"type": "disabled"})["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "greater than or equal to 1"),
        ({"messages": []}, "at least 1"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "user, assistant or system"),
        ({"messages": [5]}, "user, assistant or system"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "`image` are not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "`tool_use` are not supported"),
        ({"messages": [{"role": "assistant", "content": [{"type": "redacted_thinking"}]}]}, "`redacted_thinking` are"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "`web_search_20250305` are not supported"),
        ({"tool_choice": {"type": "tool"}}, "`name` is the tool"),
        ({"mcp_servers": [{"url": "x"}]}, "`mcp_servers` is not supported"),
        ({"container": "x"}, "`container` is not supported"),
        ({"stop": ["a"], "stop_sequences": ["b"]}, "one of `stop` and `stop_sequences`"),
        ({"n": 2}, "Unknown field"),
    ],
    ids=str,
)
def test_what_a_message_cannot_have(fields: Json, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        of_message(**{"messages": [HI], **fields})
