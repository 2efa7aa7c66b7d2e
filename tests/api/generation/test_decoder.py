"""PieceDecoder and TokenTexts: however tokens arrive, text and tokens of the pieces agree."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.generation.decoder import PieceDecoder, TextOptions
from server.api.generation.pieces import Finish, Piece, join
from server.engine.sequence import FinishReason, Token, TokenLogprobs
from server.text.codec import Codec
from tests.api.generation.test_text import byte_fallback
from tests.tiny import VOCABULARY, tiny_tokenizer

CODEC = Codec(tiny_tokenizer(), VOCABULARY)
A, B, C = CODEC.encode_prompt("abc")
END = 258


def decode(ids: list[int], cuts: list[int], options: TextOptions, finish: FinishReason = "length") -> list[Piece]:
    """Push tokens, the last of which ends the answer, and take a piece at each of ``cuts`` and at the end."""
    decoder = PieceDecoder(CODEC, options)
    pieces: list[Piece] = []
    for place, token in enumerate(ids):
        if place in cuts:
            pieces.append(decoder.take())
            if decoder.finish:
                return pieces
        last = place == len(ids) - 1
        decoder.push(Token("s", token, finish if last else None, logprobs=TokenLogprobs(-float(place), 1)))
    return [*pieces, decoder.take()]


def whole(ids: list[int]) -> str:
    return CODEC.backend.decode(ids, skip_special_tokens=True)


IDS = st.lists(st.integers(0, VOCABULARY - 1) | st.sampled_from([A, B, C]), min_size=1, max_size=60)
CUTS = st.lists(st.integers(0, 60), max_size=20)


@given(IDS, CUTS)
def test_pieces_have_all_text_and_all_tokens(ids: list[int], cuts: list[int]) -> None:
    answer = join(decode(ids, cuts, TextOptions()))
    assert answer.text == whole(ids)
    assert answer.tokens == ids
    assert [its.logprob for its in answer.logprobs] == [-place for place in range(len(ids))]
    assert (answer.finish, answer.hidden) == (Finish("length"), 0)


@given(IDS, CUTS, st.booleans(), st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=3))
def test_stop_strings_end_text_and_tokens_at_the_same_place(
    ids: list[int], cuts: list[int], include: bool, stops: list[str]
) -> None:
    options = TextOptions(tuple(stops), include_stop=include)
    once, pieces = join(decode(ids, [], options)), decode(ids, cuts, options)
    assert join(pieces) == once
    assert not any(piece.finish for piece in pieces[:-1])
    stop = once.finish.stop if once.finish else None
    assert list(once.tokens) == ids[: len(once.tokens)]
    if stop is None:
        assert (once.text, list(once.tokens)) == (whole(ids), ids)
        return
    assert isinstance(stop, str)
    assert once.text.endswith(stop) if include else not any(stop in once.text for stop in stops)
    shown = once.tokens[: len(once.tokens) - once.hidden]
    data = b"".join(CODEC.token_texts.data(token) for token in shown)
    assert data.decode(errors="replace").startswith(once.text)


def test_a_token_across_the_beginning_of_a_stop_string_is_shown() -> None:
    codec = byte_fallback()  # "▁world" is one token
    decoder = PieceDecoder(codec, TextOptions(("orld",)))
    for token in (1, 2):
        decoder.push(Token("s", token))
    assert decoder.take() == Piece("Hello w", [1, 2], [], 0, Finish("stop", "orld"))


def test_a_stop_token_is_hidden() -> None:
    ids = [A, END]
    assert join(decode(ids, [1], TextOptions(), "stop")) == Piece("a", ids, _logprobs(2), 1, Finish("stop"))
    own = TextOptions(stop_token_ids=frozenset({B}))
    assert join(decode([A, B], [1], own, "stop")) == Piece("a", [A, B], _logprobs(2), 1, Finish("stop", B))


def _logprobs(count: int) -> list[TokenLogprobs]:
    return [TokenLogprobs(-float(place), 1) for place in range(count)]


def test_tokens_of_text_that_may_be_a_stop_string_come_with_it() -> None:
    x, e, n, mark = ids = CODEC.encode_prompt("xEN!")
    pieces = decode(ids, [1, 2, 3], TextOptions(("END",)))
    assert [(piece.text, piece.tokens) for piece in pieces] == [("x", [x]), ("", []), ("", []), ("EN!", [e, n, mark])]


def test_tokens_after_the_end_are_dropped() -> None:
    decoder = PieceDecoder(CODEC, TextOptions(("b",)))
    for token in (A, B, C):
        decoder.push(Token("s", token))
    assert decoder.take() == Piece("a", [A, B], [], 1, Finish("stop", "b"))
    assert decoder.pushed == 2


def test_prompt_only() -> None:
    decoder = PieceDecoder(CODEC, TextOptions(prompt_only=True))
    decoder.push(Token("s", A, "length"))
    assert decoder.take() == Piece("", [], [], 0, Finish("length"))
    assert decoder.pushed == 0


@given(st.lists(st.integers(0, 255), max_size=60))
def test_bytes_of_tokens_are_those_of_the_text(ids: list[int]) -> None:
    joined = b"".join(CODEC.token_texts.data(token) for token in ids)
    assert joined.decode(errors="replace") == whole(ids)


@pytest.mark.parametrize(
    ("codec", "token", "expected"),
    [
        (CODEC, A, ("a", b"a")),
        (CODEC, END, ("<|im_end|>", b"")),
        (CODEC, VOCABULARY - 1, ("", b"")),
        (byte_fallback(), 2, (" world", b" world")),
        (byte_fallback(), 5 + 0xF0, ("bytes:\\xf0", b"\xf0")),
        (byte_fallback(), 5 + 0x41, ("A", b"A")),
    ],
)
def test_texts_of_tokens(codec: Codec, token: int, expected: Any) -> None:
    assert (codec.token_texts.text(token), codec.token_texts.data(token)) == expected
