"""The demo model's tokenizer and plain weights, read once for all tests that ask."""

from functools import cache

from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from bases.model_source import demo_file


@cache
def demo_tokenizer() -> PreTrainedTokenizerBase:
    """Its pad and eos are one token, ``<|im_end|>`` (2); its template puts a system turn before all others."""
    file = demo_file()
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@cache
def demo_model() -> PreTrainedModel:
    """In float32, unquantised."""
    file = demo_file()
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype="float32"
    ).eval()
