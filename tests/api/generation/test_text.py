"""Incremental decoding, stop strings and prompts: pieces of text always join to the whole text."""

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from server.errors import InvalidRequest
from server.text.codec import Codec
from server.text.conversation import Conversation
from server.text.detokenizer import Detokenizer
from server.text.stop_strings import StopStrings
from tests.encoding import encode_chat
from tests.tiny import VOCABULARY, tiny_tokenizer

CODEC = Codec(tiny_tokenizer(), VOCABULARY)
IM_START, IM_END = 257, 258


def byte_fallback() -> Codec:
    """A tokenizer like Llama 2's: words with a leading mark, and byte fallback."""
    words = {"<unk>": 0, "▁Hello": 1, "▁world": 2, "▁": 3, "!": 4}
    vocabulary = {**words, **{f"<0x{byte:02X}>": byte + len(words) for byte in range(256)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Codec(PreTrainedTokenizerFast(tokenizer_object=tokenizer), len(vocabulary))


def pieces(codec: Codec, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(codec)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


def whole(codec: Codec, ids: list[int]) -> str:
    return codec.backend.decode(ids, skip_special_tokens=True)


@given(st.lists(st.integers(0, VOCABULARY - 1), max_size=200))
def test_pieces_join_to_the_text_of_all_tokens(ids: list[int]) -> None:
    assert "".join(pieces(CODEC, ids)) == whole(CODEC, ids)


@given(st.text(max_size=80))
def test_pieces_end_with_complete_characters(text: str) -> None:
    """Each character is returned with its last byte, and never in part."""
    assume(
        "<|im_" not in text
    )  # hypothesis also tries words that the code has: a special token's text is its token here
    got = pieces(CODEC, CODEC.encode_prompt(text) if text else [])
    assert "".join(got) == text
    assert all("\ufffd" not in piece for piece in got) or "\ufffd" in text
    assert got[-1] == "" or text.endswith("\ufffd")


@given(st.lists(st.sampled_from([0x80, 0x9F, 0x98, 0xF0, 0xC3, 0xA9, 0x41]), min_size=100, max_size=400))
def test_invalid_bytes_are_not_held_back_for_ever(data: list[int]) -> None:
    symbols = [CODEC.backend.token_to_id(symbol) for symbol in map(_symbol, data)]
    got = pieces(CODEC, symbols)
    assert "".join(got) == whole(CODEC, symbols)
    assert len(got[-1]) <= 3


def _symbol(byte: int) -> str:
    """The byte's character in byte-level BPE: printable Latin-1 maps to itself, all else to code points above 255."""
    moved = [b for b in range(256) if not (33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255)]
    return chr(256 + moved.index(byte)) if byte in moved else chr(byte)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 2, 4], ["Hello", " world", "!", ""]),
        ([1, 3, 5 + 0xF0, 5 + 0x9F, 5 + 0x98, 5 + 0x80, 4], ["Hello", " ", "", "", "", "😀", "!", ""]),
        ([1, 5 + 0xC3, 4], ["Hello", "", "\ufffd!", ""]),
    ],
)
def test_byte_fallback_and_leading_spaces(ids: list[int], expected: list[str]) -> None:
    codec = byte_fallback()
    assert pieces(codec, ids) == expected
    assert "".join(expected) == whole(codec, ids)


def test_special_tokens_have_no_text() -> None:
    assert pieces(CODEC, [IM_START, *CODEC.encode_prompt("hi"), IM_END, VOCABULARY - 1])[1:3] == ["h", "i"]


STOPS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)


@given(st.text("abc", max_size=30), STOPS, st.data())
def test_a_stop_string_ends_the_text_at_the_same_place_for_all_pieces(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    borders = [0, *cuts, len(text)]
    assert run_stops(stops, [text[a:b] for a, b in itertools.pairwise(borders)]) == reference(stops, text)


def run_stops(stops: list[str], parts: list[str]) -> tuple[str, bool]:
    strings = StopStrings(stops)
    shown = "".join([strings.push(part) for part in parts])
    return shown if strings.found else shown + strings.flush(), strings.found


def reference(stops: list[str], text: str) -> tuple[str, bool]:
    """The expected text: up to the longest stop string that ends at the first position where any ends."""
    for end in range(1, len(text) + 1):
        ending = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(ending)], True
    return text, False


def test_only_a_possible_beginning_of_a_stop_string_is_held_back() -> None:
    strings = StopStrings(["END", "stop"])
    assert [strings.push(piece) for piece in ["a s", "to", "E", "N", "d"]] == ["a ", "", "sto", "", "ENd"]


def test_chat_goes_through_the_template() -> None:
    ids = encode_chat(CODEC, Conversation([{"role": "user", "content": "hi"}]))
    assert CODEC.backend.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_that_rejects_messages_gives_invalid_request() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        encode_chat(Codec(tokenizer, VOCABULARY), Conversation([{"role": "user", "content": "hi"}]))


def test_without_a_template_there_is_no_chat() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(InvalidRequest, match="no chat template"):
        encode_chat(Codec(tokenizer, VOCABULARY), Conversation([{"role": "user", "content": "hi"}]))


@pytest.mark.parametrize("prompt", [[VOCABULARY], [-1], [10**30], [], ""])
def test_invalid_prompts(prompt: str | list[int]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        CODEC.encode_prompt(prompt)
    assert refused.value.param == "prompt"


def test_truncation_of_a_tokenizer_is_turned_off() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    assert len(Codec(tokenizer, VOCABULARY).encode_prompt("longer than four")) == 16


@pytest.mark.parametrize("kept", [frozenset(), frozenset({257, 258})])
def test_special_tokens_that_a_parser_needs_are_kept(kept: frozenset[int]) -> None:
    detokenizer = Detokenizer(CODEC, kept)
    accent, emoji = ids_of("é"), ids_of("😀")
    tokens = [*ids_of("a"), 257, *accent, 258, *emoji[:2], 257, *ids_of("b")]
    pieces = [detokenizer.push(token) for token in tokens]
    text = "".join(pieces) + detokenizer.flush()
    assert text == ("a<|im_start|>é<|im_end|>\ufffd<|im_start|>b" if kept else "aé\ufffdb")


def ids_of(text: str) -> list[int]:
    return CODEC.backend.encode(text, add_special_tokens=False).ids
