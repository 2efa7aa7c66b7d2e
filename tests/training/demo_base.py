"""The demo model's tokenizer and unquantised weights, read once per session."""

from functools import cache

from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from bases.model_source import demo_file


@cache
def demo_tokenizer() -> PreTrainedTokenizerBase:
    """Return the tokenizer. Pad and EOS are ``<|im_end|>`` (2); the template puts a system turn in front."""
    file = demo_file()
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@cache
def demo_model() -> PreTrainedModel:
    """Return the unquantised model in float32."""
    file = demo_file()
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype="float32"
    ).eval()
