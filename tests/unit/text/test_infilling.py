"""Prompts for the text between a prefix and a suffix."""

import pytest

from server.errors import InvalidRequest
from server.text.codec import Codec
from server.text.infilling import FORMATS, InfillingFormat
from tests.tiny import VOCABULARY, tiny_tokenizer


def codec(form: InfillingFormat) -> Codec:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([form.prefix, form.suffix, form.middle, *form.ends], special_tokens=True)
    return Codec(tokenizer, VOCABULARY + 8)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.prefix)
def test_prefix_suffix_middle(form: InfillingFormat) -> None:
    made = codec(form)
    ids = {text: made.backend.token_to_id(text) for text in (form.prefix, form.suffix, form.middle, *form.ends)}

    def text(prefix: str, suffix: str) -> list[int]:
        encoded = [made.backend.encode(each, add_special_tokens=False).ids for each in (prefix, suffix)]
        return [ids[form.prefix], *encoded[0], ids[form.suffix], *encoded[1], ids[form.middle]]

    for prefix, suffix in (("def f(", "):"), ("", " x"), ("é", "☺ y\n")):
        assert made.encode_infilling(prefix, suffix) == text(prefix, suffix)
    assert made.encode_infilling([1, 2], "a") == [ids[form.prefix], 1, 2, *text("", "a")[1:]]
    assert made.infilling is not None
    assert made.infilling.ends == set(ids.values())


def test_a_model_without_such_tokens_refuses() -> None:
    made = Codec(tiny_tokenizer(), VOCABULARY)
    with pytest.raises(InvalidRequest, match="no tokens for filling in the middle") as raised:
        made.encode_infilling("a", "b")
    assert (raised.value.param, raised.value.code) == ("suffix", "unsupported_parameter")
