"""ControlTokens: keeps the text of special tokens in a user's content from becoming these tokens.

Such text in messages is marked before the template renders them. In the rendered text, what is not marked was written
by the template. It is replaced by aliases, names that nobody can guess; a copy of the tokenizer knows the special
tokens by their aliases only, so that marked text is text to it. Everything else is encoded as always, in one piece.
"""

import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

from tokenizers import Tokenizer

from server.errors import InvalidRequest
from server.text.conversation import Conversation, Message

NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDE0)]
"""Half of the code points that are no characters and never will be, for use inside one program."""


class Marks:
    """Two characters that do not occur in a conversation, to put around text."""

    def __init__(self, values: Iterable[Any]) -> None:
        """``values``: all that is to be marked. Raises InvalidRequest if all noncharacters occur in it."""
        text = json.dumps(list(values), ensure_ascii=True)
        free = [mark for mark in NONCHARACTERS if _escaped(mark) not in text]
        if len(free) < 2:
            raise InvalidRequest("The messages have too many of Unicode's noncharacters.", param="messages")
        self.begin, self.end = free[:2]

    def unescaped(self, text: str) -> str:
        """Return rendered text in which marks that a template wrote as JSON escapes are characters again."""
        return text.replace(_escaped(self.begin), self.begin).replace(_escaped(self.end), self.end)

    def removed(self, text: str) -> str:
        """Return rendered text without marks."""
        return self.unescaped(text).replace(self.begin, "").replace(self.end, "")


class ControlTokens:
    """The tokens of a tokenizer whose text must not be forged. Any thread may use it."""

    def __init__(self, backend: Tokenizer) -> None:
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        self._texts = {token.content: id_ for id_, token in added.items()}
        self._special = frozenset(token.content for token in added.values() if token.special)
        self._special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self._any = _alternatives(self._texts)

    def marked(self, chat: Conversation, template: str) -> tuple[Conversation, Marks | None]:
        """Return a conversation with marks around the text of control tokens; the same, and None, if it has none.

        These are special tokens, and other added tokens that the template writes, such as ``<tool_call>``. In messages
        of the assistant, only special tokens: clients that do not parse tool calls send back what it has written.
        """
        if not self.occur_in(chat, template):
            return chat, None
        special, control = self._patterns(template)
        rest = _besides_messages(chat)
        marks = Marks([list(chat.messages), rest])
        tools, documents, variables = mark(rest, control, marks)
        messages = [mark(each, special if _of_assistant(each) else control, marks) for each in chat.messages]
        return replace(chat, messages=messages, tools=tools, documents=documents, variables=variables), marks

    def occur_in(self, chat: Conversation, template: str) -> bool:
        """Whether text of control tokens is in a conversation. The first such one takes long to encode."""
        special, control = self._patterns(template)
        return contains(_besides_messages(chat), control) or any(
            contains(message, special if _of_assistant(message) else control) for message in chat.messages
        )

    @lru_cache(maxsize=64)  # noqa: B019 - as many templates as are in use; the tokenizer lives as long as the process
    def _patterns(self, template: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
        written = {text for text in self._texts if text in template}
        return _alternatives(self._special), _alternatives(self._special | written)

    def encode(self, text: str, marks: Marks) -> list[int]:
        """Return the token ids of a rendered conversation. Marked text becomes no special token, nor do single marks.

        Raises InvalidRequest if the tokenizer makes a special token of marked text all the same.
        """
        backend, aliases, ids = self._aliased
        begin, end = marks.begin, marks.end
        pattern = re.compile(f"{begin}({self._any.pattern}){end}|[{begin}{end}]|({self._any.pattern})")

        def aliased(found: re.Match[str]) -> str:
            return found[1] or (aliases[found[2]] if found[2] else "")

        encoded = backend.encode_batch([pattern.sub(aliased, marks.unescaped(text))], add_special_tokens=False)[0].ids
        if not self._special_ids.isdisjoint(token for token in encoded if token not in ids):
            raise InvalidRequest("This model's tokenizer cannot write special tokens as text.", param="messages")
        return [ids.get(token, token) for token in encoded]

    @cached_property
    def _aliased(self) -> tuple[Tokenizer, dict[str, str], dict[int, int]]:
        """A tokenizer without the added tokens but for aliases of them, text -> alias, and its ids -> ours."""
        nonce = secrets.token_hex(8)
        description = json.loads(self._backend.to_str())
        aliases = {text: f"\ufdee{nonce}:{id_}\ufdef" for text, id_ in self._texts.items()}
        for token in description["added_tokens"]:
            token.update(content=aliases[token["content"]], normalized=False)
        description["post_processor"] = None
        backend = Tokenizer.from_str(json.dumps(description))
        backend.no_truncation()
        backend.no_padding()
        found = {backend.token_to_id(alias): self._texts[text] for text, alias in aliases.items()}
        ids = {alias: token for alias, token in found.items() if alias is not None}
        return backend, aliases, ids


def _besides_messages(chat: Conversation) -> list[Any]:
    return [list(chat.tools), chat.documents, dict(chat.variables)]


def _of_assistant(message: Message) -> bool:
    return bool(message["role"] == "assistant")


def mark(value: Any, pattern: re.Pattern[str], marks: Marks) -> Any:
    """Return a JSON value with marks around all that ``pattern`` finds in its strings and keys."""
    if isinstance(value, str):
        return pattern.sub(f"{marks.begin}\\g<0>{marks.end}", value)
    if isinstance(value, dict):
        return {mark(key, pattern, marks): mark(each, pattern, marks) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [mark(each, pattern, marks) for each in value]
    return value


def contains(value: Any, pattern: re.Pattern[str]) -> bool:
    """Whether ``pattern`` occurs in a string or key of a JSON value."""
    if isinstance(value, str):
        return pattern.search(value) is not None
    if isinstance(value, dict):
        return any(contains(key, pattern) or contains(each, pattern) for key, each in value.items())
    return isinstance(value, list | tuple) and any(contains(each, pattern) for each in value)


def _alternatives(texts: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern for any of these texts, longer ones first."""
    return re.compile(
        "|".join(re.escape(text) for text in sorted(texts, key=lambda text: (-len(text), text))) or "(?!)"
    )


def _escaped(character: str) -> str:
    return json.dumps(character)[1:-1]
