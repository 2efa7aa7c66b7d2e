"""The card, the plot, and a manifest that does not depend on where it was made."""

import hashlib
import json
import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from transformers import PreTrainedTokenizerBase

from adapters.errors import AdapterRejected
from adapters.format.content import content_id
from adapters.format.verify import verify
from bases.base import Base
from tests.adapter_folders import set_config
from tests.tiny import CHAT_TEMPLATE, save_adapter, tiny_model, tiny_tokenizer
from tests.training.tiny_run import prepared, tiny_settings
from training.data.dataset import Dataset
from training.data.formats import recognise, to_conversation
from training.data.rendering import Renderer
from training.judge.judge import Judgement, SampleAnswers
from training.judge.scores import Scores
from training.publish.card import TWO_LOSSES, UsageExample, card, comparison, plot, shown_sample, transcript, write_card
from training.publish.manifest import manifest, recorded_settings, write_manifest
from training.publish.sample_request import SampleRequest, curl_command, sample_request, shortest_prompt
from training.settings import TrainSettings

JUDGEMENT = Judgement(
    base=Scores(2.5, 0.0, 0.25, 0.0, 0.0),
    adapter=Scores(0.125, 0.75, 1.0, 0.984, 0.75),
    divergence=0.031,
    rows=64,
    answered=64,
    general=12,
    failures=(),
)
HISTORY = [
    {"step": 1, "loss": 3.0, "learning_rate": 1e-4},
    {"step": 2, "loss": 2.0, "learning_rate": 2e-4},
    {"step": 2, "eval_loss": 2.2},
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("card")


@pytest.fixture(scope="module")
def ready(root: Path) -> tuple[TrainSettings, Base, Dataset]:
    settings = tiny_settings(root, publish="http://127.0.0.1:9", report_to="none")
    return settings, *prepared(settings)


def use(ready: tuple[TrainSettings, Base, Dataset]) -> UsageExample:
    settings, base, dataset = ready
    example = shortest_prompt(dataset.train)
    assert example is not None
    return UsageExample(settings.model, sorted(base.eos_token_ids), sample_request(example, 16, own_template=False))


def described(
    folder: Path, ready: tuple[TrainSettings, Base, Dataset], judgement: Judgement = JUDGEMENT
) -> dict[str, Any]:
    """Write a random adapter with card and manifest into ``folder``; return the manifest."""
    settings, base, dataset = ready
    save_adapter(tiny_model(), folder, 1, r=4, target_modules=["q_proj"])
    contents = manifest(settings, base, dataset, judgement, folder)
    write_card(folder, "tiny", contents, judgement, HISTORY, dataset.chat_template, use(ready))
    read: dict[str, Any] = json.loads((folder / "manylora.json").read_text())
    return read


def test_manifest_has_what_the_server_checks(tmp_path: Path, ready: tuple[TrainSettings, Base, Dataset]) -> None:
    found = described(tmp_path / "a", ready)
    base = ready[1]
    spec = verify(tmp_path / "a", base.layout, 64)
    assert spec.base_fingerprint == found["base_fingerprint"] == base.layout.fingerprint
    assert found["base_parts"] == base.layout.parts
    assert found["base_parts"]["quantization"] == "nf4 with double quantisation, float32"
    assert found["quantization"] == {"method": "nf4", "block_size": 64, "double": True, "compute_dtype": "float32"}
    assert found["data"]["sha256"] == ready[2].data_hash
    assert found["evaluation"]["adapter"]["json_validity"] == 0.984
    assert found["evaluation"]["passed"] is True


@pytest.mark.parametrize(
    ("field", "file"),
    [("weights_sha256", "adapter_model.safetensors"), ("adapter_config_sha256", "adapter_config.json")],
)
def test_file_hashes_are_of_the_bytes(
    field: str, file: str, tmp_path: Path, ready: tuple[TrainSettings, Base, Dataset]
) -> None:
    found = described(tmp_path / "a", ready)
    assert found[field] == hashlib.sha256((tmp_path / "a" / file).read_bytes()).hexdigest()


def test_a_config_that_was_changed_after_training_is_refused(
    tmp_path: Path, ready: tuple[TrainSettings, Base, Dataset]
) -> None:
    """Twice the scaling is another adapter, which was not judged."""
    folder, layout = tmp_path / "a", ready[1].layout
    found = described(folder, ready)
    set_config(folder, lora_alpha=64)
    with pytest.raises(AdapterRejected, match=r"adapter_config\.json: was changed.*adapter_config_sha256"):
        verify(folder, layout, 64)
    del found["adapter_config_sha256"]  # as in manifests of older releases, or after a deliberate change
    write_manifest(found, folder)
    assert verify(folder, layout, 64).base_fingerprint == layout.fingerprint


def test_the_same_training_elsewhere_is_the_same_content(
    tmp_path: Path, ready: tuple[TrainSettings, Base, Dataset]
) -> None:
    """It does not depend on folders, servers, names or time."""
    settings, base, dataset = ready
    described(tmp_path / "a", ready)
    moved = tiny_settings(
        Path(settings.data[0]).parent, name="other", out=tmp_path / "elsewhere", data_dir=tmp_path / "data", resume=True
    )
    described(tmp_path / "b", (moved, base, dataset))
    assert content_id(tmp_path / "a") == content_id(tmp_path / "b")
    assert "/" not in json.dumps(recorded_settings(settings))


def test_other_settings_are_another_content(tmp_path: Path, ready: tuple[TrainSettings, Base, Dataset]) -> None:
    settings, base, dataset = ready
    one = described(tmp_path / "a", ready)
    other = described(tmp_path / "b", (settings.model_copy(update={"seed": 1}), base, dataset))
    assert {key for key in one if one[key] != other[key]} == {"seed", "settings"}


def test_nan_is_null_in_json(tmp_path: Path, ready: tuple[TrainSettings, Base, Dataset]) -> None:
    judgement = replace(JUDGEMENT, divergence=math.nan, failures=("the adapter gives NaN on general prompts",))
    found = described(tmp_path / "a", ready, judgement)
    assert found["evaluation"]["divergence"] is None
    assert found["evaluation"]["passed"] is False


def test_the_card_has_front_matter_that_hubs_read(tmp_path: Path, ready: tuple[TrainSettings, Base, Dataset]) -> None:
    described(tmp_path / "a", ready)
    _, header, body = (tmp_path / "a" / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(header)
    assert "base_model" not in front, "a hub would link to it, and it is a folder"
    assert front["library_name"] == "peft"
    assert front["manylora"]["data_sha256"] == ready[2].data_hash
    assert front["manylora"]["results"]["exact_match"] == 0.75
    assert "| exact match | 0.0% | 75.0% |" in body
    assert "manylora adapters push . --name tiny" in body
    assert "It passed every threshold that was set: `max_loss_ratio` 1." in body
    assert TWO_LOSSES in body
    settings = yaml.safe_load(body.partition("```yaml\n")[2].partition("```")[0])
    assert settings["r"] == 4


def test_card_lists_missed_thresholds(tmp_path: Path, ready: tuple[TrainSettings, Base, Dataset]) -> None:
    contents = described(tmp_path / "a", ready)
    poor = replace(JUDGEMENT, failures=("exact match is low",))
    said = card("tiny", contents, poor, use(ready), today="2026-01-02")
    assert "**It failed the judgement:**\n\n- exact match is low" in said
    assert "on 2026-01-02." in said


def test_plot_is_a_png(tmp_path: Path, ready: tuple[TrainSettings, Base, Dataset]) -> None:
    described(tmp_path / "a", ready)
    assert (tmp_path / "a" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "![training and validation loss](loss.png)" in (tmp_path / "a" / "README.md").read_text()


def test_plot_legend_names_the_curves_and_covers_none() -> None:
    history = [{"step": step, "loss": 1.0 / step, "learning_rate": 0.1} for step in range(1, 5)]
    figure = plot(history)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["training, each step"]
    figure = plot([*history, {"step": 4, "eval_loss": 0.5}])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["training, each step", "held-out rows"]
    figure.draw_without_rendering()
    lowest = figure.legends[0].get_window_extent().y0
    assert all(axes.get_window_extent().y1 <= lowest for axes in figure.axes)


def test_chat_template_is_saved_with_the_adapter(tmp_path: Path, ready: tuple[TrainSettings, Base, Dataset]) -> None:
    settings, base, dataset = ready
    template = CHAT_TEMPLATE.replace("user", "customer")
    own = described(tmp_path / "own", ready)
    given = described(tmp_path / "given", (settings, base, replace(dataset, chat_template=template + " ")))
    assert not (tmp_path / "own" / "chat_template.jinja").exists()
    assert (tmp_path / "given" / "chat_template.jinja").read_text() == template + " "
    assert given["chat_template_sha256"] != own["chat_template_sha256"]


def test_only_what_was_measured_is_compared() -> None:
    plain = replace(JUDGEMENT, base=Scores(2.0, 0.0, 1.0), adapter=Scores(1.0, 0.5, 1.0))
    assert [what for what, *_ in comparison(plain)] == [
        "held-out loss, as saved",
        "exact match",
        "ends with an EOS token",
        "KL from the base, general prompts",
    ]
    nothing = replace(JUDGEMENT, base=Scores(), adapter=Scores(), rows=0, answered=0)
    assert comparison(nothing)[0] == ("held-out loss, as saved", "-", "-")


@pytest.mark.parametrize(
    ("model", "named"),
    [("demo", "HuggingFaceTB/SmolLM2-135M-Instruct"), ("owner/model", "owner/model"), (None, None)],
)
def test_front_matter_names_only_bases_on_a_hub(
    tmp_path: Path, ready: tuple[TrainSettings, Base, Dataset], model: str | None, named: str | None
) -> None:
    contents = described(tmp_path / "a", ready)
    contents["base"]["model"] = model
    header = card("tiny", contents, JUDGEMENT, use(ready)).split("---\n", 2)[1]
    assert yaml.safe_load(header).get("base_model") == named


TICKET = {
    "messages": [
        {"role": "system", "content": "Sort it."},
        {"role": "user", "content": "My\n```\nscreen's black \x1b[31m \u0085 Grüße 🙂 $HOME `id`"},
        {"role": "assistant", "content": '{"a": 1}\nand so on'},
    ]
}


def judged(tokenizer: PreTrainedTokenizerBase, *rows: dict[str, Any]) -> Judgement:
    """With an answer to each row."""
    examples = [
        Renderer(tokenizer).render(to_conversation(row, recognise(row, ""), f"/data/rows.jsonl:{number}"))
        for number, row in enumerate(rows, start=1)
    ]
    return replace(JUDGEMENT, samples=tuple(SampleAnswers(example, "I am sorry", '{"a": 1}') for example in examples))


def test_the_shortest_row_is_shown_whole() -> None:
    long = {"instruction": "Say it. " * 40, "output": "So."}
    sample = shown_sample(judged(tiny_tokenizer(), long, TICKET, {"text": "Once."}))
    assert sample is not None
    assert transcript(sample) == [
        "rows.jsonl:2",
        "  system    Sort it.",
        "  user      My",
        "            ```",
        "            screen's black \\x1b[31m \\x85 Grüße 🙂 $HOME `id`",
        '  wanted    {"a": 1}',
        "            and so on",
        "  base      I am sorry",
        '  adapter   {"a": 1}',
    ]


def test_backticks_of_a_row_do_not_end_the_code_block(
    tmp_path: Path, ready: tuple[TrainSettings, Base, Dataset]
) -> None:
    contents = described(tmp_path / "a", ready)
    judgement = judged(tiny_tokenizer(), TICKET)
    asked = sample_request(judgement.samples[0].example, 16, own_template=False)
    text = card("tiny", contents, judgement, UsageExample("demo", [2], asked))
    row = blocks(text, "text")[0]
    assert row.endswith('  adapter   {"a": 1}')
    assert "system    Sort it." in row
    words = shlex.split(blocks(text, "sh")[0].partition("\n")[2])
    assert json.loads(words[-1])["messages"] == TICKET["messages"][:2], "the system prompt, and not one letter else"
    compile(blocks(text, "python")[0], "card", "exec")


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of a Markdown text."""
    tokens = MarkdownIt().parse(text)
    return [token.content.removesuffix("\n") for token in tokens if token.type == "fence" and token.info == language]


def asked(row: dict[str, Any], template: str | None = None) -> SampleRequest:
    example = Renderer(tiny_tokenizer(), template).render(to_conversation(row, recognise(row, ""), "a:1"))
    return sample_request(example, 16, own_template=template is not None)


def test_sample_request_of_each_format() -> None:
    greedy = {"max_tokens": 16, "temperature": 0}
    assert asked({"prompt": "2+2=", "completion": "4"}).body == {"prompt": "2+2=", **greedy}
    assert asked({"text": "Once upon a time. " * 9}).body == {"prompt": ("Once upon a time. " * 9)[:60], **greedy}
    alpaca = asked({"instruction": "Hi", "output": "Hello", "system": "Be brief."})
    assert alpaca.path == "/v1/chat/completions"
    assert alpaca.body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def test_unrenderable_prompts_are_sent_as_token_ids() -> None:
    """Tools, which the server refuses, and a template other than the base's."""
    own = asked(TICKET, "Chat:" + CHAT_TEMPLATE)
    assert own.path == "/v1/completions"
    text = tiny_tokenizer().decode(own.body["prompt"])
    assert text.startswith("Chat:<|im_start|>system\nSort it.")
    assert text.endswith("<|im_start|>assistant\n")
    assert "template" in (own.reason or "")
    row = {**TICKET, "messages": [*TICKET["messages"], {"role": "tool", "content": "7"}, TICKET["messages"][-1]]}
    tools = asked(row)
    assert isinstance(tools.body["prompt"], list)
    assert "tools" in (tools.reason or "")


def test_curl_command_is_shell_safe() -> None:
    request = asked(TICKET)
    command = curl_command(shlex.quote("http://127.0.0.1:8000/a b;c"), "team/x", request)
    words = shlex.split(command)
    assert words[:2] == ["curl", "http://127.0.0.1:8000/a b;c/v1/chat/completions"]
    assert json.loads(words[-1]) == {"model": "team/x", **request.body}
    assert "\x1b" not in command
    assert "\u0085" not in command
    assert "Grüße" in command
