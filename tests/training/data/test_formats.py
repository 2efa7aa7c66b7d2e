"""Each format is recognised and converted; each error names the row."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.training.rows import conversations, write_rows
from training.data.conversation import DataError, Turn
from training.data.formats import read_conversations, recognise

USER, ASSISTANT = Turn("user", "Hi"), Turn("assistant", "Hello", trained=True)
CALL = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
TOOLS = [{"type": "function", "function": {"name": "clock"}}]


def one(tmp_path: Path, *rows: dict[str, Any], format: str = "auto") -> Any:
    """Return the conversation of the last row."""
    return conversations(write_rows(tmp_path / "rows.jsonl", rows), format)[-1]


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def shared(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": value} for role, value in turns], **more}


HI = said("user", "Hi")
HELLO = said("assistant", "Hello")


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Hi", "output": "Hello"},
        {"instruction": "Hi", "input": "", "output": "Hello", "text": "### Instruction: Hi"},
        {"instruction": "Hi", "input": None, "output": "Hello", "system": " "},
        shared(("human", "Hi"), ("gpt", "Hello")),
        shared(("user", "Hi"), ("chatgpt", "Hello"), system=None, tools="[]"),
        {"conversations": [HI, HELLO]},
        {"conversations": [{**HI, "from": None, "value": None}, {**HELLO, "from": None, "value": None}]},
        chat(HI, HELLO),
        chat({**HI, "weight": 0, "name": None}, {**HELLO, "weight": 1, "tool_calls": None}, tools=None),
        chat(said("user", [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]), HELLO),
        chat(HI, HELLO, prompt="Hi", id=7),
    ],
    ids=str,
)
def test_the_same_conversation_in_every_format(tmp_path: Path, row: dict[str, Any]) -> None:
    assert one(tmp_path, row).turns == (USER, ASSISTANT)


def test_alpaca_with_input_and_system(tmp_path: Path) -> None:
    row = {"instruction": "Translate.", "input": "Haus", "output": "house", "system": "Be brief."}
    assert [turn.content for turn in one(tmp_path, row).turns] == ["Be brief.", "Translate.\n\nHaus", "house"]


def test_sharegpt_with_system_and_tools(tmp_path: Path) -> None:
    row = shared(("system", "S"), ("human", "A"), ("gpt", "B"), ("observation", "C"), ("gpt", "D"), tools='[{"a": 1}]')
    conversation = one(tmp_path, row)
    assert [turn.role for turn in conversation.turns] == ["system", "user", "assistant", "tool", "assistant"]
    assert conversation.tools == [{"a": 1}]


def test_weights_say_which_turns_are_trained(tmp_path: Path) -> None:
    row = chat(HI, {**HELLO, "weight": 0}, HI, {**HELLO, "weight": 1}, HI, HELLO)
    assert [turn.trained for turn in one(tmp_path, row).turns] == [False, False, False, True, False, True]


def test_developer_role_is_the_system_role(tmp_path: Path) -> None:
    turns = [said("developer", "Be brief."), HI, HELLO]
    for row in (chat(*turns), {"conversations": turns}):
        assert one(tmp_path, row).turns[0] == Turn("system", "Be brief.")


def test_tool_calls_and_their_answers(tmp_path: Path) -> None:
    calls = said("assistant", None, tool_calls=[CALL])
    conversation = one(tmp_path, chat(HI, calls, said("tool", "12:00", tool_call_id="1"), HELLO, tools=TOOLS))
    assert conversation.turns[1].message() == {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert conversation.turns[2].message() == {"role": "tool", "content": "12:00", "tool_call_id": "1"}
    assert conversation.turns[1].trained
    assert conversation.tools == TOOLS
    as_text = said("assistant", None, tool_calls=json.dumps([CALL]))
    written = one(tmp_path, chat(HI, as_text, said("tool", "12:00", tool_call_id="1"), HELLO, tools=json.dumps(TOOLS)))
    assert (written.turns, written.tools) == (conversation.turns, conversation.tools)


def test_prompt_and_completion_and_plain_text(tmp_path: Path) -> None:
    completion = one(tmp_path, {"prompt": "2+2=", "completion": " 4"})
    assert (completion.prompt, completion.text, completion.turns) == ("2+2=", " 4", ())
    assert (one(tmp_path, {"text": "Once."}).prompt, one(tmp_path, {"text": "Once."}).text) == (None, "Once.")


def test_a_format_can_be_given(tmp_path: Path) -> None:
    row = {"instruction": "Hi", "output": "Hello", "text": "Once."}
    assert one(tmp_path, row, format="text").text == "Once."


def test_unused_fields_are_recorded(tmp_path: Path) -> None:
    row = chat({**HI, "id": 3, "refusal": None}, HELLO, source="web", score=None)
    [(_, format, unused)] = read_conversations(write_rows(tmp_path / "rows.jsonl", [row]))
    assert (format, unused) == ("chat", {"source", "messages[].id"})


GOOD = chat(HI, HELLO)
DEFECTS: list[tuple[dict[str, Any], str]] = [
    ({"question": "Hi"}, "unknown format: the row has `question`"),
    ({}, "unknown format: the row has no fields"),
    (
        {"instruction": "Hi", "output": "x", "prompt": "Hi", "completion": "x"},
        "the row could be alpaca or completion; choose with --format",
    ),
    ({"instruction": "Hi", "output": None}, "`output` is null"),
    ({"instruction": "Hi", "output": "  \n"}, "`output` is empty"),
    ({"instruction": "", "output": "x"}, "`instruction` is empty"),
    ({"instruction": 3, "output": "x"}, "`instruction` must be text, not a number"),
    ({"instruction": "a\0b", "output": "x"}, "`instruction` has a NUL"),
    ({"instruction": "a", "output": "x\ud800"}, "`output` has half a surrogate pair at character 2"),
    ({"instruction": "a", "input": ["b"], "output": "x"}, "`input` must be text, not a list"),
    ({"instruction": "a", "output": "x", "history": [["b", "c"]]}, "`history` is not supported"),
    ({"prompt": "", "completion": "x"}, "`prompt` is empty"),
    ({"prompt": [HI], "completion": [HELLO]}, "`prompt` must be text, not a list"),
    ({"text": True}, "`text` must be text, not true or false"),
    (chat(), "the assistant has no turn"),
    (chat(HI), "the assistant has no turn"),
    (chat(HELLO), "the first turn after the system turn must be the user's, not the assistant's"),
    (chat(HI, HELLO, HI), "the last turn must be the assistant's, not the user's"),
    (chat(HI, {**HELLO, "weight": 0}), "no token to train on"),
    (chat(HI, {**HELLO, "weight": 0.5}), r"`messages\[1\].weight` must be 0 or 1 \(got 0.5\)"),
    (chat(HI, {**HELLO, "weight": "1"}), r"`messages\[1\].weight` must be 0 or 1"),
    (chat({**HI, "weight": 1}, HELLO), r"`messages\[0\].weight` is 1, but only the assistant's"),
    (chat(HI, said("assistant", "")), r"`messages\[1\].content` is empty"),
    (chat(HI, said("assistant", None)), r"`messages\[1\].content` must be text, not null"),
    (chat(HI, {"role": "assistant"}), r"`messages\[1\].content` must be text, not null or missing"),
    (chat(HI, {"content": "x"}), r"`messages\[1\].role` must be text"),
    (chat(HI, said("bot", "x")), r"`messages\[1\].role` is 'bot', an unknown role"),
    (chat(HI, "Hello"), r"`messages\[1\]` must be an object, not text"),
    (chat(HI, said("assistant", [{"type": "image_url"}])), r"`messages\[1\].content\[0\]` must be a content part"),
    (chat(HI, {**HELLO, "function_call": {"name": "f"}}), "`function_call` is not supported; use `tool_calls`"),
    (chat(HI, HELLO, functions=[{"name": "f"}]), "`functions` is not supported; use `tools`"),
    (chat(HI, HELLO, tools={"a": 1}), "`tools` must be a list of objects"),
    (chat(HI, HELLO, tools="[nonsense"), "`tools` is invalid JSON"),
    ({"messages": "Hi"}, "`messages` must be a list of turns, not text"),
    (shared(("human", "Hi"), ("alien", "x")), r"`conversations\[1\].from` is 'alien', an unknown role"),
]


@pytest.mark.parametrize(("row", "reason"), DEFECTS, ids=[reason for _, reason in DEFECTS])
def test_defect_is_reported_with_its_row(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: .*{reason}"):
        conversations(path)


def test_formats_are_not_mixed(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [GOOD, GOOD, {"text": "Once."}])
    with pytest.raises(DataError, match=r"rows\.jsonl:3: the row is text, but the rows before it are chat"):
        conversations(path)


def test_a_later_row_with_a_field_missing(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [GOOD, {"message": []}])
    with pytest.raises(DataError, match=r"rows\.jsonl:2: `messages` is missing$"):
        conversations(path)


def test_null_equals_absent() -> None:
    """Parquet gives every row every column."""
    assert recognise({"messages": None, "instruction": "a", "output": "b", "text": None}, "") == "alpaca"
