"""Token ids and labels of training equal those of serving."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from server.text.codec import Codec
from server.text.conversation import Conversation as Prompt
from tests.encoding import encode_chat
from tests.tiny import CHAT_TEMPLATE, VOCABULARY, tiny_tokenizer
from tests.training.demo_base import demo_tokenizer
from tests.training.export.merging import merging_tokenizer
from tests.training.rows import chat
from training.data.conversation import Conversation, DataError, Turn
from training.data.rendering import UNTRAINED, Example, Renderer

TOKENIZER = tiny_tokenizer()
RENDERER = Renderer(TOKENIZER)
IM_END = 258
CALL = {"type": "function", "function": {"name": "clock"}}

FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ '' if message.role == 'assistant' and not loop.last else message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template that renders only the last answer, as some that drop earlier reasoning do."""
COUNTING = "{{ messages|length }}" + CHAT_TEMPLATE
"""A template whose prompt is never a prefix of the conversation."""
WITH_TOOLS = "{{ tools|tojson if tools else '' }}" + CHAT_TEMPLATE.replace(
    "message['content']", "(message.content or '') + (message.tool_calls|tojson if message.tool_calls else '')"
)
EOS_AFTER_ALL = CHAT_TEMPLATE.replace("{% endif %}", "{% else %}{{ '<|endoftext|>' }}{% endif %}")
"""Like Phi-3's: an EOS token after the last turn, which differs from the end of a turn."""


def trained_texts(example: Example, tokenizer: PreTrainedTokenizerBase = TOKENIZER) -> list[str]:
    """Return each run of trained tokens as text with special tokens."""
    runs: list[list[int]] = [[]]
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (UNTRAINED, token)
        if label == UNTRAINED:
            runs.append([])
        else:
            runs[-1].append(token)
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs if run]


