"""How long a conversation's prompt is, before it is rendered."""

from server.text.conversation import Conversation

LONG = "x" * 10_000


def test_every_text_counts() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": LONG}}}
    for message in (
        {"role": "user", "content": LONG},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "content": "", "reasoning_content": LONG},
    ):
        assert 10_000 <= Conversation([message]).characters < 10_200
    user = {"role": "user", "content": "hi"}
    assert Conversation([user], tools=[call]).characters > 10_000
    assert Conversation([user], documents=[{"text": LONG}]).characters > 10_000
    assert Conversation([user]).characters == 2
