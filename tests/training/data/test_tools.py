"""Tools and calls reach the template in a form that it renders correctly, from any file format."""

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from tests.tiny import tiny_tokenizer
from tests.training.rows import conversations, write_rows
from training.data.conversation import DataError
from training.data.rendering import Renderer
from training.data.tools import read_calls, read_tools

TOKENIZER = tiny_tokenizer()

START, END = "<|im_start|>", "<|im_end|>"
_TURNS = (
    f"{{% for m in messages %}}{{% if m.tool_calls %}}{START}assistant\n{{{{ CALLS }}}}{END}\n"
    f"{{% else %}}{START}{{{{ m.role }}}}\n{{{{ m.content }}}}{END}\n{{% endif %}}{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{START}assistant\n{{% endif %}}"
)


def template(calls: str) -> str:
    """Return a ChatML template that renders tool calls with ``calls``."""
    return _TURNS.replace("{{ CALLS }}", calls)


def each(call: str) -> str:
    return template("{% for call in m.tool_calls %}{% set f = call.function or call %}" + call + "{% endfor %}")


FAMILIES = {
    "an object, in Hermes' manner": each('<tool_call>{"name": "{{ f.name }}", "arguments": {{ f.arguments|tojson }}}'),
    "Qwen's, either": each(
        "{% if f.arguments is string %}{{ f.arguments }}{% else %}{{ f.arguments|tojson }}{% endif %}"
    ),
    "Llama 3's, with content": template(
        "{{ m.content or '' }}{\"parameters\": {{ m.tool_calls[0].function.arguments|tojson }}}"
    ),
    "Mistral's, the whole function": each("[TOOL_CALLS]{{ f|tojson }}"),
    "DeepSeek's, text, and only where there is no content": template(
        "{% if not m.content %}{% for c in m.tool_calls %}{{ c.function.name + '\\n' + c.function.arguments }}"
        "{% endfor %}{% else %}{{ m.content }}{% endif %}"
    ),
    "text, joined": each("{{ f.name ~ ' ' ~ f.arguments }}"),
    "text, as it is": each("{{ f.name }} {{ f.arguments }}"),
    "text, beside content": template("{{ m.content + m.tool_calls[0].function.arguments }}"),
    "content as it is": template("{{ m.content }}{{ m.tool_calls[0].function.arguments|tojson }}"),
    "content filtered": template("{{ m.content|trim }}{{ m.tool_calls[0].function.arguments|tojson }}"),
    "content joined": template("{{ m.content + m.tool_calls[0].function.arguments|tojson }}"),
}
XML = each("<{{ f.name }}>{% for key, value in f.arguments|items %}<{{ key }}>{{ value }}{% endfor %}")
"""Like Qwen's for code: not JSON."""

ARGUMENTS = {"city": 'Zürich "Nord"\n', "days": 2, "hourly": True, "from": None}
TEXT = json.dumps(ARGUMENTS, ensure_ascii=False)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"from": {"type": ["string", "null"]}}},
        },
    }
]


def called(arguments: Any) -> list[dict[str, Any]]:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "tool_calls": [call], "content": None},
        {"role": "tool", "content": "No.", "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "It is dry."},
    ]


def answers(path: Path, chat_template: str) -> list[str]:
    """Return the trained text of the first tool call, for each row of a file."""
    renderer = Renderer(TOKENIZER, chat_template)
    texts = []
    for row in conversations(path):
        example = renderer.render(row)
        whole = TOKENIZER.decode(example.input_ids, skip_special_tokens=False)
        texts.append(whole.split(f"{START}assistant\n")[1].partition(END)[0])
    return texts


