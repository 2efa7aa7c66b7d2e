"""Adapter folders written without PEFT, in a millisecond each: valid ones, and one for each defect."""

import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapters.format.spec import AdapterSpec, BaseLayout
from adapters.store.store import AdapterStore

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ORIGIN = "manylora.json"
FINGERPRINT = "0" * 64

LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
"""Default layers of :func:`write_adapter`, all of the tiny Llama."""
DEMO_LAYOUT = BaseLayout("", {LAYERS[0]: (576, 576), LAYERS[1]: (1536, 576)})
"""Those layers of the demo model, whose shapes are all that :func:`write_adapter` needs to know."""
KEY_A = f"base_model.model.{LAYERS[0]}.lora_A.weight"
KEY_B = f"base_model.model.{LAYERS[0]}.lora_B.weight"
LAST_KEY = f"base_model.model.{LAYERS[1]}.lora_B.weight"


def layout_of(model: PreTrainedModel, fingerprint: str = FINGERPRINT) -> BaseLayout:
    """Return a model's layout: every linear layer but the output layer can carry LoRA."""
    linears: dict[str, tuple[int, int]] = {}
    unserved: dict[str, str] = {}
    for name, module in model.named_modules():
        if module is model.get_output_embeddings():
            unserved[name] = "LoRA on the output layer is not served"
        elif isinstance(module, nn.Embedding):
            unserved[name] = "LoRA on embeddings is not served"
        elif isinstance(module, nn.Linear):
            linears[name] = (module.in_features, module.out_features)
    return BaseLayout(fingerprint, linears, unserved)


def add(store: AdapterStore, folder: Path) -> AdapterSpec:
    """Store an adapter folder as a registration does; return its spec."""
    with store.stage() as staging:
        store.copy(folder, staging)
        spec = store.seal(staging)
        store.publish(staging, spec.id, record_bytes=store.new_record_bytes(staging, spec.id, ""))
    return spec


def write_adapter(
    folder: Path, layout: BaseLayout, *, seed: int = 0, rank: int = 4, layers: tuple[str, ...] = LAYERS, **config: Any
) -> Path:
    """Write a valid adapter with random weights, the same for the same arguments. Returns ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        inputs, outputs = layout.linears[layer]
        tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
        tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator)
    save_file(tensors, folder / WEIGHTS)
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(layers), **config}
    (folder / CONFIG).write_text(json.dumps(fields))
    return folder


def set_config(folder: Path, **fields: Any) -> None:
    """Change fields of ``adapter_config.json``."""
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def set_tensors(folder: Path, tensors: Mapping[str, Tensor | None]) -> None:
    """Replace, add or (None) remove tensors, by key."""
    path = folder / WEIGHTS
    changed = {**load_file(path), **tensors}
    save_file({key: tensor.contiguous() for key, tensor in changed.items() if tensor is not None}, path)


def set_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of the weights file and leave its data as it is."""
    path = folder / WEIGHTS
    header, data = split(path.read_bytes())
    entries = json.loads(header)
    change(entries)
    path.write_bytes(joined(json.dumps(entries).encode(), data))


def split(content: bytes) -> tuple[bytes, bytes]:
    """Split a safetensors file into header and data."""
    (length,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + length], content[8 + length :]


def joined(header: bytes, data: bytes) -> bytes:
    """Return a safetensors file of this header and data."""
    return struct.pack("<Q", len(header)) + header + data


@dataclass(frozen=True)
class Defect:
    """One way to break a folder from :func:`write_adapter`, and what the error must say."""

    spoil: Callable[[Path], object]
    reason: str
    file: str
    tensor: str | None = None


def _config(reason: str, **fields: Any) -> Defect:
    return Defect(lambda folder: set_config(folder, **fields), reason, CONFIG)


def _mismatch(reason: str, at: str, **fields: Any) -> Defect:
    """Return a defect in which the config does not match the tensors."""
    return Defect(lambda folder: set_config(folder, **fields), reason, WEIGHTS, at)


def _tensors(reason: str, tensors: Mapping[str, Tensor | None], at: str | None) -> Defect:
    return Defect(lambda folder: set_tensors(folder, tensors), reason, WEIGHTS, at)


def _foreign(reason: str, key: str) -> Defect:
    return _tensors(reason, {key: torch.ones(4, 64)}, key)


def _header(reason: str, change: Callable[[dict[str, Any]], None], at: str | None = None) -> Defect:
    return Defect(lambda folder: set_header(folder, change), reason, WEIGHTS, at)


def _bytes(reason: str, change: Callable[[bytes], bytes], file: str = WEIGHTS) -> Defect:
    return Defect(lambda folder: _rewrite(folder / file, change), reason, file)


