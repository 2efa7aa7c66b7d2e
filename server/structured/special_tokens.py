"""Special tokens in llguidance's tokenizer: under names that nobody can guess.

What a grammar forces, such as a constant of a schema or the name of a function, llguidance encodes with the tokenizer,
which makes a special token of its text, ``<|im_end|>`` for one. The answer would then end there, or could not go on.
Under another name, it is text like all other text.
"""

import json
import re
import secrets
from collections.abc import Mapping

_REFERENCE = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|/(?:\\.|[^/\\\n])+/|(<[^<>\s\[\]]+>)')
"""In Lark's syntax: a string, a comment, a regular expression, or (the group) a token by its name."""


def renamed(tokenizer: str) -> tuple[str, dict[str, int]]:
    """Return a tokenizer's JSON with all special tokens renamed, and their ids by their own names."""
    description = json.loads(tokenizer)
    special = [token for token in description["added_tokens"] if token["special"]]
    ids = {token["content"]: token["id"] for token in special}
    nonce = secrets.token_hex(8)
    names = {text: f"<|{nonce}:{id_}|>" for text, id_ in ids.items()}
    for token in special:
        token["content"] = names[token["content"]]
    model = description["model"]
    vocabulary = model["vocab"]  # a token keeps its id only if it is renamed here, too
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(text, text): id_ for text, id_ in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    description["post_processor"] = None  # it may name special tokens, and llguidance does not use it
    return json.dumps(description), ids


def by_id(grammar: str, ids: Mapping[str, int]) -> str:
    """Return a grammar in Lark's syntax that refers to special tokens by their ids instead of their names."""
    return _REFERENCE.sub(lambda found: f"<[{ids[found[1]]}]>" if found[1] in ids else found[0], grammar)