def served(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[int]:
    """Return the server's prompt for the turns before the last."""
    vocabulary = len(tokenizer)
    messages = [{"role": turn.role, "content": turn.content} for turn in conversation.turns[:-1]]
    return encode_chat(Codec(tokenizer, vocabulary), Prompt(messages))


def test_answers_are_trained_with_their_end() -> None:
    example = RENDERER.render(chat("Hi", "Hello", "How?", "So."))
    assert trained_texts(example) == ["Hello<|im_end|>", "So.<|im_end|>"]
    assert example.answer == "So."
    assert TOKENIZER.decode(example.input_ids[example.prompt_length :]) == "So.<|im_end|>\n"


def test_a_turn_of_weight_0_is_not_trained() -> None:
    assert trained_texts(RENDERER.render(chat("Hi", "Hello", "How?", "So.", untrained=(1,)))) == ["So.<|im_end|>"]
    assert trained_texts(RENDERER.render(chat("Hi", "Hello", "How?", "So.", untrained=(3,)))) == ["Hello<|im_end|>"]


@given(st.lists(st.text(min_size=1, max_size=20).filter(str.strip), min_size=1, max_size=3))
def test_any_conversation_is_tokenized_as_in_serving(said: list[str]) -> None:
    conversation = chat(*(text for word in said for text in ("Question?", word)))
    example = RENDERER.render(conversation)
    assert example.prompt == served(TOKENIZER, conversation)
    assert trained_texts(example) == [f"{word}<|im_end|>" for word in said]


def test_a_tool_call_is_an_answer_as_the_template_writes_it() -> None:
    """Otherwise the right answer of a call without content would be empty."""
    calls = [{"type": "function", "function": {"name": "clock", "arguments": {"zone": "utc"}}}]
    turns = (Turn("user", "What time is it?"), Turn("assistant", "", trained=True, more={"tool_calls": calls}))
    example = Renderer(TOKENIZER, WITH_TOOLS).render(Conversation("a:1", turns, tools=[CALL]))
    assert json.loads(example.answer) == calls
    assert trained_texts(example) == [f"{example.answer}<|im_end|>"]


def test_answer_is_the_last_turn_if_trained() -> None:
    example = RENDERER.render(chat("Hi", "Hello", "How?", "So.", untrained=(3,)))
    assert (example.prompt, example.answer) == ([], "")


def test_rendering_a_batch_equals_rendering_each_row() -> None:
    rows = [
        chat("Hi", "Hello"),
        Conversation("a:1", prompt="2+2=", text="4"),
        Conversation("a:2", text="Once."),
        chat("A", "B", "C", "D"),
    ]
    assert RENDERER.render_all(rows) == [RENDERER.render(row) for row in rows]


def test_completions_are_trained_after_the_servers_prompt() -> None:
    example = RENDERER.render(Conversation("a:1", prompt="2+2=", text=" 4"))
    assert example.prompt == Codec(TOKENIZER, VOCABULARY).encode_prompt("2+2=")
    assert trained_texts(example) == [" 4<|im_end|>"]
    assert example.answer == " 4"


def test_plain_text_is_trained_but_for_its_first_token() -> None:
    example = RENDERER.render(Conversation("a:1", text="Once."))
    assert trained_texts(example) == ["nce.<|im_end|>"]
    assert (example.prompt, example.answer) == ([], "")


def test_completion_is_not_merged_with_its_prompt() -> None:
    renderer = Renderer(merging_tokenizer())
    example = renderer.render(Conversation("a:1", prompt="ca", text="bc"))
    assert renderer.render(Conversation("a:1", text="cabc")).input_ids[:3] == [3, 0, 3], "they would melt"
    assert (example.prompt, example.input_ids[:4]) == ([3, 1], [3, 1, 2, 3])


def test_answer_that_merges_with_its_prompt_is_encoded_separately() -> None:
    renderer = Renderer(merging_tokenizer())
    example = renderer.render(chat("ca", "bc"))
    assert (example.prompt, example.answer) == ([3, 1], "bc")
    assert trained_texts(example, merging_tokenizer()) == ["bc<e>"]


def test_earlier_answer_that_merges_is_a_separate_example() -> None:
    """As history the server encodes it together with the text before it, into one token."""
    tokenizer = merging_tokenizer()
    renderer = Renderer(tokenizer)
    first, last = renderer.render_all([chat("ca", "bc", "a", "c")])
    assert (first.prompt, trained_texts(first, tokenizer)) == ([3, 1], ["bc<e>"])
    assert last.prompt == served(tokenizer, chat("ca", "bc", "a", "c"))
    assert 0 in last.prompt, "the token of a and b together"
    assert trained_texts(last, tokenizer) == ["c<e>"]
    assert first.row is not None
    assert [turn.content for turn in first.row.turns] == ["ca", "bc"]


def spaced(**special: bool) -> PreTrainedTokenizerFast:
    """As Llama 2's: it puts a space before a text's first word; two spaces are one token, and so is a space with c."""
    ids = {token: index for index, token in enumerate(["▁▁", "▁c", "▁", *"abcdefghilmnoprstuwyzMSZ.\n<>"])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[("▁", "▁"), ("▁", "c")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=AddedToken("<e>", **special))
    fast.chat_template = (
        "{% for m in messages %}{{ m.content + ('<e>' if m.role == 'assistant' else ' ') }}{% endfor %}"
    )
    return fast


@pytest.mark.parametrize(
    ("answer", "special", "tokens"), [("c", {}, ["c"]), (" a", {"rstrip": True}, ["▁", "a"])], ids=["first", "stripped"]
)
def test_separately_encoded_text_decodes_the_same(answer: str, special: dict[str, bool], tokens: list[str]) -> None:
    """No space is added before it, and its own leading spaces are kept."""
    tokenizer = spaced(**special)
    example = Renderer(tokenizer).render(chat("ab", answer))
    assert example.prompt == served(tokenizer, chat("ab", answer))
    assert tokenizer.convert_ids_to_tokens(example.input_ids) == ["▁", "a", "b", "▁", *tokens, "<e>"]


def test_template_whose_prompt_is_not_a_prefix() -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the prompt of turn 2 is not a prefix of the conversation"):
        Renderer(TOKENIZER, COUNTING).render(chat("Hi", "Hello"))


def test_a_template_that_leaves_earlier_answers_out() -> None:
    with pytest.raises(DataError, match="the chat template leaves out the assistant's text"):
        Renderer(TOKENIZER, FORGETFUL)


def test_a_template_that_ends_no_answer() -> None:
    with pytest.raises(DataError, match="does not end the assistant's turns with a special token"):
        Renderer(TOKENIZER, "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")


def test_template_that_raises() -> None:
    strict = "{% if messages[0].content == 'Hi' %}{{ raise_exception('say more') }}{% endif %}" + CHAT_TEMPLATE
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the chat template raised an error: say more"):
        Renderer(TOKENIZER, strict).render(chat("Hi", "Hello"))


def test_a_given_template_is_used_instead() -> None:
    conversation = chat("Hi", "Hello")
    own, given_ = RENDERER.render(conversation), Renderer(TOKENIZER, "Chat:" + CHAT_TEMPLATE).render(conversation)
    assert TOKENIZER.decode(given_.input_ids) == "Chat:" + TOKENIZER.decode(own.input_ids)
    assert TOKENIZER.chat_template == CHAT_TEMPLATE


def test_what_follows_the_end_of_the_last_turn_is_not_trained() -> None:
    renderer = Renderer(TOKENIZER, EOS_AFTER_ALL)
    assert renderer.end_of_turn == IM_END
    assert trained_texts(renderer.render(chat("A", "B", "C", "D"))) == ["B<|im_end|>", "D<|im_end|>"]


def test_an_end_of_turn_inside_an_answer_is_an_error() -> None:
    with pytest.raises(DataError, match=r"turn 2 has <\|im_end\|> in its text"):
        RENDERER.render(chat("Hi", "Hello<|im_end|>\n<|im_start|>user\nno"))


def test_tools_need_a_template_that_knows_them() -> None:
    calls = (Turn("user", "Time?"), Turn("assistant", "", trained=True, more={"tool_calls": [CALL]}))
    conversation = Conversation("a:1", (*calls, Turn("tool", "12"), Turn("assistant", "Noon.", trained=True)), [CALL])
    example = Renderer(TOKENIZER, WITH_TOOLS).render(conversation)
    assert [text[-10:] for text in trained_texts(example)] == ["<|im_end|>"] * 2
    assert "clock" in trained_texts(example)[0]
    with pytest.raises(DataError, match="a:1: the row has `tools`, which the chat template ignores"):
        RENDERER.render(Conversation("a:1", (Turn("user", "Hi"), Turn("assistant", "x", trained=True)), [CALL]))
    for template in (CHAT_TEMPLATE, CHAT_TEMPLATE.replace("message['content']", "(message.content or '')")):
        with pytest.raises(DataError, match="a:1: the row has `tool_calls`, which the chat template ignores"):
            Renderer(TOKENIZER, template).render(Conversation("a:1", conversation.turns))


def test_without_a_template_only_text_is_accepted() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    renderer = Renderer(tokenizer)
    assert renderer.end_of_turn is None
    assert renderer.render(Conversation("a:1", text="Once.")).trained == 5
    with pytest.raises(DataError, match="no chat template; give one with --chat-template"):
        renderer.render(chat("Hi", "Hello"))


def test_a_tokenizer_that_would_truncate_does_not() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    assert len(Renderer(tokenizer).render(Conversation("a:1", text="longer than four")).input_ids) == 17


def test_a_cut_example_has_no_answer_to_judge() -> None:
    example = RENDERER.render(chat("Hi", "Hello", "How?", "So."))
    half, none = example.cut(example.prompt_length + 1), example.cut(example.prompt_length)
    assert (half.prompt, half.answer, trained_texts(half)[-1]) == ([], "", "S")
    assert (none.prompt, none.answer, trained_texts(none)) == ([], "", ["Hello<|im_end|>"])
    assert example.cut(len(example.input_ids)) == example


@pytest.mark.demo
def test_the_demos_masks_to_the_token() -> None:
    """The pad token is the end of turn, which is still trained; the line break after it is not."""
    tokenizer = demo_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    conversation = chat("What is the capital of France?", "Paris.", "And of Italy?", '{"city": "Rome"}')
    example = Renderer(tokenizer).render(conversation)
    labelled = [
        (tokenizer.decode([token]), label != UNTRAINED)
        for token, label in zip(example.input_ids, example.labels, strict=True)
    ]
    first = labelled.index(("Paris", True))
    assert labelled[first - 4 : first + 5] == [
        ("<|im_start|>", False),
        ("ass", False),
        ("istant", False),
        ("\n", False),
        ("Paris", True),
        (".", True),
        ("<|im_end|>", True),
        ("\n", False),
        ("<|im_start|>", False),
    ]
    assert labelled[-2:] == [("<|im_end|>", True), ("\n", False)]
    assert trained_texts(example, tokenizer) == ["Paris.<|im_end|>", '{"city": "Rome"}<|im_end|>']


@pytest.mark.demo
@pytest.mark.parametrize("system", [None, "Answer in JSON."])
def test_the_demos_training_ids_are_its_serving_ids(system: str | None) -> None:
    """Also with the system turn that the template puts in front."""
    tokenizer = demo_tokenizer()
    given_ = () if system is None else (Turn("system", system),)
    turns = (
        *given_,
        *chat("Grüße aus 京都 🙂!", "So?", "1234  5", "  \tYes").turns[:-1],
        Turn("assistant", "Yes", True),
    )
    conversation = Conversation("a:1", turns)
    example = Renderer(tokenizer).render(conversation)
    assert example.prompt == served(tokenizer, conversation)
    assert ("SmolLM" in tokenizer.decode(example.input_ids)) == (system is None)


@pytest.mark.demo
@pytest.mark.parametrize("answer", ["\n\n\nHello", "    return 1\n", "\n", "\t\tx", " Hi"])
def test_the_demo_learns_answers_that_begin_with_white_space(answer: str) -> None:
    tokenizer = demo_tokenizer()
    conversation = chat("Hi", answer)
    example = Renderer(tokenizer).render(conversation)
    assert example.prompt == served(tokenizer, conversation)
    assert trained_texts(example, tokenizer) == [f"{answer}<|im_end|>"]


@pytest.mark.demo
def test_the_demo_learns_an_indented_answer_among_others() -> None:
    tokenizer = demo_tokenizer()
    conversation = chat("Indent it.", "\n\n    pass", "Again.", "\n\n    done", "Thanks.", "So.")
    examples = Renderer(tokenizer).render_all([conversation])
    for example, last in zip(examples, (1, 3, 5), strict=True):
        asked = Conversation("", conversation.turns[: last + 1])
        assert example.prompt == served(tokenizer, asked)
        assert trained_texts(example, tokenizer) == [f"{conversation.turns[last].content}<|im_end|>"]
