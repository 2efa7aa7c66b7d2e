"""Chat templates: rendered as transformers does, and what the server finds out about them."""

from typing import Any

import pytest

from server.errors import InvalidRequest
from server.parsers.tool_formats import FORMATS, HERMES, LLAMA, MISTRAL, QWEN_XML
from server.text.chat_template import ChatTemplate, TemplateSources, TemplateTraits, find_sources
from server.text.codec import Codec
from server.text.conversation import Conversation
from server.text.template_environment import TemplateFailure, render
from tests.encoding import encode_chat
from tests.tiny import VOCABULARY, tiny_tokenizer
from tests.unit.text import chat_templates
from tests.unit.text.chat_templates import TEMPLATES

USER = {"role": "user", "content": "What is 1 + 2?"}
SYSTEM = {"role": "system", "content": " Be brief. "}
ASSISTANT = {"role": "assistant", "content": "It is 3."}
CALL = {"id": "abc123def", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "é"}}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "abc123def", "name": "add", "content": "3"}
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Add.", "parameters": {"type": "object", "properties": {}}},
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def template(name: str, **more: Any) -> ChatTemplate:
    """One of the test templates."""
    return ChatTemplate(TemplateSources(TEMPLATES[name]), render, SPECIAL, **more)


def rendered(name: str, messages: list[dict[str, Any]], **fields: Any) -> str:
    """A conversation, rendered."""
    return template(name).render(Conversation(messages, **fields))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("turns", [[USER], [SYSTEM, USER], [USER, ASSISTANT, USER]])
@pytest.mark.parametrize("prompt", [True, False])
def test_rendered_as_transformers_does(name: str, turns: list[dict[str, Any]], prompt: bool) -> None:
    if name in ("mistral", "gemma") and SYSTEM in turns:
        return
    parts = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    expected = tokenizer.apply_chat_template(
        parts if name == "parts" else turns, tokenize=False, add_generation_prompt=prompt
    )
    codec = Codec(tokenizer, VOCABULARY)
    assert codec.template is not None
    chat = Conversation(turns, add_generation_prompt=prompt)
    assert codec.template.render(chat) == expected
    assert encode_chat(codec, chat) == tokenizer.encode(expected, add_special_tokens=False)


