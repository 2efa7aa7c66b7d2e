"""The log probabilities of an answer's content: those of its tokens, and of no others."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.formats.logprobs import ContentLogprobs
from server.engine.sequence import TokenLogprobs
from server.parsers.answers import AnswerSyntax
from server.parsers.deltas import ContentDelta, Delta
from server.parsers.reasoning import MARKERS
from server.parsers.tool_formats import HERMES, MISTRAL
from server.text.codec import Codec
from server.text.detokenizer import Detokenizer
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TOKENIZER.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
CODEC = Codec(TOKENIZER, 264)
CALL = '{"name": "add", "arguments": {"a": "é"}}'
NAMES: dict[str, dict[str, object]] = {"add": {}}
ANSWERS = {
    "plain": (AnswerSyntax(), "Hé 😀.", "Hé 😀."),
    "thought": (AnswerSyntax(reasoning=MARKERS[0]), "<think>\nth é</think>\n\nthink", "think"),
    "opened": (AnswerSyntax(reasoning=MARKERS[0], opened=True), "th</think>th", "th"),
    "none": (AnswerSyntax(reasoning=MARKERS[0]), "  th", "  th"),
    "call": (AnswerSyntax(tools=HERMES, functions=NAMES), f"A\n<tool_call>{CALL}</tool_call>\nadd é", "Aadd é"),
    "no call": (AnswerSyntax(tools=HERMES, functions=NAMES), "A <tool_call> é</tool", "A <tool_call> é</tool"),
    "all": (
        AnswerSyntax(MARKERS[0], tools=MISTRAL, functions=NAMES),
        f"<think>a</think>😀 b[TOOL_CALLS][{CALL}]c",
        "😀 bc",
    ),
}


@pytest.mark.parametrize("case", ANSWERS)
@given(cuts=st.lists(st.integers(0, 120), max_size=8))
def test_the_tokens_of_content_are_its_text(case: str, cuts: list[int]) -> None:
    syntax, text, content = ANSWERS[case]
    kept, tokens = CODEC.special_ids(syntax.markers), TOKENIZER.encode(text, add_special_tokens=False)
    logprobs, parser = ContentLogprobs(0, CODEC.token_texts, kept), syntax.parser()
    detokenizer = Detokenizer(CODEC, kept)
    shown = ""

    def check(deltas: list[Delta]) -> str:
        texts = [delta for delta in deltas if isinstance(delta, ContentDelta)]
        for delta in texts:
            data = b"".join(bytes(entry["bytes"]) for entry in logprobs.take(delta))
            assert data.decode() == delta.text
        return "".join(delta.text for delta in texts)

    for begin, end in pairwise([0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]):
        piece = tokens[begin:end]
        logprobs.push(piece, [TokenLogprobs(-1.0, 1) for _ in piece])
        shown += check(parser.push("".join([detokenizer.push(token) for token in piece])))
    assert shown + check(parser.finish()) == content