def _rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def _replaced(name: str, make: Callable[[Path], object], reason: str) -> Defect:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return Defect(spoil, reason, name)


def _moved(key: str, begin: int, end: int) -> Callable[[dict[str, Any]], None]:
    def change(entries: dict[str, Any]) -> None:
        old_begin, old_end = entries[key]["data_offsets"]
        entries[key]["data_offsets"] = [old_begin + begin, old_end + end]

    return change


def _with(value: float, shape: tuple[int, int]) -> Tensor:
    tensor = torch.ones(shape)
    tensor[1, 2] = value
    return tensor


def _twice(content: bytes) -> bytes:
    header, data = split(content)
    return joined(header.rstrip()[:-1] + b"," + header[1:], data)


def _hole(content: bytes) -> bytes:
    header, data = split(content)
    entries = json.loads(header)
    for entry in entries.values():
        entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]
    return joined(json.dumps(entries).encode(), bytes(8) + data)


DEFECTS: dict[str, Defect] = {
    # methods and features that are not served
    "dora": _config("use_dora: DoRA", use_dora=True),
    "modules_to_save": _config("modules_to_save: fully trained modules", modules_to_save=["lm_head"]),
    "bias_unknown": _config("bias: must be none, all or lora_only (got 'some')", bias="some"),
    "lora_bias": _config("lora_bias: trained biases", lora_bias=True),
    "trained_tokens": _config("trainable_token_indices: trained tokens", trainable_token_indices=[0]),
    "target_parameters": _config("target_parameters: LoRA on bare parameters", target_parameters=["mlp.experts.w"]),
    "layer_replication": _config("layer_replication: layer replication", layer_replication=[[0, 1], [0, 1]]),
    "megatron": _config("megatron_config: Megatron", megatron_config={"tp": 2}),
    "merged_linear": _config("enable_lora: merged linear layers", enable_lora=[True, False, True]),
    "alora": _config("alora_invocation_tokens: activated LoRA", alora_invocation_tokens=[0]),
    "qalora": _config("use_qalora: QALoRA", use_qalora=True),
    "bdlora": _config("use_bdlora: block-diagonal", use_bdlora={"nblocks": 1}),
    "velora": _config("velora_config: VeLoRA", velora_config={"scale": 1.0}),
    "monteclora": _config("monteclora_config: Monteclora", monteclora_config={"num_samples": 8}),
    "arrow": _config("arrow_config: Arrow", arrow_config={"top_k": 3}),
    "kasa": _config("kasa_config: KaSA", kasa_config={"beta": 1.0}),
    "pissa": _config("init_lora_weights: 'pissa' changes the base", init_lora_weights="pissa"),
    "pissa_fast": _config("init_lora_weights: 'pissa_niter_4' changes", init_lora_weights="pissa_niter_4"),
    "olora": _config("init_lora_weights: 'olora' changes", init_lora_weights="olora"),
    "corda": _config("init_lora_weights: 'corda' changes", init_lora_weights="corda"),
    "loftq": _config("init_lora_weights: 'loftq' changes", init_lora_weights="loftq"),
    "lora_ga": _config("init_lora_weights: 'lora_ga' changes", init_lora_weights="lora_ga"),
    "unknown_init": _config("init_lora_weights: 'zigzag' is not known, and may change", init_lora_weights="zigzag"),
    "other_method": _config("the PEFT method 'IA3' is not served", peft_type="IA3"),
    "no_method": _config("peft_type is missing", peft_type=None),
    "unknown_field": _config("use_next_year: is not known", use_next_year=True),
    "many_unknown": _config("has 21 fields that no PEFT config has", **{f"field_{i}": i + 1 for i in range(21)}),
    "unknown_zero": _config("shift: is not known", shift=0.5),
    # invalid configs
    "r_zero": _config("r: Input should be greater than 0", r=0),
    "r_text": _config("r: Input should be a valid integer", r="4"),
    "r_missing": _replaced(CONFIG, lambda path: path.write_text('{"peft_type": "LORA"}'), "r: Field required"),
    "alpha_nan": _config("lora_alpha: Input should be", lora_alpha=float("nan")),
    "alpha_infinite": _config("lora_alpha: Input should be", lora_alpha=float("inf")),
    "alpha_zero": _config("lora_alpha: Input should be greater than 0", lora_alpha=0),
    "alpha_absurd": _config("lora_alpha: Input should be less than or equal to 65536", lora_alpha=1e9),
    "alpha_pattern_negative": _config("alpha_pattern: 'q_proj': must be above 0", alpha_pattern={"q_proj": -1}),
    "bad_pattern": _config("'(' is not a regular expression", rank_pattern={"(": 4}),
    "long_pattern": _config("has a pattern of 1001 characters", rank_pattern={"a" * 1001: 4}),
    "huge_pattern": _config("repeats too often", target_modules="(([a-z]{0,99}){99}){99,}"),
    "slow_pattern": _config("takes too long to match", target_modules=r"(.*.*)*.*.*.*.*.*.*.*.*.*.*.*(\d)\2"),
    "layers_with_pattern": _config("layers_to_transform needs", target_modules=".*q_proj", layers_to_transform=[0]),
    "layers_pattern_alone": _config("layers_pattern needs layers_to_transform", layers_pattern="layers"),
    "targets_nothing": _mismatch("target_modules does not name this layer", KEY_A, target_modules=["c_attn"]),
    "targets_output": _config("target_modules names lm_head: LoRA on the output", target_modules=["lm_head"]),
    "targets_embedding": _config("names model.embed_tokens: LoRA on embeddings", target_modules=["embed_tokens"]),
    "declared_missing": _config(
        f"target_modules names model.layers.1.self_attn.q_proj, but {WEIGHTS} has no weights for it",
        target_modules=["q_proj", LAYERS[1]],
        layers_to_transform=[0, 1],
    ),
    "not_declared": _mismatch("target_modules does not name this layer", KEY_A, target_modules=[LAYERS[1]]),
    "rank_disagrees": _mismatch(f"has rank 4, but 8 in {CONFIG}", KEY_A, r=8),
    "rank_pattern_disagrees": _mismatch(f"has rank 4, but 2 in {CONFIG}", KEY_A, rank_pattern={"q_proj": 2}),
    "config_text": _bytes("is not valid JSON", lambda content: content[:-1], CONFIG),
    "config_binary": _bytes("is not valid JSON", lambda content: b"\xff\xfe" + content, CONFIG),
    "config_list": _bytes("is not a JSON object", lambda content: b"[]", CONFIG),
    "config_deep": _bytes("is not valid JSON", lambda content: b"[" * 100_000, CONFIG),
    "config_twice": _bytes("the key 'r' occurs twice", lambda content: content[:-1] + b', "r": 4}', CONFIG),
    "config_large": _bytes("is larger than", lambda content: content + b" " * (5 << 20), CONFIG),
    # tensors
    "dora_tensor": _foreign("DoRA is not served", f"base_model.model.{LAYERS[0]}.lora_magnitude_vector"),
    "embedding_tensor": _foreign("LoRA on embeddings", "base_model.model.model.embed_tokens.lora_embedding_A"),
    "output_tensor": _foreign("LoRA on the output layer", "base_model.model.lm_head.lora_A.weight"),
    "bias_tensor": _foreign("trained biases", f"base_model.model.{LAYERS[0]}.lora_B.bias"),
    "base_bias_tensor": _foreign("trained biases", f"base_model.model.{LAYERS[0]}.bias"),
    "kasa_tensor": _foreign("is not a key of plain LoRA", f"base_model.model.{LAYERS[0]}.lora_diag"),
    "full_weight": _foreign("is a full weight", "base_model.model.lm_head.weight"),
    "no_prefix": _foreign("is not a key of plain LoRA", f"{LAYERS[0]}.lora_A.weight"),
    "unknown_layer": _foreign(
        "the base has no linear layer model.layers.9.mlp.up_proj",
        "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight",
    ),
    "a_alone": _tensors("lora_A comes without lora_B", {KEY_B: None}, KEY_A),
    "b_alone": _tensors("lora_B comes without lora_A", {KEY_A: None}, KEY_B),
    "a_twice": _tensors("is the same matrix as", {KEY_A.replace("lora_A", "lora_A.default"): torch.ones(4, 64)}, KEY_A),
    "a_shape": _tensors("has shape [4, 63], not [rank, 64]", {KEY_A: torch.ones(4, 63)}, KEY_A),
    "a_vector": _tensors("has shape [256], not [rank, 64]", {KEY_A: torch.ones(256)}, KEY_A),
    "b_shape": _tensors("has shape [63, 4], not [64, 4]", {KEY_B: torch.ones(63, 4)}, KEY_B),
    "b_rank": _tensors("has shape [64, 3], not [64, 4]", {KEY_B: torch.ones(64, 3)}, KEY_B),
    "rank_zero": _tensors(
        "has rank 0; 1 to 16 are served", {KEY_A: torch.ones(0, 64), KEY_B: torch.ones(64, 0)}, KEY_A
    ),
    "rank_large": _tensors(
        "has rank 17; 1 to 16 are served", {KEY_A: torch.ones(17, 64), KEY_B: torch.ones(64, 17)}, KEY_A
    ),
    "double": _tensors("has dtype F64, not F32", {KEY_A: torch.ones(4, 64, dtype=torch.float64)}, KEY_A),
    "integer": _tensors("has dtype I8, not F32", {KEY_B: torch.ones(64, 4, dtype=torch.int8)}, KEY_B),
    "nan": _tensors("has NaN in it", {KEY_A: _with(float("nan"), (4, 64))}, KEY_A),
    "infinity": _tensors("has infinity in it", {KEY_B: _with(float("-inf"), (64, 4))}, KEY_B),
    "overflow": _tensors("overflows once it is scaled by 2", {KEY_B: _with(3e38, (64, 4))}, KEY_B),
    "all_zero": _tensors(
        "changes nothing",
        {KEY_B: torch.zeros(64, 4), LAST_KEY: torch.zeros(64, 4)},
        None,
    ),
    # the weights file
    "empty": _bytes("is cut short", lambda content: b""),
    "cut_in_header": _bytes("is cut short", lambda content: content[:40]),
    "cut_in_data": _bytes("reaches past the end of the file", lambda content: content[:-4]),
    "header_giant": _bytes("header larger than 16 MiB", lambda content: joined(b" " * (17 << 20), b"")),
    "header_endless": _bytes("is cut short", lambda content: b"\xff" * 8 + content[8:]),
    "header_text": _bytes("is not valid JSON", lambda content: joined(b"{]", split(content)[1])),
    "header_list": _bytes("is not a JSON object", lambda content: joined(b"[]", split(content)[1])),
    "header_twice": _bytes("occurs twice", _twice),
    "long_name": _header(
        "has a tensor whose name has 501 characters", lambda entries: entries.update({"a" * 501: entries.pop(KEY_A)})
    ),
    "hole": _bytes("leaves a hole before it", _hole),
    "trailing": _bytes("has 3 bytes that belong to no tensor", lambda content: content + b"abc"),
    "past_the_end": _header("reaches past the end of the file", _moved(LAST_KEY, 1 << 20, 1 << 20), LAST_KEY),
    "overlap": _header("overlaps another tensor", _moved(KEY_B, -4, -4), KEY_B),
    "wrong_length": _header("do not fit F32 [4, 64]", _moved(KEY_A, 0, 4), KEY_A),
    "no_dtype": _header("is not {dtype, shape, data_offsets}", lambda entries: entries[KEY_A].pop("dtype"), KEY_A),
    "unknown_dtype": _header("unknown dtype 'F31'", lambda entries: entries[KEY_A].update(dtype="F31"), KEY_A),
    "negative_shape": _header(
        "not sensible whole numbers", lambda entries: entries[KEY_A].update(shape=[-4, -64]), KEY_A
    ),
    "boolean_shape": _header(
        "not sensible whole numbers", lambda entries: entries[KEY_A].update(shape=[True, 64]), KEY_A
    ),
    # the folder
    "no_config": Defect(lambda folder: (folder / CONFIG).unlink(), "is missing", CONFIG),
    "no_weights": Defect(lambda folder: (folder / WEIGHTS).unlink(), "is missing", WEIGHTS),
    "pickle": Defect(
        lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), "is a pickle", "adapter_model.bin"
    ),
    "weights_folder": _replaced(WEIGHTS, Path.mkdir, "is not a regular file"),
    "weights_fifo": _replaced(WEIGHTS, os.mkfifo, "is not a regular file"),
    "config_device": _replaced(CONFIG, lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
    "dangling": _replaced(CONFIG, lambda path: path.symlink_to("nowhere"), "is missing"),
    "other_base": Defect(
        lambda folder: (folder / ORIGIN).write_text(json.dumps({"base_fingerprint": "abc"})),
        f"the adapter was trained on the base abc, this base is {FINGERPRINT}",
        ORIGIN,
    ),
    "weights_changed": Defect(
        lambda folder: (folder / ORIGIN).write_text(json.dumps({"weights_sha256": "0" * 64})),
        f"not {'0' * 64} as {ORIGIN} says",
        WEIGHTS,
    ),
    "config_changed": Defect(
        lambda folder: (folder / ORIGIN).write_text(json.dumps({"adapter_config_sha256": "0" * 64})),
        f"not {'0' * 64} as {ORIGIN} says (adapter_config_sha256)",
        CONFIG,
    ),
    "weights_hash_number": Defect(
        lambda folder: (folder / ORIGIN).write_text('{"weights_sha256": 7}'), "weights_sha256 is not a string", ORIGIN
    ),
    "origin_number": Defect(
        lambda folder: (folder / ORIGIN).write_text('{"base_fingerprint": 7}'),
        "base_fingerprint is not a string",
        ORIGIN,
    ),
}
"""Name -> how to break a folder that :func:`write_adapter` wrote for the tiny Llama; the maximum rank is 16."""
