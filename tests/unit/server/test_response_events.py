"""The typed events of OpenAI's Responses API, and the blocks of Anthropic's Messages API, from deltas."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.formats.message_events import MessageEvents
from server.api.formats.response_events import ResponseEvents, Status
from server.parsers.deltas import ContentDelta, Delta, ReasoningDelta, ToolCallDelta

Json = dict[str, Any]

DELTAS: list[Delta] = [
    ReasoningDelta("Let me "),
    ReasoningDelta("see."),
    ContentDelta("I "),
    ContentDelta("call."),
    ToolCallDelta(0, "call_1", "weather", ""),
    ToolCallDelta(0, None, None, '{"city":'),
    ToolCallDelta(0, None, None, ' "Rome"}'),
    ToolCallDelta(1, "call_2", "time", "{}"),
]


def response(status: Status, items: list[Json]) -> Json:
    return {"status": status, "output": items}


def response_events(deltas: list[Delta], status: Status = "completed") -> tuple[list[Json], list[Json]]:
    """Events and items."""
    events = ResponseEvents(response)
    found = [
        *events.start(),
        *itertools.chain.from_iterable(events.add(delta) for delta in deltas),
        *events.end(status),
    ]
    return found, events.items


def test_events_come_in_openais_order() -> None:
    events, _ = response_events(DELTAS)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    part = ["response.content_part.added", "response.content_part.done"]
    assert [event["type"] for event in events] == [
        "response.created",
        "response.in_progress",
        *("response.output_item.added", part[0], "response.reasoning_text.delta", "response.reasoning_text.delta"),
        *("response.reasoning_text.done", part[1], "response.output_item.done"),
        *("response.output_item.added", part[0], "response.output_text.delta", "response.output_text.delta"),
        *("response.output_text.done", part[1], "response.output_item.done"),
        *("response.output_item.added", *["response.function_call_arguments.delta"] * 2),
        *("response.function_call_arguments.done", "response.output_item.done"),
        *("response.output_item.added", "response.function_call_arguments.delta"),
        *("response.function_call_arguments.done", "response.output_item.done"),
        "response.completed",
    ]


def test_items_are_what_the_deltas_add_up_to() -> None:
    events, items = response_events(DELTAS)
    assert [item["type"] for item in items] == ["reasoning", "message", "function_call", "function_call"]
    assert items[0]["content"] == [{"type": "reasoning_text", "text": "Let me see."}]
    assert items[1]["content"][0]["text"] == "I call."
    assert [(item["call_id"], item["name"], item["arguments"]) for item in items[2:]] == [
        ("call_1", "weather", '{"city": "Rome"}'),
        ("call_2", "time", "{}"),
    ]
    assert {item["status"] for item in items} == {"completed"}
    assert events[-1]["response"]["output"] == items
    assert [event["item"] for event in events if event["type"] == "response.output_item.done"] == items
    assert events[0]["response"] == {"status": "in_progress", "output": []}


@pytest.mark.parametrize("status", ["incomplete", "failed"])
def test_an_item_that_was_cut_off_is_incomplete(status: Status) -> None:
    events, items = response_events(DELTAS[:6], status)
    assert [item["status"] for item in items] == ["completed", "completed", "incomplete"]
    assert items[-1]["arguments"] == '{"city":'
    assert events[-1] == {
        "type": f"response.{status}",
        "sequence_number": len(events) - 1,
        "response": {"status": status, "output": items},
    }


def test_no_delta_no_item() -> None:
    events, items = response_events([])
    assert items == []
    assert [event["type"] for event in events] == ["response.created", "response.in_progress", "response.completed"]


def message_events(deltas: list[Delta]) -> tuple[list[Json], list[Json]]:
    """Events and blocks."""
    events = MessageEvents()
    found = [*itertools.chain.from_iterable(events.add(delta) for delta in deltas), *events.end()]
    return found, events.blocks


def test_blocks_are_what_the_deltas_add_up_to() -> None:
    events, blocks = message_events(DELTAS)
    assert blocks == [
        {"type": "thinking", "thinking": "Let me see.", "signature": ""},
        {"type": "text", "text": "I call."},
        {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Rome"}},
        {"type": "tool_use", "id": "call_2", "name": "time", "input": {}},
    ]
    kinds = [(event["type"].removeprefix("content_block_"), event["index"]) for event in events]
    assert kinds == [
        *(("start", 0), ("delta", 0), ("delta", 0), ("stop", 0)),
        *(("start", 1), ("delta", 1), ("delta", 1), ("stop", 1)),
        *(("start", 2), ("delta", 2), ("delta", 2), ("stop", 2)),
        *(("start", 3), ("delta", 3), ("stop", 3)),
    ]


def test_arguments_that_were_cut_off_are_those_that_are_complete() -> None:
    _, blocks = message_events([ToolCallDelta(0, "call_1", "weather", '{"city": "Rome", "days": [1, 2], "uni')])
    assert blocks[0]["input"] == {"city": "Rome", "days": [1, 2]}


TEXT = st.text(min_size=1, max_size=5)


@given(st.lists(st.builds(ContentDelta, TEXT) | st.builds(ReasoningDelta, TEXT), max_size=12))
def test_no_text_is_lost(deltas: list[Delta]) -> None:
    wanted = [(type(delta), delta.text) for delta in deltas if not isinstance(delta, ToolCallDelta)]
    runs = [
        (kind, "".join(text for _, text in group)) for kind, group in itertools.groupby(wanted, lambda each: each[0])
    ]
    names = {ContentDelta: ("message", "text"), ReasoningDelta: ("reasoning", "thinking")}
    _, items = response_events(deltas)
    assert [(item["type"], item["content"][0]["text"]) for item in items] == [(names[k][0], text) for k, text in runs]
    _, blocks = message_events(deltas)
    assert [(block["type"], block[block["type"]]) for block in blocks] == [(names[k][1], text) for k, text in runs]
