"""Generates the Python program in the card that runs an adapter with transformers and PEFT, without a server."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bases.model_source import DEMO, DEMO_INSTALL, DEMO_PACKAGE, find_source, on_hub
from training.publish.sample_request import SampleRequest


def python_example(
    model: str, quantization: Mapping[str, Any], eos_token_ids: list[int], request: SampleRequest
) -> str:
    """Return the program, to be run in the adapter's folder.

    ``model`` is the value of ``--model``; a base on disk is named by its path. ``quantization`` is the manifest's.
    """
    nf4 = quantization["method"] != "none"
    dtype = f"torch.{quantization['compute_dtype' if nf4 else 'dtype']}"
    lines = [
        *_imports(model, nf4),
        "",
        *_base(model, nf4, dtype),
        'model = PeftModel.from_pretrained(model, ".").eval()',
        "",
    ]
    limit = f"max_new_tokens={request.body['max_tokens']}, do_sample=False, eos_token_id={eos_token_ids}"
    lines += [
        *_prompt(request),
        "ids = ids.to(model.device)",
        f"output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), {limit})",
        "print(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))",
    ]
    return "\n".join(lines)


def _imports(model: str, nf4: bool) -> Iterator[str]:
    gguf = _gguf(model) is not None
    if model == DEMO:
        yield "from importlib.metadata import files"
    if gguf:
        yield "from pathlib import Path"
    if gguf and nf4:
        yield "from tempfile import TemporaryDirectory"
    if gguf:
        yield ""
    yield "import torch"
    yield "from peft import PeftModel"
    classes = ["AutoModelForCausalLM", "AutoTokenizer", *(["BitsAndBytesConfig"] if nf4 else [])]
    yield f"from transformers import {', '.join([*classes, *(['GgufConfig'] if gguf else [])])}"


def _base(model: str, nf4: bool, dtype: str) -> Iterator[str]:
    """Yield the lines that load ``tokenizer`` and ``model`` exactly as the adapter was trained."""
    gguf = _gguf(model)
    if nf4:
        yield (
            'nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, '
            f"bnb_4bit_compute_dtype={dtype})"
        )
    if gguf is None:
        base = model if on_hub(model) else str(Path(model).expanduser().absolute())
        yield f"base = {base!r}"
        yield "tokenizer = AutoTokenizer.from_pretrained(base)"
        quantized = ", quantization_config=nf4" if nf4 else ""
        yield f"model = AutoModelForCausalLM.from_pretrained(base, dtype={dtype}{quantized})"
        return
    if model == DEMO:
        yield f"# {DEMO_INSTALL}"
        yield f'gguf = next(Path(file.locate()) for file in files("{DEMO_PACKAGE}") if file.suffix == ".gguf")'
    else:
        yield f"gguf = Path({str(gguf)!r})"
    yield "tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)"
    yield "plain = GgufConfig(dequantize=True)"
    yield (
        "model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, quantization_config=plain, "
        f"dtype={dtype})"
    )
    if nf4:
        yield "with TemporaryDirectory() as folder:"
        yield "    model.save_pretrained(folder)"
        yield f"    model = AutoModelForCausalLM.from_pretrained(folder, dtype={dtype}, quantization_config=nf4)"


def _gguf(model: str) -> Path | None:
    """Return the GGUF file that a base is read from, or None."""
    if on_hub(model):
        return None
    source = find_source(model)
    return source.path if source.gguf else None


def _prompt(request: SampleRequest) -> Iterator[str]:
    """Yield the lines that set ``ids``, int64 [1, tokens]."""
    if "messages" in request.body:
        yield "messages = ["
        yield from (f"    {message!r}," for message in request.body["messages"])
        yield "]"
        yield (
            "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, "
            'return_tensors="pt")'
        )
        yield 'ids = prompt["input_ids"]'
    elif isinstance(request.body["prompt"], str):
        yield f'ids = tokenizer({request.body["prompt"]!r}, return_tensors="pt")["input_ids"]'
    else:
        yield f"ids = torch.tensor([{request.body['prompt']}])"
