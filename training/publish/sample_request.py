"""A sample request to an adapter: the messages of one of its rows, system prompt included."""

import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from training.data.conversation import Conversation
from training.data.rendering import UNTRAINED, Example

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
PROMPT_CHARS = 60
"""Length of the prompt, in characters, that is taken from a row of plain text."""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """A request to a server, without address and ``model``."""

    path: str
    body: dict[str, Any]
    """The JSON body: ``messages``, or ``prompt`` as text or token ids; greedy, as in judging."""
    reason: str | None = None
    """Why the prompt is token ids; None if it is not."""


def sample_request(example: Example, max_tokens: int, *, own_template: bool) -> SampleRequest:
    """Return the request for ``example``'s last answer.

    ``own_template`` means that it was rendered with another chat template than the base's, which servers use.
    """
    row = example.row or Conversation(example.source)
    greedy = {"max_tokens": max_tokens, "temperature": 0}
    if not row.turns:
        prompt = (row.text or "")[:PROMPT_CHARS] if row.prompt is None else row.prompt
        return SampleRequest(COMPLETION, {"prompt": prompt, **greedy})
    messages = [turn.message() for turn in row.turns[:-1]]
    if own_template:
        reason = "the adapter was trained with another chat template than the base's"
    elif row.tools or any(message["role"] == "tool" or "tool_calls" in message for message in messages):
        reason = "the server does not support tools"
    else:
        return SampleRequest(CHAT, {"messages": messages, **greedy})
    return SampleRequest(COMPLETION, {"prompt": _prompt(example), **greedy}, reason)


def shortest_prompt(examples: Iterable[Example]) -> Example | None:
    """Return the example with the shortest prompt, which is easiest to read; None if none has a prompt."""
    asking = (example for example in examples if example.prompt_length)
    return min(asking, key=lambda example: example.prompt_length, default=None)


def curl_command(address: str, name: str, request: SampleRequest) -> str:
    """Return the request as a shell command; ``address`` must be shell-quoted and not end with a slash."""
    lines = [f"  {to_json(key)}: {to_json(value)}" for key, value in ({"model": name} | request.body).items()]
    body = shlex.quote("{\n" + ",\n".join(lines) + "\n}")
    return f"curl {address}{request.path} -H 'content-type: application/json' -d {body}"


def to_json(value: Any) -> str:
    """Return one line of JSON with non-ASCII letters as they are and control characters escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else json.dumps(letter)[1:-1] for letter in text)


def _prompt(example: Example) -> list[int]:
    """Return the ids before the last answer, or, if that is not trained, before the first trained token."""
    if example.prompt_length:
        return example.prompt
    first = next(place for place, label in enumerate(example.labels) if label != UNTRAINED)
    return example.input_ids[:first]
