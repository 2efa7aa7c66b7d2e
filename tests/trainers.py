"""Names of the files that training tools save, and of foreign formats.

TRL's are those of a run of TRL 1.16 (SFTTrainer, LoRA, ``save_model``); transformers' and PEFT's own are made in
``test_trainers.py``; the others are written down from what the tools save.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from adapters.format.files import CONFIG, FILES, ORIGIN, WEIGHTS

TOKENIZER = ("chat_template.jinja", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")
STATE = ("optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin")
ADAPTER = ("README.md", CONFIG, WEIGHTS)


def under(folder: str, *names: str) -> tuple[str, ...]:
    """Return the names with ``folder`` in front."""
    return tuple(f"{folder}/{name}" for name in names)


@dataclass(frozen=True)
class Output:
    """The files that a tool saves in a folder."""

    files: tuple[str, ...]
    adapter: str = ""
    """The sub-folder of the adapter that must be selected."""
    others: tuple[str, ...] = ()
    """Sub-folders with other adapters."""

    def beside(self) -> tuple[str, ...]:
        """Return all files but the adapter's."""
        own = {f"{self.adapter}/{name}".removeprefix("/") for name in FILES}
        return tuple(name for name in self.files if name not in own)


TRAINERS: Mapping[str, Output] = {
    "trl": Output(
        (
            *ADAPTER, "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "training_args.bin",
            *under("checkpoint-2", *ADAPTER, "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", *STATE),
            *under("checkpoint-4", *ADAPTER, "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", *STATE),
        ),
        others=("checkpoint-2", "checkpoint-4"),
    ),
    "llama-factory": Output(
        (
            *ADAPTER, *TOKENIZER, "all_results.json", "eval_results.json", "train_results.json", "trainer_log.jsonl",
            "trainer_state.json", "training_args.bin", "training_args.yaml", "training_loss.png",
            "training_eval_loss.png", "llamaboard_config.yaml", "running_log.txt",
            *under("checkpoint-500", *ADAPTER, *TOKENIZER, *STATE),
        ),
        others=("checkpoint-500",),
    ),
    "axolotl": Output(
        (
            *ADAPTER, *TOKENIZER, "config.json", "debug.log", "tokens_state.json", "training_args.bin",
            "runs/Jan01_00-00-00_host/events.out.tfevents.1.host.1.0",
            *under("checkpoint-24", *ADAPTER, *TOKENIZER, "tokens_state.json", *STATE),
        ),
        others=("checkpoint-24",),
    ),
    "ms-swift": Output(
        (
            "args.json", "logging.jsonl", "val_dataset.jsonl", *under("images", "train_loss.png", "train_acc.png"),
            "runs/events.out.tfevents.1.host.1.0",
            *under("checkpoint-93", *ADAPTER, "additional_config.json", "args.json", *STATE),
        ),
        adapter="checkpoint-93",
    ),
    "torchtune": Output(
        (
            "torchtune_config.yaml", "logs/log_1.txt", "recipe_state/recipe_state.pt",
            *under("epoch_0", CONFIG, WEIGHTS, "adapter_model.pt", "config.json", "generation_config.json"),
            *under("epoch_0", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
            *under("epoch_0", "model.safetensors.index.json", "original/params.json", "original/tokenizer.model"),
        ),
        adapter="epoch_0",
    ),
    "unsloth": Output((*ADAPTER, *TOKENIZER, "added_tokens.json", "merges.txt", "vocab.json")),
    "manylora": Output((*ADAPTER, ORIGIN, "chat_template.jinja", "loss.png", "runs/events.out.tfevents.1.host.1.0")),
    "on a Mac": Output(
        (
            ".DS_Store", "legal/.DS_Store", *under("legal", *ADAPTER), *under("legal", f"._{CONFIG}", f"._{WEIGHTS}"),
            *under("__MACOSX/legal", f"._{CONFIG}", f"._{WEIGHTS}"),
        ),
        adapter="legal",
    ),
}  # fmt: skip

FORMATS: Mapping[str, tuple[tuple[str, ...], str, str]] = {
    "pickle": ((CONFIG, "adapter_model.bin", "training_args.bin"), "adapter_model.bin", "is a pickle"),
    "pickle beside another": ((CONFIG, "optimizer.pt", "lora.pt"), "lora.pt", "is a pickle"),
    "mlx-lm": (
        (CONFIG, "0000100_adapters.safetensors", "adapters.safetensors"),
        "0000100_adapters.safetensors",
        "mlx-lm",
    ),
    "old mlx": (("adapters.npz",), "adapters.npz", "mlx-lm"),
    "an archive in an archive": (("legal.tar.gz",), "legal.tar.gz", "unpack it first"),
    "gguf": (("legal-lora-f16.GGUF", "README.md"), "legal-lora-f16.GGUF", "llama.cpp's format (GGUF)"),
    "nemo": (("megatron_lora.nemo",), "megatron_lora.nemo", "NeMo"),
    "nemo unpacked": (("model_config.yaml", "model_weights.ckpt"), "model_weights.ckpt", "NeMo"),
    "nemo 2": (
        ("context/io.json", "context/model.yaml", "weights/__0_0.distcp", "weights/common.pt"),
        "context/io.json",
        "NeMo",
    ),
    "litgpt": (
        ("hyperparameters.yaml", "lit_model.pth.lora", "model_config.yaml", "tokenizer.json"),
        "lit_model.pth.lora",
        "LitGPT",
    ),
    "litgpt, merged": (("final/lit_model.pth",), "final/lit_model.pth", "LitGPT"),
    "torchtune": (("recipe_state.pt", "adapter_0.pt", "hf_model_0001_0.pt"), "adapter_0.pt", "torchtune's own format"),
    "whole model": (
        ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json"),
        "model-00001-of-00002.safetensors",
        "is a whole model, not an adapter: serve it as a base with --model",
    ),
    "whole pickled model": (("config.json", "pytorch_model.bin"), "pytorch_model.bin", "is a whole model"),
    "adapterhub": ((CONFIG, "pytorch_adapter.bin"), "pytorch_adapter.bin", "AdapterHub"),
    "diffusers": (("pytorch_lora_weights.safetensors",), "pytorch_lora_weights.safetensors", "diffusers"),
    "packed otherwise": (("legal.tar.bz2",), "legal.tar.bz2", "pack the adapter's folder as .tar.gz or .zip"),
    "only a run's state": (("optimizer.pt", "training_args.bin", "trainer_state.json"), CONFIG, "is missing"),
    "only a config": ((CONFIG, "README.md"), WEIGHTS, "is missing"),
    "unknown weights": ((CONFIG, "lora.safetensors"), WEIGHTS, "is missing"),
}
"""Format -> files, the file that the error names, and a part of its reason."""
