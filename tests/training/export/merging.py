"""A tokenizer that may merge the end of a prompt and the start of its answer into one token."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each letter and digit, and one for ``ab``; no text between turns."""
    letters = dict.fromkeys("abc" + "SayaworditMarmaladeZeppelin.Ġ0123456789")
    ids = {token: index for index, token in enumerate(["ab", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>")
    fast.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<e>{% endif %}{% endfor %}"
    )
    return fast
