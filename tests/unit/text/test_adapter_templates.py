"""Which chat template a request is rendered with: the adapter's own, the base's, or none for a mix that differs."""

from collections.abc import Iterator

import pytest

from adapters.errors import AdapterRejected
from adapters.format.spec import AdapterId
from server.errors import InvalidRequest
from server.text.adapter_templates import AdapterTemplates
from server.text.codec import Codec
from server.text.conversation import Conversation
from tests.tiny import CHAT_TEMPLATE, VOCABULARY, tiny_tokenizer

OWN = "{{ bos_token }}{{ messages[-1].content }}!"
CHAT = Conversation([{"role": "user", "content": "hi"}])
STORED: dict[str, object] = {
    "none": None,
    "same": CHAT_TEMPLATE,
    "own": OWN,
    "own too": OWN,
    "other": OWN + "!",
    "named": [{"name": "default", "template": OWN}],
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "syntax": "{% for %}",
    "refuses": "{{ raise_exception('only with a system message') }}",
}


@pytest.fixture
def reads() -> list[str]:
    """The adapters whose files were read."""
    return []


@pytest.fixture
def templates(reads: list[str]) -> Iterator[AdapterTemplates]:
    """Templates of the adapters in ``STORED``."""

    def read(adapter: AdapterId) -> object:
        reads.append(adapter)
        return STORED[adapter]

    templates = AdapterTemplates(Codec(tiny_tokenizer(), VOCABULARY), read)
    yield templates
    templates.close()


def ids(*names: str) -> dict[str, AdapterId]:
    """Adapters, whose names are their ids here."""
    return {name: AdapterId(name) for name in names}


def test_the_adapters_own_template_comes_before_the_bases(templates: AdapterTemplates) -> None:
    assert templates.choose(ids("own")).render(CHAT) == "<|endoftext|>hi!"
    assert templates.choose(ids("named")).render(CHAT) == "<|endoftext|>hi!"
    base = templates.choose({})
    assert base.render(CHAT).startswith("<|im_start|>user\nhi")
    assert templates.choose(ids("none")) is templates.choose(ids("same")) is base


def test_a_mix_needs_one_template(templates: AdapterTemplates) -> None:
    assert templates.choose(ids("own", "own too", "named")).render(CHAT) == "<|endoftext|>hi!"
    assert templates.choose(ids("none", "same")) is templates.choose({})
    for names in (("own", "other"), ("none", "own"), ("own", "same")):
        with pytest.raises(InvalidRequest, match=f"`{names[0]}` and `{names[1]}` have different chat temp") as caught:
            templates.choose(ids(*names))
        assert caught.value.param == "adapter"


def test_files_are_read_once(templates: AdapterTemplates, reads: list[str]) -> None:
    assert not templates.are_quick([AdapterId("none")])
    for _ in range(3):
        templates.choose(ids("none"))
        templates.choose(ids("own"))
    assert reads == ["none", "own"]
    assert templates.are_quick([AdapterId("none")])
    assert not templates.are_quick([AdapterId("own")]), "it is rendered in another process"


@pytest.mark.parametrize(("name", "reason"), [("loops", "longer than 0.5 s"), ("syntax", "Expected")])
def test_a_template_that_cannot_be_used_is_refused(templates: AdapterTemplates, name: str, reason: str) -> None:
    with pytest.raises(AdapterRejected, match=f"chat_template.jinja: is a chat .* cannot be used: .*{reason}"):
        templates.check(AdapterId(name))
    with pytest.raises(InvalidRequest, match="The chat template rejects"):
        templates.choose(ids(name)).render(CHAT)


@pytest.mark.parametrize("name", ["none", "same", "own", "named", "refuses"])
def test_templates_that_can_be_used(templates: AdapterTemplates, name: str) -> None:
    templates.check(AdapterId(name))