def written(tmp_path: Path, arguments: Any, chat_template: str) -> str:
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": called(arguments)}])
    return answers(path, chat_template)[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("given", [TEXT, {**ARGUMENTS, "from": "now"}], ids=["text", "object"])
def test_arguments_are_encoded_once(tmp_path: Path, family: str, given: Any) -> None:
    expected = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    said = written(tmp_path, given, FAMILIES[family])
    assert expected in said
    assert "None" not in said


@pytest.mark.parametrize("given", [TEXT, ARGUMENTS], ids=["text", "object"])
def test_template_that_does_not_write_json(tmp_path: Path, given: Any) -> None:
    said = written(tmp_path, given, XML)
    assert said.startswith('<weather><city>Zürich "Nord"\n<days>2<hourly>True')


@pytest.mark.parametrize("given", ["{}", "", None, {}], ids=repr)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_without_arguments(tmp_path: Path, family: str, given: Any) -> None:
    said = written(tmp_path, given, FAMILIES[family])
    assert "{}" in said
    assert "{{" not in said


@pytest.mark.parametrize("given", ["{", "[1]", "7", ["a"], 7])
def test_arguments_that_are_not_an_object(tmp_path: Path, given: Any) -> None:
    place = r"rows\.jsonl:1: `messages\[1\]\.tool_calls\[0\]\.function\.arguments` "
    with pytest.raises(DataError, match=place):
        conversations(write_rows(tmp_path / "rows.jsonl", [{"messages": called(given)}]))


def test_template_errors_are_reported(tmp_path: Path) -> None:
    strict = each("{{ raise_exception('ids have nine letters') if call.id|length != 8 else f.arguments + '' }}")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the chat template raised an error: ids have nine letters"):
        written(tmp_path, TEXT, strict)


def test_template_that_reads_arguments_neither_as_text_nor_object(tmp_path: Path) -> None:
    neither = each(
        "{% if f.arguments is string %}{{ f.arguments.nothing.at.all }}{% else %}{{ f.arguments }}{% endif %}"
    )
    with pytest.raises(DataError, match="as JSON"):
        written(tmp_path, TEXT, neither)


def test_calls_with_content_and_calls_without_a_wrapper(tmp_path: Path) -> None:
    flat = called(TEXT)
    flat[1] = {"role": "assistant", "content": "Let me see.", "tool_calls": [{"name": "weather", "arguments": TEXT}]}
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": flat}])
    (said,) = answers(path, each("{{ m.content }} {{ f.arguments|tojson }}"))
    assert said == f"Let me see. {TEXT}"


PROPERTY = {"type": "string", "enum": ["a", None], "default": None, "examples": [None, {"a": None}], "const": None}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": PROPERTY, "default": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/day"}]}},
            "$defs": {"day": {"type": "integer"}},
            "required": ["city"],
        },
    },
}


