"""Model folders that cannot be served are refused before their weights are read, by serving and the doctor alike."""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from transformers import GPT2Config, MixtralConfig

from bases.base import load_base
from bases.errors import BaseRejected, ConfigError
from bases.model_source import ModelSource
from bases.preflight import check_source
from server.config import Settings
from server.doctor import examine, problems
from tests.tiny import CONTEXT, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen 2 in several files. Without tokenizer files, transformers invents a tokenizer."""
    folder = tmp_path_factory.mktemp("whole") / "tiny"
    tiny_model("qwen2").save_pretrained(folder, max_shard_size="50KB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "tiny")


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def edit(file: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def with_whole_weights(folder: Path, content: bytes, name: str = "model.safetensors") -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / name).write_bytes(content)


def as_another(folder: Path, config: MixtralConfig | GPT2Config) -> None:
    config.save_pretrained(folder)


def lead(folder: Path, name: str) -> None:
    edit(folder / "model.safetensors.index.json", lambda it: it["weight_map"].update({"lost.weight": name}))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tokenizer": (without_tokenizer, r"/tiny has no tokenizer: copy the model's tokenizer.json"),
    "empty tokenizer": (
        lambda folder: edit(folder / "tokenizer.json", lambda it: it["model"].update(vocab={}, merges=[])),
        r"/tiny cannot be served: its tokenizer has no vocabulary except special tokens",
    ),
    "no tokenizer in the file": (
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        "the tokenizer in .*/tiny cannot be read: ",
    ),
    "cut short": (
        lambda folder: cut(first_shard(folder)),
        r"/model-00001-of-0\d+.safetensors is damaged or incomplete \([\d,]+ bytes; .*: copy or download it again",
    ),
    "one byte": (
        lambda folder: with_whole_weights(folder, b"\0"),
        r"/model.safetensors is damaged or incomplete \(1 bytes; ",
    ),
    "git-lfs pointer": (
        lambda folder: with_whole_weights(folder, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "/model.safetensors is a Git LFS pointer, not the file: run `git lfs pull`",
    ),
    "lost shard": (
        lambda folder: first_shard(folder).unlink(),
        r"/tiny lacks model-00001-of-0\d+.safetensors, which model.safetensors.index.json names",
    ),
    "lost tensor": (
        lambda folder: edit(
            folder / "model.safetensors.index.json",
            lambda it: it["weight_map"].update({"lost.weight": first_shard(folder).name}),
        ),
        "/model-00001-of-.* lacks the tensors lost.weight, which model.safetensors.index.json says it has",
    ),
    "index is no JSON": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{"),
        "/model.safetensors.index.json cannot be read as JSON",
    ),
    "index without files": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}'),
        "/model.safetensors.index.json has no weight_map",
    ),
    "index without tensors": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
        "/model.safetensors.index.json has no weight_map",
    ),
    **{
        f"index that leads to {name[:20]!r}": (
            partial(lead, name=name),
            f"names {re.escape(repr(name[:80]))}, which is no",
        )
        for name in (
            "../../etc/passwd",
            "/etc/passwd",
            "shards/../../x.safetensors",
            "",
            ".",
            "a" * 5000,
            "\x1b[31m\ud800",
        )
    },
    "pickled": (
        lambda folder: with_whole_weights(folder, b"", "pytorch_model.bin"),
        r"/tiny has pickled weights only \(pytorch_model.bin\)",
    ),
    "GGUF": (lambda folder: with_whole_weights(folder, b"GGUF", "it.gguf"), "/tiny has a GGUF file, .*--model"),
    "no weights": (
        lambda folder: with_whole_weights(folder, b"", "model.txt"),
        "/tiny has no weights: neither model.safetensors nor model.safetensors.index.json",
    ),
    "config is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        "/tiny/config.json cannot be read as JSON",
    ),
    "config is no object": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "/config.json is not a JSON object",
    ),
    "config of no model": (lambda folder: (folder / "config.json").write_text("{}"), "has no model_type"),
    "config of an unknown model": (
        lambda folder: edit(folder / "config.json", lambda it: it.update(model_type="foo", auto_map={})),
        "has no models of type 'foo'; code that comes with a model is not run",
    ),
    "config with a field of another type": (
        lambda folder: edit(folder / "config.json", lambda it: it.update(num_hidden_layers="two")),
        "transformers cannot load .*/tiny: .*num_hidden_layers",
    ),
    "no context": (
        lambda folder: edit(folder / "config.json", lambda it: it.update(max_position_embeddings=0)),
        r"^tiny cannot be served: its config gives a context of 0 tokens \(max_position_embeddings\)$",
    ),
    "no layers": (
        lambda folder: edit(folder / "config.json", lambda it: it.update(num_hidden_layers=0, layer_types=[])),
        "^tiny cannot be served: it has no layers$",
    ),
    "Mixtral": (lambda folder: as_another(folder, MixtralConfig()), "^tiny cannot be served: mixtures of experts"),
    "GPT-2": (lambda folder: as_another(folder, GPT2Config()), r"^tiny cannot be served: .*\(Conv1D\)"),
    "quantised": (
        lambda folder: edit(
            folder / "config.json",
            lambda it: it.update(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ),
        "the weights of tiny are already quantised",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_serve_and_doctor_give_the_same_error(name: str, folder: Path, tmp_path: Path) -> None:
    damage, message = BROKEN[name]
    damage(folder)
    settings = Settings(model=str(folder), data_dir=tmp_path / "data", device="cpu")
    with pytest.raises(BaseRejected, match=message) as refused:
        load_base(settings.base)
    assert str(refused.value) in problems(settings)
    assert "\n" not in str(refused.value)


def test_doctor_finds_no_problem_in_a_complete_folder(folder: Path, tmp_path: Path) -> None:
    settings = Settings(model=str(folder), data_dir=tmp_path / "data", device="cpu")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    check_source(ModelSource("tiny", folder))
    assert not [problem for problem in problems(settings) if "tiny" in problem]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_serve_and_doctor_refuse_a_context_longer_than_the_models(folder: Path, tmp_path: Path) -> None:
    settings = Settings(model=str(folder), data_dir=tmp_path / "data", device="cpu", max_model_len=CONTEXT + 1)
    with pytest.raises(ConfigError, match="--max-model-len: must be at most") as refused:
        load_base(settings.base)
    assert str(refused.value) in problems(settings)


def test_doctor_does_not_wrap_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without line breaks, so that it can be copied, on a terminal of any width."""
    data = tmp_path / ("long " * 30) / "data"
    examine(Settings(model="/no/such", data_dir=data, device="cpu"))
    printed = capsys.readouterr().out
    assert f"  data          {data}\n" in printed
    assert "problem: --model: there is no folder or file '/no/such'" in printed
