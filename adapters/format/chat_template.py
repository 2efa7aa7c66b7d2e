"""The chat template that trainers save with an adapter."""

from pathlib import Path

from adapters.errors import AdapterRejected
from adapters.format.files import TEMPLATE, TOKENIZER_CONFIG, chunks, open_file, present, read_json

MAX_TEMPLATE_BYTES = 256 << 10


def read_chat_template(folder: Path) -> object:
    """Return the chat template in an adapter's folder; None if there is none.

    That is the text of its own file, or else what the tokenizer's config has as ``chat_template``: text, or a list of
    templates with names. The template itself is not looked at. Raises :class:`AdapterRejected` for one that is not
    text in UTF-8 or too large, and for a config that is not JSON.
    """
    names = present(folder)
    if TEMPLATE in names:
        with open_file(folder, TEMPLATE) as file:
            data = b"".join(chunks(file, TEMPLATE, MAX_TEMPLATE_BYTES))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise AdapterRejected("is not text in UTF-8", file=TEMPLATE) from error
    if TOKENIZER_CONFIG not in names:
        return None
    value = read_json(folder, TOKENIZER_CONFIG).get("chat_template")
    if len(str(value)) > MAX_TEMPLATE_BYTES:
        raise AdapterRejected(f"chat_template has more than {MAX_TEMPLATE_BYTES} characters", file=TOKENIZER_CONFIG)
    return value