def nulled(value: Any) -> Any:
    """Return a tool as Arrow returns it: with null for keys of other tools."""
    if isinstance(value, list):
        return [nulled(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {"default", "const", "enum", "examples"}
    return {"other": None, "examples_of": None} | {
        key: item if key in kept and not isinstance(item, dict) else nulled(item) for key, item in value.items()
    }


def test_meaningless_nulls_of_tools_are_removed() -> None:
    assert read_tools([nulled(TOOL)]) == [TOOL]
    assert read_tools(json.dumps([nulled(TOOL)])) == [TOOL]
    assert read_tools([TOOL]) == [TOOL], "default, const, enum and examples keep theirs"
    assert read_tools(None) is None


def test_property_may_have_the_name_of_a_keyword() -> None:
    tool = {"parameters": {"properties": {"default": None, "const": {"type": "string", "title": None}, "enum": None}}}
    assert read_tools([tool]) == [{"parameters": {"properties": {"const": {"type": "string"}}}}]


def test_nulls_in_arguments_stay_where_the_schema_allows_them() -> None:
    properties = {
        "a": {"type": ["string", "null"]}, "b": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "c": {"enum": ["x", None]}, "d": {"type": "string", "nullable": True}, "e": {"type": "string"},
        "f": {"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "string"}}},
        "g": {"type": "array", "items": {"properties": {"a": {"type": "null"}}}},
    }  # fmt: skip
    tools = [{"function": {"name": "weather", "parameters": {"properties": properties}}}]
    inner = {"a": None, "b": None}
    arguments = dict.fromkeys("abcdex") | {"f": inner, "g": [inner, None]}
    (call,) = read_calls([{"function": {"name": "weather", "arguments": arguments}}], "tool_calls", tools)
    kept = {"a": None}
    assert call["function"]["arguments"] == dict.fromkeys("abcd") | {"f": kept, "g": [kept, None]}
    text = json.dumps(arguments)
    (call,) = read_calls([{"function": {"name": "weather", "arguments": text}}], "tool_calls", tools)
    assert call["function"]["arguments"] == text, "what is written out is meant"


def rows_of_two_tools() -> list[dict[str, Any]]:
    """The two tools share only the keys that every tool has."""
    tools = [
        {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
        {"name": "clock", "strict": True, "parameters": {"type": "object", "properties": {"zone": {"enum": ["utc"]}}}},
    ]
    arguments = [{"city": "Rome"}, {"zone": "utc"}]
    rows = []
    for tool, given in zip(tools, arguments, strict=True):
        messages = called(given)
        messages[1]["tool_calls"][0]["function"]["name"] = tool["name"]
        messages[0]["name"] = "ann"
        rows.append({"messages": messages, "tools": [{"type": "function", "function": tool}]})
    return rows


def as_sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    names = {"role": "from", "content": "value"}
    turns = [{names.get(key, key): value for key, value in message.items()} for message in row["messages"]]
    return {"conversations": turns, "tools": row["tools"]}


@pytest.mark.parametrize("form", [dict, as_sharegpt], ids=["chat", "sharegpt"])
@pytest.mark.parametrize("kind", ["parquet", "jsonl made of it"])
def test_arrow_round_trip_keeps_rows(tmp_path: Path, form: Any, kind: str) -> None:
    rows = [form(row) for row in rows_of_two_tools()]
    plain = conversations(write_rows(tmp_path / "plain.jsonl", rows))
    unified = pyarrow.Table.from_pylist(rows)
    assert "clock" in str(unified)
    assert unified.to_pylist()[1]["tools"][0]["function"]["parameters"]["properties"]["city"] is None
    if kind == "parquet":
        path = tmp_path / "rows.parquet"
        parquet.write_table(unified, path)
    else:
        path = write_rows(tmp_path / "rows.jsonl", unified.to_pylist())
    for expected, found in zip(plain, conversations(path), strict=True):
        assert (found.turns, found.tools) == (expected.turns, expected.tools)


def test_values_that_are_not_json_are_reported(tmp_path: Path) -> None:
    messages = called({"day": datetime.date(2026, 1, 2)})
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages}]), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet:1: `messages\[1\]\.tool_calls` is not JSON: .*date"):
        conversations(tmp_path / "rows.parquet")


def test_maps_are_objects(tmp_path: Path) -> None:
    """What Spark and DuckDB write for JSON objects."""
    arguments = pyarrow.map_(pyarrow.string(), pyarrow.string())
    call = pyarrow.struct({"function": pyarrow.struct({"name": pyarrow.string(), "arguments": arguments})})
    message = pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string(), "tool_calls": pyarrow.list_(call)})
    messages = called({"city": "Rome"})[:2]
    del messages[1]["tool_calls"][0]["id"], messages[1]["tool_calls"][0]["type"]
    schema = pyarrow.schema({"messages": pyarrow.list_(message)})
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages}], schema), tmp_path / "rows.parquet")
    (row,) = conversations(tmp_path / "rows.parquet")
    assert row.turns[1].more["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}


SURROGATE = json.loads('"\\ud800"')
DEEP = '{"a":' * 20_000 + "1" + "}" * 20_000


@pytest.mark.parametrize("arguments", [None, "", {}, [], "{}"])
def test_arguments_that_are_left_out(arguments: object) -> None:
    (call,) = read_calls([{"function": {"name": "now", "arguments": arguments}}], "tool_calls", [])
    assert call["function"]["arguments"] in ({}, "{}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        *[(value, "must be an object, or one as JSON text") for value in (0, 1, 1.5, True, False, [1], "null", "[]")],
        ("{", "is invalid JSON"),
        (DEEP, "is invalid JSON: maximum recursion"),
        ('{"a":' * 200 + "1" + "}" * 200, "is nested more than 100 deep"),
    ],
)
def test_arguments_of_every_other_type(arguments: object, said: str) -> None:
    with pytest.raises(DataError, match=f"`c\\[0\\].function.arguments` {said}"):
        read_calls([{"function": {"name": "now", "arguments": arguments}}], "c", [])


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([{"a": SURROGATE}], "has half a surrogate pair"),
        ([{SURROGATE: 1}], "has half a surrogate pair"),
        (DEEP, "is invalid JSON"),
        ([{"a": json.loads("[" * 400 + "]" * 400)}], "is nested more than 100 deep"),
    ],
)
def test_tool_values_that_no_template_can_write(value: object, said: str) -> None:
    """Such a row must not end the run with a traceback: --skip-bad skips it."""
    for read in (read_tools, lambda value: read_calls(value, "tools", [])):
        with pytest.raises(DataError, match=f"`tools` {said}"):
            read(value)


@pytest.mark.parametrize("schema", [{"anyOf": 5}, {"oneOf": {"a": 1}}, {"enum": 5}, {"type": {}}, 5])
def test_invalid_schema_allows_no_nulls(schema: object) -> None:
    tools = [{"function": {"name": "now", "parameters": {"properties": {"a": schema}}}}]
    (call,) = read_calls([{"function": {"name": "now", "arguments": {"a": None, "b": 1}}}], "tool_calls", tools)
    assert call["function"]["arguments"] == {"b": 1}
