"""A tokenizer whose tokens straddle the border between a prompt and its answer."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each letter and digit, but one for ``ab``. Its template puts nothing between turns."""
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
