"""Fields of a request that ``/set`` and ``--set`` change. Their bounds are the server's, which says what is wrong."""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from adapters.cli.chat.speaker import BadInput

UNSET = "-"
"""Typed instead of a value: back to the server's default."""
FIELDS: Mapping[str, str] = {
    "temperature": "0 is greedy; up to 2",
    "top_p": "keep the most likely tokens that have this probability together",
    "top_k": "keep this many of the most likely tokens",
    "min_p": "keep tokens with this share of the most likely one's probability",
    "max_tokens": "longest answer",
    "min_tokens": "shortest answer",
    "seed": "the same seed gives the same answer",
    "stop": "texts that end an answer, as a text or a JSON list",
    "repetition_penalty": "above 1 repeats less",
    "presence_penalty": "above 0 repeats less",
    "frequency_penalty": "above 0 repeats less",
    "logit_bias": "token id to bias, as JSON",
    "ignore_eos": "true: go on after the end token",
    "reasoning_effort": "for models that reason: none, low, medium or high",
    "chat_template_kwargs": "further variables of the chat template, as JSON",
    "response_format": "as JSON, such as {\"type\": \"json_object\"}",
    "structured_outputs": "as JSON, such as {\"choice\": [\"yes\", \"no\"]}",
    "priority": "lower is earlier, among the requests of one key",
    "timeout": "seconds within which the answer must be complete",
    "speculation": "false drafts no tokens",
}  # fmt: skip
"""Field -> what it does."""
_TEXTS = frozenset({"stop", "reasoning_effort"})
"""Fields whose value may be a text without quotes."""


def parse_value(field: str, text: str) -> Any:
    """Return a field's value: JSON, or a plain text where the field takes one. Raises BadInput."""
    if field not in FIELDS:
        near = get_close_matches(field, FIELDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(FIELDS)}"
        raise BadInput(f"there is no setting {field!r}; {hint}")
    try:
        value = json.loads(text, parse_constant=_refuse)
    except ValueError:
        value = text if field in _TEXTS else None
    if value is None or (isinstance(value, str) and field not in _TEXTS):
        raise BadInput(f"{field}: {text!r} is no value for it ({FIELDS[field]}); {UNSET} unsets it")
    return value


def parse_setting(text: str) -> tuple[str, Any]:
    """Parse ``temperature=0.2``. Raises BadInput."""
    field, equals, value = text.partition("=")
    if not equals:
        raise BadInput(f"{text!r} is not NAME=VALUE, such as temperature=0.2")
    return field.strip(), parse_value(field.strip(), value.strip())


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
