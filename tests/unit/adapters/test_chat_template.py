"""The chat template in an adapter's files: read, limited, and part of the content."""

import json
from pathlib import Path

import pytest

from adapters.errors import AdapterRejected
from adapters.format.chat_template import MAX_TEMPLATE_BYTES, read_chat_template
from adapters.format.content import content_id
from adapters.format.files import TEMPLATE, TOKENIZER_CONFIG
from adapters.store.store import AdapterStore
from tests.adapter_folders import layout_of, write_adapter
from tests.tiny import tiny_model

LAYOUT = layout_of(tiny_model())
TEXT = "{{ messages[0].content }} é"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter without a template."""
    return write_adapter(tmp_path / "adapter", LAYOUT)


def write_config(folder: Path, **fields: object) -> None:
    """Write a tokenizer's config."""
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(fields))


def test_own_file_or_the_tokenizers_config(folder: Path) -> None:
    assert read_chat_template(folder) is None
    write_config(folder, model_max_length=8)
    assert read_chat_template(folder) is None
    named = [{"name": "default", "template": TEXT}]
    write_config(folder, chat_template=named)
    assert read_chat_template(folder) == named
    write_config(folder, chat_template="older")
    assert read_chat_template(folder) == "older"
    (folder / TEMPLATE).write_text(TEXT)
    assert read_chat_template(folder) == TEXT


def test_what_cannot_be_a_template_is_refused(folder: Path) -> None:
    (folder / TOKENIZER_CONFIG).write_text("older")
    with pytest.raises(AdapterRejected, match=f"{TOKENIZER_CONFIG}: is not valid JSON"):
        read_chat_template(folder)
    write_config(folder, chat_template="a" * (MAX_TEMPLATE_BYTES + 1))
    with pytest.raises(AdapterRejected, match=f"{TOKENIZER_CONFIG}: chat_template has more than"):
        read_chat_template(folder)
    (folder / TEMPLATE).write_bytes(b"\xff")
    with pytest.raises(AdapterRejected, match=f"{TEMPLATE}: is not text in UTF-8"):
        read_chat_template(folder)
    (folder / TEMPLATE).write_bytes(b"a" * (MAX_TEMPLATE_BYTES + 1))
    with pytest.raises(AdapterRejected, match=f"{TEMPLATE}: is larger than {MAX_TEMPLATE_BYTES} bytes"):
        read_chat_template(folder)


def test_the_template_is_part_of_the_content(folder: Path, tmp_path: Path) -> None:
    plain = content_id(folder)
    store = AdapterStore(tmp_path / "store", LAYOUT, 16)
    (folder / TEMPLATE).write_text(TEXT)
    with store.stage() as staging:
        store.copy(folder, staging)
        spec = store.seal(staging)
        store.publish(staging, spec.id)
    assert spec.id == content_id(folder) != plain
    assert store.chat_template(spec.id) == TEXT
    (folder / TEMPLATE).write_text("a" * (MAX_TEMPLATE_BYTES + 1))
    with store.stage() as staging:
        store.copy(folder, staging)
        with pytest.raises(AdapterRejected, match=f"{TEMPLATE}: is larger"):
            store.seal(staging)