@pytest.mark.parametrize("name", ["qwen", "qwen coder", "llama", "mistral"])
def test_tools_are_rendered_as_transformers_does(name: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    turns = [USER, CALLS | {"content": ""}, RESULT, ASSISTANT, USER]
    expected = tokenizer.apply_chat_template(turns, tools=[TOOL], tokenize=False, add_generation_prompt=True)
    codec = Codec(tokenizer, VOCABULARY)
    assert codec.template is not None
    assert codec.template.render(Conversation([USER, CALLS, RESULT, ASSISTANT, USER], [TOOL])) == expected
    assert '"a": 1, "b": "é"' in expected or "<parameter=b>\né\n" in expected


TRAITS = {
    "chatml": TemplateTraits(parts=False, system=True, tools=False, object_arguments=False),
    "qwen": TemplateTraits(parts=False, system=True, tools=True, object_arguments=True),
    "qwen coder": TemplateTraits(parts=False, system=True, tools=True, object_arguments=True),
    "llama": TemplateTraits(parts=False, system=True, tools=True, object_arguments=True),
    "mistral": TemplateTraits(parts=False, system=False, tools=True, object_arguments=True),
    "gemma": TemplateTraits(parts=False, system=False, tools=False, object_arguments=False),
    "phi": TemplateTraits(parts=False, system=True, tools=False, object_arguments=False),
    "deepseek": TemplateTraits(parts=False, system=False, tools=False, object_arguments=False),
    "parts": TemplateTraits(parts=True, system=True, tools=False, object_arguments=False),
    "text arguments": TemplateTraits(parts=False, system=True, tools=True, object_arguments=False),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_can_do(name: str) -> None:
    assert template(name).traits == TRAITS[name]
    template(name).check()


def test_how_calls_are_written() -> None:
    forms = {name: template(name).tool_format for name in TEMPLATES}
    assert forms["qwen"] == forms["chatml"] == forms["gemma"] == forms["phi"] == HERMES
    assert (forms["qwen coder"], forms["llama"], forms["mistral"]) == (QWEN_XML, LLAMA, MISTRAL)
    assert template("chatml", form=FORMATS["phi"]).tool_format == FORMATS["phi"]
    unknown = TEMPLATES["qwen"].replace("<tool_call>", "<call>")
    assert ChatTemplate(TemplateSources(unknown), render, SPECIAL).tool_format is None


def test_arguments_are_an_object_or_text_as_the_template_wants() -> None:
    assert '<tool_call>add:{"a": 1, "b": "é"}' in rendered("text arguments", [USER, CALLS, RESULT], tools=[TOOL])
    assert '"arguments": {"a": 1, "b": "é"}' in rendered("qwen", [USER, CALLS, RESULT], tools=[TOOL])


def test_calls_between_tags_are_written_as_text_where_the_template_knows_no_tools() -> None:
    chat = Conversation([USER, CALLS, RESULT], [TOOL])
    text = template("chatml", form=QWEN_XML).render(chat)
    call = "<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\né\n</parameter>\n</function>"
    assert f"<|im_start|>assistant\n<tool_call>\n{call}\n</tool_call><|im_end|>" in text
    assert "<function=<function name>>" in text


def test_a_template_without_tools_gets_them_as_text() -> None:
    text = rendered("chatml", [SYSTEM, USER, CALLS, RESULT, RESULT, ASSISTANT], tools=[TOOL])
    assert text.startswith("<|im_start|>system\n Be brief. \n\nYou may call functions")
    assert '"name": "add", "description": "Add."' in text
    assert '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "é"}}\n</tool_call>' in text
    result = "<tool_response>\n3\n</tool_response>"
    assert f"<|im_start|>user\n{result}\n{result}<|im_end|>" in text, "consecutive results are one turn"
    assert "You may call" not in rendered("chatml", [USER, CALLS, RESULT]), "calls without tools"
    assert "You help" not in text
    assert text.count("<|im_start|>system") == 1


def test_tools_of_a_template_without_system_message_are_in_the_first_of_the_user() -> None:
    text = rendered("gemma", [USER], tools=[TOOL])
    assert text.startswith("<s><start_of_turn>user\nYou may call functions")
    assert text.endswith("What is 1 + 2?<end_of_turn>\n<start_of_turn>model\n")


def test_a_refusal_of_the_template_is_the_requests_error() -> None:
    for name, turns, reason in (
        ("gemma", [SYSTEM, USER], "System role not supported"),
        ("gemma", [USER, USER], "must alternate"),
        ("llama", [USER, CALLS | {"tool_calls": [CALL, CALL]}], "single tool-calls"),
    ):
        with pytest.raises(InvalidRequest, match=reason):
            rendered(name, turns)


def test_developer_is_system_unless_the_template_knows_it() -> None:
    developer = SYSTEM | {"role": "developer"}
    assert rendered("chatml", [developer, USER]) == rendered("chatml", [SYSTEM, USER])
    knows = ChatTemplate(TemplateSources("{% if messages[0].role == 'developer' %}yes{% endif %}"), render, {})
    assert knows.render(Conversation([developer])) == "yes"


def test_reasoning_effort_reaches_templates_that_know_it() -> None:
    effort = ChatTemplate(TemplateSources(chat_templates.REASONING_EFFORT), render, {})
    assert effort.render(Conversation([USER], reasoning_effort="high")).endswith("[effort=high]")
    assert effort.render(Conversation([USER])).endswith("[effort=medium]")
    assert rendered("qwen", [USER], reasoning_effort="none").endswith("<think>\n\n</think>\n\n")
    assert rendered("qwen", [USER], reasoning_effort="low") == rendered("qwen", [USER])
    assert rendered("chatml", [USER], reasoning_effort="none") == rendered("chatml", [USER])
    with pytest.raises(InvalidRequest, match="no `reasoning_effort`") as caught:
        rendered("chatml", [USER], reasoning_effort="low")
    assert caught.value.param == "reasoning_effort"


def test_chat_template_kwargs_are_variables_of_the_template() -> None:
    assert rendered("qwen", [USER], variables={"enable_thinking": False}).endswith("<think>\n\n</think>\n\n")
    assert "Today: 1 May" in rendered("llama", [USER], variables={"date_string": "1 May"})
    for name in ("messages", "chat_template", "bos_token"):
        with pytest.raises(InvalidRequest, match=f"may not set `{name}`"):
            rendered("qwen", [USER], variables={name: "x"})


def test_documents_are_given_to_the_template() -> None:
    source = "{% for document in documents or [] %}{{ document.title }}:{{ document.text }};{% endfor %}"
    documents = [{"title": "a", "text": "b"}]
    chat = ChatTemplate(TemplateSources(source), render, {})
    assert chat.render(Conversation([USER], documents=documents)) == "a:b;"
    assert chat.render(Conversation([USER])) == ""


@pytest.mark.parametrize("name", ["chatml", "qwen", "llama", "gemma", "parts"])
def test_the_last_message_is_continued(name: str) -> None:
    begun = {"role": "assistant", "content": "It is"}
    text = rendered(name, [USER, begun], add_generation_prompt=False, continue_final_message=True)
    whole = rendered(name, [USER, begun], add_generation_prompt=False)
    assert text.endswith("It is")
    assert whole.startswith(text)
    assert text != whole
    with pytest.raises(InvalidRequest, match="leaves out the last message"):
        rendered("mistral", [USER, CALLS], continue_final_message=True)


def test_reasoning_is_opened_by_the_prompt_or_the_answer() -> None:
    assert template("deepseek").reasoning == template("qwen").reasoning
    assert template("deepseek").reasoning is not None
    assert template("chatml").reasoning is None
    assert rendered("deepseek", [USER]).endswith("<think>\n")


def test_reasoning_of_a_message_reaches_the_template() -> None:
    text = rendered("qwen", [USER, ASSISTANT | {"reasoning_content": "I add."}], add_generation_prompt=False)
    assert text.endswith("<think>\nI add.\n</think>\n\nIt is 3.<|im_end|>\n")


def test_named_templates() -> None:
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "{{ tools[0].function.name }}"}]
    sources = find_sources(named)
    assert sources == find_sources({each["name"]: each["template"] for each in named})
    assert sources is not None
    assert find_sources([]) is None
    assert find_sources(None) is None
    chat = ChatTemplate(sources, render, {})
    assert chat.render(Conversation([USER])) == "a"


def test_a_template_that_does_not_compile() -> None:
    with pytest.raises(TemplateFailure, match="Unexpected end of template"):
        ChatTemplate(TemplateSources("{% if x %}"), render, {}).check()
