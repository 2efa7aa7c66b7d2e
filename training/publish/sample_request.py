"""The request that asks an adapter what one of its rows asks: the same messages, the system's among them."""

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
"""Characters of a plain text that its adapter is asked to go on with."""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """A request without its address and its ``model``."""

    path: str
    body: dict[str, Any]
    """``messages``, or ``prompt`` as text or token ids; greedy, as rows are judged."""
    reason: str | None = None
    """Why it is asked by token ids, where it is."""


def sample_request(example: Example, max_tokens: int, *, own_template: bool) -> SampleRequest:
    """What asks for ``example``'s last answer.

    ``own_template`` says that it was rendered with another template than the base's, which servers render with.
    """
    row = example.row or Conversation(example.source)
    greedy = {"max_tokens": max_tokens, "temperature": 0}
    if not row.turns:
        prompt = (row.text or "")[:PROMPT_CHARS] if row.prompt is None else row.prompt
        return SampleRequest(COMPLETION, {"prompt": prompt, **greedy})
    messages = [turn.message() for turn in row.turns[:-1]]
    if own_template:
        reason = "the base's own chat template is not the one it was trained with"
    elif row.tools or any(message["role"] == "tool" or "tool_calls" in message for message in messages):
        reason = "the server takes no tools"
    else:
        return SampleRequest(CHAT, {"messages": messages, **greedy})
    return SampleRequest(COMPLETION, {"prompt": _prompt(example), **greedy}, reason)


def shortest_prompt(examples: Iterable[Example]) -> Example | None:
    """The example with the shortest prompt that there is an answer to: it is for people to read."""
    asking = (example for example in examples if example.prompt_length)
    return min(asking, key=lambda example: example.prompt_length, default=None)


def curl_command(address: str, name: str, request: SampleRequest) -> str:
    """The call for a shell; ``address`` is quoted for it already, and ends with no slash."""
    lines = [f"  {to_json(key)}: {to_json(value)}" for key, value in ({"model": name} | request.body).items()]
    body = shlex.quote("{\n" + ",\n".join(lines) + "\n}")
    return f"curl {address}{request.path} -H 'content-type: application/json' -d {body}"


def to_json(value: Any) -> str:
    """JSON on one line, people's letters as they are, without what would steer a terminal."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else json.dumps(letter)[1:-1] for letter in text)


def _prompt(example: Example) -> list[int]:
    """Up to the last answer, or where that is not trained, to the first that is."""
    if example.prompt_length:
        return example.prompt
    first = next(place for place, label in enumerate(example.labels) if label != UNTRAINED)
    return example.input_ids[:first]
