"""PromptLookup: drafts the next tokens of a sequence from where its last tokens stood before, in prompt or answer.

Answers that quote, extract or rewrite their prompt repeat its tokens, and so does JSON with its own keys. The method is
prompt lookup decoding (Saxena 2023; transformers' ``prompt_lookup_num_tokens``, vLLM's ``ngram`` speculation). Earlier
places are found as LZ77 compressors find theirs: a table from two tokens to their last place, and from each place to
the one before it with the same two tokens.
"""

from collections.abc import Sequence as Seq
from typing import NamedTuple

MAX_PLACES = 8
"""Earlier places that are compared, the latest first."""
MAX_LENGTH = 8
"""Tokens by which places are compared; more would not make the next token any more certain."""


class Match(NamedTuple):
    """An earlier place with the same tokens as the end of the sequence."""

    next: int
    """Position of the token after it."""
    length: int
    """How many tokens are the same, 2 to MAX_LENGTH."""


class PromptLookup:
    """Finds the end of one sequence in what comes before it. For one thread."""

    def __init__(self, tokens: Seq[int]) -> None:
        """``tokens``: of the sequence. The same list grows afterwards."""
        self._tokens = tokens
        self._last: dict[int, int] = {}
        """Two tokens -> position of the second one, where they stood last."""
        self._before: list[int] = []
        """Position -> that of the place before it where the same two tokens stood; -1 if there is none."""

    def find(self) -> Match | None:
        """The earlier place with the most tokens in common, the latest of several; None without two in common."""
        self._extend()
        tokens = self._tokens
        end = len(tokens) - 1
        if end < 2:
            return None
        best, longest = -1, 1
        place = self._last.get(_pair(tokens[end - 1], tokens[end]), -1)
        for _ in range(MAX_PLACES):
            if place < 0 or longest == MAX_LENGTH:
                break
            length = 2
            while length < MAX_LENGTH and length <= place and tokens[place - length] == tokens[end - length]:
                length += 1
            if length > longest:
                best, longest = place, length
            place = self._before[place]
        return Match(best + 1, longest) if best >= 0 else None

    def draft(self, match: Match, count: int) -> tuple[int, ...]:
        """The ``count`` tokens that followed ``match``. Where the sequence ends before, its end goes on repeating."""
        period = len(self._tokens) - match.next
        followed = self._tokens[match.next : match.next + count]
        return tuple(followed[i % period] for i in range(count))

    def _extend(self) -> None:
        """Add the places up to the last token's, which is not an earlier one yet."""
        tokens, last, before = self._tokens, self._last, self._before
        if not before and len(tokens) > 1:
            before.append(-1)
        for at in range(len(before), len(tokens) - 1):
            pair = _pair(tokens[at - 1], tokens[at])
            before.append(last.get(pair, -1))
            last[pair] = at


def _pair(first: int, second: int) -> int:
    """One number for two token ids."""
    return first << 32 | second
